package install

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/provision"
)

// A machine that is too small for the users of the service is refused by name,
// with all that it misses, before its disk is touched; where the rack file takes
// it all the same it is installed, and that is said. A plan that states no users
// refuses nobody.
func TestTooSmall(t *testing.T) {
	rack := newRack(t)
	small := func(users int, undersized bool) *bench {
		rack.plan.Stack = provision.StackPlan{Domain: "im.example.org", Users: users, Undersized: undersized, Members: []string{"node1", "node2"}}
		b := newBench(t, rack)
		b.Root = t.TempDir()
		if err := os.Mkdir(filepath.Join(b.Root, "proc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(b.Root, "proc/meminfo"), []byte("MemFree: 1 kB\nMemTotal:        1048576 kB\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return b
	}
	b := small(1000, false)
	before := read(t, b.Target)
	err := b.run(t)
	var f *provision.Failure
	if !errors.As(err, &f) || f.Code != "machine-too-small" || !strings.Contains(f.Message, "node1 has 1.0 GiB of memory, the stack for 1,000 users on 2 nodes needs ") ||
		!strings.Contains(f.Message, " GiB of disk, ") || !strings.Contains(f.Next, "undersized: true") {
		t.Fatalf("%v", err)
	}
	if !bytes.Equal(before, read(t, b.Target)) {
		t.Error("its disk was touched")
	}
	if got := b.report.phases; len(got) != 2 || !strings.HasPrefix(got[1], "disk ") {
		t.Errorf("phases %v", got)
	}

	b = small(1000, true)
	if err := b.run(t); err != nil {
		t.Fatal(err)
	}
	if said := strings.Join(b.report.lines, "\n"); strings.Count(said, "the rack file allows it") < 2 {
		t.Error(said)
	}
	if err := small(0, false).run(t); err != nil {
		t.Error(err)
	}
}
