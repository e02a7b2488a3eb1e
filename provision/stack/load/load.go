package load

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/xml"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"mellium.im/xmlstream"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/stanza"

	"platter/provision"
	"platter/provision/stack/session"
)

// Options say who sends how much, and where.
type Options struct {
	Domain   string              // XMPP domain; also the name that the certificates must carry
	CA       string              // PEM; the only root that is trusted
	Nodes    []Node              // user i logs in on node i mod len(Nodes)
	Accounts []provision.Account // the users, at least two
	Every    time.Duration       // from one message of a user to the next; 10 s
	For      time.Duration       // how long messages are sent; 1 min
	Ramp     int                 // log-ins a second, as long as the nodes keep up; 50
}

// Node is a member of the cluster.
type Node struct {
	Name string
	Addr netip.AddrPort // XMPP client port (STARTTLS); no name is ever looked up
}

const (
	// settle is how long the nodes may take to tell each other where a user is;
	// what is sent to the user earlier may be returned.
	settle = 2 * time.Second
	// grace is how long messages may be under way when the last one was sent.
	grace = 10 * time.Second
	// underWay is how many log-ins are under way at once: what is slow already is
	// not asked for more, so that log-ins get done instead of all timing out.
	underWay = 16
	// tries is how often a user tries to log in at first.
	tries = 3
	// patience bounds one log-in.
	patience = 30 * time.Second
)

// Phase is what a run is busy with.
type Phase string

const (
	LoggingIn Phase = "log-in"
	Sending   Phase = "messages"
	Waiting   Phase = "waiting" // for the last messages
)

// Progress is how far a run has got.
type Progress struct {
	Phase      Phase
	Users      int
	In         int // users who are logged in
	Sent       int
	Delivered  int
	Failed     int // log-ins that failed
	Reconnects int
	Elapsed    time.Duration // of the run
}

// Run carries out one run and closes every session that it opened. progress,
// unless nil, is called once a second and never twice at a time.
//
// Where ctx ends the run, the report tells what was seen until then and the
// error is that of ctx. Every other error means that nothing was tried; users
// who cannot log in and messages that do not arrive are in the report.
func Run(ctx context.Context, o Options, progress func(Progress)) (Report, error) {
	o.Every, o.For, o.Ramp = or(o.Every, 10*time.Second), or(o.For, time.Minute), or(o.Ramp, 50)
	r := &run{Options: o, nonce: rand.Text(), start: time.Now(), slots: make(chan struct{}, underWay), begun: make(chan struct{})}
	if err := r.check(); err != nil {
		return Report{}, err
	}
	for i, a := range o.Accounts {
		to, err := jid.New(a.User, o.Domain, "")
		if err != nil {
			return Report{}, fmt.Errorf("user %q: %w", a.User, err)
		}
		u := &user{r: r, i: i, jid: to}
		u.node.Store(int64(i % len(o.Nodes)))
		r.users = append(r.users, u)
	}
	return r.run(ctx, progress)
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// check names everything that is wrong with the options.
func (r *run) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	var err error
	if r.roots, err = session.Roots(r.CA); err != nil {
		errs = append(errs, err)
	}
	if len(r.Nodes) == 0 {
		bad("there is no node to log in on")
	}
	if len(r.Accounts) < 2 {
		bad("%d users cannot write to each other: at least 2 are needed", len(r.Accounts))
	}
	if r.Every < time.Millisecond || r.For < r.Every {
		bad("one message every %s for %s: the first must be at least 1ms, the second not shorter", r.Every, r.For)
	}
	if r.Ramp < 1 {
		bad("%d log-ins a second: must be at least 1", r.Ramp)
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && uint64(len(r.Accounts)+100) > files.Cur {
		bad("%d users need as many open files, the limit here is %d: raise it with 'ulimit -n %d'", len(r.Accounts), files.Cur, len(r.Accounts)+100)
	}
	return errors.Join(errs...)
}

// run is one Run.
type run struct {
	Options
	roots    *x509.CertPool
	nonce    string // marks this run's messages; nobody could guess it
	start    time.Time
	users    []*user
	slots    chan struct{} // one for each log-in that is under way
	begun    chan struct{} // closed when messages begin
	begin    time.Duration // of messages, since start; read it after begun
	loggedIn atomic.Int64  // users who are

	mu sync.Mutex
	t  tally
}

// since is the time of the run.
func (r *run) since() time.Duration { return time.Since(r.start) }

// user is one simulated user.
type user struct {
	r    *run
	i    int
	jid  jid.JID
	node atomic.Int64 // index of the one that it is, was or shall be logged in on
	// reachable is when the nodes know where the user is, in the time of the
	// run; 0: logged out.
	reachable atomic.Int64
	arrived   map[int]bool // numbers of this user's messages; guarded by r.mu
}

func (r *run) run(ctx context.Context, progress func(Progress)) (Report, error) {
	before, cpu := resident(), cpuTime()
	// Users live until end: who is where is counted before.
	living, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var all, first sync.WaitGroup
	stopped := r.tell(progress)
	defer stopped()

	r.phase(LoggingIn)
	every := time.NewTicker(max(time.Second/time.Duration(r.Ramp), time.Nanosecond))
	defer every.Stop()
	for _, u := range r.users {
		select {
		case <-every.C:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		first.Add(1)
		all.Go(func() { u.live(living, first.Done) })
	}
	tried := make(chan struct{})
	go func() { first.Wait(); close(tried) }()
	select {
	case <-tried:
	case <-ctx.Done():
	}
	r.note(func(t *tally) {
		for _, u := range r.users {
			if u.reachable.Load() > 0 {
				t.LoggedIn++
				t.planned += u.rounds()
			}
		}
	})
	memory := max(resident()-before, 0)
	if r.t.LoggedIn > 0 {
		provision.Sleep(ctx, settle)
		r.phase(Sending)
		r.begin = r.since()
		close(r.begun)
		provision.Sleep(ctx, r.For)
		r.phase(Waiting)
		r.await(ctx)
	}
	at := make([]int, len(r.Nodes))
	for _, u := range r.users {
		if u.reachable.Load() > 0 {
			at[u.node.Load()]++
		}
	}
	err := ctx.Err()
	end()
	all.Wait()
	stopped()
	return r.report(err != nil, at, memory, cpuTime()-cpu), err
}

// await waits until everything was sent and nothing is under way any more.
func (r *run) await(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	for {
		r.mu.Lock()
		over := r.t.handled >= r.t.planned && r.t.Delivered+r.t.Returned >= r.t.Sent
		changed := r.t.changed
		if changed == nil {
			changed = make(chan struct{})
			r.t.changed = changed
		}
		r.mu.Unlock()
		if over {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// tell calls progress until the function that it returns is called.
func (r *run) tell(progress func(Progress)) func() {
	if progress == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		each := time.NewTicker(time.Second)
		defer each.Stop()
		for {
			select {
			case <-quit:
				return
			case <-each.C:
				r.mu.Lock()
				p := Progress{Phase: r.t.phase, Users: len(r.users), In: int(r.loggedIn.Load()), Sent: r.t.Sent, Delivered: r.t.Delivered,
					Failed: r.t.failed, Reconnects: r.t.Reconnects, Elapsed: r.since()}
				r.mu.Unlock()
				progress(p)
			}
		}
	}()
	return sync.OnceFunc(func() { close(quit); <-done })
}

func (r *run) phase(p Phase) { r.note(func(t *tally) { t.phase = p }) }

func (r *run) note(f func(*tally)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.t)
}

// live is what a user does until ctx ends. first is called once it has logged
// in or has given that up.
func (u *user) live(ctx context.Context, first func()) {
	s := u.login(ctx, tries)
	first()
	if s == nil {
		return
	}
	begun := u.r.begun
	next := time.NewTimer(math.MaxInt64)
	defer next.Stop()
	round := 0
	for {
		select {
		case <-ctx.Done():
			u.away()
			s.Close()
			return
		case <-begun:
			begun = nil
			next.Reset(u.due(0) - u.r.since())
		case <-next.C:
			u.send(s, round)
			if round++; round < u.rounds() {
				next.Reset(u.due(round) - u.r.since())
			}
		case err := <-s.Ended:
			u.away()
			s.Abort()
			if ctx.Err() != nil {
				return
			}
			next.Stop()
			u.r.note(func(t *tally) { t.broken.add(u.where().Name, session.Reason(err)) })
			u.further()
			if s = u.login(ctx, math.MaxInt); s == nil {
				return
			}
			u.r.note(func(t *tally) { t.Reconnects++ })
			select {
			case <-u.r.begun:
				begun = nil
				for ; round < u.rounds() && u.due(round) < u.r.since(); round++ {
					u.r.note((*tally).handle) // too late
				}
				if round < u.rounds() {
					next.Reset(u.due(round) - u.r.since())
				}
			default:
			}
		}
	}
}

// where is the node that the user is, was or shall be logged in on; further
// makes it the next one.
func (u *user) where() Node { return u.r.Nodes[u.node.Load()] }
func (u *user) further()    { u.node.Store((u.node.Load() + 1) % int64(len(u.r.Nodes))) }

// offset is when in each interval it is the user's turn: all spread evenly.
func (u *user) offset() time.Duration {
	return time.Duration(float64(u.r.Every) * float64(u.i) / float64(len(u.r.users)))
}

// rounds is how many messages the user sends if all goes well.
func (u *user) rounds() int {
	return int((u.r.For - u.offset() + u.r.Every - 1) / u.r.Every)
}

// due is when the user sends its message of a round.
func (u *user) due(round int) time.Duration {
	return u.r.begin + time.Duration(round)*u.r.Every + u.offset()
}

// login tries up to so many times, each time at the next node. It returns nil
// where nothing helped.
func (u *user) login(ctx context.Context, tries int) *session.Session {
	r := u.r
	for n := range tries {
		if n > 0 {
			u.further()
			// Half a second, doubling to eight, with jitter.
			wait := 500 * time.Millisecond << min(n-1, 4)
			if provision.Sleep(ctx, wait/2+mathrand.N(wait)) != nil {
				return nil
			}
		}
		select {
		case r.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		began := time.Now()
		bounded, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("given up after %s", patience))
		s, err := session.Open(bounded, session.Options{Domain: r.Domain, Roots: r.roots, Addr: u.where().Addr, Account: r.Accounts[u.i],
			Priority: session.Present, Heard: u.hear})
		cancel()
		<-r.slots
		if ctx.Err() != nil {
			if err == nil {
				s.Close()
			}
			return nil
		}
		if err == nil {
			r.note(func(t *tally) { t.logins = append(t.logins, time.Since(began)) })
			u.reachable.Store(int64(r.since() + settle))
			r.loggedIn.Add(1)
			return s
		}
		r.note(func(t *tally) { t.failed++; t.refused.add(u.where().Name, session.Reason(err)) })
	}
	return nil
}

// away: the user is no longer logged in.
func (u *user) away() {
	u.reachable.Store(0)
	u.r.loggedIn.Add(-1)
}

// partner is the user that user i of n writes to in a round. Users are spread
// over the nodes one by one, so those 1 to nodes-1 further are elsewhere, but
// for the last few. In one round everybody gets one message.
func partner(i, round, n, nodes int) int {
	step := 1
	if nodes > 1 {
		step += round % (nodes - 1)
	}
	if step %= n; step == 0 {
		step = 1
	}
	return (i + step) % n
}

// text is as long as chat messages are.
const text = "A simulated user says that the goods have come in and that the second shift may start at six."

// send sends the message of a round. Its id tells all that there is to know:
// run, sender, round, and when it was sent.
func (u *user) send(s *session.Session, round int) {
	r := u.r
	to := r.users[partner(u.i, round, len(r.users), len(r.Nodes))]
	now := r.since()
	defer r.note((*tally).handle)
	if at := time.Duration(to.reachable.Load()); at == 0 || at > now {
		return
	}
	r.note(func(t *tally) { t.Sent++; t.late = max(t.late, now-u.due(round)) })
	id := fmt.Sprintf("%s-%d-%d-%d", r.nonce, u.i, round, r.since())
	// An error is one of the session, which ends with it.
	err := s.XMPP.Encode(context.Background(), session.Message{
		Message: stanza.Message{ID: id, To: to.jid, Type: stanza.ChatMessage},
		Body:    text, Hints: session.Hints("no-store", "no-permanent-store", "no-copy"),
	})
	if err != nil {
		s.Abort()
	}
}

// hear takes what has come for u.
func (u *user) hear(_ xmlstream.TokenReadEncoder, start *xml.StartElement) error {
	r := u.r
	now := r.since()
	if start.Name.Local != "message" {
		return nil
	}
	var id, kind string
	for _, a := range start.Attr {
		switch a.Name.Local {
		case "id":
			id = a.Value
		case "type":
			kind = a.Value
		}
	}
	from, round, sent, ok := r.parse(id)
	if !ok {
		return nil // not of this run
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	sender := r.users[from]
	switch {
	case kind == "error":
		r.t.Returned++
	case partner(from, round, len(r.users), len(r.Nodes)) != u.i:
		r.t.Strays++
	case sender.arrived[round]:
		r.t.Duplicates++
	default:
		if sender.arrived == nil {
			sender.arrived = map[int]bool{}
		}
		sender.arrived[round] = true
		r.t.Delivered++
		r.t.latency = append(r.t.latency, now-sent)
	}
	r.t.change()
	return nil
}

// parse reads the id of a message of this run.
func (r *run) parse(id string) (from, round int, sent time.Duration, ok bool) {
	f := strings.Split(id, "-")
	if len(f) != 4 || f[0] != r.nonce {
		return 0, 0, 0, false
	}
	from, err1 := strconv.Atoi(f[1])
	round, err2 := strconv.Atoi(f[2])
	at, err3 := strconv.ParseInt(f[3], 10, 64)
	ok = errors.Join(err1, err2, err3) == nil && from >= 0 && from < len(r.users) && round >= 0
	return from, round, time.Duration(at), ok
}
