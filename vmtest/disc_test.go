//go:build e2e

package vmtest_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
	"platter/vmtest"
)

// TestDisc: a machine that boots from the disc serves a blank one until a message
// has passed, with rack file and state on a stick; nothing asks for anything
// outside of the rack. PLATTER_DISC names a folder with a set; without it one is
// built here.
func TestDisc(t *testing.T) {
	t.Parallel()
	r := newDiscRig(t)
	volumes := r.set()
	stick := filepath.Join(r.dir, "stick.img")
	r.run("mkfs.vfat", "-C", "-n", "PLATTER", stick, "65536")
	r.run("mcopy", "-i", stick, filepath.Join(r.dir, "rack.yaml"), filepath.Join(r.dir, "key.pub"), "::/")
	r.write("lab.yaml", fmt.Sprintf(labHead, "e2e-disc")+fmt.Sprintf(`
  - {name: host, mac: "52:54:00:77:0d:00", cpus: 2, memory: 2GiB, media: [%q, %q]}
  - {name: node1, mac: "52:54:00:77:0d:01", firmware: bios, cpus: 2, memory: 3GiB, disks: [{size: 8GiB, serial: one}]}
`, volumes[0], stick))
	r.platter("lab", "up", "--state", r.lab, filepath.Join(r.dir, "lab.yaml"))
	asked := r.trapNames()
	left := r.trapPackets()

	began := time.Now()
	r.power("on", "host")
	r.says("host", "Serving.")
	t.Logf("the disc host serves after %s", time.Since(began).Round(time.Second))
	r.power("on", "node1")
	was, moved := "", time.Now()
	for {
		var nodes []provision.State
		if out, err := exec.Command(r.bin(), "lab", "exec", "--state", r.lab, "--", "curl", "-sf", "--max-time", "20", "http://10.77.0.2:8080/v1/nodes").Output(); err == nil {
			if err := json.Unmarshal(out, &nodes); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		if len(nodes) == 1 {
			n := nodes[0]
			if n.Stage == provision.StageReady {
				break
			}
			if n.Stage == provision.StageFailed {
				t.Fatalf("node1 failed: %v", n.Failure)
			}
			if is := fmt.Sprint(n.Stage, n.Phase, n.Done, n.LastLog); is != was {
				was, moved = is, time.Now()
			}
		}
		if time.Since(moved) > stall {
			t.Fatalf("nothing has moved for %s: %s", stall, was)
		}
		time.Sleep(2 * time.Second)
	}
	t.Logf("node1 is ready after %s", time.Since(began).Round(time.Second))
	r.says("host", "bare metal to operating system")
	if log := r.console("host"); !strings.Contains(log, "stack install to first message") {
		t.Error("the second clock is not on the console")
	}
	if queries := asked(); len(queries) > 0 {
		t.Errorf("somebody asked for names:\n%s", strings.Join(queries, "\n"))
	}
	if packets := left(); len(packets) > 0 {
		t.Errorf("somebody tried to leave:\n%s", strings.Join(packets, "\n"))
	}
	// The state outlives the machine: it is on the stick.
	r.power("off", "host")
	if out := r.run("mdir", "-i", stick, "-b", "::/platter-state"); !strings.Contains(out, "journal.db") {
		t.Errorf("on the stick are\n%s", out)
	}
}

// newDiscRig is a rig whose disc host is one of its machines.
func newDiscRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir()}
	var err error
	if r.repo, err = filepath.Abs(".."); err != nil {
		t.Fatal(err)
	}
	r.lab, r.store = filepath.Join(r.dir, "lab"), filepath.Join(r.repo, "build/store")
	r.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(r.dir, "key"))
	// The gateway and the name server that nodes are told of are traps.
	r.write("rack.yaml", `rack: from-disc
image: debian-13
page: 10.77.0.2:8080
networks:
  - {interface: eno1, subnet: 10.77.0.0/24, disc-host: 10.77.0.2, gateway: 10.77.0.1, dns: [10.77.0.1], pool: 10.77.0.200-10.77.0.220}
users:
  - {name: root, key-files: [key.pub]}
stack: {domain: im.e2e.example}
nodes:
  - {name: node1, mac: "52:54:00:77:0d:01", address: 10.77.0.11}
`)
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(r.lab, "console/*.log"))
			for _, file := range logs {
				if text, err := os.ReadFile(file); err == nil {
					t.Logf("%s ends:\n%s", filepath.Base(file), text[max(0, len(text)-6000):])
				}
			}
		}
		if out, err := exec.Command(r.bin(), "lab", "down", "--state", r.lab, "--purge").CombinedOutput(); err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	return r
}

// set is one volume, of PLATTER_DISC or built here; with flags of the build, as
// many as those make.
func (r *rig) set(flags ...string) []string {
	r.t.Helper()
	dir := os.Getenv("PLATTER_DISC")
	if dir == "" || len(flags) > 0 {
		dir = filepath.Join(r.dir, "set")
		r.write("disc.yaml", "name: platter\nversion: \"1.0\"\ndate: 2026-11-22\nimages: [debian-13]\n")
		r.t.Log(r.platter(append([]string{"disc", "build", "-f", filepath.Join(r.dir, "disc.yaml"), "-o", dir, "--store", r.store, "--key", filepath.Join(r.repo, "build/keys/image.key"),
			"--platter", filepath.Join(r.repo, "build/programs/platter"), "--node", filepath.Join(r.repo, "build/programs/platter-node")}, flags...)...))
	}
	volumes, err := filepath.Glob(filepath.Join(dir, "*.iso"))
	if err != nil || len(volumes) == 0 || len(flags) == 0 && len(volumes) != 1 {
		r.t.Fatalf("%s has the volumes %v", dir, volumes)
	}
	return volumes
}

// TestDiscStick: the same file on a USB stick boots a machine with UEFI. There is no
// rack file: somebody brings it with a browser, through the page, after comparing
// the certificate. Then the rack is served.
func TestDiscStick(t *testing.T) {
	t.Parallel()
	r := newDiscRig(t)
	stick := filepath.Join(r.dir, "stick.img")
	r.run("cp", r.set()[0], stick) // QEMU locks what a machine can write to
	r.write("lab.yaml", fmt.Sprintf(labHead, "e2e-stick")+fmt.Sprintf(`
  - {name: host, mac: "52:54:00:77:0d:07", firmware: uefi, cpus: 2, memory: 2GiB, media: [%q]}
`, stick))
	r.platter("lab", "up", "--state", r.lab, filepath.Join(r.dir, "lab.yaml"))
	r.inLab("ip", "address", "add", "169.254.200.1/16", "dev", "br0") // what a computer takes that gets no address
	began := time.Now()
	r.power("on", "host")
	r.says("host", "Plug in a USB stick")
	t.Logf("the page is there after %s", time.Since(began).Round(time.Second))
	said := strings.ReplaceAll(r.console("host"), "\r", "")
	find := func(expr string) string {
		t.Helper()
		m := regexp.MustCompile(expr).FindStringSubmatch(said)
		if m == nil {
			t.Fatalf("the console does not say %s", expr)
		}
		return m[1]
	}
	page, code := find(`(https://169\.254\.[\d.]+:\d+)/ `), find(`\n  code (\d{4} \d{4})\n`)
	print := find(`whose SHA-256 is\n  ([0-9A-F]{32}\n  [0-9A-F]{32})\n`)
	shown := r.inLab("bash", "-c", "openssl s_client -connect "+strings.TrimPrefix(page, "https://")+" </dev/null 2>/dev/null | openssl x509 -noout -fingerprint -sha256")
	if want := strings.ReplaceAll(print, "\n  ", ""); !strings.Contains(strings.ReplaceAll(shown, ":", ""), want) {
		t.Fatalf("the page has the certificate %s, the console says %s", shown, want)
	}
	curl := func(args ...string) string {
		t.Helper()
		return r.inLab(append([]string{"curl", "-skL", "--max-time", "60", "-b", filepath.Join(r.dir, "cookies"), "-c", filepath.Join(r.dir, "cookies")}, args...)...)
	}
	if text := curl("-F", "file=@"+filepath.Join(r.dir, "rack.yaml"), page+"/upload"); !strings.Contains(text, "not the code") {
		t.Fatalf("without the code a rack file is taken:\n%s", text)
	}
	curl("-d", "code="+code, page+"/code")
	curl("-F", "file=@"+filepath.Join(r.dir, "rack.yaml"), "-F", "file=@"+filepath.Join(r.dir, "key.pub"), page+"/upload")
	text := curl(page + "/?rack=/run/platter/upload/rack.yaml")
	nic := regexp.MustCompile(`<option value="([^"]+)" selected>`).FindStringSubmatch(text)
	if nic == nil {
		t.Fatalf("no interface is proposed:\n%s", text)
	}
	if text := curl("-d", "rack=/run/platter/upload/rack.yaml", "-d", "nic="+nic[1], "-d", "place=", page+"/serve"); !strings.Contains(text, "http://10.77.0.2:8080/") {
		t.Fatalf("the choice is refused:\n%s", text)
	}
	r.says("host", "Serving.")
	t.Logf("it serves after %s", time.Since(began).Round(time.Second))
	if nodes := r.inLab("curl", "-sf", "--max-time", "60", "http://10.77.0.2:8080/v1/nodes"); !strings.Contains(nodes, "node1") {
		t.Errorf("the rack is %s", nodes)
	}
	if out, err := exec.Command(r.bin(), "lab", "exec", "--state", r.lab, "--", "curl", "-sk", "--max-time", "5", page).Output(); err == nil {
		t.Errorf("the page is still there:\n%s", out)
	}
}

// TestDiscSeveral: a machine with one drive boots volume 1 of a set of several, takes
// one after the other, and serves from its copy.
func TestDiscSeveral(t *testing.T) {
	t.Parallel()
	r := newDiscRig(t)
	volumes := r.set("--volume-size", "250MB")
	if len(volumes) < 2 {
		t.Fatalf("the set has the volumes %v", volumes)
	}
	stick := filepath.Join(r.dir, "stick.img")
	r.run("mkfs.ext4", "-q", "-L", "PLATTER", stick, "2G")
	r.run("debugfs", "-w", "-R", "write "+filepath.Join(r.dir, "rack.yaml")+" rack.yaml", stick)
	r.run("debugfs", "-w", "-R", "write "+filepath.Join(r.dir, "key.pub")+" key.pub", stick)
	r.write("lab.yaml", fmt.Sprintf(labHead, "e2e-several")+fmt.Sprintf(`
  - {name: host, mac: "52:54:00:77:0d:08", cpus: 2, memory: 2GiB, media: [%q, %q]}
`, volumes[0], stick))
	r.platter("lab", "up", "--state", r.lab, filepath.Join(r.dir, "lab.yaml"))
	began := time.Now()
	r.power("on", "host")
	lab, err := vmtest.Open(r.lab)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range volumes[1:] {
		r.saysTimes("host", "Change the disc and press Enter.", i+1)
		r.platter("lab", "insert", "--state", r.lab, "host", v) // is refused while the machine holds the disc
		console, err := lab.Attach(t.Context(), "host")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(console, "\r"); err != nil {
			t.Fatal(err)
		}
		console.Close()
	}
	r.says("host", "Serving.")
	t.Logf("%d volumes are copied, and it serves, after %s", len(volumes), time.Since(began).Round(time.Second))
	if nodes := r.inLab("curl", "-sf", "--max-time", "60", "http://10.77.0.2:8080/v1/nodes"); !strings.Contains(nodes, "node1") {
		t.Errorf("the rack is %s", nodes)
	}
	// The plug is pulled: the copy is whole.
	r.power("off", "host")
	at := filepath.Join(r.dir, "at")
	r.run("mkdir", at)
	r.run("mount", "-o", "loop", stick, at)
	defer r.run("umount", at)
	r.run(filepath.Join(r.repo, "build/programs/platter"), "image", "verify", "--store", filepath.Join(at, "platter-state/store"), "debian-13") // it knows the key
}

// says waits until the console of a machine has that text.
func (r *rig) says(machine, text string) {
	r.t.Helper()
	r.saysTimes(machine, text, 1)
}

func (r *rig) saysTimes(machine, text string, n int) {
	r.t.Helper()
	size, moved := 0, time.Now()
	for {
		log := r.console(machine)
		if strings.Count(log, text) >= n {
			return
		}
		if len(log) != size {
			size, moved = len(log), time.Now()
		}
		if time.Since(moved) > stall {
			r.t.Fatalf("the console of %s has said nothing for %s and not %q", machine, stall, text)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// background runs a program in the lab's network until the test ends, or until it
// has printed what end is told. end returns all lines.
func (r *rig) background(args ...string) (end func(last string) []string) {
	r.t.Helper()
	file := filepath.Join(r.t.TempDir(), "out")
	out, err := os.Create(file)
	if err != nil {
		r.t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(r.bin(), append([]string{"lab", "exec", "--state", r.lab, "--"}, args...)...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	ended := false
	stop := func() {
		if !ended {
			ended = true
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
		}
	}
	r.t.Cleanup(stop)
	return func(last string) []string {
		r.t.Helper()
		defer stop()
		for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			text, err := os.ReadFile(file)
			if err != nil {
				r.t.Fatal(err)
			}
			if strings.Contains(string(text), last) {
				return strings.Split(strings.TrimSpace(string(text)), "\n")
			}
			if time.Since(began) > time.Minute {
				r.t.Fatalf("%s never said %q, so it proves nothing:\n%s", args[0], last, text)
			}
		}
	}
}

// trapNames serves names on the lab's address and knows none. The function it
// returns ends that and gives the questions that were asked; one that is asked
// here shows that they are heard.
func (r *rig) trapNames() func() []string {
	r.t.Helper()
	end := r.background("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
		"--bind-interfaces", "--listen-address=10.77.0.1", "--log-queries", "--log-facility=-")
	return func() []string {
		r.t.Helper()
		r.inLab("bash", "-c", `printf '\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05asked\x02by\x03the\x04test\x00\x00\x01\x00\x01' > /dev/udp/10.77.0.1/53`)
		const own = "asked.by.the.test"
		var asked []string
		for _, line := range end(own) {
			if strings.Contains(line, "query[") && !strings.Contains(line, own) {
				asked = append(asked, line)
			}
		}
		return asked
	}
}

// trapPackets notes every packet to an address outside of the rack. The function
// it returns ends that and gives them; one that is sent here shows that they are
// seen.
func (r *rig) trapPackets() func() []string {
	r.t.Helper()
	end := r.background("tcpdump", "-l", "-n", "-i", "br0",
		"(ip and not (dst net 10.77.0.0/24 or dst host 255.255.255.255 or dst host 0.0.0.0 or ip multicast)) or (ip6 and not (dst net fe80::/10 or ip6 multicast))")
	return func() []string {
		r.t.Helper()
		r.inLab("ip", "route", "add", "192.0.2.0/24", "dev", "br0")
		r.inLab("ip", "neigh", "add", "192.0.2.1", "lladdr", "02:00:00:00:00:01", "dev", "br0")
		r.inLab("bash", "-c", "echo > /dev/udp/192.0.2.1/9")
		const own = "> 192.0.2.1.9:"
		var out []string
		for _, line := range end(own) {
			if strings.Contains(line, " > ") && !strings.Contains(line, own) {
				out = append(out, line)
			}
		}
		return out
	}
}
