package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"platter/images"
	"platter/images/disc"
	"platter/provision"
	"platter/provision/dischost"
	"platter/provision/site"
	"platter/provision/stack/probe"
	"platter/provision/store"
	"platter/pxe"
)

// defaultStore is where a disc host keeps its images.
const defaultStore = "/var/lib/platter/store"

// defaultIPXE is where Debian's package ipxe has its loaders.
const defaultIPXE = "/usr/lib/ipxe"

type serveOptions struct {
	rack, stack, store, state, socket, ipxe string
	discs                                   []string
	interfaces                              map[string]string // the rack file's name -> this machine's
	successor                               string
	takeBack                                bool
}

func serveCmd() *cobra.Command {
	var o serveOptions
	c := &cobra.Command{
		Use:   "serve -c rack.yaml",
		Short: "Serve a rack: DHCP, TFTP, HTTP, the node API, and the page",
		Long: `Serve a rack: answer its network boots, install what is due, show what happens.

With --disc nothing has to be copied before: images and loaders are read from
where they lie, and every byte is compared before it goes out. Every file is there
in full length before the first node is answered; what needs a volume that was not
named is said.

Only the interfaces that the rack file names are served. An interface on which
another DHCP server answers is refused. Stop it with Ctrl-C or kill it at any
time: started again with the same --state it goes on where it was.

The page is read-only and listens on the rack file's page address, or on the
socket that systemd or 'platter lab exec --listen' hands over.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			log := slog.New(slog.NewTextHandler(c.ErrOrStderr(), nil))
			if o.successor != "" {
				return serveSuccessor(c.Context(), o, log)
			}
			if o.rack == "" {
				return errors.New("no rack file is named: platter serve -c rack.yaml")
			}
			return serve(c.Context(), o, nil, log)
		},
	}
	c.Flags().StringVarP(&o.rack, "config", "c", "", "the rack file")
	c.Flags().StringToStringVar(&o.interfaces, "interface", nil, "use another interface than the rack file names: RACK-FILE'S=THIS-MACHINE'S; may be repeated")
	withStack(c, &o.stack)
	c.Flags().StringVar(&o.store, "store", "", "folder of the image store (default "+defaultStore+"; with --disc: in --state)")
	c.Flags().StringArrayVar(&o.discs, "disc", nil, "serve from this volume of a set: a folder it is mounted on, an ISO file, or a drive; may be repeated")
	c.Flags().StringVar(&o.state, "state", "/var/lib/platter/state", "folder of the journal, the site's CA and its secrets")
	c.Flags().StringVar(&o.socket, "socket", defaultSocket, "Unix socket for operators")
	c.Flags().StringVar(&o.ipxe, "ipxe", "", "folder of the iPXE loaders (default: the disc's, else "+defaultIPXE+" of Debian's package ipxe)")
	c.Flags().StringVar(&o.successor, "successor", "", "on a node that the rack was handed over to: the folder with all of the above")
	c.Flags().BoolVar(&o.takeBack, "take-back", false, "serve again although the rack was handed over; only when the node that has it is gone for good")
	return c
}

// serve opens everything or says in one sentence what is missing, and then
// serves until ctx ends or the rack has been handed over. place is where a
// successor serves; nil: where the rack file says.
func serve(ctx context.Context, o serveOptions, place *successorPlace, log *slog.Logger) (err error) {
	rack, _, err := loadRackAndStack(o.rack, o.stack)
	if err != nil {
		return err
	}
	if err := rewire(rack.Networks, o.interfaces); err != nil {
		return err
	}
	place.apply(rack)
	if os.Geteuid() != 0 {
		return errors.New("serve must run as root: DHCP, TFTP and HTTP use ports below 1024. Run it with sudo")
	}
	imgs, discs, err := openImages(o)
	if err != nil {
		return err
	}
	defer discs.Close()
	if len(o.discs) > 0 {
		if err := discs.Extract("ipxe", filepath.Join(o.state, "ipxe")); err != nil {
			return err
		}
	}
	_, im, err := imgs.Image(rack.Image)
	if err != nil {
		return err
	}
	if wrong := im.Misfits(rack.Stack.Components); len(wrong) > 0 {
		return fmt.Errorf("the image of %s does not go with the stack, nothing was started:\n  %s\nserve another stack with --stack, or name another image in the rack file", o.rack, strings.Join(wrong, "\n  "))
	}
	if _, err := imgs.Boot("amd64"); err != nil {
		return err
	}

	st, err := site.Open(filepath.Join(o.state, dischost.SiteFolder))
	if err != nil {
		return err
	}
	journal, err := store.Open(filepath.Join(o.state, dischost.JournalFile), time.Now)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, journal.Close()) }()
	start, err := startOf(ctx, journal, o, rack, place, log)
	if err != nil || start == provision.StartRefuse {
		return err
	}
	if err := journal.SetRack(ctx, rack); err != nil && !(start == provision.StartHandOut && errors.Is(err, store.ErrHandedOver)) {
		return err
	}
	host := dischost.New(dischost.Config{
		Rack: rack, Store: journal, Site: st, Images: imgs,
		Probe: probe.Run, Log: log, Clock: time.Now, Version: version(),
		Succession: o.succession(imgs, place, log),
	})
	defer host.Close()
	if start == provision.StartHandOut {
		return handOut(ctx, o, rack, st, host, log)
	}

	boot := &pxe.Server{
		Networks: rack.Networks, Backend: host, IPXE: os.DirFS(o.loaders()),
		Objects: imgs.Handler(log), Leases: filepath.Join(o.state, dischost.LeasesFile), Log: log, Share: place != nil,
	}
	if err := boot.Listen(ctx); err != nil {
		return err
	}
	defer boot.Close()
	g, working := errgroup.WithContext(ctx)
	if err := listenAPIs(working, g, o, rack, st, host, log); err != nil {
		return err
	}
	g.Go(func() error { return boot.Serve(working) })
	g.Go(func() error { return host.Run(working) })
	g.Go(func() error { return untilHandedOver(working, host) })
	err = g.Wait()
	switch {
	case errors.Is(err, errHandedOver) && ctx.Err() == nil:
		return handOut(ctx, o, rack, st, host, log)
	case errors.Is(err, context.Canceled), errors.Is(err, errHandedOver):
		return nil
	}
	return err
}

// rewire puts other interfaces in the place of those that the rack file names; two
// may change places.
func rewire(networks []provision.Network, interfaces map[string]string) error {
	for from, to := range interfaces {
		if !slices.ContainsFunc(networks, func(n provision.Network) bool { return n.Interface == from }) {
			return fmt.Errorf("--interface %s=%s: the rack file names no interface %s", from, to, from)
		}
	}
	for i, n := range networks {
		networks[i].Interface = cmp.Or(interfaces[n.Interface], n.Interface)
	}
	return nil
}

// openImages opens the store and the discs to serve from.
func openImages(o serveOptions) (*images.Store, *disc.Discs, error) {
	dir := o.store
	if dir == "" {
		dir = defaultStore
		if len(o.discs) > 0 {
			dir = filepath.Join(o.state, "store")
		}
	}
	st, err := images.Open(dir)
	if err != nil || len(o.discs) == 0 {
		return st, &disc.Discs{}, err
	}
	discs, err := disc.Open(st.CheckSignature, o.discs...)
	if err != nil {
		return nil, nil, err
	}
	st, err = images.Open(dir, discs)
	return st, discs, err
}

// loaders is the folder of the iPXE programs for nodes: a disc's are copied into
// the state.
func (o serveOptions) loaders() string {
	if o.ipxe == "" && len(o.discs) > 0 {
		return filepath.Join(o.state, "ipxe")
	}
	return cmp.Or(o.ipxe, defaultIPXE)
}

// listenAPIs opens the node API on every network, the operators' socket and
// the page, and serves them in g.
func listenAPIs(ctx context.Context, g *errgroup.Group, o serveOptions, rack *provision.Rack, st *site.Site, host *dischost.Host, log *slog.Logger) error {
	if err := listenNodesAndOperators(ctx, g, o, rack, st, host.NodeAPI(), host.OperatorAPI(), log); err != nil {
		return err
	}
	page, err := listenPage(ctx, rack.Page)
	if err != nil && o.successor != "" {
		log.Warn("there is no page: its address is that of the first disc host", "err", err)
	} else if err != nil {
		return err
	}
	if page != nil {
		log.Info("the page is up", "url", "http://"+page.Addr().String()+"/")
		serveHTTP(ctx, g, page, host.ReadOnly(), log)
	}
	return nil
}

// listenNodesAndOperators serves what only nodes and operators may ask.
func listenNodesAndOperators(ctx context.Context, g *errgroup.Group, o serveOptions, rack *provision.Rack, st *site.Site, nodes, operators http.Handler, log *slog.Logger) error {
	var addrs []netip.Addr
	for _, n := range rack.Networks {
		addrs = append(addrs, n.DiscHost)
	}
	tlsConfig, err := st.ServerTLS(addrs)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr := netip.AddrPortFrom(a, provision.NodeAPIPort).String()
		l, err := listen(ctx, "tcp", addr, "the node API")
		if err != nil {
			return err
		}
		serveHTTP(ctx, g, tls.NewListener(l, tlsConfig), nodes, log)
	}
	l, err := listenSocket(ctx, o.socket)
	if err != nil {
		return err
	}
	serveHTTP(ctx, g, l, operators, log)
	return nil
}

func listen(ctx context.Context, network, addr, what string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, network, addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("cannot serve %s: another program already listens on %s. Stop it, or see which it is with 'ss -lntp'", what, addr)
	case err != nil:
		return nil, fmt.Errorf("cannot serve %s on %s: %w", what, addr, err)
	}
	return l, nil
}

// listenSocket opens the operators' socket for root alone. The journal's lock
// guarantees that no other disc host of this state is alive; a socket that
// somebody still answers belongs to another state.
func listenSocket(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the folder of the operators' socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("another disc host already answers on %s. Stop it, or choose another --socket", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot replace the old socket: %w", err)
	}
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	return listen(ctx, "unix", path, "operators")
}

// listenPage returns the socket that was handed over, or opens addr; nil when
// there is neither.
func listenPage(ctx context.Context, addr string) (net.Listener, error) {
	handed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("cannot use the socket that was handed over: %w", err)
	}
	if len(handed) > 0 && handed[0] != nil {
		return handed[0], nil
	}
	if addr == "" {
		return nil, nil
	}
	return listen(ctx, "tcp", addr, "the page")
}

// serveHTTP serves h on l until ctx ends, then gives open requests a moment.
func serveHTTP(ctx context.Context, g *errgroup.Group, l net.Listener, h http.Handler, log *slog.Logger) {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 30 * time.Second, IdleTimeout: 5 * time.Minute,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	g.Go(func() error {
		<-ctx.Done()
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(bounded) != nil {
			srv.Close()
		}
		return nil
	})
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
}
