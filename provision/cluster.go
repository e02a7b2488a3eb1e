package provision

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// SilentAfter is how long a node may say nothing before people should know:
// agents speak every 15 seconds.
const SilentAfter = time.Minute

// Cluster is the IM cluster as its members see it.
type Cluster struct {
	Whole   bool     `json:"whole"`
	Members []Member `json:"members"` // the nodes of the rack, in its order
	// Split names the sides of a cluster that is split: members that run, but do
	// not see those of the other sides run.
	Split [][]string `json:"split,omitempty"`
	Wrong []string   `json:"wrong"` // why it is not whole, a sentence each
}

// Member is what one node sees of the cluster. A node that is no member, or
// that has gone silent, sees nothing that counts.
type Member struct {
	Node     string    `json:"node"`
	Stage    Stage     `json:"stage"`
	Sees     []string  `json:"sees"`   // members that run, as this node sees it
	Misses   []Missing `json:"misses"` // members that do not
	LastSeen time.Time `json:"last_seen,omitzero"`
	// Release of the stack that the node runs: a digest, or Installed; empty: it
	// has not said.
	Release string `json:"release,omitempty"`
}

// Missing is a member that others miss.
type Missing struct {
	Node  string    `json:"node"`
	Since time.Time `json:"since,omitzero"` // by the disc host's clock
}

// ClusterOf puts together what the nodes have said. states are all nodes and
// machines; only those of the rack count.
func ClusterOf(states []State, now time.Time) Cluster {
	c := Cluster{Members: []Member{}, Wrong: []string{}}
	wrong := func(format string, args ...any) { c.Wrong = append(c.Wrong, fmt.Sprintf(format, args...)) }
	ago := func(t time.Time) string {
		return fmt.Sprintf("%s (%s ago)", t.Local().Format("2006-01-02 15:04:05"), now.Sub(t).Round(time.Second))
	}
	states = slices.DeleteFunc(slices.Clone(states), func(s State) bool { return !s.Known })
	var rack []string
	for _, s := range states {
		rack = append(rack, s.Name)
	}
	missed := map[string][]string{}    // node -> who misses it
	first := map[string]time.Time{}    // node -> since when
	strangers := map[string][]string{} // name -> who knows it
	for _, s := range states {
		m := Member{Node: s.Name, Stage: s.Stage, Sees: []string{}, Misses: []Missing{}, LastSeen: s.LastSeen, Release: s.Facts[FactRelease]}
		switch {
		case s.Stage == StageFailed && s.Failure != nil:
			wrong("%s has failed: %s", s.Name, s.Failure.Error())
		case s.Stage == StageOff:
			wrong("%s has never been seen. Boot it from the network", s.Name)
		case now.Sub(s.LastSeen) > SilentAfter:
			wrong("%s has said nothing since %s; it was %s then. See that it is on and reaches the disc host", s.Name, ago(s.LastSeen), s.Stage)
		case s.Stage == StageProbing:
			wrong("%s is a member, but no message has passed there yet. See 'platter node log %s'", s.Name, s.Name)
		case s.Stage != StageReady:
			wrong("%s is not a member yet: it is %s. See 'platter watch'", s.Name, s.Stage)
		}
		if t := s.Trouble(now); t != "" {
			wrong("%s has trouble: %s", s.Name, t)
		}
		if (s.Stage == StageReady || s.Stage == StageProbing) && now.Sub(s.LastSeen) <= SilentAfter {
			m.Sees = names(s.Facts[FactRunning])
			for _, o := range names(s.Facts[FactDown]) {
				m.Misses = append(m.Misses, Missing{o, s.DownSince[o]})
			}
			for _, o := range rack {
				if !slices.Contains(m.Sees, o) && !slices.ContainsFunc(m.Misses, func(x Missing) bool { return x.Node == o }) {
					m.Misses = append(m.Misses, Missing{Node: o})
				}
			}
			for _, o := range m.Sees {
				if !slices.Contains(rack, o) {
					strangers[o] = append(strangers[o], s.Name)
				}
			}
			for _, o := range m.Misses {
				missed[o.Node] = append(missed[o.Node], s.Name)
				if t := first[o.Node]; !o.Since.IsZero() && (t.IsZero() || o.Since.Before(t)) {
					first[o.Node] = o.Since
				}
			}
		}
		c.Members = append(c.Members, m)
	}
	apart := map[string]bool{}
	if c.Split = sides(c.Members); c.Split != nil {
		var text []string
		for _, side := range c.Split {
			text = append(text, strings.Join(side, ", "))
			for _, name := range side {
				apart[name] = true
			}
		}
		wrong("the cluster is split: %s run apart from each other. Look at the network between them; once they reach each other the cluster is whole again by itself within minutes", strings.Join(text, " / "))
	}
	for _, name := range slices.Concat(rack, others(missed, rack)) {
		if apart[name] {
			continue // said above
		}
		by := strings.Join(missed[name], ", ")
		switch t := first[name]; {
		case by == "":
		case !slices.Contains(rack, name):
			wrong("%s is in no rack file, but %s waits for it in the cluster. If it is gone for good, run 'platter stack remove %s'", name, by, name)
		case t.IsZero() && slices.ContainsFunc(c.Wrong, func(line string) bool { return strings.HasPrefix(line, name+" ") }):
			// Why was said above.
		case t.IsZero():
			wrong("%s is not in the cluster that %s sees", name, by)
		default:
			wrong("%s does not run since %s, as %s sees it. Look at 'systemctl status ejabberd' on %s", name, ago(t), by, name)
		}
	}
	for _, name := range others(strangers, rack) {
		wrong("%s is in no rack file, but %s has it in the cluster", name, strings.Join(strangers[name], ", "))
	}
	c.Whole = len(c.Wrong) == 0 && len(c.Members) > 0
	return c
}

// Trouble is what the node last said that keeps its part of the service from
// working; empty where it is silent or being installed.
func (s State) Trouble(now time.Time) string {
	switch s.Stage {
	case StagePreparing, StageJoining, StageProbing, StageReady, StageFailed:
		if now.Sub(s.LastSeen) <= SilentAfter {
			return s.Facts[FactTrouble]
		}
	}
	return ""
}

// sides are the members by whom they see run, if any two that run are known to
// miss each other.
func sides(members []Member) [][]string {
	seen := map[string]Member{}
	for _, m := range members {
		seen[m.Node] = m
	}
	misses := func(m, o Member) bool {
		return slices.Contains(m.Sees, m.Node) && slices.ContainsFunc(m.Misses, func(x Missing) bool { return x.Node == o.Node && !x.Since.IsZero() })
	}
	var out [][]string
	for _, m := range members {
		split := slices.ContainsFunc(members, func(o Member) bool { return misses(m, o) && misses(o, m) })
		if !split {
			continue
		}
		mine := slices.IndexFunc(out, func(side []string) bool { return slices.Equal(seen[side[0]].Sees, m.Sees) })
		if mine < 0 {
			out = append(out, []string{m.Node})
		} else {
			out[mine] = append(out[mine], m.Node)
		}
	}
	return out
}

// others are the keys of m that are not in rack, sorted.
func others(m map[string][]string, rack []string) []string {
	var out []string
	for k := range m {
		if !slices.Contains(rack, k) {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out
}

// names reads a fact that lists nodes.
func names(fact string) []string {
	if fact == "" {
		return []string{}
	}
	return strings.Split(fact, ",")
}

// ProbeResult is what one probe of the IM service found.
type ProbeResult struct {
	Probe  string `json:"probe"`
	From   string `json:"from"`                   // node
	To     string `json:"to,omitempty"`           // node; empty where a probe needs only one
	Micros int64  `json:"microseconds,omitempty"` // how long the thing took
	// Failure says why it did not work.
	Failure *Failure `json:"failure,omitempty"`
}
