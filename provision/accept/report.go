package accept

import (
	"fmt"
	"strings"
	"time"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/stack/load"
)

// Options say what is tested and what is good enough. Zero values mean the
// defaults named here.
type Options struct {
	Users int           `json:"users,omitempty"` // simulated; as many as the rack file states
	Every time.Duration `json:"every,omitempty"` // from one message of a user to the next; 10 s
	For   time.Duration `json:"for,omitempty"`   // how long messages are sent; 60 s
	// NoFailure leaves the failure of a node out.
	NoFailure bool   `json:"no_failure,omitempty"`
	Node      string `json:"node,omitempty"` // that fails; the last one of the rack
	// Outage is how long the node's service stays away; 30 s.
	Outage time.Duration `json:"outage,omitempty"`

	P99   time.Duration `json:"p99,omitempty"`   // 99 % of messages arrive within it; 1 s
	Lost  int           `json:"lost,omitempty"`  // messages that may be lost while all is well
	Back  time.Duration `json:"back,omitempty"`  // all users of a failed node are in again within it; 60 s
	Whole time.Duration `json:"whole,omitempty"` // the cluster is whole within it, once the node starts; 5 min
}

// WithDefaults fills in what is not said, for a rack.
func (o Options) WithDefaults(r *provision.Rack) Options {
	or := func(d *time.Duration, otherwise time.Duration) {
		if *d == 0 {
			*d = otherwise
		}
	}
	or(&o.Every, 10*time.Second)
	or(&o.For, time.Minute)
	or(&o.Outage, 30*time.Second)
	or(&o.P99, time.Second)
	or(&o.Back, time.Minute)
	or(&o.Whole, 5*time.Minute)
	if o.Users == 0 {
		if o.Users = r.Stack.Users; o.Users == 0 {
			o.Users = provision.DefaultUsers
		}
	}
	if o.Node == "" && len(r.Nodes) > 0 {
		o.Node = r.Nodes[len(r.Nodes)-1].Name
	}
	if len(r.Nodes) < 2 {
		o.NoFailure = true // nobody would be left
	}
	return o
}

// Check lists everything that is wrong with options that have their defaults.
func (o Options) Check(r *provision.Rack) []string {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if o.Users < 2 || o.Users > provision.MaxUsers {
		say("%d users: must be from 2 to %d", o.Users, provision.MaxUsers)
	}
	if o.Every < time.Millisecond || o.For < o.Every || o.For > 24*time.Hour {
		say("a message every %s for %s: the first must be at least 1ms, the second not shorter and at most 24h", o.Every, o.For)
	}
	if _, ok := r.NodeByName(o.Node); !ok && !o.NoFailure {
		say("there is no node %.80q that could fail", o.Node)
	}
	if !o.NoFailure && (o.Outage < time.Second || o.Outage > provision.MaxOutage*time.Second) {
		say("an outage of %s: must be from 1s to %s", o.Outage, provision.MaxOutage*time.Second)
	}
	if o.P99 < 0 || o.Lost < 0 || o.Back < 0 || o.Whole < 0 {
		say("a limit is negative")
	}
	return wrong
}

// Report is an acceptance.
type Report struct {
	Rack    string    `json:"rack"`
	Domain  string    `json:"domain"`
	Image   string    `json:"image"`
	Program string    `json:"program"` // version of the disc host's program
	Began   time.Time `json:"began"`
	Ended   time.Time `json:"ended"`
	Options Options   `json:"options"`

	Nodes      []Node      `json:"nodes"`
	Components []Component `json:"components"`
	Size       Size        `json:"size"`
	Clocks     Clocks      `json:"clocks"` // of the whole rack

	Probes []provision.ProbeResult `json:"probes"`
	Load   load.Report             `json:"load"`
	Outage *Outage                 `json:"outage,omitempty"`
	After  []provision.ProbeResult `json:"probes_after,omitempty"` // the failure

	// Wrong is why the rack has not passed, a sentence each.
	Wrong  []string `json:"wrong"`
	Passed bool     `json:"passed"`
}

// Node is one node as it was found.
type Node struct {
	Name     string               `json:"name"`
	Slot     string               `json:"slot,omitempty"`
	Address  string               `json:"address"`
	Facts    map[string]string    `json:"facts"`
	Clocks   Clocks               `json:"clocks"`
	Versions map[string]string    `json:"versions"`
	Limits   []provision.InEffect `json:"limits"`
	// Wrong is what deviates on the node, a sentence each.
	Wrong []string `json:"wrong"`
}

// Component is a part of the stack.
type Component struct {
	Name  string   `json:"name"`
	About string   `json:"about"`
	Nodes []string `json:"nodes"`
}

// Size is what the service is made for.
type Size struct {
	provision.Sizing
	Machines []provision.Machine `json:"machines"`
	Misfits  []string            `json:"misfits"`
	// Undersized: the rack file allows machines that are too small.
	Undersized bool `json:"undersized"`
}

// Outage is the failure of a node.
type Outage struct {
	Node  string      `json:"node"`
	Began time.Time   `json:"began"`
	Load  load.Report `json:"load"`
	// Back is from the failure until all users were logged in again; Whole is
	// from the start of the node's service until the cluster was whole. Negative:
	// never.
	Back   time.Duration `json:"back"`
	Whole  time.Duration `json:"whole"`
	Ledger load.Ledger   `json:"ledger"`
	// Failed is why the failure could not be tried.
	Failed string `json:"failed,omitempty"`
}

// Clocks are how long an install took, by the disc host's clock; 0: unknown.
type Clocks struct {
	OS      time.Duration `json:"os"`      // first boot request until the installed system speaks
	Message time.Duration `json:"message"` // the stack starts to form until the first message has passed
}

// ClocksOf reads the clocks of the installs of that generation, one node's
// events each: from the first beginning to the last end of all of them.
func ClocksOf(generations []int, events ...[]provision.Event) Clocks {
	var begin, os, joining, ready []time.Time
	for i, all := range events {
		var at [4]time.Time
		note := func(k int, t time.Time) {
			if at[k].IsZero() {
				at[k] = t
			}
		}
		for _, e := range all {
			if e.Generation != generations[i] {
				continue
			}
			switch {
			case e.Kind == provision.EventBoot && e.Action == provision.ActionInstall:
				note(0, e.Time)
			case e.Kind == provision.EventProbe:
				note(3, e.Time)
			case e.Kind == provision.EventReport && e.Report != nil && e.Report.Stage == provision.StagePreparing:
				note(1, e.Time)
			case e.Kind == provision.EventReport && e.Report != nil && e.Report.Stage == provision.StageJoining:
				note(2, e.Time)
			}
		}
		begin, os, joining, ready = append(begin, at[0]), append(os, at[1]), append(joining, at[2]), append(ready, at[3])
	}
	between := func(from, to []time.Time) time.Duration {
		var first, last time.Time
		for i := range from {
			if from[i].IsZero() || to[i].IsZero() {
				return 0
			}
			if first.IsZero() || from[i].Before(first) {
				first = from[i]
			}
			if to[i].After(last) {
				last = to[i]
			}
		}
		return last.Sub(first)
	}
	return Clocks{OS: between(begin, os), Message: between(joining, ready)}
}

// Take adds what a node has found of itself.
func (n *Node) Take(d provision.Diagnosis) {
	n.Versions, n.Limits = d.Versions, d.Limits
	results, err := hostcmd.Unmarshal(d.Host)
	if err != nil {
		n.Wrong = append(n.Wrong, err.Error())
	}
	for _, r := range results {
		if r.Outcome == hostprep.Failed {
			n.Wrong = append(n.Wrong, fmt.Sprintf("the check of %s failed: %v", r.Step, r.Reason))
		}
		for _, f := range r.Deviations() {
			n.Wrong = append(n.Wrong, fmt.Sprintf("%s: %s is %s, should be %s", r.Step, f.What, f.Is, f.Want))
		}
	}
	for _, l := range d.Limits {
		if !l.OK {
			n.Wrong = append(n.Wrong, fmt.Sprintf("%s is %s, should be %s", l.What, l.Is, l.Want))
		}
	}
	if len(d.Limits) == 0 {
		n.Wrong = append(n.Wrong, "it tells no limits: its program is older than the disc host's")
	}
	for _, a := range d.Alarms {
		n.Wrong = append(n.Wrong, "alarm: "+a)
	}
	if d.Stack != "" {
		n.Wrong = append(n.Wrong, "the messaging service does not answer: "+d.Stack)
	}
	if len(d.Down) > 0 {
		n.Wrong = append(n.Wrong, "it misses "+strings.Join(d.Down, ", ")+" in the cluster")
	}
}

// Judge decides whether the rack has passed, and why not.
func (r *Report) Judge() {
	r.Wrong = []string{}
	say := func(format string, args ...any) { r.Wrong = append(r.Wrong, fmt.Sprintf(format, args...)) }
	for _, n := range r.Nodes {
		for _, w := range n.Wrong {
			say("%s: %s", n.Name, w)
		}
	}
	if !r.Size.Undersized {
		for _, m := range r.Size.Misfits {
			say("%s", m)
		}
	}
	probes := func(results []provision.ProbeResult, when string) {
		if len(results) == 0 {
			say("no probe ran%s", when)
		}
		for _, p := range results {
			if p.Failure != nil {
				say("the probe %s failed%s: %s", Where(p), when, p.Failure.Error())
			}
		}
	}
	probes(r.Probes, "")
	for _, w := range r.Load.Judge(load.Limits{P99: r.Options.P99, Lost: r.Options.Lost}) {
		say("load: %s", w)
	}
	if r.Options.NoFailure || r.Outage == nil {
		if !r.Options.NoFailure {
			say("the failure of a node was not tried")
		}
		r.Passed = len(r.Wrong) == 0
		return
	}
	o := r.Outage
	if o.Failed != "" {
		say("failure of %s: %s", o.Node, o.Failed)
	} else {
		if o.Load.LoggedIn < o.Load.Users {
			say("failure of %s: only %d of %d users were logged in before it", o.Node, o.Load.LoggedIn, o.Load.Users)
		}
		switch {
		case o.Back < 0:
			say("failure of %s: not all users were logged in again when the load ended", o.Node)
		case o.Back > r.Options.Back:
			say("failure of %s: all users were logged in again after %s, the limit is %s", o.Node, Short(o.Back), r.Options.Back)
		}
		for _, w := range o.Ledger.Judge() {
			say("failure of %s: %s", o.Node, w)
		}
		switch {
		case o.Whole < 0:
			say("failure of %s: the cluster was not whole again within %s", o.Node, r.Options.Whole)
		case o.Whole > r.Options.Whole:
			say("failure of %s: the cluster was whole again after %s, the limit is %s", o.Node, Short(o.Whole), r.Options.Whole)
		}
	}
	probes(r.After, " after the failure of "+o.Node)
	r.Passed = len(r.Wrong) == 0
}

// Where names a probe and where it was made.
func Where(p provision.ProbeResult) string {
	if p.To == "" {
		return p.Probe + " on " + p.From
	}
	return p.Probe + " from " + p.From + " to " + p.To
}

// Short rounds a duration for people.
func Short(d time.Duration) string {
	switch {
	case d < 0:
		return "never"
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(100 * time.Millisecond).String()
}
