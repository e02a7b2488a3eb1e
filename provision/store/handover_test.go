package store

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"platter/provision"
)

// A handover is one event: before it the journal changes, afterwards it does not,
// over every restart, until it is taken back.
func TestHandover(t *testing.T) {
	s, clock, path := withRack(t)
	ctx := t.Context()
	if s.HandedOver() != nil {
		t.Fatal("handed over at first")
	}
	frozen := s.Freeze()
	waiting := make(chan error, 1)
	go func() {
		waiting <- s.Append(ctx, report("node1", 1, provision.Report{Log: "while it was frozen"}))
	}()
	before := s.last
	snapshot := filepath.Join(t.TempDir(), "copy.db")
	must(t, frozen.Snapshot(snapshot))
	if err := frozen.Snapshot(snapshot); err == nil {
		t.Error("a copy was written over another file")
	}
	if st, err := os.Stat(snapshot); err != nil || st.Mode() != 0o600 {
		t.Errorf("the copy: %v %v", st.Mode(), err)
	}
	if s.last != before {
		t.Error("a frozen journal has changed")
	}
	must(t, frozen.HandOver(provision.Event{Node: "node1", Generation: 1, Detail: "digest", Order: &provision.Order{ID: 5}}))
	frozen.Release()
	if err := <-waiting; !errors.Is(err, ErrHandedOver) {
		t.Errorf("who waited meanwhile: %v", err)
	}

	refused := func(when string) {
		t.Helper()
		_, err1 := s.IssueToken(ctx, Token{Node: "node1", Generation: 1, Life: "installer"}, time.Hour)
		_, err2 := s.AppendBatch(ctx, "node1", Batch{"s", 1}, []provision.Event{report("node1", 1, provision.Report{Log: "x"})})
		for i, err := range []error{err1, err2, s.KeepRoll(ctx, &provision.Roll{}), s.Append(ctx, provision.Event{Kind: provision.EventGrant, Node: "node1", Generation: 2})} {
			if !errors.Is(err, ErrHandedOver) {
				t.Errorf("%s: change %d: %v", when, i, err)
			}
		}
	}
	refused("at once")
	want := provision.HandoverMark{Node: "node1", State: "digest", Order: 5, Time: clock.Now()}
	reopen := func() {
		t.Helper()
		must(t, s.Close())
		s = openAt(t, path, clock.Now)
	}
	reopen()
	if got := s.HandedOver(); got == nil || *got != want {
		t.Fatalf("%+v, want %+v", got, want)
	}
	refused("after a restart")
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventHandoverTaken, Node: "node1"}))
	reopen()
	want.Taken = true
	if got := s.HandedOver(); got == nil || *got != want {
		t.Fatalf("%+v, want %+v", got, want)
	}

	// The copy is the journal as it was, and goes on.
	successor := openAt(t, snapshot, clock.Now)
	if successor.HandedOver() != nil || successor.last != before {
		t.Errorf("the copy ends at event %d with %+v, want %d", successor.last, successor.HandedOver(), before)
	}
	must(t, successor.Append(ctx, report("node1", 1, provision.Report{Log: "goes on"})))

	must(t, s.Append(ctx, provision.Event{Kind: provision.EventTakeBack, Node: "node1"}))
	reopen()
	if s.HandedOver() != nil {
		t.Error("taken back, and still handed over")
	}
	must(t, s.Append(ctx, report("node1", 1, provision.Report{Log: "again"})))
}
