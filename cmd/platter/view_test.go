package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func TestProgressLine(t *testing.T) {
	for name, c := range map[string]struct {
		state provision.State
		since time.Time
		want  []string
	}{
		"writing": {provision.State{Name: "node1", Stage: provision.StageInstalling, Phase: "write", PhaseN: 4, PhaseOf: 10,
			Done: 50e6, Total: 200e6, PhaseSince: t0, LastSeen: t0.Add(10 * time.Second), BootedAt: t0.Add(-30 * time.Second)}, time.Time{},
			[]string{"installing", "write (4/10)", "[=====     ", " 25%", "5.0 MB/s", "30 s left", "40s"}},
		"failed": {provision.State{Name: "n", Stage: provision.StageFailed, Failure: &provision.Failure{Code: "disk-none", Message: "no disk fits", Next: "Add one."}}, time.Time{},
			[]string{"disk-none: no disk fits. Add one."}},
		"ready, from power-on": {provision.State{Name: "n", Stage: provision.StageReady, BootedAt: t0, InstalledAt: t0.Add(20 * time.Second), ReadyAt: t0.Add(60 * time.Second)}, t0.Add(-5 * time.Second),
			[]string{"installed after 25 s", "ready after 65 s"}},
		"silent": {provision.State{Name: "n", Stage: provision.StageJoining, LastSeen: t0.Add(-2 * time.Minute)}, time.Time{},
			[]string{"joining, silent 2m10s"}},
		"due again": {provision.State{Name: "n", Stage: provision.StageReady, GrantOpen: true}, time.Time{}, []string{"ready, install due"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := progressLine(c.state, c.since, t0.Add(10*time.Second))
			for _, w := range c.want {
				if !strings.Contains(got, w) {
					t.Errorf("%q does not say %q", got, w)
				}
			}
		})
	}
}

// watch --until ready ends well only when every node of the rack file is ready
// and none is due, and ends at once when one has failed.
func TestWatchUntilReady(t *testing.T) {
	known := func(name string, stage provision.Stage) provision.State {
		return provision.State{Name: name, Known: true, Stage: stage}
	}
	due := known("b", provision.StageReady)
	due.GrantOpen = true
	failed := known("b", provision.StageFailed)
	failed.Failure = &provision.Failure{Code: "x", Message: "m", Next: "n"}
	for name, c := range map[string]struct {
		states []provision.State
		done   bool
		fails  bool
	}{
		"all ready":        {[]provision.State{known("a", provision.StageReady), known("b", provision.StageReady)}, true, false},
		"one still joins":  {[]provision.State{known("a", provision.StageReady), known("b", provision.StageJoining)}, false, false},
		"one is due again": {[]provision.State{known("a", provision.StageReady), due}, false, false},
		"one has failed":   {[]provision.State{known("a", provision.StageJoining), failed}, true, true},
		"strangers do not count": {[]provision.State{known("a", provision.StageReady),
			{Name: "52:54:00:00:00:01", Stage: provision.StageUnknown}}, true, false},
		"gone from the list": {[]provision.State{known("a", provision.StageReady), known("b", provision.StageJoining), {Name: "b"}}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			w := watch{out: &out, untilReady: true, now: func() time.Time { return t0 }, nodes: map[string]provision.State{}, said: map[string]string{}}
			for _, s := range c.states {
				w.update(s)
			}
			done, err := w.done()
			if done != c.done || (err != nil) != c.fails {
				t.Errorf("done %v, error %v", done, err)
			}
			if done && err == nil && !strings.Contains(out.String(), "NODE") {
				t.Errorf("no table at the end:\n%s", &out)
			}
		})
	}
}

// What does not reach a disc host says so in one sentence and exits with 1.
func TestCommandsWithoutADiscHost(t *testing.T) {
	for _, args := range [][]string{
		{"node", "ls"}, {"node", "show", "node1"}, {"node", "reinstall", "node1"}, {"watch"}, {"stack", "status"}, {"stack", "probe"},
		{"node", "orders"}, {"node", "orders", "show", "1"}, {"node", "orders", "withdraw", "1"}, {"node", "diagnose", "node1"},
	} {
		var out, errs bytes.Buffer
		code := run(context.Background(), append(args, "--socket", t.TempDir()+"/none"), strings.NewReader(""), &out, &errs)
		if code != 1 || strings.Count(errs.String(), "\n") != 1 || !strings.Contains(errs.String(), "no disc host answers at") {
			t.Errorf("%v: exit %d, %q", args, code, errs.String())
		}
	}
	var out, errs bytes.Buffer
	if code := run(context.Background(), []string{"node", "ls", "-o", "xml"}, nil, &out, &errs); code != 1 || !strings.Contains(errs.String(), "table or json") {
		t.Errorf("node ls -o xml: exit %d, %q", code, errs.String())
	}
}

// On a terminal each redraw starts where the last one did: no line wraps.
func TestLiveDrawingFitsTheTerminal(t *testing.T) {
	var out bytes.Buffer
	w := watch{out: &out, live: true, width: func() int { return 40 }, now: func() time.Time { return t0 }, nodes: map[string]provision.State{}}
	w.update(provision.State{Name: "node1", Known: true, Stage: provision.StageFailed,
		Failure: &provision.Failure{Code: "disk-none", Message: strings.Repeat("a long sentence ", 20), Next: "x"}})
	w.update(provision.State{Name: "node2", Known: true, Stage: provision.StageOff})
	w.draw()
	first := strings.Split(strings.ReplaceAll(out.String(), "\x1b[2K", ""), "\n")
	if len(first) != 3 || len(first[0]) != 40 {
		t.Errorf("drawn: %q", first)
	}
	out.Reset()
	w.draw()
	if !strings.HasPrefix(out.String(), "\x1b[2A") {
		t.Errorf("the second drawing begins with %q", out.String()[:8])
	}
}
