package dischost

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"platter/provision"
	"platter/provision/stack/probe"
	"platter/provision/store"
)

const (
	xmppPort     = 5222             // RFC 6120, 14.7
	probeRecheck = 15 * time.Second // a wake-up, should an event be missed
	maxProbes    = 4                // pairs at once
)

// pair is two nodes between which messages are to pass; the same node twice
// in a rack of one.
type pair struct{ a, b provision.State }

func (p pair) nodes() []provision.State {
	if p.a.Name == p.b.Name {
		return []provision.State{p.a}
	}
	return []provision.State{p.a, p.b}
}

// pairsFor says between which nodes messages should pass now, so that every
// node that is probing becomes ready, and which nodes have to wait for a
// partner and why. busy nodes are left alone, later ones are only partners of
// others for now; tries counts a node's failed probes, so that another partner
// gets a turn. states are all nodes of the rack in its order.
func pairsFor(states []provision.State, busy, later map[string]bool, tries map[string]int) (pairs []pair, waits map[string]string) {
	waits = map[string]string{}
	taken := map[string]bool{}
	for _, s := range states {
		if s.Stage != provision.StageProbing || busy[s.Name] || later[s.Name] || taken[s.Name] {
			continue
		}
		var partners, others []provision.State
		up := false
		for _, o := range states {
			switch {
			case o.Name == s.Name:
			case o.Stage != provision.StageProbing && o.Stage != provision.StageReady:
				others = append(others, o)
			default:
				up = true
				if !busy[o.Name] && !taken[o.Name] {
					partners = append(partners, o)
				}
			}
		}
		switch {
		case len(states) == 1:
			pairs = append(pairs, pair{s, s})
		case len(partners) > 0:
			p := partners[tries[s.Name]%len(partners)]
			pairs = append(pairs, pair{s, p})
			taken[s.Name], taken[p.Name] = true, true
		case !up:
			waits[s.Name] = whyAlone(s, others)
		}
	}
	return pairs, waits
}

func whyAlone(s provision.State, others []provision.State) string {
	var where []string
	for _, o := range others {
		where = append(where, fmt.Sprintf("%s is %s", o.Name, o.Stage))
	}
	return fmt.Sprintf("%s works and waits for a second node to pass a message with: %s", s.Name, strings.Join(where, ", "))
}

// Run declares nodes ready until ctx ends: as soon as two of them are members
// of the cluster it sends a message each way, and again and again until one
// arrives. It also withdraws orders that no node asked for in time, and carries on
// a roll to another release.
func (h *Host) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	type result struct {
		pair pair
		err  error
	}
	results, retry, changed := make(chan result), make(chan string), make(chan error)
	busy, later, tries, said := map[string]bool{}, map[string]bool{}, map[string]int{}, map[string]string{}
	sub := h.Store.Subscribe(-1)
	defer sub.Close()
	running.Go(func() { h.roll(ctx) })
	running.Go(func() {
		for ctx.Err() == nil {
			_, err := nextWithin(ctx, sub, probeRecheck)
			send(ctx, changed, err)
			if errors.Is(err, store.ErrClosed) {
				return
			} else if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				provision.Sleep(ctx, time.Second) // the journal cannot be read now
			}
		}
	})
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-changed:
			if errors.Is(err, store.ErrClosed) {
				return err
			}
		case name := <-retry:
			delete(later, name)
		case r := <-results:
			delete(busy, r.pair.a.Name)
			delete(busy, r.pair.b.Name)
			for _, s := range r.pair.nodes() {
				if r.err == nil {
					delete(tries, s.Name)
					delete(said, s.Name)
					continue
				}
				h.say(ctx, said, s, "the probe message did not pass yet: "+r.err.Error())
				wait := probeWait(tries[s.Name])
				tries[s.Name]++
				if later[s.Name] {
					continue
				}
				later[s.Name] = true
				running.Go(func() {
					provision.Sleep(ctx, wait)
					send(ctx, retry, s.Name)
				})
			}
		}
		h.withdrawOverdue(ctx)
		states := h.rackStates()
		pairs, waits := pairsFor(states, busy, later, tries)
		for _, s := range states {
			if why := waits[s.Name]; why != "" {
				h.say(ctx, said, s, why)
			}
		}
		for _, p := range pairs {
			if len(busy) >= 2*maxProbes {
				break // a result will come, and with it the next look
			}
			busy[p.a.Name], busy[p.b.Name] = true, true
			running.Go(func() { send(ctx, results, result{p, h.probePair(ctx, p)}) })
		}
	}
}

func send[T any](ctx context.Context, c chan<- T, v T) {
	select {
	case c <- v:
	case <-ctx.Done():
	}
}

// probeWait is the pause after failure n, from 0: half a second, doubling to 16 s.
func probeWait(n int) time.Duration { return 500 * time.Millisecond << min(n, 5) }

// say journals a line of the disc host about a node that is probing, unless it
// was the last one said.
func (h *Host) say(ctx context.Context, said map[string]string, st provision.State, line string) {
	if said[st.Name] == line || st.Stage != provision.StageProbing {
		return
	}
	said[st.Name] = line
	err := h.Store.Append(ctx, provision.Event{Kind: provision.EventReport, Node: st.Name, Generation: st.Installed,
		Report: &provision.Report{Time: h.Clock(), Log: text("disc host: "+line, 2000)}})
	if err != nil && ctx.Err() == nil {
		h.Log.Error("probe line not journaled", "node", st.Name, "err", err)
	}
}

// probePair passes a message from a to b and one back, and journals that
// whichever of them is still probing is ready.
func (h *Host) probePair(ctx context.Context, p pair) error {
	detail, err := h.message(ctx, p.a, p.b)
	if err != nil {
		return err
	}
	if p.a.Name != p.b.Name {
		back, err := h.message(ctx, p.b, p.a)
		if err != nil {
			return err
		}
		detail += "; " + back
	}
	return h.Store.Change(ctx, func() ([]provision.Event, error) {
		var events []provision.Event
		for _, was := range p.nodes() {
			// A node that went away meanwhile has to show again that it works.
			if now, ok := h.Store.Node(was.Name); ok && now.Stage == provision.StageProbing && now.Installed == was.Installed {
				h.Log.Info("node is ready", "node", was.Name, "detail", detail)
				events = append(events, provision.Event{Kind: provision.EventProbe, Node: was.Name, Generation: was.Installed, Detail: detail})
			}
		}
		return events, nil
	})
}

// message passes one message from the first probe account on one node to the
// second on the other.
func (h *Host) message(ctx context.Context, from, to provision.State) (string, error) {
	took, err := h.probe(ctx, probe.Message, from, to)
	if err != nil {
		return "", err
	}
	users := h.Site.Probes()
	return fmt.Sprintf("message from %s on %s reached %s on %s in %d ms", users[0].User, from.Name, users[1].User, to.Name, max(1, took.Milliseconds())), nil
}

// probe carries out one probe from the first probe account on one node to the
// second on the other.
func (h *Host) probe(ctx context.Context, kind probe.Kind, from, to provision.State) (time.Duration, error) {
	users := h.Site.Probes()
	a, err := endpoint(from, users[0])
	if err != nil {
		return 0, err
	}
	b, err := endpoint(to, users[1])
	if err != nil {
		return 0, err
	}
	return h.Probe(ctx, kind, probe.Options{Domain: h.Rack.Stack.Domain, CA: h.Site.CA(), From: a, To: b})
}

func endpoint(st provision.State, user provision.Account) (probe.Endpoint, error) {
	addr, err := netip.ParseAddr(st.Address)
	if err != nil {
		return probe.Endpoint{}, fmt.Errorf("address of node %s: %w", st.Name, err)
	}
	return probe.Endpoint{Node: st.Name, Addr: netip.AddrPortFrom(addr, xmppPort), Account: user}, nil
}
