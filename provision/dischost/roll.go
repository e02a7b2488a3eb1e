package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"platter/provision"
	"platter/provision/client"
)

// Limits of a roll. A node that takes longer counts as lost.
const (
	rollAsks    = 2 * time.Minute // until a node asks for its order
	rollSwitch  = 2 * time.Hour   // of one node
	rollProving = 5 * time.Minute // until a node that was switched works
	rollWhole   = time.Minute     // for a cluster that is not whole, before a roll is refused
)

// startRoll decides which nodes go to which release, and has roll carry it out.
func (h *Host) startRoll(w http.ResponseWriter, r *http.Request) (any, error) {
	roll, err := h.newRoll(w, r)
	if err != nil {
		return nil, err
	}
	h.rolling.Lock()
	defer h.rolling.Unlock()
	if last, _ := h.Store.Roll(); last != nil && !last.Ended {
		return nil, noRoll("See 'platter stack upgrade --watch'.", "a roll to another release is under way")
	}
	roll.Started = h.Clock().UTC().Round(0)
	return roll, h.Store.KeepRoll(r.Context(), &roll)
}

func noRoll(next, format string, args ...any) error {
	return &client.Error{Status: http.StatusConflict, Code: client.CodeNoRoll, Message: fmt.Sprintf(format, args...), Next: next}
}

func (h *Host) newRoll(w http.ResponseWriter, r *http.Request) (provision.Roll, error) {
	var ask provision.RollRequest
	if err := decode(w, r, 4<<10, &ask); err != nil {
		return provision.Roll{}, err
	}
	cluster := provision.ClusterOf(h.Store.Nodes(), h.Clock())
	// What the nodes see of each other they say now and then only.
	for end := time.Now().Add(h.whole); !cluster.Whole && time.Now().Before(end) && r.Context().Err() == nil; {
		provision.Sleep(r.Context(), 500*time.Millisecond)
		cluster = provision.ClusterOf(h.Store.Nodes(), h.Clock())
	}
	if !cluster.Whole {
		return provision.Roll{}, noRoll("Put that right first: a node that is switched has to leave others who serve.",
			"the cluster is not whole: %s", strings.Join(cluster.Wrong, "; "))
	}
	have := map[string]provision.NodeReleases{}
	for name, o := range h.askAll(r.Context(), provision.OrderReleases, func(string) any { return nil }) {
		var found provision.NodeReleases
		if o.Failure != nil {
			return provision.Roll{}, noRoll(o.Failure.Next, "%s does not say which releases it has: %s", name, o.Failure.Message)
		}
		if err := json.Unmarshal(o.Result, &found); err != nil {
			return provision.Roll{}, noRoll("", "what %s says of its releases cannot be read: %v", name, err)
		}
		have[name] = found
	}
	if err := r.Context().Err(); err != nil {
		return provision.Roll{}, err
	}
	roll, err := provision.NewRoll(h.Rack.Nodes, h.Rack.Stack.Optional, have, ask)
	if err != nil {
		return roll, noRoll("", "%v", err)
	}
	return roll, nil
}

// planRoll asks every node of a roll what it would change.
func (h *Host) planRoll(w http.ResponseWriter, r *http.Request) (any, error) {
	roll, err := h.newRoll(w, r)
	if err != nil {
		return nil, err
	}
	args := map[string]provision.SwitchArgs{}
	for i, n := range roll.Nodes {
		a := roll.Args(i)
		a.DryRun = true
		args[n.Name] = a
	}
	answers := h.askAll(r.Context(), provision.OrderSwitch, func(node string) any {
		if a, ok := args[node]; ok {
			return a
		}
		return nil
	})
	out := []provision.RollPlan{}
	for _, n := range roll.Nodes {
		p := provision.RollPlan{Node: n.Name, Failure: answers[n.Name].Failure}
		if p.Failure == nil {
			if err := json.Unmarshal(answers[n.Name].Result, &p.SwitchResult); err != nil {
				return nil, noRoll("", "what %s says of the switch cannot be read: %v", n.Name, err)
			}
		}
		out = append(out, p)
	}
	return out, r.Context().Err()
}

// askAll gives every node of the rack an order of a kind that changes nothing,
// and returns them ended, by node. OrderSwitch goes only to nodes with args.
// One that was withdrawn has a failure too.
func (h *Host) askAll(ctx context.Context, kind provision.OrderKind, args func(node string) any) map[string]provision.OrderStatus {
	var mu sync.Mutex
	var asking sync.WaitGroup
	out := map[string]provision.OrderStatus{}
	for _, n := range h.Rack.Nodes {
		a := args(n.Name)
		if kind == provision.OrderSwitch && a == nil {
			continue
		}
		asking.Go(func() {
			var o provision.OrderStatus
			id, err := h.Order(ctx, n.Name, kind, a, rollAsks)
			if err == nil {
				o, err = h.Await(ctx, id)
			}
			switch {
			case err != nil:
				o.Failure = &provision.Failure{Code: "order", Message: err.Error()}
			case o.State == provision.OrderWithdrawn:
				o.Failure = &provision.Failure{Code: "order", Message: o.Why, Next: "See 'platter node show " + n.Name + "'"}
			}
			mu.Lock()
			defer mu.Unlock()
			out[n.Name] = o
		})
	}
	asking.Wait()
	return out
}

// followRoll answers with a line of JSON whenever the last roll changes; the last
// line has ended.
func (h *Host) followRoll(w http.ResponseWriter, r *http.Request) (any, error) {
	if roll, _ := h.Store.Roll(); roll == nil {
		return nil, &client.Error{Status: http.StatusNotFound, Code: client.CodeNoRoll, Message: "this rack was never taken to another release"}
	}
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Cache-Control", "no-store")
	out, lines := http.NewResponseController(w), json.NewEncoder(w)
	defer out.SetWriteDeadline(time.Time{})
	alive := time.NewTicker(h.heartbeat)
	defer alive.Stop()
	for {
		roll, changed := h.Store.Roll()
		var said <-chan struct{}
		if i, on := roll.Next(); on && roll.Nodes[i].Order != 0 {
			var o provision.OrderStatus
			o, _, said = h.Store.FindOrder(roll.Nodes[i].Order)
			roll.Line = o.Line
		}
		out.SetWriteDeadline(time.Now().Add(slowReader))
		if lines.Encode(roll) != nil || out.Flush() != nil {
			panic(http.ErrAbortHandler) // else it would look as if this were all
		}
		if roll.Ended {
			return nil, nil
		}
		select {
		case <-changed:
		case <-said:
		case <-alive.C:
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
}

// roll carries rolls on, also one that an earlier disc host began, until ctx
// ends. Each step is kept before the next one.
func (h *Host) roll(ctx context.Context) {
	for ctx.Err() == nil {
		r, changed := h.Store.Roll()
		if r == nil || r.Ended {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		err := h.rollStep(ctx, r)
		if err == nil {
			err = h.Store.KeepRoll(ctx, r)
		}
		if err != nil && ctx.Err() == nil {
			h.Log.Error("the roll to another release stands still", "roll", r.ID, "err", err)
			provision.Sleep(ctx, 5*time.Second)
		}
	}
}

// rollStep does what is next and changes r accordingly. Its error is one of the
// disc host: the step is tried again.
func (h *Host) rollStep(ctx context.Context, r *provision.Roll) error {
	i, on := r.Next()
	if !on {
		r.Ended = true
		h.Log.Info("the roll to another release has ended", "roll", r.ID, "failure", r.Failure)
		return nil
	}
	n := &r.Nodes[i]
	fail := func(f *provision.Failure) {
		if r.Failure == nil {
			r.Failure = f
		}
		h.Log.Error("the roll to another release fails", "roll", r.ID, "node", n.Name, "failure", f)
	}
	switch n.State {
	case provision.RollSwitching, provision.RollReturning:
		return h.rollAwait(ctx, n, fail)
	case provision.RollProbing:
		if r.Failure == nil {
			switch f := h.rollProbe(ctx, n.Name); {
			case ctx.Err() != nil:
				return ctx.Err()
			case f != nil:
				fail(f)
			default:
				n.State = provision.RollDone
			}
			return nil
		}
	}
	// It gets its order: here, or back.
	id, err := h.Order(ctx, n.Name, provision.OrderSwitch, r.Args(i), rollAsks)
	var refused *client.Error
	switch {
	case errors.As(err, &refused) && refused.Status < 500:
		f := &provision.Failure{Code: "roll-order", Message: fmt.Sprintf("node %s takes no order to switch: %s", n.Name, refused.Message), Next: refused.Next}
		if r.Failure == nil {
			n.State = provision.RollKept
		} else {
			n.State = provision.RollLost
		}
		fail(f)
		return nil
	case err != nil:
		return err
	}
	h.Log.Info("a node goes to another release", "roll", r.ID, "node", n.Name, "back", r.Failure != nil, "order", id)
	n.Order, n.State = id, provision.RollSwitching
	if r.Failure != nil {
		n.State = provision.RollReturning
	}
	return nil
}

// rollAwait waits for the end of the node's order.
func (h *Host) rollAwait(ctx context.Context, n *provision.RollNode, fail func(*provision.Failure)) error {
	limited, cancel := context.WithTimeout(ctx, h.switching)
	defer cancel()
	o, err := h.Await(limited, n.Order)
	back := n.State == provision.RollReturning
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		n.State = provision.RollLost
		fail(&provision.Failure{Code: "roll-silent", Message: fmt.Sprintf("node %s does not say within %s how its switch ended: %v", n.Name, h.switching, err),
			Next: fmt.Sprintf("See 'platter node show %s'. It may still get there by itself once it is on again: then bring all nodes to one release with 'platter stack upgrade VERSION', or reinstall it", n.Name)})
	case o.State == provision.OrderDone && back:
		n.State = provision.RollReturned
		if f := h.rollProbe(ctx, n.Name); f != nil { // the next one waits until this one serves again
			h.Log.Error("a node that went back does not work", "node", n.Name, "failure", f)
		}
		return ctx.Err()
	case o.State == provision.OrderDone:
		n.State = provision.RollProbing
	case o.State == provision.OrderFailed:
		n.State = provision.RollKept
		if back {
			n.State = provision.RollLost
		}
		fail(o.Failure)
	default: // withdrawn
		n.State = provision.RollKept
		if back {
			n.State = provision.RollLost
		}
		fail(&provision.Failure{Code: "roll-order", Message: fmt.Sprintf("node %s was not switched: %s", n.Name, o.Why), Next: fmt.Sprintf("See 'platter node show %s'", n.Name)})
	}
	return nil
}

// rollProbe waits until the node is ready and every probe passes between it and
// a neighbour; nil: they do.
func (h *Host) rollProbe(ctx context.Context, name string) *provision.Failure {
	limited, cancel := context.WithTimeout(ctx, h.proving)
	defer cancel()
	last := &provision.Failure{Code: "roll-probe", Message: fmt.Sprintf("node %s is not ready", name), Next: fmt.Sprintf("See 'platter node show %s'", name)}
	for limited.Err() == nil {
		states := h.rackStates()
		nodes := []provision.State{}
		for i, s := range states {
			if s.Name != name {
				continue
			}
			nodes = append(nodes, s)
			if partner := states[(i+1)%len(states)]; partner.Name != name {
				nodes = append(nodes, partner)
			}
		}
		if len(nodes) > 0 && nodes[0].Stage == provision.StageReady {
			var wrong *provision.Failure
			h.probing.Lock()
			h.probeAll(limited, nodes, func(r provision.ProbeResult) {
				if wrong == nil {
					wrong = r.Failure
				}
			})
			h.probing.Unlock()
			if wrong == nil && limited.Err() == nil {
				return nil
			}
			if wrong != nil {
				last = wrong
			}
		}
		provision.Sleep(limited, 500*time.Millisecond)
	}
	return &provision.Failure{Code: "roll-probe", Next: last.Next,
		Message: fmt.Sprintf("node %s runs the release and does not work within %s: %s", name, h.proving, last.Message)}
}
