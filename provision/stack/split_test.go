package stack

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
)

// parts are the views of members that have split into sides: "a b|c". Members
// behind a slash have not answered: "a b|c/d".
func parts(text string) map[string]status {
	text, away, _ := strings.Cut(text, "/")
	known := strings.Fields(strings.NewReplacer("|", " ").Replace(text) + " " + away)
	views := map[string]status{}
	for side := range strings.SplitSeq(text, "|") {
		running := strings.Fields(side)
		for _, name := range running {
			views[name] = status{up: true, known: known, running: running}
		}
	}
	return views
}

func TestGiveWay(t *testing.T) {
	order := []string{"b", "a", "c", "d", "e"}
	for _, c := range []struct {
		name, views string
		change      func(map[string]status)
		stays       map[string]string // who gives way -> for whom
	}{
		{"whole", "a b c", nil, nil},
		{"one of three", "a b|c", nil, map[string]string{"c": "a b"}},
		{"the first of the rack is alone", "a c|b", nil, map[string]string{"b": "a c"}},
		{"two of five", "a b|c d e", nil, map[string]string{"a": "c d e", "b": "c d e"}},
		{"a tie of two", "a|b", nil, map[string]string{"a": "b"}},
		{"a tie of four", "a c|b d", nil, map[string]string{"a": "b d", "c": "b d"}},
		{"nobody is in the plan", "x|y", nil, map[string]string{"y": "x"}},
		{"one that the plan knows, one that it does not", "A|e", nil, map[string]string{"A": "e"}},
		{"all apart", "a|b|c", nil, map[string]string{"a": "b", "c": "b"}},
		{"three sides", "a|b|c d", nil, map[string]string{"a": "c d", "b": "c d"}},
		{"nobody answers", "c/a b", nil, nil},
		{"one of the side that stays does not answer", "a b|c", func(v map[string]status) { delete(v, "a") }, nil},
		{"one of the side that stays starts", "a b|c", func(v map[string]status) { s := v["a"]; s.up = false; v["a"] = s }, nil},
		{"one of the side that stays joins", "a b|c", func(v map[string]status) { s := v["b"]; s.joining = true; v["b"] = s }, nil},
		{"the one that gives way joins", "a b|c", func(v map[string]status) { s := v["c"]; s.joining = true; v["c"] = s }, nil},
		{"the one that gives way does not run", "a b|c", func(v map[string]status) { v["c"] = status{} }, nil},
		{"installed anew, no member yet", "a b|c", func(v map[string]status) { s := v["c"]; s.known = []string{"c"}; v["c"] = s }, nil},
		{"only c has noticed", "a b|c", func(v map[string]status) {
			for _, n := range []string{"a", "b"} {
				s := v[n]
				s.running = []string{"a", "b", "c"}
				v[n] = s
			}
		}, nil},
		{"a still sees c, which does not see it", "a b|c", func(v map[string]status) {
			s := v["a"]
			s.running = []string{"a", "b", "c"}
			v["a"] = s
		}, nil},
	} {
		views := parts(c.views)
		if c.change != nil {
			c.change(views)
		}
		for self := range views {
			got := strings.Join(giveWay(self, order, views), " ")
			if got != c.stays[self] {
				t.Errorf("%s: %s gives way for %q, want %q", c.name, self, got, c.stays[self])
			}
		}
	}
}

// TestOneSideStays: whatever the split, if everybody reaches everybody one side
// stays and all others agree on it.
func TestOneSideStays(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e"}
	for n := range 3125 { // every way to put five members into up to five sides
		sides := make([][]string, 5)
		for i, k := 0, n; i < 5; i, k = i+1, k/5 {
			sides[k%5] = append(sides[k%5], names[i])
		}
		var text []string
		for _, s := range sides {
			if len(s) > 0 {
				text = append(text, strings.Join(s, " "))
			}
		}
		views := parts(strings.Join(text, "|"))
		var stay []string
		says := map[string]bool{}
		for _, self := range names {
			if s := giveWay(self, names, views); s == nil {
				stay = append(stay, self)
			} else {
				says[strings.Join(s, " ")] = true
			}
		}
		if !slices.Equal(stay, views[stay[0]].running) || len(says) > 1 || len(says) == 1 && !says[strings.Join(stay, " ")] {
			t.Fatalf("%s: %v stay, the others give way for %v", strings.Join(text, "|"), stay, says)
		}
	}
}

func TestApart(t *testing.T) {
	views := parts("a b|c|d/e")
	for self, want := range map[string]string{"a": "c d", "c": "a b d"} {
		if got := strings.Join(apart(self, views), " "); got != want {
			t.Errorf("apart from %s: %q, want %q", self, got, want)
		}
	}
}

func TestTemper(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var tm temper
	if tm.due(start, true) || tm.due(start, false) || tm.due(start, true) {
		t.Error("due in the first look of a split")
	}
	if !tm.due(start, true) {
		t.Error("not due in the second look in a row")
	}
	// A link that goes down as soon as it is back: looks every 15 s say to
	// give way all day long.
	var restarts []time.Duration
	for at := time.Duration(0); at < 24*time.Hour; at += 15 * time.Second {
		if tm.due(start.Add(at), true) {
			restarts = append(restarts, at)
			tm.restarted(start.Add(at))
		}
	}
	want := []time.Duration{0, time.Minute, 3 * time.Minute, 7 * time.Minute, 15 * time.Minute, 31 * time.Minute, 63 * time.Minute, 123 * time.Minute}
	if !slices.Equal(restarts[:len(want)], want) || len(restarts) > 32 {
		t.Errorf("%d restarts in a day, the first at %v; want %v", len(restarts), restarts[:len(want)], want)
	}
	// Two splits that have nothing to do with each other.
	later := tm.last.Add(4 * time.Hour)
	tm.due(later, false)
	tm.due(later, true)
	if !tm.due(later, true) {
		t.Error("a split hours after the last one is not met at once")
	}
}

// rackOf is members of a cluster as one Watcher meets them.
type rackOf struct {
	mu    sync.Mutex
	views map[string]status
	log   []string
}

func (r *rackOf) set(views map[string]status) { r.mu.Lock(); r.views = views; r.mu.Unlock() }
func (r *rackOf) view(name string) (status, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if st, ok := r.views[name]; ok {
		return st, nil
	}
	return status{}, errUnreachable
}

func (r *rackOf) Phase(string, int, int) {}
func (r *rackOf) Facts(f map[string]string) {
	for k, v := range f {
		r.Logf("fact %s: %s", k, v)
	}
}
func (r *rackOf) Logf(f string, a ...any) {
	r.mu.Lock()
	r.log = append(r.log, fmt.Sprintf(f, a...))
	r.mu.Unlock()
}

// watched is the Watcher of self; unit is its ejabberd.
func (r *rackOf) watched(self string, u unit, now func() time.Time) *Watcher {
	plan := provision.Plan{Node: self, Stack: provision.StackPlan{Members: []string{"a", "b", "c", "d", "e"}}}
	m := &member{plan: plan, unit: u, patience: time.Minute, pause: func(int) time.Duration { return time.Millisecond },
		eval: func(_ context.Context, expr string) (string, error) {
			st, err := r.view(self)
			return fmt.Sprintf("up=%t joining=%t incomplete=false known=%s running=%s", st.up, st.joining, strings.Join(st.known, ","), strings.Join(st.running, ",")), err
		}}
	return &Watcher{plan: plan, m: m, now: now, ask: func(_ context.Context, name string) (status, error) { return r.view(name) }}
}

// fakeUnit tells what is done to it.
type fakeUnit struct{ stop, start func() error }

func (f fakeUnit) Stop(context.Context) error    { return f.stop() }
func (f fakeUnit) Start(context.Context) error   { return f.start() }
func (f fakeUnit) Restart(context.Context) error { panic("not used") }

// TestHeal: two of five give way. Each waits until the other has stopped, too.
func TestHeal(t *testing.T) {
	r := &rackOf{}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	asks := 0
	u := fakeUnit{
		stop: func() error {
			r.Logf("stop")
			v := parts("a b c|e")
			r.set(v) // e still runs alone
			return nil
		},
		start: func() error {
			r.Logf("start")
			r.set(parts("a b c d/e"))
			return nil
		}}
	w := r.watched("d", u, func() time.Time { return now })
	ask := w.ask
	w.ask = func(ctx context.Context, name string) (status, error) {
		if _, here := r.views["d"]; name == "e" && !here {
			if asks++; asks == 3 {
				r.Logf("e stops")
				r.set(parts("a b c/d e"))
			}
		}
		return ask(ctx, name)
	}
	look := func(want string) {
		t.Helper()
		c, err := w.Tend(t.Context(), r)
		if got := fmt.Sprintf("%v %v %v", c.Running, c.Down, c.Apart); err != nil || got != want {
			t.Fatalf("sees %s, %v; want %s", got, err, want)
		}
		now = now.Add(15 * time.Second)
	}
	r.set(parts("a b c d e"))
	look("[a b c d e] [] []")
	r.set(parts("d e/a b c"))
	look("[d e] [a b c] []")
	look("[d e] [a b c] []")
	r.set(parts("a b c|d e"))
	look("[d e] [a b c] [a b c]")
	if len(r.log) > 0 {
		t.Fatalf("acted in the first look of a split: %q", r.log)
	}
	look("[a b c d] [e] []")
	want := []string{
		"the cluster is split: a, b, c on one side, which stays as it is; d, e on the other, which gives way: restarting ejabberd",
		"stop", "e stops", "start",
		"split healed: d had been apart from a, b, c for 45s, restarted ejabberd",
		"fact split_healed: split healed: d had been apart from a, b, c for 45s, restarted ejabberd",
	}
	if !slices.Equal(r.log, want) {
		t.Errorf("did %q\nwant %q", r.log, want)
	}
}

// TestHealFails: what does not work is said and tried again, later each time.
func TestHealFails(t *testing.T) {
	r := &rackOf{}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	stops := 0
	w := r.watched("c", fakeUnit{stop: func() error { stops++; return errors.New("systemd is busy") }}, func() time.Time { return now })
	r.set(parts("a b|c"))
	for range 4 * 10 { // ten minutes
		if c, err := w.Tend(t.Context(), r); err != nil || len(c.Apart) != 2 {
			t.Fatalf("sees %+v, %v", c, err)
		}
		now = now.Add(15 * time.Second)
	}
	if stops != 4 || !slices.Contains(r.log, "healing the split: systemd is busy") {
		t.Errorf("%d tries in ten minutes: %q", stops, r.log)
	}
	// The side that stays does nothing, however long it takes.
	stays := r.watched("a", fakeUnit{}, time.Now)
	for range 10 {
		if c, err := stays.Tend(t.Context(), r); err != nil || !slices.Equal(c.Apart, []string{"c"}) {
			t.Fatalf("sees %+v, %v", c, err)
		}
	}
}
