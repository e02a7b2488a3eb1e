package store

import (
	"errors"
	"fmt"
	"os"

	"platter/provision"
)

// ErrHandedOver is returned for every change of a journal that was handed over.
var ErrHandedOver = errors.New("this disc host has been handed over and changes nothing any more")

// HandedOver returns to whom this journal was handed over, nil: to nobody.
func (s *Store) HandedOver() *provision.HandoverMark {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mark == nil {
		return nil
	}
	return new(*s.mark)
}

// foldHandover applies what an event says about the handover; s.mu is held, or
// nobody else has s yet.
func (s *Store) foldHandover(e provision.Event) {
	switch e.Kind {
	case provision.EventHandover:
		m := provision.HandoverMark{Node: e.Node, State: e.Detail, Time: e.Time}
		if e.Order != nil {
			m.Order = e.Order.ID
		}
		s.mark = &m
	case provision.EventHandoverTaken:
		if s.mark != nil {
			m := *s.mark
			m.Taken = true
			s.mark = &m
		}
	case provision.EventTakeBack:
		s.mark = nil
	}
}

// mayWrite refuses changes after a handover, but for those of the handover
// itself; s.writing is held. What is pure progress is dropped.
func (s *Store) mayWrite(more bool, events []provision.Event) error {
	if s.unsure != nil {
		return s.unsure
	}
	if s.HandedOver() == nil {
		return nil
	}
	for _, e := range events {
		more = more || e.Kind != provision.EventHandoverTaken && e.Kind != provision.EventTakeBack
	}
	if more {
		return ErrHandedOver
	}
	return nil
}

// Frozen is a journal in which nothing changes until it is released. Whoever
// wants to change something waits.
type Frozen struct{ s *Store }

// Freeze waits for the change under way and lets no other begin.
func (s *Store) Freeze() *Frozen {
	s.writing.Lock()
	return &Frozen{s}
}

// Snapshot writes the journal as it is to a new file, which Open can open. Only
// its owner may read it.
func (f *Frozen) Snapshot(path string) error {
	fail := func(err error) error { return fmt.Errorf("copy %s of the journal: %w", path, err) }
	// SQLite fills an empty file, and keeps its mode.
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fail(err)
	}
	defer file.Close()
	if _, err := f.s.db.Exec(`VACUUM INTO ?`, path); err != nil {
		return fail(err)
	}
	if err := file.Sync(); err != nil {
		return fail(err)
	}
	return nil
}

// HandOver journals the one event that makes another machine the disc host, and
// returns when that is durable. After an error it is not known whether it is: the
// journal takes no change any more and has to be opened anew.
func (f *Frozen) HandOver(e provision.Event) error {
	e.Kind = provision.EventHandover
	err := f.s.append(nil, []provision.Event{e})
	if err != nil {
		f.s.unsure = fmt.Errorf("it is not known whether this disc host was handed over to %s: start it again: %w", e.Node, err)
	}
	return f.s.unsure
}

// Release lets the others go on.
func (f *Frozen) Release() { f.s.writing.Unlock() }
