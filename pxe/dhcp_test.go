package pxe

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"platter/provision"
)

var (
	testMAC = net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	testNet = provision.Network{
		Interface: "br0", Subnet: netip.MustParsePrefix("10.1.2.0/24"), DiscHost: netip.MustParseAddr("10.1.2.1"),
		Gateway: netip.MustParseAddr("10.1.2.254"), DNS: []netip.Addr{netip.MustParseAddr("10.1.2.53")},
		PoolFirst: netip.MustParseAddr("10.1.2.100"), PoolLast: netip.MustParseAddr("10.1.2.103"), Lease: time.Hour,
	}
	testLoaders = loaders{files: map[string][]byte{}, bios: "undionly.kpxe", efi: "snponly.efi"}
)

func testFacts(addr string, leased bool) facts {
	f := facts{net: testNet, server: "10.1.2.1", loaders: testLoaders, leased: leased, hostname: "n1"}
	if addr != "" {
		f.addr = netip.MustParseAddr(addr)
	}
	return f
}

func message(t testing.TB, kind dhcpv4.MessageType, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(testMAC)}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func opt(o dhcpv4.Option) dhcpv4.Modifier    { return dhcpv4.WithOption(o) }
func wants(a string) dhcpv4.Modifier         { return opt(dhcpv4.OptRequestedIPAddress(net.ParseIP(a))) }
func chose(a string) dhcpv4.Modifier         { return opt(dhcpv4.OptServerIdentifier(net.ParseIP(a))) }
func has(a string) dhcpv4.Modifier           { return dhcpv4.WithClientIP(net.ParseIP(a)) }
func relayed(a string) dhcpv4.Modifier       { return dhcpv4.WithGatewayIP(net.ParseIP(a)) }
func class(c string) dhcpv4.Modifier         { return opt(dhcpv4.OptClassIdentifier(c)) }
func archOpt(a ...iana.Arch) dhcpv4.Modifier { return opt(dhcpv4.OptClientArch(a...)) }

// TestDecide goes through RFC 2131, table 4 and section 4.3.
func TestDecide(t *testing.T) {
	const none = dhcpv4.MessageTypeNone
	discover, request := dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest
	offer, ack, nak := dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak
	tests := []struct {
		name   string
		req    *dhcpv4.DHCPv4
		addr   string
		leased bool
		reply  dhcpv4.MessageType
		effect effect
		to     string
	}{
		{"discover", message(t, discover), "10.1.2.11", true, offer, effectHold, "255.255.255.255:68"},
		{"discover, pool used up", message(t, discover), "", false, none, effectNone, ""},
		{"discover through a relay here", message(t, discover, relayed("10.1.2.9")), "10.1.2.11", true, offer, effectHold, "10.1.2.9:67"},
		{"discover through a relay elsewhere", message(t, discover, relayed("10.9.2.9")), "10.1.2.11", true, none, effectNone, ""},
		{"selecting us", message(t, request, wants("10.1.2.11"), chose("10.1.2.1")), "10.1.2.11", true, ack, effectBind, "255.255.255.255:68"},
		{"selecting us with another address", message(t, request, wants("10.1.2.12"), chose("10.1.2.1")), "10.1.2.11", true, nak, effectNone, "255.255.255.255:68"},
		{"selecting us without an address", message(t, request, chose("10.1.2.1")), "10.1.2.11", true, nak, effectNone, "255.255.255.255:68"},
		{"selecting another server", message(t, request, wants("10.1.2.66"), chose("10.1.2.66")), "10.1.2.100", false, none, effectUnhold, ""},
		{"rebooting with its address", message(t, request, wants("10.1.2.11")), "10.1.2.11", true, ack, effectBind, "255.255.255.255:68"},
		{"rebooting, unknown here", message(t, request, wants("10.1.2.101")), "10.1.2.101", false, none, effectNone, ""},
		{"rebooting with another's address", message(t, request, wants("10.1.2.101")), "10.1.2.102", false, nak, effectNone, "255.255.255.255:68"},
		{"rebooting from another network", message(t, request, wants("192.168.0.7")), "10.1.2.11", true, nak, effectNone, "255.255.255.255:68"},
		{"renewing", message(t, request, has("10.1.2.11")), "10.1.2.11", true, ack, effectBind, "10.1.2.11:68"},
		{"renewing what expired and is free", message(t, request, has("10.1.2.101")), "10.1.2.101", false, ack, effectBind, "10.1.2.101:68"},
		{"renewing what it may not keep", message(t, request, has("10.1.2.101")), "10.1.2.11", true, nak, effectNone, "255.255.255.255:68"},
		{"renewing, pool used up", message(t, request, has("10.1.2.101")), "", false, nak, effectNone, "255.255.255.255:68"},
		{"request for nothing", message(t, request), "10.1.2.11", true, none, effectNone, ""},
		{"decline", message(t, dhcpv4.MessageTypeDecline, wants("10.1.2.100"), chose("10.1.2.1")), "10.1.2.100", true, none, effectDecline, ""},
		{"decline of another's", message(t, dhcpv4.MessageTypeDecline, wants("10.1.2.101"), chose("10.1.2.1")), "10.1.2.100", true, none, effectNone, ""},
		{"decline to another server", message(t, dhcpv4.MessageTypeDecline, wants("10.1.2.100"), chose("10.1.2.2")), "10.1.2.100", true, none, effectNone, ""},
		{"release", message(t, dhcpv4.MessageTypeRelease, has("10.1.2.100"), chose("10.1.2.1")), "10.1.2.100", true, none, effectRelease, ""},
		{"release of another's", message(t, dhcpv4.MessageTypeRelease, has("10.1.2.101"), chose("10.1.2.1")), "10.1.2.100", true, none, effectNone, ""},
		{"inform", message(t, dhcpv4.MessageTypeInform, has("10.1.2.7")), "10.1.2.100", false, ack, effectNone, "10.1.2.7:68"},
		{"inform from elsewhere", message(t, dhcpv4.MessageTypeInform, has("10.9.2.7")), "10.1.2.100", false, none, effectNone, ""},
		{"bootp", message(t, none), "10.1.2.11", true, none, effectNone, ""},
		{"a reply", message(t, offer, func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply }), "10.1.2.11", true, none, effectNone, ""},
		{"short hardware address", message(t, discover, dhcpv4.WithHwAddr(net.HardwareAddr{2, 3})), "10.1.2.11", true, none, effectNone, ""},
		{"multicast hardware address", message(t, discover, dhcpv4.WithHwAddr(net.HardwareAddr{1, 0, 0x5e, 0, 0, 1})), "10.1.2.11", true, none, effectNone, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := decide(tt.req, testFacts(tt.addr, tt.leased))
			if a.effect != tt.effect {
				t.Errorf("effect %d, want %d", a.effect, tt.effect)
			}
			if a.reply == nil {
				if tt.reply != none {
					t.Fatalf("silence, want %v (%s)", tt.reply, a.note)
				}
				return
			}
			r := reparse(t, a.reply)
			if r.MessageType() != tt.reply {
				t.Fatalf("%v, want %v", r.MessageType(), tt.reply)
			}
			if to := destination(tt.req, r, testNet.Subnet); to.String() != tt.to {
				t.Errorf("goes to %s, want %s", to, tt.to)
			}
			if ip(r.ServerIdentifier()) != testNet.DiscHost || r.TransactionID != tt.req.TransactionID || r.OpCode != dhcpv4.OpcodeBootReply {
				t.Errorf("does not identify itself: %s", r.Summary())
			}
			switch {
			case tt.reply == nak:
				if !r.YourIPAddr.IsUnspecified() || r.Options.Has(dhcpv4.OptionIPAddressLeaseTime) || !r.IsBroadcast() {
					t.Errorf("a refusal that gives something: %s", r.Summary())
				}
			case tt.req.MessageType() == dhcpv4.MessageTypeInform:
				if !r.YourIPAddr.IsUnspecified() || r.Options.Has(dhcpv4.OptionIPAddressLeaseTime) {
					t.Errorf("INFORM must not give an address: %s", r.Summary())
				}
			default:
				if r.YourIPAddr.String() != tt.addr || r.IPAddressLeaseTime(0) != time.Hour || r.IPAddressRenewalTime(0) != 30*time.Minute || r.IPAddressRebindingTime(0) != 52*time.Minute+30*time.Second {
					t.Errorf("wrong address or times: %s", r.Summary())
				}
			}
			if tt.reply != nak && (r.SubnetMask().String() != "ffffff00" || r.Router()[0].String() != "10.1.2.254" || r.DNS()[0].String() != "10.1.2.53" ||
				r.HostName() != "n1" || r.BroadcastAddress().String() != "10.1.2.255") {
				t.Errorf("wrong network: %s", r.Summary())
			}
		})
	}
}

// reparse sends a message through its wire form.
func reparse(t testing.TB, m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	t.Helper()
	b := m.ToBytes()
	if len(b) > 548 {
		t.Errorf("%d bytes: firmware accepts 548 (RFC 2131: 576 with the IP and UDP headers)", len(b))
	}
	r, err := dhcpv4.FromBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestBootFor(t *testing.T) {
	ipxeOpts := func(b ...byte) dhcpv4.Modifier { return opt(dhcpv4.OptGeneric(optIPXE, b)) }
	user := func(raw string) dhcpv4.Modifier {
		return opt(dhcpv4.OptGeneric(dhcpv4.OptionUserClassInformation, []byte(raw)))
	}
	const pxeClass = "PXEClient:Arch:00000:UNDI:002001"
	const script = "http://10.1.2.1/boot.ipxe?mac=52:54:00:12:34:56"
	tests := []struct {
		name string
		mods []dhcpv4.Modifier
		file string
		note bool
	}{
		{"BIOS", []dhcpv4.Modifier{class(pxeClass), archOpt(0)}, "undionly.kpxe", false},
		{"BIOS that only says so in its class", []dhcpv4.Modifier{class(pxeClass)}, "undionly.kpxe", false},
		{"UEFI that only says so in its class", []dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003016")}, "snponly.efi", false},
		{"UEFI x86-64, 7", []dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003016"), archOpt(7)}, "snponly.efi", false},
		{"UEFI x86-64, 9", []dhcpv4.Modifier{class("PXEClient:Arch:00009:UNDI:003016"), archOpt(9)}, "snponly.efi", false},
		{"UEFI ia32", []dhcpv4.Modifier{class("PXEClient:Arch:00006:UNDI:003016"), archOpt(6)}, "", true},
		{"UEFI arm64", []dhcpv4.Modifier{class("PXEClient:Arch:00011:UNDI:003016"), archOpt(11)}, "", true},
		{"UEFI HTTP boot", []dhcpv4.Modifier{class("HTTPClient:Arch:00016:UNDI:003001"), archOpt(16)}, "http://10.1.2.1/ipxe/snponly.efi", false},
		{"UEFI HTTP boot arm64", []dhcpv4.Modifier{class("HTTPClient:Arch:00019:UNDI:003001"), archOpt(19)}, "", true},
		{"iPXE by user class, BIOS", []dhcpv4.Modifier{class(pxeClass), archOpt(0), user("iPXE")}, script + "&platform=pcbios&arch=i386", false},
		{"iPXE by user class as RFC 3004 has it", []dhcpv4.Modifier{class(pxeClass), archOpt(0), user("\x04iPXE")}, script + "&platform=pcbios&arch=i386", false},
		{"iPXE by its options, UEFI", []dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003010"), archOpt(7), ipxeOpts(0xb1, 1, 2, 0x13, 1, 1)}, script + "&platform=efi&arch=x86_64", false},
		{"iPXE without HTTP", []dhcpv4.Modifier{class(pxeClass), archOpt(0), user("iPXE"), ipxeOpts(0xb1, 1, 2)}, "undionly.kpxe", false},
		{"iPXE with broken options", []dhcpv4.Modifier{class(pxeClass), archOpt(0), user("iPXE"), ipxeOpts(0x13, 200, 1)}, "undionly.kpxe", false},
		{"an installed system", nil, "", false},
		{"another class", []dhcpv4.Modifier{class("MSFT 5.0"), archOpt(0)}, "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := message(t, dhcpv4.MessageTypeDiscover, append(tt.mods, opt(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, []byte("\x000123456789abcdef"))))...)
			a := decide(req, testFacts("10.1.2.11", true))
			if a.reply == nil {
				t.Fatal("silence")
			}
			r := reparse(t, a.reply)
			if (a.note != "") != tt.note {
				t.Errorf("note %q", a.note)
			}
			if r.BootFileName != tt.file || r.BootFileNameOption() != tt.file {
				t.Fatalf("file %q, option %q, want %q", r.BootFileName, r.BootFileNameOption(), tt.file)
			}
			if tt.file == "" {
				if !r.ServerIPAddr.IsUnspecified() || r.ServerHostName != "" || r.TFTPServerName() != "" || r.Options.Has(dhcpv4.OptionClassIdentifier) || r.Options.Has(optIPXE) {
					t.Errorf("boot fields for a machine that gets no file: %s", r.Summary())
				}
				return
			}
			if r.ServerIPAddr.String() != "10.1.2.1" || r.TFTPServerName() != "10.1.2.1" || !r.Options.Has(dhcpv4.OptionClientMachineIdentifier) {
				t.Errorf("incomplete boot fields: %s", r.Summary())
			}
			if want := strings.HasPrefix(req.ClassIdentifier(), "HTTPClient"); (r.ClassIdentifier() == "HTTPClient") != want {
				t.Errorf("class %q", r.ClassIdentifier())
			}
			if got := bytes.Equal(r.Options.Get(optIPXE), []byte{0xb0, 1, 1}); got != strings.Contains(tt.file, "boot.ipxe") {
				t.Errorf("iPXE options %x", r.Options.Get(optIPXE))
			}
		})
	}
}

// TestRetransmission: a copy that was received before the answer went out is
// dropped, a later one is answered, a message that waited too long is not.
func TestRetransmission(t *testing.T) {
	s := &Server{Backend: &backend{}, Now: time.Now, loaders: testLoaders}
	s.setDefaults()
	d := &dhcpLoop{server: s, link: &link{net: testNet, pool: newPool(testNet)}, log: s.Log, answered: map[transaction]time.Time{}, told: map[string]time.Time{}}
	m := message(t, dhcpv4.MessageTypeDiscover).ToBytes()
	before := time.Now()
	if b, _ := d.handle(m, before); b == nil {
		t.Fatal("no answer")
	}
	if b, _ := d.handle(m, before.Add(time.Nanosecond)); b != nil {
		t.Error("a copy from before the answer was answered")
	}
	if b, _ := d.handle(m, time.Now()); b == nil {
		t.Error("a retransmission after the answer got none")
	}
	if b, _ := d.handle(message(t, dhcpv4.MessageTypeDiscover).ToBytes(), time.Now().Add(-dhcpStale-time.Second)); b != nil {
		t.Error("a stale message was answered")
	}
}

func TestReceivedAt(t *testing.T) {
	want := time.Unix(1234567890, 987654321)
	ctl := make([]byte, 32)
	binary.NativeEndian.PutUint64(ctl[0:], 32)
	binary.NativeEndian.PutUint32(ctl[8:], 1)   // SOL_SOCKET
	binary.NativeEndian.PutUint32(ctl[12:], 35) // SCM_TIMESTAMPNS
	binary.NativeEndian.PutUint64(ctl[16:], uint64(want.Unix()))
	binary.NativeEndian.PutUint64(ctl[24:], uint64(want.Nanosecond()))
	if got := receivedAt(ctl); !got.Equal(want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := receivedAt([]byte{1, 2, 3}); time.Since(got) > time.Minute {
		t.Errorf("without a stamp: %v", got)
	}
}

// FuzzDHCP: no packet makes the server panic, give an address outside the
// network, or answer something a client could not read.
func FuzzDHCP(f *testing.F) {
	for _, m := range []*dhcpv4.DHCPv4{
		message(f, dhcpv4.MessageTypeDiscover, class("PXEClient:Arch:00007:UNDI:003016"), archOpt(7)),
		message(f, dhcpv4.MessageTypeDiscover, relayed("10.1.2.9"), opt(dhcpv4.OptGeneric(dhcpv4.OptionRelayAgentInformation, []byte{1, 2, 3}))),
		message(f, dhcpv4.MessageTypeRequest, wants("10.1.2.100"), chose("10.1.2.1"), opt(dhcpv4.OptGeneric(optIPXE, []byte{0x13, 1, 1}))),
		message(f, dhcpv4.MessageTypeRequest, has("10.1.2.101")),
		message(f, dhcpv4.MessageTypeDecline, wants("10.1.2.100"), chose("10.1.2.1")),
		message(f, dhcpv4.MessageTypeRelease, has("10.1.2.100"), chose("10.1.2.1")),
		message(f, dhcpv4.MessageTypeInform, has("10.1.2.7"), opt(dhcpv4.OptGeneric(dhcpv4.OptionUserClassInformation, []byte{255, 1}))),
	} {
		f.Add(m.ToBytes())
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, packet []byte) {
		s := &Server{Backend: &backend{}, loaders: testLoaders}
		s.setDefaults()
		s.leases = &leaseLog{pending: map[netip.Addr]lease{}, wake: make(chan struct{}, 1)}
		d := &dhcpLoop{server: s, link: &link{net: testNet, pool: newPool(testNet)}, log: s.Log, answered: map[transaction]time.Time{}, told: map[string]time.Time{}}
		for range 2 { // the second time it meets what the first left behind
			b, to := d.handle(packet, time.Now())
			if b == nil {
				continue
			}
			r, err := dhcpv4.FromBytes(b)
			if err != nil {
				t.Fatalf("unreadable answer: %v", err)
			}
			if a := ip(r.YourIPAddr); a.IsValid() && !d.link.pool.contains(a) {
				t.Fatalf("gave %v", a)
			}
			if to.Addr() != netip.MustParseAddr("255.255.255.255") && !testNet.Subnet.Contains(to.Addr()) {
				t.Fatalf("answered to %v", to)
			}
		}
	})
}

func FuzzParseOffer(f *testing.F) {
	m := message(f, dhcpv4.MessageTypeOffer, func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply })
	f.Add(udpPacket(testNet.DiscHost, testNet.DiscHost, 67, 68, m.ToBytes()))
	f.Add([]byte{0x4f})
	f.Fuzz(func(t *testing.T, b []byte) { parseOffer(b, m.TransactionID) })
	if _, ok := parseOffer(udpPacket(testNet.DiscHost, testNet.DiscHost, 67, 68, m.ToBytes()), m.TransactionID); !ok {
		f.Error("a good offer is not understood")
	}
}

func ExampleOffer_String() {
	fmt.Println(Offer{Server: netip.MustParseAddr("10.0.0.9"), Source: netip.MustParseAddr("10.0.0.9"), MAC: "52:54:00:00:00:09", Address: netip.MustParseAddr("10.0.0.150")})
	// Output: server 10.0.0.9 (MAC 52:54:00:00:00:09) offers 10.0.0.150
}
