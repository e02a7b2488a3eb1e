package pxe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// Waits of TakeAddress and AddressHolder.
const (
	conflictAsks  = 3               // questions without an answer before an address counts as free, as in RFC 5227, 2.1.1
	conflictWait  = time.Second     // for an answer to each
	conflictAgain = 2 * time.Second // after an answer
	conflictSay   = time.Minute     // between two lines about it
)

// TakeAddress gives the address to the interface that has own, beside that, and
// tells the network, see RFC 5227, 2.3. As long as another machine has the address
// it waits, and says so.
func TakeAddress(ctx context.Context, own netip.Addr, address netip.Prefix, log *slog.Logger) error {
	ifi, err := interfaceOf(own)
	if err != nil {
		return err
	}
	c, err := arp.Dial(ifi)
	if err != nil {
		return fmt.Errorf("the address %s cannot be taken over on %s: %w", address.Addr(), ifi.Name, err)
	}
	defer c.Close()
	link, err := netlink.LinkByName(ifi.Name)
	if err != nil {
		return fmt.Errorf("the address %s cannot be taken over on %s: %w", address.Addr(), ifi.Name, err)
	}
	if _, err := interfaceOf(address.Addr()); err != nil { // else it is there since an earlier start
		if err := waitUntilFree(ctx, c, ifi.Name, address.Addr(), log); err != nil {
			return err
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), 32)}}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("the address %s cannot be given to %s: %w", address, ifi.Name, err)
		}
		log.Info("the disc host's address is taken over", "address", address.String(), "interface", ifi.Name)
	}
	p, err := arp.NewPacket(arp.OperationRequest, ifi.HardwareAddr, address.Addr(), make(net.HardwareAddr, 6), address.Addr())
	if err == nil {
		err = c.WriteTo(p, ethernet.Broadcast)
	}
	if err != nil {
		log.Warn("others may look for the disc host at its old place for a while", "err", err)
	}
	return nil
}

func waitUntilFree(ctx context.Context, c *arp.Client, iface string, address netip.Addr, log *slog.Logger) error {
	var said time.Time
	for silent := 0; silent < conflictAsks; {
		if err := c.SetDeadline(time.Now().Add(conflictWait)); err != nil {
			return err
		}
		other, err := c.Resolve(address)
		var late net.Error
		switch {
		case err == nil:
			silent = 0
			if time.Since(said) >= conflictSay {
				said = time.Now()
				log.Warn("another machine has the disc host's address: waiting until it gives it up", "address", address, "mac", other.String(), "interface", iface)
			}
			if err := provision.Sleep(ctx, conflictAgain); err != nil {
				return err
			}
		case errors.As(err, &late) && late.Timeout():
			silent++
		default:
			return fmt.Errorf("nobody can be asked on %s whether %s is free: %w", iface, address, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// AddressHolder asks on the interface which other machine has the address, which this
// one may have too (RFC 5227, 1.1: a probe, which changes nobody's ARP cache); empty:
// none answers.
func AddressHolder(ctx context.Context, iface string, address netip.Addr) (provision.MAC, error) {
	fail := func(err error) (provision.MAC, error) {
		return "", fmt.Errorf("nobody can be asked on %s who has %s: %w", iface, address, err)
	}
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return fail(err)
	}
	conn, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ARP, nil)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	// Another interface of this machine on the same wire answers as well (arp_ignore in
	// the kernel's ip-sysctl).
	all, err := net.Interfaces()
	if err != nil {
		return fail(err)
	}
	mine := func(mac net.HardwareAddr) bool {
		return slices.ContainsFunc(all, func(i net.Interface) bool { return bytes.Equal(i.HardwareAddr, mac) })
	}
	probe, err := arpProbe(ifi.HardwareAddr, address)
	if err != nil {
		return fail(err)
	}
	for range conflictAsks {
		if err := conn.SetDeadline(time.Now().Add(conflictWait)); err != nil {
			return fail(err)
		}
		if err := ctx.Err(); err != nil { // after the deadline was set: see AfterFunc
			return fail(err)
		}
		if _, err := conn.WriteTo(probe, &packet.Addr{HardwareAddr: ethernet.Broadcast}); err != nil {
			return fail(err)
		}
		mac, err := arpReply(conn, address, mine)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return mac, err
		}
	}
	return "", ctx.Err()
}

// arpProbe is the frame of an ARP probe.
func arpProbe(from net.HardwareAddr, address netip.Addr) ([]byte, error) {
	p, err := arp.NewPacket(arp.OperationRequest, from, netip.IPv4Unspecified(), make(net.HardwareAddr, 6), address)
	if err != nil {
		return nil, err
	}
	b, err := p.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return (&ethernet.Frame{Destination: ethernet.Broadcast, Source: from, EtherType: ethernet.EtherTypeARP, Payload: b}).MarshalBinary()
}

// arpReply reads who else says that the address is its own, until the deadline of conn.
func arpReply(conn net.PacketConn, address netip.Addr, mine func(net.HardwareAddr) bool) (provision.MAC, error) {
	buf := make([]byte, 128)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			return "", err
		}
		var f ethernet.Frame
		var p arp.Packet
		if f.UnmarshalBinary(buf[:n]) == nil && p.UnmarshalBinary(f.Payload) == nil && p.Operation == arp.OperationReply && p.SenderIP == address && !mine(p.SenderHardwareAddr) {
			return provision.MAC(p.SenderHardwareAddr.String()), nil
		}
	}
}

// DropAddress takes the address from the interface that has it, if one has. Others
// of the interface stay.
func DropAddress(address netip.Addr) error {
	ifi, err := interfaceOf(address)
	if err != nil {
		return nil
	}
	link, err := netlink.LinkByName(ifi.Name)
	if err != nil {
		return fmt.Errorf("the address %s cannot be taken from %s: %w", address, ifi.Name, err)
	}
	list, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("the address %s cannot be taken from %s: %w", address, ifi.Name, err)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == address {
			if err := netlink.AddrDel(link, &a); err != nil {
				return fmt.Errorf("the address %s cannot be taken from %s: %w", address, ifi.Name, err)
			}
		}
	}
	// The kernel takes the addresses along that were added after it in its subnet.
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() != address {
			a.Flags &^= unix.IFA_F_SECONDARY
			if err := netlink.AddrReplace(link, &a); err != nil {
				return fmt.Errorf("the address %s is gone from %s with %s: %w", a.IPNet, ifi.Name, address, err)
			}
		}
	}
	return nil
}

// InterfaceOf returns the name of this machine's interface that has the address.
func InterfaceOf(address netip.Addr) (string, error) {
	ifi, err := interfaceOf(address)
	if err != nil {
		return "", err
	}
	return ifi.Name, nil
}

// interfaceOf finds the interface that has an address.
func interfaceOf(address netip.Addr) (*net.Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, ifi := range all {
		addrs, err := ifi.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == address {
				return &ifi, nil
			}
		}
	}
	return nil, fmt.Errorf("no interface of this machine has the address %s: see 'ip address'", address)
}
