package store

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"platter/provision"
)

// ErrClosed ends the subscriptions of a closed store.
var ErrClosed = errors.New("the journal is closed")

// Subscription follows the journal. It holds no events: it knows up to where
// its reader is and which nodes have changed since, so a slow reader costs
// nothing, misses no event, and sees states coalesced.
type Subscription struct {
	s     *Store
	after int64
	wake  chan struct{} // something changed; capacity 1
	ended chan struct{}
	once  sync.Once

	// dirty is guarded by s.mu.
	dirty map[string]struct{}
}

// News is what a subscription brings: events first, then states that are at
// least as new as these.
type News struct {
	Events []provision.Event // in order
	// States replace what was known of these nodes. One without a Stage is of
	// a node or machine that is no longer listed.
	States []provision.State
	// After is where a new subscription goes on without a gap.
	After int64
}

// Subscribe follows the journal from the events with an id above after; below
// 0: from now on. The states of all nodes come first, once the reader has
// caught up. Close it.
func (s *Store) Subscribe(after int64) *Subscription {
	sub := &Subscription{s: s, after: after, wake: make(chan struct{}, 1), ended: make(chan struct{}), dirty: map[string]struct{}{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	if after < 0 || after > s.last { // above: of a journal that was replaced
		sub.after = s.last
	}
	for name := range s.states {
		sub.dirty[name] = struct{}{}
	}
	s.subs[sub] = struct{}{}
	sub.wake <- struct{}{}
	return sub
}

// touch tells every subscriber that nodes have changed; s.mu is held.
func (s *Store) touch(nodes ...string) {
	for sub := range s.subs {
		for _, n := range nodes {
			sub.dirty[n] = struct{}{}
		}
		select {
		case sub.wake <- struct{}{}:
		default:
		}
	}
}

// Next waits for news; it returns ctx's error when ctx ends first.
func (sub *Subscription) Next(ctx context.Context) (News, error) {
	const page = 500
	for {
		select {
		case <-sub.ended:
			return News{}, ErrClosed
		case <-ctx.Done():
			return News{}, ctx.Err()
		case <-sub.wake:
		}
		events, err := sub.s.Events(ctx, "", sub.after, page)
		if err != nil {
			sub.again()
			if ctx.Err() != nil {
				return News{}, ctx.Err()
			}
			return News{}, fmt.Errorf("events after %d: %w", sub.after, err)
		}
		if len(events) > 0 {
			sub.after = events[len(events)-1].ID
		}
		news := News{Events: events, After: sub.after}
		if len(events) == page {
			sub.again() // there may be more: states only at the end
		} else {
			news.States = sub.takeDirty()
		}
		if len(news.Events)+len(news.States) > 0 {
			return news, nil
		}
	}
}

func (sub *Subscription) again() {
	select {
	case sub.wake <- struct{}{}:
	default:
	}
}

// takeDirty returns the states of the nodes that changed, in the order of
// Nodes. Events journaled since the reader's last read may already be in them;
// those still come, and the states again with them.
func (sub *Subscription) takeDirty() []provision.State {
	sub.s.mu.Lock()
	defer sub.s.mu.Unlock()
	var out []provision.State
	for _, st := range sub.s.nodes() {
		if _, ok := sub.dirty[st.Name]; ok {
			out = append(out, st)
			delete(sub.dirty, st.Name)
		}
	}
	for name := range sub.dirty {
		out = append(out, provision.State{Name: name})
	}
	clear(sub.dirty)
	return out
}

func (sub *Subscription) end() { sub.once.Do(func() { close(sub.ended) }) }

// Close ends the subscription; Next returns ErrClosed from then on.
func (sub *Subscription) Close() {
	sub.s.mu.Lock()
	delete(sub.s.subs, sub)
	sub.s.mu.Unlock()
	sub.end()
}
