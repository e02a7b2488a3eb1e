package provision

import (
	"fmt"
	"time"
)

// EventKind says what a journal event is.
type EventKind string

const (
	EventGrant    EventKind = "grant"    // Generation is raised: the node may be installed
	EventWithdraw EventKind = "withdraw" // the open grant is closed without an install
	EventApprove  EventKind = "approve"  // MAC now belongs to Node
	EventBoot     EventKind = "boot"     // a machine asked to boot; Action is what it got
	EventEnrol    EventKind = "enrol"    // the node traded its token for an identity
	EventReport   EventKind = "report"   // the node says something
	EventProbe    EventKind = "probe"    // a message arrived: the node is ready

	EventOrder         EventKind = "order"          // Order is given to the node
	EventOrderAccept   EventKind = "order-accept"   // the node is handed Order
	EventOrderWithdraw EventKind = "order-withdraw" // Order is taken back before that

	EventHandover      EventKind = "handover"       // Node is the disc host from now on, by Order; Detail is the state's digest
	EventHandoverTaken EventKind = "handover-taken" // Node has the receipt
	EventTakeBack      EventKind = "take-back"      // an operator made this the disc host again
)

// Event is one line of the journal: durable before it has effects.
type Event struct {
	ID         int64     `json:"id"` // ascending, from 1; 0 for pure progress, which is not kept
	Time       time.Time `json:"time"`
	Kind       EventKind `json:"kind"`
	Node       string    `json:"node"` // name, or the MAC of an unknown machine
	MAC        MAC       `json:"mac,omitempty"`
	Generation int       `json:"generation,omitempty"`
	Action     Action    `json:"action,omitempty"`
	Detail     string    `json:"detail,omitempty"`
	Report     *Report   `json:"report,omitempty"`
	Order      *Order    `json:"order,omitempty"`
}

// State is what the events of one node add up to.
type State struct {
	Name       string `json:"name"`
	Slot       string `json:"slot,omitempty"`
	MAC        MAC    `json:"mac,omitempty"`
	Address    string `json:"address,omitempty"`
	Known      bool   `json:"known"` // in the rack file
	Stage      Stage  `json:"stage"`
	Generation int    `json:"generation"` // granted so far
	Installed  int    `json:"installed"`  // generation on the disk; 0: none
	GrantOpen  bool   `json:"grant_open"` // an install is due
	Phase      string `json:"phase,omitempty"`
	PhaseN     int    `json:"phase_n,omitempty"`
	PhaseOf    int    `json:"phase_of,omitempty"`
	Done       int64  `json:"done,omitempty"`
	Total      int64  `json:"total,omitempty"`
	// PhaseSince is when Done began to count: rate = Done / (now - PhaseSince).
	PhaseSince time.Time `json:"phase_since,omitzero"`
	LastLog    string    `json:"last_log,omitempty"`
	// Failure is set while Stage is failed.
	Failure *Failure          `json:"failure,omitempty"`
	Facts   map[string]string `json:"facts,omitempty"`
	// DownSince is since when the node misses members of the cluster, by name.
	DownSince map[string]time.Time `json:"down_since,omitempty"`
	// BootedAt is the first boot request of the current grant; the clocks
	// below count from it. Firmware time before it is not seen by us.
	BootedAt    time.Time `json:"booted_at,omitzero"`
	InstalledAt time.Time `json:"installed_at,omitzero"`
	ReadyAt     time.Time `json:"ready_at,omitzero"`
	LastSeen    time.Time `json:"last_seen,omitzero"`
}

// Accepts tells whether a node of that generation still speaks for this one:
// the generation granted last, or, while no install is due, the one that is on
// the disk. The two differ after a reinstall that was withdrawn or that failed
// before it touched the disk.
func (s State) Accepts(generation int) bool {
	return generation == s.Generation || !s.GrantOpen && generation > 0 && generation == s.Installed
}

// Apply returns the state after e. Events come in journal order; a report of
// a generation that Accepts refuses changes nothing but LastSeen.
func (s State) Apply(e Event) State {
	switch e.Kind {
	case EventBoot, EventEnrol, EventReport, EventOrderAccept: // the node spoke
		if !e.Time.IsZero() {
			s.LastSeen = e.Time
		}
	}
	switch e.Kind {
	case EventGrant:
		if e.Generation <= s.Generation {
			return s
		}
		s.Generation, s.GrantOpen = e.Generation, true
		s.Failure = nil
		s.BootedAt, s.InstalledAt, s.ReadyAt = time.Time{}, time.Time{}, time.Time{}
		s.clearPhase()
	case EventWithdraw:
		s.GrantOpen = false
	case EventApprove:
		s.MAC = e.MAC
	case EventBoot:
		s.MAC = e.MAC
		switch e.Action {
		case ActionInstall:
			if s.BootedAt.IsZero() {
				s.BootedAt = e.Time
			}
			s.Stage, s.Failure = StageBooting, nil
			s.clearPhase()
		case ActionInventory:
			s.Stage = StageUnknown
		}
	case EventReport:
		if e.Report == nil || !s.Accepts(e.Generation) {
			return s
		}
		s = s.applyReport(e)
	case EventProbe:
		if !s.Accepts(e.Generation) {
			return s
		}
		s.Stage, s.Failure = StageReady, nil
		s.clearPhase()
		if s.ReadyAt.IsZero() {
			s.ReadyAt = e.Time
		}
	}
	return s
}

func (s *State) clearPhase() {
	s.Phase, s.PhaseN, s.PhaseOf, s.Done, s.Total, s.PhaseSince = "", 0, 0, 0, 0, time.Time{}
}

func (s State) applyReport(e Event) State {
	r := e.Report
	if r.Stage != "" && r.Stage != s.Stage {
		s.Stage, s.Failure = r.Stage, nil
		s.clearPhase()
	}
	switch r.Stage {
	case StageInstalled, StagePreparing, StageJoining, StageProbing:
		// A node that is past its install has been installed, also when the
		// report that said so was lost: the grant closes.
		s.Installed, s.GrantOpen = e.Generation, false
		if s.InstalledAt.IsZero() {
			s.InstalledAt = e.Time
		}
	}
	if r.Phase != "" && r.Phase != s.Phase {
		s.Phase, s.PhaseN, s.PhaseOf, s.Done, s.Total, s.PhaseSince = r.Phase, r.PhaseN, r.PhaseOf, 0, 0, e.Time
	}
	if r.Total > 0 {
		s.Done, s.Total = r.Done, r.Total
	}
	if r.Log != "" {
		s.LastLog = r.Log
	}
	if len(r.Facts) > 0 {
		facts := make(map[string]string, len(s.Facts)+len(r.Facts))
		for k, v := range s.Facts {
			facts[k] = v
		}
		for k, v := range r.Facts {
			facts[k] = v
		}
		s.Facts = facts
	}
	if down, ok := r.Facts[FactDown]; ok {
		since := map[string]time.Time{}
		for _, name := range names(down) {
			since[name] = e.Time
			if t, ok := s.DownSince[name]; ok {
				since[name] = t
			}
		}
		s.DownSince = since
	}
	if r.Failure != nil {
		s.Stage, s.Failure, s.LastLog = StageFailed, r.Failure, r.Failure.Error()
		if r.Failure.Closed {
			s.GrantOpen = false
		}
	}
	return s
}

// Action is what a machine that asks to boot gets.
type Action string

const (
	ActionInstall   Action = "install"   // the installer, with a one-time token
	ActionLocal     Action = "local"     // its own disk
	ActionInventory Action = "inventory" // not in the rack file: report the hardware, touch nothing, wait
	ActionExplain   Action = "explain"   // a message on the screen, then its own disk
)

// Boot is the answer to a boot request.
type Boot struct {
	Action Action
	// Why is one sentence for the screen and the journal.
	Why string
}

// BootDecision decides what a machine boots from where its node is. The zero
// State is an unknown machine. Nothing but an open grant ever installs.
func BootDecision(s State) Boot {
	switch {
	case !s.Known:
		return Boot{ActionInventory, "this machine is not in the rack file: it is listed and waits, its disks are not touched"}
	case s.GrantOpen:
		return Boot{ActionInstall, fmt.Sprintf("%s is due for install %d", s.Name, s.Generation)}
	case s.Installed == 0 && s.Failure != nil:
		return Boot{ActionExplain, fmt.Sprintf("%s is not installed: %s", s.Name, s.Failure.Error())}
	case s.Installed == 0:
		return Boot{ActionExplain, fmt.Sprintf("%s has no open grant: run 'platter node reinstall %s' on the disc host", s.Name, s.Name)}
	default:
		return Boot{ActionLocal, fmt.Sprintf("%s is installed (generation %d)", s.Name, s.Installed)}
	}
}

// JoinRole is what a node does with the IM cluster.
type JoinRole string

const (
	RoleForm JoinRole = "form" // start the cluster
	RoleJoin JoinRole = "join" // join the member Target
	RoleWait JoinRole = "wait" // ask again soon: the founder is not up yet
)

// Join is the answer to a node that asks for its part in the cluster.
type Join struct {
	Role   JoinRole `json:"role"`
	Target string   `json:"target,omitempty"`
}

// JoinDecision says what node does: it joins a member that is up; if there is
// none the first node of the rack forms the cluster and the others wait.
// states are all nodes of the rack in rack order.
func JoinDecision(node string, states []State) Join {
	for _, s := range states {
		if s.Name != node && (s.Stage == StageProbing || s.Stage == StageReady) {
			return Join{RoleJoin, s.Name}
		}
	}
	// A cluster that had members may still have them, only out of sight: a
	// second cluster beside it would split the service.
	for _, s := range states {
		if s.Name != node && !s.ReadyAt.IsZero() {
			return Join{Role: RoleWait, Target: s.Name}
		}
	}
	if len(states) > 0 && states[0].Name == node {
		return Join{Role: RoleForm}
	}
	if len(states) > 0 {
		return Join{Role: RoleWait, Target: states[0].Name}
	}
	return Join{Role: RoleForm}
}
