package ovs_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"

	"platter/hostprep/ovs"
	"platter/hostprep/ovs/ovstest"
)

// TestSwitch speaks with a real switch.
func TestSwitch(t *testing.T) {
	if !ovstest.Alone(t) {
		return
	}
	d := ovstest.Start(t)
	ctx := t.Context()
	s, err := ovs.Dial(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	apply := func(changes ...ovs.Change) {
		t.Helper()
		if err := s.Apply(ctx, changes...); err != nil {
			t.Fatal(err)
		}
	}
	read := func() []ovs.Bridge {
		t.Helper()
		b, err := s.Bridges(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, name := range []string{"vnet0", "up0", "up1"} {
		ovstest.Tap(t, name)
	}
	ids := map[string]string{"vm-id": "e3c0", "iface-id": "77aa"}
	vnet := ovs.Port{Name: "vnet0", VLAN: ovs.VLAN{Tag: new(77)}, OtherConfig: map[string]string{"transient": "true"},
		Interfaces: []ovs.Interface{{Name: "vnet0", ExternalIDs: ids}}}
	bond := ovs.Port{Name: "bond0", VLAN: ovs.VLAN{Tag: new(1), Trunks: []int{20, 10}, Mode: "native-untagged"},
		Bond: ovs.Bond{Mode: "active-backup", LACP: "off"}, Interfaces: []ovs.Interface{{Name: "up0"}, {Name: "up1"}}}
	apply(ovs.AddBridge(ovs.Bridge{Name: "br0", Datapath: "netdev", Ports: []ovs.Port{bond}}),
		ovs.AddBridge(ovs.Bridge{Name: "br1", Datapath: "netdev", ExternalIDs: map[string]string{"by": "platter"}}),
		ovs.AddPort("br0", vnet))
	// The devices of the bridges are there at once.
	for _, name := range []string{"br0", "br1"} {
		if _, err := netlink.LinkByName(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	empty := map[string]string{}
	local := func(name string) ovs.Port {
		return ovs.Port{Name: name, ExternalIDs: empty, OtherConfig: empty,
			Interfaces: []ovs.Interface{{Name: name, Type: "internal", OFPort: 65534, ExternalIDs: empty, Options: empty}}}
	}
	device := func(name string, ids map[string]string) ovs.Interface {
		return ovs.Interface{Name: name, OFPort: 1, ExternalIDs: ids, Options: empty}
	}
	bond.VLAN.Trunks = []int{10, 20}
	bond.ExternalIDs, bond.OtherConfig, bond.Interfaces = empty, empty, []ovs.Interface{device("up0", empty), device("up1", empty)}
	vnet.ExternalIDs, vnet.Interfaces = empty, []ovs.Interface{device("vnet0", ids)}
	want := []ovs.Bridge{
		{Name: "br0", Datapath: "netdev", ExternalIDs: empty, OtherConfig: empty, Ports: []ovs.Port{bond, local("br0"), vnet}},
		{Name: "br1", Datapath: "netdev", ExternalIDs: map[string]string{"by": "platter"}, OtherConfig: empty, Ports: []ovs.Port{local("br1")}},
	}
	same := func() {
		t.Helper()
		got := read()
		for _, b := range got { // which number a port has is the switch's choice, that it has one is not
			for _, p := range b.Ports {
				for i := range p.Interfaces {
					if n := &p.Interfaces[i].OFPort; *n > 0 && *n < 65534 {
						*n = 1
					}
				}
			}
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(ovs.Bridge{}, ovs.Port{}, ovs.Interface{})); diff != "" {
			t.Error(diff)
		}
	}
	same()
	apply(ovs.AddBridge(ovs.Bridge{Name: "br0", Ports: []ovs.Port{bond}})) // nothing is missing
	same()
	apply(ovs.SetVLAN("vnet0", ovs.VLAN{Trunks: []int{5}}), ovs.SetMTU("br1", 1400))
	want[0].Ports[2].VLAN = ovs.VLAN{Trunks: []int{5}}
	want[1].Ports[0].Interfaces[0].MTURequest = 1400
	same()
	if link, err := netlink.LinkByName("br1"); err != nil || link.Attrs().MTU != 1400 {
		t.Errorf("br1: %v, %v", link, err)
	}
	// A port moves in one transaction, and the device is the same one.
	before, _ := netlink.LinkByName("vnet0")
	vnet.VLAN = ovs.VLAN{}
	apply(ovs.DeletePort("vnet0"), ovs.AddPort("br1", vnet))
	want[0].Ports = want[0].Ports[:2]
	want[1].Ports = append(want[1].Ports, vnet)
	same()
	if after, err := netlink.LinkByName("vnet0"); err != nil || after.Attrs().Index != before.Attrs().Index {
		t.Error("the device did not stay")
	}
	// Or with all it has.
	apply(ovs.MovePort("vnet0", "br0"), ovs.SetVLAN("vnet0", ovs.VLAN{Tag: new(7)}), ovs.SetIDs("vnet0", map[string]string{"vm-id": "0ff1"}))
	vnet.VLAN = ovs.VLAN{Tag: new(7)}
	vnet.Interfaces[0].ExternalIDs = map[string]string{"vm-id": "0ff1", "iface-id": "77aa"}
	want[0].Ports, want[1].Ports = append(want[0].Ports, vnet), want[1].Ports[:1]
	same()
	apply(ovs.MovePort("vnet0", "br1"))
	want[0].Ports, want[1].Ports = want[0].Ports[:2], append(want[1].Ports, vnet)
	same()
	// A transaction that fails leaves all as it was.
	for _, changes := range [][]ovs.Change{
		{ovs.DeletePort("bond0"), ovs.AddPort("br7", ovs.Port{Name: "x"})},
		{ovs.DeletePort("bond0"), ovs.AddPort("br0", vnet)},
		{ovs.SetVLAN("vnet0", ovs.VLAN{Tag: new(4096)})},
		{ovs.SetVLAN("vnet9", ovs.VLAN{})}, {ovs.SetMTU("vnet9", 1400)},
	} {
		if err := s.Apply(ctx, changes...); err == nil {
			t.Error("no error")
		}
		same()
	}
	// What the switch cannot do is in the row.
	apply(ovs.AddPort("br0", ovs.Port{Name: "gone0"}))
	if i := read()[0].Ports[2].Interfaces[0]; i.Name != "gone0" || i.OFPort != -1 || !strings.Contains(i.Error, "No such device") {
		t.Errorf("%+v", i)
	}
	// Without the switch Commit changes the database and Apply waits.
	d.StopSwitch()
	if err := s.Commit(ctx, ovs.DeletePort("gone0"), ovs.DeletePort("never was")); err != nil {
		t.Fatal(err)
	}
	same()
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := s.Apply(short, ovs.DeletePort("vnet0")); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "has not acted") {
		t.Errorf("without the switch: %v", err)
	}
	d.StartSwitch()
	apply(ovs.DeleteBridge("br1"), ovs.DeleteBridge("br7"))
	want = want[:1]
	same()
	d.StopDatabase()
	if _, err := s.Bridges(ctx); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("without the database: %v", err)
	}
	d.StartDatabase()
	same()
}

func TestVLAN(t *testing.T) {
	for _, c := range []struct {
		v    ovs.VLAN
		want string
	}{
		{ovs.VLAN{}, "trunk of all VLANs"},
		{ovs.VLAN{Tag: new(77)}, "VLAN 77"},
		{ovs.VLAN{Tag: new(77), Mode: "access", Trunks: []int{5}}, "VLAN 77"},
		{ovs.VLAN{Mode: "trunk", Trunks: []int{20, 3}}, "trunk of VLANs 3,20"},
		{ovs.VLAN{Tag: new(7), Mode: "trunk"}, "trunk of all VLANs"},
		{ovs.VLAN{Tag: new(7), Mode: "native-tagged", Trunks: []int{8}}, "native-tagged VLAN 7, trunk of VLANs 8"},
	} {
		if c.v.String() != c.want {
			t.Errorf("%q, want %q", c.v, c.want)
		}
	}
	if (ovs.VLAN{Tag: new(0)}).Equal(ovs.VLAN{}) {
		t.Error("an access port in VLAN 0 and a trunk are not the same")
	}
}
