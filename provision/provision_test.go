package provision

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func fold(s State, events ...Event) State {
	for i, e := range events {
		if e.Time.IsZero() {
			e.Time = t0.Add(time.Duration(i) * time.Second)
		}
		s = s.Apply(e)
	}
	return s
}

func report(gen int, r Report) Event { return Event{Kind: EventReport, Generation: gen, Report: &r} }

func TestAnInstallFromGrantToReady(t *testing.T) {
	s := fold(State{Name: "node1", Known: true, Stage: StageOff},
		Event{Kind: EventGrant, Generation: 1},
		Event{Kind: EventBoot, Action: ActionInstall},
		Event{Kind: EventEnrol},
		report(1, Report{Stage: StageInstalling}),
		report(1, Report{Phase: "write image", PhaseN: 4, PhaseOf: 9, Log: "phase write image (4/9)"}),
		report(1, Report{Done: 5, Total: 10}),
	)
	if s.Stage != StageInstalling || s.PhaseN != 4 || s.Done != 5 || s.Total != 10 || s.PhaseSince != t0.Add(4*time.Second) {
		t.Errorf("in the middle: %+v", s)
	}
	if b := BootDecision(s); b.Action != ActionInstall {
		t.Errorf("a node that lost power half-way boots %v", b)
	}
	s = fold(s, report(1, Report{Stage: StageInstalled, Facts: map[string]string{"kernel": "6.12"}}))
	if s.Installed != 1 || s.GrantOpen || s.Phase != "" || s.InstalledAt.IsZero() {
		t.Errorf("installed: %+v", s)
	}
	if b := BootDecision(s); b.Action != ActionLocal {
		t.Errorf("an installed node boots %v", b)
	}
	s = fold(s, report(1, Report{Stage: StageProbing}), Event{Kind: EventProbe, Generation: 1})
	if s.Stage != StageReady || s.ReadyAt.IsZero() || s.Facts["kernel"] != "6.12" {
		t.Errorf("ready: %+v", s)
	}
	lost := fold(State{Name: "node1", Known: true}, Event{Kind: EventGrant, Generation: 1}, report(1, Report{Stage: StageInstalling}), report(1, Report{Stage: StagePreparing}))
	if lost.GrantOpen || lost.Installed != 1 || lost.InstalledAt.IsZero() {
		t.Errorf("the report of the end of the install was lost, and the agent's does not make up for it: %+v", lost)
	}
	s = fold(s, Event{Kind: EventGrant, Generation: 2})
	if !s.GrantOpen || !s.ReadyAt.IsZero() {
		t.Errorf("granted again: %+v", s)
	}
	// The old system still runs and reports; it must not undo the grant.
	s = fold(s, report(1, Report{Stage: StageInstalled}))
	if !s.GrantOpen {
		t.Error("a report of generation 1 closed the grant of generation 2")
	}
}

// The command line is: console, the profile's arguments, the node's own last.
func TestCmdline(t *testing.T) {
	r := &Rack{
		Networks: []Network{{Subnet: netip.MustParsePrefix("10.0.0.0/24"), DiscHost: netip.MustParseAddr("10.0.0.1")}},
		Host: HostSpec{Settings: []Setting{
			{Kind: Cmdline, Key: "panic", Value: "10"}, {Kind: Sysctl, Key: "vm.swappiness", Value: "10"},
			{Kind: Cmdline, Key: "mitigations", Value: "auto"}, {Kind: Cmdline, Key: "nosmt"},
		}},
	}
	n := Node{Name: "n", Address: netip.MustParseAddr("10.0.0.2"), Cmdline: []string{"mitigations=off", "debug"}}
	p, err := PlanFor(r, n, "", 1, ImageRef{})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(p.Cmdline, " "); got != "console=tty0 console=ttyS0,115200 panic=10 nosmt mitigations=off debug" {
		t.Errorf("command line %q", got)
	}
	// What the node has its own of is not asked of it.
	if len(p.Host.Settings) != 3 || len(r.Host.Settings) != 4 {
		t.Errorf("settings of the node %v, of the rack %v", p.Host.Settings, r.Host.Settings)
	}
}

func TestFailures(t *testing.T) {
	granted := fold(State{Name: "n", Known: true}, Event{Kind: EventGrant, Generation: 1})
	open := fold(granted, report(1, Report{Failure: &Failure{Code: "disk-none", Message: "no disk", Next: "add one"}}))
	if open.Stage != StageFailed || BootDecision(open).Action != ActionInstall {
		t.Errorf("a failure that leaves the grant open: %+v", open)
	}
	if s := fold(open, Event{Kind: EventBoot, Action: ActionInstall}); s.Failure != nil || s.Stage != StageBooting {
		t.Errorf("a new try keeps the old failure: %+v", s)
	}
	closed := fold(granted, report(1, Report{Failure: &Failure{Code: "x", Message: "m", Next: "n", Closed: true}}))
	if BootDecision(closed).Action != ActionExplain {
		t.Errorf("a closed failure boots %v", BootDecision(closed))
	}
	if s := fold(granted, Event{Kind: EventWithdraw}); BootDecision(s).Action != ActionExplain {
		t.Errorf("a withdrawn grant boots %v", BootDecision(s))
	}
}

// Whatever happens, in whatever order: only a grant that is newer than the
// last success or closure ever leads to an install, and an unknown machine is
// never installed.
func TestNothingInstallsWithoutAGrant(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := State{Name: "n", Known: rapid.Bool().Draw(t, "known")}
		due := false
		for range rapid.IntRange(0, 40).Draw(t, "events") {
			gen := rapid.IntRange(0, 3).Draw(t, "generation")
			e := Event{Kind: rapid.SampledFrom([]EventKind{EventGrant, EventWithdraw, EventApprove, EventBoot, EventEnrol, EventReport, EventProbe}).Draw(t, "kind"), Generation: gen}
			switch e.Kind {
			case EventGrant:
				if gen > s.Generation {
					due = true
				}
			case EventWithdraw:
				due = false
			case EventBoot:
				e.Action = rapid.SampledFrom([]Action{ActionInstall, ActionLocal, ActionInventory, ActionExplain}).Draw(t, "action")
			case EventReport:
				r := Report{Stage: rapid.SampledFrom([]Stage{"", StageInstalling, StageInstalled, StagePreparing, StageProbing}).Draw(t, "stage")}
				if rapid.Bool().Draw(t, "fails") {
					r.Failure = &Failure{Code: "c", Closed: rapid.Bool().Draw(t, "closed")}
				}
				past := r.Stage == StageInstalled || r.Stage == StagePreparing || r.Stage == StageProbing
				if gen == s.Generation && (past || r.Failure != nil && r.Failure.Closed) {
					due = false
				}
				e.Report = &r
			}
			s = s.Apply(e)
			if b := BootDecision(s); b.Action == ActionInstall && (!due || !s.Known) {
				t.Fatalf("installs without a grant: %+v after %+v", s, e)
			} else if b.Why == "" {
				t.Fatalf("no reason given for %v", b.Action)
			}
		}
	})
}

func TestJoinDecision(t *testing.T) {
	st := func(name string, stage Stage, wasReady bool) State {
		s := State{Name: name, Stage: stage}
		if wasReady {
			s.ReadyAt = t0
		}
		return s
	}
	for name, c := range map[string]struct {
		node   string
		states []State
		want   Join
	}{
		"the first forms":                                     {"a", []State{st("a", StageJoining, false), st("b", StageJoining, false)}, Join{Role: RoleForm}},
		"the second waits for it":                             {"b", []State{st("a", StageJoining, false), st("b", StageJoining, false)}, Join{RoleWait, "a"}},
		"and joins it":                                        {"b", []State{st("a", StageProbing, false), st("b", StageJoining, false)}, Join{RoleJoin, "a"}},
		"a reinstalled first joins the other":                 {"a", []State{st("a", StageJoining, false), st("b", StageReady, true)}, Join{RoleJoin, "b"}},
		"and never splits from one that is only out of sight": {"a", []State{st("a", StageJoining, false), st("b", StageFailed, true)}, Join{RoleWait, "b"}},
		"alone": {"a", []State{st("a", StageJoining, false)}, Join{Role: RoleForm}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := JoinDecision(c.node, c.states); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestPlanDigestCoversThePlan(t *testing.T) {
	r := &Rack{Name: "r", Networks: []Network{{Subnet: netip.MustParsePrefix("10.0.0.0/24"), DiscHost: netip.MustParseAddr("10.0.0.1")}},
		Nodes: []Node{{Name: "a", Address: netip.MustParseAddr("10.0.0.5")}}}
	p, err := PlanFor(r, r.Nodes[0], "52:54:00:00:00:01", 1, ImageRef{"i", "d"})
	if err != nil {
		t.Fatal(err)
	}
	q := p
	if p.Digest() != q.Digest() {
		t.Error("equal plans have different digests")
	}
	q.Generation = 2
	if p.Digest() == q.Digest() {
		t.Error("the generation is not in the digest")
	}
	if p.DiscHost != "https://10.0.0.1:8443" || p.Net.Address.String() != "10.0.0.5/24" || p.Reinstall {
		t.Errorf("plan is %+v", p)
	}
	r.Nodes[0].Address = netip.MustParseAddr("10.0.1.5")
	if _, err := PlanFor(r, r.Nodes[0], "", 1, ImageRef{}); err == nil {
		t.Error("an address outside every network was planned for")
	}
}
