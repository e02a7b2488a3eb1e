package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sys/unix"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/dischost"
	"platter/provision/jsonfile"
	"platter/provision/site"
	"platter/provision/store"
)

// oldHost is a disc host that hands its rack over: real TLS, journal and files. It
// can be killed and started again, as 'platter serve' would start.
type oldHost struct {
	t     *testing.T
	dir   string
	addr  string
	rack  *provision.Rack
	files *dischost.Succession
	host  *dischost.Host
	st    *store.Store
	site  *site.Site
	stop  func()
}

func newOldHost(t *testing.T) *oldHost {
	t.Helper()
	dir := t.TempDir()
	h := &oldHost{t: t, dir: dir, addr: "127.0.0.1:0", rack: &provision.Rack{Name: "lab",
		Networks: []provision.Network{{Subnet: netip.MustParsePrefix("10.9.0.0/24"), DiscHost: netip.MustParseAddr("10.9.0.1")}},
		Nodes:    []provision.Node{{Name: "node1", MAC: "52:54:00:00:00:01", Address: netip.MustParseAddr("10.9.0.11")}}}}
	random := rand.NewChaCha8([32]byte{5})
	write := func(name string, size int) string {
		b := make([]byte, size)
		random.Read(b)
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, b, 0o600)); err != nil {
			t.Fatal(err)
		}
		return name
	}
	store, err := images.Open(filepath.Join(dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	h.files = &dischost.Succession{Program: write("program", 300_000), IPXE: filepath.Join(dir, "ipxe"), Rack: write("rack/r.yaml", 500),
		RackFiles: []string{"keys/admin.pub"}, Images: store, State: filepath.Join(dir, "state")}
	write("rack/keys/admin.pub", 80)
	object := write("images/objects/new", 700_000)
	sum, _, err := sumFile(object)
	if err == nil {
		err = os.Rename(object, filepath.Join(filepath.Dir(object), sum))
	}
	if err != nil {
		t.Fatal(err)
	}
	write("images/objects/.new-123", 10) // being written: not handed over
	write("images/refs/boot/amd64", 100)
	h.start()
	t.Cleanup(func() { h.stop() })
	return h
}

func (h *oldHost) start() {
	h.t.Helper()
	check := func(err error) {
		h.t.Helper()
		if err != nil {
			h.t.Fatal(err)
		}
	}
	var err error
	h.site, err = site.Open(filepath.Join(h.files.State, dischost.SiteFolder))
	check(err)
	h.st, err = store.Open(filepath.Join(h.files.State, dischost.JournalFile), time.Now)
	check(err)
	if err := h.st.SetRack(context.Background(), h.rack); !errors.Is(err, store.ErrHandedOver) {
		check(err)
	}
	h.host = dischost.New(dischost.Config{Rack: h.rack, Store: h.st, Site: h.site, Clock: time.Now, Log: slog.New(slog.DiscardHandler), Succession: h.files})
	cfg, err := h.site.ServerTLS([]netip.Addr{netip.MustParseAddr("127.0.0.1")})
	check(err)
	l, err := net.Listen("tcp", h.addr)
	check(err)
	h.addr = l.Addr().String()
	handler := h.host.NodeAPI()
	if provision.StartDecision(h.st.HandedOver(), false) != provision.StartServe {
		handler = h.host.HandedOverToNodes()
	}
	srv := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(tls.NewListener(l, cfg)) }()
	h.stop = sync.OnceFunc(func() {
		srv.Close()
		<-done
		h.host.Close()
		if err := h.st.Close(); err != nil {
			h.t.Error(err)
		}
	})
}

func (h *oldHost) kill() { h.stop(); h.start() }

// order makes node1 an installed node that is carrying out a handover.
func (h *oldHost) order() (*client.Node, provision.Order) {
	h.t.Helper()
	ctx := h.t.Context()
	secret, err := h.st.IssueToken(ctx, store.Token{Node: "node1", Generation: 1, Life: "installer", Plan: &provision.Plan{Node: "node1"}}, time.Hour)
	if err != nil {
		h.t.Fatal(err)
	}
	n, _, err := client.Enrol(ctx, "https://"+h.addr, h.site.Pin(), secret)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(n.Close)
	if err := n.Report(ctx, []provision.Report{{Stage: provision.StageInstalled}}); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.host.Order(ctx, "node1", provision.OrderHandover, nil, time.Hour); err != nil {
		h.t.Fatal(err)
	}
	o, err := n.NextOrder(ctx, true)
	if err != nil || o == nil {
		h.t.Fatal(o, err)
	}
	return n, *o
}

// trouble is something that happens at the call of the API with that number.
type trouble struct {
	at    int
	after bool // the call was carried out, and its answer is lost
	node  bool // the node loses its power; else the old disc host is killed
}

// troubled is the API with one trouble. Each call looks whether both serve.
type troubled struct {
	*client.Node
	trouble
	h       *oldHost
	s       *succession
	calls   int
	fetched map[string]int64 // bytes of files, by path
	power   context.CancelFunc
}

var errPower = errors.New("no power")

func (a *troubled) call(do func() error) error {
	a.onlyOne()
	defer a.onlyOne()
	a.calls++
	mine := a.calls == a.at
	happen := func() error {
		if a.node {
			a.power()
			return errPower
		}
		a.h.kill()
		return errors.New("connection reset")
	}
	if mine && !a.after {
		if err := happen(); a.node {
			return err
		}
	}
	err := do()
	if mine && a.after {
		return happen()
	}
	return err
}

// onlyOne fails when the old disc host and the new one both serve.
func (a *troubled) onlyOne() {
	mark := a.h.st.HandedOver()
	_, err := os.Stat(filepath.Join(a.s.dir, provision.ReceiptFile))
	if mark == nil && err == nil {
		a.h.t.Errorf("call %d: the node has a receipt, and the old disc host serves", a.calls)
	}
}

func (a *troubled) Handover(ctx context.Context, order int64) (l provision.HandoverList, err error) {
	err = a.call(func() error { l, err = a.Node.Handover(ctx, order); return err })
	return l, err
}

func (a *troubled) HandoverState(ctx context.Context, order int64) (l provision.HandoverList, err error) {
	err = a.call(func() error { l, err = a.Node.HandoverState(ctx, order); return err })
	return l, err
}

func (a *troubled) CommitHandover(ctx context.Context, order int64, state string) (r provision.SignedReceipt, err error) {
	err = a.call(func() error { r, err = a.Node.CommitHandover(ctx, order, state); return err })
	return r, err
}

func (a *troubled) HandoverTaken(ctx context.Context, order int64, state string) error {
	return a.call(func() error { return a.Node.HandoverTaken(ctx, order, state) })
}

func (a *troubled) HandoverFile(ctx context.Context, order int64, path string, from int64) (r io.ReadCloser, err error) {
	err = a.call(func() error { r, err = a.Node.HandoverFile(ctx, order, path, from); return err })
	if err != nil && r != nil { // the first half of it was read
		a.cut(path, from, r)
		r = nil
	}
	if err == nil {
		r = &counting{r, func(n int) { a.fetched[path] += int64(n) }}
	}
	return r, err
}

// cut lets the first bytes of a file arrive before the power goes.
func (a *troubled) cut(path string, from int64, r io.ReadCloser) {
	defer r.Close()
	part := filepath.Join(a.s.dir, filepath.Dir(path), ".part-"+filepath.Base(path))
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		a.h.t.Error(err)
		return
	}
	defer f.Close()
	n, _ := io.CopyN(f, r, 10)
	a.fetched[path] += n
}

type counting struct {
	io.ReadCloser
	each func(int)
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.each(n)
	return n, err
}

// TestHandoverCutAnywhere kills the old disc host, or the node, before and after
// every question of a handover. Each time the node is the disc host in the end, and
// at no time both are.
func TestHandoverCutAnywhere(t *testing.T) {
	for _, how := range []trouble{{after: false, node: false}, {after: true, node: false}, {after: false, node: true}, {after: true, node: true}} {
		t.Run(fmt.Sprintf("after=%v,node=%v", how.after, how.node), func(t *testing.T) {
			t.Parallel()
			for how.at = 1; ; how.at++ {
				if calls := handOverWith(t, how); calls < how.at {
					if calls < 9 {
						t.Fatalf("a handover had %d calls only", calls)
					}
					return
				}
			}
		})
	}
}

// handOverWith carries one handover out and returns how many calls it took.
func handOverWith(t *testing.T, how trouble) (calls int) {
	t.Helper()
	h := newOldHost(t)
	node, order := h.order()
	defer h.stop()
	served := 0
	s := &succession{dir: filepath.Join(t.TempDir(), "new"), free: func(string) (int64, error) { return 1 << 40, nil }, ports: func(netip.Addr) error { return nil }, retry: 20 * time.Millisecond, leave: time.Minute}
	s.serve = func(context.Context) error { served++; return nil }
	api := &troubled{Node: node, trouble: how, h: h, s: s, fetched: map[string]int64{}}
	s.api = api
	for cuts := 0; ; cuts++ {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		api.power = cancel
		err := s.run(ctx, order, func(string, int64, int64) {})
		if err == nil {
			cancel()
			break
		}
		// What was under way when the power went may still have counted as a call.
		if !errors.Is(ctx.Err(), context.Canceled) || !how.node || cuts > 0 {
			t.Fatalf("%+v: after %d calls: %v", how, api.calls, err)
		}
		cancel()
	}
	if served != 1 {
		t.Errorf("%+v: the new disc host was started %d times", how, served)
	}
	if m := h.st.HandedOver(); m == nil || !m.Taken || m.Node != "node1" {
		t.Fatalf("%+v: the old disc host says %+v", how, m)
	}
	if provision.StartDecision(h.st.HandedOver(), false) != provision.StartRefuse {
		t.Errorf("%+v: the old disc host would start again", how)
	}

	// Every byte is there, in its mode, and came once, but for what a killed copy of
	// the state had.
	for p, from := range map[string]string{"platter": "program", "rack/rack.yaml": "rack/r.yaml", "rack/keys/admin.pub": "rack/keys/admin.pub",
		"store/refs/boot/amd64": "images/refs/boot/amd64", "state/site/site.json": "state/site/site.json"} {
		want, err1 := os.ReadFile(filepath.Join(h.dir, from))
		got, err2 := os.ReadFile(filepath.Join(s.dir, p))
		if err := errors.Join(err1, err2); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%+v: %s differs: %v", how, p, err)
		}
		if n := api.fetched[p]; !strings.HasPrefix(p, "state/") && n != int64(len(want)) {
			t.Errorf("%+v: of %s %d bytes were fetched instead of %d", how, p, n, len(want))
		}
	}
	for p, want := range map[string]os.FileMode{"platter": 0o755, "state/journal.db": 0o600, "state/site/site.json": 0o600, provision.ReceiptFile: 0o600, "state": 0o700 | os.ModeDir} {
		if st, err := os.Stat(filepath.Join(s.dir, p)); err != nil || st.Mode() != want {
			t.Errorf("%+v: %s: %v %v", how, p, st.Mode(), err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(s.dir, "*/.part-*"))
	if len(left) > 0 {
		t.Errorf("%+v: left over: %v", how, left)
	}
	if _, err := os.Stat(filepath.Join(h.files.State, dischost.CopyFolder)); err == nil {
		t.Errorf("%+v: the copy of the state lies about on the old disc host", how)
	}
	if how.at > 1 {
		return api.calls
	}
	// The new journal knows the past, and that it is to serve.
	st, err := store.Open(filepath.Join(s.dir, "state/journal.db"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := st.SetRack(t.Context(), h.rack); err != nil {
		t.Fatal(err)
	}
	if o, found, _ := st.FindOrder(order.ID); !found || o.State != provision.OrderAccepted || st.HandedOver() != nil {
		t.Errorf("%+v: the new journal has the order %+v and the mark %+v", how, o, st.HandedOver())
	}
	return api.calls
}

// newSuccession is a successor that only has to be given its way to serve.
func newSuccession(t *testing.T, api handoverAPI, serve func(context.Context) error) succession {
	return succession{dir: filepath.Join(t.TempDir(), "new"), api: api, free: func(string) (int64, error) { return 1 << 40, nil },
		ports: func(netip.Addr) error { return nil }, retry: time.Millisecond, leave: 50 * time.Millisecond, serve: serve}
}

// unwritable is a node whose disk takes no receipt at first.
type unwritable struct {
	*client.Node
	dir   *string
	tries int
}

func (u *unwritable) CommitHandover(ctx context.Context, order int64, state string) (provision.SignedReceipt, error) {
	receipt := filepath.Join(*u.dir, provision.ReceiptFile)
	err := os.RemoveAll(receipt)
	if u.tries++; u.tries < 5 {
		err = errors.Join(err, os.MkdirAll(filepath.Join(receipt, "x"), 0o700))
	}
	if err != nil {
		return provision.SignedReceipt{}, err
	}
	return u.Node.CommitHandover(ctx, order, state)
}

// From when the old disc host may have given up the rack, nothing ends the order but
// that it is carried out: nobody would serve.
func TestHandoverBound(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	api := &unwritable{Node: node}
	failed := 0
	s := newSuccession(t, api, func(context.Context) error {
		if failed++; failed < maxTries {
			return errors.New("it does not start")
		}
		return nil
	})
	api.dir = &s.dir
	d := newDesk()
	o, isMember := ofKinds(t, d, map[provision.OrderKind]orderKind{provision.OrderHandover: s.kind()})
	isMember()
	o.begin(t)
	d.orders <- &order
	if n := d.end(t); n.State != provision.OrderDone {
		t.Fatalf("%+v: %v", n, n.Failure)
	}
	if m := h.st.HandedOver(); m == nil || !m.Taken {
		t.Errorf("the old disc host says %+v", m)
	}
	if said := d.said(); !strings.Contains(said, "handover-disk") && !strings.Contains(said, "cannot be kept") || !strings.Contains(said, "it does not start") {
		t.Errorf("the reasons are not said:\n%s", said)
	}
}

// losing loses the answers to a commit.
type losing struct{ *client.Node }

func (l losing) CommitHandover(ctx context.Context, order int64, state string) (provision.SignedReceipt, error) {
	_, err := l.Node.CommitHandover(ctx, order, state)
	return provision.SignedReceipt{}, errors.Join(errors.New("the answer is lost"), err)
}

// What an operator has taken back is not the node's any more: the order fails.
func TestHandoverTakenBack(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	s := newSuccession(t, losing{node}, func(context.Context) error { t.Error("it serves"); return nil })
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := s.run(ctx, order, func(string, int64, int64) {}); err == nil || !s.bound(order) {
		t.Fatalf("without a receipt: %v", err)
	}
	if err := h.st.Append(t.Context(), provision.Event{Kind: provision.EventTakeBack, Node: "node1"}); err != nil {
		t.Fatal(err)
	}
	h.kill()
	s.api = node
	if err := s.run(t.Context(), order, func(string, int64, int64) {}); !client.Refused(err, client.CodeUnknownOrder) || s.bound(order) {
		t.Errorf("after it was taken back: %v, bound: %v", err, s.bound(order))
	}
}

// An old disc host that was killed before it heard that it may go, and comes back
// while the new one waits for its address, hears it then.
func TestHandoverTakenLate(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	api := &killing{Node: node, h: h}
	s := newSuccession(t, api, func(ctx context.Context) error {
		h.start() // much later than leave
		for !h.st.HandedOver().Taken {
			if err := provision.Sleep(ctx, 10*time.Millisecond); err != nil {
				return err
			}
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.run(ctx, order, func(string, int64, int64) {}); err != nil {
		t.Errorf("the old disc host waits for ever: %v", err)
	}
}

// killing kills the old disc host when it has given the receipt.
type killing struct {
	*client.Node
	h *oldHost
}

func (k *killing) CommitHandover(ctx context.Context, order int64, state string) (provision.SignedReceipt, error) {
	defer k.h.stop()
	return k.Node.CommitHandover(ctx, order, state)
}

// A disc host that was handed over changes nothing, and says to whom.
func TestHandedOverRefuses(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	s := succession{dir: filepath.Join(t.TempDir(), "new"), api: node, free: func(string) (int64, error) { return 1 << 40, nil }, ports: func(netip.Addr) error { return nil }, retry: time.Millisecond, leave: time.Minute,
		serve: func(context.Context) error { return nil }}
	if err := s.run(t.Context(), order, func(string, int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	if err := h.st.Append(t.Context(), provision.Event{Kind: provision.EventGrant, Node: "node1", Generation: 2}); !errors.Is(err, store.ErrHandedOver) {
		t.Errorf("the journal was changed: %v", err)
	}
	h.kill()
	if _, err := node.Plan(t.Context()); !client.Refused(err, client.CodeHandedOver) || !strings.Contains(err.Error(), "node1") || !client.Retryable(err) {
		t.Errorf("a node was told %v", err)
	}
	// The same answer again, for whoever lost it; to no other.
	var note provision.HandoverNote
	if err := jsonfile.Read(filepath.Join(s.dir, provision.NoteFile), &note); err != nil {
		t.Fatal(err)
	}
	if _, err := node.CommitHandover(t.Context(), order.ID, note.Digest()); err != nil {
		t.Errorf("the receipt again: %v", err)
	}
	if _, err := node.CommitHandover(t.Context(), order.ID, strings.Repeat("0", 64)); !client.Refused(err, client.CodeStale) {
		t.Errorf("a receipt for another state: %v", err)
	}
	// Taken back, it serves, and the order has failed: the node does not go on by
	// itself.
	if err := h.st.Append(t.Context(), provision.Event{Kind: provision.EventTakeBack, Node: "node1"}); err != nil {
		t.Fatal(err)
	}
	h.kill()
	if _, err := node.Plan(t.Context()); err != nil {
		t.Error(err)
	}
	if o, _, _ := h.st.FindOrder(order.ID); o.State != provision.OrderFailed || o.Failure.Code != "taken-back" {
		t.Errorf("the order is %+v", o)
	}
	if _, err := node.HandoverState(t.Context(), order.ID); !client.Refused(err, client.CodeUnknownOrder) {
		t.Errorf("the state may be had without an order: %v", err)
	}
}

// A successor without room, or with a receipt that is none, does nothing.
func TestHandoverRefused(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	s := succession{dir: filepath.Join(t.TempDir(), "new"), api: node, free: func(string) (int64, error) { return successorSpare + 1_000_000, nil }, ports: func(netip.Addr) error { return nil }, retry: time.Millisecond, leave: time.Minute,
		serve: func(context.Context) error { t.Error("it serves"); return nil }}
	var f *provision.Failure
	if err := s.run(t.Context(), order, func(string, int64, int64) {}); !errors.As(err, &f) || f.Code != "no-room" {
		t.Errorf("without room: %v", err)
	}
	if files, _ := os.ReadDir(s.dir); len(files) > 0 {
		t.Errorf("something was fetched: %v", files)
	}
	s.free = func(string) (int64, error) { return successorSpare + 2_000_000, nil }

	// A file that is damaged each time.
	s.api = damaging{node}
	if err := s.run(t.Context(), order, func(string, int64, int64) {}); !errors.As(err, &f) || f.Code != "handover-damaged" || !strings.Contains(f.Message, "admin.pub") {
		t.Errorf("a damaged file: %v", err)
	}
	// Files that would leave the folder.
	for _, p := range []string{"../escape", "/etc/passwd", "store/../../x", "state/journal.db", "other/file", "rack", "rack/"} {
		s.api = listing{node, provision.HandoverList{Node: "node1", Files: []provision.HandoverFile{{Path: p, Digest: strings.Repeat("0", 64)}}}}
		if err := s.run(t.Context(), order, func(string, int64, int64) {}); err == nil || !strings.Contains(err.Error(), "may not hand over") {
			t.Errorf("%s: %v", p, err)
		}
	}
	// A receipt of another site.
	other := newOldHost(t)
	s.api = forging{node, other}
	if err := s.run(t.Context(), order, func(string, int64, int64) {}); !errors.As(err, &f) || f.Code != "handover-receipt" {
		t.Errorf("a forged receipt: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, provision.ReceiptFile)); err == nil {
		t.Error("a forged receipt was kept")
	}
	if h.st.HandedOver() != nil {
		t.Error("the rack was handed over")
	}
}

type damaging struct{ *client.Node }

func (d damaging) HandoverFile(ctx context.Context, order int64, path string, from int64) (io.ReadCloser, error) {
	r, err := d.Node.HandoverFile(ctx, order, path, from)
	if err != nil || path != "rack/keys/admin.pub" {
		return r, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	b[len(b)/2] ^= 1
	return io.NopCloser(bytes.NewReader(b)), err
}

type listing struct {
	*client.Node
	list provision.HandoverList
}

func (l listing) Handover(context.Context, int64) (provision.HandoverList, error) { return l.list, nil }

type forging struct {
	*client.Node
	other *oldHost
}

func (f forging) CommitHandover(_ context.Context, order int64, state string) (provision.SignedReceipt, error) {
	key, err := f.other.site.SigningKey()
	if err != nil {
		return provision.SignedReceipt{}, err
	}
	text, err := json.Marshal(provision.HandoverReceipt{Rack: "lab", Node: "node1", Order: order, State: state})
	return provision.SignedReceipt{Receipt: text, Signature: minisign.Sign(key, text)}, err
}

// A copy of the state that the disc host has given up is neither to be had nor
// taken: the disc host goes on, and the next copy counts.
func TestHandoverStateAnew(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	ctx := t.Context()
	first, err := node.HandoverState(ctx, order.ID)
	if err != nil {
		t.Fatal(err)
	}
	h.host.Close() // as after frozenFor
	if err := h.st.Append(ctx, provision.Event{Kind: provision.EventReport, Node: "node1", Generation: 1, Report: &provision.Report{Log: "it goes on"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := node.HandoverFile(ctx, order.ID, "state/journal.db", 0); !client.Refused(err, client.CodeStale) {
		t.Errorf("a file of it: %v", err)
	}
	if _, err := node.CommitHandover(ctx, order.ID, first.Digest()); !client.Refused(err, client.CodeStale) {
		t.Errorf("it was taken: %v", err)
	}
	h.kill()
	second, err := node.HandoverState(ctx, order.ID)
	if err != nil || second.Digest() == first.Digest() {
		t.Fatalf("the next copy is the same: %v", err)
	}
	if _, err := node.CommitHandover(ctx, order.ID, first.Digest()); !client.Refused(err, client.CodeStale) {
		t.Errorf("the first copy was taken: %v", err)
	}
	if _, err := node.CommitHandover(ctx, order.ID, second.Digest()); err != nil {
		t.Error(err)
	}
}

// A disc host that cannot tell whether it has given up the rack does not call the
// node's copy stale: that may be the one that its journal names.
func TestHandoverUnsure(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	state, err := node.HandoverState(t.Context(), order.ID)
	if err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", filepath.Join(h.files.State, dischost.JournalFile))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`ALTER TABLE events RENAME TO lost`); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := node.CommitHandover(t.Context(), order.ID, state.Digest()); !client.Retryable(err) {
			t.Errorf("the commit: %v", err)
		}
		if _, err := node.HandoverState(t.Context(), order.ID); !client.Retryable(err) {
			t.Errorf("another copy: %v", err)
		}
	}
	if err := <-h.host.Lost(); err == nil {
		t.Error("the disc host goes on")
	}
}

// Ports that another program has keep a node from being the disc host, but for the
// one that the stack's web server shares.
func TestFreePorts(t *testing.T) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with its network
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		address := netip.MustParseAddr("10.9.0.1")
		if err := freePorts(address); err != nil {
			t.Errorf("with all ports free: %v", err)
		}
		for _, share := range []int{0, 1} {
			lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
				cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, share) })
				return errors.Join(cerr, err)
			}}
			l, err := lc.Listen(t.Context(), "tcp4", ":80")
			if err != nil {
				t.Error(err)
				return
			}
			if err := freePorts(address); (err == nil) != (share == 1) {
				t.Errorf("with port 80 taken, shared: %d: %v", share, err)
			}
			l.Close()
		}
		l, err := net.ListenPacket("udp4", ":67")
		if err != nil {
			t.Error(err)
			return
		}
		defer l.Close()
		var f *provision.Failure
		if err := freePorts(address); !errors.As(err, &f) || !strings.Contains(f.Message, "UDP port 67") {
			t.Errorf("with a DHCP server: %v", err)
		}
	}()
	<-done
}

// Whoever is not carrying a handover out gets nothing of it.
func TestHandoverOfOthers(t *testing.T) {
	h := newOldHost(t)
	node, order := h.order()
	for _, ask := range []func(int64) error{
		func(id int64) error { _, err := node.Handover(t.Context(), id); return err },
		func(id int64) error { _, err := node.HandoverState(t.Context(), id); return err },
		func(id int64) error {
			_, err := node.HandoverFile(t.Context(), id, "state/site/site.json", 0)
			return err
		},
		func(id int64) error { _, err := node.CommitHandover(t.Context(), id, ""); return err },
		func(id int64) error { return node.HandoverTaken(t.Context(), id, "") },
	} {
		if err := ask(order.ID + 1); !client.Refused(err, client.CodeUnknownOrder) {
			t.Errorf("another order: %v", err)
		}
	}
	if _, err := node.HandoverFile(t.Context(), order.ID, "state/site/site.json", 0); err == nil {
		t.Error("the site's secrets are to be had before the end")
	}
	if _, err := node.HandoverFile(t.Context(), order.ID, "../state/site/site.json", 0); err == nil {
		t.Error("any file is to be had")
	}
}
