package load

import (
	"context"
	"crypto/rand"
	"encoding/xml"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"mellium.im/xmlstream"
	"mellium.im/xmpp/history"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/ping"
	"mellium.im/xmpp/stanza"

	"platter/provision"
	"platter/provision/stack/session"
)

// Ledger tells what became of messages that the service had accepted.
type Ledger struct {
	Pairs    int `json:"pairs"`
	Accepted int `json:"accepted"` // the node that took the message has answered what was asked after it
	Arrived  int `json:"arrived"`  // of those, heard by the receiver, at once or when it was back
	Archived int `json:"archived"` // of the others, found in the archive of the receiver or the sender
	Lost     int `json:"lost"`     // of the others: neither
	// Unsure counts messages that no node has accepted; some may have arrived.
	Unsure int `json:"unsure"`
	// GapMicros is the longest time in which a sender got nothing accepted.
	GapMicros int64 `json:"gap_us"`
	// Trouble is why the archives could not be read; then nothing is said to be
	// archived.
	Trouble string `json:"trouble,omitempty"`
}

// String is the ledger in one line.
func (l Ledger) String() string {
	s := fmt.Sprintf("%d messages accepted, %d arrived, %d more in the archive, %d lost; %d unsure; longest time without acceptance %s",
		l.Accepted, l.Arrived, l.Archived, l.Lost, l.Unsure, short(l.GapMicros))
	if l.Trouble != "" {
		s += "; " + l.Trouble
	}
	return s
}

// Judge says what was not as it should be, a sentence each.
func (l Ledger) Judge() []string {
	var wrong []string
	if l.Trouble != "" {
		wrong = append(wrong, l.Trouble)
	}
	if l.Accepted == 0 {
		wrong = append(wrong, "no node accepted a message, so nothing was measured")
	}
	if l.Lost > 0 {
		wrong = append(wrong, fmt.Sprintf("%d of %d messages that a node had accepted neither arrived nor are in an archive", l.Lost, l.Accepted))
	}
	return wrong
}

// Keep has pairs of users write messages that are to be kept: the first of each
// two of o.Accounts to the second, one every o.Every (1 s) for o.For, also over
// a node that ends: then its users go on at the next one. It returns once every
// message has arrived or was looked for in the archives.
//
// Where ctx ends it the error is that of ctx; every other error means that
// nothing was tried.
func Keep(ctx context.Context, o Options) (Ledger, error) {
	o.Every, o.For, o.Ramp = or(o.Every, time.Second), or(o.For, time.Minute), or(o.Ramp, 50)
	k := &keeper{run: run{Options: o, nonce: rand.Text()}, arrived: map[string]bool{}}
	if err := k.check(); err != nil {
		return Ledger{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reading, stop := context.WithCancel(ctx)
	defer stop()
	var readers, writers sync.WaitGroup
	over := time.Now().Add(o.For)
	for i := 0; i+1 < len(o.Accounts); i += 2 {
		p := &pair{k: k, writer: o.Accounts[i], reader: o.Accounts[i+1], first: i / 2 % len(o.Nodes)}
		k.pairs = append(k.pairs, p)
		readers.Go(func() { p.read(reading) })
		writers.Go(func() { p.write(ctx, over) })
	}
	writers.Wait()
	if ctx.Err() == nil {
		k.await(ctx, grace)
	}
	stop()
	readers.Wait()
	return k.ledger(ctx), ctx.Err()
}

type keeper struct {
	run
	pairs []*pair

	mu      sync.Mutex
	arrived map[string]bool // bodies that were heard or found
}

// pair is two users, the first of whom writes to the second.
type pair struct {
	k              *keeper
	writer, reader provision.Account
	first          int // the writer's first node; the reader's is the next one

	accepted []string
	unsure   int
	gap      time.Duration
}

// open logs a user in, at the next node each time it fails, until ctx ends; at
// is moved to the node that worked.
func (k *keeper) open(ctx context.Context, a provision.Account, at *int, priority int, heard func(body, archived string)) *session.Session {
	for n := 0; ctx.Err() == nil; n++ {
		limited, cancel := context.WithTimeout(ctx, patience)
		s, err := session.Open(limited, session.Options{Domain: k.Domain, Roots: k.roots, Addr: k.Nodes[*at%len(k.Nodes)].Addr, Account: a, Priority: priority,
			Heard: func(t xmlstream.TokenReadEncoder, start *xml.StartElement) error {
				var in struct {
					Body     string `xml:"body"`
					Archived string `xml:"result>forwarded>message>body"`
				}
				if err := xml.NewTokenDecoder(xmlstream.MultiReader(xmlstream.Token(*start), t)).Decode(&in); err != nil {
					return err
				}
				heard(in.Body, in.Archived)
				return nil
			}})
		cancel()
		if err == nil {
			return s
		}
		*at++
		provision.Sleep(ctx, min(250*time.Millisecond<<min(n, 4), 4*time.Second))
	}
	return nil
}

func (k *keeper) note(body string) {
	if strings.HasPrefix(body, k.nonce) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.arrived[body] = true
	}
}

func (k *keeper) has(body string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.arrived[body]
}

// read hears what comes until ctx ends.
func (p *pair) read(ctx context.Context) {
	at := p.first + 1
	for {
		s := p.k.open(ctx, p.reader, &at, session.Present, func(body, _ string) { p.k.note(body) })
		if s == nil {
			return
		}
		select {
		case <-s.Ended:
			s.Abort()
			at++
		case <-ctx.Done():
			s.Close()
			return
		}
	}
}

// write sends until over.
func (p *pair) write(ctx context.Context, over time.Time) {
	ctx, cancel := context.WithDeadline(ctx, over.Add(patience))
	defer cancel()
	to, err := jid.New(p.reader.User, p.k.Domain, "")
	if err != nil {
		return // check has made sure that it is a domain
	}
	at, last := p.first, time.Now()
	var s *session.Session
	var alive context.Context // ends with s
	defer func() {
		if s != nil {
			s.Close()
		}
	}()
	next := time.NewTicker(p.k.Every)
	defer next.Stop()
	for n := 0; time.Now().Before(over) && ctx.Err() == nil; n++ {
		if s == nil {
			if s = p.k.open(ctx, p.writer, &at, session.Aside, func(string, string) {}); s == nil {
				break
			}
			// Who waits for an answer must learn that none will come.
			var dead context.CancelFunc
			alive, dead = context.WithCancel(ctx)
			go func(s *session.Session) {
				defer dead()
				<-s.Ended
			}(s)
		}
		body := p.k.nonce + "-" + p.writer.User + "-" + strconv.Itoa(n)
		limited, cancel := context.WithTimeout(alive, patience)
		err := s.XMPP.Encode(limited, session.Message{
			Message: stanza.Message{ID: body, To: to, Type: stanza.ChatMessage}, Body: body, Hints: session.Hints("store")})
		if err == nil {
			// A node works on what one user sends in its order (RFC 6120, 10.1).
			err = ping.Send(limited, s.XMPP, s.XMPP.LocalAddr().Domain())
		}
		cancel()
		if err != nil {
			p.unsure++
			s.Abort()
			s, at = nil, at+1
			continue
		}
		p.accepted = append(p.accepted, body)
		p.gap, last = max(p.gap, time.Since(last)), time.Now()
		select {
		case <-next.C:
		case <-ctx.Done():
		}
	}
	p.gap = max(p.gap, time.Since(last))
}

// await waits until all that was accepted has arrived, for so long at most.
func (k *keeper) await(ctx context.Context, d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end) && k.missing() > 0; {
		if provision.Sleep(ctx, 100*time.Millisecond) != nil {
			return
		}
	}
}

func (k *keeper) missing() int {
	n := 0
	for _, p := range k.pairs {
		n += len(p.missing())
	}
	return n
}

func (p *pair) missing() []string {
	var out []string
	for _, body := range p.accepted {
		if !p.k.has(body) {
			out = append(out, body)
		}
	}
	return out
}

// ledger looks for what is missing in the archives, and adds up.
func (k *keeper) ledger(ctx context.Context) Ledger {
	l := Ledger{Pairs: len(k.pairs)}
	for _, p := range k.pairs {
		missing := len(p.missing())
		l.Accepted += len(p.accepted)
		l.Arrived += len(p.accepted) - missing
		l.Unsure += p.unsure
		l.GapMicros = max(l.GapMicros, p.gap.Microseconds())
		for _, a := range []provision.Account{p.reader, p.writer} {
			if len(p.missing()) == 0 || ctx.Err() != nil {
				break
			}
			if err := k.search(ctx, a); err != nil {
				l.Trouble = fmt.Sprintf("the archive of %s could not be read: %v", a.User, err)
			}
		}
		l.Archived += missing - len(p.missing())
		l.Lost += len(p.missing())
	}
	return l
}

// search notes everything that the archive of a user has (XEP-0313).
func (k *keeper) search(ctx context.Context, a provision.Account) error {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	at := 0
	s := k.open(ctx, a, &at, session.Aside, func(_, archived string) { k.note(archived) })
	if s == nil {
		return errors.New("no node lets the user in")
	}
	defer s.Close()
	for page := ""; ; {
		got, err := history.Fetch(ctx, history.Query{Last: true, Limit: 200, PageID: page}, jid.JID{}, s.XMPP)
		if err != nil {
			return err
		}
		if got.Complete || got.Set.First.ID == "" || got.Set.First.ID == page {
			return nil
		}
		page = got.Set.First.ID
	}
}
