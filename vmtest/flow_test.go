//go:build e2e || bench

package vmtest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"mellium.im/sasl"
	"mellium.im/xmpp"
	"mellium.im/xmpp/jid"

	"platter/provision"
	"platter/provision/stack/session"
)

// A flow is users who write to each other all the time, as people outside of
// the rack do: each is at home on one node and goes to the next when that one
// is away. It knows which messages a server has acknowledged (XEP-0198) and
// what became of them.
type flow struct {
	r     *rig
	cmd   *exec.Cmd
	in    io.Closer
	out   *json.Decoder
	began time.Time
}

// flowPlan is what a flow is told.
type flowPlan struct {
	Domain, CA string
	Addresses  []string // of the nodes' XMPP ports
	Users      []string // user i is at home on node i mod len(Addresses); its password is its name
}

// flowResult is what it has found.
type flowResult struct {
	Sent, Acked, Delivered, Archived int
	Lost                             []flowMessage // acknowledged, and neither delivered nor in the recipient's archive
	Logins                           map[string]int
	// Gap is the longest time in which nothing reached anybody, MaxDelay the
	// longest from sending to delivery, in ms.
	Gap, MaxDelay int64
}

type flowMessage struct {
	ID, From, To string
	At           int64 // ms after the begin
}

const runFlow = "run-flow"

func init() {
	if len(os.Args) == 2 && os.Args[1] == runFlow {
		if err := flowMain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// flow makes users and lets them write. one is a box that runs.
func (r *rig) flow(boxes []*box, one *box, users int) *flow {
	r.t.Helper()
	p := flowPlan{Domain: "im.e2e.example", CA: one.sh("cat /etc/ejabberd/platter-ca.pem")}
	for _, b := range boxes {
		p.Addresses = append(p.Addresses, b.addr+":5222")
	}
	for i := range users {
		name := fmt.Sprintf("user%d", i)
		p.Users = append(p.Users, name)
		one.register(name, p.Domain)
	}
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(r.bin(), "lab", "exec", "--state", r.lab, "--", self, runFlow)
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	log, err3 := os.Create(filepath.Join(r.dir, "flow.log"))
	if err := errors.Join(err1, err2, err3); err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	f := &flow{r: r, cmd: cmd, in: in, out: json.NewDecoder(out), began: time.Now()}
	if err := json.NewEncoder(in).Encode(p); err != nil {
		r.t.Fatal(err)
	}
	var up string
	if err := f.out.Decode(&up); err != nil {
		r.t.Fatalf("the flow does not begin: %v\n%s", err, r.read("flow.log"))
	}
	return f
}

// register makes an account, quicker than ejabberdctl does.
func (b *box) register(user, domain string) {
	b.r.t.Helper()
	out := b.sh(fmt.Sprintf(`echo 'lists:flatten(io_lib:format("~0p", [ejabberd_auth:try_register(<<"%s">>, <<"%s">>, <<"%s">>)])).' |
HOME=/var/lib/ejabberd setpriv --reuid ejabberd --regid ejabberd --clear-groups erl_call -h test$$ -address %s:5210 -e`, user, domain, user, b.addr))
	if !strings.Contains(out, `"ok"`) && !strings.Contains(out, "exists") {
		b.r.t.Fatalf("account %s: %s", user, out)
	}
}

// end stops the writing and tells what became of it all.
func (f *flow) end() flowResult {
	f.r.t.Helper()
	f.in.Close()
	var res flowResult
	if err := f.out.Decode(&res); err != nil {
		f.r.t.Fatalf("the flow: %v\n%s", err, f.r.read("flow.log"))
	}
	if err := f.cmd.Wait(); err != nil {
		f.r.t.Fatal(err)
	}
	f.r.t.Logf("flow: %d sent, %d acknowledged, %d of these delivered, %d more in the archive, %d lost; longest silence %d ms, longest delay %d ms; log-ins %v",
		res.Sent, res.Acked, res.Delivered, res.Archived, len(res.Lost), res.Gap, res.MaxDelay, res.Logins)
	return res
}

// flowMain is a flow's process, in the lab's network.
func flowMain() error {
	var p flowPlan
	in := json.NewDecoder(os.Stdin)
	if err := in.Decode(&p); err != nil {
		return err
	}
	w := &writing{p: p, began: time.Now(), all: map[string]*flowed{}, logins: map[string]int{}}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	var users []*writer
	for i, name := range p.Users {
		u := &writer{w: w, name: name, to: p.Users[(i+1)%len(p.Users)], at: i % len(p.Addresses)}
		users = append(users, u)
		wg.Go(func() { u.live(ctx) })
	}
	for w.deliveries() < 3*len(users) {
		time.Sleep(20 * time.Millisecond)
	}
	out := json.NewEncoder(os.Stdout)
	out.Encode("up")
	in.Decode(new(any)) // until the test closes it
	w.mu.Lock()
	w.over = true
	w.mu.Unlock()
	for began := time.Now(); time.Since(began) < 30*time.Second && !w.settled(); {
		time.Sleep(50 * time.Millisecond)
	}
	cancel()
	wg.Wait()
	res, err := w.result(users)
	if err != nil {
		return err
	}
	return out.Encode(res)
}

// writing is all that was written.
type writing struct {
	p     flowPlan
	began time.Time

	mu       sync.Mutex
	over     bool
	all      map[string]*flowed
	order    []*flowed
	logins   map[string]int
	arrived  int
	last     time.Time
	gap, max time.Duration
}

type flowed struct {
	flowMessage
	sent             time.Time
	acked, delivered bool
}

func (w *writing) deliveries() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.arrived
}

func (w *writing) acked(ids ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		if m := w.all[id]; m != nil {
			m.acked = true
		}
	}
}

// settled: whatever was acknowledged has arrived.
func (w *writing) settled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range w.order {
		if m.acked && !m.delivered {
			return false
		}
	}
	return true
}

func (w *writing) result(users []*writer) (flowResult, error) {
	archive := map[string]map[string]bool{}
	for _, u := range users {
		a, err := u.archive()
		if err != nil {
			return flowResult{}, fmt.Errorf("archive of %s: %w", u.name, err)
		}
		archive[u.name] = a
	}
	res := flowResult{Sent: len(w.order), Logins: w.logins, Gap: w.gap.Milliseconds(), MaxDelay: w.max.Milliseconds()}
	for _, m := range w.order {
		if !m.acked {
			continue
		}
		res.Acked++
		switch {
		case m.delivered:
			res.Delivered++
		case archive[m.To][m.ID]:
			res.Archived++
		default:
			res.Lost = append(res.Lost, m.flowMessage)
		}
	}
	return res, nil
}

// writer is one user.
type writer struct {
	w        *writing
	name, to string
	at       int // index of the node
}

func (u *writer) connect(ctx context.Context) (*xmpp.Session, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(u.w.p.CA))
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", u.w.p.Addresses[u.at])
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return xmpp.NewClientSession(ctx, jid.MustParse(u.name+"@"+u.w.p.Domain), conn,
		xmpp.StartTLS(&tls.Config{RootCAs: roots, ServerName: u.w.p.Domain}),
		xmpp.SASL("", u.name, sasl.ScramSha256, sasl.ScramSha1), xmpp.BindResource())
}

// live keeps the user logged in, on the next node where one does not answer.
func (u *writer) live(ctx context.Context) {
	for ctx.Err() == nil {
		s, err := u.connect(ctx)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s %s at %s: %v\n", time.Now().Format("15:04:05.000"), u.name, u.w.p.Addresses[u.at], err)
			u.at = (u.at + 1) % len(u.w.p.Addresses)
			provision.Sleep(ctx, 200*time.Millisecond)
			continue
		}
		u.w.mu.Lock()
		u.w.logins[u.w.p.Addresses[u.at]]++
		u.w.mu.Unlock()
		u.write(ctx, s)
	}
}

// write is one session, until it breaks.
func (u *writer) write(ctx context.Context, s *xmpp.Session) {
	m, err := session.Manage(ctx, s, u.w.acked, func(in session.Incoming) {
		if in.Type == "error" {
			fmt.Fprintf(os.Stderr, "%s %s gets %s back\n", time.Now().Format("15:04:05.000"), u.name, in.Body)
		} else {
			u.w.deliver(in.Body)
		}
	})
	if err != nil {
		return
	}
	defer m.Close()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for silent := time.Now(); ; {
		select {
		case <-m.Broken:
			return
		case <-ctx.Done():
			return
		case <-m.Heard:
			silent = time.Now()
			continue
		case <-tick.C:
		}
		if time.Since(silent) > 8*time.Second { // every tick asks for an answer
			return
		}
		if text := u.w.add(u); text != nil && m.Send(ctx, jid.MustParse(u.to+"@"+u.w.p.Domain), text.ID) != nil {
			return
		}
		if m.Ask(ctx) != nil {
			return
		}
	}
}

func (w *writing) add(u *writer) *flowed {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over {
		return nil
	}
	now := time.Now()
	m := &flowed{flowMessage: flowMessage{fmt.Sprintf("m%d", len(w.order)), u.name, u.to, now.Sub(w.began).Milliseconds()}, sent: now}
	w.all[m.ID] = m
	w.order = append(w.order, m)
	return m
}

func (w *writing) deliver(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.all[id]
	if m == nil || m.delivered {
		return
	}
	now := time.Now()
	m.delivered = true
	w.arrived++
	if !w.last.IsZero() {
		w.gap = max(w.gap, now.Sub(w.last))
	}
	w.last, w.max = now, max(w.max, now.Sub(m.sent))
}

// archive are the bodies of the messages in the user's archive (XEP-0313).
func (u *writer) archive() (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var s *xmpp.Session
	var err error
	for range 2 * len(u.w.p.Addresses) {
		if s, err = u.connect(ctx); err == nil {
			break
		}
		u.at = (u.at + 1) % len(u.w.p.Addresses)
	}
	if err != nil {
		return nil, err
	}
	defer s.Conn().Close()
	return session.Archived(ctx, s)
}
