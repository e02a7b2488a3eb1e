package main

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"aead.dev/minisign"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/dischost"
	"platter/provision/site"
	"platter/provision/store"
	"platter/pxe"
)

// wire is a network of two machines: this one's interface is rack0.
type wire struct {
	t    *testing.T
	near netlink.Link
	far  netlink.Link // of the other machine
	at   *netlink.Handle
}

// newWire returns nil where the test is run anew in a network namespace of its own, in
// which no interface is real.
func newWire(t *testing.T) *wire {
	t.Helper()
	t.Parallel()
	const inside = "PLATTER_TEST_NAMESPACE"
	if os.Getenv(inside) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return nil
	}
	w := &wire{t: t}
	w.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "rack0"}, PeerName: "far"}))
	var err error
	w.near, err = netlink.LinkByName("rack0")
	w.must(err)
	w.must(netlink.LinkSetUp(w.near))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	w.must(err)
	there, err := netns.New()
	w.must(err)
	w.must(netns.Set(here))
	peer, err := netlink.LinkByName("far")
	w.must(err)
	w.must(netlink.LinkSetNsFd(peer, int(there)))
	w.at, err = netlink.NewHandleAt(there)
	w.must(err)
	w.far, err = w.at.LinkByName("far")
	w.must(err)
	w.must(w.at.LinkSetUp(w.far))
	return w
}

func (w *wire) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// has gives an address to this machine, farHas to the other one.
func (w *wire) has(a string)     { w.t.Helper(); w.must(netlink.AddrReplace(w.near, w.addr(a))) }
func (w *wire) farHas(a string)  { w.t.Helper(); w.must(w.at.AddrReplace(w.far, w.addr(a))) }
func (w *wire) farLost(a string) { w.t.Helper(); w.must(w.at.AddrDel(w.far, w.addr(a))) }

func (w *wire) addr(a string) *netlink.Addr {
	w.t.Helper()
	out, err := netlink.ParseAddr(a + "/24")
	w.must(err)
	return out
}

// old is a disc host on a wire, at 10.9.0.1.
type old struct {
	*wire
	rack    *provision.Rack
	journal *store.Store
	o       serveOptions
	place   *successorPlace
}

// newOld returns nil where newWire does.
func newOld(t *testing.T) *old {
	t.Helper()
	w := newWire(t)
	if w == nil {
		return nil
	}
	h := &old{wire: w, o: serveOptions{state: t.TempDir()}, rack: &provision.Rack{
		Networks: []provision.Network{{Interface: "rack0", Subnet: netip.MustParsePrefix("10.9.0.0/24"), DiscHost: netip.MustParseAddr("10.9.0.1")}},
		Nodes:    []provision.Node{{Name: "node1", Address: netip.MustParseAddr("10.9.0.11")}}}}
	var err error
	h.journal, err = store.Open(filepath.Join(h.o.state, dischost.JournalFile), time.Now)
	w.must(err)
	t.Cleanup(func() { h.journal.Close() })
	w.must(h.journal.SetRack(t.Context(), h.rack))
	return h
}

func (h *old) start(want provision.StartKind) error {
	h.t.Helper()
	got, err := startOf(h.t.Context(), h.journal, h.o, h.rack, h.place, slog.New(slog.NewTextHandler(h.t.Output(), nil)))
	if got != want {
		h.t.Errorf("it starts to %s, want %s: %v", got, want, err)
	}
	return err
}

// handOver hands the rack over to node1, which does not have the receipt.
func (h *old) handOver() {
	h.t.Helper()
	frozen := h.journal.Freeze()
	defer frozen.Release()
	h.must(frozen.HandOver(provision.Event{Node: "node1", Detail: "digest"}))
}

// A disc host that was handed over does not start, gives up the address that its
// successor waits for, and starts when it is told to and no other machine serves.
func TestStartAfterHandover(t *testing.T) {
	h := newOld(t)
	if h == nil {
		return
	}
	h.has("10.9.0.1")
	h.must(h.start(provision.StartServe))
	h.handOver()
	h.must(h.start(provision.StartHandOut))
	if _, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err != nil {
		t.Errorf("the address was given up before the node has the receipt: %v", err)
	}
	h.must(h.journal.Append(t.Context(), provision.Event{Kind: provision.EventHandoverTaken, Node: "node1"}))
	if err := h.start(provision.StartRefuse); err == nil || !strings.Contains(err.Error(), "handed over to node1") || !strings.Contains(err.Error(), "--take-back") {
		t.Errorf("it says: %v", err)
	}
	if name, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err == nil {
		t.Errorf("%s still has the address", name)
	}
	// The unit of a node that was one ends in peace.
	h.o.successor = "x"
	h.must(h.start(provision.StartRefuse))
	h.o.successor = ""

	// What keeps it from serving leaves the journal as it is.
	h.o.takeBack = true
	h.farHas("10.9.0.1")
	if err := h.start(provision.StartTakeBack); err == nil || !strings.Contains(err.Error(), h.far.Attrs().HardwareAddr.String()) {
		t.Errorf("while another machine has the address: %v", err)
	}
	h.farLost("10.9.0.1")
	if err := h.start(provision.StartTakeBack); err == nil || !strings.Contains(err.Error(), "lacks the disc host's address") {
		t.Errorf("without the address: %v", err)
	}
	if m := h.journal.HandedOver(); m == nil || !m.Taken {
		t.Errorf("the journal says %+v", m)
	}
	h.has("10.9.0.1")
	h.must(h.start(provision.StartTakeBack))
	h.o.takeBack = false
	h.must(h.start(provision.StartServe))
}

// A disc host that lost its power between the receipt and the node's word of it comes
// back with the address that the node has by now, and leaves it to the node for good.
func TestStartBesideSuccessor(t *testing.T) {
	h := newOld(t)
	if h == nil {
		return
	}
	h.has("10.9.0.1")
	h.handOver()
	h.farHas("10.9.0.5") // any machine
	h.farHas("10.9.0.1")
	h.must(h.start(provision.StartHandOut))
	h.farHas("10.9.0.11") // it is node1
	if err := h.start(provision.StartRefuse); err == nil || !strings.Contains(err.Error(), "handed over to node1") {
		t.Errorf("it says: %v", err)
	}
	if name, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err == nil {
		t.Errorf("%s still has the address", name)
	}
	// Also when the node is off the next time.
	h.farLost("10.9.0.1")
	if err := h.start(provision.StartRefuse); err == nil {
		t.Error("it gives out the receipt again")
	}
}

// A node that is the disc host and hands the rack on has the disc host's address at every
// start, for the receipt.
func TestStartOfNodeThatHandsOut(t *testing.T) {
	h := newOld(t)
	if h == nil {
		return
	}
	h.has("10.9.0.12")
	h.place = &successorPlace{own: netip.MustParseAddr("10.9.0.12"), address: netip.MustParsePrefix("10.9.0.1/24"), iface: "rack0",
		taken: func(context.Context) error { return nil }}
	h.handOver()
	h.must(h.start(provision.StartHandOut))
	if _, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err != nil {
		t.Error(err)
	}
}

// A node that waits for the disc host's address tells whoever has it that it has the
// receipt: the old disc host may not know.
func TestTakeTells(t *testing.T) {
	w := newWire(t)
	if w == nil {
		return
	}
	w.has("10.9.0.11")
	w.farHas("10.9.0.1")
	p := &successorPlace{own: netip.MustParseAddr("10.9.0.11"), address: netip.MustParsePrefix("10.9.0.1/24"), iface: "rack0",
		taken: func(context.Context) error { return w.at.AddrDel(w.far, w.addr("10.9.0.1")) }}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.take(ctx, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if _, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err != nil {
		t.Error(err)
	}
}

// A disc host that was booted from a disc takes no address that another machine has,
// not even a free one beside it, and leaves none behind.
func TestGiveAddresses(t *testing.T) {
	w := newWire(t)
	if w == nil {
		return
	}
	rack := &provision.Rack{}
	for _, s := range []string{"10.8.0", "10.9.0"} {
		rack.Networks = append(rack.Networks, provision.Network{Subnet: netip.MustParsePrefix(s + ".0/24"), DiscHost: netip.MustParseAddr(s + ".1")})
	}
	has := func() (n int) {
		for _, nw := range rack.Networks {
			if iface, err := pxe.InterfaceOf(nw.DiscHost); err == nil && iface == "rack0" {
				n++
			}
		}
		return n
	}
	w.farHas("10.9.0.1")
	undo, err := giveAddresses(t.Context(), rack, []string{"rack0", "rack0"})
	if err == nil || !strings.Contains(err.Error(), w.far.Attrs().HardwareAddr.String()) || has() != 0 {
		t.Errorf("with 10.9.0.1 at another machine %d addresses are given: %v", has(), err)
	}
	undo()
	w.farLost("10.9.0.1")
	undo, err = giveAddresses(t.Context(), rack, []string{"rack0", "rack0"})
	if err != nil || has() != 2 {
		t.Errorf("%d addresses are given: %v", has(), err)
	}
	undo()
	if has() != 0 {
		t.Errorf("%d addresses are left", has())
	}
}

// A node serves only with a receipt of its site, for the state that it has.
func TestReadSuccession(t *testing.T) {
	dir := t.TempDir()
	own, err := site.Open(filepath.Join(dir, "state", dischost.SiteFolder))
	if err != nil {
		t.Fatal(err)
	}
	other, err := site.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	note := provision.HandoverNote{Order: 7, HandoverList: provision.HandoverList{Node: "node1", Address: netip.MustParsePrefix("10.9.0.1/24"), Own: netip.MustParseAddr("10.9.0.11")}}
	write := func(name string, v any) {
		t.Helper()
		b, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	receipt := func(by *site.Site, r provision.HandoverReceipt) {
		t.Helper()
		key, err := by.SigningKey()
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		write(provision.ReceiptFile, provision.SignedReceipt{Receipt: text, Signature: minisign.Sign(key, text)})
	}
	refused := func(want string) {
		t.Helper()
		if _, err := readSuccession(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	good := provision.HandoverReceipt{Node: "node1", Order: 7, State: note.Digest()}
	write(provision.NoteFile, note)
	refused("does not say that the rack was handed over")
	receipt(other, good)
	refused("not signed by the site")
	for _, r := range []provision.HandoverReceipt{{Node: "node2", Order: 7, State: good.State}, {Node: "node1", Order: 8, State: good.State}, {Node: "node1", Order: 7}} {
		receipt(own, r)
		refused("for another handover")
	}
	receipt(own, good)
	if p, err := readSuccession(dir); err != nil || p.node != "node1" || p.own != note.Own || p.address != note.Address {
		t.Errorf("%+v, %v", p, err)
	}
}

// A machine may leave only when the node is known to have the receipt.
func TestAwaitTaken(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		mark      provision.HandoverMark
		out, fail string
	}{
		{mark: provision.HandoverMark{Node: "node1", Taken: true}, out: "may leave"},
		{mark: provision.HandoverMark{Node: "node1"}, fail: "do not switch it off"},
		{fail: "was started again"},
	} {
		t.Run(c.out+c.fail, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			// A disc host that says what its journal has, and is killed.
			srv := &http.Server{}
			srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				json.NewEncoder(w).Encode(c.mark)
				l.Close()
				srv.SetKeepAlivesEnabled(false)
			})
			go srv.Serve(l)
			defer srv.Close()
			op := client.NewOperator(socket)
			defer op.Close()
			var out strings.Builder
			err = awaitTaken(t.Context(), op, "node1", &out, io.Discard)
			if (err != nil) != (c.fail != "") || err != nil && !strings.Contains(err.Error(), c.fail) || !strings.Contains(out.String(), c.out) || c.out == "" && out.Len() > 0 {
				t.Errorf("%q, %v", out.String(), err)
			}
		})
	}
}
