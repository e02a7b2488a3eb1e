package dischost

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/client"
)

// installed is one of the rack's nodes on its installed host. Its questions
// wait for an hour: what is answered was answered at once.
func (l *lab) installed(node int) *client.Node {
	l.t.Helper()
	l.host.poll = time.Hour
	c := l.enrol(node)
	l.report(c, provision.Report{Stage: provision.StageInstalled}, provision.Report{Stage: provision.StagePreparing})
	return c
}

func (l *lab) order(node string, kind provision.OrderKind, args any) provision.OrderStatus {
	l.t.Helper()
	o, err := l.op.Order(l.t.Context(), node, kind, args, 0)
	l.check(err)
	return o
}

func (l *lab) orders(node string) string {
	l.t.Helper()
	orders, err := l.op.Orders(l.t.Context(), node)
	l.check(err)
	var out []string
	for _, o := range orders {
		if o.Args != nil || o.Result != nil {
			l.t.Errorf("listed with its body: %+v", o)
		}
		out = append(out, fmt.Sprintf("%s %s %s", o.Node, o.Kind, o.State))
	}
	return strings.Join(out, ", ")
}

func (l *lab) next(c *client.Node, member bool) *provision.Order {
	l.t.Helper()
	o, err := c.NextOrder(l.t.Context(), member)
	l.check(err)
	if o == nil {
		l.t.Fatal("no order came")
	}
	return o
}

// The life of an order, over real TLS, with the disc host stopped in between.
func TestOrder(t *testing.T) {
	l := newLab(t, 2)
	n1, n2 := l.installed(1), l.installed(2)
	ctx := t.Context()

	// A node that waits gets its order at once, the other one goes on waiting.
	got := make(chan *provision.Order)
	go func() {
		o, err := n1.NextOrder(ctx, true)
		if err != nil {
			t.Error(err)
		}
		got <- o
	}()
	other, give := context.WithCancel(ctx)
	otherDone := make(chan error)
	go func() { _, err := n2.NextOrder(other, true); otherDone <- err }()
	given := l.order("node1", "backup", map[string]string{"to": "private place"})
	if given.State != provision.OrderWaiting && given.State != provision.OrderAccepted || given.ID == 0 || given.Generation != 1 {
		t.Fatalf("%+v", given)
	}
	o := <-got
	if o == nil || o.ID != given.ID || o.Kind != "backup" || string(o.Args) != `{"to":"private place"}` || !o.Created.Equal(given.Created) || o.Node != "node1" {
		t.Fatalf("%+v", o)
	}
	if got := l.orders(""); got != "node1 backup accepted" {
		t.Fatal(got)
	}
	// It comes again until it has ended, also from a disc host that was killed.
	second := l.order("node1", "load", nil)
	l.restart()
	l.host.poll = time.Hour
	if o := l.next(n1, true); o.ID != given.ID || string(o.Args) != `{"to":"private place"}` {
		t.Fatalf("%+v", o)
	}
	// A node that is not a member yet is not given it, but is told of early ones.
	third := l.order("node1", provision.OrderDiagnose, nil)
	if o := l.next(n1, false); o.ID != third.ID || o.Args != nil {
		t.Fatalf("%+v", o)
	}

	rep := client.NewReporter(nil)
	rep.Attach(n1)
	defer rep.Close()
	followed := make(chan []provision.OrderStatus)
	half := make(chan struct{})
	go func() {
		var all []provision.OrderStatus
		for o, err := range l.op.FollowOrder(ctx, given.ID) {
			if err != nil {
				t.Error(err)
			}
			if o.Line == "half of it" && o.Done == 1 && o.Total == 2 {
				close(half)
			}
			all = append(all, o)
		}
		followed <- all
	}()
	rep.Order(provision.OrderNews{ID: given.ID, Line: "half of it", Done: 1, Total: 2})
	<-half
	// What node 2 says of it counts for nothing.
	l.report(n2, provision.Report{Order: &provision.OrderNews{ID: given.ID, State: provision.OrderFailed, Failure: &provision.Failure{Code: "mine"}}})
	rep.Order(provision.OrderNews{ID: given.ID, State: provision.OrderDone, Result: json.RawMessage(`{"bytes":12345678901234567890}`)})
	rep.Order(provision.OrderNews{ID: third.ID, State: provision.OrderFailed, Failure: &provision.Failure{Code: "x", Message: "it is so", Next: "Mend it"}})
	all := <-followed
	last := all[len(all)-1]
	if last.State != provision.OrderDone || string(last.Result) != `{"bytes":12345678901234567890}` || !strings.Contains(string(last.Args), "private") {
		t.Errorf("%+v", last)
	}
	for id, want := range map[int64]provision.OrderState{given.ID: provision.OrderDone, third.ID: provision.OrderFailed} {
		o, err := l.host.Await(ctx, id)
		if err != nil || o.State != want || (o.Failure != nil) != (want == provision.OrderFailed) || (o.Result != nil) == (o.Failure != nil) {
			t.Errorf("%+v, %v", o, err)
		}
	}
	if o := l.next(n1, true); o.ID != second.ID {
		t.Errorf("%+v", o)
	}
	if got := l.orders("node1"); got != "node1 backup done, node1 load accepted, node1 diagnose failed" {
		t.Error(got)
	}
	give()
	<-otherDone
}

// Orders are given and seen on the operators' socket only; what is in them and
// what came of them is in no journal.
func TestOrdersArePrivate(t *testing.T) {
	l := newLab(t, 1)
	n1 := l.installed(1)
	o := l.order("node1", "backup", "private args")
	l.next(n1, true)
	l.report(n1, provision.Report{Order: &provision.OrderNews{ID: o.ID, State: provision.OrderDone, Result: json.RawMessage(`"private result"`)}})
	do := func(method, path, body string) (int, string) {
		t.Helper()
		req, _ := http.NewRequestWithContext(t.Context(), method, l.page+path, strings.NewReader(body))
		resp, err := http.DefaultClient.Do(req)
		l.check(err)
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	defer http.DefaultClient.CloseIdleConnections()
	for _, path := range []string{"/v1/orders", fmt.Sprintf("/v1/orders/%d", o.ID)} {
		if status, body := do("GET", path, ""); status != 404 {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	for _, path := range []string{"/v1/orders", fmt.Sprintf("/v1/orders/%d/withdraw", o.ID)} {
		if status, body := do("POST", path, `{"node":"node1","kind":"backup"}`); status != 404 && status != 405 {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	_, log := do("GET", "/v1/nodes/node1/log", "")
	_, nodes := do("GET", "/v1/nodes", "")
	if !strings.Contains(log, "backup") || strings.Contains(log+nodes, "private") {
		t.Errorf("%s\n%s", log, nodes)
	}
	if got := l.orders(""); got != "node1 backup done" {
		t.Error(got)
	}
	// A machine that is no node is given nothing.
	a := args(l.boot(mac9, "10.9.0.201"))
	unknown, _, err := client.Enrol(t.Context(), l.url, a["pin"], a["token"])
	l.check(err)
	defer unknown.Close()
	if _, err := unknown.NextOrder(t.Context(), true); codeOf(err) != client.CodeNotApproved {
		t.Error(err)
	}
}

// A reinstall withdraws what waits, and tells a node that waits for orders that
// it is another one's turn.
func TestReinstallWithdraws(t *testing.T) {
	l := newLab(t, 1)
	n1 := l.installed(1)
	accepted := l.order("node1", "backup", nil)
	l.next(n1, true)
	waiting := l.order("node1", "load", nil)
	polled := make(chan error)
	go func() { _, err := n1.NextOrder(t.Context(), false); polled <- err }()
	_, err := l.op.Reinstall(t.Context(), "node1")
	l.check(err)
	if err := <-polled; codeOf(err) != client.CodeSuperseded {
		t.Fatal(err)
	}
	if o, err := l.host.Await(t.Context(), waiting.ID); err != nil || o.State != provision.OrderWithdrawn || !strings.Contains(o.Why, "reinstalled") {
		t.Fatalf("%+v, %v", o, err)
	}
	if _, err := l.op.Order(t.Context(), "node1", "load", nil, 0); codeOf(err) != client.CodeNoOrders || !strings.Contains(err.Error(), "due for install 2") {
		t.Fatal(err)
	}
	fresh := l.installed(1)
	if o, err := l.host.Await(t.Context(), accepted.ID); err != nil || o.State != provision.OrderFailed || o.Failure.Code != "order-lost" {
		t.Fatalf("%+v, %v", o, err)
	}
	again := l.order("node1", "load", nil)
	if o := l.next(fresh, true); o.ID != again.ID || o.Generation != 2 {
		t.Fatalf("%+v", o)
	}
}

// The end of the server ends every question at once; TestMain sees that
// nothing of them is left.
func TestOrderPollsEndWithTheServer(t *testing.T) {
	l := newLab(t, 1)
	n1 := l.installed(1)
	o := l.order("node1", "load", nil)
	polled := make(chan error)
	go func() { _, err := n1.NextOrder(t.Context(), false); polled <- err }()
	followed := make(chan error)
	begun := make(chan struct{}, 1)
	go func() {
		var last error
		for _, err := range l.op.FollowOrder(t.Context(), o.ID) {
			last = err
			select {
			case begun <- struct{}{}:
			default:
			}
		}
		followed <- last
	}()
	awaited := make(chan error)
	short, cancel := context.WithCancel(t.Context())
	go func() { _, err := l.host.Await(short, o.ID); awaited <- err }()
	<-begun
	began := time.Now()
	l.stop()
	cancel()
	if err := <-polled; !client.Retryable(err) {
		t.Error(err)
	}
	if err := <-followed; err == nil || !strings.Contains(err.Error(), "before the order had ended") {
		t.Error(err)
	}
	if err := <-awaited; err != context.Canceled {
		t.Error(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("stopped after %s", took)
	}
	l.start()
	// A question for which there is no answer ends by itself.
	l.host.poll = time.Millisecond
	if o, err := n1.NextOrder(t.Context(), false); o != nil || err != nil {
		t.Errorf("%+v, %v", o, err)
	}
}

// What nobody asked for in time is withdrawn, and not handed out meanwhile.
func TestOrderDeadline(t *testing.T) {
	l := newLab(t, 2)
	var mu sync.Mutex
	ahead := time.Duration(0)
	l.clock = func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(ahead) }
	l.restart()
	n1 := l.installed(1)
	l.installed(2)
	id, err := l.host.Order(t.Context(), "node1", "load", nil, time.Minute)
	l.check(err)
	id2, err := l.host.Order(t.Context(), "node2", "load", nil, time.Minute)
	l.check(err)
	day := l.order("node1", "backup", nil)
	if left := time.Until(day.Deadline); left < 23*time.Hour || left > 25*time.Hour {
		t.Errorf("a day is %s", left)
	}
	mu.Lock()
	ahead = 2 * time.Minute
	mu.Unlock()
	if o := l.next(n1, true); o.ID != day.ID {
		t.Errorf("%+v", o)
	}
	for _, id := range []int64{id, id2} { // the second by Run
		if o, err := l.host.Await(t.Context(), id); err != nil || o.State != provision.OrderWithdrawn || !strings.Contains(o.Why, "did not ask for it in time") {
			t.Errorf("%+v, %v", o, err)
		}
	}
}

func TestOrdersAreChecked(t *testing.T) {
	l := newLab(t, 2)
	ctx := t.Context()
	n1 := l.installed(1)
	for _, c := range []struct {
		node, kind string
		args       any
		code, says string
	}{
		{"node9", "load", nil, client.CodeUnknownNode, "There are: node1, node2."},
		{"node2", "load", nil, client.CodeNoOrders, "due for install 1"},
		{"node1", "", nil, client.CodeBadRequest, "not the name of an order"},
		{"node1", "a\x1bb", nil, client.CodeBadRequest, "not the name of an order"},
		{"node1", "load", strings.Repeat("x", provision.MaxOrderArgs-1), client.CodeTooLarge, "at most 65536"},
		{"node1", "load", strings.Repeat("x", 2*provision.MaxOrderArgs), client.CodeTooLarge, "larger than"},
	} {
		if _, err := l.op.Order(ctx, c.node, provision.OrderKind(c.kind), c.args, 0); codeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s for %s: %v", c.kind, c.node, err)
		}
	}
	if _, err := l.op.Order(ctx, "node1", "load", nil, -time.Hour); codeOf(err) != client.CodeBadRequest {
		t.Error(err)
	}
	if _, err := l.op.Withdraw(ctx, "node2"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.op.Order(ctx, "node2", "load", nil, 0); codeOf(err) != client.CodeNoOrders || !strings.Contains(err.Error(), "not installed") {
		t.Error(err)
	}
	full := l.order("node1", "load", strings.Repeat("x", provision.MaxOrderArgs-2))
	if o := l.next(n1, true); o.ID != full.ID || len(o.Args) != provision.MaxOrderArgs {
		t.Errorf("%d bytes", len(o.Args))
	}
	waiting := full
	for range provision.MaxOpenOrders - 1 {
		waiting = l.order("node1", "load", nil)
	}
	if _, err := l.op.Order(ctx, "node1", "load", nil, 0); codeOf(err) != client.CodeNoOrders || !strings.Contains(err.Error(), "16 orders") {
		t.Error(err)
	}
	if _, err := l.op.WithdrawOrder(ctx, full.ID); codeOf(err) != client.CodeOrderTaken || !strings.Contains(err.Error(), "node1 has order") {
		t.Error(err)
	}
	if o, err := l.op.WithdrawOrder(ctx, waiting.ID); err != nil || o.State != provision.OrderWithdrawn || o.Why != "an operator withdrew it" {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := l.op.WithdrawOrder(ctx, waiting.ID); codeOf(err) != client.CodeOrderTaken || !strings.Contains(err.Error(), "withdrawn already") {
		t.Error(err)
	}
	if _, err := l.op.WithdrawOrder(ctx, 12345); codeOf(err) != client.CodeUnknownOrder {
		t.Error(err)
	}
	for _, err := range l.op.FollowOrder(ctx, 12345) {
		if codeOf(err) != client.CodeUnknownOrder {
			t.Error(err)
		}
	}
	if _, err := l.host.Await(ctx, 12345); codeOf(err) != client.CodeUnknownOrder {
		t.Error(err)
	}
	if _, err := l.op.Orders(ctx, "node9"); codeOf(err) != client.CodeUnknownNode {
		t.Error(err)
	}
}

// What nodes say of orders is fit to be kept and shown on a terminal.
func TestOrderNewsIsChecked(t *testing.T) {
	l := newLab(t, 1)
	n1 := l.installed(1)
	end := func(n provision.OrderNews) provision.OrderStatus {
		t.Helper()
		n.ID = l.order("node1", "load", nil).ID
		l.next(n1, true)
		l.report(n1, provision.Report{Order: &n})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		o, err := l.host.Await(ctx, n.ID)
		l.check(err)
		return o
	}
	if o := end(provision.OrderNews{State: provision.OrderDone, Result: json.RawMessage(`{"a\u001b[2J":["two\nlines","x\u001b]0;y\u0007\u009b"],"n":1.50}`)}); string(o.Result) != `{"a?[2J":["two\nlines","x?]0;y??"],"n":1.50}` {
		t.Errorf("%s", o.Result)
	}
	big := func(n int) json.RawMessage { return json.RawMessage(`"` + strings.Repeat("x", n-2) + `"`) }
	if o := end(provision.OrderNews{State: provision.OrderDone, Result: big(provision.MaxOrderResult)}); len(o.Result) != provision.MaxOrderResult {
		t.Errorf("%d bytes, %+v", len(o.Result), o.Failure)
	}
	if o := end(provision.OrderNews{State: provision.OrderDone, Result: big(provision.MaxOrderResult + 1)}); o.State != provision.OrderFailed || o.Failure.Code != "order-result" || o.Result != nil {
		t.Errorf("%d bytes, %+v", len(o.Result), o.Failure)
	}
	if o := end(provision.OrderNews{State: provision.OrderFailed, Result: big(10)}); o.Failure == nil || o.Failure.Code != "order-failed" || o.Result != nil {
		t.Errorf("%+v", o)
	}
	if o := end(provision.OrderNews{State: provision.OrderFailed, Failure: &provision.Failure{Code: "a\x07", Message: "b\x1b", Next: "c"}}); *o.Failure != (provision.Failure{Code: "a?", Message: "b?", Next: "c"}) {
		t.Errorf("%+v", o.Failure)
	}
	id := l.order("node1", "load", nil).ID
	l.next(n1, true)
	l.report(n1, provision.Report{Order: &provision.OrderNews{ID: id, Line: strings.Repeat("y\x1b", 1000), Done: 7, Total: 5}},
		provision.Report{Log: "x", Order: &provision.OrderNews{ID: id, State: "fine"}})
	orders, err := l.op.Orders(t.Context(), "node1")
	l.check(err)
	if o := orders[len(orders)-1]; o.State != provision.OrderAccepted || len(o.Line) > provision.MaxOrderLine || strings.Contains(o.Line, "\x1b") || o.Total != 0 {
		t.Errorf("%+v", o)
	}
}
