package pxe

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"platter/provision"
)

// TestMain runs the tests in a network namespace of their own, in which no
// interface is real. It requires root.
func TestMain(m *testing.M) {
	const inside = "PXE_TEST_NAMESPACE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // Pdeathsig counts from the thread
		if err := cmd.Run(); err != nil {
			if cmd.ProcessState == nil {
				fmt.Fprintln(os.Stderr, "cannot make a network namespace (root is required):", err)
			}
			os.Exit(1)
		}
		os.Exit(0)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err == nil {
		err = noDAD()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot prepare the test's namespace:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// noDAD makes IPv6 addresses usable at once in the thread's namespace.
func noDAD() error {
	return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
}

// segment is one wire: on our end the interface of the disc host, on the other
// a namespace with the interface eth0 of a machine.
type segment struct {
	t       *testing.T
	network provision.Network
	far     netns.NsHandle
}

var segments sync.Mutex // interface names are unique in the namespace

// newSegment makes the wire number n: 10.99.n.0/24, the disc host at .1, a
// pool from .100 to .109.
func newSegment(t *testing.T, n byte) *segment {
	t.Helper()
	segments.Lock()
	defer segments.Unlock()
	name := fmt.Sprintf("rack%d", n)
	at := func(host byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, n, host}) }
	s := &segment{t: t, network: provision.Network{
		Interface: name, Subnet: netip.PrefixFrom(at(0), 24), DiscHost: at(1), Gateway: at(1),
		PoolFirst: at(100), PoolLast: at(109), Lease: time.Hour,
	}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "f"}
	must(netlink.LinkAdd(link))
	t.Cleanup(func() { netlink.LinkDel(link) })
	must(netlink.AddrAdd(link, addr(t, netip.PrefixFrom(at(1), 24))))
	must(netlink.LinkSetUp(link))

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	must(err)
	defer here.Close()
	s.far, err = netns.New()
	must(err)
	t.Cleanup(func() { s.far.Close() })
	must(noDAD())
	must(netns.Set(here))

	peer, err := netlink.LinkByName(name + "f")
	must(err)
	must(netlink.LinkSetNsFd(peer, int(s.far)))
	h, err := netlink.NewHandleAt(s.far)
	must(err)
	defer h.Close()
	peer, err = h.LinkByName(name + "f")
	must(err)
	must(h.LinkSetName(peer, "eth0"))
	must(h.LinkSetUp(peer))
	lo, err := h.LinkByName("lo")
	must(err)
	must(h.LinkSetUp(lo))
	return s
}

func addr(t *testing.T, p netip.Prefix) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(p.String())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// machineAddr gives the machine at the far end the address .host.
func (s *segment) machineAddr(host byte) netip.Addr {
	s.t.Helper()
	b := s.network.DiscHost.As4()
	b[3] = host
	a := netip.AddrFrom4(b)
	h, err := netlink.NewHandleAt(s.far)
	if err != nil {
		s.t.Fatal(err)
	}
	defer h.Close()
	link, err := h.LinkByName("eth0")
	if err == nil {
		err = h.AddrAdd(link, addr(s.t, netip.PrefixFrom(a, 24)))
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return a
}

// inside runs f on a thread in the machine's namespace.
func (s *segment) inside(f func()) {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		here, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		defer here.Close()
		if err := netns.Set(s.far); err != nil {
			done <- err
			return
		}
		f()
		err = netns.Set(here)
		if err == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
}

// command is a program in the machine's namespace.
func (s *segment) command(ctx context.Context, args ...string) *exec.Cmd {
	ns := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(s.far))
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + ns, "--"}, args...)...)
	cmd.Dir = s.t.TempDir()
	return cmd
}

// run runs a program in the machine's namespace and returns its output.
func (s *segment) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	out, err := s.command(ctx, args...).CombinedOutput()
	return string(out), err
}

// backend is a Backend of tests.
type backend struct {
	mu       sync.Mutex
	reserved map[provision.MAC]Reservation
	script   func(BootRequest) string
}

func (b *backend) Reservation(mac provision.MAC) (Reservation, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r, ok := b.reserved[mac]
	return r, ok
}

func (b *backend) BootScript(_ context.Context, r BootRequest) string {
	if b.script == nil {
		return r.Wait("waiting for " + string(r.MAC))
	}
	return b.script(r)
}

// fakeLoaders stand in for iPXE; the sizes make several TFTP blocks.
func fakeLoaders() fs.FS {
	return fstest.MapFS{
		"undionly.kpxe": {Data: bytes.Repeat([]byte("undionly"), 9000)},
		"snponly.efi":   {Data: bytes.Repeat([]byte("snponly."), 21000)},
		"secret.txt":    {Data: []byte("not to be served")},
	}
}

// logBuffer is a log that tests read.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newServer(t *testing.T, b Backend, segs ...*segment) (*Server, *logBuffer) {
	log := new(logBuffer)
	s := &Server{Backend: b, IPXE: fakeLoaders(), Objects: http.NotFoundHandler(), RogueWait: -1,
		Leases: filepath.Join(t.TempDir(), "state", "leases"),
		Log:    slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	for _, seg := range segs {
		s.Networks = append(s.Networks, seg.network)
	}
	return s, log
}

// serve listens and serves until the test ends, or until stop is called.
func serve(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Serve did not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out: %s", what)
		}
	}
}
