package store

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
)

// clock is a clock that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

const mac1, mac2, mac9 = provision.MAC("52:54:00:00:00:01"), provision.MAC("52:54:00:00:00:02"), provision.MAC("52:54:00:00:00:09")

func testRack() *provision.Rack {
	return &provision.Rack{Name: "lab", Nodes: []provision.Node{
		{Name: "node1", Slot: "A1", MAC: mac1, Address: netip.MustParseAddr("10.9.0.11")},
		{Name: "node2", Slot: "A2", MAC: mac2, Address: netip.MustParseAddr("10.9.0.12")},
		{Name: "node3", Slot: "A3", Address: netip.MustParseAddr("10.9.0.13")},
	}}
}

func openAt(t *testing.T, path string, now func() time.Time) *Store {
	t.Helper()
	s, err := Open(path, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func withRack(t *testing.T) (*Store, *clock, string) {
	t.Helper()
	c, path := newClock(), filepath.Join(t.TempDir(), "state dir%20?", "journal.db")
	s := openAt(t, path, c.Now)
	if err := s.SetRack(t.Context(), testRack()); err != nil {
		t.Fatal(err)
	}
	return s, c, path
}

func report(node string, generation int, r provision.Report) provision.Event {
	return provision.Event{Kind: provision.EventReport, Node: node, Generation: generation, Report: &r}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func names(states []provision.State) string {
	var out []string
	for _, s := range states {
		out = append(out, s.Name)
	}
	return strings.Join(out, " ")
}

func TestRackAndReopen(t *testing.T) {
	s, c, path := withRack(t)
	ctx := t.Context()
	for _, n := range s.Nodes() {
		if !n.Known || !n.GrantOpen || n.Generation != 1 || n.Stage != provision.StageOff || n.Slot == "" || n.Address == "" {
			t.Fatalf("%+v", n)
		}
	}
	c.Add(time.Second)
	must(t, s.Append(ctx,
		provision.Event{Kind: provision.EventBoot, Node: "node1", MAC: mac1, Generation: 1, Action: provision.ActionInstall},
		report("node1", 1, provision.Report{Stage: provision.StageInstalling, Facts: map[string]string{"disk": "/dev/vda"}}),
		report("node1", 1, provision.Report{Phase: "write", PhaseN: 3, PhaseOf: 5}),
		report("node1", 1, provision.Report{Done: 5, Total: 10}),
		report("node1", 1, provision.Report{Log: "hello"}),
		provision.Event{Kind: provision.EventBoot, Node: string(mac9), MAC: mac9, Action: provision.ActionInventory}))
	st, ok := s.Node("node1")
	if !ok || st.Stage != provision.StageInstalling || st.Done != 5 || st.Phase != "write" || st.LastLog != "hello" || st.Facts["disk"] != "/dev/vda" {
		t.Fatalf("%+v", st)
	}
	events, err := s.Events(ctx, "node1", 0, 100)
	must(t, err)
	if len(events) != 5 { // grant, boot, three reports; no byte count
		t.Fatalf("%d events: %+v", len(events), events)
	}
	for _, e := range events {
		if e.ID == 0 || e.Time.IsZero() || e.Report != nil && e.Report.Total > 0 {
			t.Fatalf("%+v", e)
		}
	}
	before := s.Nodes()
	if names(before) != "node1 node2 node3 "+string(mac9) {
		t.Fatal(names(before))
	}
	must(t, s.Close())

	again := openAt(t, path, c.Now)
	must(t, again.SetRack(ctx, testRack()))
	after := again.Nodes()
	before[0].Done, before[0].Total = 0, 0 // not kept
	if !reflect.DeepEqual(before, after) {
		t.Fatalf("before: %+v\nafter:  %+v", before, after)
	}
	if events, _ := again.Events(ctx, "", 0, 100); len(events) != 8 {
		t.Fatalf("%d events: the first grant was given twice", len(events))
	}
	// A node that leaves the rack file is no node; its journal stays.
	r := testRack()
	r.Nodes = r.Nodes[1:]
	must(t, again.SetRack(ctx, r))
	if _, ok := again.ByMAC(mac1); ok || names(again.Nodes()) != "node2 node3 "+string(mac9) {
		t.Fatal(names(again.Nodes()))
	}
	if _, ok := again.Node("node1"); ok {
		t.Fatal("node1 is still listed")
	}
}

func TestApprovals(t *testing.T) {
	s, c, path := withRack(t)
	ctx := t.Context()
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventBoot, Node: string(mac9), MAC: mac9, Action: provision.ActionInventory}))
	if _, ok := s.ByMAC(mac9); ok {
		t.Fatal("an unknown machine is a node")
	}
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventApprove, Node: "node3", MAC: mac9}))
	check := func(s *Store) {
		t.Helper()
		st, ok := s.ByMAC(mac9)
		if !ok || st.Name != "node3" || st.MAC != mac9 || !st.GrantOpen {
			t.Fatalf("%+v %v", st, ok)
		}
		if names(s.Nodes()) != "node1 node2 node3" {
			t.Fatal(names(s.Nodes()))
		}
	}
	check(s)
	must(t, s.Close())
	s = openAt(t, path, c.Now)
	must(t, s.SetRack(ctx, testRack()))
	check(s)
	// The rack file is stronger than an approval, both ways.
	r := testRack()
	r.Nodes[0].MAC, r.Nodes[2].MAC = mac9, mac1
	must(t, s.SetRack(ctx, r))
	if st, _ := s.ByMAC(mac9); st.Name != "node1" {
		t.Fatalf("%+v", st)
	}
	r.Nodes[2].MAC = ""
	must(t, s.SetRack(ctx, r))
	if st, _ := s.Node("node3"); st.MAC != "" {
		t.Fatalf("two nodes have %s", mac9)
	}
}

func TestSecondProcess(t *testing.T) {
	_, c, path := withRack(t)
	_, err := Open(path, c.Now)
	if err == nil || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) || !strings.Contains(err.Error(), "in use") || strings.Contains(err.Error(), "\n") {
		t.Fatal(err)
	}
}

func TestSchema(t *testing.T) {
	s, c, path := withRack(t)
	must(t, s.Close())
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath())
	must(t, err)
	var mode string
	must(t, db.QueryRow("PRAGMA journal_mode").Scan(&mode))
	if mode != "wal" {
		t.Fatal(mode)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode())
	}
	_, err = db.Exec("PRAGMA user_version = 99")
	must(t, err)
	must(t, db.Close())
	if _, err := Open(path, c.Now); err == nil || !strings.Contains(err.Error(), "version 99") {
		t.Fatal(err)
	}
	must(t, os.WriteFile(path, []byte(strings.Repeat("this is no database ", 100)), 0o600))
	if _, err := Open(path, c.Now); err == nil || !strings.Contains(err.Error(), path) {
		t.Fatal(err)
	}
}

// SQLite's synchronous setting is for each connection: the writer's must be FULL.
func TestWriterIsDurable(t *testing.T) {
	s, _, _ := withRack(t)
	var level int
	must(t, s.db.QueryRow("PRAGMA synchronous").Scan(&level))
	if level != 2 {
		t.Fatalf("synchronous is %d, not 2 (FULL)", level)
	}
	if _, err := s.read.Exec("DELETE FROM events"); err == nil {
		t.Fatal("the readers' connections can write")
	}
}

func TestTokens(t *testing.T) {
	s, c, path := withRack(t)
	ctx := t.Context()
	plan := &provision.Plan{Format: 1, Node: "node1", Generation: 1, Image: provision.ImageRef{Name: "debian-13"}}
	issue := func(node string) string {
		t.Helper()
		secret, err := s.IssueToken(ctx, Token{Node: node, MAC: mac1, Generation: 1, Life: "installer", Plan: plan}, time.Minute)
		must(t, err)
		return secret
	}
	wants := func(secret, by string, want error) Token {
		t.Helper()
		tok, err := s.SpendToken(ctx, secret, by)
		if !errors.Is(err, want) {
			t.Fatalf("%v, want %v", err, want)
		}
		return tok
	}
	wants("no such token", "key1", ErrTokenUnknown)
	first := issue("node1")
	second := issue("node1")
	if first == second || len(first) != 64 {
		t.Fatal(first)
	}
	wants(first, "key1", ErrTokenUnknown) // void
	if _, ok, err := s.Plan(ctx, "node1", 1); ok || err != nil {
		t.Fatal("a plan before enrolment", err)
	}
	tok := wants(second, "key1", nil)
	if tok.Node != "node1" || tok.MAC != mac1 || tok.Generation != 1 || tok.Life != "installer" || !reflect.DeepEqual(tok.Plan, plan) {
		t.Fatalf("%+v", tok)
	}
	if tok := wants(second, "key2", ErrTokenUsed); tok.Node != "node1" {
		t.Fatalf("%+v", tok)
	}
	wants(second, "", ErrTokenUsed)
	c.Add(time.Hour)
	wants(second, "key1", nil) // the reply was lost
	p, ok, err := s.Plan(ctx, "node1", 1)
	if !ok || err != nil || p.Digest() != plan.Digest() {
		t.Fatal(p, ok, err)
	}
	late := issue("node2")
	c.Add(time.Minute)
	wants(late, "key1", ErrTokenExpired)
	fresh := issue("node1")
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventWithdraw, Node: "node1"}))
	wants(fresh, "key1", ErrTokenUnknown)
	fresh = issue("node1")

	// Enrolment is journaled once for each token; all of it survives a restart.
	must(t, s.Close())
	s = openAt(t, path, c.Now)
	wants(second, "key2", ErrTokenUsed)
	wants(fresh, "key1", nil)
	events, _ := s.Events(ctx, "node1", 0, 100)
	enrolled := 0
	for _, e := range events {
		if e.Kind == provision.EventEnrol {
			enrolled++
		}
	}
	if enrolled != 2 {
		t.Fatalf("%d enrolments in the journal", enrolled)
	}
	raw, err := os.ReadFile(path)
	must(t, err)
	if strings.Contains(string(raw), second) {
		t.Fatal("the journal holds a token's secret")
	}
}

// However many ask at once, one gets the token.
func TestTokenRace(t *testing.T) {
	s, _, _ := withRack(t)
	secret, err := s.IssueToken(t.Context(), Token{Node: "node1", Generation: 1}, time.Minute)
	must(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 16 {
		wg.Go(func() {
			_, err := s.SpendToken(context.Background(), secret, fmt.Sprint("key", i))
			if err != nil && !errors.Is(err, ErrTokenUsed) {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Fatalf("%d got the token", won)
	}
}

func TestBatchesAreTakenOnce(t *testing.T) {
	s, c, path := withRack(t)
	ctx := t.Context()
	send := func(node, stream string, seq int64, line string) bool {
		t.Helper()
		taken, err := s.AppendBatch(ctx, node, Batch{stream, seq}, []provision.Event{report(node, 1, provision.Report{Log: line})})
		must(t, err)
		return taken
	}
	for i, c := range []struct {
		node, stream string
		seq          int64
		want         bool
	}{
		{"node1", "a", 1, true}, {"node1", "a", 1, false}, {"node1", "a", 2, true}, {"node1", "a", 1, false},
		{"node2", "a", 1, true}, {"node1", "b", 1, true}, {"node1", "", 0, true}, {"node1", "", 0, true},
	} {
		if got := send(c.node, c.stream, c.seq, "x"); got != c.want {
			t.Fatalf("case %d: taken %v", i, got)
		}
	}
	must(t, s.Close())
	s = openAt(t, path, c.Now)
	if send("node1", "a", 2, "x") {
		t.Fatal("a batch was taken again after a restart")
	}
	for i := range 40 {
		c.Add(time.Second)
		if !send("node1", fmt.Sprint("s", i), 1, "x") || send("node1", fmt.Sprint("s", i), 1, "x") {
			t.Fatal(i)
		}
	}
	var n int
	must(t, s.db.QueryRow("SELECT count(*) FROM batches WHERE node = 'node1'").Scan(&n))
	if n > 8 {
		t.Fatalf("%d streams of one node are remembered", n)
	}
}

// What Change decides on cannot change before it is journaled.
func TestChangeIsAtomic(t *testing.T) {
	s, _, _ := withRack(t)
	ctx := t.Context()
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventWithdraw, Node: "node1"}))
	var wg sync.WaitGroup
	open := errors.New("open")
	for range 16 {
		wg.Go(func() {
			err := s.Change(ctx, func() ([]provision.Event, error) {
				st, _ := s.Node("node1")
				if st.GrantOpen {
					return nil, open
				}
				return []provision.Event{{Kind: provision.EventGrant, Node: "node1", Generation: st.Generation + 1}}, nil
			})
			if err != nil && !errors.Is(err, open) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if st, _ := s.Node("node1"); st.Generation != 2 {
		t.Fatalf("generation %d", st.Generation)
	}
}

// A subscriber sees each event once, in order, whenever it comes and however
// slow it is, and the newest states.
func TestSubscribe(t *testing.T) {
	s, _, _ := withRack(t)
	ctx := t.Context()
	const total = 1100 // several pages
	go func() {
		for i := 0; i < total; i += 10 {
			var ten []provision.Event
			for j := range 10 {
				ten = append(ten, report("node1", 1, provision.Report{Log: fmt.Sprint(i + j)}))
			}
			if err := s.Append(ctx, ten...); err != nil {
				t.Error(err)
			}
			s.Progress(report("node2", 1, provision.Report{Done: int64(i + 10), Total: total}))
		}
	}()
	sub := s.Subscribe(0)
	var last int64
	lines, back, node1, node2 := 0, false, provision.State{}, provision.State{}
	for lines < total || node2.Done != total || node1.LastLog != fmt.Sprint(total-1) {
		news, err := sub.Next(ctx)
		must(t, err)
		for _, e := range news.Events {
			if e.ID != last+1 {
				t.Fatalf("event %d after %d", e.ID, last)
			}
			last = e.ID
			if e.Kind == provision.EventReport {
				if e.Report.Log != fmt.Sprint(lines) {
					t.Fatalf("line %q, want %d", e.Report.Log, lines)
				}
				lines++
			}
		}
		if news.After != last {
			t.Fatalf("after %d, last %d", news.After, last)
		}
		for _, st := range news.States {
			switch st.Name {
			case "node1":
				node1 = st
			case "node2":
				if st.Done < node2.Done {
					t.Fatal("states run backwards")
				}
				node2 = st
			}
		}
		if lines >= 700 && !back {
			back = true // it went away and comes back
			sub.Close()
			if _, err := sub.Next(ctx); !errors.Is(err, ErrClosed) {
				t.Fatal(err)
			}
			sub = s.Subscribe(last)
		}
	}
	defer sub.Close()
	quiet, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if news, err := sub.Next(quiet); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(news, err)
	}
	// From now on, and what is no longer listed.
	fresh := s.Subscribe(-1)
	defer fresh.Close()
	news, err := fresh.Next(ctx)
	must(t, err)
	if len(news.Events) != 0 || names(news.States) != "node1 node2 node3" {
		t.Fatalf("%+v", news)
	}
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventBoot, Node: string(mac9), MAC: mac9, Action: provision.ActionInventory}))
	if news, err = fresh.Next(ctx); err != nil || names(news.States) != string(mac9) || news.States[0].Stage != provision.StageUnknown {
		t.Fatalf("%+v %v", news, err)
	}
	must(t, s.Append(ctx, provision.Event{Kind: provision.EventApprove, Node: "node3", MAC: mac9}))
	if news, err = fresh.Next(ctx); err != nil || len(news.States) != 2 || news.States[1].Name != string(mac9) || news.States[1].Stage != "" {
		t.Fatalf("%+v %v", news, err)
	}
	if s.Close(); true {
		if _, err := fresh.Next(ctx); !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
	}
}

// childEnv makes this test binary write events until it is killed.
const childEnv = "PLATTER_STORE_TEST_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		s, err := Open(path, time.Now)
		if err == nil {
			err = s.SetRack(context.Background(), testRack())
		}
		for i := 0; err == nil; i++ {
			given := []provision.Event{report("node1", 1, provision.Report{Log: fmt.Sprint("a", i)}),
				report("node2", 1, provision.Report{Log: fmt.Sprint("b", i)}), orderOf("node3", "a", fmt.Sprint(i))}
			if err = s.Append(context.Background(), given...); err == nil {
				err = s.Append(context.Background(), ended("node3", given[2].ID, "1"))
			}
			fmt.Println(i) // acknowledged
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// What was acknowledged before kill -9 is there after it, pairs are whole, and
// ids go on.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	acked := 0
	for round := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines, in := 0, bufio.NewScanner(out)
		for in.Scan() {
			lines++
			if lines == 5+round*17 {
				must(t, cmd.Process.Kill())
			}
		}
		cmd.Wait()
		if lines < 5+round*17 {
			t.Fatalf("the writer ended by itself after %d lines", lines)
		}
		acked += lines
		s := openAt(t, path, time.Now)
		must(t, s.SetRack(t.Context(), testRack()))
		a, err := s.Events(t.Context(), "node1", 0, 1<<30)
		must(t, err)
		b, err := s.Events(t.Context(), "node2", 0, 1<<30)
		must(t, err)
		if len(a) != len(b) || len(a)-1 < acked || len(a)-1 > acked+round+1 {
			t.Fatalf("%d pairs acknowledged, %d and %d events kept", acked, len(a)-1, len(b)-1)
		}
		if st, _ := s.Node("node1"); st.LastLog != a[len(a)-1].Report.Log {
			t.Fatal(st.LastLog)
		}
		orders, _ := s.Orders("node3")
		var newest int
		args, _, err := s.OrderBody(t.Context(), orders[len(orders)-1].ID)
		must(t, err)
		if must(t, json.Unmarshal(args, &newest)); fmt.Sprint("a", newest) != a[len(a)-1].Report.Log {
			t.Fatalf("the newest order is %d, the newest line %s", newest, a[len(a)-1].Report.Log)
		}
		must(t, s.Close())
	}
}

// A roll is kept, also over a restart, and whoever waits for it hears of it.
func TestRoll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	s, err := Open(path, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	r, changed := s.Roll()
	if r != nil {
		t.Fatalf("a new journal has the roll %+v", r)
	}
	first := provision.Roll{To: "x", Nodes: []provision.RollNode{{Name: "a", State: provision.RollWaiting}}, Line: "not kept"}
	if err := s.KeepRoll(t.Context(), &first); err != nil || first.ID != 1 {
		t.Fatalf("roll %d: %v", first.ID, err)
	}
	<-changed
	first.Nodes[0].State = provision.RollDone // the store has its own
	if r, _ = s.Roll(); r.Nodes[0].State != provision.RollWaiting {
		t.Errorf("what is kept is %+v", r)
	}
	second := provision.Roll{To: "y", Ended: true}
	if err := errors.Join(s.KeepRoll(t.Context(), &first), s.KeepRoll(t.Context(), &second)); err != nil || second.ID != 2 {
		t.Fatalf("roll %d: %v", second.ID, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(path, time.Now); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if r, _ = s.Roll(); r == nil || r.ID != 2 || !r.Ended || r.Line != "" {
		t.Errorf("after a restart the roll is %+v", r)
	}
}
