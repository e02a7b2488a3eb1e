package provision

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// told folds events of one node, each a second after the one before it, with
// ids from 1.
func told(t *testing.T, events ...Event) Orders {
	t.Helper()
	text := func(o Orders) string {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	o := Orders{}
	for i, e := range events {
		e.ID, e.Time, e.Node = int64(i+1), time.Unix(int64(i+1), 0), "node1"
		before := text(o)
		next, changed := o.Apply(e)
		if text(o) != before {
			t.Fatalf("event %d changed the orders before it", e.ID)
		}
		if changed != (text(next) != before) {
			t.Fatalf("event %d: changed is %v\n%s\n%s", e.ID, changed, before, text(next))
		}
		o = next
	}
	return o
}

func given(kind OrderKind) Event {
	return Event{Kind: EventOrder, Generation: 1, Order: &Order{Kind: kind, Args: json.RawMessage(`"x"`), Deadline: time.Unix(100, 0)}}
}

func accepted(id int64) Event { return Event{Kind: EventOrderAccept, Order: &Order{ID: id}} }

func withdrawn(id int64) Event {
	return Event{Kind: EventOrderWithdraw, Order: &Order{ID: id}, Detail: "not wanted"}
}

func news(generation int, n OrderNews) Event {
	return Event{Kind: EventReport, Generation: generation, Report: &Report{Order: &n}}
}

func states(o Orders) string {
	var out []string
	for _, s := range o {
		out = append(out, fmt.Sprintf("%d %s", s.ID, s.State))
	}
	return strings.Join(out, ", ")
}

func TestOrders(t *testing.T) {
	done := func(id int64) Event { return news(1, OrderNews{ID: id, State: OrderDone}) }
	failed := func(id int64) Event {
		return news(1, OrderNews{ID: id, State: OrderFailed, Failure: &Failure{Code: "x"}})
	}
	stage := func(generation int, s Stage) Event {
		return Event{Kind: EventReport, Generation: generation, Report: &Report{Stage: s}}
	}
	for name, c := range map[string]struct {
		events []Event
		want   string
	}{
		"waiting":                     {[]Event{given("a"), given("b")}, "1 waiting, 2 waiting"},
		"accepted":                    {[]Event{given("a"), accepted(1)}, "1 accepted"},
		"done":                        {[]Event{given("a"), accepted(1), done(1)}, "1 done"},
		"failed":                      {[]Event{given("a"), accepted(1), failed(1)}, "1 failed"},
		"withdrawn":                   {[]Event{given("a"), withdrawn(1)}, "1 withdrawn"},
		"accepted: too late":          {[]Event{given("a"), accepted(1), withdrawn(1)}, "1 accepted"},
		"withdrawn: not handed out":   {[]Event{given("a"), withdrawn(1), accepted(1)}, "1 withdrawn"},
		"an end without a beginning":  {[]Event{given("a"), done(1)}, "1 waiting"},
		"the first end counts":        {[]Event{given("a"), accepted(1), failed(1), done(1)}, "1 failed"},
		"of another generation":       {[]Event{given("a"), accepted(1), news(2, OrderNews{ID: 1, State: OrderDone})}, "1 accepted"},
		"a state that is none":        {[]Event{given("a"), accepted(1), news(1, OrderNews{ID: 1, State: "fine"})}, "1 accepted"},
		"of an order that is none":    {[]Event{given("a"), accepted(1), done(7), accepted(8), withdrawn(9)}, "1 accepted"},
		"events without an order":     {[]Event{{Kind: EventOrder}, {Kind: EventOrderAccept}, {Kind: EventOrderWithdraw}, {Kind: EventReport}, {Kind: EventBoot}}, ""},
		"a grant withdraws":           {[]Event{given("a"), accepted(1), given("b"), {Kind: EventGrant, Generation: 2}}, "1 accepted, 3 withdrawn"},
		"an old install lost it":      {[]Event{given("a"), accepted(1), {Kind: EventGrant, Generation: 2}, stage(2, StageInstalled)}, "1 failed"},
		"the same install keeps it":   {[]Event{given("a"), accepted(1), stage(1, StagePreparing)}, "1 accepted"},
		"a new install has its own":   {[]Event{{Kind: EventGrant, Generation: 1}, stage(1, StageInstalled), given("a"), stage(1, StagePreparing)}, "3 waiting"},
		"a withdrawn reinstall keeps": {[]Event{given("a"), accepted(1), {Kind: EventGrant, Generation: 2}, {Kind: EventWithdraw}, done(1)}, "1 done"},
	} {
		if got := states(told(t, c.events...)); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}

	o := told(t, given("a"), accepted(1), news(1, OrderNews{ID: 1, Line: "half", Done: 1, Total: 2}), given("b"), withdrawn(4), given("c"), accepted(6), failed(6))
	if o[0].Line != "half" || o[0].Done != 1 || o[0].Total != 2 || !o[0].Since.Equal(time.Unix(2, 0)) || !o[0].Created.Equal(time.Unix(1, 0)) || o[0].Args != nil || o[0].Node != "node1" {
		t.Errorf("%+v", o[0])
	}
	if o[1].Why != "not wanted" || o[2].Failure.Code != "x" || o.Open() != 1 {
		t.Errorf("%+v", o)
	}
	if o, _ := o.Apply(done(1)); o[0].Line != "" || o[0].Total != 0 {
		t.Errorf("done, and still %+v", o[0])
	}
	if lost := told(t, given("a"), accepted(1), stage(2, StagePreparing)); lost[0].Failure == nil || lost[0].Failure.Code != "order-lost" {
		t.Errorf("%+v", lost)
	}
}

func TestOrderNext(t *testing.T) {
	o := told(t, given("old"), withdrawn(1), given("backup"), given(OrderDiagnose), accepted(3))
	for _, c := range []struct {
		generation int
		member     bool
		want       int64
	}{{1, true, 3}, {1, false, 4}, {2, true, 0}} {
		if got, ok := o.Next(c.generation, c.member); got.ID != c.want || ok != (c.want > 0) {
			t.Errorf("%+v: %d", c, got.ID)
		}
	}
	if e := o.Overdue(time.Unix(100, 0)); len(e) != 0 {
		t.Errorf("at the deadline: %+v", e)
	}
	e := o.Overdue(time.Unix(101, 0))
	if len(e) != 1 || e[0].Order.ID != 4 || e[0].Kind != EventOrderWithdraw || e[0].Node != "node1" {
		t.Fatalf("%+v", e)
	}
	if o, _ := o.Apply(e[0]); states(o) != "1 withdrawn, 3 accepted, 4 withdrawn" {
		t.Error(states(o))
	}
}

// Of many orders the newest are kept, and those are more than may be open.
func TestOrdersAreForgotten(t *testing.T) {
	var events []Event
	for range KeptOrders + 10 {
		events = append(events, given("a"))
	}
	o := told(t, events...)
	if len(o) != KeptOrders || o[0].ID != 11 || o[len(o)-1].ID != KeptOrders+10 || KeptOrders <= MaxOpenOrders {
		t.Errorf("%d orders, from %d to %d", len(o), o[0].ID, o[len(o)-1].ID)
	}
}

// Only the end of an order is kept of a report, and no news of one is a stage.
func TestOrderReports(t *testing.T) {
	if r := (Report{Order: &OrderNews{ID: 1, Line: "x"}, Done: 1, Total: 2}); !r.IsProgress() {
		t.Error("progress of an order is kept")
	}
	if r := (Report{Order: &OrderNews{ID: 1, State: OrderDone}}); r.IsProgress() {
		t.Error("the end of an order is not kept")
	}
	s := State{Generation: 1, Installed: 1, Stage: StageReady}
	if got := s.Apply(news(1, OrderNews{ID: 1, State: OrderFailed, Failure: &Failure{}})); got.Stage != StageReady || got.Failure != nil {
		t.Errorf("%+v", got)
	}
	at := time.Unix(5, 0)
	for _, c := range []struct {
		kind EventKind
		seen bool
	}{{EventOrder, false}, {EventOrderWithdraw, false}, {EventOrderAccept, true}} {
		if got := s.Apply(Event{Kind: c.kind, Time: at}); got.LastSeen.Equal(at) != c.seen {
			t.Errorf("%s: seen at %s", c.kind, got.LastSeen)
		}
	}
}
