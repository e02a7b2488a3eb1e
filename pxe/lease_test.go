package pxe

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

func mac(n int) provision.MAC { return provision.MAC(fmt.Sprintf("52:54:00:00:00:%02x", n)) }

var noAddr netip.Addr

func TestPool(t *testing.T) {
	now := time.Date(2026, 11, 1, 8, 0, 0, 0, time.UTC)
	p := newPool(testNet)
	bind := func(n int) netip.Addr {
		t.Helper()
		a, _ := p.candidate(mac(n), noAddr, now)
		if !a.IsValid() {
			t.Fatalf("machine %d gets nothing", n)
		}
		p.apply(effectHold, mac(n), a, now)
		if l, keep := p.apply(effectBind, mac(n), a, now); !keep || l.State != leaseBound || !l.Until.Equal(now.Add(time.Hour)) {
			t.Fatalf("lease %+v", l)
		}
		return a
	}
	seen := map[netip.Addr]bool{}
	var last netip.Addr
	for n := range 4 {
		last = bind(n)
		seen[last] = true
	}
	if len(seen) != 4 {
		t.Fatalf("addresses given twice: %v", seen)
	}
	if a, _ := p.candidate(mac(9), noAddr, now); a.IsValid() {
		t.Fatalf("a fifth address out of four: %v", a)
	}
	if a, leased := p.candidate(mac(3), noAddr, now); a != last || !leased {
		t.Fatalf("machine 3 gets %v (%v), has %v", a, leased, last)
	}

	// Released: free for others at once, yet kept for its machine while it can.
	p.apply(effectRelease, mac(3), last, now)
	if a, leased := p.candidate(mac(3), noAddr, now); a != last || leased {
		t.Errorf("after the release: %v, %v", a, leased)
	}
	if a, _ := p.candidate(mac(9), noAddr, now); a != last {
		t.Errorf("the released address is not given to another: %v", a)
	}
	bind(9)
	if a, _ := p.candidate(mac(3), noAddr, now); a.IsValid() {
		t.Errorf("machine 3 would get %v, which machine 9 has", a)
	}

	// Expired: reclaimed.
	now = now.Add(time.Hour)
	if a, leased := p.candidate(mac(3), noAddr, now); !a.IsValid() || leased {
		t.Errorf("expired addresses are not given: %v %v", a, leased)
	}

	// Declined: nobody gets it for a while.
	a := bind(3)
	p.apply(effectDecline, mac(3), a, now)
	for n := range 4 {
		if b := bind(20 + n%3); b == a {
			t.Errorf("the declined address is given again")
		}
	}
	if b, _ := p.candidate(mac(30), a, now); b == a {
		t.Error("the declined address is given on request")
	}
	now = now.Add(declineRests)
	if b, _ := p.candidate(mac(30), a, now); b != a {
		t.Errorf("the declined address does not come back: %v", b)
	}
}

func TestPoolHoldsAnOffer(t *testing.T) {
	now := time.Now()
	p := newPool(testNet)
	a, _ := p.candidate(mac(1), noAddr, now)
	if _, keep := p.apply(effectHold, mac(1), a, now); keep {
		t.Error("an offer is written to the lease file")
	}
	if b, _ := p.candidate(mac(2), a, now); b == a {
		t.Error("an address is offered to two machines")
	}
	p.apply(effectUnhold, mac(2), a, now) // not its own
	if b, _ := p.candidate(mac(2), a, now); b == a {
		t.Error("a machine dropped another's hold")
	}
	p.apply(effectUnhold, mac(1), a, now)
	if b, _ := p.candidate(mac(2), a, now); b != a {
		t.Error("the hold outlives the choice of another server")
	}
	p.apply(effectHold, mac(1), a, now)
	if b, _ := p.candidate(mac(2), a, now.Add(offerHold)); b != a {
		t.Error("the hold does not end")
	}
}

// TestPoolIsStable: a machine gets the same address from an empty lease file.
func TestPoolIsStable(t *testing.T) {
	n := testNet
	n.PoolFirst, n.PoolLast = netip.MustParseAddr("10.1.2.100"), netip.MustParseAddr("10.1.2.199")
	different := map[netip.Addr]bool{}
	for i := range 20 {
		a, _ := newPool(n).candidate(mac(i), noAddr, time.Now())
		b, _ := newPool(n).candidate(mac(i), noAddr, time.Now())
		if a != b {
			t.Errorf("%v, then %v", a, b)
		}
		different[a] = true
	}
	if len(different) < 15 {
		t.Errorf("20 machines begin at %d addresses", len(different))
	}
}

func TestPoolWithout(t *testing.T) {
	for _, n := range []provision.Network{
		{Subnet: testNet.Subnet, DiscHost: testNet.DiscHost},
		{Subnet: testNet.Subnet, DiscHost: testNet.DiscHost, PoolFirst: testNet.PoolLast, PoolLast: testNet.PoolFirst},
		{Subnet: testNet.Subnet, DiscHost: testNet.DiscHost, PoolFirst: testNet.DiscHost, PoolLast: testNet.DiscHost},
	} {
		if a, _ := newPool(n).candidate(mac(1), noAddr, time.Now()); a.IsValid() {
			t.Errorf("gave %v out of %v-%v", a, n.PoolFirst, n.PoolLast)
		}
	}
}

// TestLeaseFile: what was given survives without a tidy end, whatever the last
// line looks like.
func TestLeaseFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases")
	now := time.Now()
	open := func() (*leaseLog, *pool) {
		t.Helper()
		p := newPool(testNet)
		l, err := openLeases(path, []*pool{p}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return l, p
	}
	log, p := open()
	a, _ := p.candidate(mac(1), noAddr, now)
	b, _ := p.candidate(mac(2), noAddr, now)
	for i := range 3000 { // far more lines than addresses
		l, _ := p.apply(effectBind, mac(1), a, now.Add(time.Duration(i)*time.Second))
		log.Add(l)
	}
	if b == a {
		b, _ = p.candidate(mac(2), noAddr, now)
	}
	l, _ := p.apply(effectBind, mac(2), b, now)
	log.Add(l)
	eventually(t, "both leases in the file", func() bool {
		c, _ := os.ReadFile(path)
		return strings.Contains(string(c), string(mac(2))) && strings.Contains(string(c), now.Add(2999*time.Second+time.Hour).Format(time.RFC3339Nano))
	})

	// Killed while it wrote a line.
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString(`{"addr":"10.1.2.1`)
	f.Close()

	again, q := open()
	for n, want := range map[int]netip.Addr{1: a, 2: b} {
		if got, leased := q.candidate(mac(n), noAddr, now); got != want || !leased {
			t.Errorf("machine %d: %v (%v), had %v", n, got, leased, want)
		}
	}
	c, _ := os.ReadFile(path)
	if n := strings.Count(string(c), "\n"); n != 2 || !strings.HasSuffix(string(c), "\n") {
		t.Errorf("not compacted at start:\n%s", c)
	}
	rel, _ := q.apply(effectRelease, mac(2), b, now)
	again.Add(rel)
	again.Close()
	log.Close()
	if _, r := open(); true {
		if _, leased := r.candidate(mac(2), noAddr, now); leased {
			t.Error("a released lease came back")
		}
	}
}

// TestLeaseFileStaysSmall: what has grown far beyond its contents is
// rewritten, and a file that could not be written is made whole later.
func TestLeaseFileStaysSmall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "later")
	w := &leaseLog{path: filepath.Join(dir, "leases"), log: slog.New(slog.DiscardHandler), pending: map[netip.Addr]lease{}, all: map[netip.Addr]lease{}}
	add := func(n int) {
		a := address(number(testNet.PoolFirst) + uint32(n))
		w.pending[a] = lease{Addr: a, MAC: mac(n), Until: time.Now(), State: leaseBound}
		w.flush()
	}
	add(0) // no such folder
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	add(1)
	b, err := os.ReadFile(w.path)
	if records, bad := parseLeases(b); err != nil || len(records) != 2 || bad != 0 {
		t.Fatalf("%v, %d damaged, %v", records, bad, err)
	}
	w.lines = 4096
	add(1)
	add(1)
	before := w.lines
	for w.lines >= before {
		before = w.lines
		add(1)
		if before > 5000 {
			t.Fatal("the file grows without end")
		}
	}
	b, err = os.ReadFile(w.path)
	if records, bad := parseLeases(b); err != nil || len(records) != 2 || bad != 0 {
		t.Fatalf("after rewriting: %v, %d damaged, %v", records, bad, err)
	}
}

func FuzzLeaseFile(f *testing.F) {
	f.Add([]byte(`{"addr":"10.1.2.100","mac":"52:54:00:00:00:01","until":"2026-11-01T08:00:00Z","state":"bound"}` + "\n"))
	f.Add([]byte(`{"addr":"10.1.2.101","until":"2026-11-01T08:00:00Z","state":"resting"}` + "\n{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		records, _ := parseLeases(b)
		p := newPool(testNet)
		for _, r := range records {
			if p.contains(r.Addr) {
				p.put(r)
			}
		}
		for m, a := range p.byMAC {
			if p.byAddr[a].MAC != m {
				t.Fatalf("%s has %s, which has %s", m, a, p.byAddr[a].MAC)
			}
		}
	})
}
