package hostprep

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// heard is a Progress that keeps what it hears.
type heard struct {
	lines []string
	facts map[string]string
}

func (h *heard) Phase(name string, n, of int) {
	h.lines = append(h.lines, fmt.Sprintf("%d/%d %s", n, of, name))
}
func (h *heard) Logf(f string, a ...any)       { h.lines = append(h.lines, fmt.Sprintf(f, a...)) }
func (h *heard) Facts(facts map[string]string) { h.facts = facts }

// part is something that is wrong until it has been applied often enough.
type part struct {
	wrong, applied, checked int
	checkErr, applyErr      error
}

func (p *part) step(name string) Step {
	return Step{Name: name, Next: "Fix " + name,
		Check: func(context.Context) (Finding, error) {
			p.checked++
			if p.applied > 0 {
				return Finding{OK: p.applied >= p.wrong, Is: "new", Want: "good"}, nil
			}
			return Finding{OK: p.wrong == 0, Is: "old", Want: "good"}, p.checkErr
		},
		Apply: func(context.Context) error { p.applied++; return p.applyErr },
	}
}

func TestRun(t *testing.T) {
	right, heals, away := &part{}, &part{wrong: 1}, &part{wrong: 1, checkErr: errors.New("not running")}
	stays, breaks := &part{wrong: 9}, &part{wrong: 1, applyErr: errors.New("no space left")}
	steps := []Step{right.step("right"), heals.step("heals"), away.step("away"), stays.step("stays"), breaks.step("breaks")}
	noHand := (&part{wrong: 1}).step("nohand")
	noHand.Apply = nil
	h := &heard{}
	results, err := Run(context.Background(), append(steps, noHand), h)

	want := []Outcome{OK, Changed, Changed, Failed, Failed, Failed}
	for i, r := range results {
		if r.Outcome != want[i] || (r.Outcome == Failed) != (r.Reason != nil) {
			t.Errorf("%s: %s (%v), want %s", r.Step, r.Outcome, r.Reason, want[i])
		}
	}
	if right.applied != 0 || right.checked != 1 {
		t.Errorf("what was right was applied %d times and checked %d times", right.applied, right.checked)
	}
	if heals.checked != 2 {
		t.Error("what was applied was not checked again")
	}
	var f *provision.Failure
	if !errors.As(err, &f) || f.Code != "host-check" || f.Next != "Fix stays" {
		t.Fatalf("failure %+v", err)
	}
	for _, s := range []string{"stays: is new, should be good", "breaks: no space left", "nohand: is old"} {
		if !strings.Contains(f.Message, s) {
			t.Errorf("no %q in %q", s, f.Message)
		}
	}
	if h.facts["host_heals"] != "changed" || h.facts["host_right_is"] != "old" || h.facts["host_stays_ms"] == "" {
		t.Errorf("facts %v", h.facts)
	}
	if h.lines[0] != "1/6 right" {
		t.Errorf("said %q", h.lines)
	}
}

func TestRunEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s := Step{Name: "long", Check: func(ctx context.Context) (Finding, error) { cancel(); return Finding{}, ctx.Err() }}
	if _, err := Run(ctx, []Step{s, (&part{}).step("never")}, &heard{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestUnitOrder(t *testing.T) {
	root := t.TempDir()
	s := unitOrder(root, nil)
	if f, err := s.Check(context.Background()); err != nil || f.OK || !strings.Contains(f.Is, "libvirtd.service.d/platter.conf differs") {
		t.Fatalf("empty root: %+v, %v", f, err)
	}
	for range 2 {
		if err := Prepare(root); err != nil {
			t.Fatal(err)
		}
		if f, err := s.Check(context.Background()); err != nil || !f.OK {
			t.Errorf("prepared root: %+v, %v", f, err)
		}
	}
	path := filepath.Join(root, "etc/systemd/system/libvirtd.service.d/platter.conf")
	if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), "After=openvswitch-switch.service") {
		t.Errorf("%s: %s, %v", path, b, err)
	}
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if f, _ := s.Check(context.Background()); f.OK {
		t.Error("a file that was emptied passes")
	}
}

// TestBridges: lo stands in for a bridge's device; the database is the one of
// a switch that is not there.
func TestBridges(t *testing.T) {
	ctx := context.Background()
	var ran []string
	list, fail := "lo", error(nil)
	run := func(_ context.Context, name string, args ...string) (string, error) {
		ran = append(ran, name+" "+strings.Join(args, " "))
		return list, fail
	}
	if f, err := bridges([]provision.Bridge{{Name: "lo", MTU: 65536}}, run).Check(ctx); err != nil || !f.OK || f.Is != "lo up" {
		t.Errorf("right: %+v, %v", f, err)
	}
	if f, err := bridges([]provision.Bridge{{Name: "lo", MTU: 1500}}, run).Check(ctx); err != nil || f.OK || !strings.Contains(f.Is, "MTU 65536") {
		t.Errorf("wrong MTU: %+v, %v", f, err)
	}
	two := bridges([]provision.Bridge{{Name: "lo"}, {Name: "br-none0"}}, run)
	if f, err := two.Check(ctx); err != nil || f.OK || f.Is != "lo up, br-none0 not in Open vSwitch" {
		t.Errorf("one missing: %+v, %v", f, err)
	}
	list = "lo br-none0"
	if f, err := two.Check(ctx); err != nil || f.OK || !strings.Contains(f.Is, "br-none0 has no device") {
		t.Errorf("in the database only: %+v, %v", f, err)
	}
	ran = nil
	if err := two.Apply(ctx); err == nil || !strings.Contains(err.Error(), "bridge br-none0") {
		t.Errorf("apply where the switch makes no device: %v", err)
	}
	if len(ran) != 2 || ran[1] != "ovs-vsctl --timeout=60 --may-exist add-br br-none0" {
		t.Errorf("ran %q", ran)
	}
	fail = errors.New("database connection failed")
	if _, err := two.Check(ctx); !errors.Is(err, fail) {
		t.Errorf("no database: %v", err)
	}
	if b := Bridges(provision.HostSpec{}); len(b) != 1 || b[0].Name != "br-vm" {
		t.Errorf("bridges of an empty plan: %v", b)
	}
}

// TestVirtSilent: a libvirt that takes the connection and never answers does
// not hold the agent for ever, and one that is not there is named.
func TestVirtSilent(t *testing.T) {
	dir := t.TempDir()
	if _, err := virt(dir+"/none", nil).Check(context.Background()); err == nil || !strings.Contains(err.Error(), "libvirt does not answer") {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.Listen("unix", dir+"/sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	asked := make(chan struct{})
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		var n uint32
		if binary.Read(c, binary.BigEndian, &n) == nil { // the length of a first request
			close(asked)
		}
		io.Copy(io.Discard, c)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	go func() { <-asked; cancel() }()
	if _, err := virt(dir+"/sock", nil).Check(ctx); err == nil || !errors.Is(err, context.Canceled) {
		t.Errorf("silent: %v", err)
	}
}
