package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/dischost"
	"platter/provision/site"
	"platter/provision/stack"
	"platter/provision/store"
)

// desk hands orders out and hears of their ends.
type desk struct {
	orders chan *provision.Order
	asked  chan bool // member, of each question
	ends   chan provision.OrderNews
	mu     sync.Mutex
	lines  []string
}

func newDesk() *desk {
	return &desk{orders: make(chan *provision.Order), asked: make(chan bool, 100), ends: make(chan provision.OrderNews, 100)}
}

func (d *desk) next(ctx context.Context, member bool) (*provision.Order, error) {
	d.asked <- member
	select {
	case o := <-d.orders:
		return o, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (d *desk) Logf(format string, args ...any)      { d.add("log " + fmt.Sprintf(format, args...)) }
func (d *desk) Flush(ctx context.Context) error      { return ctx.Err() }
func (d *desk) add(line string)                      { d.mu.Lock(); d.lines = append(d.lines, line); d.mu.Unlock() }
func (d *desk) said() string                         { d.mu.Lock(); defer d.mu.Unlock(); return strings.Join(d.lines, "\n") }
func (d *desk) end(t *testing.T) provision.OrderNews { t.Helper(); return wait(t, d.ends) }

func (d *desk) Order(n provision.OrderNews) {
	if n.State == "" {
		d.add(fmt.Sprintf("line %d %s %d/%d", n.ID, n.Line, n.Done, n.Total))
		return
	}
	d.ends <- n
}

// wait is for something that has to come.
func wait[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("nothing came")
	}
	return v
}

// begin runs o until end is called.
func (o *orders) begin(t *testing.T) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); o.run(ctx) }()
	end = sync.OnceFunc(func() { cancel(); wait(t, done) })
	t.Cleanup(end)
	return end
}

func ofKinds(t *testing.T, d *desk, kinds map[provision.OrderKind]orderKind) (o *orders, isMember func()) {
	t.Helper()
	member, isMember := context.WithCancel(context.Background())
	t.Cleanup(isMember)
	return &orders{path: filepath.Join(t.TempDir(), "new", "orders.json"), kinds: kinds, next: d.next, rep: d, log: io.Discard,
		member: member, retry: time.Millisecond}, isMember
}

func doing(do func(ctx context.Context, t task, say progress) (any, error)) orderKind {
	return orderKind{do: do, within: time.Minute}
}

func TestOrderEnds(t *testing.T) {
	d := newDesk()
	var log bytes.Buffer
	o, isMember := ofKinds(t, d, map[provision.OrderKind]orderKind{
		"echo": doing(func(_ context.Context, t task, say progress) (any, error) {
			say("echoing", 1, 2)
			return map[string]any{"args": t.Args, "try": t.Try}, nil
		}),
		"nothing": doing(func(context.Context, task, progress) (any, error) { return nil, nil }),
		"named": doing(func(context.Context, task, progress) (any, error) {
			return "ignored", fmt.Errorf("so: %w", &provision.Failure{Code: "named"})
		}),
		"nameless": doing(func(context.Context, task, progress) (any, error) { return nil, errors.New("no space") }),
		"panics":   doing(func(context.Context, task, progress) (any, error) { panic("a mistake") }),
		"endless": {within: time.Millisecond, do: func(ctx context.Context, _ task, _ progress) (any, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}},
		"large": doing(func(context.Context, task, progress) (any, error) {
			return strings.Repeat("x", provision.MaxOrderResult), nil
		}),
		"odd": doing(func(context.Context, task, progress) (any, error) { return make(chan int), nil }),
	})
	o.log = &log
	isMember()
	end := o.begin(t)
	for i, c := range []struct {
		kind         provision.OrderKind
		result, code string
		says         string
	}{
		{"echo", `{"args":"a","try":1}`, "", ""},
		{"nothing", "", "", ""},
		{"named", "", "named", ""},
		{"nameless", "", "order-failed", "(nameless): no space"},
		{"panics", "", "order-panic", "a mistake"},
		{"endless", "", "order-timeout", "within 1ms"},
		{"large", "", "order-result", "1048578 bytes"},
		{"odd", "", "order-failed", "chan int"},
		{"brew", "", "order-unknown", "older than the disc host's: it does not know the order \"brew\", only echo, endless, large"},
	} {
		d.orders <- &provision.Order{ID: int64(i + 1), Kind: c.kind, Args: json.RawMessage(`"a"`)}
		n := d.end(t)
		code, message := "", ""
		if n.Failure != nil {
			code, message = n.Failure.Code, n.Failure.Message
		}
		if n.ID != int64(i+1) || string(n.Result) != c.result || code != c.code || !strings.Contains(message, c.says) || (n.State == provision.OrderDone) != (c.code == "") {
			t.Errorf("%s: %+v %+v", c.kind, n, n.Failure)
		}
	}
	end()
	if said := d.said(); !strings.Contains(said, "line 1 echoing 1/2\n") || !strings.Contains(said, "log orders: order 1 (echo) is done") || !strings.Contains(said, "order 3 (named) failed") {
		t.Error(said)
	}
	if !strings.Contains(log.String(), "orders_test.go") {
		t.Errorf("no stack of the panic in %q", &log)
	}
}

// An order that others rely on ends with its success and with nothing else.
func TestOrderBound(t *testing.T) {
	d := newDesk()
	tries := 0
	k := orderKind{within: time.Millisecond, bound: func(provision.Order) bool { return tries < 100 }}
	k.do = func(ctx context.Context, task task, _ progress) (any, error) {
		switch tries++; {
		case tries == 1:
			panic("a mistake")
		case tries == 2:
			<-ctx.Done()
			return nil, ctx.Err()
		case tries < maxTries+5:
			return nil, errors.New("no space")
		}
		return task.Try, nil
	}
	o, isMember := ofKinds(t, d, map[provision.OrderKind]orderKind{"must": k})
	isMember()
	o.begin(t)
	d.orders <- &provision.Order{ID: 1, Kind: "must"}
	if n := d.end(t); n.State != provision.OrderDone || string(n.Result) != "15" {
		t.Errorf("it ended %+v: %v", n, n.Failure)
	}
	for _, want := range []string{"a mistake", "did not end within", "no space"} {
		if said := d.said(); !strings.Contains(said, want) {
			t.Errorf("%q is not said:\n%s", want, said)
		}
	}
}

// One that others no longer rely on, or not yet, fails as any other, also where its
// file cannot be written.
func TestOrderBoundNoMore(t *testing.T) {
	d := newDesk()
	bound := true
	k := orderKind{within: time.Minute, bound: func(provision.Order) bool { return bound }}
	o, isMember := ofKinds(t, d, map[provision.OrderKind]orderKind{"must": k})
	k.do = func(_ context.Context, task task, _ progress) (any, error) {
		// From now on the file cannot be written.
		err := errors.Join(os.RemoveAll(o.path), os.MkdirAll(filepath.Join(o.path, "x"), 0o755))
		bound = task.Try < 3
		return nil, errors.Join(err, errors.New("no space"))
	}
	o.kinds["must"] = k
	isMember()
	o.begin(t)
	d.orders <- &provision.Order{ID: 1, Kind: "must"}
	if n := d.end(t); n.Failure == nil || n.Failure.Code != "order-failed" || !strings.Contains(d.said(), "begins again: it was cut off 2 times") {
		t.Errorf("it ended %+v: %v\n%s", n, n.Failure, d.said())
	}
}

// An order that has ended is not carried out again, one that was cut off is,
// and told that it is a repetition; but not for ever.
func TestOrderOnce(t *testing.T) {
	d := newDesk()
	tries := make(chan int, 100)
	let := make(chan struct{})
	kinds := map[provision.OrderKind]orderKind{"count": doing(func(ctx context.Context, task task, _ progress) (any, error) {
		tries <- task.Try
		select {
		case <-let:
			return task.Try, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})}
	o, isMember := ofKinds(t, d, kinds)
	isMember()
	order := &provision.Order{ID: 7, Kind: "count", Created: time.Unix(5, 0)}
	end := o.begin(t)
	d.orders <- order
	if n := wait(t, tries); n != 1 {
		t.Fatal(n)
	}
	end() // cut off
	if len(d.ends) > 0 {
		t.Fatalf("%+v", <-d.ends)
	}
	end = o.begin(t) // goes on without being asked
	if n := wait(t, tries); n != 2 {
		t.Fatal(n)
	}
	let <- struct{}{}
	if n := d.end(t); n.State != provision.OrderDone || string(n.Result) != "2" {
		t.Fatalf("%+v", n)
	}
	end()
	// The report was lost: the order comes again, and then once more.
	end = o.begin(t)
	for range 2 {
		d.orders <- order
		if n := d.end(t); n.State != provision.OrderDone || string(n.Result) != "2" {
			t.Fatalf("%+v", n)
		}
	}
	// The same number in another journal is another order.
	d.orders <- &provision.Order{ID: 7, Kind: "count", Created: time.Unix(6, 0)}
	if n := wait(t, tries); n != 1 {
		t.Fatal(n)
	}
	end()
	for try := 2; try <= maxTries; try++ {
		end = o.begin(t)
		if n := wait(t, tries); n != try {
			t.Fatal(n)
		}
		end()
	}
	o.begin(t)
	if n := d.end(t); n.Failure == nil || n.Failure.Code != "order-broken" || len(tries) > 0 {
		t.Fatalf("%+v", n)
	}
}

// Before a node is a member only early orders are begun or go on; as soon as it
// is one the disc host is asked for the others.
func TestOrdersWaitForMembership(t *testing.T) {
	d := newDesk()
	begun := make(chan provision.OrderKind, 10)
	note := doing(func(_ context.Context, task task, _ progress) (any, error) { begun <- task.Kind; return nil, nil })
	o, isMember := ofKinds(t, d, map[provision.OrderKind]orderKind{"late": note, provision.OrderDiagnose: note})
	o.records = []record{
		{Order: provision.Order{ID: 1, Kind: "late"}, Tries: 1},
		{Order: provision.Order{ID: 2, Kind: provision.OrderDiagnose}, Tries: 1},
	}
	if err := o.save(); err != nil {
		t.Fatal(err)
	}
	o.begin(t)
	if k := wait(t, begun); k != provision.OrderDiagnose {
		t.Fatal(k)
	}
	if member := wait(t, d.asked); member {
		t.Fatal("asked as a member")
	}
	isMember()
	if k := wait(t, begun); k != "late" {
		t.Fatal(k)
	}
	if member := wait(t, d.asked); !member {
		t.Fatal("not asked as a member")
	}
	for _, id := range []int64{2, 1} {
		if n := d.end(t); n.ID != id || n.State != provision.OrderDone {
			t.Fatalf("%+v", n)
		}
	}
}

// The file stays small, survives being damaged, and an order that cannot be
// noted down is not begun.
func TestOrdersFile(t *testing.T) {
	d := newDesk()
	runs := 0
	o, isMember := ofKinds(t, d, map[provision.OrderKind]orderKind{"count": doing(func(context.Context, task, progress) (any, error) { runs++; return runs, nil })})
	isMember()
	end := o.begin(t)
	for i := range 3 * keptOutcomes {
		d.orders <- &provision.Order{ID: int64(i), Kind: "count"}
		d.end(t)
	}
	end()
	if err := o.load(); err != nil || len(o.records) > keptOutcomes+1 || o.records[len(o.records)-1].Order.ID != 3*keptOutcomes-1 {
		t.Fatalf("%v, %d records", err, len(o.records))
	}
	if info, err := os.Stat(o.path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode(), err)
	}
	if err := os.WriteFile(o.path, []byte(`[{"order":`), 0o600); err != nil {
		t.Fatal(err)
	}
	end = o.begin(t)
	d.orders <- &provision.Order{ID: 3*keptOutcomes - 1, Kind: "count"}
	if n := d.end(t); n.State != provision.OrderDone || runs != 3*keptOutcomes+1 || !strings.Contains(d.said(), "what was begun before is not known any more") {
		t.Fatalf("%+v after %d runs\n%s", n, runs, d.said())
	}
	end()
	if err := errors.Join(os.Remove(o.path), os.Mkdir(o.path, 0o700)); err != nil {
		t.Fatal(err)
	}
	o.begin(t)
	d.orders <- &provision.Order{ID: 100, Kind: "count"}
	if n := d.end(t); n.Failure == nil || n.Failure.Code != "order-record" || runs != 3*keptOutcomes+1 {
		t.Fatalf("%+v after %d runs", n, runs)
	}
}

// office is a disc host on real TLS that can be away.
type office struct {
	t    *testing.T
	dir  string
	addr string
	host *dischost.Host
	st   *store.Store
	site *site.Site
	stop func()
}

func newOffice(t *testing.T) *office {
	f := &office{t: t, dir: t.TempDir(), addr: "127.0.0.1:0"}
	f.start()
	t.Cleanup(func() { f.stop() })
	return f
}

func (f *office) check(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *office) start() {
	f.t.Helper()
	rack := &provision.Rack{Nodes: []provision.Node{{Name: "node1", MAC: "52:54:00:00:00:01", Address: netip.MustParseAddr("10.9.0.11")}}}
	var err error
	f.site, err = site.Open(f.dir)
	f.check(err)
	f.st, err = store.Open(filepath.Join(f.dir, "journal.db"), time.Now)
	f.check(err)
	f.check(f.st.SetRack(f.t.Context(), rack))
	f.host = dischost.New(dischost.Config{Rack: rack, Store: f.st, Site: f.site, Clock: time.Now, Log: slog.New(slog.DiscardHandler)})
	cfg, err := f.site.ServerTLS([]netip.Addr{netip.MustParseAddr("127.0.0.1")})
	f.check(err)
	l, err := net.Listen("tcp", f.addr)
	f.check(err)
	f.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	srv := &http.Server{Handler: f.host.NodeAPI(), ErrorLog: log.New(io.Discard, "", 0), BaseContext: func(net.Listener) context.Context { return ctx }}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(tls.NewListener(l, cfg)) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		srv.Close()
		<-done
		if err := f.st.Close(); err != nil {
			f.t.Error(err)
		}
	})
}

func (f *office) enrol() *client.Node {
	f.t.Helper()
	secret, err := f.st.IssueToken(f.t.Context(), store.Token{Node: "node1", Generation: 1, Life: "installer", Plan: &provision.Plan{Node: "node1"}}, time.Hour)
	f.check(err)
	n, _, err := client.Enrol(f.t.Context(), "https://"+f.addr, f.site.Pin(), secret)
	f.check(err)
	f.t.Cleanup(n.Close)
	f.check(n.Report(f.t.Context(), []provision.Report{{Stage: provision.StageInstalled}}))
	return n
}

func (f *office) await(id int64) provision.OrderStatus {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 60*time.Second)
	defer cancel()
	o, err := f.host.Await(ctx, id)
	f.check(err)
	return o
}

// The disc host is away when an order ends, and the node loses power before it
// is back: the order was carried out once. The same while an order is under
// way: it goes on without the disc host.
func TestOrdersWithoutTheDiscHost(t *testing.T) {
	f := newOffice(t)
	node := f.enrol()
	tries, let := make(chan int, 10), make(chan struct{})
	kinds := map[provision.OrderKind]orderKind{"count": doing(func(ctx context.Context, task task, say progress) (any, error) {
		say("counting", 1, 2)
		tries <- task.Try
		select {
		case <-let:
			return task.Try, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})}
	dir := t.TempDir()
	member, isMember := context.WithCancel(t.Context())
	isMember()
	// boot starts the node's side; the returned function ends it and what was
	// not reported is lost.
	boot := func() (powerOff func()) {
		rep := client.NewReporter(nil)
		rep.Attach(node)
		o := &orders{path: filepath.Join(dir, "orders.json"), kinds: kinds, next: node.NextOrder, rep: rep, log: io.Discard, member: member, retry: time.Second}
		end := o.begin(t)
		return sync.OnceFunc(func() { end(); rep.Close() })
	}
	ended := func(id int64) bool {
		b, err := os.ReadFile(filepath.Join(dir, "orders.json"))
		f.check(err)
		var records []record
		f.check(json.Unmarshal(b, &records))
		last := records[len(records)-1]
		return last.Order.ID == id && last.End != nil
	}

	off := boot()
	id, err := f.host.Order(t.Context(), "node1", "count", nil, 0)
	f.check(err)
	if n := wait(t, tries); n != 1 {
		t.Fatal(n)
	}
	f.stop()
	let <- struct{}{}
	for limit := time.Now().Add(10 * time.Second); !ended(id); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the end is not in the file")
		}
	}
	off()
	f.start()
	if o, _, _ := f.st.FindOrder(id); o.State != provision.OrderAccepted {
		t.Fatalf("%+v", o)
	}
	off = boot()
	if o := f.await(id); o.State != provision.OrderDone || string(o.Result) != "1" || len(tries) > 0 {
		t.Fatalf("%+v, %d more tries", o, len(tries))
	}

	id, err = f.host.Order(t.Context(), "node1", "count", nil, 0)
	f.check(err)
	if n := wait(t, tries); n != 1 {
		t.Fatal(n)
	}
	off()
	f.stop()
	off = boot()
	defer func() { off() }()
	if n := wait(t, tries); n != 2 {
		t.Fatal(n)
	}
	let <- struct{}{}
	f.start()
	if o := f.await(id); o.State != provision.OrderDone || string(o.Result) != "2" {
		t.Fatalf("%+v", o)
	}
	// And as if nothing had been, the next one.
	id, err = f.host.Order(t.Context(), "node1", "unheard-of", nil, 0)
	f.check(err)
	if o := f.await(id); o.Failure == nil || o.Failure.Code != "order-unknown" {
		t.Fatalf("%+v", o)
	}
}

// TestDiagnose: what is wrong with the host and with its member is found, and
// what cannot be looked at fails.
func TestDiagnose(t *testing.T) {
	w := work{look: func(context.Context) (stack.Cluster, error) { return stack.Cluster{}, errors.New("refused") },
		alarms: func() []string { return []string{"low: 4 % left"} },
		troubles: func(context.Context, time.Duration) []stack.Trouble {
			return []stack.Trouble{{About: "web", Text: "web is down"}}
		}}
	d := newDesk()
	sink := progress(func(line string, done, total int64) { d.add(fmt.Sprintf("%s %d/%d", line, done, total)) })
	host := func(ctx context.Context, p hostprep.Progress) ([]hostprep.Result, error) {
		return hostprep.Check(ctx, (&hostprep.Host{Root: t.TempDir(), Self: hostprep.NodeSelf}).Steps(), p)
	}
	got, err := diagnosing(host, provision.Plan{}, w)(t.Context(), task{}, sink)
	if err != nil {
		t.Fatal(err)
	}
	diagnosis := got.(provision.Diagnosis)
	results, err := hostcmd.Unmarshal(diagnosis.Host)
	if err != nil || len(results) != len((&hostprep.Host{}).Steps()) || hostcmd.Code(results) == 0 {
		t.Errorf("%d results, %v: %s", len(results), err, diagnosis.Host)
	}
	if diagnosis.Stack != "refused" || len(diagnosis.Alarms) != 1 || len(diagnosis.Troubles) != 1 || diagnosis.Running == nil {
		t.Errorf("%+v", diagnosis)
	}
	if said := d.said(); !strings.Contains(said, fmt.Sprintf("checking kernel 0/%d", len(results))) || !strings.Contains(said, "cluster 0/0") {
		t.Error(said)
	}
	if len(diagnosis.Limits) != 2 || diagnosis.Limits[1].Is != "nobody listens on port 5222" || diagnosis.Versions["kernel"] == "" {
		t.Errorf("%+v %v", diagnosis.Limits, diagnosis.Versions)
	}
	broken := func(context.Context, hostprep.Progress) ([]hostprep.Result, error) {
		return nil, errors.New("no systemd")
	}
	if _, err := diagnosing(broken, provision.Plan{}, w)(t.Context(), task{}, sink); err == nil || err.Error() != "no systemd" {
		t.Error(err)
	}
}
