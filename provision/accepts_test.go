package provision

import (
	"testing"
	"time"
)

// A reinstall that is withdrawn leaves the old system speaking for the node.
func TestAcceptsAfterWithdraw(t *testing.T) {
	s := State{Name: "node1", Known: true}
	at := time.Unix(1000, 0)
	apply := func(e Event) { at = at.Add(time.Second); e.Time = at; s = s.Apply(e) }
	apply(Event{Kind: EventGrant, Generation: 1})
	apply(Event{Kind: EventReport, Generation: 1, Report: &Report{Stage: StageInstalled}})
	apply(Event{Kind: EventGrant, Generation: 2})
	if s.Accepts(1) || !s.Accepts(2) || s.Accepts(0) {
		t.Fatalf("with generation 2 due: accepts 0,1,2 = %v %v %v", s.Accepts(0), s.Accepts(1), s.Accepts(2))
	}
	apply(Event{Kind: EventReport, Generation: 1, Report: &Report{Stage: StageProbing}})
	if s.Stage == StageProbing {
		t.Fatal("a report of the generation that is to be replaced counted")
	}
	apply(Event{Kind: EventWithdraw})
	if !s.Accepts(1) || s.Accepts(0) {
		t.Fatal("after the withdrawal generation 1 must speak for the node again")
	}
	apply(Event{Kind: EventReport, Generation: 1, Report: &Report{Stage: StageProbing}})
	apply(Event{Kind: EventProbe, Generation: s.Installed})
	if s.Stage != StageReady || s.ReadyAt.IsZero() {
		t.Fatalf("stage %s, ready at %v", s.Stage, s.ReadyAt)
	}
}

// What a report must keep: a phase that begins is kept, its byte counts not.
func TestIsProgress(t *testing.T) {
	for _, c := range []struct {
		r    Report
		want bool
	}{
		{Report{}, true},
		{Report{Done: 1, Total: 2}, true},
		{Report{Phase: "write", Done: 1, Total: 2}, true},
		{Report{Phase: "write", PhaseN: 1, PhaseOf: 2}, false},
		{Report{Log: "x", Total: 2}, false},
		{Report{Stage: StageInstalling}, false},
	} {
		if c.r.IsProgress() != c.want {
			t.Errorf("%+v: %v", c.r, !c.want)
		}
	}
}
