package pxe

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"platter/provision"
)

const (
	offerHold    = time.Minute      // an address offered waits this long for its request
	declineRests = 10 * time.Minute // an address that someone else uses is left alone
)

// leaseState is what an address of the pool is to its client.
type leaseState string

const (
	leaseHeld    leaseState = "held"    // offered; not kept over a restart
	leaseBound   leaseState = "bound"   // given until Until
	leaseFree    leaseState = "free"    // released; remembered so that the client gets it again
	leaseResting leaseState = "resting" // declined: somebody else uses it
)

// lease is one address of a pool. It is also one line of the lease file.
type lease struct {
	Addr  netip.Addr    `json:"addr"`
	MAC   provision.MAC `json:"mac,omitempty"`
	Until time.Time     `json:"until"`
	State leaseState    `json:"state"`
}

// pool hands out the addresses of one network to machines without a
// reservation. One goroutine uses it.
type pool struct {
	net    provision.Network
	byAddr map[netip.Addr]lease
	byMAC  map[provision.MAC]netip.Addr
	full   time.Time // until then no address can become free by itself
}

func newPool(n provision.Network) *pool {
	if !n.PoolFirst.Is4() || !n.PoolLast.Is4() || n.PoolLast.Less(n.PoolFirst) {
		n.PoolFirst, n.PoolLast = netip.Addr{}, netip.Addr{} // no pool
	}
	return &pool{net: n, byAddr: map[netip.Addr]lease{}, byMAC: map[provision.MAC]netip.Addr{}}
}

func (p *pool) contains(a netip.Addr) bool {
	return p.net.PoolFirst.IsValid() && a.Is4() && p.net.PoolFirst.Compare(a) <= 0 && a.Compare(p.net.PoolLast) <= 0 &&
		a != p.net.DiscHost && a != p.net.Gateway
}

// candidate is the address that mac has, or would get, having asked for want
// (which may be invalid). leased tells that it has it. It changes nothing but
// what the pool knows about being full. The address is invalid when none is
// free.
func (p *pool) candidate(mac provision.MAC, want netip.Addr, now time.Time) (addr netip.Addr, leased bool) {
	if a, ok := p.byMAC[mac]; ok {
		l := p.byAddr[a]
		return a, l.State == leaseBound && now.Before(l.Until)
	}
	if p.contains(want) && p.free(want, now) {
		return want, false
	}
	if now.Before(p.full) || !p.net.PoolFirst.IsValid() {
		return netip.Addr{}, false
	}
	// The search begins at a place that the MAC gives: even if the lease file
	// is lost, a machine most likely gets the address it had.
	first, size := number(p.net.PoolFirst), number(p.net.PoolLast)-number(p.net.PoolFirst)+1
	h := fnv.New32a()
	io.WriteString(h, string(mac))
	var expired netip.Addr
	var soonest time.Time
	for i := range size {
		a := address(first + (h.Sum32()%size+i)%size)
		l, used := p.byAddr[a]
		switch {
		case !p.contains(a):
		case !used:
			return a, false
		case now.Before(l.Until):
			if soonest.IsZero() || l.Until.Before(soonest) {
				soonest = l.Until
			}
		case !expired.IsValid():
			expired = a // somebody may come back for it: only if there is no other
		}
	}
	if !expired.IsValid() {
		p.full = soonest
	}
	return expired, false
}

func (p *pool) free(a netip.Addr, now time.Time) bool {
	l, used := p.byAddr[a]
	return !used || !now.Before(l.Until)
}

// put records l and returns whether it has to outlive a restart.
func (p *pool) put(l lease) bool {
	if old, ok := p.byAddr[l.Addr]; ok && old.MAC != l.MAC {
		delete(p.byMAC, old.MAC)
	}
	if a, ok := p.byMAC[l.MAC]; ok && a != l.Addr {
		delete(p.byAddr, a)
	}
	p.byAddr[l.Addr] = l
	if l.MAC != "" {
		p.byMAC[l.MAC] = l.Addr
	}
	p.full = time.Time{}
	return l.State != leaseHeld
}

// effect is what an answer does to the address it is about.
type effect int

const (
	effectNone    effect = iota
	effectHold           // offered
	effectBind           // given
	effectUnhold         // the client took another server's offer
	effectRelease        // given back
	effectDecline        // in use by someone else
)

// apply carries out e for mac and addr and returns the lease to write to the
// lease file, if any. Addresses outside the pool are reservations: they need
// no record.
func (p *pool) apply(e effect, mac provision.MAC, addr netip.Addr, now time.Time) (lease, bool) {
	if !p.contains(addr) {
		return lease{}, false
	}
	l, used := p.byAddr[addr]
	mine := used && l.MAC == mac
	next := lease{Addr: addr, MAC: mac}
	switch e {
	case effectHold:
		if mine && now.Before(l.Until) {
			return lease{}, false // it has more than a hold already
		}
		next.State, next.Until = leaseHeld, now.Add(offerHold)
	case effectBind:
		next.State, next.Until = leaseBound, now.Add(p.net.Lease)
	case effectUnhold:
		if mine && l.State == leaseHeld {
			delete(p.byAddr, addr)
			delete(p.byMAC, mac)
			p.full = time.Time{}
		}
		return lease{}, false
	case effectRelease:
		if !mine {
			return lease{}, false
		}
		next.State, next.Until = leaseFree, now
	case effectDecline:
		if !mine {
			return lease{}, false
		}
		next.MAC, next.State, next.Until = "", leaseResting, now.Add(declineRests)
	default:
		return lease{}, false
	}
	return next, p.put(next)
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func address(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// leaseLog keeps the leases in a file of JSON lines to which one goroutine
// appends, off the path of the answers. The last line of an address counts;
// the file is rewritten at start and when it has grown far beyond what it
// holds. A line that a crash cut short is ignored.
type leaseLog struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	pending map[netip.Addr]lease // bounded by the size of the pools
	wake    chan struct{}
	done    chan struct{}

	// Owned by the writer.
	all   map[netip.Addr]lease
	file  *os.File
	lines int
}

// openLeases fills the pools from the file at path and starts the writer.
func openLeases(path string, pools []*pool, log *slog.Logger) (*leaseLog, error) {
	l := &leaseLog{path: path, log: log, pending: map[netip.Addr]lease{}, all: map[netip.Addr]lease{},
		wake: make(chan struct{}, 1), done: make(chan struct{})}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("cannot keep DHCP leases: %w", err)
	}
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot read the DHCP leases: %w", err)
	}
	records, bad := parseLeases(b)
	if bad > 0 {
		log.Warn("the lease file has lines that are damaged; they are left out", "file", path, "lines", bad)
	}
	for _, r := range records {
		for _, p := range pools {
			if p.contains(r.Addr) {
				p.put(r)
				l.all[r.Addr] = r
			}
		}
	}
	if err := l.compact(); err != nil {
		return nil, fmt.Errorf("cannot write the DHCP leases: %w", err)
	}
	go l.run()
	return l, nil
}

// parseLeases returns the leases of a lease file in order and the number of
// lines that are damaged.
func parseLeases(b []byte) (records []lease, bad int) {
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, len(b)+1)
	for sc.Scan() {
		var r lease
		err := json.Unmarshal(sc.Bytes(), &r)
		known := r.State == leaseBound || r.State == leaseFree || r.State == leaseResting
		if err != nil || !r.Addr.Is4() || !known || (r.MAC == "") != (r.State == leaseResting) {
			bad++
			continue
		}
		records = append(records, r)
	}
	return records, bad
}

// Add has l written soon. It never blocks.
func (w *leaseLog) Add(l lease) {
	w.mu.Lock()
	w.pending[l.Addr] = l
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Close writes what is left. Add must not be called any more.
func (w *leaseLog) Close() {
	close(w.wake)
	<-w.done
}

func (w *leaseLog) run() {
	defer close(w.done)
	for range w.wake {
		w.flush()
	}
	w.flush()
	if w.file != nil {
		w.file.Close()
	}
}

// flush appends what is pending and has it on the disk. After an error the
// file is rewritten as a whole at the next lease.
func (w *leaseLog) flush() {
	w.mu.Lock()
	pending := w.pending
	w.pending = map[netip.Addr]lease{}
	w.mu.Unlock()
	if len(pending) == 0 {
		return
	}
	var b bytes.Buffer
	for a, l := range pending {
		w.all[a] = l
		b.Write(marshalLease(l))
	}
	w.lines += len(pending)
	if w.file != nil && w.lines < 4096+4*len(w.all) {
		_, err := w.file.Write(b.Bytes())
		if err == nil {
			err = w.file.Sync()
		}
		if err == nil {
			return
		}
		w.log.Warn("cannot append to the lease file", "file", w.path, "err", err)
	}
	if err := w.compact(); err != nil {
		w.log.Error("DHCP leases are not kept: after a restart addresses may be given twice; make room or correct the rights", "file", w.path, "err", err)
	}
}

// compact rewrites the file with one line for each address and opens it for
// appending.
func (w *leaseLog) compact() error {
	if w.file != nil {
		w.file.Close()
		w.file = nil
	}
	var b bytes.Buffer
	for _, l := range w.all {
		b.Write(marshalLease(l))
	}
	if err := renameio.WriteFile(w.path, b.Bytes(), 0o644); err != nil {
		return err
	}
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	w.file, w.lines = f, len(w.all)
	return nil
}

func marshalLease(l lease) []byte {
	b, err := json.Marshal(l)
	if err != nil {
		panic(err) // no field of a lease can fail to marshal
	}
	return append(b, '\n')
}
