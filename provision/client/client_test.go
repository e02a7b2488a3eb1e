package client_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
)

// discHost is a node API of this test's own on real TLS: what it does with a
// request is up to serve.
type discHost struct {
	site *site.Site
	url  string
	srv  *http.Server
}

func serveTLS(t *testing.T, s *site.Site, addr string, h http.Handler) *discHost {
	t.Helper()
	cfg, err := s.ServerTLS([]netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ErrorLog: nil}
	srv.ErrorLog = quiet
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(tls.NewListener(l, cfg)) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return &discHost{s, "https://" + l.Addr().String(), srv}
}

func newSite(t *testing.T) *site.Site {
	t.Helper()
	s, err := site.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// enrolAs answers every enrolment with an identity of node.
func enrolAs(s *site.Site, node string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req client.EnrolRequest
		json.NewDecoder(r.Body).Decode(&req)
		cert, err := s.SignNode(req.CSR, site.Peer{Node: node, Generation: 1})
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		json.NewEncoder(w).Encode(client.EnrolReply{Node: node, Generation: 1, Cert: cert, CA: s.CA(), Time: time.Now(),
			Plan: &provision.Plan{Node: node, Generation: 1}})
	}
}

// taker keeps the reports it is sent, each batch once.
type taker struct {
	mu      sync.Mutex
	seen    map[string]bool
	reports []provision.Report
	times   []time.Time // of batches
	fail    func(n int) int
	n       int
	got     chan struct{}
}

func newTaker() *taker { return &taker{seen: map[string]bool{}, got: make(chan struct{}, 1)} }

func (k *taker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.n++
	status := 0
	if k.fail != nil {
		status = k.fail(k.n)
	}
	if status > 0 {
		http.Error(w, "no", status)
		return
	}
	var batch []provision.Report
	id := r.Header.Get(client.BatchHeader)
	if err := json.Unmarshal(b, &batch); err != nil || id == "" || len(batch) > client.MaxBatch || len(b) > client.MaxBatchSize {
		http.Error(w, "bad", 400)
		return
	}
	if !k.seen[id] {
		k.seen[id] = true
		k.reports = append(k.reports, batch...)
		k.times = append(k.times, time.Now())
	}
	if status < 0 { // taken, but the reply is lost
		panic(http.ErrAbortHandler)
	}
	select {
	case k.got <- struct{}{}:
	default:
	}
}

func (k *taker) all() []provision.Report {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]provision.Report(nil), k.reports...)
}

func mux(s *site.Site, reports http.Handler) *http.ServeMux {
	m := http.NewServeMux()
	m.Handle("POST "+client.PathEnrol, enrolAs(s, "node1"))
	m.Handle("POST "+client.PathReports, reports)
	return m
}

func enrol(t *testing.T, d *discHost, opts ...client.Option) *client.Node {
	t.Helper()
	n, plan, err := client.Enrol(t.Context(), d.url, d.site.Pin(), "token", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	if plan == nil || plan.Node != "node1" {
		t.Fatalf("plan %+v", plan)
	}
	return n
}

func codeOf(err error) string {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// The pin decides who is the disc host; the address has to be its own too.
func TestPin(t *testing.T) {
	ours, other := newSite(t), newSite(t)
	d := serveTLS(t, ours, "127.0.0.1:0", mux(ours, newTaker()))
	enrol(t, d)
	_, _, err := client.Enrol(t.Context(), d.url, other.Pin(), "token")
	if codeOf(err) != client.CodeWrongServer || client.Retryable(err) {
		t.Fatal(err)
	}
	// The right certificate at an address that it does not name.
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(d.url, "https://"))
	l, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		in, err := l.Accept()
		if err != nil {
			return
		}
		defer in.Close()
		out, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			return
		}
		defer out.Close()
		go io.Copy(out, in)
		io.Copy(in, out)
	}()
	_, _, err = client.Enrol(t.Context(), "https://"+l.Addr().String(), ours.Pin(), "token")
	if codeOf(err) != client.CodeWrongServer {
		t.Fatal(err)
	}
	for _, bad := range []struct{ url, pin string }{{"http://127.0.0.1", ours.Pin()}, {"", ours.Pin()}, {d.url, ""}, {d.url, "abcd"}, {d.url, ours.Pin() + "00"}} {
		if _, _, err := client.Enrol(t.Context(), bad.url, bad.pin, "token"); err == nil {
			t.Errorf("%q with pin %q", bad.url, bad.pin)
		}
	}
	// A server of another site under our address, after enrolment.
	n := enrol(t, d)
	id := n.Identity()
	impostor := serveTLS(t, other, "127.0.0.1:0", mux(other, newTaker()))
	id.URL = impostor.url
	n2, err := client.NewNode(id)
	if err != nil {
		t.Fatal(err)
	}
	defer n2.Close()
	if _, err := n2.Plan(t.Context()); codeOf(err) != client.CodeWrongServer || client.Retryable(err) {
		t.Fatal(err)
	}
}

// A node's clock may say anything.
func TestWrongClock(t *testing.T) {
	s := newSite(t)
	d := serveTLS(t, s, "127.0.0.1:0", mux(s, newTaker()))
	for _, at := range []time.Time{time.Unix(0, 0), time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)} {
		n := enrol(t, d, client.WithClock(func() time.Time { return at }))
		if off := time.Since(n.Time()); off > time.Minute || off < -time.Minute {
			t.Fatalf("with a clock of %v the node's time is off by %v", at, off)
		}
		if err := n.Report(t.Context(), []provision.Report{{Log: "x"}}); codeOf(err) != "http-400" {
			t.Fatal(err) // it got there: this taker wants a batch's name
		}
	}
	// Installed, with a dead clock battery or one that is years ahead: it gets there,
	// and learns how wrong it is.
	for _, off := range []time.Duration{-time.Since(time.Unix(0, 0)), 3 * 365 * 24 * time.Hour, 60 * 365 * 24 * time.Hour, 0} {
		n, err := client.NewNode(enrol(t, d).Identity(), client.WithClock(func() time.Time { return time.Now().Add(off) }))
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		if _, known := n.Ahead(); known {
			t.Error("the disc host's clock is known before its first reply")
		}
		if err := n.Report(t.Context(), nil); codeOf(err) != "http-400" {
			t.Fatalf("with a clock that is off by %s: %v", off, err)
		}
		if ahead, known := n.Ahead(); !known || (ahead-off).Abs() > 30*time.Second {
			t.Errorf("a clock that is off by %s is off by %s, %v", off, ahead, known)
		}
	}
}

// A lost reply, then a server that is away: one enrolment, one key.
func TestEnrolAgain(t *testing.T) {
	s := newSite(t)
	var mu sync.Mutex
	var keys []string
	m := http.NewServeMux()
	m.HandleFunc("POST "+client.PathEnrol, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		var req client.EnrolRequest
		json.Unmarshal(b, &req)
		key, err := site.RequestKey(req.CSR)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		keys = append(keys, key)
		n := len(keys)
		mu.Unlock()
		switch n {
		case 1:
			panic(http.ErrAbortHandler)
		case 2:
			http.Error(w, "starting", http.StatusServiceUnavailable)
		default:
			r.Body = io.NopCloser(bytes.NewReader(b))
			enrolAs(s, "node1")(w, r)
		}
	})
	d := serveTLS(t, s, "127.0.0.1:0", m)
	enrol(t, d)
	if len(keys) != 3 || keys[0] != keys[1] || keys[1] != keys[2] {
		t.Fatalf("keys %q", keys)
	}
	// Nobody there, and an answer that is final.
	d.srv.Close()
	start := time.Now()
	_, _, err := client.Enrol(t.Context(), d.url, s.Pin(), "token", client.WithPatience(0))
	if !client.Retryable(err) || time.Since(start) > 5*time.Second {
		t.Fatal(err)
	}
	final := serveTLS(t, s, "127.0.0.1:0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(403)
		fmt.Fprint(w, `{"code":"token-used","message":"used","next":"Boot."}`)
	}))
	_, _, err = client.Enrol(t.Context(), final.url, s.Pin(), "token")
	if codeOf(err) != client.CodeTokenUsed || client.Retryable(err) || !strings.Contains(err.Error(), "used. Boot.") {
		t.Fatal(err)
	}
}

// A server that takes a request and says nothing more does not hold a node.
func TestSilentServer(t *testing.T) {
	s := newSite(t)
	m := mux(s, newTaker())
	release := make(chan struct{})
	m.HandleFunc("GET "+client.PathPlan, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
		}
	})
	d := serveTLS(t, s, "127.0.0.1:0", m)
	defer close(release)
	n := enrol(t, d, client.WithIdle(100*time.Millisecond))
	start := time.Now()
	_, err := n.Plan(t.Context())
	if !client.Retryable(err) || time.Since(start) > 10*time.Second {
		t.Fatalf("%v after %v", err, time.Since(start))
	}
}

// A disc host that copies its state on a slow disk is waited for: a node that began
// anew would keep it from ever ending.
func TestSlowHandover(t *testing.T) {
	s := newSite(t)
	m := mux(s, newTaker())
	slow := func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(500 * time.Millisecond)
		io.WriteString(w, `{"node":"node1"}`)
	}
	m.HandleFunc("GET "+client.PathHandover+"/7", slow)
	m.HandleFunc("POST "+client.PathHandover+"/7/state", slow)
	n := enrol(t, serveTLS(t, s, "127.0.0.1:0", m), client.WithIdle(100*time.Millisecond))
	for _, ask := range []func(context.Context, int64) (provision.HandoverList, error){n.Handover, n.HandoverState} {
		if l, err := ask(t.Context(), 7); err != nil || l.Node != "node1" {
			t.Errorf("%+v, %v", l, err)
		}
	}
}

// Lines arrive once and in order although every second request fails, half of
// these after the server has taken it.
func TestReporterOnceAndInOrder(t *testing.T) {
	s, k := newSite(t), newTaker()
	k.fail = func(n int) int { return []int{0, 500, 0, -1}[n%4] }
	d := serveTLS(t, s, "127.0.0.1:0", mux(s, k))
	var echo bytes.Buffer
	r := client.NewReporter(&echo)
	r.Stage(provision.StageInstalling)
	r.Logf("line 0")
	r.Attach(enrol(t, d))
	defer r.Close()
	for i := 1; i < 6; i++ {
		r.Logf("line %d\n", i)
		if err := r.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	r.Facts(map[string]string{"disk": "/dev/vda"})
	r.Fail(&provision.Failure{Code: "x", Message: "it broke", Next: "Mend it."})
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Close()
	var got []string
	for _, rep := range k.all() {
		if rep.Time.IsZero() {
			t.Fatalf("no time: %+v", rep)
		}
		switch {
		case rep.Stage != "":
			got = append(got, string(rep.Stage))
		case rep.Log != "":
			got = append(got, rep.Log)
		case rep.Facts != nil:
			got = append(got, "facts "+rep.Facts["disk"])
		case rep.Failure != nil:
			got = append(got, "failure "+rep.Failure.Code)
		}
	}
	want := "installing line 0 line 1 line 2 line 3 line 4 line 5 facts /dev/vda failure x"
	if strings.Join(got, " ") != want {
		t.Fatalf("got  %s\nwant %s", strings.Join(got, " "), want)
	}
	for _, line := range []string{"== installing\n", "line 3\n", "failed: it broke. Mend it.\n"} {
		if !strings.Contains(echo.String(), line) {
			t.Errorf("%q is not in the echo:\n%s", line, echo.String())
		}
	}
}

// However much is said while nobody listens, memory stays bounded and what
// matters is kept.
func TestReporterBounded(t *testing.T) {
	s, k := newSite(t), newTaker()
	r := client.NewReporter(io.Discard)
	r.Stage(provision.StageInstalling)
	r.Phase("write", 4, 7)
	for i := range 20000 {
		r.Logf("%d %s", i, strings.Repeat("é", 700))
		r.Progress(int64(i), 20000)
	}
	r.Facts(map[string]string{"kernel": "6.12"})
	held, size := r.Held()
	if held > 4096 || size > 4<<20 {
		t.Fatalf("%d reports, %d bytes held", held, size)
	}
	r.Logf("%s", strings.Repeat("x", 1<<20)+"\xff")
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := r.Flush(short); err == nil || !strings.Contains(err.Error(), "not enrolled") {
		t.Fatal(err)
	}
	d := serveTLS(t, s, "127.0.0.1:0", mux(s, k))
	r.Attach(enrol(t, d))
	defer r.Close()
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := k.all()
	var stage, phase, facts, dropped, progress, last bool
	for _, rep := range got {
		stage = stage || rep.Stage == provision.StageInstalling
		phase = phase || rep.Phase == "write" && rep.Total == 0
		facts = facts || rep.Facts["kernel"] == "6.12"
		dropped = dropped || strings.Contains(rep.Log, "were dropped")
		progress = progress || rep.Done == 19999 && rep.Total == 20000 && rep.Phase == "write" && rep.PhaseN == 4
		last = last || strings.HasPrefix(rep.Log, "19999 ")
		if len(rep.Log) > client.MaxLogLine {
			t.Fatalf("a line of %d bytes", len(rep.Log))
		}
	}
	if !stage || !phase || !facts || !dropped || !progress || !last {
		t.Fatalf("stage %v phase %v facts %v dropped %v progress %v last line %v of %d", stage, phase, facts, dropped, progress, last, len(got))
	}
}

// Progress is sent at most twice a second, the last one always.
func TestReporterCoalesces(t *testing.T) {
	s, k := newSite(t), newTaker()
	d := serveTLS(t, s, "127.0.0.1:0", mux(s, k))
	r := client.NewReporter(nil)
	r.Attach(enrol(t, d))
	defer r.Close()
	start := time.Now()
	for i := int64(1); time.Since(start) < 1200*time.Millisecond; i++ {
		r.Progress(i, 1<<40)
		runtime.Gosched()
	}
	r.Progress(1<<40, 1<<40)
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := k.all()
	if most := int(time.Since(start)/(500*time.Millisecond)) + 1; len(got) > most || len(got) < 2 {
		t.Fatalf("%d progress reports in %v", len(got), time.Since(start))
	}
	if got[len(got)-1].Done != 1<<40 {
		t.Fatal("the last count is not the last")
	}
	r.Phase("first", 1, 3)
	r.Progress(0, 0)
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if last := k.all()[len(k.all())-1]; !last.IsProgress() {
		t.Fatalf("a sign of life would be kept: %+v", last)
	}
	// A new phase makes the old one's count void.
	r.Progress(1, 2)
	r.Phase("next", 2, 3)
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if last := k.all()[len(k.all())-1]; last.Phase != "next" || last.Total != 0 {
		t.Fatalf("%+v", last)
	}
}

// A batch that the server calls malformed does not block what comes after it.
func TestReporterGivesUpOnMalformed(t *testing.T) {
	s, k := newSite(t), newTaker()
	k.fail = func(n int) int { return []int{400, 413, 0}[min(n-1, 2)] }
	d := serveTLS(t, s, "127.0.0.1:0", mux(s, k))
	r := client.NewReporter(nil)
	r.Attach(enrol(t, d))
	defer r.Close()
	for _, line := range []string{"one", "two", "three"} {
		r.Logf("%s", line)
		if err := r.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := k.all(); len(got) != 1 || got[0].Log != "three" {
		t.Fatalf("%+v", got)
	}
}

// A server that is switched off is worth another try; a caller's own limit is not.
func TestRetryable(t *testing.T) {
	_, timeout := (&net.Dialer{Timeout: time.Nanosecond}).Dial("tcp", "127.0.0.1:1")
	if !errors.Is(timeout, context.DeadlineExceeded) {
		t.Fatal("the premise: ", timeout)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	past, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false}, {timeout, true}, {fmt.Errorf("x: %w", timeout), true}, {ended.Err(), false}, {past.Err(), false}, {io.ErrUnexpectedEOF, true},
		{&client.Error{Status: 503}, true}, {&client.Error{Status: 429}, true}, {&client.Error{Status: 409}, false}, {&client.Error{Code: client.CodeWrongServer}, false},
	} {
		if got := client.Retryable(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

func TestOperatorWithoutServer(t *testing.T) {
	op := client.NewOperator(filepath.Join(t.TempDir(), "no.sock"))
	_, err := op.Nodes(t.Context())
	if codeOf(err) != client.CodeNotRunning || !strings.Contains(err.Error(), "no.sock") {
		t.Fatal(err)
	}
	for _, err := range op.Events(t.Context(), 0) {
		if codeOf(err) != client.CodeNotRunning {
			t.Fatal(err)
		}
		break
	}
}

// The event stream is read as the standard says, and goes on after the last id
// whatever breaks it.
func TestEventsGoOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var asked []string
	parts := []string{
		"retry: 1000\n\n: alive\n\nid: 4\ndata: {\"id\":4,\"node\":\"node1\"}\n\nid: 7\nevent: state\ndata: {\"name\":\"node1\"}\n\nid: 9\ndata: {\"id\":9",
		"", // at once
		"id:9\ndata:{\"id\":9,\ndata:\"node\":\"node2\"}\n\n",
		"data: nonsense\n\n",
		"id: 10\ndata: {\"id\":10}\n\n",
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.URL.Query().Get("after"))
		io.WriteString(w, parts[min(len(asked), len(parts))-1])
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	defer func() { srv.Close(); <-done }()
	op := client.NewOperator(path)
	defer op.Close()
	var ids []int64
	states, failures := 0, 0
	for u, err := range op.Events(t.Context(), 3) {
		switch {
		case err != nil:
			failures++
		case u.State != nil:
			states++
		default:
			ids = append(ids, u.Event.ID)
		}
		if len(ids) > 0 && ids[len(ids)-1] == 10 {
			break
		}
	}
	if fmt.Sprint(ids) != "[4 9 10]" || states != 1 || failures != 4 {
		t.Fatalf("ids %v, %d states, %d failures", ids, states, failures)
	}
	mu.Lock()
	defer mu.Unlock()
	if fmt.Sprint(asked) != "[3 7 7 9 9]" {
		t.Fatalf("asked after %v", asked)
	}
}
