package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"platter/provision"
)

// These tests need root: they make network namespaces and real machines with
// libvirtd and QEMU. The machines are emulated, whatever the host can do.

// TestMain lets the test binary be the processes that the tests kill or start:
// with VMTEST_RUN it does what that says instead of testing.
func TestMain(m *testing.M) {
	var err error
	switch os.Getenv("VMTEST_RUN") {
	case "":
		os.Exit(m.Run())
	case "up": // bring up the lab of VMTEST_CONFIG in VMTEST_DIR
		var cfg Config
		if err = json.Unmarshal([]byte(os.Getenv("VMTEST_CONFIG")), &cfg); err == nil {
			_, err = Up(context.Background(), cfg, os.Getenv("VMTEST_DIR"))
		}
	case "exec": // become this program's "serve" in the lab of VMTEST_DIR
		os.Setenv("VMTEST_RUN", "serve")
		var l *Lab
		if l, err = Open(os.Getenv("VMTEST_DIR")); err == nil {
			err = l.Exec(context.Background(), []string{"/proc/self/exe"}, []string{"127.0.0.1:0", "127.0.0.1:0"}, func(a net.Addr) { fmt.Println(a) })
		}
	case "name": // make a network namespace, let ip make one too, remove both
		if err = ensureNetNS("ours"); err == nil {
			var out []byte
			if out, err = exec.Command("sh", "-ec", "ip netns add theirs; ip -n ours link; ip netns del theirs").CombinedOutput(); err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			} else {
				err = deleteNetNS("ours")
			}
		}
	case "serve": // tell each passed socket's first client who serves it
		for i := range 2 {
			var ln net.Listener
			if ln, err = net.FileListener(os.NewFile(uintptr(firstListener+i), "")); err != nil {
				break
			}
			var c net.Conn
			if c, err = ln.Accept(); err != nil {
				break
			}
			ns, _ := os.Readlink("/proc/self/ns/net")
			fmt.Fprintf(c, "%d pid=%d LISTEN_PID=%s LISTEN_FDS=%s %s\n", i, os.Getpid(), os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), ns)
			c.Close()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func testConfig(machines ...Machine) Config {
	return Config{Name: "test", Network: Network{"br0", netip.MustParsePrefix("10.78.0.1/24")}, Machines: machines}
}

func bios(name string, n int, disks ...Disk) Machine {
	mac := fmt.Sprintf("52:54:00:78:00:%02x", n)
	return Machine{Name: name, MAC: provision.MAC(mac), Firmware: BIOS, PXE: PXEiPXE, CPUs: 1, Memory: 128 << 20, Disks: disks}
}

func uefi(name string, n int, disks ...Disk) Machine {
	m := bios(name, n, disks...)
	m.Firmware, m.PXE, m.Memory = UEFI, PXEPlain, 256<<20
	return m
}

// start brings up a lab that ends with the test.
func start(t *testing.T, cfg Config, dir string) *Lab {
	t.Helper()
	t.Setenv(AccelVariable, string(TCG))
	t.Cleanup(func() {
		if err := Down(context.Background(), dir, false); err != nil {
			t.Error(err)
		}
	})
	l, err := Up(t.Context(), cfg, dir)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func power(t *testing.T, l *Lab, machine string, to Power) {
	t.Helper()
	if err := l.Power(t.Context(), machine, to); err != nil {
		t.Fatal(err)
	}
}

func status(t *testing.T, l *Lab) Status {
	t.Helper()
	s, err := l.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// await reads r until re matches what it has read in all.
func await(t *testing.T, r io.Reader, re string) {
	t.Helper()
	var read bytes.Buffer
	buf := make([]byte, 4096)
	for want := regexp.MustCompile(re); ; {
		n, err := r.Read(buf)
		read.Write(buf[:n])
		if want.Match(read.Bytes()) {
			return
		}
		if err != nil {
			t.Fatalf("%v before %q came, but:\n%s", err, re, read.Bytes())
		}
	}
}

// traces finds everything in the system that has to do with a lab, by other
// means than Down does: processes by the folders in their mount tables, by
// their command line and by namespace, and mounts and names by their text.
func traces(t *testing.T, dir, netns string, ns fileID) []string {
	t.Helper()
	var out []string
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	marker := strings.NewReplacer(" ", `\040`).Replace(filepath.Join(dir, "var"))
	for _, p := range procs {
		pid, _ := strconv.Atoi(filepath.Base(p))
		if pid == os.Getpid() {
			continue
		}
		mounts, _ := os.ReadFile(p + "/mountinfo")
		cmdline, _ := os.ReadFile(p + "/cmdline")
		id, err := identify(p + "/ns/net")
		if bytes.Contains(mounts, []byte(marker)) || bytes.Contains(cmdline, []byte(dir)) || err == nil && ns != (fileID{}) && id == ns {
			out = append(out, fmt.Sprintf("process %d %q", pid, cmdline))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{marker, netns} {
		if bytes.Contains(mounts, []byte(text)) {
			out = append(out, "mount of "+text)
		}
	}
	if _, err := os.Lstat(filepath.Join(netnsFolder, netns)); err == nil {
		out = append(out, "namespace "+netns)
	}
	return out
}

// systemFolders is when the folders of a system libvirtd last changed.
func systemFolders() string {
	var out []string
	for _, p := range []string{"/run/libvirt", "/run/libvirtd.pid", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/etc/libvirt", "/etc/passwd", "/etc/group", "/run/console", "/dev/hugepages/libvirt"} {
		st, err := os.Stat(p)
		if err != nil {
			out = append(out, p+" absent")
			continue
		}
		out = append(out, p+" "+st.ModTime().String())
	}
	return strings.Join(out, "\n")
}

// A folder with a name that paths in sockets, mount tables and command lines
// trip over.
func awkwardFolder(t *testing.T) string {
	return filepath.Join(t.TempDir(), "a lab, with a name "+strings.Repeat("that is long ", 10))
}

func TestUpAndDownLeaveNothing(t *testing.T) {
	before := systemFolders()
	dir := awkwardFolder(t)
	cfg := testConfig(bios("a", 1, Disk{64 << 20, "one"}, Disk{32 << 20, ""}), uefi("b", 2))
	l := start(t, cfg, dir)
	s := status(t, l)
	if !s.Running || s.Accel != TCG || len(s.Machines) != 2 || s.Machines[0].Power != Off || s.Machines[1].Power != Off {
		t.Fatalf("a new lab is %+v", s)
	}
	if st, err := os.Stat(s.Machines[0].Images[0]); err != nil || st.Size() != 64<<20 || st.Sys().(*syscall.Stat_t).Blocks != 0 {
		t.Errorf("the disk is not blank and sparse: %v, %v", st, err)
	}
	power(t, l, "a", On)
	power(t, l, "b", On)
	other, err := Open(dir) // as another process would
	if err != nil {
		t.Fatal(err)
	}
	s = status(t, other)
	if s.Machines[0].Power != On || s.Machines[1].Power != On {
		t.Errorf("machines that were switched on are %+v", s.Machines)
	}
	ns, err := identifyNetNS(s.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	// What the disc host starts there ends with the lab.
	server := l.Command(t.Context(), "sleep", "1000")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	for len(status(t, l).Processes) != 4 { // libvirtd, two machines, sleep once nsenter is it
		time.Sleep(10 * time.Millisecond)
	}
	if got := traces(t, dir, s.NetNS, ns); len(got) < 6 {
		t.Fatalf("the oracle is blind, it sees of a running lab only %q", got)
	}

	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-ended
	if got := traces(t, dir, s.NetNS, ns); len(got) > 0 {
		t.Errorf("down left %q", got)
	}
	if after := systemFolders(); after != before {
		t.Errorf("the system's folders were touched, before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := os.Stat(l.Console("a")); err != nil {
		t.Error("the console did not stay:", err)
	}
	if names := listDir(t, dir); !slices.Equal(names, []string{"console"}) {
		t.Errorf("the state folder holds %q", names)
	}
	if _, err := Open(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of a lab that was taken down gives %v", err)
	}
	if err := l.Power(t.Context(), "a", On); err == nil || !strings.Contains(err.Error(), "not up") {
		t.Errorf("power of a lab that is down gives %v", err)
	}
	if err := Down(t.Context(), dir, true); err != nil {
		t.Errorf("down of a lab that is down: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("purge left the folder: %v", err)
	}
	if err := Down(t.Context(), dir, true); err != nil {
		t.Errorf("down of no lab: %v", err)
	}
}

func listDir(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// The machine's firmware asks the network first: a DHCP server in the lab
// hears its MAC, on each power-on, and its console is kept.
func TestAMachineBootsFromTheLabsNetwork(t *testing.T) {
	dir := t.TempDir()
	m := bios("node1", 0x11)
	l := start(t, testConfig(m), dir)

	routes, err := l.Command(t.Context(), "ip", "route").Output()
	if err != nil || !bytes.HasPrefix(routes, []byte("10.78.0.0/24 dev br0 ")) || bytes.Count(routes, []byte("\n")) != 1 {
		t.Errorf("the lab's routes are %q, %v", routes, err)
	}
	dhcp := l.Command(t.Context(), "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=br0", "--bind-interfaces",
		"--dhcp-range=10.78.0.100,10.78.0.150", "--dhcp-leasefile="+filepath.Join(dir, "leases"), "--log-facility=-", "--pid-file=")
	log, err := dhcp.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := dhcp.Start(); err != nil {
		t.Fatal(err)
	}
	discover := `DHCPDISCOVER\(br0\) .*` + string(m.MAC)
	lines := bufio.NewReader(log)
	await(t, lines, `dnsmasq-dhcp.*IP range`)

	power(t, l, "node1", On)
	console := l.Follow(t.Context(), "node1", 0)
	defer console.Close()
	await(t, console, `iPXE`)
	await(t, lines, discover)

	// Attached, the console takes keys: Ctrl-B enters the iPXE shell.
	conn, err := l.Attach(t.Context(), "node1")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var typed atomic.Bool
	go func() {
		for !typed.Load() {
			conn.Write([]byte{2})
			time.Sleep(100 * time.Millisecond)
		}
	}()
	await(t, conn, `iPXE>`)
	typed.Store(true)

	size := func() int64 {
		st, err := os.Stat(l.Console("node1"))
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	power(t, l, "node1", Off)
	power(t, l, "node1", Off)
	if s := status(t, l); s.Machines[0].Power != Off {
		t.Errorf("after power off the machine is %s", s.Machines[0].Power)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Errorf("the attached console ends with %v when power goes", err)
	}
	if err := l.Power(t.Context(), "node1", Reset); err == nil {
		t.Error("a machine without power could be reset")
	}
	before := size()
	power(t, l, "node1", Cycle)
	again := l.Follow(t.Context(), "node1", before)
	defer again.Close()
	await(t, again, `SeaBIOS`)
	power(t, l, "node1", Reset)
	await(t, again, `SeaBIOS`)
	await(t, lines, discover)
	if size() <= before {
		t.Error("the console was not kept over a power cycle")
	}
	if err := l.Power(t.Context(), "node2", On); err == nil || !strings.Contains(err.Error(), "it has node1") {
		t.Errorf("power of an unknown machine gives %v", err)
	}
}

func TestTwoLabsSideBySide(t *testing.T) {
	// Alike in all but their folder.
	cfg := testConfig(bios("node1", 0x21, Disk{1 << 20, "s"}))
	one, two := start(t, cfg, filepath.Join(t.TempDir(), "lab")), start(t, cfg, filepath.Join(t.TempDir(), "lab"))
	power(t, one, "node1", On)
	power(t, two, "node1", On)
	s1, s2 := status(t, one), status(t, two)
	if s1.NetNS == s2.NetNS || len(s1.Processes) != 2 || len(s2.Processes) != 2 {
		t.Fatalf("labs are not apart: %+v and %+v", s1, s2)
	}
	if err := one.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := status(t, two); !s.Running || s.Machines[0].Power != On || !slices.Equal(s.Processes, s2.Processes) {
		t.Errorf("after the first lab went down the second is %+v", s)
	}
	power(t, two, "node1", Cycle)
}

func TestUpAgainReconciles(t *testing.T) {
	dir := t.TempDir()
	cfg := testConfig(bios("keep", 0x31, Disk{2 << 20, "s"}), bios("drop", 0x32, Disk{1 << 20, ""}))
	l := start(t, cfg, dir)
	power(t, l, "keep", On)
	power(t, l, "drop", On)
	qemu := func() []int {
		var pids []int
		for _, p := range status(t, l).Processes {
			if strings.HasPrefix(p.Command, "qemu-system") {
				pids = append(pids, p.PID)
			}
		}
		return pids
	}
	if n := len(qemu()); n != 2 {
		t.Fatalf("%d machines run", n)
	}
	// libvirtd dies, a machine goes, one comes, a disk grows, the disc host moves.
	for _, p := range status(t, l).Processes {
		if p.Command == "libvirtd" {
			syscall.Kill(p.PID, syscall.SIGKILL)
			for syscall.Kill(p.PID, 0) == nil {
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
	if s := status(t, l); s.Running || len(s.Processes) != 2 {
		t.Errorf("without libvirtd the lab is %+v", s)
	}
	keep := bios("keep", 0x31, Disk{3 << 20, "s"})
	cfg = testConfig(keep, uefi("new", 0x33))
	cfg.Network.Address = netip.MustParsePrefix("10.79.0.1/24")
	l, err := Up(t.Context(), cfg, dir)
	if err != nil {
		t.Fatal(err)
	}
	s := status(t, l)
	if len(s.Machines) != 2 || s.Machines[0].Power != On || s.Machines[1].Power != Off || len(qemu()) != 1 {
		t.Errorf("the lab became %+v", s)
	}
	if st, err := os.Stat(s.Machines[0].Images[0]); err != nil || st.Size() != 3<<20 {
		t.Errorf("the disk did not grow: %v", err)
	}
	if images := listDir(t, filepath.Dir(s.Machines[0].Images[0])); len(images) != 1 {
		t.Errorf("images are %q", images)
	}
	if out, err := l.Command(t.Context(), "ip", "-4", "-o", "addr", "show", "br0").Output(); err != nil || !bytes.Contains(out, []byte("10.79.0.1/24")) || bytes.Contains(out, []byte("10.78")) {
		t.Errorf("the bridge has %q, %v", out, err)
	}

	keep.Disks[0].Size = 1 << 20
	if _, err := Up(t.Context(), testConfig(keep), dir); err == nil || !strings.Contains(err.Error(), "cannot shrink") {
		t.Errorf("a disk that shrinks gives %v", err)
	}
	cfg.Name = "other"
	if _, err := Up(t.Context(), cfg, dir); err == nil || !strings.Contains(err.Error(), "state folder of lab test") {
		t.Errorf("a lab in another's folder gives %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	unlock, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := Down(ctx, dir, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Down while another works on the lab gives %v", err)
	}
}

// However far Up came when it was killed, Down finds all it made.
func TestDownAfterUpWasKilled(t *testing.T) {
	cfg, err := json.Marshal(testConfig(bios("node1", 0x41, Disk{1 << 20, ""})))
	if err != nil {
		t.Fatal(err)
	}
	exists := func(parts ...string) func(dir string) bool {
		return func(dir string) bool {
			found, err := filepath.Glob(filepath.Join(append([]string{dir}, parts...)...))
			return err == nil && len(found) > 0
		}
	}
	for name, reached := range map[string]func(dir string) bool{
		"recorded": exists("lab.json"),
		"namespace": func(dir string) bool {
			_, err := os.Lstat(filepath.Join(netnsFolder, netnsName(dir)))
			return err == nil
		},
		"furnished": exists("etc", "group"),
		"daemon":    exists("run", "libvirtd.pid"),
		"socket":    exists("run", "libvirt", "libvirt-sock"),
		"disk":      exists("var", "lib", "libvirt", "images", "node1-0.raw"),
		"defined":   exists("etc", "qemu", "node1.xml"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "lab")
			up := exec.Command("/proc/self/exe")
			up.Env = append(os.Environ(), AccelVariable+"="+string(TCG), "VMTEST_RUN=up", "VMTEST_DIR="+dir, "VMTEST_CONFIG="+string(cfg))
			if err := up.Start(); err != nil {
				t.Fatal(err)
			}
			for !reached(dir) {
				time.Sleep(time.Millisecond)
			}
			ns, _ := identifyNetNS(netnsName(dir))
			up.Process.Kill()
			up.Wait()
			if err := Down(t.Context(), dir, false); err != nil {
				t.Fatal(err)
			}
			if got := traces(t, dir, netnsName(dir), ns); len(got) > 0 {
				t.Errorf("down left %q", got)
			}
			if names := listDir(t, dir); len(slices.DeleteFunc(names, func(s string) bool { return s == "console" })) > 0 {
				t.Errorf("the state folder holds %q", names)
			}
		})
	}
}

// The first 'ip netns add' of a machine mounts the folder of names over itself: a
// lab that was there before can be removed all the same.
func TestNamesBesideIP(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "sh", "-c", `mount -t tmpfs none /run && exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), "VMTEST_RUN=name")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestExecPassesSocketsIntoTheLab(t *testing.T) {
	dir := t.TempDir()
	l := start(t, testConfig(bios("node1", 0x51)), dir)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), "VMTEST_RUN=exec", "VMTEST_DIR="+dir, "LISTEN_FDS=7")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for i := range 2 {
		if !lines.Scan() {
			t.Fatal("no address was printed")
		}
		addr := lines.Text()
		t.Logf("socket %d is %s", i, addr)
		conn, err := net.Dial("tcp", addr) // from outside the lab
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		got, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		ns, err := l.Command(t.Context(), "readlink", "/proc/self/ns/net").Output()
		if err != nil {
			t.Fatal(err)
		}
		// The pid is that of the process we started: nothing stands between.
		if want := fmt.Sprintf("%d pid=%d LISTEN_PID=%[2]d LISTEN_FDS=2 %s", i, cmd.Process.Pid, ns); string(got) != want {
			t.Errorf("the server says %q, want %q", got, want)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if err := l.Exec(t.Context(), []string{"/no/such/program"}, nil, nil); err == nil {
		t.Error("a program that is not there started")
	}
}
