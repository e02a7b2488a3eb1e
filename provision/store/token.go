package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"platter/provision"
)

// Why a token is refused.
var (
	ErrTokenUnknown = errors.New("the token was never issued, or a newer boot or decision has voided it")
	ErrTokenExpired = errors.New("the token has expired")
	ErrTokenUsed    = errors.New("the token was used before")
)

// Token is what one boot is allowed to become.
type Token struct {
	Node       string // name, or the MAC of an unknown machine
	MAC        provision.MAC
	Generation int
	Life       string          // of the initramfs: installer or inventory
	Plan       *provision.Plan // what the installer carries out; nil otherwise
}

// IssueToken makes a token good for ttl and returns its secret, 64 hex digits,
// of which only a hash is kept. Tokens that were issued for the node before
// and not spent become void. events are journaled with it.
func (s *Store) IssueToken(ctx context.Context, t Token, ttl time.Duration, events ...provision.Event) (secret string, err error) {
	raw := make([]byte, 32)
	rand.Read(raw)
	secret = hex.EncodeToString(raw)
	var digest, plan string
	if t.Plan != nil {
		b, err := json.Marshal(t.Plan)
		if err != nil {
			return "", fmt.Errorf("plan of node %s: %w", t.Node, err)
		}
		digest, plan = t.Plan.Digest(), string(b)
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return "", err
	}
	err = s.append(func(tx *sql.Tx) error {
		if _, err := tx.Exec(`DELETE FROM tokens WHERE node = ? AND spent_by = ''`, t.Node); err != nil {
			return err
		}
		if digest != "" {
			if _, err := tx.Exec(`INSERT OR IGNORE INTO plans VALUES (?, ?)`, digest, plan); err != nil {
				return err
			}
		}
		_, err := tx.Exec(`INSERT INTO tokens (hash, node, mac, generation, life, plan, expires) VALUES (?, ?, ?, ?, ?, ?, ?)`,
			hash(secret), t.Node, string(t.MAC), t.Generation, t.Life, digest, s.now().Add(ttl).Unix())
		return err
	}, events)
	return secret, err
}

// SpendToken spends the token for the asker that by tells from all others, and
// journals that the node enrolled. The same asker may ask again, should the
// reply have been lost; anyone else gets ErrTokenUsed. The token is returned
// with ErrTokenUsed and ErrTokenExpired too.
func (s *Store) SpendToken(ctx context.Context, secret, by string) (Token, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return Token{}, err
	}
	var t Token
	var digest, spentBy string
	var plan sql.NullString
	var expires int64
	err := s.db.QueryRow(`SELECT node, mac, generation, life, tokens.plan, expires, spent_by, plans.plan
		FROM tokens LEFT JOIN plans ON digest = tokens.plan WHERE hash = ?`, hash(secret)).
		Scan(&t.Node, &t.MAC, &t.Generation, &t.Life, &digest, &expires, &spentBy, &plan)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return Token{}, ErrTokenUnknown
	case err != nil:
		return Token{}, fmt.Errorf("the journal cannot be read: %w", err)
	}
	if plan.Valid {
		t.Plan = new(provision.Plan)
		if err := json.Unmarshal([]byte(plan.String), t.Plan); err != nil {
			return Token{}, fmt.Errorf("plan of node %s: %w", t.Node, err)
		}
	}
	switch {
	case spentBy == by && by != "":
		return t, nil
	case spentBy != "":
		return t, ErrTokenUsed
	case s.now().Unix() >= expires:
		return t, ErrTokenExpired
	}
	return t, s.append(func(tx *sql.Tx) error {
		if _, err := tx.Exec(`UPDATE tokens SET spent_by = ? WHERE hash = ?`, by, hash(secret)); err != nil {
			return err
		}
		if digest == "" {
			return nil
		}
		_, err := tx.Exec(`INSERT OR REPLACE INTO enrolled VALUES (?, ?, ?)`, t.Node, t.Generation, digest)
		return err
	}, []provision.Event{{Kind: provision.EventEnrol, Node: t.Node, MAC: t.MAC, Generation: t.Generation, Detail: "as " + t.Life}})
}

// Plan returns the plan that the node last enrolled with for that generation.
func (s *Store) Plan(ctx context.Context, node string, generation int) (provision.Plan, bool, error) {
	var text string
	var p provision.Plan
	err := s.read.QueryRowContext(ctx, `SELECT plans.plan FROM enrolled JOIN plans ON digest = enrolled.plan WHERE node = ? AND generation = ?`,
		node, generation).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return p, false, nil
	}
	if err == nil {
		err = json.Unmarshal([]byte(text), &p)
	}
	if err != nil {
		return p, false, fmt.Errorf("plan of node %s, generation %d: %w", node, generation, err)
	}
	return p, true, nil
}

func hash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}
