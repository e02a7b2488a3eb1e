//go:build slow

package stack

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/dischost"
	"platter/provision/site"
	"platter/provision/stack/probe"
	"platter/provision/store"
)

// TestCommands: the program that operators run, the disc host and a real
// cluster of two.
func TestCommands(t *testing.T) {
	l := newLab(t, "node1", "node2")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	dir := t.TempDir()
	s, err := site.Open(dir) // the disc host's own
	if err != nil {
		t.Fatal(err)
	}
	rack := provision.Rack{Name: "lab", Stack: provision.StackSpec{Domain: testDomain}}
	for i, n := range l.nodes {
		n.sec, err = s.StackSecrets(n.plan)
		if err != nil {
			t.Fatal(err)
		}
		n.install()
		if err := n.bring(ctx, n.sec, []asker{form, joins("node1")}[i], quiet{t}); err != nil {
			t.Fatalf("%s: %v\n%s", n.name, err, n.proc.out.String())
		}
		rack.Nodes = append(rack.Nodes, provision.Node{Name: n.name, Address: n.addr})
	}
	l.discHost(ctx, dir, rack)
	program := filepath.Join(dir, "platter")
	if out, err := exec.Command("go", "build", "-o", program, "platter/cmd/platter").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	command := func(code int, says ...string) func(args ...string) {
		return func(args ...string) {
			t.Helper()
			cmd := exec.CommandContext(ctx, program, append([]string{"stack", "--socket", filepath.Join(dir, "op.sock")}, args...)...)
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState == nil {
				t.Fatal(err)
			}
			t.Logf("platter stack %s\n%s", strings.Join(args, " "), out)
			if got := cmd.ProcessState.ExitCode(); got != code {
				t.Errorf("platter stack %v: exit code %d, want %d", args, got, code)
			}
			for _, want := range says {
				if !strings.Contains(string(out), want) {
					t.Errorf("platter stack %v does not say %q", args, want)
				}
			}
			for _, a := range s.Probes() {
				if strings.Contains(string(out), a.Password) {
					t.Errorf("platter stack %v tells a password", args)
				}
			}
		}
	}
	command(0, "The cluster is whole: 2 members.")("status")
	command(0, "login       node1", "message     node1 -> node2", "upload      node2")("probe")
	command(0, "archive     node2 -> node1")("probe", "node2", "node1")
	l.nodes[1].proc.kill()
	command(1, "login       node2                 FAILED  probe-connect", "message     node1                 ok", "1 of 7 probes failed")("probe")
}

// discHost runs one in the namespace of the bridge, on the state in dir, that
// has heard from every node that it is a member, and waits until it has found
// them to be ready.
func (l *lab) discHost(ctx context.Context, dir string, rack provision.Rack) {
	l.t.Helper()
	in, err := json.Marshal(rack)
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, "nsenter", "--net=/run/netns/"+l.bed, os.Args[0])
	cmd.Env = append(os.Environ(), "PLATTER_TEST_DISCHOST="+dir)
	cmd.Stdin = strings.NewReader(string(in))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	op := client.NewOperator(filepath.Join(dir, "op.sock"))
	defer op.Close()
	ready := map[string]bool{}
	for u, err := range op.Events(ctx, 0) {
		if err == nil && u.Event != nil && u.Event.Kind == provision.EventProbe {
			l.t.Logf("%s is ready: %s", u.Event.Node, u.Event.Detail)
			if ready[u.Event.Node] = true; len(ready) == len(rack.Nodes) {
				return
			}
		}
	}
	l.t.Fatalf("ready are only %v: %v", ready, ctx.Err())
}

// serveDiscHost is what the program that discHost starts does, until it is killed.
func serveDiscHost(dir string, in io.Reader) error {
	var rack provision.Rack
	if err := json.NewDecoder(in).Decode(&rack); err != nil {
		return err
	}
	s, err := site.Open(dir)
	if err != nil {
		return err
	}
	journal, err := store.Open(filepath.Join(dir, "journal.db"), time.Now)
	if err != nil {
		return err
	}
	ctx := context.Background()
	if err := journal.SetRack(ctx, &rack); err != nil {
		return err
	}
	var names []string
	for _, n := range rack.Nodes {
		names = append(names, n.Name)
	}
	facts := map[string]string{provision.FactRunning: strings.Join(names, ","), provision.FactDown: ""}
	for _, n := range names {
		err := journal.Append(ctx, provision.Event{Kind: provision.EventReport, Node: n, Generation: 1,
			Report: &provision.Report{Stage: provision.StageProbing, Facts: facts}})
		if err != nil {
			return err
		}
	}
	host := dischost.New(dischost.Config{Rack: &rack, Store: journal, Site: s, Probe: probe.Run, Clock: time.Now,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	socket, err := net.Listen("unix", filepath.Join(dir, "op.sock"))
	if err != nil {
		return err
	}
	ended := make(chan error)
	go func() { ended <- host.Run(ctx) }()
	go func() { ended <- http.Serve(socket, host.OperatorAPI()) }()
	return errors.Join(errors.New("the disc host has ended"), <-ended)
}
