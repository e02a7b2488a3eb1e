//go:build e2e

package vmtest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/images"
	"platter/provision"
)

// One rack from power-on to a chat message, and everything that is then done
// to it: the disc host is killed while the node writes, its kernel panics, it is
// installed again. BIOS and kexec: TestDisc and TestHost. What the service of
// several nodes stands: TestStack.
func TestRack(t *testing.T) {
	t.Parallel()
	r := newRig(t, fmt.Sprintf(labHead, "e2e-rack")+`
  - {name: node1, mac: "52:54:00:77:01:01", firmware: uefi, cpus: 2, memory: 3GiB, disks: [{size: 8GiB, serial: one}]}
`, rackHead+`
  - {name: node1, slot: U1, mac: "52:54:00:77:01:01", address: 10.77.0.11, finish: reboot, disk: {serial: one}}
`)
	r.power("on", "node1")

	// The disc host dies in the middle of a write.
	var before provision.State
	r.await("node1 has written a third", func(s map[string]provision.State) bool {
		before = s["node1"]
		return before.Phase == "write" && before.Total > 0 && 3*before.Done > before.Total
	})
	r.stopServe(syscall.SIGKILL)
	r.startServe()
	after := r.await("node1 goes on writing", func(s map[string]provision.State) bool {
		n := s["node1"]
		return n.Stage == provision.StageInstalled || n.Total > 0 && n.Done > 0
	})["node1"]
	if after.Stage == provision.StageInstalling && after.Phase == before.Phase && after.Done < before.Done {
		t.Errorf("the write started over: %d bytes before the kill, %d after", before.Done, after.Done)
	}

	ready := r.await("the node is ready", stageIs("node1", provision.StageReady))
	ev := r.events("node1")
	if n := count(ev, func(e provision.Event) bool { return e.Kind == provision.EventEnrol }); n != 1 {
		t.Errorf("node1 enrolled %d times: the kill made it start over", n)
	}
	if n := count(ev, func(e provision.Event) bool {
		return e.Kind == provision.EventProbe && strings.Contains(e.Detail, "message")
	}); n == 0 {
		t.Error("node1 is ready without a message that arrived")
	}

	t.Run("the list is an array of ready nodes", func(t *testing.T) {
		var list []struct{ Name, Stage string }
		if err := json.Unmarshal([]byte(r.node("ls", "-o", "json")), &list); err != nil {
			t.Fatal(err)
		}
		if len(list) != 1 || list[0].Name != "node1" || list[0].Stage != "ready" {
			t.Errorf("node ls says %+v", list)
		}
	})
	t.Run("the page shows it", func(t *testing.T) {
		for path, want := range map[string]string{"/": "<html", "/v1/nodes": `"node1"`} {
			resp, err := http.Get(r.page + path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != 200 || !strings.Contains(string(body), want) {
				t.Errorf("GET %s: %s without %q", path, resp.Status, want)
			}
		}
		resp, err := http.Post(r.page+"/v1/nodes/node1/reinstall", "application/json", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Error("the page's listener accepted a change")
		}
	})
	var machine, key string
	t.Run("the host is as planned", func(t *testing.T) {
		// One session: each costs an emulated node seconds.
		out := r.ssh("10.77.0.11", `set -e
ovs-vsctl br-exists br-vm
systemctl is-active libvirtd openvswitch-switch ejabberd platter-agent > /dev/null
hostname
df --output=size / | tail -1
stat -c %a /etc/platter/identity.json /var/lib/ejabberd/.erlang.cookie | tr '\n' ' '; echo
cat /etc/machine-id
cat /etc/ssh/ssh_host_ed25519_key.pub
ip route; cat /proc/cmdline`)
		f := strings.SplitN(out, "\n", 6)
		if len(f) < 6 {
			t.Fatalf("it answers %q", out)
		}
		if f[0] != "node1" {
			t.Errorf("it calls itself %q", f[0])
		}
		var kib int
		fmt.Sscan(f[1], &kib)
		if kib < 7<<20 {
			t.Errorf("the root file system has %d KiB of an 8 GiB disk", kib)
		}
		if f[2] != "600 400 " {
			t.Errorf("modes of the secrets are %q", f[2])
		}
		machine, key = f[3], f[4]
		if strings.Contains(f[5], "token") {
			t.Error(f[5])
		}
	})
	t.Run("the service is whole and every probe passes", func(t *testing.T) {
		socket := filepath.Join(r.dir, "socket")
		t.Log(r.platter("stack", "status", "--socket", socket))
		t.Log(r.platter("stack", "probe", "--socket", socket))
	})
	// Only until its own system has started the service again: the rest is seen on
	// boxes, in seconds.
	service := func(s provision.State) bool {
		return s.Stage == provision.StageJoining || s.Stage == provision.StageProbing || s.Stage == provision.StageReady
	}
	t.Run("a kernel panics", func(t *testing.T) {
		installs, boot := count(r.events("node1"), isInstallBoot), ready["node1"].Facts["boot_id"]
		if boot == "" {
			t.Fatal("node1 does not say which boot it is in")
		}
		// Later, so that ssh gets its answer.
		r.ssh("10.77.0.11", "systemd-run -q --on-active=1s --timer-property=AccuracySec=100ms sh -c 'echo c > /proc/sysrq-trigger'")
		n := r.await("the service starts again", func(s map[string]provision.State) bool {
			return service(s["node1"]) && s["node1"].Facts["boot_id"] != boot
		})["node1"]
		if n := count(r.events("node1"), isInstallBoot); n != installs {
			t.Errorf("node1 was given the installer %d more times: it did not come back from its own disk", n-installs)
		}
		if n.Generation != 1 || n.Installed != 1 {
			t.Errorf("node1: generation %d granted, %d installed, want 1", n.Generation, n.Installed)
		}
	})
	t.Run("it is reinstalled", func(t *testing.T) {
		r.node("reinstall", "node1")
		r.power("cycle", "node1")
		s := r.await("the service starts on the new system", func(s map[string]provision.State) bool {
			return service(s["node1"]) && s["node1"].Installed == 2
		})
		if s["node1"].GrantOpen {
			t.Error("its grant is still open")
		}
		if out := r.ssh("10.77.0.11", "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub"); strings.Contains(out, machine) || strings.Contains(out, key) {
			t.Error("it has its old machine-id or host key: it was not installed")
		}
	})
}

// Machines that must not be installed are not: strangers, a node whose rule
// fits two disks, one whose rule fits none, and one whose image is damaged.
func TestRefusals(t *testing.T) {
	r := newRig(t, fmt.Sprintf(labHead, "e2e-refuse")+`
  - {name: stranger, mac: "52:54:00:77:02:01", cpus: 1, memory: 1GiB, disks: [{size: 1GiB, serial: s}]}
  - {name: twodisks, mac: "52:54:00:77:02:02", cpus: 1, memory: 1GiB, disks: [{size: 8GiB, serial: a}, {size: 8GiB, serial: b}]}
  - {name: nodisk, mac: "52:54:00:77:02:03", cpus: 1, memory: 1GiB, disks: [{size: 8GiB, serial: c}]}
  - {name: damaged, mac: "52:54:00:77:02:04", cpus: 2, memory: 2GiB, disks: [{size: 8GiB, serial: d}]}
`, rackHead+`
  - {name: twodisks, mac: "52:54:00:77:02:02", address: 10.77.0.12}
  - {name: nodisk, mac: "52:54:00:77:02:03", address: 10.77.0.13, disk: {serial: absent}}
  - {name: damaged, mac: "52:54:00:77:02:04", address: 10.77.0.14}
`)
	disks := func() map[string][32]byte {
		out := map[string][32]byte{}
		files, err := filepath.Glob(filepath.Join(r.lab, "var/lib/libvirt/images/*"))
		if err != nil || len(files) != 5 {
			t.Fatalf("the lab's disks are %v, %v", files, err)
		}
		for _, f := range files {
			h := sha256.New()
			in, err := os.Open(f)
			if err != nil {
				t.Fatal(err)
			}
			// The first 64 MiB hold every partition table and the start of every partition.
			if _, err := io.CopyN(h, in, 64<<20); err != nil {
				t.Fatal(err)
			}
			in.Close()
			out[filepath.Base(f)] = [32]byte(h.Sum(nil))
		}
		return out
	}
	blank := disks()
	for _, name := range []string{"stranger", "twodisks", "nodisk"} {
		r.power("on", name)
	}
	const mac = "52:54:00:77:02:01"
	s := r.await("the stranger is listed, two nodes have stopped", func(s map[string]provision.State) bool {
		return s[mac].Stage == provision.StageUnknown && len(s[mac].Facts) > 0 &&
			s["twodisks"].Stage == provision.StageFailed && s["nodisk"].Stage == provision.StageFailed
	}, "twodisks", "nodisk")
	for name, code := range map[string]string{"twodisks": "disk-ambiguous", "nodisk": "disk-none"} {
		f := s[name].Failure
		if f == nil || f.Code != code || f.Next == "" {
			t.Errorf("%s: failure is %+v, want %s with a next step", name, f, code)
			continue
		}
		if out := r.node("show", name); !strings.Contains(out, code) {
			t.Errorf("node show %s does not say %s:\n%s", name, code, out)
		}
		if !strings.Contains(r.console(name), f.Message) {
			t.Errorf("the console of %s does not say %q", name, f.Message)
		}
	}
	if now := disks(); fmt.Sprint(now) != fmt.Sprint(blank) {
		t.Error("a disk was touched")
	}
	for _, name := range []string{"stranger", "twodisks", "nodisk"} {
		r.power("off", name)
	}

	// One bit of the pack flips on the disc.
	damaged := filepath.Join(r.dir, "store")
	r.run("cp", "-r", r.store, damaged)
	st, err := images.Open(damaged)
	if err != nil {
		t.Fatal(err)
	}
	_, im, err := st.Image("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	root, _ := im.Part(provision.PartRoot)
	frame := root.Frames[len(root.Frames)/8]
	pack, err := os.OpenFile(filepath.Join(damaged, "objects", im.Pack.Hash), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	at := frame.At + int64(frame.Packed)/2
	one := make([]byte, 1)
	if _, err := pack.ReadAt(one, at); err != nil {
		t.Fatal(err)
	}
	one[0] ^= 0x10
	if _, err := pack.WriteAt(one, at); err != nil {
		t.Fatal(err)
	}
	pack.Close()
	r.stopServe(syscall.SIGTERM)
	r.store = damaged
	r.startServe()
	r.power("on", "damaged")
	f := r.await("the damaged image is refused", stageIs("damaged", provision.StageFailed), "twodisks", "nodisk", "damaged")["damaged"].Failure
	if f.Code != "chunk-corrupt" || !strings.Contains(f.Message, im.Pack.Hash) || !strings.Contains(f.Message, fmt.Sprint(frame.At)) {
		t.Errorf("failure is %+v, want chunk-corrupt with object %s and offset %d", f, im.Pack.Hash, frame.At)
	}
	r.power("off", "damaged")
	first := make([]byte, 1024)
	disk, err := os.Open(filepath.Join(r.lab, "var/lib/libvirt/images", "damaged-0.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if _, err := disk.ReadAt(first, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, make([]byte, 1024)) {
		t.Error("the disk has boot code or a partition table")
	}
}

// What keeps serve from starting is one clear sentence, and nothing is started.
func TestServeRefuses(t *testing.T) {
	repo, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} { // somebody who is not root reads it, too
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	must := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	here, there := fmt.Sprintf("pl-e2e-%d-a", os.Getpid()), fmt.Sprintf("pl-e2e-%d-b", os.Getpid())
	for _, ns := range []string{here, there} {
		must("ip", "netns", "add", ns)
		t.Cleanup(func() { exec.Command("ip", "netns", "del", ns).Run() })
		must("ip", "-n", ns, "link", "set", "lo", "up")
	}
	must("ip", "-n", here, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", there)
	for ns, addr := range map[string]string{here: "10.77.0.1/24", there: "10.77.0.9/24"} {
		must("ip", "-n", ns, "addr", "add", addr, "dev", "eth0")
		must("ip", "-n", ns, "link", "set", "eth0", "up")
	}
	rack := filepath.Join(dir, "rack.yaml")
	text := strings.Replace(rackHead, "interface: br0", "interface: eth0", 1)
	text = strings.Replace(text, "users:\n  - {name: root, key-files: [key.pub]}\n", "", 1)
	if err := os.WriteFile(rack, []byte(text+"\n  - {name: node1, mac: \"52:54:00:77:03:01\", address: 10.77.0.11}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	dnsmasq := func(ns string, args ...string) (stop func()) {
		t.Helper()
		ready := filepath.Join(dir, "dnsmasq.pid")
		os.Remove(ready)
		cmd := exec.Command("ip", append([]string{"netns", "exec", ns, "dnsmasq", "--conf-file=/dev/null", "--port=0", "--keep-in-foreground",
			"--user=root", "--pid-file=" + ready, "--dhcp-leasefile=" + filepath.Join(dir, "leases")}, args...)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		gone := make(chan struct{})
		go func() { cmd.Wait(); close(gone) }()
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			if _, err := os.Stat(ready); err == nil { // written once its sockets are open
				break
			}
			select {
			case <-gone:
				t.Fatalf("dnsmasq ended: %s", &out)
			case <-tick.C:
			}
		}
		return func() { cmd.Process.Signal(syscall.SIGTERM); <-gone }
	}
	args := func(extra ...string) []string {
		return append([]string{"netns", "exec", here, filepath.Join(repo, "bin/platter"), "serve", "-c", rack,
			"--store", filepath.Join(repo, "build/store"), "--state", filepath.Join(dir, "state"), "--socket", filepath.Join(dir, "socket")}, extra...)
	}
	for _, c := range []struct {
		name  string
		start func() (stop func())
		args  []string
		say   []string
	}{
		{"another DHCP server", func() func() {
			return dnsmasq(there, "--interface=eth0", "--dhcp-range=10.77.0.100,10.77.0.120")
		}, args(), []string{"DHCP", "10.77.0.9", "eth0"}},
		{"port taken", func() func() {
			return dnsmasq(here, "--interface=eth0", "--bind-interfaces", "--enable-tftp", "--tftp-root="+dir)
		}, args(), []string{"69", "TFTP"}},
		{"disc missing", nil, args("--store", filepath.Join(dir, "absent")), []string{filepath.Join(dir, "absent")}},
		{"image missing", nil, args("-c", strings.TrimSuffix(rack, ".yaml")+"2.yaml"), []string{"debian-99"}},
		{"interface missing", nil, args("-c", strings.TrimSuffix(rack, ".yaml")+"3.yaml"), []string{"eth7"}},
		{"not root", nil, append([]string{"netns", "exec", here, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}, args()[3:]...), []string{"root"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for name, edit := range map[string][2]string{"2.yaml": {"debian-13", "debian-99"}, "3.yaml": {"eth0", "eth7"}} {
				b, err := os.ReadFile(rack)
				if err != nil {
					t.Fatal(err)
				}
				b = bytes.Replace(b, []byte(edit[0]), []byte(edit[1]), 1)
				if err := os.WriteFile(strings.TrimSuffix(rack, ".yaml")+name, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if c.start != nil {
				defer c.start()()
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "ip", c.args...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Fatalf("serve ended with %v: %s", err, &stderr)
			}
			var sentence []string
			for _, line := range strings.Split(strings.TrimSpace(stderr.String()), "\n") {
				if !strings.HasPrefix(line, "time=") { // the log
					sentence = append(sentence, line)
				}
			}
			if len(sentence) != 1 {
				t.Errorf("want one sentence, got:\n%s", &stderr)
			}
			for _, want := range c.say {
				if !strings.Contains(sentence[0], want) {
					t.Errorf("%q does not name %s", sentence[0], want)
				}
			}
		})
	}
	t.Run("mistakes in the rack file", func(t *testing.T) {
		for _, cmd := range [][]string{{"serve", "-c"}, {"rack", "check"}} {
			out, err := exec.Command(filepath.Join(repo, "bin/platter"), append(cmd, filepath.Join(repo, "provision/rack/testdata/mistakes.yaml"))...).CombinedOutput()
			if err == nil {
				t.Errorf("%v accepted the file", cmd)
			}
			if n := strings.Count(string(out), "mistakes.yaml:"); n < 15 {
				t.Errorf("%v lists %d mistakes:\n%s", cmd, n, out)
			}
		}
	})
}
