package provision

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Roll takes the nodes of a rack to another release, one after the other, and
// those that are there back where one of them does not get there. It is kept
// before each of its steps.
type Roll struct {
	ID       int64  `json:"id"`
	To       string `json:"to"`                // a release's digest, or Installed
	Version  string `json:"version,omitempty"` // of To
	Rollback bool   `json:"rollback,omitempty"`
	// NoWayBack and Patience are those of SwitchArgs.
	NoWayBack bool `json:"no_way_back,omitempty"`
	Patience  int  `json:"patience,omitempty"`
	// Members are the nodes of each component, by release.
	Members map[string]map[string][]string `json:"members"`
	Nodes   []RollNode                     `json:"nodes"` // in their order
	// Failure turns the roll round.
	Failure *Failure  `json:"failure,omitempty"`
	Ended   bool      `json:"ended,omitempty"`
	Started time.Time `json:"started"`
	// Line says what is going on; it is not kept.
	Line string `json:"line,omitempty"`
}

// RollNode is a node of a roll.
type RollNode struct {
	Name  string    `json:"name"`
	From  string    `json:"from"` // as Roll.To
	State RollState `json:"state"`
	Once  []string  `json:"once,omitempty"`  // see SwitchArgs
	Order int64     `json:"order,omitempty"` // the last that it was given
}

// RollState is where a node is in a roll.
type RollState string

const (
	RollWaiting   RollState = "waiting"   // for its turn
	RollSwitching RollState = "switching" // it has its order
	RollProbing   RollState = "probing"   // it runs the release, and has to show that it works
	RollDone      RollState = "done"
	RollKept      RollState = "kept"      // it did not get there: it runs what it ran
	RollReturning RollState = "returning" // it has the order to go back
	RollReturned  RollState = "returned"
	RollLost      RollState = "lost" // nobody knows, or it could not go back
)

// Next is the index of the node whose turn it is; false: the roll has ended.
func (r *Roll) Next() (int, bool) {
	mine := []RollState{RollWaiting, RollSwitching, RollProbing}
	if r.Failure != nil {
		mine = []RollState{RollSwitching, RollProbing, RollDone, RollReturning}
	}
	var todo []int
	for i, n := range r.Nodes {
		if slices.Contains(mine, n.State) {
			todo = append(todo, i)
		}
	}
	switch {
	case len(todo) == 0:
		return 0, false
	case r.Failure != nil:
		return todo[len(todo)-1], true
	}
	return todo[0], true
}

// Args are those of the order that node i gets now: to the release or, once the
// roll has failed, back.
func (r *Roll) Args(i int) SwitchArgs {
	n := r.Nodes[i]
	to, rollback := r.To, r.Rollback
	if r.Failure != nil {
		to, rollback = n.From, !rollback
	}
	return SwitchArgs{To: to, Members: r.Members[to], Once: n.Once, Rollback: rollback, NoWayBack: r.NoWayBack, Patience: r.Patience}
}

// RollRequest says what a roll is to do.
type RollRequest struct {
	// Release is a version or the beginning of a digest; empty: the only one that
	// every node has staged and not all run.
	Release   string `json:"release,omitempty"`
	Rollback  bool   `json:"rollback,omitempty"` // to the release before, whatever Release says
	NoWayBack bool   `json:"no_way_back,omitempty"`
	Patience  int    `json:"patience,omitempty"` // see SwitchArgs
}

// NewRoll decides which nodes go to which release, and in which order: that of
// the rack file, the one whose database takes the writes last. have is what each
// of the nodes has; enabled are the optional components that the rack file wants.
func NewRoll(nodes []Node, enabled []string, have map[string]NodeReleases, ask RollRequest) (Roll, error) {
	r := Roll{Rollback: ask.Rollback, NoWayBack: ask.NoWayBack, Patience: ask.Patience, Members: map[string]map[string][]string{}}
	var err error
	if ask.Rollback {
		r.To, err = before(nodes, have)
	} else {
		r.To, err = wanted(nodes, have, ask.Release)
	}
	if err != nil {
		return r, err
	}
	var last []RollNode
	releases := []string{r.To}
	for _, n := range nodes {
		h := have[n.Name]
		switch {
		case h.Current == r.To:
			continue
		case h.Primary:
			last = append(last, RollNode{Name: n.Name, From: h.Current, State: RollWaiting})
		default:
			r.Nodes = append(r.Nodes, RollNode{Name: n.Name, From: h.Current, State: RollWaiting})
		}
		releases = append(releases, h.Current)
	}
	r.Nodes = append(r.Nodes, last...)
	if len(r.Nodes) == 0 {
		return r, fmt.Errorf("every node runs %s already", r.name(r.To, have))
	}
	for _, digest := range releases {
		if digest == Installed || r.Members[digest] != nil {
			continue
		}
		s, ok := find(have, digest)
		if !ok {
			if digest != r.To && ask.NoWayBack {
				continue
			}
			return r, fmt.Errorf("no node has release %.12s on its disk: run 'platter stack stage'", digest)
		}
		placed, err := s.Stack.Place(nodes, enabled)
		if err != nil {
			return r, fmt.Errorf("release %s: %w", s.Version, err)
		}
		r.Members[digest] = map[string][]string{}
		for _, c := range placed {
			r.Members[digest][c.Name] = c.Members
		}
		if digest == r.To {
			r.Version = s.Version
		}
	}
	// Commands are those of the newer of the two.
	done := map[string]bool{}
	for i, n := range r.Nodes {
		of := r.Members[r.To]
		if r.Rollback {
			of = r.Members[n.From]
		}
		for _, c := range slices.Sorted(maps.Keys(of)) {
			if slices.Contains(of[c], n.Name) && !done[c] {
				done[c] = true
				r.Nodes[i].Once = append(r.Nodes[i].Once, c)
			}
		}
	}
	return r, nil
}

func (r *Roll) name(digest string, have map[string]NodeReleases) string {
	if s, ok := find(have, digest); ok {
		return "release " + s.Version
	}
	return "what the install brought"
}

func find(have map[string]NodeReleases, digest string) (NodeRelease, bool) {
	for _, name := range slices.Sorted(maps.Keys(have)) {
		for _, s := range have[name].Staged {
			if s.Digest == digest {
				return s, true
			}
		}
	}
	return NodeRelease{}, false
}

// before is the release that all nodes ran before the one that they run.
func before(nodes []Node, have map[string]NodeReleases) (string, error) {
	first := have[nodes[0].Name]
	for _, n := range nodes {
		h := have[n.Name]
		switch {
		case h.Current != first.Current || h.Current != Installed && h.Previous != first.Previous:
			return "", fmt.Errorf("%s and %s do not run the same release, or did not before: bring them to one with 'platter stack upgrade VERSION'", nodes[0].Name, n.Name)
		case h.Current == Installed:
			return "", fmt.Errorf("%s runs what the install brought: there is nothing to go back to", n.Name)
		}
	}
	return first.Previous, nil
}

// wanted is the release that is meant, which every node has to have.
func wanted(nodes []Node, have map[string]NodeReleases, release string) (string, error) {
	all := map[string]string{} // versions by digest
	for _, h := range have {
		for _, s := range h.Staged {
			all[s.Digest] = s.Version
		}
	}
	var found, versions []string
	for _, digest := range slices.Sorted(maps.Keys(all)) {
		versions = append(versions, fmt.Sprintf("%s (%.12s)", all[digest], digest))
		run := func(n Node) bool { return have[n.Name].Current == digest }
		switch {
		case release == "" && slices.ContainsFunc(nodes, func(n Node) bool { return !run(n) }),
			release != "" && (all[digest] == release || len(release) >= 8 && strings.HasPrefix(digest, release)):
			found = append(found, digest)
		}
	}
	switch {
	case len(all) == 0:
		return "", errors.New("no node has a release on its disk: run 'platter stack stage'")
	case len(found) == 0 && release == "":
		return "", errors.New("every node runs the only release that is staged")
	case len(found) == 0:
		return "", fmt.Errorf("no node has release %s on its disk, only %s: run 'platter stack stage'", release, strings.Join(versions, ", "))
	case len(found) > 1:
		return "", fmt.Errorf("name one of the releases that are staged: %s", strings.Join(versions, ", "))
	}
	var without []string
	for _, n := range nodes {
		if !slices.ContainsFunc(have[n.Name].Staged, func(s NodeRelease) bool { return s.Digest == found[0] }) {
			without = append(without, n.Name)
		}
	}
	if len(without) > 0 {
		return "", fmt.Errorf("release %s is not on the disk of %s: run 'platter stack stage'", all[found[0]], strings.Join(without, ", "))
	}
	return found[0], nil
}

// RollPlan is what a roll would change on one node.
type RollPlan struct {
	Node string `json:"node"`
	SwitchResult
	Failure *Failure `json:"failure,omitempty"` // the node refuses
}
