package pxe

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// Offer is one DHCP server's answer to the probe.
type Offer struct {
	Server  netip.Addr    // what it calls itself (server identifier)
	Source  netip.Addr    // the address it sent from
	MAC     provision.MAC // of the last machine on the way: the server or its relay
	Address netip.Addr    // what it offered
}

func (o Offer) String() string {
	s := fmt.Sprintf("server %s (MAC %s) offers %s", o.Server, o.MAC, o.Address)
	if o.Source != o.Server {
		s = fmt.Sprintf("server %s, heard from %s (MAC %s), offers %s", o.Server, o.Source, o.MAC, o.Address)
	}
	return s
}

// ProbeRogue asks for an address on the interface as a machine that nobody
// knows and returns who offers one. It waits up to timeout; after the first
// offer, one more second for others. It works on raw frames: it needs no
// address on the interface and no free port.
func ProbeRogue(ctx context.Context, iface string, timeout time.Duration) ([]Offer, error) {
	ifi, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("cannot look for other DHCP servers on %s: %w", iface, err)
	}
	conn, err := packet.Listen(ifi, packet.Datagram, unix.ETH_P_IP, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot look for other DHCP servers on %s: %w", iface, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	mac := make(net.HardwareAddr, 6)
	rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	discover, err := dhcpv4.NewDiscovery(mac, dhcpv4.WithBroadcast(true))
	if err != nil {
		return nil, fmt.Errorf("cannot look for other DHCP servers on %s: %w", iface, err)
	}
	frame := udpPacket(netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255}), dhcpClientPort, dhcpServerPort, discover.ToBytes())
	broadcast := &packet.Addr{HardwareAddr: net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}

	var offers []Offer
	end := time.Now().Add(timeout)
	buf := make([]byte, 64<<10)
	// Three questions: a switch may swallow the first after the link came up.
	for next := time.Now(); time.Now().Before(end); {
		if !time.Now().Before(next) {
			if _, err := conn.WriteTo(frame, broadcast); err != nil {
				return nil, fmt.Errorf("cannot ask for DHCP servers on %s: %w", iface, err)
			}
			next = next.Add(max(timeout/3, 100*time.Millisecond))
		}
		until := next
		if end.Before(until) {
			until = end
		}
		if err := conn.SetReadDeadline(until); err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil { // after the deadline was set: see AfterFunc
			return nil, err
		}
		n, from, err := conn.ReadFrom(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot listen for DHCP servers on %s: %w", iface, err)
		}
		o, ok := parseOffer(buf[:n], discover.TransactionID)
		if !ok {
			continue
		}
		if a, ok := from.(*packet.Addr); ok {
			o.MAC = provision.MAC(a.HardwareAddr.String())
		}
		if !slices.ContainsFunc(offers, func(p Offer) bool { return p.Server == o.Server && p.MAC == o.MAC }) {
			if offers = append(offers, o); len(offers) == 1 {
				if soon := time.Now().Add(time.Second); soon.Before(end) {
					end = soon
				}
			}
		}
	}
	return offers, ctx.Err()
}

// parseOffer reads an IPv4 packet and tells whether it answers xid.
func parseOffer(b []byte, xid dhcpv4.TransactionID) (Offer, bool) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return Offer{}, false
	}
	header := int(b[0]&15) * 4
	if header < 20 || len(b) < header+8 || b[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(b[header+2:]) != dhcpClientPort {
		return Offer{}, false
	}
	m, err := dhcpv4.FromBytes(b[header+8:])
	if err != nil || m.OpCode != dhcpv4.OpcodeBootReply || m.TransactionID != xid {
		return Offer{}, false
	}
	o := Offer{Source: netip.AddrFrom4([4]byte(b[12:16])), Server: ip(m.ServerIdentifier()), Address: ip(m.YourIPAddr)}
	if !o.Server.IsValid() {
		o.Server = o.Source
	}
	return o, true
}

// udpPacket builds an IPv4 packet (RFC 791) with UDP in it (RFC 768). UDP's
// checksum is left out, as IPv4 allows.
func udpPacket(src, dst netip.Addr, sport, dport uint16, payload []byte) []byte {
	b := make([]byte, 28, 28+len(payload))
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(payload)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	binary.BigEndian.PutUint16(b[20:], sport)
	binary.BigEndian.PutUint16(b[22:], dport)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(payload)))
	return append(b, payload...)
}
