package hostprep

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// device is a network interface of the host.
type device struct {
	Name   string `json:"name"`
	MAC    string `json:"mac"`
	Up     bool   `json:"up"`
	MTU    int    `json:"mtu"`
	Addrs  []addr `json:"addrs,omitempty"`  // but link-local ones
	Routes []way  `json:"routes,omitempty"` // but those that the kernel makes of an address
	File   string `json:"file,omitempty"`   // by which systemd-networkd configures it

	index, maxMTU int
	carrier       bool
	kind          string // "veth", "bond", "openvswitch"; empty for a card
	master        string // the bridge or bond that it is part of
}

// addr is an address of an interface.
type addr struct {
	Prefix netip.Prefix `json:"prefix"`
	Label  string       `json:"label,omitempty"`
	Leased bool         `json:"leased,omitempty"` // it ends some time: DHCP or a router gave it
}

// way is a route that leaves through one interface.
type way struct {
	Dst      netip.Prefix `json:"dst"` // 0.0.0.0/0: the default route
	Gateway  netip.Addr   `json:"gateway,omitzero"`
	Source   netip.Addr   `json:"source,omitzero"`
	Scope    int          `json:"scope,omitempty"`
	Protocol int          `json:"protocol,omitempty"`
	Metric   int          `json:"metric,omitempty"`
	Table    int          `json:"table,omitempty"`
	MTU      int          `json:"mtu,omitempty"`
	OnLink   bool         `json:"onlink,omitempty"`
}

// devices are all interfaces by name.
func devices() (map[string]device, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	most, err := maxMTUs()
	if err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	out, names := map[string]device{}, map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		a := l.Attrs()
		d := device{Name: a.Name, MAC: a.HardwareAddr.String(), Up: a.Flags&net.FlagUp != 0, MTU: a.MTU,
			index: a.Index, maxMTU: most[a.Index], carrier: a.RawFlags&unix.IFF_LOWER_UP != 0, master: names[a.MasterIndex]}
		if l.Type() != "device" {
			d.kind = l.Type()
		}
		list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("addresses of %s: %w", a.Name, err)
		}
		for _, x := range list {
			if p := prefix(x.IPNet); p.IsValid() && !p.Addr().IsLinkLocalUnicast() && !p.Addr().IsLoopback() {
				d.Addrs = append(d.Addrs, addr{p, x.Label, x.Flags&unix.IFA_F_PERMANENT == 0})
			}
		}
		out[d.Name] = d
	}
	return out, nil
}

// maxMTUs are the largest MTUs that drivers allow, by index; 0: any.
func maxMTUs() (map[int]int, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	out := map[int]int{}
	for _, m := range msgs {
		attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfInfomsg:])
		if err != nil {
			return nil, err
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.IFLA_MAX_MTU {
				out[int(nl.DeserializeIfInfomsg(m).Index)] = int(nl.NativeEndian().Uint32(a.Value))
			}
		}
	}
	return out, nil
}

// withRoutes adds the routes that leave through d.
func (d device) withRoutes() (device, error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteListFiltered(family, &netlink.Route{LinkIndex: d.index, Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
		if err != nil {
			return d, fmt.Errorf("routes of %s: %w", d.Name, err)
		}
		for _, r := range list {
			if r.Protocol == unix.RTPROT_KERNEL || r.Table == unix.RT_TABLE_LOCAL || r.Type != unix.RTN_UNICAST {
				continue
			}
			w := way{Scope: int(r.Scope), Protocol: int(r.Protocol), Metric: r.Priority, Table: r.Table, MTU: r.MTU, OnLink: r.Flags&unix.RTNH_F_ONLINK != 0,
				Dst: prefix(r.Dst), Gateway: address(r.Gw), Source: address(r.Src)}
			if !w.Dst.IsValid() {
				w.Dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
				if family == netlink.FAMILY_V6 {
					w.Dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
				}
			}
			d.Routes = append(d.Routes, w)
		}
	}
	// What a gateway is reached by comes before what goes through it.
	slices.SortStableFunc(d.Routes, func(a, b way) int { return b.Dst.Bits() - a.Dst.Bits() })
	return d, nil
}

// carry gives the interface named name all addresses and routes of d.
func (d device) carry(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	for _, a := range d.Addrs {
		x := &netlink.Addr{IPNet: ipNet(a.Prefix)}
		if a.Label != "" && name == d.Name {
			x.Label = a.Label
		}
		if err := netlink.AddrReplace(link, x); err != nil {
			return fmt.Errorf("address %s on %s: %w", a.Prefix, name, err)
		}
	}
	for _, w := range d.Routes {
		r := netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.Scope(w.Scope), Protocol: netlink.RouteProtocol(w.Protocol), Priority: w.Metric,
			Table: w.Table, MTU: w.MTU, Dst: ipNet(w.Dst), Gw: w.Gateway.AsSlice(), Src: w.Source.AsSlice()}
		if w.OnLink {
			r.Flags = unix.RTNH_F_ONLINK
		}
		if err := netlink.RouteReplace(&r); err != nil {
			return fmt.Errorf("route to %s over %s: %w", w.Dst, name, err)
		}
	}
	return nil
}

// drop takes d's addresses off the interface named name; routes go with them.
// What is not there is dropped.
func (d device) drop(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	for _, a := range d.Addrs {
		err := netlink.AddrDel(link, &netlink.Addr{IPNet: ipNet(a.Prefix)})
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("taking the address %s off %s: %w", a.Prefix, name, err)
		}
	}
	return nil
}

// level brings MTU and flag of the interface back to d's.
func (d device) level() error {
	if d.Up {
		return raise(d.Name, d.MTU)
	}
	link, err := netlink.LinkByName(d.Name)
	if err == nil {
		err = errors.Join(netlink.LinkSetDown(link), netlink.LinkSetMTU(link, d.MTU))
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", d.Name, err)
	}
	return nil
}

// raise sets an interface up, with an MTU unless it is 0.
func raise(name string, mtu int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if mtu != 0 && link.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("MTU %d of %s: %w", mtu, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", name, err)
	}
	return nil
}

// wayTo is the interface through which the host reaches one of the addresses.
func wayTo(to []netip.AddrPort) string {
	for _, a := range to {
		routes, err := netlink.RouteGet(a.Addr().AsSlice())
		if err != nil || len(routes) == 0 {
			continue
		}
		if l, err := netlink.LinkByIndex(routes[0].LinkIndex); err == nil {
			return l.Attrs().Name
		}
	}
	return ""
}

// answers waits until one of the addresses shows a sign of life.
func answers(ctx context.Context, to []netip.AddrPort) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	got := make(chan bool, len(to))
	for _, a := range to {
		go func() {
			for ctx.Err() == nil {
				one, done := context.WithTimeout(ctx, 3*time.Second)
				ask := connects
				if a.Port() == 0 {
					ask = resolves
				}
				alive := ask(one, a)
				if alive {
					done()
					got <- true
					return
				}
				// Nothing tells when a silent peer begins to speak. A refused
				// route fails at once and is asked again a little later.
				select {
				case <-time.After(250 * time.Millisecond):
				case <-ctx.Done():
				}
				done()
			}
		}()
	}
	select {
	case <-got:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("no answer from %s", names(to))
	}
}

// names lists who is asked.
func names(to []netip.AddrPort) string {
	var out []string
	for _, a := range to {
		out = append(out, a.Addr().String())
	}
	return strings.Join(out, " or ")
}

// connects: a refusal is a sign of life too.
func connects(ctx context.Context, a netip.AddrPort) bool {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", a.String())
	if err == nil {
		c.Close()
	}
	return err == nil || errors.Is(err, unix.ECONNREFUSED)
}

// resolves makes the kernel ask for the Ethernet address anew: gateways may
// answer nothing else.
func resolves(ctx context.Context, a netip.AddrPort) bool {
	ip := a.Addr().AsSlice()
	routes, err := netlink.RouteGet(ip)
	if err != nil || len(routes) == 0 || routes[0].Gw != nil {
		return false
	}
	index := routes[0].LinkIndex
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan netlink.NeighUpdate, 64)
	if netlink.NeighSubscribe(updates, ctx.Done()) != nil {
		return false
	}
	_ = netlink.NeighDel(&netlink.Neigh{LinkIndex: index, IP: ip}) // there may be none
	c, err := net.Dial("udp", netip.AddrPortFrom(a.Addr(), 9).String())
	if err != nil {
		return false
	}
	defer c.Close()
	if _, err := c.Write([]byte{0}); err != nil {
		return false
	}
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				return false
			}
			if u.Type == unix.RTM_NEWNEIGH && u.LinkIndex == index && u.IP.Equal(ip) && u.State == netlink.NUD_REACHABLE {
				return true
			}
		case <-ctx.Done():
			return false
		}
	}
}

func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(address(n.IP), bits)
}

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
