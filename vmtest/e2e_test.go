//go:build e2e

package vmtest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
)

// stall is how long nothing at all may move, on two slow emulated cores.
const stall = 8 * time.Minute

// rig is a lab with a disc host in it, driven through the built programs.
type rig struct {
	t     *testing.T
	repo  string // top of the source tree
	dir   string // scratch
	lab   string // the lab's state folder
	store string
	op    *client.Operator
	serve *exec.Cmd
	page  string // base URL of the page
}

func newRig(t *testing.T, lab, rack string) *rig {
	t.Helper()
	repo, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := &rig{t: t, repo: repo, dir: dir, lab: filepath.Join(dir, "lab"), store: filepath.Join(repo, "build/store")}
	r.op = client.NewOperator(filepath.Join(dir, "socket"))
	r.write("lab.yaml", lab)
	r.write("rack.yaml", rack)
	r.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "key"))
	t.Cleanup(func() {
		if t.Failed() {
			r.keepEvidence()
		}
		r.stopServe(syscall.SIGTERM)
		out, err := exec.Command(r.bin(), "lab", "down", "--state", r.lab, "--purge").CombinedOutput()
		if err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	r.platter("lab", "up", "--state", r.lab, "-f", filepath.Join(dir, "lab.yaml"))
	r.startServe()
	return r
}

func (r *rig) bin() string { return filepath.Join(r.repo, "bin/platter") }

func (r *rig) write(name, text string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) run(name string, args ...string) string {
	r.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (r *rig) platter(args ...string) string { r.t.Helper(); return r.run(r.bin(), args...) }

func (r *rig) node(args ...string) string {
	r.t.Helper()
	return r.platter(append([]string{"node", "--socket", filepath.Join(r.dir, "socket")}, args...)...)
}

func (r *rig) power(what, name string) {
	r.t.Helper()
	r.platter("lab", "power", what, name, "--state", r.lab)
}

// ssh runs a command on an installed node.
func (r *rig) ssh(addr, command string) string {
	r.t.Helper()
	return strings.TrimSpace(r.platter("lab", "exec", "--state", r.lab, "--", "ssh", "-i", filepath.Join(r.dir, "key"),
		"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60",
		"root@"+addr, command))
}

var pageURL = regexp.MustCompile(`http://127\.0\.0\.1:\d+`)

// startServe starts the disc host in the lab and waits until it answers.
func (r *rig) startServe() {
	r.t.Helper()
	log, err := os.OpenFile(filepath.Join(r.dir, "serve.log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o644)
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	from, _ := log.Seek(0, io.SeekEnd)
	r.serve = exec.Command(r.bin(), "lab", "exec", "--state", r.lab, "--listen", "127.0.0.1:0", "--",
		r.bin(), "serve", "-c", filepath.Join(r.dir, "rack.yaml"), "--store", r.store,
		"--state", filepath.Join(r.dir, "state"), "--socket", filepath.Join(r.dir, "socket"))
	r.serve.Stdout, r.serve.Stderr = log, log
	if err := r.serve.Start(); err != nil {
		r.t.Fatal(err)
	}
	gone := make(chan error, 1)
	cmd := r.serve
	go func() { gone <- cmd.Wait() }()
	for tick := time.NewTicker(200 * time.Millisecond); ; {
		if _, err := r.op.Nodes(context.Background()); err == nil {
			break
		}
		select {
		case err := <-gone:
			r.t.Fatalf("serve ended: %v\n%s", err, r.read("serve.log"))
		case <-tick.C:
		}
	}
	text := r.read("serve.log")[from:]
	if r.page = pageURL.FindString(text); r.page == "" {
		r.t.Fatalf("serve names no page:\n%s", text)
	}
}

func (r *rig) stopServe(sig syscall.Signal) {
	if r.serve == nil {
		return
	}
	r.serve.Process.Signal(sig)
	// The goroutine of startServe waits for it; the socket tells that it ended.
	for tick := time.NewTicker(50 * time.Millisecond); ; <-tick.C {
		if syscall.Kill(r.serve.Process.Pid, 0) != nil {
			break
		}
	}
	r.serve = nil
}

func (r *rig) read(name string) string {
	b, err := os.ReadFile(filepath.Join(r.dir, name))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func (r *rig) console(name string) string { return r.read("lab/console/" + name + ".log") }

// keepEvidence prints what a failed run leaves behind.
func (r *rig) keepEvidence() {
	tail := func(s string, n int) string { return s[max(0, len(s)-n):] }
	if b, err := os.ReadFile(filepath.Join(r.dir, "serve.log")); err == nil {
		r.t.Logf("serve.log ends:\n%s", tail(string(b), 6000))
	}
	logs, _ := filepath.Glob(filepath.Join(r.lab, "console/*.log"))
	for _, l := range logs {
		if b, err := os.ReadFile(l); err == nil {
			r.t.Logf("%s ends:\n%s", filepath.Base(l), tail(string(b), 4000))
		}
	}
}

// await returns when the states fulfil cond, or fails when nothing has moved
// for stall, or when a node fails that is not in mayFail.
func (r *rig) await(what string, cond func(map[string]provision.State) bool, mayFail ...string) map[string]provision.State {
	r.t.Helper()
	began := time.Now()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	limit := time.AfterFunc(stall, func() { cancel(fmt.Errorf("nothing moved for %s", stall)) })
	states := map[string]provision.State{}
	for u, err := range r.op.Events(ctx, -1) {
		if err != nil {
			r.t.Fatalf("awaiting %s: %v", what, err)
		}
		if u.State == nil {
			continue
		}
		s := *u.State
		if old, ok := states[s.Name]; !ok || old.Stage != s.Stage || old.Phase != s.Phase || old.Done != s.Done || old.LastLog != s.LastLog {
			limit.Reset(stall)
		}
		states[s.Name] = s
		if s.Stage == provision.StageFailed && !contains(mayFail, s.Name) {
			r.t.Fatalf("awaiting %s: %s failed: %v", what, s.Name, s.Failure)
		}
		if cond(states) {
			r.t.Logf("%s after %s", what, time.Since(began).Round(time.Second))
			return states
		}
	}
	r.t.Fatalf("awaiting %s: %v; states: %+v", what, context.Cause(ctx), states)
	return nil
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}

// events are a node's whole journal.
func (r *rig) events(name string) (all []provision.Event) {
	r.t.Helper()
	for after := int64(0); ; after = all[len(all)-1].ID {
		part, err := r.op.Log(context.Background(), name, after)
		if err != nil {
			r.t.Fatal(err)
		}
		if len(part) == 0 {
			return all
		}
		all = append(all, part...)
	}
}

func count(events []provision.Event, match func(provision.Event) bool) (n int) {
	for _, e := range events {
		if match(e) {
			n++
		}
	}
	return n
}

func isInstallBoot(e provision.Event) bool {
	return e.Kind == provision.EventBoot && e.Action == provision.ActionInstall
}

func stageIs(name string, stage provision.Stage) func(map[string]provision.State) bool {
	return func(s map[string]provision.State) bool { return s[name].Stage == stage }
}

const rackHead = `rack: e2e
image: debian-13
networks:
  - {interface: br0, subnet: 10.77.0.0/24, disc-host: 10.77.0.1, pool: 10.77.0.200-10.77.0.220}
users:
  - {name: root, key-files: [key.pub]}
stack: {domain: im.e2e.example}
nodes:
`

const labHead = `lab: %s
network: {bridge: br0, address: 10.77.0.1/24}
machines:
`

// One rack from power-on to a chat message, and everything that is then done
// to it: the disc host is killed while nodes write, a node loses power, one is
// installed again.
func TestRack(t *testing.T) {
	r := newRig(t, fmt.Sprintf(labHead, "e2e-rack")+`
  - {name: node1, mac: "52:54:00:77:01:01", firmware: bios, cpus: 2, memory: 3GiB, disks: [{size: 8GiB, serial: one}]}
  - {name: node2, mac: "52:54:00:77:01:02", firmware: uefi, cpus: 2, memory: 3GiB, disks: [{size: 8GiB, serial: two}]}
`, rackHead+`
  - {name: node1, slot: U1, mac: "52:54:00:77:01:01", address: 10.77.0.11}
  - {name: node2, slot: U2, mac: "52:54:00:77:01:02", address: 10.77.0.12, finish: reboot, disk: {serial: two}}
`)
	r.power("on", "node1")
	r.power("on", "node2")

	// The disc host dies in the middle of a write.
	var before provision.State
	r.await("node1 has written a third", func(s map[string]provision.State) bool {
		before = s["node1"]
		return before.Phase == "write image" && before.Total > 0 && 3*before.Done > before.Total
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

	both := func(stage provision.Stage) func(map[string]provision.State) bool {
		return func(s map[string]provision.State) bool { return s["node1"].Stage == stage && s["node2"].Stage == stage }
	}
	r.await("both nodes are ready", both(provision.StageReady))
	for _, name := range []string{"node1", "node2"} {
		ev := r.events(name)
		if n := count(ev, func(e provision.Event) bool { return e.Kind == provision.EventEnrol }); n != 1 {
			t.Errorf("%s enrolled %d times: the kill made it start over", name, n)
		}
		if n := count(ev, func(e provision.Event) bool {
			return e.Kind == provision.EventProbe && strings.Contains(e.Detail, "message")
		}); n == 0 {
			t.Errorf("%s is ready without a message that arrived", name)
		}
	}

	t.Run("the list is an array of ready nodes", func(t *testing.T) {
		var list []struct{ Name, Stage string }
		if err := json.Unmarshal([]byte(r.node("ls", "-o", "json")), &list); err != nil {
			t.Fatal(err)
		}
		if len(list) != 2 || list[0].Name != "node1" || list[0].Stage != "ready" || list[1].Stage != "ready" {
			t.Errorf("node ls says %+v", list)
		}
	})
	t.Run("the page shows them", func(t *testing.T) {
		for path, want := range map[string]string{"/": "<html", "/v1/nodes": `"node2"`} {
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
	t.Run("the hosts are as planned", func(t *testing.T) {
		for name, addr := range map[string]string{"node1": "10.77.0.11", "node2": "10.77.0.12"} {
			if got := r.ssh(addr, "hostname"); got != name {
				t.Errorf("%s calls itself %q", name, got)
			}
			var kib int
			fmt.Sscan(r.ssh(addr, "df --output=size / | tail -1"), &kib)
			if kib < 7<<20 {
				t.Errorf("%s: the root file system has %d KiB of an 8 GiB disk", name, kib)
			}
			r.ssh(addr, "ovs-vsctl br-exists br-vm && systemctl is-active libvirtd openvswitch-switch ejabberd platter-agent")
			if got := r.ssh(addr, "ip route; cat /proc/cmdline"); strings.Contains(got, "token") {
				t.Errorf("%s: %s", name, got)
			}
			if got := r.ssh(addr, "stat -c %a /etc/platter/identity.json /var/lib/ejabberd/.erlang.cookie | tr '\\n' ' '"); got != "600 400" {
				t.Errorf("%s: modes of the secrets are %q", name, got)
			}
		}
		if a, b := r.ssh("10.77.0.11", "cat /etc/machine-id"), r.ssh("10.77.0.12", "cat /etc/machine-id"); a == b {
			t.Error("both nodes have the machine-id", a)
		}
	})
	t.Run("a power cut brings a node back from its own disk", func(t *testing.T) {
		installs := count(r.events("node1"), isInstallBoot)
		r.power("cut", "node1")
		r.power("on", "node1")
		r.await("node1 boots", func(s map[string]provision.State) bool { return s["node1"].Stage != provision.StageReady })
		s := r.await("node1 is ready again", both(provision.StageReady))["node1"]
		if n := count(r.events("node1"), isInstallBoot); n != installs {
			t.Errorf("it was given the installer %d more times", n-installs)
		}
		if s.Generation != 1 || s.Installed != 1 {
			t.Errorf("generation %d granted, %d installed", s.Generation, s.Installed)
		}
	})
	t.Run("a reinstalled node rejoins under its name", func(t *testing.T) {
		key := r.ssh("10.77.0.12", "cat /etc/ssh/ssh_host_ed25519_key.pub")
		r.node("reinstall", "node2")
		r.power("cycle", "node2")
		s := r.await("node2 is ready again", func(s map[string]provision.State) bool {
			return s["node2"].Stage == provision.StageReady && s["node2"].Installed == 2
		})["node2"]
		if s.GrantOpen {
			t.Error("the grant is still open")
		}
		if r.ssh("10.77.0.12", "cat /etc/ssh/ssh_host_ed25519_key.pub") == key {
			t.Error("it has its old host key: it was not installed")
		}
		members := r.ssh("10.77.0.11", "ejabberdctl list_cluster")
		if strings.Count(members, "ejabberd@") != 2 {
			t.Errorf("the cluster is %q", members)
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
		r.power("cut", name)
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
	r.power("cut", "damaged")
	first := make([]byte, 1024)
	disk, err := os.Open(filepath.Join(r.lab, "var/lib/libvirt/images/damaged-1.raw"))
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
