package pxe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"golang.org/x/sys/unix"

	"platter/provision"
)

const (
	dhcpServerPort, dhcpClientPort = 67, 68

	// A rack that powers on at once sends hundreds of packets in a burst; the
	// system's default of 208 KiB loses most of them.
	dhcpBuffer = 4 << 20
	// A longer wait in that buffer than this and the client has sent again.
	dhcpStale = 3 * time.Second
)

// facts is everything outside a DHCP message that its answer depends on.
type facts struct {
	net      provision.Network
	server   string // the disc host as URLs name it: address, or address:port
	loaders  loaders
	addr     netip.Addr // what the client has or may have here; invalid: nothing is free
	leased   bool       // addr is reserved for it or leased to it, not merely free
	hostname string
}

// answer is what happens to one DHCP message.
type answer struct {
	reply  *dhcpv4.DHCPv4 // nil: silence
	effect effect         // on addr, before the reply goes out
	addr   netip.Addr
	note   string // what is worth telling the operator
	warn   bool
}

// decide is the DHCP server: RFC 2131 section 4.3 for one message from one
// client on one network. It does no I/O and changes nothing.
func decide(req *dhcpv4.DHCPv4, f facts) answer {
	if _, err := clientMAC(req); err != nil {
		return answer{}
	}
	if relay := ip(req.GatewayIPAddr); relay.IsValid() && !f.net.Subnet.Contains(relay) {
		return answer{note: fmt.Sprintf("relayed by %s, which is not on this network", relay), warn: true}
	}
	want, has, server := ip(req.RequestedIPAddress()), ip(req.ClientIPAddr), ip(req.ServerIdentifier())
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		if !f.addr.IsValid() {
			return answer{note: noneFree(f.net), warn: true}
		}
		return f.grant(req, dhcpv4.MessageTypeOffer, effectHold)

	case dhcpv4.MessageTypeRequest:
		switch {
		case server.IsValid() && server != f.net.DiscHost: // selecting another server
			return answer{effect: effectUnhold, addr: f.addr, warn: true,
				note: fmt.Sprintf("took the offer of another DHCP server, %s: switch that server off or take it off this network", server)}
		case server.IsValid(): // selecting us
			if want == f.addr && want.IsValid() {
				return f.grant(req, dhcpv4.MessageTypeAck, effectBind)
			}
			return f.refuse(req, fmt.Sprintf("asked for %s, which it was not offered", want))
		case has.IsValid(): // renewing or rebinding
			if has == f.addr {
				return f.grant(req, dhcpv4.MessageTypeAck, effectBind)
			}
			return f.refuse(req, fmt.Sprintf("may not keep %s", has))
		case want.IsValid(): // rebooting with an address it remembers
			if want == f.addr && !f.leased {
				return answer{} // no record of it: another server may have one
			}
			if want == f.addr {
				return f.grant(req, dhcpv4.MessageTypeAck, effectBind)
			}
			return f.refuse(req, fmt.Sprintf("may not keep %s", want))
		}

	case dhcpv4.MessageTypeDecline:
		if server == f.net.DiscHost && want == f.addr && want.IsValid() {
			return answer{effect: effectDecline, addr: want, warn: true,
				note: fmt.Sprintf("says that %s is in use by another machine: find that machine ('arping -D -I %s %s')", want, f.net.Interface, want)}
		}

	case dhcpv4.MessageTypeRelease:
		if server == f.net.DiscHost && has == f.addr && has.IsValid() {
			return answer{effect: effectRelease, addr: has}
		}

	case dhcpv4.MessageTypeInform:
		if f.net.Subnet.Contains(has) {
			r := f.reply(req, dhcpv4.MessageTypeAck)
			r.ClientIPAddr = has.AsSlice()
			b := f.addBoot(req, r)
			return answer{reply: r, note: b.note, warn: b.note != ""}
		}
	}
	return answer{}
}

// grant answers with the client's address.
func (f facts) grant(req *dhcpv4.DHCPv4, t dhcpv4.MessageType, e effect) answer {
	r := f.reply(req, t)
	r.YourIPAddr = f.addr.AsSlice()
	if t == dhcpv4.MessageTypeAck {
		r.ClientIPAddr = req.ClientIPAddr
	}
	lease := f.net.Lease
	r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(lease))
	r.UpdateOption(dhcpv4.OptRenewTimeValue(lease / 2))
	r.UpdateOption(dhcpv4.OptRebindingTimeValue(lease * 7 / 8))
	b := f.addBoot(req, r)
	return answer{reply: r, effect: e, addr: f.addr, note: b.note, warn: b.note != ""}
}

// refuse sends the client back to the start.
func (f facts) refuse(req *dhcpv4.DHCPv4, why string) answer {
	r := base(req, dhcpv4.MessageTypeNak, f.net.DiscHost)
	// A relay passes a NAK on as a broadcast only if the flag says so (RFC
	// 2131, 4.3.2).
	r.SetBroadcast()
	r.UpdateOption(dhcpv4.OptMessage(why))
	return answer{reply: r, note: why}
}

// base is a reply with the fields and options that every reply has.
func base(req *dhcpv4.DHCPv4, t dhcpv4.MessageType, server netip.Addr) *dhcpv4.DHCPv4 {
	r := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootReply, HWType: req.HWType, TransactionID: req.TransactionID, Flags: req.Flags,
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: req.GatewayIPAddr,
		ClientHWAddr: req.ClientHWAddr, Options: dhcpv4.Options{},
	}
	r.UpdateOption(dhcpv4.OptMessageType(t))
	r.UpdateOption(dhcpv4.OptServerIdentifier(server.AsSlice()))
	// Echoed: the client's identifier (RFC 6842), the relay's notes (RFC
	// 3046).
	for _, c := range []dhcpv4.OptionCode{dhcpv4.OptionClientIdentifier, dhcpv4.OptionRelayAgentInformation} {
		if v := req.Options.Get(c); len(v) > 0 {
			r.UpdateOption(dhcpv4.OptGeneric(c, v))
		}
	}
	return r
}

// reply is base with what a client has to know about the network.
func (f facts) reply(req *dhcpv4.DHCPv4, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	r := base(req, t, f.net.DiscHost)
	r.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(f.net.Subnet.Bits(), 32)))
	r.UpdateOption(dhcpv4.OptBroadcastAddress(lastAddr(f.net.Subnet).AsSlice()))
	if f.net.Gateway.IsValid() {
		r.UpdateOption(dhcpv4.OptRouter(f.net.Gateway.AsSlice()))
	}
	if len(f.net.DNS) > 0 {
		var ips []net.IP
		for _, a := range f.net.DNS {
			ips = append(ips, a.AsSlice())
		}
		r.UpdateOption(dhcpv4.OptDNS(ips...))
	}
	if f.hostname != "" {
		r.UpdateOption(dhcpv4.OptHostName(f.hostname))
	}
	return r
}

// addBoot tells the client what to load. Old firmware reads the header, newer
// the options: both are filled in.
func (f facts) addBoot(req, r *dhcpv4.DHCPv4) boot {
	b := bootFor(req, f.loaders, f.server)
	if b.file == "" {
		return b
	}
	host := f.net.DiscHost.String()
	r.ServerIPAddr = f.net.DiscHost.AsSlice()
	r.ServerHostName = host
	r.BootFileName = b.file
	r.UpdateOption(dhcpv4.OptTFTPServerName(host))
	r.UpdateOption(dhcpv4.OptBootFileName(b.file))
	if id := req.Options.Get(dhcpv4.OptionClientMachineIdentifier); len(id) > 0 {
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, id)) // PXE 2.1, table 2-2
	}
	if b.http {
		r.UpdateOption(dhcpv4.OptClassIdentifier("HTTPClient")) // UEFI 2.10, 24.7.2
	}
	if b.ipxe {
		r.UpdateOption(dhcpv4.OptGeneric(optIPXE, []byte{ipxeNoPXEDHCP, 1, 1}))
	}
	return b
}

func noneFree(n provision.Network) string {
	if !n.PoolFirst.IsValid() {
		return "is not in the rack file, and this network has no pool for such machines"
	}
	return fmt.Sprintf("gets no address: the pool %s to %s is used up; enlarge it in the rack file", n.PoolFirst, n.PoolLast)
}

// destination is where a reply goes (RFC 2131, 4.1). A client that has no
// address yet could be reached by unicast only past ARP; a broadcast serves it
// as well.
func destination(req, reply *dhcpv4.DHCPv4, subnet netip.Prefix) netip.AddrPort {
	if relay := ip(req.GatewayIPAddr); relay.IsValid() {
		return netip.AddrPortFrom(relay, dhcpServerPort)
	}
	has := ip(req.ClientIPAddr)
	if reply.MessageType() != dhcpv4.MessageTypeNak && subnet.Contains(has) {
		return netip.AddrPortFrom(has, dhcpClientPort)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), dhcpClientPort)
}

// clientMAC is the sender's hardware address; an error says why the message is
// none that we answer.
func clientMAC(req *dhcpv4.DHCPv4) (provision.MAC, error) {
	switch {
	case req.OpCode != dhcpv4.OpcodeBootRequest:
		return "", errors.New("not a request")
	case req.HWType != iana.HWTypeEthernet || len(req.ClientHWAddr) != 6:
		return "", errors.New("not from an Ethernet address")
	case req.ClientHWAddr[0]&1 == 1 || req.ClientHWAddr.String() == "00:00:00:00:00:00":
		return "", fmt.Errorf("from %s, which is not a machine's address", req.ClientHWAddr)
	}
	return provision.MAC(req.ClientHWAddr.String()), nil
}

// ip returns an address of a message; 0.0.0.0 and what is no IPv4 address are
// invalid.
func ip(b net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(b)
	if a = a.Unmap(); !ok || !a.Is4() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

func lastAddr(p netip.Prefix) netip.Addr {
	return address(number(p.Addr()) | (1<<(32-p.Bits()) - 1))
}

// listenDHCP opens the socket of one network. It is bound to the interface, so
// that broadcasts and unicast renewals of one network never reach another's
// socket, and it does not share its port: whoever else serves DHCP here makes
// it fail.
func listenDHCP(ctx context.Context, n provision.Network, port int) (*net.UDPConn, error) {
	lc := control(func(fd int) error {
		if err := unix.BindToDevice(fd, n.Interface); err != nil {
			return err
		}
		setReceiveBuffer(fd, dhcpBuffer)
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
	})
	c, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// serveDHCP answers on one link until ctx ends.
func (s *Server) serveDHCP(ctx context.Context, l *link) error {
	stop := context.AfterFunc(ctx, func() { l.dhcp.Close() })
	defer stop()
	ifi, err := net.InterfaceByName(l.net.Interface)
	if err != nil {
		return fmt.Errorf("interface %s is gone: %w", l.net.Interface, err)
	}
	from := l.net.DiscHost.As4()
	oob := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(ifi.Index), Spec_dst: from})
	d := &dhcpLoop{server: s, link: l, log: s.Log.With("interface", l.net.Interface), answered: map[transaction]time.Time{}, told: map[string]time.Time{}}
	buf, ctl := make([]byte, 64<<10), make([]byte, 256)
	for {
		n, nc, _, _, err := l.dhcp.ReadMsgUDPAddrPort(buf, ctl)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("DHCP on %s stopped: %w", l.net.Interface, err)
		}
		reply, to := d.handle(buf[:n], receivedAt(ctl[:nc]))
		if reply == nil {
			continue
		}
		if _, _, err := l.dhcp.WriteMsgUDPAddrPort(reply, oob, to); err != nil && ctx.Err() == nil {
			d.log.Warn("cannot send a DHCP reply", "to", to, "err", err)
		}
	}
}

// receivedAt is when the kernel took the packet from the wire.
func receivedAt(ctl []byte) time.Time {
	msgs, err := unix.ParseSocketControlMessage(ctl)
	if err == nil {
		for _, m := range msgs {
			// struct timespec of a 64-bit system: seconds, nanoseconds.
			if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 {
				return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
			}
		}
	}
	return time.Now()
}

// transaction tells one message of a client from its next.
type transaction struct {
	mac  provision.MAC
	xid  dhcpv4.TransactionID
	kind dhcpv4.MessageType
}

// dhcpLoop is what one link's goroutine remembers between packets.
type dhcpLoop struct {
	server   *Server
	link     *link
	log      *slog.Logger
	answered map[transaction]time.Time
	told     map[string]time.Time
}

// handle turns one packet into the reply's bytes and destination; nil stands
// for silence.
func (d *dhcpLoop) handle(packet []byte, received time.Time) ([]byte, netip.AddrPort) {
	req, err := dhcpv4.FromBytes(packet)
	if err != nil {
		d.log.Debug("dropped a packet that is not DHCP", "err", err)
		return nil, netip.AddrPort{}
	}
	mac, err := clientMAC(req)
	if err != nil {
		d.log.Debug("dropped a DHCP message", "err", err)
		return nil, netip.AddrPort{}
	}
	if age := time.Since(received); age > dhcpStale {
		d.tell("stale", slog.LevelWarn, "this machine is too busy: DHCP messages wait too long and are dropped", "age", age.Round(time.Millisecond))
		return nil, netip.AddrPort{}
	}
	// A copy that was received before we answered was sent before the client
	// could see the answer: it asks for nothing new.
	t := transaction{mac, req.TransactionID, req.MessageType()}
	if at, ok := d.answered[t]; ok && received.Before(at) {
		return nil, netip.AddrPort{}
	}

	now := d.server.Now()
	f := d.facts(req, mac, now)
	a := decide(req, f)
	if l, keep := d.link.pool.apply(a.effect, mac, a.addr, now); keep {
		d.server.leases.Add(l)
	}
	d.report(req, mac, a)
	if a.reply == nil {
		return nil, netip.AddrPort{}
	}
	if len(d.answered) > 4096 {
		clear(d.answered)
	}
	d.answered[t] = time.Now()
	return a.reply.ToBytes(), destination(req, a.reply, d.link.net.Subnet)
}

// facts looks up what decide needs to know about the client.
func (d *dhcpLoop) facts(req *dhcpv4.DHCPv4, mac provision.MAC, now time.Time) facts {
	n := d.link.net
	f := facts{net: n, server: hostPort(n.DiscHost, d.server.Ports.HTTP, provision.HTTPPort), loaders: d.server.loaders}
	if r, ok := d.server.Backend.Reservation(mac); ok {
		f.hostname = r.Hostname
		if n.Subnet.Contains(r.Address) {
			f.addr, f.leased = r.Address, true
			return f
		}
		d.tell("wrong network "+string(mac), slog.LevelWarn, "a machine of the rack is plugged into the wrong network: it gets an address of the pool",
			"mac", mac, "name", r.Hostname, "belongs", r.Address)
	}
	want := ip(req.RequestedIPAddress())
	if has := ip(req.ClientIPAddr); has.IsValid() {
		want = has
	}
	f.addr, f.leased = d.link.pool.candidate(mac, want, now)
	return f
}

// report writes the log.
func (d *dhcpLoop) report(req *dhcpv4.DHCPv4, mac provision.MAC, a answer) {
	kind := req.MessageType()
	if a.note != "" {
		level := slog.LevelInfo
		if a.warn {
			level = slog.LevelWarn
		}
		d.tell(string(mac)+a.note, level, "DHCP: "+string(mac)+" "+a.note, "message", kind.String())
	}
	if a.reply == nil {
		return
	}
	level := slog.LevelDebug
	if a.reply.MessageType() == dhcpv4.MessageTypeAck {
		level = slog.LevelInfo
	}
	d.log.Log(context.Background(), level, "DHCP", "mac", mac, "message", kind.String(), "reply", a.reply.MessageType().String(),
		"address", a.addr.String(), "file", a.reply.BootFileName)
}

// tell logs what repeats itself once a minute.
func (d *dhcpLoop) tell(key string, level slog.Level, msg string, args ...any) {
	now := time.Now()
	if now.Sub(d.told[key]) < time.Minute {
		return
	}
	if len(d.told) > 1024 {
		clear(d.told)
	}
	d.told[key] = now
	d.log.Log(context.Background(), level, msg, args...)
}

// hostPort is the server as a URL names it.
func hostPort(a netip.Addr, port, standard int) string {
	if port == standard {
		return a.String()
	}
	return netip.AddrPortFrom(a, uint16(port)).String()
}
