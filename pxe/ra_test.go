package pxe

import (
	"net"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"
)

// TestRouterSolicitation asks as iPXE does, on the wire, and checks that the
// answer makes nobody use us as a router.
func TestRouterSolicitation(t *testing.T) {
	seg := newSegment(t, 14)
	s, _ := newServer(t, &backend{}, seg)
	serve(t, s)

	var c *icmp.PacketConn
	var ifi *net.Interface
	var err error
	seg.inside(func() {
		if ifi, err = net.InterfaceByName("eth0"); err == nil {
			c, err = icmp.ListenPacket("ip6:ipv6-icmp", "::")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := c.IPv6PacketConn()
	var only ipv6.ICMPFilter
	only.SetAll(true)
	only.Accept(ipv6.ICMPTypeRouterAdvertisement)
	for _, err := range []error{p.SetICMPFilter(&only), p.SetControlMessage(ipv6.FlagHopLimit, true), p.SetMulticastHopLimit(255), p.SetMulticastInterface(ifi)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	rs := []byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7}
	buf := make([]byte, 1500)
	for try := 1; ; try++ { // the first may meet an interface that is just coming up
		if _, err := p.WriteTo(rs, &ipv6.ControlMessage{IfIndex: ifi.Index}, &net.IPAddr{IP: net.IPv6linklocalallrouters, Zone: "eth0"}); err != nil && try == 10 {
			t.Fatal(err)
		}
		p.SetReadDeadline(time.Now().Add(time.Second))
		n, cm, _, err := p.ReadFrom(buf)
		// Before the filter was set, something else may have come.
		if (err != nil || n == 0 || buf[0] != byte(ipv6.ICMPTypeRouterAdvertisement)) && try < 10 {
			continue
		}
		if err != nil {
			t.Fatalf("no answer to a router solicitation: %v", err)
		}
		ra := buf[:n]
		if cm.HopLimit != 255 || n != 16 || ra[5] != 0 || ra[6] != 0 || ra[7] != 0 {
			t.Fatalf("hop limit %d, flags and lifetime %x (%x)", cm.HopLimit, ra[5:8], ra)
		}
		return
	}
}

func FuzzRouterAdvertisement(f *testing.F) {
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0}, 255)
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7}, 255)
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 3, 4, 5, 6, 7}, 255)
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 9}, 64)
	f.Fuzz(func(t *testing.T, b []byte, hops int) {
		if ra := routerAdvertisement(b, hops); ra != nil && (hops != 255 || len(b)%8 != 0 || b[0] != 133) {
			t.Fatalf("answered %x from %d hops", b, hops)
		}
	})
	if routerAdvertisement([]byte{133, 0, 0, 0, 0, 0, 0, 0}, 255) == nil {
		f.Error("a valid solicitation is not answered")
	}
}
