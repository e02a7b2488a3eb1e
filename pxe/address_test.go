package pxe

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"platter/provision"
)

// A successor takes the disc host's address when the old one has given it up, and
// not before; the network knows of it at once.
func TestTakeAddress(t *testing.T) {
	s := newSegment(t, 71)
	own := s.network.DiscHost
	old := s.machineAddr(2) // the old disc host
	take := netip.PrefixFrom(old, 24)
	h, err := netlink.NewHandleAt(s.far)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	far, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	var said logBuffer
	log := slog.New(slog.NewTextHandler(&said, nil))
	done := make(chan error, 1)
	go func() { done <- TakeAddress(t.Context(), own, take, log) }()
	eventually(t, "it waits", func() bool { return strings.Contains(said.String(), "another machine has the disc host's address") })
	if !strings.Contains(said.String(), far.Attrs().HardwareAddr.String()) {
		t.Errorf("it does not say which: %s", said.String())
	}
	if name, err := InterfaceOf(old); err == nil {
		t.Fatalf("%s has an address that another machine has", name)
	}
	s.machineAddr(3)
	if err := h.AddrDel(far, addr(t, take)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if name, err := InterfaceOf(old); err != nil || name != s.network.Interface {
		t.Fatalf("the address is on %q: %v", name, err)
	}
	// A second start finds it there.
	if err := TakeAddress(t.Context(), own, take, log); err != nil {
		t.Error(err)
	}

	if err := DropAddress(old); err != nil {
		t.Fatal(err)
	}
	if _, err := InterfaceOf(old); err == nil {
		t.Error("it still has the address that it gave up")
	}
	if _, err := InterfaceOf(own); err != nil {
		t.Errorf("its own address is gone as well: %v", err)
	}
	if err := DropAddress(old); err != nil {
		t.Errorf("an address that nobody has: %v", err)
	}
	// The first one of its subnet goes alone.
	if err := TakeAddress(t.Context(), own, take, log); err != nil {
		t.Error(err)
	}
	if err := DropAddress(own); err != nil {
		t.Error(err)
	}
	if _, err := InterfaceOf(own); err == nil {
		t.Error("it still has the address that it gave up")
	}
	if _, err := InterfaceOf(old); err != nil {
		t.Errorf("another address went with it: %v", err)
	}
	if err := TakeAddress(t.Context(), netip.MustParseAddr("10.250.0.1"), take, log); err == nil || !strings.Contains(err.Error(), "10.250.0.1") {
		t.Errorf("on a machine without its own address: %v", err)
	}
}

// Who else has an address is found out also by a machine that has it itself.
func TestAddressHolder(t *testing.T) {
	s := newSegment(t, 72)
	own, iface := s.network.DiscHost, s.network.Interface
	holder := func(address netip.Addr) provision.MAC {
		t.Helper()
		mac, err := AddressHolder(t.Context(), iface, address)
		if err != nil {
			t.Error(err)
		}
		return mac
	}
	node := s.machineAddr(2)
	mac := holder(node)
	if mac == "" {
		t.Error("nobody has the node's address")
	}
	if other := holder(own); other != "" {
		t.Errorf("%s has this machine's address", other)
	}
	// Another interface of this machine is no other machine.
	b := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pair72"}, PeerName: "pair72b"}
	if err := netlink.LinkAdd(b); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(b)
	peer, err := netlink.LinkByName("pair72b")
	if err := errors.Join(err, netlink.LinkSetUp(b), netlink.LinkSetUp(peer)); err != nil {
		t.Fatal(err)
	}
	if other, err := AddressHolder(t.Context(), "pair72", own); other != "" || err != nil {
		t.Errorf("%s: %v", other, err)
	}
	s.machineAddr(own.As4()[3])
	if other := holder(own); other != mac {
		t.Errorf("%q has this machine's address as well, want %s", other, mac)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := AddressHolder(ctx, iface, own); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := AddressHolder(t.Context(), "none", own); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("without an interface: %v", err)
	}
}
