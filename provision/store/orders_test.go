package store

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

func orderOf(node string, kind provision.OrderKind, args string) provision.Event {
	return provision.Event{Kind: provision.EventOrder, Node: node, Generation: 1,
		Order: &provision.Order{Kind: kind, Args: json.RawMessage(args), Deadline: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)}}
}

func ended(node string, id int64, result string) provision.Event {
	return report(node, 1, provision.Report{Order: &provision.OrderNews{ID: id, State: provision.OrderDone, Result: json.RawMessage(result)}})
}

// Orders are as they were after the journal is opened again, and their args and
// results are in no event.
func TestOrders(t *testing.T) {
	s, c, path := withRack(t)
	ctx := t.Context()
	given := []provision.Event{orderOf("node1", "backup", `{"to":"secret place"}`), orderOf("node2", "diagnose", "")}
	_, changed := s.Orders("node1")
	must(t, s.Append(ctx, given...))
	<-changed
	id := given[0].ID
	o, changed := s.Orders("node1")
	if len(o) != 1 || o[0].ID != id || id == 0 || o[0].State != provision.OrderWaiting || o[0].Args != nil || string(given[0].Order.Args) == "" {
		t.Fatalf("%+v", o)
	}
	must(t, s.Append(ctx, o[0].Accept()))
	<-changed
	// Progress is seen and not kept; of two ends the first counts.
	must(t, s.Append(ctx, report("node1", 1, provision.Report{Order: &provision.OrderNews{ID: id, Line: "half"}})))
	if o, _ := s.Orders("node1"); o[0].Line != "half" {
		t.Fatalf("%+v", o)
	}
	must(t, s.Append(ctx, ended("node1", id, `{"size":7}`), ended("node1", id, `{"size":8}`), ended("node2", id, `{"size":9}`)))
	check := func(s *Store) {
		t.Helper()
		o, found, _ := s.FindOrder(id)
		if !found || o.State != provision.OrderDone || o.Node != "node1" || o.Kind != "backup" || o.Line != "" || !o.Created.Equal(c.Now()) || o.Deadline.Year() != 2027 {
			t.Fatalf("%+v", o)
		}
		args, result, err := s.OrderBody(ctx, id)
		must(t, err)
		if string(args) != `{"to":"secret place"}` || string(result) != `{"size":7}` {
			t.Fatalf("%s, %s", args, result)
		}
		if o, found, _ := s.FindOrder(given[1].ID); !found || o.Node != "node2" || o.State != provision.OrderWaiting {
			t.Fatalf("%+v", o)
		}
		events, err := s.Events(ctx, "", 0, 100)
		must(t, err)
		b, err := json.Marshal(events)
		must(t, err)
		if text := string(b); strings.Contains(text, "secret") || strings.Contains(text, "size") || strings.Contains(text, "half") || !strings.Contains(text, "backup") {
			t.Fatal(text)
		}
	}
	check(s)
	must(t, s.Close())
	check(openAt(t, path, c.Now))
	if _, found, _ := s.FindOrder(12345); found {
		t.Error("an order that nobody gave was found")
	}
	if args, result, err := s.OrderBody(ctx, 12345); err == nil || args != nil || result != nil {
		t.Errorf("of a closed journal: %s %s %v", args, result, err)
	}
}

// What is forgotten leaves no args and no results behind.
func TestOrdersAreForgotten(t *testing.T) {
	s, c, path := withRack(t)
	first := []provision.Event{orderOf("node2", "other", `0`)}
	must(t, s.Append(t.Context(), first...))
	var events []provision.Event
	for i := range provision.KeptOrders + 3 {
		events = append(events, orderOf("node1", "a", fmt.Sprint(i)))
	}
	must(t, s.Append(t.Context(), events...))
	check := func(s *Store) {
		t.Helper()
		o, _ := s.Orders("node1")
		if len(o) != provision.KeptOrders || o[0].ID != events[3].ID {
			t.Fatalf("%d orders from %d", len(o), o[0].ID)
		}
		for i, e := range events {
			args, _, err := s.OrderBody(t.Context(), e.ID)
			if err != nil || (args == nil) != (i < 3) {
				t.Fatalf("order %d: %s, %v", i, args, err)
			}
		}
		if args, _, _ := s.OrderBody(t.Context(), first[0].ID); args == nil {
			t.Fatal("another node's order is gone")
		}
	}
	check(s)
	must(t, s.Close())
	check(openAt(t, path, c.Now))
}

// A journal of the first version opens, with all that is in it.
func TestFirstSchema(t *testing.T) {
	c, path := newClock(), filepath.Join(t.TempDir(), "journal.db")
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath())
	must(t, err)
	_, err = db.Exec(strings.TrimSuffix(schema, schema2+schema3) + `PRAGMA user_version = 1;
		INSERT INTO events (node, event) VALUES ('node1', '{"time":"2026-01-01T00:00:00Z","kind":"grant","node":"node1","generation":4}')`)
	must(t, err)
	if _, err := db.Exec(`SELECT * FROM orders`); err == nil {
		t.Fatal("this is no journal of the first version")
	}
	must(t, db.Close())
	for range 2 {
		s := openAt(t, path, c.Now)
		must(t, s.SetRack(t.Context(), testRack()))
		if st, _ := s.Node("node1"); st.Generation != 4 {
			t.Fatalf("%+v", st)
		}
		e := []provision.Event{orderOf("node1", "a", `1`)}
		must(t, s.Append(t.Context(), e...))
		if args, _, err := s.OrderBody(t.Context(), e[0].ID); err != nil || string(args) != "1" {
			t.Fatalf("%s, %v", args, err)
		}
		must(t, s.Close())
	}
}
