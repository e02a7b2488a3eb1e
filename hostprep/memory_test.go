package hostprep

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/provision"
)

func TestAdmit(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		total, promised, want uint64
		percent               int
		ok                    bool
	}{
		{32 * gib, 0, 30 * gib, 0, true}, // the host keeps 2 GiB
		{32 * gib, 0, 30*gib + 1, 0, false},
		{32 * gib, 29 * gib, gib, 100, true}, {32 * gib, 29*gib + 1, gib, 100, false},
		{32 * gib, 30 * gib, 6 * gib, 120, true}, {32 * gib, 30 * gib, 7 * gib, 120, false},
		{32 * gib, 0, 15 * gib, 50, true}, {32 * gib, 0, 16 * gib, 50, false},
		{1024 * gib, 0, 1008 * gib, 0, true}, // at most 16 GiB
		{2 * gib, 0, gib + gib/2, 0, true}, {2 * gib, 0, gib + gib/2 + 1, 0, false},
		{gib / 4, 0, 1, 0, false},           // smaller than what the host keeps
		{32 * gib, 99 * gib, 1, 0, false},   // promised too much already
		{32 * gib, 1, ^uint64(0), 0, false}, // nothing overflows
	} {
		if err := Admit(c.total, c.promised, c.want, c.percent); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
	err := Admit(32*gib, 29*gib, 2*gib, 0)
	const want = "it wants 2.0 GiB of memory and 1.0 GiB are left: of the host's 32 GiB its own services keep 2.0 GiB, 100 % of the rest may be promised and 29 GiB are: stop another domain, or give this one less"
	if err == nil || err.Error() != want {
		t.Errorf("reason\n%v\nwant\n%s", err, want)
	}
}

func TestAlarms(t *testing.T) {
	spec := provision.HostSpec{Settings: []provision.Setting{
		{Kind: provision.Alarm, Key: "memory-available", Value: "5"},
		{Kind: provision.Alarm, Key: "memory-pressure", Value: "10"},
		{Kind: provision.Alarm, Key: "ksm-ratio", Value: "1.2"},
	}}
	page := uint64(os.Getpagesize())
	for name, c := range map[string]struct {
		availableKiB, merged uint64 // of 16 GiB; merged in bytes
		avg60                string
		want                 []string
	}{
		"calm":      {8 << 20, 0, "0.12", nil},
		"low":       {512 << 10, 0, "0.00", []string{"only 512 MiB of memory are available, 3.1 %, below 5 %"}},
		"pressed":   {8 << 20, 0, "34.50", []string{"in 34 % of the last minute, more than 10 %"}},
		"merged":    {4 << 20, 7 << 30, "0.00", nil}, // 1.1875
		"overdrawn": {4 << 20, 8 << 30, "0.00", []string{"(8.0 GiB) 1.25 times the host's memory"}},
		"all":       {1 << 10, 8 << 30, "99.00", []string{"only 1.0 MiB", "99 %", "1.50 times"}},
	} {
		root := t.TempDir()
		put(t, root, "proc/meminfo", fmt.Sprintf("MemTotal:       %d kB\nMemFree: 1 kB\nMemAvailable:   %d kB\nHugePages_Total:       0\n", 16<<20, c.availableKiB))
		put(t, root, "proc/pressure/memory", "some avg10=99.00 avg60="+c.avg60+" avg300=0.00 total=1\nfull avg10=0.00 avg60=77.00 avg300=0.00 total=1\n")
		put(t, root, "sys/kernel/mm/ksm/pages_sharing", fmt.Sprintln(c.merged/page))
		got := Alarms(root, spec)
		if len(got) != len(c.want) {
			t.Errorf("%s: %q", name, got)
			continue
		}
		for i, want := range c.want {
			if !strings.Contains(got[i], want) {
				t.Errorf("%s: %q, want %q", name, got[i], want)
			}
		}
		// A kernel without PSI and KSM.
		for _, gone := range []string{"proc/pressure", "sys"} {
			if err := os.RemoveAll(filepath.Join(root, gone)); err != nil {
				t.Fatal(err)
			}
		}
		if got := Alarms(root, spec); len(got) > 1 {
			t.Errorf("%s without PSI and KSM: %q", name, got)
		}
	}
	if got := Alarms(t.TempDir(), spec); len(got) != 1 || !strings.Contains(got[0], "meminfo") {
		t.Errorf("no /proc: %q", got)
	}
	if got := Alarms("/", provision.HostSpec{}); got != nil {
		t.Errorf("nothing asked: %q", got)
	}
}
