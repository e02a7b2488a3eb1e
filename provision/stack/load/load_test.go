package load

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// What real nodes do is tested with real nodes in package stack.

func someCA(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// In every round everybody writes to somebody else and hears from exactly one;
// all but a few write to another node, and in time to every other node.
func TestPartner(t *testing.T) {
	for _, c := range []struct{ n, nodes int }{{2, 1}, {2, 2}, {3, 3}, {10, 1}, {2, 5}, {3, 7}, {100, 2}, {1000, 3}, {1000, 5}} {
		ways := map[[2]int]bool{}
		for round := range 8 {
			heard, same := map[int]bool{}, 0
			for i := range c.n {
				p := partner(i, round, c.n, c.nodes)
				if p == i || p < 0 || p >= c.n || heard[p] {
					t.Fatalf("%+v, round %d: user %d writes to %d", c, round, i, p)
				}
				heard[p] = true
				ways[[2]int{i % c.nodes, p % c.nodes}] = true
				if p%c.nodes == i%c.nodes {
					same++
				}
			}
			if c.nodes > 1 && c.n >= c.nodes && same >= c.nodes {
				t.Errorf("%+v, round %d: %d users write to their own node", c, round, same)
			}
		}
		if c.n >= 2*c.nodes {
			for a := range c.nodes {
				for b := range c.nodes {
					if (a != b || c.nodes == 1) && !ways[[2]int{a, b}] {
						t.Errorf("%+v: nobody on node %d writes to node %d", c, a, b)
					}
				}
			}
		}
	}
}

func TestSpread(t *testing.T) {
	var all []time.Duration
	for i := range 1000 {
		all = append(all, time.Duration(1000-i)*time.Microsecond)
	}
	if got, want := spread(all), (Spread{1000, 500, 950, 990, 1000}); got != want {
		t.Errorf("1 to 1000: %+v", got)
	}
	if all[0] != time.Millisecond {
		t.Error("the durations were put in another order")
	}
	if got, want := spread(all[:1]), (Spread{1, 1000, 1000, 1000, 1000}); got != want {
		t.Errorf("one: %+v", got)
	}
	if got, want := spread(all[:3]), (Spread{3, 999, 1000, 1000, 1000}); got != want {
		t.Errorf("three: %+v", got)
	}
	if got := spread(nil); got != (Spread{}) {
		t.Errorf("none: %+v", got)
	}
}

func TestJudge(t *testing.T) {
	good := Report{Users: 10, LoggedIn: 10, Sent: 60, Delivered: 60, Latency: Spread{60, 1000, 2000, 9000, 9500}}
	limits := Limits{P99: 10 * time.Millisecond}
	if wrong := good.Judge(limits); len(wrong) != 0 {
		t.Errorf("a good run: %q", wrong)
	}
	for want, change := range map[string]func(*Report){
		"ended before its time":              func(r *Report) { r.Interrupted = true },
		"2 of 10 users could not log in; n1": func(r *Report) { r.LoggedIn = 8; r.Refused = []Trouble{{"n1", "login: not-authorized", 6}} },
		"no message arrived":                 func(r *Report) { r.Sent, r.Delivered = 0, 0 },
		"1 of 60 messages did not arrive":    func(r *Report) { r.Lost = 1 },
		"within 10.1 ms, the limit is 10ms":  func(r *Report) { r.Latency.P99 = 10_100 },
		"more than once":                     func(r *Report) { r.Duplicates = 1 },
		"wrong user":                         func(r *Report) { r.Strays = 1 },
		"n2: 3 sessions broke: read":         func(r *Report) { r.Broken = []Trouble{{"n2", "read: connection reset by peer", 3}} },
		"4 messages were not sent":           func(r *Report) { r.Skipped = 4 },
	} {
		r := good
		change(&r)
		if wrong := r.Judge(limits); len(wrong) != 1 || !strings.Contains(wrong[0], want) {
			t.Errorf("want one sentence with %q, got %q", want, wrong)
		}
		if r.String() == "" {
			t.Error("nothing for people")
		}
	}
	r := good
	r.Lost = 2
	if wrong := r.Judge(Limits{Lost: 2}); len(wrong) != 0 {
		t.Errorf("two lost where two may be, and any latency: %q", wrong)
	}
}

// All that is wrong with the options is said at once.
func TestOptions(t *testing.T) {
	_, err := Run(context.Background(), Options{CA: "nonsense", Every: time.Second, For: time.Millisecond, Ramp: -1}, nil)
	for _, want := range []string{"the CA is not", "no node", "0 users", "one message every 1s for 1ms", "-1 log-ins"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
}

func TestAccounts(t *testing.T) {
	a, b := provision.LoadAccounts(3, []byte("secret")), provision.LoadAccounts(5, []byte("secret"))
	if !slices.Equal(a, b[:3]) {
		t.Error("fewer accounts are others")
	}
	if a[2].User != "platter-load-000003" || len(a[2].Password) != 43 || a[1].Password == a[2].Password {
		t.Errorf("%+v", a[2])
	}
	if provision.LoadAccounts(1, []byte("other"))[0].Password == a[0].Password {
		t.Error("the secret does not matter")
	}
}

// dead are two nodes that users cannot log in on: nothing listens at the first,
// the second takes connections and says nothing.
func dead(t *testing.T) (nodes []Node, spoken <-chan struct{}) {
	t.Helper()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	said := make(chan struct{}, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.Read(make([]byte, 1))
				said <- struct{}{}
				io.Copy(io.Discard, c)
			}()
		}
	}()
	return []Node{{"gone", netip.MustParseAddrPort(gone.Addr().String())}, {"silent", netip.MustParseAddrPort(l.Addr().String())}}, said
}

// Where nobody can log in the run ends, and says why.
func TestNobodyGetsIn(t *testing.T) {
	nodes, _ := dead(t)
	o := Options{Domain: "im.test", CA: someCA(t), Nodes: nodes[:1], Accounts: provision.LoadAccounts(4, nil), Ramp: 1000}
	r, err := Run(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Trouble{{"gone", "connecting: connect: connection refused", 4 * tries}}
	if r.LoggedIn != 0 || r.Sent != 0 || !slices.Equal(r.Refused, want) {
		t.Errorf("%+v", r)
	}
	if wrong := r.Judge(Limits{}); len(wrong) == 0 || !strings.Contains(wrong[0], "4 of 4 users could not log in; gone: connecting") {
		t.Errorf("%q", wrong)
	}
	if b, err := json.Marshal(r); err != nil || strings.Contains(string(b), "null") {
		t.Errorf("%s, %v", b, err)
	}
}

// A run that is ended during the log-ins ends at once.
func TestEndedEarly(t *testing.T) {
	nodes, spoken := dead(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-spoken; cancel() }()
	began := time.Now()
	r, err := Run(ctx, Options{Domain: "im.test", CA: someCA(t), Nodes: nodes[1:], Accounts: provision.LoadAccounts(4, nil), Ramp: 10}, func(Progress) {})
	if err != context.Canceled || !r.Interrupted || time.Since(began) > 10*time.Second {
		t.Errorf("after %s: %v, %+v", time.Since(began), err, r)
	}
}
