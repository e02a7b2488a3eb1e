package hostprep

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// in runs do on a thread in the network namespace. Sockets and programs that
// it makes stay there.
func in(t *testing.T, ns netns.NsHandle, do func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if err := netns.Set(ns); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(here); err != nil {
			panic(err) // this thread must not go on elsewhere
		}
	}()
	do()
}

// namespace is a new one with its lo up.
func namespace(t *testing.T) netns.NsHandle {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root")
	}
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	var ns netns.NsHandle
	in(t, here, func() { // comes back from the new one
		if ns, err = netns.New(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { ns.Close() })
	in(t, ns, func() { up(t, "lo") })
	return ns
}

func up(t *testing.T, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return link
}

// realSysctls is a host whose /proc/sys is the real one, and with it that of
// the namespace of the thread that looks.
func realSysctls(t *testing.T, values map[string]string) (*Host, *Journal) {
	h := &Host{Root: t.TempDir()}
	if err := os.Mkdir(filepath.Join(h.Root, "proc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/sys", filepath.Join(h.Root, "proc/sys")); err != nil {
		t.Fatal(err)
	}
	for key, value := range values {
		h.Spec.Settings = append(h.Spec.Settings, provision.Setting{Kind: provision.Sysctl, Key: key, Value: value})
	}
	j, err := OpenJournal(h.Root)
	if err != nil {
		t.Fatal(err)
	}
	return h, j
}

// TestRealSysctls: a real kernel takes what it takes, and what it refuses or
// does not have is named.
func TestRealSysctls(t *testing.T) {
	in(t, namespace(t), func() {
		read := func(name string) string { return strings.TrimSpace(get(t, "/proc/sys/net/ipv4", name)) }
		before := read("tcp_keepalive_time") + " " + read("tcp_rmem")
		h, j := realSysctls(t, map[string]string{
			"net.ipv4.tcp_keepalive_time": "31", "net.ipv4.tcp_rmem": "4096 131072 16777216",
			"net.ipv4.tcp_keepalive_probes": "99999", "net.ipv4.tcp_no_such": "1",
		})
		_, err := Apply(t.Context(), []Step{h.sysctl()}, j, &heard{})
		for _, want := range []string{`refuses "99999" for /proc/sys/net/ipv4/tcp_keepalive_probes`, "has no /proc/sys/net/ipv4/tcp_no_such"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v\nlacks %q", err, want)
			}
		}
		if got := read("tcp_keepalive_time"); got != "31" {
			t.Errorf("tcp_keepalive_time is %s: one bad value kept a good one out", got)
		}
		found, err := h.sysctl().Check(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			wantOK := !strings.HasSuffix(f.What, "probes") && !strings.HasSuffix(f.What, "no_such")
			if f.OK != wantOK {
				t.Errorf("%s: %+v", f.What, f)
			}
		}
		if err := j.Undo(func(string) {}); err != nil {
			t.Fatal(err)
		}
		if after := read("tcp_keepalive_time") + " " + read("tcp_rmem"); after != before {
			t.Errorf("undone to %s, was %s", after, before)
		}
	})
}

const firewall = `table inet fw {
	chain forward {
		type filter hook forward priority 0; policy drop;
		ct state invalid drop
		ct state established,related accept
		tcp flags & (fin|syn|rst|ack) == syn ct state new accept
	}
}`

// TestKeepalive: a firewall forgets flows that say nothing for some seconds. A
// connection with keepalive, at the interval of the sysctl that the profile
// sets, outlives that; one without dies without a word.
func TestKeepalive(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Fatal("nft is not installed: apt-get install nftables")
	}
	client, router, server := namespace(t), namespace(t), namespace(t)
	for i, end := range []netns.NsHandle{client, server} {
		side := []string{"left", "right"}[i]
		subnet := []string{"10.1.0.", "10.2.0."}[i]
		address := func(link netlink.Link, host string) {
			a, err := netlink.ParseAddr(subnet + host + "/24")
			if err == nil {
				err = netlink.AddrAdd(link, a)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		in(t, end, func() {
			veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: side, PeerNamespace: netlink.NsFd(router)}
			if err := netlink.LinkAdd(veth); err != nil {
				t.Fatal(err)
			}
			address(up(t, "eth0"), "2")
		})
		in(t, router, func() { address(up(t, side), "1") })
		in(t, end, func() {
			if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(subnet + "1")}); err != nil {
				t.Fatal(err)
			}
		})
	}
	in(t, router, func() {
		nft := exec.Command("nft", "-f", "-")
		nft.Stdin = strings.NewReader(firewall)
		if out, err := nft.CombinedOutput(); err != nil {
			t.Fatalf("this kernel has no nftables with connection tracking: %v: %s", err, out)
		}
		for name, value := range map[string]string{
			"ipv4/ip_forward": "1", "netfilter/nf_conntrack_tcp_timeout_established": "3",
			"netfilter/nf_conntrack_tcp_loose": "0", // what is in the middle is no new flow
		} {
			if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	// The sysctls of the profile, with seconds in place of its half minute.
	in(t, client, func() {
		h, j := realSysctls(t, map[string]string{"net.ipv4.tcp_keepalive_time": "1", "net.ipv4.tcp_keepalive_intvl": "1", "net.ipv4.tcp_keepalive_probes": "4"})
		if _, err := Apply(t.Context(), []Step{h.sysctl()}, j, &heard{}); err != nil {
			t.Fatal(err)
		}
	})

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var listener net.Listener
	in(t, server, func() {
		var err error
		if listener, err = (&net.ListenConfig{KeepAlive: -1}).Listen(ctx, "tcp4", "10.2.0.2:5672"); err != nil {
			t.Fatal(err)
		}
	})
	defer listener.Close()
	connect := func(keepalive int) (near, far net.Conn) {
		in(t, client, func() {
			d := net.Dialer{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
				var set error
				err := c.Control(func(fd uintptr) {
					set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, keepalive)
				})
				return errors.Join(err, set)
			}}
			var err error
			if near, err = d.DialContext(ctx, "tcp4", "10.2.0.2:5672"); err != nil {
				t.Fatal(err)
			}
		})
		far, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { near.Close(); far.Close() })
		return near, far
	}
	kept, keptFar := connect(1)
	silent, silentFar := connect(0)

	conntrack, err := netlink.NewHandleAt(router, unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer conntrack.Close()
	// known tells whether the firewall knows the connection.
	known := func(c net.Conn) bool {
		flows, err := conntrack.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if int(f.Forward.SrcPort) == c.LocalAddr().(*net.TCPAddr).Port {
				return true
			}
		}
		return false
	}
	if !known(kept) || !known(silent) {
		t.Fatal("the firewall does not see the connections")
	}
	for known(silent) { // the kernel tells of a flow that ran out only when asked
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("the firewall forgets nothing")
		}
	}
	// The older of the two by now would be forgotten as well.
	arrives := func(near, far net.Conn, within time.Duration) error {
		if _, err := near.Write([]byte("x")); err != nil {
			return err
		}
		if err := far.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		_, err := far.Read(make([]byte, 1))
		return err
	}
	if err := arrives(silent, silentFar, 2*time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection without keepalive: %v, want a time-out: the firewall drops nothing", err)
	}
	if err := arrives(kept, keptFar, 20*time.Second); err != nil {
		t.Errorf("the connection with keepalive died: %v", err)
	}
}
