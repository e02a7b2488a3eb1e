//go:build e2e

package vmtest_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
)

// TestStackHandover: a node becomes the disc host, the first one leaves, and the
// rack goes on.
func TestStackHandover(t *testing.T) {
	r, boxes := boxRack(t, 2)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady)
	before := r.read("rack.yaml")

	// It serves from a disc: the successor gets a store of its own.
	r.write("disc.yaml", "name: platter\nversion: \"1.0\"\ndate: 2026-11-22\nimages: [debian-13]\n")
	r.platter("disc", "build", "-f", filepath.Join(r.dir, "disc.yaml"), "-o", r.dir, "--store", r.store, "--key", filepath.Join(r.repo, "build/keys/image.key"))
	r.run("mkdir", filepath.Join(r.dir, "keys-only"))
	r.run("cp", "-r", filepath.Join(r.store, "keys"), filepath.Join(r.dir, "keys-only"))
	r.stopServe(syscall.SIGTERM)
	r.store, r.extra = filepath.Join(r.dir, "keys-only"), append(r.extra, "--disc", filepath.Join(r.dir, "platter-1.0.iso"))
	r.startServe()
	r.await("all are ready again", allReady)

	// A disc host that is killed in the middle is still the disc host, and what was
	// fetched is not fetched again.
	cmd := r.handover("node1")
	boxes[0].until("something is fetched", "ls "+provision.SuccessorDir+"/store/objects | grep .")
	r.stopServe(syscall.SIGKILL)
	cmd.Wait()
	if _, err := boxes[0].try("systemctl is-active platter-serve"); err == nil {
		t.Fatal("node1 serves, and nobody has handed the rack over")
	}
	r.startServe()
	r.until("the journal says who the disc host is", func() bool { return strings.Contains(r.read("serve.log"), "may leave") })
	r.until("the old disc host ends", func() bool { return syscall.Kill(r.serve.Process.Pid, 0) != nil })
	r.serve = nil

	// It does not start again.
	out, err := exec.Command(r.bin(), append([]string{"lab", "exec", "--state", r.lab, "--", r.bin(), "serve", "-c", filepath.Join(r.dir, "rack.yaml"),
		"--store", r.store, "--state", filepath.Join(r.dir, "state"), "--socket", filepath.Join(r.dir, "socket")}, r.extra...)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "handed over to node1") {
		t.Fatalf("the old disc host started again: %v\n%s", err, out)
	}

	// The new one has the whole rack and its past.
	platter := provision.SuccessorDir + "/platter "
	boxes[0].until("node1 knows that both are ready", platter+`node ls -o json | tr -d ' \n' | grep -o '"stage":"ready"' | grep -c . | grep -x 2`)
	if log := boxes[0].sh(platter + "node log node2"); !strings.Contains(log, "approved by the rack file") {
		t.Errorf("the past of node2 is not known on node1:\n%s", log)
	}
	if got := boxes[0].sh("cat " + provision.SuccessorDir + "/rack/rack.yaml"); got != strings.TrimSpace(before) {
		t.Errorf("the rack file on node1:\n%s", got)
	}
	if got := boxes[0].sh("stat -c %a " + provision.SuccessorDir + "/state/site/site.json " + provision.SuccessorDir + "/state/journal.db"); got != "600\n600" {
		t.Errorf("modes of what is secret: %s", got)
	}
	boxes[0].until("the order is done", platter+"node orders node1 | grep 'handover.*done'")
	// It reaches every node's agent, and they it.
	boxes[0].sh(platter + "node diagnose node2")

	// It serves network boots, after a power cut too.
	boxes[0].off()
	boxes[0].on()
	boxes[0].until("node1 serves again", platter+"node reinstall node2")
	script := r.run("nsenter", "--net=/run/netns/"+boxes[1].ns, "curl", "-sS", "--retry", "20", "--retry-connrefused",
		"http://10.77.0.1/boot.ipxe?mac="+boxes[1].mac+"&platform=pcbios&arch=i386")
	if !strings.Contains(script, "platter.life=installer") {
		t.Errorf("node2 would not be installed:\n%s", script)
	}
	if out, err := boxes[0].try(platter + "node reinstall node1"); err == nil || !strings.Contains(out, "is the disc host") {
		t.Errorf("the disc host may be erased: %v\n%s", err, out)
	}
}

// handover begins to hand the rack over.
func (r *rig) handover(node string) *exec.Cmd {
	r.t.Helper()
	cmd := exec.Command(r.bin(), "host", "handover", "--socket", filepath.Join(r.dir, "socket"), node)
	log, err := os.OpenFile(filepath.Join(r.dir, "handover.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	return cmd
}

// until waits for what nobody tells.
func (r *rig) until(what string, done func() bool) {
	r.t.Helper()
	for began := time.Now(); !done(); time.Sleep(100 * time.Millisecond) {
		if time.Since(began) > 3*time.Minute {
			r.t.Fatalf("it does not happen that %s", what)
		}
	}
}
