//go:build e2e || bench || soak

package vmtest_test

import (
	"context"
	"errors"
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
	extra []string // arguments of serve
	page  string   // base URL of the page
	keep  bool     // the test ends, and another goes on with what is in dir
}

func newRig(t *testing.T, lab, rack string) *rig {
	t.Helper()
	return newRigOn(t, "../build/store", lab, rack)
}

// newRigOn is newRig with a store of its own, and further arguments for serve.
func newRigOn(t *testing.T, store, lab, rack string, serve ...string) *rig {
	t.Helper()
	return newRigIn(t, t.TempDir(), store, lab, rack, serve...)
}

// newRigIn is newRigOn with a folder that may have what an earlier rig kept.
func newRigIn(t *testing.T, dir, store, lab, rack string, serve ...string) *rig {
	t.Helper()
	repo, err1 := filepath.Abs("..")
	store, err2 := filepath.Abs(store)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, repo: repo, dir: dir, lab: filepath.Join(dir, "lab"), store: store, extra: serve}
	r.op = client.NewOperator(filepath.Join(dir, "socket"))
	r.write("lab.yaml", lab)
	r.write("rack.yaml", rack)
	if _, err := os.Stat(filepath.Join(dir, "key.pub")); err != nil {
		r.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "key"))
	}
	t.Cleanup(func() {
		if t.Failed() {
			r.keepEvidence()
		}
		r.stopServe(syscall.SIGTERM)
		if r.keep {
			exec.Command(r.bin(), "lab", "power", "off", "all", "--state", r.lab).Run()
			return
		}
		out, err := exec.Command(r.bin(), "lab", "down", "--state", r.lab, "--purge").CombinedOutput()
		if err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	r.platter("lab", "up", "--state", r.lab, filepath.Join(dir, "lab.yaml"))
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
	r.serve = exec.Command(r.bin(), append([]string{"lab", "exec", "--state", r.lab, "--listen", "127.0.0.1:0", "--",
		r.bin(), "serve", "-c", filepath.Join(r.dir, "rack.yaml"), "--store", r.store,
		"--state", filepath.Join(r.dir, "state"), "--socket", filepath.Join(r.dir, "socket")}, r.extra...)...)
	r.serve.Stdout, r.serve.Stderr = log, log
	if err := r.serve.Start(); err != nil {
		r.t.Fatal(err)
	}
	gone := make(chan error, 1)
	cmd := r.serve
	go func() { gone <- cmd.Wait() }()
	for tick := time.NewTicker(200 * time.Millisecond); ; {
		// It answers a moment before it has said where its page is.
		r.page = pageURL.FindString(r.read("serve.log")[from:])
		if _, err := r.op.Nodes(context.Background()); err == nil && r.page != "" {
			break
		}
		select {
		case err := <-gone:
			r.t.Fatalf("serve ended: %v\n%s", err, r.read("serve.log"))
		case <-tick.C:
		}
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
	// The stream tells the states one by one: cond must not see a part of them.
	states := map[string]provision.State{}
	now, err := r.op.Nodes(ctx)
	if err != nil {
		r.t.Fatalf("awaiting %s: %v", what, err)
	}
	for _, s := range now {
		states[s.Name] = s
	}
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
