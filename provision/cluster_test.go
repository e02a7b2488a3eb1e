package provision

import (
	"strings"
	"testing"
	"time"
)

func TestClusterOf(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	// rack is three members that see each other, and a machine that waits.
	rack := func(change func(s []State)) []State {
		var states []State
		for _, name := range []string{"node1", "node2", "node3"} {
			states = append(states, State{Name: name, Known: true, Stage: StageReady, LastSeen: now.Add(-10 * time.Second),
				Facts: map[string]string{FactRunning: "node1,node2,node3", FactDown: ""}})
		}
		change(states)
		return append(states, State{Name: "52:54:00:00:00:01", Stage: StageUnknown})
	}
	sees := func(s *State, running, down string, since time.Time) {
		*s = s.Apply(Event{Time: since, Kind: EventReport, Report: &Report{Facts: map[string]string{FactRunning: running, FactDown: down}}})
		s.LastSeen = now
	}
	for name, c := range map[string]struct {
		change func(s []State)
		wrong  []string // what the lines begin with and contain, in order
	}{
		"whole": {func([]State) {}, nil},
		"one is silent and the others miss it": {func(s []State) {
			s[1].LastSeen = now.Add(-5 * time.Minute)
			sees(&s[0], "node1,node3", "node2", now.Add(-4*time.Minute))
			sees(&s[2], "node1,node3", "node2", now.Add(-3*time.Minute))
		}, []string{"node2 has said nothing|5m0s ago", "node2 does not run since|4m0s ago|node1, node3"}},
		"since the first look, not the last": {func(s []State) {
			sees(&s[0], "node1,node3", "node2", now.Add(-4*time.Minute))
			sees(&s[0], "node1", "node2,node3", now.Add(-1*time.Minute))
		}, []string{"node2 does not run since|4m0s ago|node1", "node3 does not run since|1m0s ago"}},
		"it came back": {func(s []State) {
			sees(&s[0], "node1,node3", "node2", now.Add(-4*time.Minute))
			sees(&s[0], "node1,node2,node3", "", now.Add(-3*time.Minute))
		}, nil},
		"a reinstall": {func(s []State) {
			s[2].Stage = StageInstalling
			sees(&s[0], "node1,node2", "", now)
			sees(&s[1], "node1,node2", "", now)
		}, []string{"node3 is not a member yet: it is installing"}},
		"two clusters": {func(s []State) {
			sees(&s[0], "node1", "", now)
		}, []string{"node2 is not in the cluster that node1 sees", "node3 is not in the cluster that node1 sees"}},
		"split": {func(s []State) {
			sees(&s[0], "node1,node2", "node3", now.Add(-2*time.Minute))
			sees(&s[1], "node1,node2", "node3", now.Add(-2*time.Minute))
			sees(&s[2], "node3", "node1,node2", now.Add(-time.Minute))
		}, []string{"the cluster is split: |node1, node2 / node3 run apart"}},
		"split in three": {func(s []State) {
			sees(&s[0], "node1", "node2,node3", now.Add(-2*time.Minute))
			sees(&s[1], "node2", "node1,node3", now.Add(-2*time.Minute))
			sees(&s[2], "node3", "node1,node2", now.Add(-time.Minute))
		}, []string{"the cluster is split: |node1 / node2 / node3 run apart"}},
		"split, and another is off": {func(s []State) {
			sees(&s[0], "node1", "node2,node3", now.Add(-4*time.Minute))
			s[1].LastSeen = now.Add(-5 * time.Minute)
			sees(&s[2], "node3", "node1,node2", now.Add(-time.Minute))
		}, []string{"node2 has said nothing", "the cluster is split: ", "node2 does not run since|4m0s ago|node1, node3"}},
		"its ejabberd does not answer": {func(s []State) {
			sees(&s[0], "node1,node2", "node3", now.Add(-2*time.Minute))
			sees(&s[1], "node1,node2", "node3", now.Add(-2*time.Minute))
			sees(&s[2], "", "", now.Add(-time.Minute))
		}, []string{"node1 is not in the cluster that node3 sees", "node2 is not in the cluster that node3 sees", "node3 does not run since|2m0s ago"}},
		"failed": {func(s []State) {
			s[0].Stage, s[0].Failure = StageFailed, &Failure{Code: "stack-stopped", Message: "ejabberd is gone", Next: "Look"}
		}, []string{"node1 has failed: ejabberd is gone. Look"}},
		"a component does not work": {func(s []State) {
			for i := range s {
				s[i].Facts = map[string]string{FactRunning: "node1,node2,node3", FactDown: "", FactTrouble: "web is down. Look"}
			}
			s[0].Facts[FactTrouble] = ""
			s[1].Stage, s[1].LastSeen = StageInstalling, now // of its life before
		}, []string{"node2 is not a member yet: it is installing", "node3 has trouble: web is down. Look"}},
		"off, and no message yet": {func(s []State) {
			s[0].Stage, s[1].Stage = StageOff, StageProbing
		}, []string{"node1 has never been seen", "node2 is a member, but no message"}},
		"left the rack file": {func(s []State) {
			sees(&s[0], "node1,node2,node3,node8", "node9", now)
		}, []string{"node9 is in no rack file|platter stack remove node9", "node8 is in no rack file, but node1 has it"}},
	} {
		got := ClusterOf(rack(c.change), now)
		if got.Whole != (len(c.wrong) == 0) || len(got.Wrong) != len(c.wrong) || len(got.Members) != 3 {
			t.Errorf("%s: %+v", name, got)
			continue
		}
		for i, want := range c.wrong {
			parts := strings.Split(want, "|")
			for _, p := range parts {
				if !strings.Contains(got.Wrong[i], p) || !strings.HasPrefix(got.Wrong[i], parts[0]) {
					t.Errorf("%s: %q does not say %q", name, got.Wrong[i], want)
				}
			}
		}
	}
	if got := ClusterOf(nil, now); got.Whole {
		t.Errorf("a rack without nodes: %+v", got)
	}
}
