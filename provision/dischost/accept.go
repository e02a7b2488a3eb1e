package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"aead.dev/minisign"

	"platter/provision"
	"platter/provision/accept"
	"platter/provision/client"
	"platter/provision/stack/load"
	"platter/provision/stack/probe"
)

const (
	// askWithin is how long a node has to ask for an order of an acceptance.
	askWithin = 2 * time.Minute
	// recovery is how long users go on after a failed node's service was started
	// again.
	recovery = 30 * time.Second
	// cleanWithin bounds the removal of accounts when nobody waits for it any more.
	cleanWithin = time.Hour
)

// wholeWithin is for how long a cluster that is about to be whole is waited for.
var wholeWithin = 40 * time.Second

// acceptStack tests the whole rack and answers with lines of JSON: what is going
// on, and in the last one the report. Whoever goes away ends it; the accounts of
// simulated users are removed in any case.
func (h *Host) acceptStack(w http.ResponseWriter, r *http.Request) (any, error) {
	var o accept.Options
	if err := decode(w, r, 4<<10, &o); err != nil {
		return nil, err
	}
	o = o.WithDefaults(h.Rack)
	if wrong := o.Check(h.Rack); len(wrong) > 0 {
		return nil, bad("%s", strings.Join(wrong, "; "))
	}
	// Agents say every 15 s what they see.
	soon, cancel := context.WithTimeout(r.Context(), wholeWithin)
	defer cancel()
	if !h.awaitCluster(soon, func() bool { return true }) {
		c := provision.ClusterOf(h.rackStates(), h.Clock())
		return nil, &client.Error{Status: http.StatusConflict, Code: client.CodeNotWhole,
			Message: "the cluster is not whole: " + strings.Join(c.Wrong, "; "), Next: "An acceptance needs all nodes: see 'platter stack status'."}
	}
	if !h.probing.TryLock() {
		return nil, &client.Error{Status: http.StatusConflict, Code: client.CodeProbing,
			Message: "probes or an acceptance run already for another operator", Next: "Wait until they are done."}
	}
	defer h.probing.Unlock()
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Cache-Control", "no-store")
	out, lines := http.NewResponseController(w), json.NewEncoder(w)
	out.Flush()
	ctx, gone := context.WithCancel(r.Context())
	defer gone()
	var mu sync.Mutex
	a := &acceptance{Host: h, report: accept.Report{Options: o}, say: func(n client.AcceptNews) {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() == nil && (lines.Encode(n) != nil || out.Flush() != nil) {
			gone()
		}
	}}
	// A line now and then is a sign of life.
	over := make(chan struct{})
	var alive sync.WaitGroup
	alive.Go(func() {
		for tick := time.NewTicker(h.heartbeat); ; {
			select {
			case <-tick.C:
				a.say(client.AcceptNews{})
			case <-over:
				tick.Stop()
				return
			}
		}
	})
	err := a.run(ctx)
	close(over)
	alive.Wait()
	if ctx.Err() != nil {
		panic(http.ErrAbortHandler) // else it would look as if this were all
	}
	if err == nil {
		var last client.AcceptNews
		if last, err = a.signed(); err == nil {
			a.say(last)
			return nil, nil
		}
	}
	h.Log.Error("acceptance", "err", err)
	a.say(client.AcceptNews{Failed: err.Error()})
	return nil, nil
}

// acceptance is one that is under way.
type acceptance struct {
	*Host
	report accept.Report
	say    func(client.AcceptNews)
}

func (a *acceptance) line(step, format string, args ...any) {
	a.say(client.AcceptNews{Step: step, Line: fmt.Sprintf(format, args...)})
}

// run fills the report. Its error means that the test could not be carried out;
// what is found wrong is in the report.
func (a *acceptance) run(ctx context.Context) error {
	r := &a.report
	r.Rack, r.Domain, r.Image, r.Program, r.Began = a.Rack.Name, a.Rack.Stack.Domain, a.Rack.Image, a.Version, a.Clock()
	for _, c := range a.Rack.Stack.Components {
		r.Components = append(r.Components, accept.Component{Name: c.Name, About: c.About, Nodes: c.Members})
	}
	if err := a.nodes(ctx); err != nil {
		return err
	}
	a.line("probes", "on every node")
	r.Probes = a.probes(ctx)

	// Besides the crowd, two for every node that write what is to be kept.
	keepers := 2 * len(a.Rack.Nodes)
	if r.Options.NoFailure {
		keepers = 0
	}
	defer a.clean(ctx)
	if err := a.accounts(ctx, r.Options.Users+keepers); err != nil {
		return err
	}
	accounts := provision.LoadAccounts(r.Options.Users+keepers, []byte(a.Site.LoadSecret()))
	crowd, kept := accounts[:r.Options.Users], accounts[r.Options.Users:]
	var err error
	a.line("load", "%d users, a message every %s for %s", r.Options.Users, r.Options.Every, r.Options.For)
	if r.Load, err = load.Run(ctx, a.options(crowd, r.Options.Every, r.Options.For), a.progress("load", nil)); err != nil {
		return err
	}
	a.line("load", "message %s; %d of %d lost", r.Load.Latency, r.Load.Lost, r.Load.Sent)
	if !r.Options.NoFailure {
		if err := a.outage(ctx, crowd, kept); err != nil {
			return err
		}
		a.line("probes", "after the failure")
		r.After = a.probes(ctx)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	r.Ended = a.Clock()
	r.Judge()
	return nil
}

// signed is the last line: the report for people and for programs.
func (a *acceptance) signed() (client.AcceptNews, error) {
	key, err := a.Site.SigningKey()
	if err != nil {
		return client.AcceptNews{}, err
	}
	public, err := a.signingKey()
	if err != nil {
		return client.AcceptNews{}, err
	}
	n := client.AcceptNews{Name: a.report.Name(), Passed: a.report.Passed, Wrong: a.report.Wrong}
	if n.HTML, err = a.report.HTML(public); err != nil {
		return n, err
	}
	n.Signature = accept.Sign(key, n.HTML, n.Name)
	n.Report, err = json.Marshal(a.report)
	return n, err
}

// nodes has every node check itself, all at the same time.
func (a *acceptance) nodes(ctx context.Context) error {
	states := a.rackStates()
	r := &a.report
	r.Nodes = make([]accept.Node, len(states))
	var running sync.WaitGroup
	var histories [][]provision.Event
	var generations []int
	machines := make([]provision.Machine, len(states))
	for i, s := range states {
		n := &r.Nodes[i]
		*n = accept.Node{Name: s.Name, Slot: s.Slot, Address: s.Address, Facts: s.Facts}
		events, err := a.history(ctx, s.Name)
		if err != nil {
			return err
		}
		n.Clocks = accept.ClocksOf([]int{s.Installed}, events)
		histories, generations = append(histories, events), append(generations, s.Installed)
		running.Go(func() {
			a.line("nodes", "%s checks itself", s.Name)
			var d provision.Diagnosis
			if err := a.ordered(ctx, s.Name, provision.OrderDiagnose, nil, &d, nil); err != nil {
				n.Wrong = append(n.Wrong, "it could not check itself: "+err.Error())
				return
			}
			n.Take(d)
			machines[i] = d.Machine
			machines[i].Node = s.Name
		})
	}
	running.Wait()
	r.Clocks = accept.ClocksOf(generations, histories...)
	r.Size.Sizing = provision.SizingFor(a.Rack.Stack.Users, len(states))
	for _, m := range machines {
		if m.Node != "" {
			r.Size.Machines = append(r.Size.Machines, m)
		}
	}
	r.Size.Misfits = r.Size.Sizing.Misfits(r.Size.Machines)
	r.Size.Undersized = a.Rack.Stack.Undersized
	return ctx.Err()
}

// history is a node's whole journal.
func (a *acceptance) history(ctx context.Context, node string) (all []provision.Event, err error) {
	for after := int64(0); ; after = all[len(all)-1].ID {
		part, err := a.Store.Events(ctx, node, after, 1000)
		if err != nil || len(part) == 0 {
			return all, err
		}
		all = append(all, part...)
	}
}

func (a *acceptance) probes(ctx context.Context) []provision.ProbeResult {
	out := []provision.ProbeResult{}
	a.probeAll(ctx, a.rackStates(), func(p provision.ProbeResult) {
		out = append(out, p)
		if p.Failure != nil {
			a.line("probes", "%s FAILED: %s", accept.Where(p), p.Failure.Error())
		}
	})
	return out
}

// accounts makes those of simulated users, after all that an earlier run may
// have left were removed.
func (a *acceptance) accounts(ctx context.Context, users int) error {
	for _, n := range []int{0, users} {
		if err := a.anyone(ctx, provision.LoadAccountsArgs{Users: n}); err != nil {
			return err
		}
	}
	return nil
}

// clean removes the accounts, also when ctx has ended.
func (a *acceptance) clean(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanWithin)
	defer cancel()
	if err := a.anyone(ctx, provision.LoadAccountsArgs{}); err != nil {
		a.Log.Error("accounts of simulated users are left; the next acceptance removes them", "err", err)
		a.line("accounts", "not removed, the next acceptance does it: %v", err)
	}
}

// anyone has one of the nodes make or remove accounts: the first that can.
func (a *acceptance) anyone(ctx context.Context, args provision.LoadAccountsArgs) error {
	var first error
	for _, s := range a.rackStates() {
		err := a.ordered(ctx, s.Name, provision.OrderLoadAccounts, args, nil, func(o provision.OrderStatus) {
			if o.Line != "" {
				a.say(client.AcceptNews{Step: "accounts", Line: o.Line, Done: o.Done, Total: o.Total})
			}
		})
		if err == nil || ctx.Err() != nil {
			return err
		}
		if first == nil {
			first = err
		}
	}
	return first
}

// ordered gives a node an order and waits for its end; out takes the result,
// unless it is nil, and heard what changes meanwhile. Where ctx ends before the
// node has asked for it, the order is withdrawn.
func (a *acceptance) ordered(ctx context.Context, node string, kind provision.OrderKind, args, out any, heard func(provision.OrderStatus)) error {
	id, err := a.Order(ctx, node, kind, args, askWithin)
	if err != nil {
		return err
	}
	for {
		o, found, changed := a.Store.FindOrder(id)
		switch {
		case !found:
			return unknownOrder(id)
		case o.State == provision.OrderFailed:
			return fmt.Errorf("%s: %w", node, o.Failure)
		case o.State == provision.OrderWithdrawn:
			return fmt.Errorf("%s: %s was withdrawn: %s", node, o.Order, o.Why)
		case o.State == provision.OrderDone:
			if out == nil {
				return nil
			}
			if o, err = a.withBody(ctx, o); err != nil {
				return err
			}
			if err := json.Unmarshal(o.Result, out); err != nil {
				return fmt.Errorf("%s: the result of %s cannot be read: %w", node, o.Order, err)
			}
			return nil
		}
		if heard != nil {
			heard(o)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			a.Store.Change(context.WithoutCancel(ctx), func() ([]provision.Event, error) {
				if o, found, _ := a.Store.FindOrder(id); found && o.State == provision.OrderWaiting {
					return []provision.Event{o.Withdraw("nobody waits for it any more")}, nil
				}
				return nil, nil
			})
			return ctx.Err()
		}
	}
}

func (a *acceptance) options(accounts []provision.Account, every, during time.Duration) load.Options {
	o := load.Options{Domain: a.Rack.Stack.Domain, CA: a.Site.CA(), Accounts: accounts, Every: every, For: during}
	for _, n := range a.Rack.Nodes {
		o.Nodes = append(o.Nodes, load.Node{Name: n.Name, Addr: netip.AddrPortFrom(n.Address, xmppPort)})
	}
	return o
}

// progress tells of a run of users, and lets heard see it.
func (a *acceptance) progress(step string, heard func(load.Progress)) func(load.Progress) {
	var said time.Time
	var phase load.Phase
	return func(p load.Progress) {
		if heard != nil {
			heard(p)
		}
		if p.Phase == phase && time.Since(said) < 5*time.Second {
			return
		}
		said, phase = time.Now(), p.Phase
		a.line(step, "%s: %d of %d users in, %d sent, %d delivered, %d again", p.Phase, p.In, p.Users, p.Sent, p.Delivered, p.Reconnects)
	}
}

// outage has a node fail while users write, and sees what becomes of them, of
// their messages and of the cluster.
func (a *acceptance) outage(ctx context.Context, crowd, kept []provision.Account) error {
	o := a.report.Options
	out := &accept.Outage{Node: o.Node, Back: -1, Whole: -1}
	a.report.Outage = out
	during := o.Outage + recovery
	// What the node's order tells: guarded by mu.
	var mu sync.Mutex
	var began, starts time.Time
	var failed error
	var running sync.WaitGroup
	defer running.Wait()
	fail := sync.OnceFunc(func() {
		running.Go(func() {
			err := a.ordered(ctx, o.Node, provision.OrderOutage, provision.OutageArgs{Seconds: int((o.Outage + time.Second - 1) / time.Second)}, nil,
				func(s provision.OrderStatus) {
					mu.Lock()
					defer mu.Unlock()
					now := time.Now()
					if began.IsZero() && s.State == provision.OrderAccepted && s.Line != "" {
						began = now
						out.Began = a.Clock()
					}
					if starts.IsZero() && s.Line == provision.OutageEnds {
						starts = now
					}
					if s.Line != "" {
						a.line("failure", "%s: %s", o.Node, s.Line)
					}
				})
			mu.Lock()
			failed = err
			if starts.IsZero() {
				starts = time.Now()
			}
			mu.Unlock()
			if err != nil {
				return
			}
			// As its members say, and users get in on the node.
			whole, cancel := context.WithDeadline(ctx, starts.Add(o.Whole))
			defer cancel()
			if a.awaitCluster(whole, func() bool {
				st, _ := a.Store.Node(o.Node)
				_, err := a.Host.probe(whole, probe.Login, st, st)
				return err == nil
			}) {
				out.Whole = time.Since(starts)
				a.line("failure", "the cluster is whole again after %s", accept.Short(out.Whole))
			}
		})
	})
	var ledger load.Ledger
	var ledgerErr error
	writing := make(chan struct{})
	write := sync.OnceFunc(func() {
		go func() {
			defer close(writing)
			ledger, ledgerErr = load.Keep(ctx, a.options(kept, time.Second, during))
		}()
	})
	var back time.Time // when all were in, after some were not
	var dropped bool
	report, err := load.Run(ctx, a.options(crowd, min(o.Every, during), during), a.progress("failure", func(p load.Progress) {
		if p.Phase != load.Sending {
			return
		}
		write()
		if p.Sent > 0 {
			fail()
		}
		mu.Lock()
		defer mu.Unlock()
		switch {
		case began.IsZero():
		case p.In < p.Users:
			dropped, back = true, time.Time{}
		case dropped && back.IsZero():
			back = time.Now()
		}
	}))
	write() // where nobody got in
	<-writing
	if ctx.Err() != nil {
		return ctx.Err()
	}
	running.Wait()
	if err := errors.Join(err, ledgerErr, failed); err != nil {
		out.Failed = err.Error()
		return nil
	}
	if began.IsZero() {
		out.Failed = "users did not begin to write, so the node was left alone"
		return nil
	}
	out.Load, out.Ledger = report, ledger
	in := 0
	for _, n := range report.Nodes {
		in += n.End
	}
	switch {
	case in < report.Users:
	case !back.IsZero():
		out.Back = back.Sub(began)
	default:
		out.Back = 0 // within one look, a second
	}
	a.line("failure", "%s", ledger)
	return ctx.Err()
}

// awaitCluster returns when the cluster is whole, as its members say, and
// something else holds as well; false where ctx ends before.
func (h *Host) awaitCluster(ctx context.Context, and func() bool) bool {
	sub := h.Store.Subscribe(-1)
	defer sub.Close()
	for ctx.Err() == nil {
		if provision.ClusterOf(h.rackStates(), h.Clock()).Whole && and() {
			return true
		}
		if _, err := nextWithin(ctx, sub, time.Second); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return false
		}
	}
	return false
}

// signingKey is the public half of the site's signing key.
func (h *Host) signingKey() (minisign.PublicKey, error) {
	key, err := h.Site.SigningKey()
	if err != nil {
		return minisign.PublicKey{}, err
	}
	return key.Public().(minisign.PublicKey), nil
}

func (h *Host) siteKey(http.ResponseWriter, *http.Request) (any, error) {
	key, err := h.signingKey()
	return client.SiteKey{Key: key.String(), ID: fmt.Sprintf("%016X", key.ID())}, err
}
