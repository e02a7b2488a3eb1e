package pxe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// Backend decides what machines get. Its methods are called from several
// goroutines and for every packet: they answer from memory.
type Backend interface {
	// Reservation is the address of a machine of the rack; ok is false for a
	// machine that takes one of the pool.
	Reservation(mac provision.MAC) (r Reservation, ok bool)
	// BootScript answers one boot request. It never fails: it explains on
	// screen. The methods of BootRequest write the scripts.
	BootScript(ctx context.Context, req BootRequest) string
}

// Reservation is a fixed address.
type Reservation struct {
	Address  netip.Addr
	Hostname string // may be empty
}

// Ports are the ports served. Zero values stand for the standard ones.
type Ports struct {
	DHCP int // 67
	TFTP int // 69
	HTTP int // provision.HTTPPort
}

// Server serves network boot on the interfaces of its networks and on no
// other. Fill the fields, call Listen, then Serve.
type Server struct {
	Networks []provision.Network
	Backend  Backend
	// IPXE holds the loaders: undionly.kpxe, and snponly.efi or ipxe.efi. With
	// Debian's ipxe package it is os.DirFS("/usr/lib/ipxe").
	IPXE fs.FS
	// Objects answers GET and HEAD below /objects/.
	Objects http.Handler
	// Leases is the path of the file that remembers the pool's leases.
	Leases string
	Log    *slog.Logger

	// RogueWait is how long Listen waits for another DHCP server to show
	// itself on each network; 0 stands for 4 s, which includes servers that
	// ping an address before they offer it. Negative: do not look.
	RogueWait time.Duration
	Ports     Ports
	// Share: another program has the HTTP port on all addresses, and shares it
	// (SO_REUSEPORT in socket(7)): ours is on the network's address alone.
	Share bool
	Now   func() time.Time // nil: time.Now

	loaders loaders
	leases  *leaseLog
	links   []*link
}

// link is one network with its open sockets.
type link struct {
	net  provision.Network
	pool *pool
	dhcp *net.UDPConn
	tftp *net.UDPConn
	http net.Listener
	ra   *ipv6.PacketConn // nil: no IPv6 on the interface
}

// Listen checks the interfaces, looks for other DHCP servers and opens every
// socket. When it fails nothing stays open; the error is one sentence that
// says what to do.
func (s *Server) Listen(ctx context.Context) (err error) {
	s.setDefaults()
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if len(s.Networks) == 0 {
		return errors.New("no network to serve: the rack file names none")
	}
	if s.loaders, err = readLoaders(s.IPXE); err != nil {
		return err
	}
	if err := s.Check(ctx); err != nil {
		return err
	}
	for _, n := range s.Networks {
		l := &link{net: n, pool: newPool(n)}
		s.links = append(s.links, l)
		if l.dhcp, err = listenDHCP(ctx, n, s.Ports.DHCP); err != nil {
			return listenError("UDP", s.Ports.DHCP, "DHCP", n, err)
		}
		if l.tftp, err = listenTFTP(ctx, n, s.Ports.TFTP); err != nil {
			return listenError("UDP", s.Ports.TFTP, "TFTP", n, err)
		}
		if l.http, err = listenHTTP(ctx, n, s.Ports.HTTP, s.Share); err != nil {
			return listenError("TCP", s.Ports.HTTP, "HTTP", n, err)
		}
		if l.ra, err = listenRA(ctx, n); err != nil {
			s.Log.Info("no IPv6 on this interface: iPXE takes 20 seconds longer to boot", "interface", n.Interface, "err", err)
		}
	}
	pools := make([]*pool, len(s.links))
	for i, l := range s.links {
		pools[i] = l.pool
	}
	s.leases, err = openLeases(s.Leases, pools, s.Log)
	return err
}

// Check looks whether this machine may serve the networks, and opens nothing: it has
// the disc host's addresses, and no other DHCP server answers.
func (s *Server) Check(ctx context.Context) error {
	s.setDefaults()
	for _, n := range s.Networks {
		if err := checkInterface(n); err != nil {
			return err
		}
	}
	return s.refuseRogues(ctx)
}

// Serve answers until ctx ends, then lets transfers finish for a few seconds
// and returns nil. It returns an error when a socket fails for good.
func (s *Server) Serve(ctx context.Context) error {
	defer s.close()
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range s.links {
		s.Log.Info("serving network boot", "interface", l.net.Interface, "subnet", l.net.Subnet.String(), "address", l.net.DiscHost.String())
		g.Go(func() error { return s.serveDHCP(ctx, l) })
		g.Go(func() error { return s.serveTFTP(ctx, l) })
		g.Go(func() error { return s.serveHTTP(ctx, l) })
		g.Go(func() error { return s.serveRA(ctx, l) })
	}
	return g.Wait()
}

// Close closes the sockets of a server that has listened and will not serve.
func (s *Server) Close() { s.close() }

func (s *Server) close() {
	for _, l := range s.links {
		if l.dhcp != nil {
			l.dhcp.Close()
		}
		if l.tftp != nil {
			l.tftp.Close()
		}
		if l.http != nil {
			l.http.Close()
		}
		if l.ra != nil {
			l.ra.Close()
		}
	}
	s.links = nil
	if s.leases != nil {
		s.leases.Close()
		s.leases = nil
	}
}

func (s *Server) setDefaults() {
	if s.Now == nil {
		s.Now = time.Now
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if s.RogueWait == 0 {
		s.RogueWait = 4 * time.Second
	}
	set := func(p *int, port int) {
		if *p == 0 {
			*p = port
		}
	}
	set(&s.Ports.DHCP, 67)
	set(&s.Ports.TFTP, 69)
	set(&s.Ports.HTTP, provision.HTTPPort)
}

// refuseRogues asks every network at once and fails if anyone answers.
func (s *Server) refuseRogues(ctx context.Context) error {
	if s.RogueWait < 0 {
		return nil
	}
	errs := make([]error, len(s.Networks))
	var wg sync.WaitGroup
	for i, n := range s.Networks {
		wg.Go(func() {
			offers, err := ProbeRogue(ctx, n.Interface, s.RogueWait)
			switch {
			case errors.Is(err, os.ErrPermission):
				errs[i] = listenError("raw", 0, "DHCP", n, err)
			case err != nil:
				errs[i] = err
			case len(offers) > 0:
				var who []string
				for _, o := range offers {
					who = append(who, o.String())
				}
				errs[i] = fmt.Errorf("another DHCP server answers on %s: %s; switch it off or take it off this network, then start again",
					n.Interface, strings.Join(who, ", and "))
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// checkInterface makes sure that the interface exists, is up and has the disc
// host's address.
func checkInterface(n provision.Network) error {
	ifi, err := net.InterfaceByName(n.Interface)
	if err != nil {
		return fmt.Errorf("interface %s does not exist on this machine: correct the rack file ('ip link' lists the interfaces): %w", n.Interface, err)
	}
	if ifi.Flags&net.FlagUp == 0 {
		return fmt.Errorf("interface %s is down: run 'ip link set %s up' and start again", n.Interface, n.Interface)
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return fmt.Errorf("cannot read the addresses of interface %s: %w", n.Interface, err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == n.DiscHost {
			return nil
		}
	}
	want := netip.PrefixFrom(n.DiscHost, n.Subnet.Bits())
	return fmt.Errorf("interface %s lacks the disc host's address %s: run 'ip address add %s dev %s' or correct the rack file", n.Interface, n.DiscHost, want, n.Interface)
}

// listenError turns a socket's error into a sentence for the operator.
func listenError(kind string, port int, what string, n provision.Network, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%s port %d (%s) on %s is taken by another program: 'ss -lnp sport = :%d' names it; stop it and start again: %w", kind, port, what, n.Interface, port, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("not allowed to serve %s on %s: run as root: %w", what, n.Interface, err)
	}
	return fmt.Errorf("cannot serve %s on %s: %w", what, n.Interface, err)
}

// control makes a net.ListenConfig set options on the socket before it is
// bound.
func control(set func(fd int) error) net.ListenConfig {
	return net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = set(int(fd)) }); cerr != nil {
			return cerr
		}
		return err
	}}
}

// setReceiveBuffer asks for size bytes: with the right to exceed the system's
// limit if we have it, up to the limit otherwise.
func setReceiveBuffer(fd, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, size) // the default size works too, with losses in a storm
	}
}
