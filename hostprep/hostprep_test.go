package hostprep

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	boot                    bool // in effect only after a boot
}

func (p *part) step(name string) Step {
	return Step{Name: name, Next: "Fix " + name,
		Check: func(context.Context) ([]Finding, error) {
			p.checked++
			if p.applied > 0 {
				return []Finding{{What: name, OK: p.applied >= p.wrong && !p.boot, Is: "new", Want: "good", Boot: p.boot}}, nil
			}
			return []Finding{{What: name, OK: p.wrong == 0, Is: "old", Want: "good"}}, p.checkErr
		},
		Apply: func(context.Context, *Journal) error { p.applied++; return p.applyErr },
	}
}

func TestApply(t *testing.T) {
	right, heals, away := &part{}, &part{wrong: 1}, &part{wrong: 1, checkErr: errors.New("not running")}
	stays, breaks := &part{wrong: 9}, &part{wrong: 1, applyErr: errors.New("no space left")}
	later := &part{wrong: 1, boot: true}
	steps := []Step{right.step("right"), heals.step("heals"), away.step("away"), later.step("later"), stays.step("stays"), breaks.step("breaks")}
	noHand := (&part{wrong: 1}).step("nohand")
	noHand.Apply = nil
	h := &heard{}
	person := Step{Name: "person",
		Check: func(context.Context) ([]Finding, error) {
			return []Finding{{What: "cable", Is: "loose", Want: "plugged in", Person: true}}, nil
		},
		Apply: func(context.Context, *Journal) error { t.Error("applied what only a person can do"); return nil }}
	results, err := Apply(context.Background(), append(steps, noHand, person), nil, h)

	want := []Outcome{OK, Changed, Changed, Reboot, Failed, Failed, Drift, Drift}
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
	for _, s := range []string{"stays: stays is new, should be good", "breaks: no space left"} {
		if !strings.Contains(f.Message, s) {
			t.Errorf("no %q in %q", s, f.Message)
		}
	}
	if h.facts["host_heals"] != "changed" || h.facts["host_right_is"] != "old" || h.facts["host_stays_ms"] == "" {
		t.Errorf("facts %v", h.facts)
	}
	if strings.Contains(f.Message, "nohand") || h.facts["host_nohand"] != "drift" || !slices.Contains(h.lines, "host: person: a person has to put right: cable is loose, should be plugged in") {
		t.Errorf("what is for a person: failure %q, facts %v, said %q", f.Message, h.facts, h.lines)
	}
	if h.lines[0] != "1/8 right" {
		t.Errorf("said %q", h.lines)
	}
}

func TestApplyEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s := Step{Name: "long", Check: func(ctx context.Context) ([]Finding, error) { cancel(); return nil, ctx.Err() }}
	if _, err := Apply(ctx, []Step{s, (&part{}).step("never")}, nil, &heard{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestUnitOrder(t *testing.T) {
	root := t.TempDir()
	h := Host{Root: root, Self: []string{"/bin/true"}}
	s := h.unitOrder()
	if f, err := s.Check(t.Context()); err != nil || f[0].OK || f[0].Is != "missing" {
		t.Fatalf("empty root: %+v, %v", f, err)
	}
	j, err := OpenJournal(root)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := h.Prepare(j); err != nil {
			t.Fatal(err)
		}
		if r, err := Check(t.Context(), []Step{s}, &heard{}); err != nil || r[0].Outcome != OK {
			t.Errorf("prepared root: %+v, %v", r, err)
		}
	}
	path := filepath.Join(root, "etc/systemd/system/libvirtd.service.d/platter.conf")
	if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), "After=openvswitch-switch.service") {
		t.Errorf("%s: %s, %v", path, b, err)
	}
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if r, _ := Check(t.Context(), []Step{s}, &heard{}); r[0].Outcome != Drift {
		t.Error("a file that was emptied passes")
	}
}

// snapshot is every file, link and folder below root with its content.
func snapshot(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if strings.HasPrefix(rel, "var/lib/platter") {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content, _ := os.ReadFile(path)
		link, _ := os.Readlink(path)
		fmt.Fprintf(&b, "%s %s %q %q\n", rel, info.Mode(), link, content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestJournalWithoutRoom: a line for which the disk has no room is taken off
// again, so that the lines after it can be read.
func TestJournalWithoutRoom(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=32k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, 0) })
	for _, dir := range []string{"etc", "var/lib"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, size := range map[string]int{"large": 12 << 10, "small": 8} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before := snapshot(t, root)
	j, err := OpenJournal(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.WriteFile("/etc/large", "new", 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("there was room: %v", err)
	}
	if err := j.WriteFile("/etc/small", "new", 0o644); err != nil {
		t.Fatal(err)
	}
	if j, err = OpenJournal(root); err != nil {
		t.Fatal(err)
	}
	if err := j.Undo(func(string) {}); err != nil {
		t.Fatal(err)
	}
	if after := snapshot(t, root); after != before {
		t.Errorf("undone:\n%s\nbefore:\n%s", after, before)
	}
}

// TestJournalUndo: whatever was changed, however often, and wherever a power
// cut fell, undoing brings the former bytes back.
func TestJournalUndo(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{"etc/a.conf": "former", "etc/b.conf": "other", "proc/sys/x": "1\n", "etc/gone": "was here"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a.conf", filepath.Join(root, "etc/link")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "var/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, root)
	for round := range 3 {
		j, err := OpenJournal(root)
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range []error{
			j.WriteFile("/etc/a.conf", fmt.Sprint("new ", round), 0o644),
			j.WriteFile("/etc/new/deep/c.conf", "c", 0o600),
			j.Link("/etc/link", "b.conf"),
			j.Link("/etc/wants/c.service", "../c.service"),
			j.Remove("/etc/gone"),
			j.SetValue("/proc/sys/x", fmt.Sprint(round+2)),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if snapshot(t, root) == before {
		t.Fatal("nothing was changed")
	}
	// A power cut in the middle of a line.
	name := filepath.Join(root, journalFile)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"path":"/etc/b.co`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	j, err := OpenJournal(root)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := j.Undo(func(string) {}); err != nil {
			t.Fatal(err)
		}
		if after := snapshot(t, root); after != before {
			t.Errorf("after undoing:\n%s\nbefore:\n%s", after, before)
		}
	}
	if !j.Empty() {
		t.Error("an undone journal is not empty")
	}
	if err := os.WriteFile(name, []byte("{}\nnonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(root); err == nil || !strings.Contains(err.Error(), "line 2 is damaged") {
		t.Errorf("damaged journal: %v", err)
	}
}

// TestLibvirtSilent: a libvirt that takes the connection and never answers does
// not hold the agent for ever, and one that is not there is named.
func TestLibvirtSilent(t *testing.T) {
	dir := t.TempDir()
	if _, err := (&Host{}).libvirt(dir + "/none").Check(context.Background()); err == nil || !strings.Contains(err.Error(), "libvirt does not answer") {
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
	if _, err := (&Host{}).libvirt(dir + "/sock").Check(ctx); err == nil || !errors.Is(err, context.Canceled) {
		t.Errorf("silent: %v", err)
	}
}
