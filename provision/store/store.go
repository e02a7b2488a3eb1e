package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the database/sql driver "sqlite"

	"platter/provision"
)

// version is the schema that this program writes; PRAGMA user_version has it.
const version = 3

const schema = `
CREATE TABLE events (
	id    INTEGER PRIMARY KEY AUTOINCREMENT, -- from 1, never reused
	node  TEXT NOT NULL,
	event TEXT NOT NULL                      -- provision.Event without its id, JSON
) STRICT;
CREATE INDEX events_of_node ON events (node, id);
CREATE TABLE plans (
	digest TEXT PRIMARY KEY,
	plan   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE tokens (
	hash       TEXT PRIMARY KEY,             -- SHA-256 of the secret, hex
	node       TEXT NOT NULL,
	mac        TEXT NOT NULL,
	generation INTEGER NOT NULL,
	life       TEXT NOT NULL,
	plan       TEXT NOT NULL,                -- digest, or empty
	expires    INTEGER NOT NULL,             -- Unix seconds
	spent_by   TEXT NOT NULL DEFAULT ''      -- digest of the key that spent it
) STRICT, WITHOUT ROWID;
CREATE TABLE enrolled (                      -- the plan that an identity carries out
	node       TEXT NOT NULL,
	generation INTEGER NOT NULL,
	plan       TEXT NOT NULL REFERENCES plans,
	PRIMARY KEY (node, generation)
) STRICT, WITHOUT ROWID;
CREATE TABLE batches (                       -- reports that were taken
	node   TEXT NOT NULL,
	stream TEXT NOT NULL,
	seq    INTEGER NOT NULL,
	time   INTEGER NOT NULL,                 -- Unix seconds
	PRIMARY KEY (node, stream)
) STRICT, WITHOUT ROWID;
` + schema2 + schema3

// schema2 is what version 2 added.
const schema2 = `
CREATE TABLE orders (                        -- what the events of an order leave out
	id     INTEGER PRIMARY KEY,              -- of the event that gave it
	node   TEXT NOT NULL,
	args   TEXT NOT NULL,                    -- JSON, or empty
	result TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX orders_of_node ON orders (node, id);
`

// schema3 is what version 3 added.
const schema3 = `
CREATE TABLE rolls (
	id   INTEGER PRIMARY KEY,
	roll TEXT NOT NULL                       -- provision.Roll, JSON
) STRICT;
`

// Store is the open journal. Its methods may be called at once from several
// goroutines. A context that has ended keeps a write from starting, but never
// breaks one off.
type Store struct {
	db   *sql.DB // one connection: the writer
	read *sql.DB
	lock *os.File
	now  func() time.Time

	writing sync.Mutex // held from decision to fold
	unsure  error      // set when nobody knows whether the journal was handed over; writing guards it

	mu     sync.RWMutex // of what follows; never held during I/O
	last   int64        // id of the newest event that is folded
	states map[string]provision.State
	seen   []string                 // unknown machines in the order they came
	owner  map[provision.MAC]string // approvals
	rack   *provision.Rack
	subs   map[*Subscription]struct{}
	orders map[string]provision.Orders
	// ordered is closed and replaced when orders changes.
	ordered chan struct{}
	roll    *provision.Roll // the last one; never changed, only replaced
	// rolled is closed and replaced when roll changes.
	rolled chan struct{}
	mark   *provision.HandoverMark // never changed, only replaced
}

// Open opens the journal at path, makes it and its directory at the first
// start, and folds its events. now is the clock that stamps events. The file
// path.lock keeps every other process out.
func Open(path string, now func() time.Time) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("journal %s: its directory cannot be made: %w", path, err)
	}
	lock, err := lockFile(path)
	if err != nil {
		return nil, err
	}
	s := &Store{
		lock: lock, now: now, states: map[string]provision.State{}, owner: map[provision.MAC]string{},
		rack: &provision.Rack{}, subs: map[*Subscription]struct{}{},
		orders: map[string]provision.Orders{}, ordered: make(chan struct{}), rolled: make(chan struct{}),
	}
	if err := s.open(path); err != nil {
		s.Close()
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	return s, nil
}

// lockFile makes this process the only one on the journal at path until it ends.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal %s cannot be locked: %w", path, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid := make([]byte, 20)
		n, _ := f.Read(pid)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("journal %s is in use by another disc host, process %s: stop that one, or choose another --state", path, pid[:n])
		}
		return nil, fmt.Errorf("journal %s cannot be locked: %w", path, err)
	}
	// For the message above only: the lock itself is what counts.
	f.Truncate(0)
	f.WriteAt(fmt.Appendf(nil, "%d", os.Getpid()), 0)
	return f, nil
}

func (s *Store) open(path string) error {
	// The journal holds no secret that is worth anything later, but nobody
	// else has business in it.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	dsn := func(more string) string {
		u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath()}
		return u.String() + "?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(10000)&_pragma=foreign_keys(1)" + more
	}
	if s.db, err = sql.Open("sqlite", dsn("&_txlock=immediate")); err != nil {
		return err
	}
	s.db.SetMaxOpenConns(1)
	if err := s.migrate(); err != nil {
		return err
	}
	if s.read, err = sql.Open("sqlite", dsn("&_pragma=query_only(1)")); err != nil {
		return err
	}
	s.read.SetMaxOpenConns(4)
	if err := s.clean(); err != nil {
		return err
	}
	if err := s.readRoll(); err != nil {
		return err
	}
	for {
		events, err := s.readEvents(context.Background(), "", s.last, 1<<62, 1000)
		if err != nil {
			return err
		}
		if len(events) == 0 {
			return nil
		}
		for _, e := range events {
			s.fold(e)
		}
	}
}

// clean drops what no boot can show any more.
func (s *Store) clean() error {
	if _, err := s.db.Exec(`DELETE FROM tokens WHERE expires < ?`, s.now().Add(-7*24*time.Hour).Unix()); err != nil {
		return err
	}
	_, err := s.db.Exec(`DELETE FROM plans WHERE digest NOT IN (SELECT plan FROM tokens) AND digest NOT IN (SELECT plan FROM enrolled)`)
	return err
}

func (s *Store) migrate() error {
	tx, err := s.db.Begin()
	if err != nil {
		return fmt.Errorf("it cannot be opened (%w): if it is damaged, move it away, and its -wal and -shm files with it, to start with an empty one", err)
	}
	defer tx.Rollback()
	var have int
	if err := tx.QueryRow(`PRAGMA user_version`).Scan(&have); err != nil {
		return err
	}
	add := ""
	switch have {
	case version:
		return nil
	case 0:
		add = schema
	case 1:
		add = schema2 + schema3
	case 2:
		add = schema3
	default:
		return fmt.Errorf("its schema is version %d, this program knows %d: use the program that wrote it, or a newer one", have, version)
	}
	if _, err := tx.Exec(add + fmt.Sprintf(`PRAGMA user_version = %d;`, version)); err != nil {
		return err
	}
	return tx.Commit()
}

// Close ends the use of the journal. Subscriptions end with an error.
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	for sub := range s.subs {
		sub.end()
	}
	s.mu.Unlock()
	var errs []error
	for _, db := range []*sql.DB{s.read, s.db} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// SetRack makes rack the nodes that are known. A node that never had a grant
// gets its first: the rack file approves one install of every node in it.
func (s *Store) SetRack(ctx context.Context, rack *provision.Rack) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	for name, st := range s.states {
		st.Known = false
		s.states[name] = st
	}
	s.rack = rack
	var grants []provision.Event
	for _, n := range rack.Nodes {
		st := s.state(n.Name)
		st.Known, st.Slot, st.Address = true, n.Slot, n.Address.String()
		st.MAC = s.macOf(n)
		s.states[n.Name] = st
		if st.Generation == 0 {
			grants = append(grants, provision.Event{Kind: provision.EventGrant, Node: n.Name, Generation: 1, Detail: "approved by the rack file"})
		}
	}
	s.touch(slices.Collect(maps.Keys(s.states))...)
	s.mu.Unlock()
	return s.append(nil, grants)
}

// macOf returns the MAC that maps to n: the rack file's, or an approved one
// that the rack file has not given to another node since.
func (s *Store) macOf(n provision.Node) provision.MAC {
	if n.MAC != "" {
		return n.MAC
	}
	for mac, name := range s.owner {
		if _, taken := s.rack.NodeByMAC(mac); name == n.Name && !taken {
			return mac
		}
	}
	return ""
}

// state returns what is known of name; s.mu is held.
func (s *Store) state(name string) provision.State {
	if st, ok := s.states[name]; ok {
		return st
	}
	return provision.State{Name: name, Stage: provision.StageOff}
}

// Node returns the state of a node of the rack, or of an unknown machine by
// its MAC.
func (s *Store) Node(name string) (provision.State, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st, ok := s.states[name]
	return st, ok && (st.Known || s.waits(st))
}

// Nodes returns all nodes in rack order, then the machines that are in no
// rack file in the order they came.
func (s *Store) Nodes() []provision.State {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.nodes()
}

func (s *Store) nodes() []provision.State {
	out := make([]provision.State, 0, len(s.states))
	for _, n := range s.rack.Nodes {
		out = append(out, s.states[n.Name])
	}
	for _, name := range s.seen {
		if st := s.states[name]; s.waits(st) {
			out = append(out, st)
		}
	}
	return out
}

// waits tells whether st is of a machine that is no node; s.mu is held. What a
// machine said before it was approved stays in the journal under its MAC.
func (s *Store) waits(st provision.State) bool {
	if st.Known || provision.MAC(st.Name) != st.MAC {
		return false
	}
	_, isNode := s.byMAC(st.MAC)
	return !isNode
}

// ByMAC returns the state of the node that the machine with that MAC is.
func (s *Store) ByMAC(mac provision.MAC) (provision.State, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.byMAC(mac)
}

func (s *Store) byMAC(mac provision.MAC) (provision.State, bool) {
	if n, ok := s.rack.NodeByMAC(mac); ok {
		return s.states[n.Name], true
	}
	if n, ok := s.rack.NodeByName(s.owner[mac]); ok && n.MAC == "" && s.macOf(n) == mac {
		return s.states[n.Name], true
	}
	return provision.State{}, false
}

// Append journals events, all or none, and returns once they are durable and
// folded. Their id and time are set here. Reports that are pure progress are
// folded in their place but not kept.
func (s *Store) Append(ctx context.Context, events ...provision.Event) error {
	return s.Change(ctx, func() ([]provision.Event, error) { return events, nil })
}

// Change journals what decide returns. No other event comes between what
// decide sees through Node, Nodes and ByMAC, and its own.
func (s *Store) Change(ctx context.Context, decide func() ([]provision.Event, error)) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	events, err := decide()
	if err != nil {
		return err
	}
	return s.append(nil, events)
}

// Batch names a batch of reports of one node, see client.BatchHeader. A zero
// Batch has no name.
type Batch struct {
	Stream string
	Seq    int64
}

// AppendBatch is Append for the reports of one node, once for each batch:
// taken is false when the batch was journaled before, and nothing happens.
func (s *Store) AppendBatch(ctx context.Context, node string, b Batch, events []provision.Event) (taken bool, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if b.Stream == "" || !slices.ContainsFunc(events, keeps) {
		return true, s.append(nil, events)
	}
	err = s.append(func(tx *sql.Tx) error {
		now := s.now().Unix()
		r, err := tx.Exec(`INSERT INTO batches VALUES (?1, ?2, ?3, ?4)
			ON CONFLICT DO UPDATE SET seq = ?3, time = ?4 WHERE seq < ?3`, node, b.Stream, b.Seq, now)
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return errors.Join(errTaken, err)
		}
		// One node speaks in few streams: one for each start of its program.
		_, err = tx.Exec(`DELETE FROM batches WHERE node = ?1 AND stream NOT IN
			(SELECT stream FROM batches WHERE node = ?1 ORDER BY time DESC, stream = ?2 DESC LIMIT 8)`, node, b.Stream)
		return err
	}, events)
	if errors.Is(err, errTaken) {
		return false, nil
	}
	return err == nil, err
}

var errTaken = errors.New("the batch was taken before")

// keeps tells whether e belongs into the journal.
func keeps(e provision.Event) bool {
	return e.Kind != provision.EventReport || e.Report != nil && !e.Report.IsProgress()
}

// append makes events durable together with what also does, then folds and
// publishes them; s.writing is held.
func (s *Store) append(also func(*sql.Tx) error, events []provision.Event) error {
	if err := s.mayWrite(also != nil, events); err != nil {
		return err
	}
	now := s.now().UTC().Round(0) // as it comes back from JSON
	for i := range events {
		events[i].ID, events[i].Time = 0, now
	}
	if also != nil || slices.ContainsFunc(events, keeps) {
		if err := s.write(also, events); err != nil {
			if errors.Is(err, errTaken) {
				return err
			}
			return fmt.Errorf("the journal cannot be written: %w: check the disk that holds the state directory", err)
		}
	}
	s.publish(events)
	return nil
}

func (s *Store) write(also func(*sql.Tx) error, events []provision.Event) error {
	tx, err := s.db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if also != nil {
		if err := also(tx); err != nil {
			return err
		}
	}
	for i, e := range events {
		if !keeps(e) {
			continue
		}
		b, err := json.Marshal(withoutBody(e))
		if err != nil {
			return err
		}
		r, err := tx.Exec(`INSERT INTO events (node, event) VALUES (?, ?)`, e.Node, string(b))
		if err != nil {
			return err
		}
		if events[i].ID, err = r.LastInsertId(); err != nil {
			return err
		}
		if err := writeBody(tx, events[i]); err != nil {
			return err
		}
		// What a token was good for changes with the grant.
		if e.Kind == provision.EventGrant || e.Kind == provision.EventWithdraw {
			if _, err := tx.Exec(`DELETE FROM tokens WHERE node = ? AND spent_by = ''`, e.Node); err != nil {
				return err
			}
		}
	}
	return tx.Commit()
}

// Progress folds and publishes e without keeping it.
func (s *Store) Progress(e provision.Event) {
	s.writing.Lock()
	defer s.writing.Unlock()
	e.ID, e.Time = 0, s.now().UTC().Round(0)
	s.publish([]provision.Event{e})
}

// publish folds events and wakes the subscribers; s.writing is held.
func (s *Store) publish(events []provision.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range events {
		s.fold(e)
		s.touch(e.Node)
	}
}

// fold applies one event; s.mu is held, or nobody else has s yet.
func (s *Store) fold(e provision.Event) {
	if e.ID > 0 {
		s.last = e.ID
	}
	st, old := s.states[e.Node]
	if !old {
		st = s.state(e.Node)
		s.seen = append(s.seen, e.Node)
	}
	if e.Kind == provision.EventApprove {
		// One machine, one node: the newest approval counts.
		for mac, name := range s.owner {
			if name == e.Node {
				delete(s.owner, mac)
			}
		}
		s.owner[e.MAC] = e.Node
		s.touch(string(e.MAC))
	}
	s.states[e.Node] = st.Apply(e)
	s.foldHandover(e)
	if orders, changed := s.orders[e.Node].Apply(e); changed {
		s.orders[e.Node] = orders
		close(s.ordered)
		s.ordered = make(chan struct{})
	}
}

// Events returns events with an id above after, oldest first, at most limit
// of them; of all nodes when node is empty.
func (s *Store) Events(ctx context.Context, node string, after int64, limit int) ([]provision.Event, error) {
	s.mu.RLock()
	last := s.last
	s.mu.RUnlock()
	events, err := s.readEvents(ctx, node, after, last, limit)
	if err != nil {
		return nil, fmt.Errorf("the journal cannot be read: %w", err)
	}
	return events, nil
}

func (s *Store) readEvents(ctx context.Context, node string, after, upTo int64, limit int) ([]provision.Event, error) {
	query, args := `SELECT id, event FROM events WHERE id > ? AND id <= ?`, []any{after, upTo}
	if node != "" {
		query, args = query+` AND node = ?`, append(args, node)
	}
	rows, err := s.read.QueryContext(ctx, query+` ORDER BY id LIMIT ?`, append(args, limit)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := []provision.Event{}
	for rows.Next() {
		var e provision.Event
		var id int64
		var text []byte
		if err := rows.Scan(&id, &text); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(text, &e); err != nil {
			return nil, fmt.Errorf("event %d: %w", id, err)
		}
		e.ID = id
		out = append(out, e)
	}
	return out, rows.Err()
}
