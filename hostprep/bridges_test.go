package hostprep

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"platter/hostprep/ovs"
	"platter/hostprep/ovs/ovstest"
	"platter/provision"
)

// The tests' program is also the guard of the changes that they make, and a
// process that makes one.
const (
	asRoot  = "PLATTER_TEST_ROOT"
	asApply = "PLATTER_TEST_UPLINK"
)

func TestMain(m *testing.M) {
	root := os.Getenv(asRoot)
	switch {
	case root != "" && slices.Contains(os.Args, "guard-uplink"):
		h := Host{Root: root}
		if err := h.GuardUplink(context.Background(), func() { fmt.Println("ready") }); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case root != "" && os.Getenv(asApply) != "":
		h := rackHost(root, provision.Bridge{Name: "br0", Management: true, Uplink: provision.Uplink{Interfaces: []string{os.Getenv(asApply)}}})
		if os.Getenv("PLATTER_TEST_NO_GUARD") != "" {
			h.Self = []string{"/bin/sh", "-c", "echo ready"} // it is gone as soon as it is there
		}
		fmt.Println(h.applyNow(context.Background()))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var (
	home = netip.MustParsePrefix("10.9.0.2/24")
	disc = netip.MustParseAddrPort("10.9.0.1:8443")
)

// rackHost is a host with these bridges, reached by the disc host at disc.
func rackHost(root string, bridges ...provision.Bridge) *Host {
	return &Host{Root: root, Spec: provision.HostSpec{Bridges: bridges}, Self: []string{"/proc/self/exe"}, Reach: []netip.AddrPort{disc}, datapath: "netdev"}
}

// applyNow is what the agent does for the bridges; the error is what failed.
func (h *Host) applyNow(ctx context.Context) error {
	j, err := OpenJournal(h.Root)
	if err != nil {
		return err
	}
	_, err = Apply(ctx, []Step{h.bridges()}, j, &heard{})
	return err
}

// wires connects the host's eth0 to eth3 to a switch, on which the disc host
// is, in a namespace of its own: eth0 and eth3 rightly, eth1 to a socket that is
// off, eth2 to one that carries VLAN 77 only.
func wires(t *testing.T) (root string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	must(err)
	defer here.Close()
	there, err := netns.New()
	must(err)
	defer there.Close()
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wire"}, PeerName: "disc", PeerNamespace: netlink.NsFd(here)}))
	wire, err := netlink.LinkByName("wire")
	must(err)
	must(netlink.LinkSetUp(wire))
	checksums(t, "wire")
	must(netlink.AddrAdd(wire, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(disc.Addr(), 24))}))
	// It echoes: a connection shows whether it lives on.
	l, err := net.Listen("tcp", disc.String())
	must(err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	must(netns.Set(here))
	must(raise("disc", 0))
	rack := ovs.Bridge{Name: "rack", Datapath: "netdev", Ports: []ovs.Port{{Name: "disc"}, {Name: "p0"}, {Name: "p2", VLAN: ovs.VLAN{Trunks: []int{77}}}, {Name: "p3"}}}
	for i := range 4 {
		p := fmt.Sprintf("p%d", i)
		must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("eth%d", i)}, PeerName: p}))
		checksums(t, fmt.Sprintf("eth%d", i))
		if p != "p1" {
			must(raise(p, 0))
		}
	}
	s, err := ovs.Dial(t.Context(), "")
	must(err)
	must(s.Apply(t.Context(), ovs.AddBridge(rack)))

	// The switch is in user space: the kernel also sees what it sees. Nothing
	// but the right interface may answer.
	for _, f := range []string{"arp_ignore", "rp_filter"} {
		must(os.WriteFile("/proc/sys/net/ipv4/conf/all/"+f, []byte("1"), 0))
	}
	for i := range 4 {
		must(raise(fmt.Sprintf("eth%d", i), 0))
	}
	eth0, err := netlink.LinkByName("eth0")
	must(err)
	must(netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(home)}))
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: disc.Addr().AsSlice(), Protocol: 4, Priority: 50}))

	root = t.TempDir()
	must(os.Setenv(asRoot, root)) // this process is the test's own
	lay := func(path, text string) {
		must(os.MkdirAll(filepath.Dir(root+path), 0o755))
		must(os.WriteFile(root+path, []byte(text), 0o644))
	}
	lay(fmt.Sprintf("/run/systemd/netif/links/%d", eth0.Attrs().Index), "ADMIN_STATE=configured\nNETWORK_FILE=/etc/systemd/network/10-platter.network\n")
	lay("/etc/systemd/network/10-platter.network", "# Written.\n[Match]\nMACAddress="+eth0.Attrs().HardwareAddr.String()+"\n\n[Network]\nAddress=10.9.0.2/24\nGateway=10.9.0.1\nDNS=10.9.0.1\nDHCP=no\nIPv6AcceptRA=no\nLinkLocalAddressing=no\nConfigureWithoutCarrier=yes\n")
	return root
}

// checksums makes the kernel write complete checksums on an interface: a switch
// in user space passes on what it reads.
func checksums(t *testing.T, name string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	off := struct{ cmd, data uint32 }{unix.ETHTOOL_STXCSUM, 0}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:], name)
	req.data = unsafe.Pointer(&off)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		t.Fatalf("%s: %v", name, errno)
	}
}

// home is the interface with the host's address.
func whereHome(t *testing.T) string {
	t.Helper()
	all, err := devices()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, d := range all {
		if slices.ContainsFunc(d.Addrs, func(a addr) bool { return a.Prefix == home }) {
			out = append(out, d.Name)
		}
	}
	return strings.Join(out, " and ")
}

// reached fails the test unless the host is reached, with its address and
// default route on the interface.
func reached(t *testing.T, on string) {
	t.Helper()
	if at := whereHome(t); at != on {
		t.Errorf("the address is on %q, want %s", at, on)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := answers(ctx, []netip.AddrPort{disc}); err != nil {
		t.Error(err)
	}
	far := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:0")}
	if over := wayTo(far); over != on {
		t.Errorf("the default route is over %q, want %s", over, on)
	}
}

func bridgesNow(t *testing.T) map[string]ovs.Bridge {
	t.Helper()
	s, err := ovs.Dial(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	rows, err := s.Bridges(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]ovs.Bridge{}
	for _, b := range rows {
		if b.Name != "rack" {
			out[b.Name] = b
		}
	}
	return out
}

func uplink(names ...string) provision.Uplink { return provision.Uplink{Interfaces: names} }

// TestBridgesRefused: what does not fit the host is refused by name, all of it,
// and nothing is changed, not even what would fit.
func TestBridgesRefused(t *testing.T) {
	t.Parallel()
	if !ovstest.Alone(t) {
		return
	}
	ovstest.Start(t)
	root := wires(t)
	ovstest.Tap(t, "card0")
	enslaved := ovstest.Tap(t, "card1")
	lan := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan"}}
	if err := errors.Join(netlink.LinkAdd(lan), netlink.LinkSetMaster(enslaved, lan)); err != nil {
		t.Fatal(err)
	}
	h := rackHost(root,
		provision.Bridge{Name: "br-good", Uplink: uplink("eth3")},
		provision.Bridge{Name: "br1", Uplink: uplink("eth9")},
		provision.Bridge{Name: "br2", MTU: 65530, Uplink: uplink("card0")},
		provision.Bridge{Name: "br3", Uplink: uplink("card1")},
		provision.Bridge{Name: "br4", Uplink: uplink("eth0")},
		provision.Bridge{Name: "lan"})
	results, err := Apply(t.Context(), []Step{h.bridges()}, nil, &heard{})
	if err != nil || results[0].Outcome != Drift || results[0].Before != nil {
		t.Fatalf("%+v, %v", results, err)
	}
	var text strings.Builder
	for _, f := range results[0].Findings {
		if !f.OK && !f.Person {
			t.Errorf("not for a person: %+v", f)
		}
		fmt.Fprintln(&text, f.What, f.Is)
	}
	for _, want := range []string{"br1 refused: interface eth9 does not exist", "br2 refused: MTU 65530 is more than interface card0 can, 65521", "br3 refused: interface card1 is part of lan already",
		"br4 refused: interface eth0 has the address 10.9.0.2/24, which would be cut off", "lan refused: lan is another interface of this host (bridge)"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, &text)
		}
	}
	if rows := bridgesNow(t); len(rows) > 0 {
		t.Errorf("bridges were made: %v", rows)
	}
	reached(t, "eth0")
}

// TestBridgesWithoutManagement: bridges that carry VMs only, in every form.
func TestBridgesWithoutManagement(t *testing.T) {
	t.Parallel()
	if !ovstest.Alone(t) {
		return
	}
	d := ovstest.Start(t)
	root := wires(t)
	h := rackHost(root, provision.Bridge{Name: "br-vm", MTU: 1400},
		provision.Bridge{Name: "br1", MTU: 1450, VLANs: []int{20, 10}, Uplink: uplink("eth1")},
		provision.Bridge{Name: "br2", Uplink: provision.Uplink{Interfaces: []string{"eth2", "eth3"}, Bond: provision.BondLACP}})
	h.Reach = nil // nobody needs to confirm
	for range 2 {
		if err := h.applyNow(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	found, err := h.bridges().Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		// Nobody is at the other end of eth1.
		if f.OK == (f.What == "carrier of the uplink of br1") {
			t.Errorf("%+v", f)
		}
	}
	for name, mtu := range map[string]int{"br-vm": 1400, "br1": 1450, "eth1": 1450} {
		if l, err := netlink.LinkByName(name); err != nil || l.Attrs().MTU != mtu {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
	rows := bridgesNow(t)
	if p := uplinkOf(rows["br1"], h.Spec.Bridges[1]); p == nil || p.VLAN.String() != "trunk of VLANs 10,20" {
		t.Errorf("%+v", rows["br1"])
	}
	if p := uplinkOf(rows["br2"], h.Spec.Bridges[2]); p == nil || p.Bond != (ovs.Bond{Mode: "balance-tcp", LACP: "active"}) || p.OtherConfig["lacp-fallback-ab"] != "true" || len(p.Interfaces) != 2 {
		t.Errorf("%+v", rows["br2"])
	}
	// An uplink that is asked for no more goes.
	h.Spec.Bridges[1] = provision.Bridge{Name: "br1"}
	if err := h.applyNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if row := bridgesNow(t)["br1"]; len(row.Ports) != 1 {
		t.Errorf("%+v", row)
	}
	reached(t, "eth0")
	d.StopDatabase()
	if f, err := h.bridges().Check(t.Context()); err != nil || len(f) != 1 || f[0].OK || f[0].What != "Open vSwitch" {
		t.Errorf("without a database: %+v, %v", f, err)
	}
}

// TestManagement: a right change of the management uplink is kept, connections
// live on, and the next boot knows; a wrong one after it leaves all as it was.
func TestManagement(t *testing.T) {
	t.Parallel()
	if !ovstest.Alone(t) {
		return
	}
	daemons := ovstest.Start(t)
	root := wires(t)
	conn, err := net.DialTimeout("tcp", disc.String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo := func() {
		t.Helper()
		b := []byte("x")
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(b); err != nil {
			t.Fatalf("a connection from before the change: %v", err)
		}
	}
	echo()
	mac := func(name string) string {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().HardwareAddr.String()
	}
	card := mac("eth0")
	bridge := provision.Bridge{Name: "br0", VLANs: []int{10}, Management: true, Uplink: uplink("eth0")}
	h := rackHost(root, bridge)
	clean := func() {
		t.Helper()
		if r, err := Check(t.Context(), []Step{h.bridges()}, &heard{}); err != nil || r[0].Outcome != OK {
			t.Errorf("%+v, %v", r, err)
		}
		if _, err := os.Stat(root + trialFile); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a trial is left: %v", err)
		}
	}
	if err := h.applyNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	reached(t, "br0")
	echo()
	clean()
	if mac("br0") != card {
		t.Errorf("the bridge has the address %s, the card %s", mac("br0"), card)
	}
	for path, want := range map[string]string{
		"05-platter-br0.network":  "[Match]\nName=br0\n\n[Network]\nAddress=10.9.0.2/24\nGateway=10.9.0.1\nDNS=10.9.0.1\n",
		"05-platter-eth0.network": "[Match]\nName=eth0\n",
	} {
		if b, err := os.ReadFile(root + "/etc/systemd/network/" + path); err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %s, %v", path, b, err)
		}
	}
	if b, err := os.ReadFile(root + "/etc/systemd/system/" + guardUnit); err != nil || !strings.Contains(string(b), "ExecStart=/proc/self/exe guard-uplink") {
		t.Errorf("%s: %s, %v", guardUnit, b, err)
	}

	// From one card to a bond: the gateway alone confirms it.
	h.Spec.Bridges[0].Uplink = provision.Uplink{Interfaces: []string{"eth0", "eth3"}, Bond: provision.BondActiveBackup}
	h.Reach = []netip.AddrPort{netip.AddrPortFrom(disc.Addr(), 0)}
	if err := h.applyNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	reached(t, "br0")
	echo()
	clean()
	before := bridgesNow(t)["br0"]

	h.Spec.Bridges[0].Uplink = uplink("eth1")
	h.within = 3 * time.Second
	if err := h.applyNow(t.Context()); err == nil || !strings.Contains(err.Error(), "was taken back") {
		t.Errorf("%v", err)
	}
	reached(t, "br0")
	echo()
	if after := bridgesNow(t)["br0"]; describePort(*uplinkOf(after, bridge)) != describePort(*uplinkOf(before, bridge)) {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	if _, err := os.Stat(root + "/etc/systemd/network/05-platter-eth1.network"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the next boot would use eth1: %v", err)
	}

	// A switch that does not come up again: the address falls back.
	h.Spec.Bridges[0].Uplink = provision.Uplink{Interfaces: []string{"eth0", "eth3"}, Bond: provision.BondActiveBackup}
	daemons.StopSwitch()
	if err := netlink.LinkDel(must(netlink.LinkByName("br0"))); err != nil {
		t.Fatal(err)
	}
	h.patience = time.Second
	if err := h.applyNow(t.Context()); err == nil || !strings.Contains(err.Error(), "until then the host's address is on eth0") {
		t.Errorf("a bridge without a switch: %v", err)
	}
	if at := whereHome(t); at != "eth0" {
		t.Errorf("the address is on %s", at)
	}
	// And goes back onto the bridge with the switch.
	h.patience, h.within = 0, 0
	daemons.StartSwitch()
	if err := h.applyNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	reached(t, "br0")
	clean()

	var told []string
	if err := h.UndoBridges(t.Context(), func(s string) { told = append(told, s) }); err != nil {
		t.Fatal(err)
	}
	reached(t, "eth0")
	if rows := bridgesNow(t); len(rows) > 0 || !slices.Contains(told, "the host's address is on eth0") {
		t.Errorf("left: %+v, told: %q", rows, told)
	}
	if err := must(OpenJournal(root)).Undo(func(string) {}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"br0", "eth0", "eth3"} {
		if _, err := os.Stat(root + "/etc/systemd/network/05-platter-" + name + ".network"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestNextBoot: the real systemd-networkd puts the address onto the bridge, and
// onto nothing else, from what a confirmed change left.
func TestNextBoot(t *testing.T) {
	t.Parallel()
	const networkd = "/lib/systemd/systemd-networkd"
	for _, path := range []string{networkd, networkDir} {
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
	}
	if !ovstest.Alone(t) {
		return
	}
	ovstest.Start(t)
	root := wires(t)
	account := must(user.Lookup("systemd-network"))
	uid, gid := must(strconv.Atoi(account.Uid)), must(strconv.Atoi(account.Gid))
	for _, err := range []error{
		unix.Mount(root+networkDir, networkDir, "", unix.MS_BIND, ""),
		// The sign for it that there is no udev to wait for.
		unix.Mount("", "/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""),
		os.MkdirAll(linksDir, 0o755),
		os.Chown(linksDir, uid, gid), os.Chown(filepath.Dir(linksDir), uid, gid),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// settled returns when everything is configured and the address is
	// somewhere.
	settled := func() {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			pending := ""
			if whereHome(t) == "" {
				pending = "the address is nowhere"
			}
			for _, d := range must(devices()) {
				state, err := os.ReadFile(filepath.Join(linksDir, fmt.Sprint(d.index)))
				if err != nil || strings.Contains(string(state), "ADMIN_STATE=pending") || strings.Contains(string(state), "ADMIN_STATE=configuring") {
					pending += fmt.Sprintf("; %s: %s %v", d.Name, state, err)
				}
			}
			if pending == "" {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("systemd-networkd has not configured everything: %s", pending)
			}
		}
	}
	start := func(name string, args ...string) (end func()) {
		t.Helper()
		cmd := exec.Command(name, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
		}
	}
	// boot starts systemd-networkd on interfaces without addresses.
	boot := func() (down func()) {
		t.Helper()
		for _, d := range must(devices()) {
			if err := d.drop(d.Name); err != nil {
				t.Fatal(err)
			}
			// A reboot empties /run.
			if err := os.RemoveAll(filepath.Join(linksDir, fmt.Sprint(d.index))); err != nil {
				t.Fatal(err)
			}
		}
		defer settled()
		return start(networkd)
	}
	// A bus, over which it is told to read its files again.
	if err := os.Mkdir("/run/dbus", 0o755); err != nil {
		t.Fatal(err)
	}
	defer start("dbus-daemon", "--system", "--nofork", "--nopidfile")()
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", "/run/dbus/system_bus_socket")
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(limit) {
			t.Fatal(err)
		}
	}
	down := boot()
	reached(t, "eth0")
	if err := errors.Join(os.RemoveAll(root+linksDir), os.Symlink(linksDir, root+linksDir)); err != nil {
		t.Fatal(err)
	}
	h := rackHost(root, provision.Bridge{Name: "br0", MTU: 1400, Management: true, Uplink: provision.Uplink{Interfaces: []string{"eth0", "eth3"}, Bond: provision.BondActiveBackup}})
	if err := h.applyNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"br0", "eth0", "eth3"} {
		if by := h.networkFile(must(devices())[name]); filepath.Base(by) != "05-platter-"+name+".network" {
			t.Errorf("systemd-networkd still configures %s by %q", name, by)
		}
	}
	settled()
	reached(t, "br0")
	down()
	down = boot()
	defer func() { down() }()
	reached(t, "br0")
	if r, err := Check(t.Context(), []Step{h.bridges()}, &heard{}); err != nil || r[0].Outcome != OK {
		t.Errorf("%+v, %v", r, err)
	}
	// Taken back, the address is where it was, at the next boot too.
	if err := errors.Join(h.UndoBridges(t.Context(), func(string) {}), must(OpenJournal(root)).Undo(func(string) {})); err != nil {
		t.Fatal(err)
	}
	settled()
	reached(t, "eth0")
	down()
	down = boot()
	reached(t, "eth0")
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestWrongUplink: a change that cuts the host off is taken back within 30
// seconds, and no boot tries it again.
func TestWrongUplink(t *testing.T) {
	t.Parallel()
	if !ovstest.Alone(t) {
		return
	}
	ovstest.Start(t)
	root := wires(t)
	for _, c := range []struct {
		name, card string
		within     time.Duration
	}{{"a dead socket", "eth1", 3 * time.Second}, {"the wrong VLAN", "eth2", tryWithin}} {
		t.Run(c.name, func(t *testing.T) {
			h := rackHost(root, provision.Bridge{Name: "br0", Management: true, Uplink: uplink(c.card)})
			h.within = c.within
			began := time.Now()
			err := h.applyNow(t.Context())
			took := time.Since(began)
			if err == nil || !strings.Contains(err.Error(), "bridge br0: the change of the uplink was taken back") || !strings.Contains(err.Error(), "no answer from 10.9.0.1") {
				t.Errorf("%v", err)
			}
			if took > 30*time.Second {
				t.Errorf("the host was back after %s", took)
			}
			t.Logf("back after %s", took)
			reached(t, "eth0")
			if rows := bridgesNow(t); len(rows) > 0 {
				t.Errorf("left: %+v", rows)
			}
			// The next boot only tells.
			began = time.Now()
			r, err := Apply(t.Context(), []Step{h.bridges()}, nil, &heard{})
			if err != nil || r[0].Outcome != Drift || !strings.Contains(r[0].Findings[0].Why, "taken back: no answer from") || time.Since(began) > 5*time.Second {
				t.Errorf("the next boot: %+v, %v after %s", r, err, time.Since(began))
			}
		})
	}
}

// TestCutOff: whoever makes a wrong change is killed, hangs, or loses power
// together with its guard, while the host is cut off. It is reached again
// within 30 seconds, or after power loss at the next start.
func TestCutOff(t *testing.T) {
	t.Parallel()
	if !ovstest.Alone(t) {
		return
	}
	ovstest.Start(t)
	root := wires(t)
	for _, c := range []struct {
		name   string
		signal os.Signal
		power  bool
	}{{"killed", os.Kill, false}, {"power loss", os.Kill, true}, {"hangs", syscall.SIGSTOP, false}} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.RemoveAll(root + takenBackFile("br0")); err != nil {
				t.Fatal(err)
			}
			moved := make(chan netlink.AddrUpdate, 64)
			done := make(chan struct{})
			defer close(done)
			if err := netlink.AddrSubscribe(moved, done); err != nil {
				t.Fatal(err)
			}
			wait := func(name string, added bool) {
				t.Helper()
				limit := time.After(40 * time.Second)
				for {
					select {
					case u := <-moved:
						if l, err := netlink.LinkByIndex(u.LinkIndex); err == nil && l.Attrs().Name == name && u.NewAddr == added && prefix(&u.LinkAddress) == home {
							return
						}
					case <-limit:
						t.Fatalf("the address of %s did not change", name)
					}
				}
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), asApply+"=eth2")
			if c.power {
				cmd.Env = append(cmd.Env, "PLATTER_TEST_NO_GUARD=1")
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wait("eth0", false)
			wait("br0", true)
			began := time.Now()
			if err := cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			h := rackHost(root, provision.Bridge{Name: "br0", Management: true, Uplink: uplink("eth2")})
			if c.power {
				_ = cmd.Wait()
				if at := whereHome(t); at != "br0" {
					t.Errorf("nobody was to take the change back, the address is on %s", at)
				}
				// The agent's next start.
				if err := h.applyNow(t.Context()); err != nil {
					t.Error(err)
				}
			}
			wait("eth0", true)
			took := time.Since(began)
			if took > 30*time.Second {
				t.Errorf("the host was back after %s", took)
			}
			t.Logf("back after %s", took)
			if !c.power {
				_ = cmd.Wait()
			}
			// Waits for the guard, if it is not done yet.
			if err := h.endTrial(t.Context()); err != nil {
				t.Error(err)
			}
			reached(t, "eth0")
			if rows := bridgesNow(t); len(rows) > 0 {
				t.Errorf("left: %+v", rows)
			}
			if h.takenBack(h.Spec.Bridges[0]) == "" {
				t.Error("the next boot would try it again")
			}
		})
	}
}

// TestGuardSparesOthers: a trial that was cut off names a process which is
// another one after a reboot. While one guard takes the change back, a second
// one does not end it.
func TestGuardSparesOthers(t *testing.T) {
	t.Parallel()
	other := exec.Command("sleep", "infinity")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = other.Wait(); close(ended) }()
	defer func() { _ = other.Process.Kill(); <-ended }()
	h := &Host{Root: t.TempDir()}
	lock, err := h.begin(trial{Bridge: "br0", PID: other.Process.Pid, Until: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := h.GuardUplink(ctx, func() {}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("the guard did not wait for the other: %v", err)
	}
	select {
	case <-ended:
		t.Fatal("the guard ended a process that has nothing to do with the trial")
	default:
	}
}
