package provision

import "time"

// Stage is where a node is. One list for server, CLI, page, metrics and tests.
type Stage string

const (
	StageOff        Stage = "off"        // in the rack file, not seen yet
	StageUnknown    Stage = "unknown"    // asked to boot, not in the rack file: waits for approval
	StageBooting    Stage = "booting"    // has been given the installer
	StageInstalling Stage = "installing" // the installer carries out the plan
	StageInstalled  Stage = "installed"  // the disk is complete; the installed system is starting
	StagePreparing  Stage = "preparing"  // the agent checks and prepares the host
	StageJoining    Stage = "joining"    // the IM stack starts and joins
	StageProbing    Stage = "probing"    // a member of the cluster; waits for a probe message to arrive
	StageReady      Stage = "ready"      // the service works
	StageFailed     Stage = "failed"     // stopped; Failure says why and what to do
)

// Report is what a node says about itself. Progress reports overwrite each
// other; all others are kept.
type Report struct {
	// Time is the node's clock, for people. The journal has its own.
	Time time.Time `json:"time"`
	// Stage is where the node now is; empty: unchanged.
	Stage Stage `json:"stage,omitempty"`
	// Phase is the step within the stage, with its place in the list.
	Phase   string `json:"phase,omitempty"`
	PhaseN  int    `json:"phase_n,omitempty"`
	PhaseOf int    `json:"phase_of,omitempty"`
	// Done and Total count bytes of the current phase. A report that has a
	// Total and no Log, Stage, Failure, Facts or end of an order is pure progress.
	Done  int64 `json:"done,omitempty"`
	Total int64 `json:"total,omitempty"`
	// Log is one line for the node's log.
	Log string `json:"log,omitempty"`
	// Failure ends the stage: StageFailed follows from it.
	Failure *Failure `json:"failure,omitempty"`
	// Facts are what the node found: kernel, disk, firmware, memory, timings
	// (keys that end in _ms).
	Facts map[string]string `json:"facts,omitempty"`
	// Order is news of an order that the node has.
	Order *OrderNews `json:"order,omitempty"`
}

// Facts of a member of the IM cluster: the names of its members, sorted and
// separated by commas.
const (
	FactRunning = "cluster_running"
	FactDown    = "cluster_down" // members that the node does not see running
)

// FactTrouble says what keeps the node's part of the service from working, and
// what to do; empty: nothing that the node knows of.
const FactTrouble = "trouble"

// FactStaged are the digests of the releases of the stack that a node has whole
// on its disk, separated by commas.
const FactStaged = "stack_staged"

// FactRelease is the digest of the release that the node runs, or Installed.
const FactRelease = "stack_release"

// IsProgress tells whether the report carries nothing worth keeping: a count
// of bytes, which repeats its phase, how far an order is, or only a sign of life.
func (r Report) IsProgress() bool {
	if r.Order != nil && r.Order.State != "" {
		return false
	}
	return r.Stage == "" && r.Log == "" && r.Failure == nil && len(r.Facts) == 0 && (r.Phase == "" || r.Total > 0)
}

// Failure is a named stop: what happened and what the operator does next.
type Failure struct {
	Code    string `json:"code"`    // stable, for example disk-ambiguous
	Message string `json:"message"` // one sentence: what happened, to what
	Next    string `json:"next"`    // one sentence: what to do
	// Closed: the grant is closed. Otherwise the node tries again when it
	// next boots.
	Closed bool `json:"closed,omitempty"`
}

func (f *Failure) Error() string { return f.Message + ". " + f.Next }
