package pxe

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// client is a DHCP client on the machine's interface that works on raw frames,
// as firmware does.
func (s *segment) client(hw net.HardwareAddr) *nclient4.Client {
	s.t.Helper()
	var c *nclient4.Client
	var err error
	s.inside(func() {
		c, err = nclient4.New("eth0", nclient4.WithHWAddr(hw), nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(5))
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

func hw(n byte) net.HardwareAddr { return net.HardwareAddr{0x52, 0x54, 0, 0, 0, n} }

// socket is an ordinary DHCP socket of an installed system.
func (s *segment) socket(from netip.Addr) *net.UDPConn {
	s.t.Helper()
	var c *net.UDPConn
	var err error
	s.inside(func() {
		c, err = net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 68)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(s.network.DiscHost, 67)))
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// renew sends a renewal by unicast, as an installed system does, and returns
// the answer.
func (s *segment) renew(mac net.HardwareAddr, from netip.Addr) *dhcpv4.DHCPv4 {
	s.t.Helper()
	c := s.socket(from)
	defer c.Close()
	req := message(s.t, dhcpv4.MessageTypeRequest, dhcpv4.WithHwAddr(mac), has(from.String()))
	if _, err := c.Write(req.ToBytes()); err != nil {
		s.t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 2048)
	n, err := c.Read(b)
	if err != nil {
		s.t.Fatalf("no answer to a unicast renewal from %v: %v", from, err)
	}
	r, err := dhcpv4.FromBytes(b[:n])
	if err != nil || r.TransactionID != req.TransactionID {
		s.t.Fatalf("not an answer to the renewal: %v %v", r, err)
	}
	return r
}

// TestTwoNetworks: each network has its own socket, addresses and leases;
// renewals by unicast reach the right one.
func TestTwoNetworks(t *testing.T) {
	a, b := newSegment(t, 1), newSegment(t, 2)
	be := &backend{reserved: map[provision.MAC]Reservation{
		provision.MAC(hw(1).String()): {Address: netip.MustParseAddr("10.99.1.11"), Hostname: "n1"},
		provision.MAC(hw(2).String()): {Address: netip.MustParseAddr("10.99.2.12"), Hostname: "n2"},
	}}
	s, log := newServer(t, be, a, b)
	serve(t, s)

	ss, err := exec.Command("ss", "-H", "-l", "-n", "-t", "-u").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`0\.0\.0\.0%rack1:67`, `0\.0\.0\.0%rack2:67`, `10\.99\.1\.1:69`, `10\.99\.2\.1:69`, `10\.99\.1\.1:80`, `10\.99\.2\.1:80`} {
		if !regexp.MustCompile(`(?m)\s` + want + `\s`).Match(ss) {
			t.Errorf("no socket %s in\n%s", want, ss)
		}
	}
	if regexp.MustCompile(`(0\.0\.0\.0|\*|\[::\]):(67|69|80)\s`).Match(ss) {
		t.Errorf("a wildcard socket:\n%s", ss)
	}

	for i, seg := range []*segment{a, b} {
		mac := hw(byte(i + 1))
		lease, err := seg.client(mac).Request(t.Context(), dhcpv4.WithNetboot, archOpt(0))
		if err != nil {
			t.Fatal(err)
		}
		want, _ := be.Reservation(provision.MAC(mac.String()))
		if got := ip(lease.ACK.YourIPAddr); got != want.Address || lease.ACK.HostName() != want.Hostname {
			t.Fatalf("network %d: %v %q, want %+v", i, got, lease.ACK.HostName(), want)
		}
		if ip(lease.ACK.ServerIdentifier()) != seg.network.DiscHost || lease.ACK.BootFileName != "" {
			// nclient4 does not claim to be PXE: WithNetboot only asks for the options.
			t.Fatalf("network %d: %s", i, lease.ACK.Summary())
		}
		addr := seg.machineAddr(want.Address.As4()[3])
		for range 2 {
			ack := seg.renew(mac, addr)
			if ack.MessageType() != dhcpv4.MessageTypeAck || ip(ack.YourIPAddr) != addr || ip(ack.ServerIdentifier()) != seg.network.DiscHost {
				t.Fatalf("network %d, renewal: %s", i, ack.Summary())
			}
		}
	}

	// A machine of network 1 that is plugged into network 2 gets an address of
	// the pool, and the operator is told.
	lease, err := b.client(hw(1)).Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := ip(lease.ACK.YourIPAddr); !newPool(b.network).contains(got) {
		t.Errorf("in the wrong network it gets %v", got)
	}
	if !strings.Contains(log.String(), "plugged into the wrong network") {
		t.Error("the log does not tell of the machine in the wrong network")
	}
}

// TestPoolOverTheWire: the pool ends, releases reopen it, a killed server
// remembers.
func TestPoolOverTheWire(t *testing.T) {
	seg := newSegment(t, 3)
	seg.network.PoolLast = netip.MustParseAddr("10.99.3.101") // two addresses
	s, log := newServer(t, &backend{}, seg)
	stop := serve(t, s)

	one, err := seg.client(hw(1)).Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	two, err := seg.client(hw(2)).Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if one.ACK.YourIPAddr.Equal(two.ACK.YourIPAddr) {
		t.Fatalf("both get %v", one.ACK.YourIPAddr)
	}
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if l, err := seg.client(hw(3)).Request(short); err == nil {
		t.Fatalf("a third address out of two: %v", l.ACK.YourIPAddr)
	}
	if !strings.Contains(log.String(), "used up") {
		t.Error("the log does not say that the pool is used up")
	}

	// Kill: nothing but the file is left, and its last line is torn.
	eventually(t, "both leases in the file", func() bool {
		b, _ := os.ReadFile(s.Leases)
		return strings.Contains(string(b), hw(1).String()) && strings.Contains(string(b), hw(2).String())
	})
	b, err := os.ReadFile(s.Leases)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	s, _ = newServer(t, &backend{}, seg)
	if err := os.MkdirAll(filepath.Dir(s.Leases), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.Leases, append(b, `{"addr":"10.99.3.1`...), 0o644); err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	if got := seg.renew(hw(1), seg.machineAddr(one.ACK.YourIPAddr[3])); got.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("after the restart: %s", got.Summary())
	}
	addr := seg.machineAddr(two.ACK.YourIPAddr[3])
	c := seg.socket(addr)
	release := message(t, dhcpv4.MessageTypeRelease, dhcpv4.WithHwAddr(hw(2)), has(addr.String()), chose(seg.network.DiscHost.String()))
	if _, err := c.Write(release.ToBytes()); err != nil {
		t.Fatal(err)
	}
	c.Close()
	// The packets of one interface are answered in order: the release is in
	// effect by the time of the next request.
	three, err := seg.client(hw(3)).Request(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !three.ACK.YourIPAddr.Equal(two.ACK.YourIPAddr) {
		t.Errorf("got %v, released was %v", three.ACK.YourIPAddr, two.ACK.YourIPAddr)
	}
	got, err := seg.client(hw(9)).SendAndRead(t.Context(), nclient4.DefaultServers, message(t, dhcpv4.MessageTypeRequest, dhcpv4.WithHwAddr(hw(9)), has("10.99.3.77")), nil)
	if err != nil || got.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("an address that is not ours is not refused: %v %v", got, err)
	}
}

// TestPerfdhcp has a foreign client's load run against the server, with
// renewals.
func TestPerfdhcp(t *testing.T) {
	seg := newSegment(t, 4)
	seg.network.PoolLast = netip.MustParseAddr("10.99.4.250")
	seg.machineAddr(2)
	s, _ := newServer(t, &backend{}, seg)
	serve(t, s)
	out, err := seg.run("perfdhcp", "-4", "-l", "eth0", "-R", "100", "-r", "200", "-f", "50", "-p", "2", "-W", "1000000", seg.network.DiscHost.String())
	// perfdhcp ends with 3 when some of its messages had no answer in time;
	// the last ones of a run may not.
	if err != nil && !strings.Contains(out, "Rate:") {
		t.Fatalf("perfdhcp: %v\n%s", err, out)
	}
	for _, exchange := range []string{"DISCOVER-OFFER", "REQUEST-ACK", "REQUEST-ACK (renewal)"} {
		m := regexp.MustCompile(regexp.QuoteMeta("for: "+exchange) + `\*\*\*\s+sent packets: (\d+)\s+received packets: (\d+)`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("no %s:\n%s", exchange, out)
		}
		var sent, received int
		fmt.Sscan(m[1], &sent)
		fmt.Sscan(m[2], &received)
		t.Logf("%s: %d sent, %d answered", exchange, sent, received)
		if sent < 20 || received < sent*98/100 {
			t.Errorf("%s: %d of %d answered", exchange, received, sent)
		}
	}
}

// dnsmasq starts another DHCP server at the machine's place and returns when
// it serves.
func (s *segment) dnsmasq(addr netip.Addr) (stop func()) {
	s.t.Helper()
	cmd := s.command(context.Background(), "dnsmasq", "--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
		"--port=0", "--interface=eth0", "--bind-interfaces", "--pid-file", "--user=root",
		"--dhcp-range="+addr.Next().String()+","+addr.Next().Next().String()+",1h", "--dhcp-leasefile="+filepath.Join(s.t.TempDir(), "leases"))
	out, err := cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	s.t.Cleanup(stop)
	var seen strings.Builder
	for sc := bufio.NewScanner(out); sc.Scan(); {
		seen.WriteString(sc.Text() + "\n")
		if strings.Contains(sc.Text(), "sockets bound exclusively") {
			go io.Copy(io.Discard, out)
			return stop
		}
	}
	s.t.Fatalf("dnsmasq does not serve:\n%s", seen.String())
	return nil
}

// TestRogue: where another server answers, ours refuses and names it.
func TestRogue(t *testing.T) {
	seg, quiet := newSegment(t, 5), newSegment(t, 6)
	other := seg.machineAddr(66)
	stop := seg.dnsmasq(other)

	// By default we wait for servers that ping an address first, as dnsmasq
	// does, for three seconds.
	s, _ := newServer(t, &backend{}, seg, quiet)
	s.RogueWait = 0
	err := s.Listen(t.Context())
	var far string
	seg.inside(func() {
		if ifi, err := net.InterfaceByName("eth0"); err == nil {
			far = ifi.HardwareAddr.String()
		}
	})
	if err == nil || !strings.Contains(err.Error(), "10.99.5.66") || !strings.Contains(err.Error(), far) || !strings.Contains(err.Error(), "rack5") || strings.Contains(err.Error(), "rack6") {
		t.Fatalf("not refused, or not named: %v", err)
	}
	offers, err := ProbeRogue(t.Context(), seg.network.Interface, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if len(offers) != 1 || offers[0].Server != other || offers[0].Source != other || string(offers[0].MAC) != far || !seg.network.Subnet.Contains(offers[0].Address) {
		t.Fatalf("offers %+v, want one of %v (%s)", offers, other, far)
	}

	stop()
	s, _ = newServer(t, &backend{}, seg)
	s.RogueWait = 300 * time.Millisecond
	if err := s.Listen(t.Context()); err != nil {
		t.Fatalf("with the other server gone: %v", err)
	}
	s.Close()
	if _, err := ProbeRogue(t.Context(), "nosuch0", time.Second); err == nil || !strings.Contains(err.Error(), "nosuch0") {
		t.Errorf("no such interface: %v", err)
	}
}

// TestForeignServerShowsUp: a server that appears later is reported when a
// machine chooses it.
func TestForeignServerShowsUp(t *testing.T) {
	seg := newSegment(t, 7)
	s, log := newServer(t, &backend{}, seg)
	serve(t, s)
	c := seg.client(hw(1))
	offer, err := c.DiscoverOffer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	offer.UpdateOption(dhcpv4.OptServerIdentifier(net.IP{10, 99, 7, 66}))
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.RequestFromOffer(short, offer); err == nil {
		t.Fatal("we answered for another server")
	}
	if !strings.Contains(log.String(), "10.99.7.66") {
		t.Errorf("the log does not name the other server:\n%s", log)
	}
}

// TestListenRefuses: every reason is one clear sentence, and nothing stays
// open.
func TestListenRefuses(t *testing.T) {
	seg := newSegment(t, 8)
	others := 0 // sockets that the test itself holds
	refused := func(t *testing.T, s *Server, want ...string) {
		t.Helper()
		err := s.Listen(t.Context())
		if err == nil {
			s.Close()
			t.Fatal("not refused")
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q does not say %q", err, w)
			}
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("more than a sentence: %q", err)
		}
		out, err := exec.Command("ss", "-H", "-l", "-n", "-t", "-u").CombinedOutput()
		if err != nil {
			t.Fatal(err)
		}
		if open := regexp.MustCompile(`(?m)^.*:(67|69|80)\s.*$`).FindAll(out, -1); len(open) != others {
			t.Errorf("sockets stay open:\n%s", out)
		}
	}
	for name, port := range map[string]string{"DHCP": "67", "TFTP": "69"} {
		t.Run("port taken by "+name, func(t *testing.T) {
			c, err := net.ListenPacket("udp4", "0.0.0.0:"+port)
			if err != nil {
				t.Fatal(err)
			}
			s, _ := newServer(t, &backend{}, seg)
			others = 1
			refused(t, s, "UDP port "+port, "rack8", "taken", "ss -lnp")
			c.Close()
			others = 0
			if err := s.Listen(t.Context()); err != nil {
				t.Errorf("with the port free again: %v", err)
			}
			s.Close()
		})
	}
	t.Run("port taken by HTTP", func(t *testing.T) {
		c, err := net.Listen("tcp4", "10.99.8.1:80")
		if err != nil {
			t.Fatal(err)
		}
		s, _ := newServer(t, &backend{}, seg)
		others = 1
		refused(t, s, "TCP port 80", "rack8", "taken")
		c.Close()
		others = 0
		if err := s.Listen(t.Context()); err != nil {
			t.Errorf("with the port free again: %v", err)
		}
		s.Close()
	})
	t.Run("interface missing", func(t *testing.T) {
		s, _ := newServer(t, &backend{}, seg)
		s.Networks[0].Interface = "nosuch0"
		refused(t, s, "nosuch0", "does not exist", "ip link")
	})
	t.Run("interface lacks the address", func(t *testing.T) {
		s, _ := newServer(t, &backend{}, seg)
		s.Networks[0].DiscHost = netip.MustParseAddr("10.99.8.200")
		refused(t, s, "rack8", "10.99.8.200", "ip address add 10.99.8.200/24 dev rack8")
	})
	t.Run("no loaders", func(t *testing.T) {
		s, _ := newServer(t, &backend{}, seg)
		s.IPXE = os.DirFS(t.TempDir())
		refused(t, s, "undionly.kpxe", "apt install ipxe")
		s.IPXE = fstest.MapFS{"undionly.kpxe": {Data: []byte("x")}}
		refused(t, s, "snponly.efi or ipxe.efi", "apt install ipxe")
	})
	t.Run("no network", func(t *testing.T) {
		s, _ := newServer(t, &backend{})
		refused(t, s, "no network")
	})
	t.Run("second network fails", func(t *testing.T) {
		s, _ := newServer(t, &backend{}, seg, newSegment(t, 9))
		c, err := net.ListenPacket("udp4", "10.99.9.1:69")
		if err != nil {
			t.Fatal(err)
		}
		others = 1
		refused(t, s, "rack9", "taken")
		c.Close()
		others = 0
		one, err := net.ListenPacket("udp4", "0.0.0.0:67") // all of the first network's sockets are closed
		if err != nil {
			t.Fatal(err)
		}
		one.Close()
	})
	t.Run("lease file is a folder", func(t *testing.T) {
		s, _ := newServer(t, &backend{}, seg)
		s.Leases = t.TempDir()
		refused(t, s, "leases", s.Leases)
	})
}

// TestNotRoot: a thread without rights stands for another user.
func TestNotRoot(t *testing.T) {
	seg := newSegment(t, 10)
	s, _ := newServer(t, &backend{}, seg)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends without its rights
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			done <- fmt.Errorf("capset: %w", err)
			return
		}
		done <- s.Listen(t.Context())
	}()
	err := <-done
	if err == nil || !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "run as root") {
		t.Fatalf("%v", err)
	}
}

func TestTFTP(t *testing.T) {
	seg := newSegment(t, 11)
	seg.machineAddr(2)
	s, log := newServer(t, &backend{}, seg)
	stop := serve(t, s)
	want, err := fs.ReadFile(fakeLoaders(), "snponly.efi")
	if err != nil {
		t.Fatal(err)
	}
	same := func(file string) {
		t.Helper()
		got, err := os.ReadFile(file)
		if err != nil || string(got) != string(want) {
			t.Errorf("%d bytes (%v), want %d", len(got), err, len(want))
		}
	}
	out := filepath.Join(t.TempDir(), "got")
	for _, opts := range [][]string{nil, {"--option", "blksize 1428"}, {"--option", "blksize 60000", "--option", "tsize 0"}} {
		os.Remove(out)
		if o, err := seg.run(append(append([]string{"atftp"}, opts...), "--get", "-r", "snponly.efi", "-l", out, "10.99.11.1")...); err != nil {
			t.Fatalf("atftp %q: %v\n%s", opts, err, o)
		}
		same(out)
	}
	if o, err := seg.run("curl", "-sS", "--tftp-blksize", "1432", "-o", out, "tftp://10.99.11.1//snponly.efi"); err != nil { // with a slash in front
		t.Fatalf("curl: %v\n%s", err, o)
	}
	same(out)

	for _, name := range []string{"../../etc/passwd", "/../etc/passwd", "..", "secret.txt", "/etc/passwd", "SNPONLY.EFI", "", "//snponly.efi"} {
		os.Remove(out)
		o, err := seg.run("curl", "-sS", "--path-as-is", "-o", out, "tftp://10.99.11.1/"+name)
		if b, rerr := os.ReadFile(out); err == nil || rerr == nil && len(b) > 0 {
			t.Errorf("%q is served: %s", name, o)
		}
	}
	// Refused and logged with its name.
	if !regexp.MustCompile(`refused.*\.\./\.\./etc/passwd.*'\.\.'`).MatchString(log.String()) {
		t.Errorf("the log does not tell of the path with '..':\n%s", log)
	}
	if !regexp.MustCompile(`TFTP: sent.*peer=10\.99\.11\.2:\d+ file=snponly\.efi bytes=168000`).MatchString(log.String()) {
		t.Errorf("the log does not tell of the transfers:\n%s", log)
	}
	if err := os.WriteFile(out, []byte("evil"), 0o644); err != nil {
		t.Fatal(err)
	}
	if o, err := seg.run("curl", "-sS", "-T", out, "tftp://10.99.11.1/snponly.efi"); err == nil {
		t.Errorf("writing is allowed: %s", o)
	}

	// Packets of noise do not end it.
	conn := seg.dial("udp4", "10.99.11.1:69")
	for n := range 300 {
		b := make([]byte, n%40)
		rand.Read(b)
		if n%3 == 0 && len(b) > 1 {
			b[0], b[1] = 0, byte(n%7)
		}
		conn.Write(b) // may meet an ICMP error of the one before
	}
	if o, err := seg.run("curl", "-sS", "-o", out, "tftp://10.99.11.1/snponly.efi"); err != nil {
		t.Fatalf("after noise: %v\n%s", err, o)
	}
	same(out)
	stop()
}

// dial connects from the machine's namespace.
func (s *segment) dial(network, to string) net.Conn {
	s.t.Helper()
	var c net.Conn
	var err error
	s.inside(func() {
		var d net.Dialer
		c, err = d.DialContext(s.t.Context(), network, to)
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

func TestHTTP(t *testing.T) {
	seg := newSegment(t, 12)
	machine := seg.machineAddr(2)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "abc"), []byte("0123456789"), 0o644); err != nil {
		t.Fatal(err)
	}
	asked := make(chan BootRequest, 10)
	be := &backend{script: func(r BootRequest) string { asked <- r; return r.Local("n1 is installed") }}
	s, log := newServer(t, be, seg)
	s.Objects = http.StripPrefix("/objects/", http.FileServerFS(os.DirFS(dir)))
	serve(t, s)
	curl := func(args ...string) (status, body string) {
		t.Helper()
		out, err := seg.run(append([]string{"curl", "-sS", "--path-as-is", "-w", "\n%{http_code}"}, args...)...)
		if err != nil {
			t.Fatalf("curl %q: %v\n%s", args, err, out)
		}
		i := strings.LastIndexByte(out, '\n')
		return out[i+1:], out[:i]
	}
	const base = "http://10.99.12.1"

	status, body := curl(base + "/boot.ipxe?mac=52-54-00-AA-BB-CC&platform=efi&arch=x86_64")
	if status != "200" || !strings.HasPrefix(body, "#!ipxe\n") {
		t.Fatalf("%s %q", status, body)
	}
	want := BootRequest{MAC: "52:54:00:aa:bb:cc", Addr: machine, DiscHost: seg.network.DiscHost, Platform: "efi", Arch: "x86_64",
		Again: base + "/boot.ipxe?mac=52:54:00:aa:bb:cc&platform=efi&arch=x86_64"}
	if got := <-asked; got != want {
		t.Errorf("asked for %+v, want %+v", got, want)
	}
	for _, q := range []string{"", "?mac=", "?mac=zz", "?mac=ff:ff:ff:ff:ff:ff", "?mac=00:00:00:00:00:00", "?mac=00:11:22:33:44:55:66:77", "?mac=%0aimgexec%20evil", "?mac=$%7Bnet0/mac%7D", "?mac=%zz", "?" + strings.Repeat("a", 5000)} {
		status, body := curl(base + "/boot.ipxe" + q)
		if status != "200" || !strings.HasPrefix(body, "#!ipxe\n") || !strings.Contains(body, "not understood") || !strings.HasSuffix(body, "exit 1\n") {
			t.Errorf("%q: %s %q", q, status, body)
		}
		if strings.Contains(body, "\nimgexec") || strings.Contains(body, "${net0") {
			t.Errorf("%q gets into the script: %q", q, body)
		}
	}
	if status, _ := curl("-I", base+"/boot.ipxe?mac=52:54:00:aa:bb:cc"); status != "200" {
		t.Errorf("HEAD: %s", status)
	}
	if len(asked) > 0 {
		t.Errorf("the backend was asked by mistake: %+v", <-asked)
	}

	if status, body := curl("-H", "Range: bytes=3-5", base+"/objects/abc"); status != "206" || body != "345" {
		t.Errorf("range: %s %q", status, body)
	}
	if status, body := curl(base + "/ipxe/snponly.efi"); status != "200" || len(body) != 168000 {
		t.Errorf("loader: %s, %d bytes", status, len(body))
	}
	for _, path := range []string{"/", "/boot", "/boot.ipxe/", "/objects/../boot.ipxe", "/objects/..%2fabc", "/objects/%2e%2e/abc", "//objects/abc", "/objects//abc",
		"/objects/%61bc", `/objects/..\abc`, "/../../etc/passwd", "/ipxe/secret.txt", "/ipxe/../boot.ipxe", "/metrics"} {
		status, body := curl(base + path)
		if status != "404" || strings.Count(body, "\n") != 1 {
			t.Errorf("%s: %s %q", path, status, body)
		}
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS"} {
		if status, _ := curl("-X", method, base+"/boot.ipxe?mac=52:54:00:aa:bb:cc"); status != "405" {
			t.Errorf("%s: %s", method, status)
		}
	}
	if !regexp.MustCompile(`level=WARN msg=HTTP peer=10\.99\.12\.2:\d+ method=GET target=/objects/\.\./boot\.ipxe status=404`).MatchString(log.String()) {
		t.Error("the log does not tell of the path with '..'")
	}
	if !regexp.MustCompile(`msg=HTTP peer=10\.99\.12\.2:\d+ method=GET target=/objects/abc status=206 bytes=3`).MatchString(log.String()) {
		t.Errorf("the log does not tell of the range:\n%s", log)
	}

	// A stranger who is routed here is not served.
	seg.t = t
	if out, err := seg.run("ip", "address", "add", "192.0.2.7/32", "dev", "eth0"); err != nil {
		t.Fatal(out)
	}
	if out, err := exec.Command("ip", "route", "add", "192.0.2.7/32", "dev", seg.network.Interface).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	if status, _ := curl("--interface", "192.0.2.7", base+"/boot.ipxe?mac=52:54:00:aa:bb:cc"); status != "403" {
		t.Errorf("a stranger gets %s", status)
	}
	if len(asked) > 0 {
		t.Errorf("the backend was asked by mistake: %+v", <-asked)
	}
}

// TestSendfile: nothing between a file and the connection hides that the
// kernel may send it by itself.
func TestSendfile(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "object")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	w := &readFromSpy{ResponseRecorder: httptest.NewRecorder()}
	rec := &recorder{ResponseWriter: w, status: 200}
	r := httptest.NewRequest("GET", "/objects/x", nil)
	r.Header.Set("Range", "bytes=0-65535")
	http.ServeContent(rec, r, "", time.Time{}, f)
	if lr, ok := w.from.(*io.LimitedReader); !ok || lr.R != io.Reader(f) {
		t.Fatalf("the connection is given a %T", w.from)
	}
	if rec.bytes != 65536 || rec.status != 206 {
		t.Errorf("recorded %d bytes, status %d", rec.bytes, rec.status)
	}
}

type readFromSpy struct {
	*httptest.ResponseRecorder
	from io.Reader
}

func (w *readFromSpy) ReadFrom(r io.Reader) (int64, error) {
	w.from = r
	return io.Copy(w.ResponseRecorder, r)
}

// TestEnd: the end waits for a transfer under way for a moment, cuts it after,
// and leaves no socket.
func TestEnd(t *testing.T) {
	seg := newSegment(t, 13)
	seg.machineAddr(2)
	started := make(chan bool)
	s, _ := newServer(t, &backend{}, seg)
	s.Objects = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begins")
		w.(interface{ Unwrap() http.ResponseWriter }).Unwrap().(http.Flusher).Flush()
		started <- true
		<-r.Context().Done()
	})
	stop := serve(t, s)
	c := seg.dial("tcp4", "10.99.13.1:80")
	fmt.Fprintf(c, "GET /objects/x HTTP/1.1\r\nHost: x\r\n\r\n")
	<-started
	begin := time.Now()
	stop()
	if d := time.Since(begin); d > graceTime+5*time.Second {
		t.Errorf("the end took %v", d)
	}
	if _, err := io.ReadAll(c); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the transfer ended with %v", err)
	}
	again, _ := newServer(t, &backend{}, seg)
	if err := again.Listen(t.Context()); err != nil {
		t.Fatalf("a socket is left: %v", err)
	}
	again.Close()
}
