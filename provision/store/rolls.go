package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"platter/provision"
)

// Roll returns the last roll, nil where there never was one, and a channel that
// is closed when it changes.
func (s *Store) Roll() (roll *provision.Roll, changed <-chan struct{}) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.roll != nil {
		roll = new(*s.roll)
		roll.Nodes = append([]provision.RollNode(nil), s.roll.Nodes...)
	}
	return roll, s.rolled
}

// KeepRoll keeps a roll; one without an ID is new and gets one. It returns once
// that is durable.
func (s *Store) KeepRoll(ctx context.Context, roll *provision.Roll) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.mayWrite(true, nil); err != nil {
		return err
	}
	kept := *roll
	kept.Line = ""
	if kept.ID == 0 {
		kept.ID = 1
		if s.roll != nil {
			kept.ID = s.roll.ID + 1
		}
	}
	kept.Nodes = append([]provision.RollNode(nil), roll.Nodes...)
	b, err := json.Marshal(kept)
	if err != nil {
		return fmt.Errorf("roll %d: %w", kept.ID, err)
	}
	if _, err := s.db.Exec(`INSERT OR REPLACE INTO rolls (id, roll) VALUES (?, ?)`, kept.ID, string(b)); err != nil {
		return fmt.Errorf("roll %d is not kept: %w", kept.ID, err)
	}
	roll.ID = kept.ID
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roll = &kept
	close(s.rolled)
	s.rolled = make(chan struct{})
	return nil
}

func (s *Store) readRoll() error {
	var text string
	err := s.db.QueryRow(`SELECT roll FROM rolls ORDER BY id DESC LIMIT 1`).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal([]byte(text), &s.roll)
	}
	if err != nil {
		return fmt.Errorf("the last roll cannot be read: %w", err)
	}
	return nil
}
