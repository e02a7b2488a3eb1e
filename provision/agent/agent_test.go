package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/hostprep"
	"platter/provision"
	"platter/provision/stack"
)

// heard is a Reporter that keeps what it hears and can be waited for.
type heard struct {
	mu    sync.Mutex
	lines []string
	facts map[string]string
	more  chan struct{}
}

func newHeard() *heard { return &heard{facts: map[string]string{}, more: make(chan struct{}, 1)} }

func (h *heard) add(s string) {
	h.mu.Lock()
	h.lines = append(h.lines, s)
	h.mu.Unlock()
	select {
	case h.more <- struct{}{}:
	default:
	}
}
func (h *heard) Stage(s provision.Stage)      { h.add("stage " + string(s)) }
func (h *heard) Phase(name string, n, of int) { h.add("phase " + name) }
func (h *heard) Logf(f string, a ...any)      { h.add("log " + fmt.Sprintf(f, a...)) }
func (h *heard) Progress(done, total int64)   { h.add("alive") }
func (h *heard) Fail(f *provision.Failure)    { h.add("fail " + f.Code) }
func (h *heard) Facts(f map[string]string) {
	h.mu.Lock()
	for k, v := range f {
		h.facts[k] = v
	}
	h.mu.Unlock()
}

// wait returns everything said once line was said n times.
func (h *heard) wait(t *testing.T, line string, n int) []string {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		h.mu.Lock()
		lines := slices.Clone(h.lines)
		h.mu.Unlock()
		count := 0
		for _, l := range lines {
			if l == line {
				count++
			}
		}
		if count >= n {
			return lines
		}
		select {
		case <-h.more:
		case <-limit:
			t.Fatalf("%q was not said %d times: %q", line, n, lines)
		}
	}
}

var quick = Config{Watch: time.Millisecond, Retry: time.Millisecond}

// live starts the agent; the returned function ends it.
func live(t *testing.T, w work, h *heard) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- quick.live(ctx, w, map[string]string{"kernel": "6"}, h) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func both(context.Context, Reporter) (stack.Cluster, error) {
	return stack.Cluster{Running: []string{"a", "b"}}, nil
}

func TestStages(t *testing.T) {
	fine := func(context.Context, Reporter) error { return nil }
	h := newHeard()
	end := live(t, work{prepare: fine, bring: fine, tend: both, alarms: calm, guests: fine}, h)
	lines := h.wait(t, "alive", 3)
	end()
	if got := strings.Join(lines[:4], ", "); got != "stage preparing, stage joining, stage probing, alive" {
		t.Errorf("said %s", got)
	}
	for _, k := range []string{"kernel", "prepare_ms", "stack_ms", "member_up_ms", "cluster_running"} {
		if h.facts[k] == "" {
			t.Errorf("no fact %s in %v", k, h.facts)
		}
	}
}

// TestRetry: what fails is named and tried again until it works.
func TestRetry(t *testing.T) {
	h := newHeard()
	prepares, brings := 0, 0
	w := work{tend: both, alarms: calm, guests: func(context.Context, Reporter) error { return errors.New("a VM is off") },
		prepare: func(context.Context, Reporter) error {
			if prepares++; prepares == 1 {
				return &provision.Failure{Code: "host-check"}
			}
			return nil
		},
		bring: func(context.Context, Reporter) error {
			if brings++; brings == 1 {
				return fmt.Errorf("something new: %w", os.ErrPermission)
			}
			return nil
		}}
	end := live(t, w, h)
	lines := h.wait(t, "stage probing", 1)
	h.wait(t, "log host: a VM is off", 1) // said, and no failure
	end()
	want := "stage preparing, fail host-check, stage preparing, stage joining, fail agent, stage preparing, stage joining, stage probing"
	if got := strings.Join(lines[:min(8, len(lines))], ", "); got != want {
		t.Errorf("said %s, want %s", got, want)
	}
}

// TestWatch: a member that leaves is said once; a local member that is silent
// for long is a failure, and when it is back the node is probed again.
func TestWatch(t *testing.T) {
	fine := func(context.Context, Reporter) error { return nil }
	var mu sync.Mutex
	cl, err := stack.Cluster{Running: []string{"a", "b"}}, error(nil)
	set := func(c stack.Cluster, e error) { mu.Lock(); cl, err = c, e; mu.Unlock() }
	look := func(context.Context, Reporter) (stack.Cluster, error) { mu.Lock(); defer mu.Unlock(); return cl, err }
	h := newHeard()
	end := live(t, work{prepare: fine, bring: fine, tend: look, alarms: calm, guests: fine}, h)
	defer end()
	h.wait(t, "alive", 2)
	set(stack.Cluster{Running: []string{"a"}, Down: []string{"b"}}, nil)
	h.wait(t, "log cluster: running: a; not running: b", 1)
	set(stack.Cluster{}, errors.New("refused"))
	h.wait(t, "fail stack-stopped", 1)
	set(stack.Cluster{Running: []string{"a", "b"}}, nil)
	h.wait(t, "log cluster: running: a, b", 1)
	lines := h.wait(t, "stage probing", 2)
	if slices.Contains(lines[:slices.Index(lines, "fail stack-stopped")], "log cluster: running: a, b") {
		t.Errorf("said %q", lines)
	}
	fails := 0
	for _, l := range lines {
		if strings.HasPrefix(l, "fail") {
			fails++
		}
	}
	if fails != 1 {
		t.Errorf("%d failures for one silence: %q", fails, lines)
	}
}

// TestSplit: a split is said while it is; what the look does about it is heard;
// and afterwards messages have to pass again.
func TestSplit(t *testing.T) {
	fine := func(context.Context, Reporter) error { return nil }
	whole := stack.Cluster{Running: []string{"a", "b", "c"}}
	away := stack.Cluster{Running: []string{"c"}, Down: []string{"a", "b"}}
	split := away
	split.Apart = away.Down
	looks := []stack.Cluster{whole, away, away, split, split, whole, whole}
	n := 0
	h := newHeard()
	end := live(t, work{prepare: fine, bring: fine, guests: fine, alarms: calm,
		tend: func(_ context.Context, rep Reporter) (stack.Cluster, error) {
			n++
			if n == 6 {
				rep.Logf("split healed")
			}
			return looks[min(n, len(looks))-1], nil
		}}, h)
	h.wait(t, "alive", len(looks)+1)
	end()
	var got []string
	for _, l := range h.lines {
		if l != "alive" {
			got = append(got, l)
		}
	}
	want := []string{"stage preparing", "stage joining", "stage probing",
		"log cluster: running: c; not running: a, b",
		"log cluster: running: c; not running: a, b; split: a, b run and answer, but in a cluster of their own",
		"log split healed",
		"log cluster: running: a, b, c",
		"stage probing"}
	if !slices.Equal(got, want) {
		t.Errorf("said %q\nwant %q", got, want)
	}
	if h.facts[provision.FactRunning] != "a,b,c" || h.facts[provision.FactDown] != "" {
		t.Errorf("facts %v", h.facts)
	}
}

func calm() []string { return nil }

// TestAlarms: an alarm is said when it begins and when it is over, however its
// numbers change.
func TestAlarms(t *testing.T) {
	fine := func(context.Context, Reporter) error { return nil }
	looks := 0
	h := newHeard()
	end := live(t, work{prepare: fine, bring: fine, guests: fine, tend: both, alarms: func() []string {
		looks++
		switch {
		case looks < 3 || looks > 6:
			return nil
		case looks == 4:
			return []string{"low: 4 % left", "pressure: 30 %"}
		}
		return []string{fmt.Sprintf("low: %d %% left", looks)}
	}}, h)
	h.wait(t, "log alarm: low: over", 1)
	end()
	var got []string
	for _, l := range h.lines {
		if a, ok := strings.CutPrefix(l, "log alarm: "); ok {
			got = append(got, a)
		}
	}
	if want := []string{"low: 3 % left", "low: 4 % left", "pressure: 30 %", "low: 5 % left", "low: over"}; !slices.Equal(got, want) {
		t.Errorf("said %q, want %q", got, want)
	}
}

// TestTroubles: a trouble is said once when it begins and when it is over, and what
// an older life has left is taken back.
func TestTroubles(t *testing.T) {
	h := newHeard()
	h.facts[provision.FactTrouble] = "of an older life"
	ctx, cancel := context.WithCancel(t.Context())
	looks, facts := 0, []string{}
	look := func(_ context.Context, patience time.Duration) []stack.Trouble {
		looks++
		h.mu.Lock()
		facts = append(facts, h.facts[provision.FactTrouble]) // after the look before
		h.mu.Unlock()
		web := stack.Trouble{About: "web", Text: fmt.Sprintf("web is down, look %d", looks)}
		switch {
		case patience != ailing:
			t.Errorf("patience %s", patience)
		case looks == 2, looks == 3:
			return []stack.Trouble{web}
		case looks == 4:
			return []stack.Trouble{web, {About: "etcd", Text: "etcd is down"}}
		case looks > 6:
			cancel()
		}
		return nil
	}
	quick.sayTroubles(ctx, look, h)
	if want := []string{"of an older life", "", "web is down, look 2", "web is down, look 2", "web is down, look 4. etcd is down", "", ""}; !slices.Equal(facts, want) {
		t.Errorf("facts %q, want %q", facts, want)
	}
	if want := []string{"log trouble: web is down, look 2", "log trouble: web is down, look 4", "log trouble: etcd is down", "log trouble: over"}; !slices.Equal(h.lines, want) {
		t.Errorf("said %q, want %q", h.lines, want)
	}
}

// TestDrift: what waits for a reboot or a person is reported and keeps no node
// from being ready; what could not be put right does.
func TestDrift(t *testing.T) {
	step := func(name string, f hostprep.Finding) hostprep.Step {
		return hostprep.Step{Name: name, Next: "Mend it",
			Check: func(context.Context) ([]hostprep.Finding, error) { return []hostprep.Finding{f}, nil },
			Apply: func(context.Context, *hostprep.Journal) error { return nil }}
	}
	steps := []hostprep.Step{
		step("cmdline", hostprep.Finding{What: "iommu", Is: "off", Want: "pt", Boot: true}),
		step("bridges", hostprep.Finding{What: "uplink", Is: "taken back", Want: "eth0", Person: true}),
	}
	host := &hostprep.Host{Root: t.TempDir()}
	h := newHeard()
	// Somebody who changes the host is waited for, and named.
	release, err := host.Lock(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- prepare(t.Context(), host, steps, h) }()
	h.wait(t, fmt.Sprintf("log host: waiting for process %d, which is changing this host", os.Getpid()), 1)
	release()
	if err := <-done; err != nil {
		t.Errorf("waits for a reboot and a person: %v", err)
	}
	h.wait(t, "log host: cmdline: the next boot brings into effect: iommu is off, should be pt", 1)
	h.wait(t, "log host: bridges: a person has to put right: uplink is taken back, should be eth0", 1)
	if h.facts["host_cmdline"] != "reboot" || h.facts["host_bridges"] != "drift" || h.facts["host_bridges_is"] != "taken back" {
		t.Errorf("facts %v", h.facts)
	}
	var f *provision.Failure
	err = prepare(t.Context(), host, append(steps, step("services", hostprep.Finding{What: "libvirt", Is: "dead", Want: "active"})), h)
	if !errors.As(err, &f) || f.Code != "host-check" || f.Next != "Mend it" || strings.Contains(f.Message, "uplink") {
		t.Errorf("a service that does not start: %v", err)
	}
}

// TestNotInstalled: a host without a plan is no host of ours.
func TestNotInstalled(t *testing.T) {
	dir := t.TempDir()
	c := Config{PlanPath: filepath.Join(dir, "plan.json"), Notify: func(string) { t.Error("systemd was told READY") }}
	if err := Run(context.Background(), c); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no plan: %v", err)
	}
	if err := os.WriteFile(c.PlanPath, []byte(`{"format": 77}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(context.Background(), c); err == nil || !strings.Contains(err.Error(), "format 77") {
		t.Errorf("a plan of the future: %v", err)
	}
}

func TestFacts(t *testing.T) {
	f := osFacts("/")
	for _, k := range []string{"kernel", "boot_id", "cpus", "memory_kib", "os"} {
		if f[k] == "" {
			t.Errorf("no fact %s in %v", k, f)
		}
	}
}
