package pxe

import (
	"context"
	"encoding/binary"
	"net"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// iPXE configures IPv4 and IPv6 side by side and goes on when both have ended.
// Where no router answers, its IPv6 part gives up after about 18 seconds, on
// every boot. So each link answers router solicitations (RFC 4861, 6.2) with
// an advertisement that offers nothing: no prefix, no managed addresses, and a
// lifetime of 0, by which no host takes us for a router. It is sent only when
// asked for, and only to who asked.

// listenRA opens the ICMPv6 socket of one network. Boot works without it, only
// slower: an interface without IPv6 is no error for the server.
func listenRA(ctx context.Context, n provision.Network) (*ipv6.PacketConn, error) {
	ifi, err := net.InterfaceByName(n.Interface)
	if err != nil {
		return nil, err
	}
	lc := control(func(fd int) error { return unix.BindToDevice(fd, n.Interface) })
	c, err := lc.ListenPacket(ctx, "ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, err
	}
	p := ipv6.NewPacketConn(c)
	var only ipv6.ICMPFilter
	only.SetAll(true)
	only.Accept(ipv6.ICMPTypeRouterSolicitation)
	for _, set := range []func() error{
		func() error { return p.SetICMPFilter(&only) },
		func() error { return p.SetControlMessage(ipv6.FlagHopLimit, true) },
		func() error { return p.SetHopLimit(255) },
		func() error { return p.SetMulticastHopLimit(255) },
		func() error { return p.SetMulticastInterface(ifi) },
		func() error { return p.JoinGroup(ifi, &net.IPAddr{IP: net.IPv6linklocalallrouters}) },
	} {
		if err := set(); err != nil {
			c.Close()
			return nil, err
		}
	}
	return p, nil
}

// serveRA answers on one link until ctx ends.
func (s *Server) serveRA(ctx context.Context, l *link) error {
	if l.ra == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { l.ra.Close() })
	defer stop()
	log := s.Log.With("interface", l.net.Interface)
	buf := make([]byte, 2048)
	for {
		n, cm, from, err := l.ra.ReadFrom(buf)
		if err != nil {
			if ctx.Err() == nil {
				log.Warn("router solicitations are no longer answered: iPXE waits longer than it needs to", "err", err)
			}
			return nil
		}
		hops := 0
		if cm != nil {
			hops = cm.HopLimit
		}
		ra := routerAdvertisement(buf[:n], hops)
		if ra == nil {
			continue
		}
		to, ok := from.(*net.IPAddr)
		if !ok || to.IP.IsUnspecified() {
			to = &net.IPAddr{IP: net.IPv6linklocalallnodes, Zone: l.net.Interface}
		}
		if _, err := l.ra.WriteTo(ra, nil, to); err != nil && ctx.Err() == nil {
			log.Debug("cannot send a router advertisement", "to", to.String(), "err", err)
		}
	}
}

// routerAdvertisement answers a router solicitation; nil if it is none that
// RFC 4861, 6.1.1 calls valid. The kernel fills in the checksum.
func routerAdvertisement(rs []byte, hopLimit int) []byte {
	if len(rs) < 8 || rs[0] != byte(ipv6.ICMPTypeRouterSolicitation) || rs[1] != 0 || hopLimit != 255 {
		return nil
	}
	for o := rs[8:]; len(o) > 0; o = o[int(o[1])*8:] {
		if len(o) < 8 || o[1] == 0 || len(o) < int(o[1])*8 {
			return nil
		}
	}
	ra := make([]byte, 16) // hop limit, flags, lifetime and timers: 0, unspecified
	binary.BigEndian.PutUint16(ra, uint16(ipv6.ICMPTypeRouterAdvertisement)<<8)
	return ra
}
