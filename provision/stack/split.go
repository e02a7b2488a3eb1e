package stack

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"platter/hostprep"
	"platter/provision"
)

// What happens when a member's link goes down while every side runs on, as
// seen with ejabberd 24.12 on Erlang 27:
//
//   - The members of each side see those of the other go (see the template of vm.args for when),
//     each logs that they went (mnesia_down), and each side serves its users.
//   - When the link is back nothing reconnects by itself.
//   - Once anything connects them, Mnesia finds that each has logged the other's
//     end, reports {inconsistent_database, running_partitioned_network, Node}
//     and stays apart, for ever: net_adm:ping says pong, running_db_nodes lists
//     only the own side.
//   - A member whose database restarts loads every table, the session table too,
//     from the members that have it loaded (mnesia_controller: even a table that
//     it may load from its own disk). What was written on its side alone is
//     lost. So mnesia:set_master_nodes is not needed; and it is better left
//     alone: it stays set, and the member would not start without its masters.
//
// So one side has to give way: its members restart ejabberd. They ask each
// other with erl_call, which is no member of the Erlang network. To connect them
// for it would be wrong where only some pairs are cut off from each other:
// Erlang's global would answer by cutting off more of them.

const (
	askLimit    = 3 * time.Second  // for a member's answer
	othersLimit = time.Minute      // for the rest of the side that gives way
	calm        = 30 * time.Minute // after it a new split is met without a pause
	maxPause    = time.Hour        // between two restarts of a member
)

// runs tells whether the member called name serves users.
func (s status) runs(name string) bool {
	return s.up && !s.joining && slices.Contains(s.running, name)
}

// apart lists the members that run in a database of their own, as far as they
// have answered. views are the answers, self's with them. A node that was
// installed anew and is no member yet is not apart.
func apart(self string, views map[string]status) []string {
	me, out := views[self], []string{}
	for name, v := range views {
		if name != self && v.runs(name) && slices.Contains(v.known, self) && !slices.Contains(v.running, self) &&
			me.runs(self) && slices.Contains(me.known, name) && !slices.Contains(me.running, name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// giveWay tells for which side of a split self has to restart: the larger one,
// of two that are equal the one with the member that comes first in order,
// which is the same on every node. It is nil where there is no split, where
// self's side stays, where not all of the other have noticed, and where self does
// not reach all of them: a restart would then split that side.
func giveWay(self string, order []string, views map[string]status) (stays []string) {
	first := func(side []string) string {
		return slices.MinFunc(side, func(a, b string) int { return compare(order, a, b) })
	}
	stays = views[self].running
	for _, name := range apart(self, views) {
		side := views[name].running
		if len(side) > len(stays) || len(side) == len(stays) && compare(order, first(side), first(stays)) < 0 {
			stays = side
		}
	}
	if slices.Contains(stays, self) {
		return nil
	}
	for _, name := range stays {
		v := views[name]
		if !v.runs(name) || !slices.Contains(v.known, self) || slices.Contains(v.running, self) {
			return nil
		}
	}
	return stays
}

// compare sorts by the place in order; what it does not know comes last.
func compare(order []string, a, b string) int {
	place := func(name string) int {
		if i := slices.Index(order, name); i >= 0 {
			return i
		}
		return len(order)
	}
	if d := place(a) - place(b); d != 0 {
		return d
	}
	return strings.Compare(a, b)
}

// temper keeps a member from restarting too early or too often.
type temper struct {
	asked int       // looks in a row in which the member should give way
	tries int       // restarts, since it was calm
	last  time.Time // the end of the last one
}

// due tells, once a look, whether the member should restart now: in the second
// look in a row, since in one it may see a split that is just beginning or
// ending; and not soon after the last restart, twice as late each time, so that
// a link that comes and goes does not keep its users out.
func (t *temper) due(now time.Time, giveWay bool) bool {
	if t.tries > 0 && now.Sub(t.last) >= calm+t.pause() {
		t.tries = 0
	}
	if !giveWay {
		t.asked = 0
		return false
	}
	t.asked++
	return t.asked >= 2 && (t.tries == 0 || now.Sub(t.last) >= t.pause())
}

func (t *temper) pause() time.Duration {
	if t.tries == 0 {
		return 0
	}
	return min(time.Minute<<min(t.tries-1, 10), maxPause)
}

func (t *temper) restarted(now time.Time) { t.asked, t.tries, t.last = 0, t.tries+1, now }

// Watcher looks at the cluster for as long as the node is a member, and heals a
// split.
type Watcher struct {
	plan  provision.Plan
	m     *member
	ask   func(ctx context.Context, node string) (status, error)
	now   func() time.Time
	since map[string]time.Time // members that are missed, and since which look
	temper
}

// NewWatcher is of the node that has the plan.
func NewWatcher(plan provision.Plan) *Watcher {
	return &Watcher{plan: plan, now: time.Now}
}

// Tend looks at the cluster as Look does. Where the cluster is split and
// this member's side is the one to give way, it restarts ejabberd and returns
// when that is a member of the other side; rep hears why. That must not happen
// while Bring runs. A restart that fails is said and comes up again in a later
// look.
func (w *Watcher) Tend(ctx context.Context, rep Progress) (Cluster, error) {
	if w.m == nil {
		m, err := local(w.plan)
		if err != nil {
			return Cluster{}, err
		}
		w.m, w.ask = m, m.other
	}
	st, err := w.m.status(ctx)
	if err != nil {
		return Cluster{}, err
	}
	self, c := w.plan.Node, st.cluster()
	w.miss(c.Down)
	if !st.runs(self) || len(c.Down) == 0 {
		w.due(w.now(), false)
		return c, nil
	}
	views := w.views(ctx, c.Down)
	views[self] = st
	c.Apart = apart(self, views)
	stays := giveWay(self, w.plan.Stack.Members, views)
	if !w.due(w.now(), stays != nil) || ctx.Err() != nil {
		return c, nil
	}
	if err := w.heal(ctx, st, stays, rep); err != nil {
		if ctx.Err() == nil {
			rep.Logf("healing the split: %v", err)
		}
		return c, nil
	}
	if st, err = w.m.status(ctx); err != nil {
		return c, err
	}
	c = st.cluster()
	w.miss(c.Down)
	return c, nil
}

// miss remembers since when members are missed.
func (w *Watcher) miss(down []string) {
	since := map[string]time.Time{}
	for _, name := range down {
		if since[name] = w.since[name]; since[name].IsZero() {
			since[name] = w.now()
		}
	}
	w.since = since
}

// views asks the members with these names, all at once, and returns the answers.
func (w *Watcher) views(ctx context.Context, names []string) map[string]status {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	views := map[string]status{}
	for _, name := range names {
		wg.Go(func() {
			if st, err := w.ask(ctx, name); err == nil {
				mu.Lock()
				views[name] = st
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return views
}

// heal restarts the local member, which has the status st, so that it becomes
// one of those that stay.
func (w *Watcher) heal(ctx context.Context, st status, stays []string, rep Progress) error {
	self := w.plan.Node
	began := w.now()
	for _, name := range stays {
		if t := w.since[name]; !t.IsZero() && t.Before(began) {
			began = t
		}
	}
	rep.Logf("the cluster is split: %s on one side, which stays as it is; %s on the other, which gives way: restarting ejabberd", strings.Join(stays, ", "), strings.Join(st.running, ", "))
	defer func() { w.restarted(w.now()) }()
	if w.m.unit == nil {
		sd, err := hostprep.DialSystemd(ctx)
		if err != nil {
			return err
		}
		defer sd.Close()
		w.m.unit = sd.Unit("ejabberd.service")
		defer func() { w.m.unit = nil }()
	}
	if err := w.m.unit.Stop(ctx); err != nil {
		return err
	}
	// One that started now would connect to those of its old side, too, and
	// join the two into something that is neither.
	others := slices.DeleteFunc(st.others(self), func(n string) bool { return slices.Contains(stays, n) })
	for n, until := 0, w.now().Add(othersLimit); len(others) > 0; n++ {
		still := behind(w.views(ctx, others), stays)
		if len(still) == 0 {
			break
		}
		if w.now().After(until) {
			rep.Logf("%s should give way, too, and still runs; not waiting any longer", strings.Join(still, ", "))
			break
		}
		if err := provision.Sleep(ctx, w.m.pause(n)); err != nil {
			return err // Bring starts it when the agent is back
		}
	}
	if err := w.m.start(ctx, rep); err != nil {
		return err
	}
	for n, until := 0, w.now().Add(othersLimit); ; n++ {
		now, err := w.m.status(ctx)
		if err != nil {
			return err
		}
		if now.runs(self) && !slices.ContainsFunc(stays, func(s string) bool { return !slices.Contains(now.running, s) }) {
			break
		}
		if w.now().After(until) {
			return fmt.Errorf("node %s restarted ejabberd to end a split, but sees only %s run, not all of %s: the agent tries again; see that they reach each other",
				self, strings.Join(now.running, ", "), strings.Join(stays, ", "))
		}
		if err := provision.Sleep(ctx, w.m.pause(n)); err != nil {
			return err
		}
	}
	healed := fmt.Sprintf("split healed: %s had been apart from %s for %s, restarted ejabberd", self, strings.Join(stays, ", "), w.now().Sub(began).Round(time.Second))
	rep.Logf("%s", healed)
	rep.Facts(map[string]string{"split_healed": healed})
	return nil
}

// behind lists those that run in another database than the members that stay.
func behind(views map[string]status, stays []string) []string {
	var out []string
	for name, v := range views {
		if slices.Contains(v.running, name) && !slices.ContainsFunc(stays, func(s string) bool { return slices.Contains(v.running, s) }) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}
