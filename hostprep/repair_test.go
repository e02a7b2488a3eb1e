package hostprep

import (
	"strings"
	"testing"

	"platter/hostprep/ovs"
	"platter/hostprep/virt"
)

func TestDiagnose(t *testing.T) {
	const vm = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
	ids := map[string]string{"vm-id": vm, "iface-id": "6f3a", "attached-mac": "52:54:00:aa:00:01", "iface-status": "active"}
	// port is a row as libvirt makes it, changed.
	port := func(change func(*ovs.Port, *ovs.Interface)) ovs.Port {
		p := ovs.Port{Name: "vnet0", VLAN: ovs.VLAN{Tag: new(10)}, Interfaces: []ovs.Interface{{Name: "vnet0", OFPort: 3, ExternalIDs: ids}}}
		if change != nil {
			change(&p, &p.Interfaces[0])
		}
		return p
	}
	on := func(bridge string, ports ...ovs.Port) []ovs.Bridge {
		out := []ovs.Bridge{{Name: "br0", Ports: []ovs.Port{{Name: "br0", Interfaces: []ovs.Interface{{Name: "br0", Type: "internal", OFPort: 65534}}}}}, {Name: "br1"}}
		for i := range out {
			if out[i].Name == bridge {
				out[i].Ports = append(out[i].Ports, ports...)
			}
		}
		return out
	}
	runs := virt.Domain{Name: "mail", UUID: vm, Active: true, Interfaces: []virt.Interface{
		{Device: "vnet0", Bridge: "br0", MAC: "52:54:00:aa:00:01", ID: "6f3a", VLAN: ovs.VLAN{Tag: new(10)}}}}
	off := runs
	off.Active, off.Interfaces = false, []virt.Interface{{Bridge: "br0"}}
	starts := runs
	starts.Starting = true
	vlan5 := runs
	vlan5.Interfaces = []virt.Interface{{Device: "vnet0", Bridge: "vlan5"}}
	there, gone := map[string]bool{"br0": true, "vnet0": true}, map[string]bool{"br0": true}

	for name, c := range map[string]struct {
		bridges []ovs.Bridge
		links   map[string]bool
		domain  virt.Domain
		want    string // faults, one a line
	}{
		"right":         {on("br0", port(nil)), there, runs, ""},
		"off":           {on("br0"), gone, off, ""},
		"being started": {on("br0"), gone, starts, ""},
		"an uplink whose device is gone is not a VM's": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) { i.ExternalIDs = nil })), gone, off, ""},
		"a port into a process has no device":          {on("br0", port(func(p *ovs.Port, i *ovs.Interface) { i.Type = "dpdkvhostuserclient" })), gone, off, ""},
		"stale": {on("br1", port(func(p *ovs.Port, i *ovs.Interface) {
			i.OFPort, i.Error = -1, "could not open network device vnet0 (No such device)"
		})), gone, off,
			"port vnet0 of VM mail: left behind on bridge br1, VLAN 10, without a device, should be gone"},
		"stale, of a VM that is no more": {on("br0", port(nil)), gone, virt.Domain{Name: "other", UUID: "1"},
			"port vnet0 of VM " + vm + " (unknown to libvirt): left behind on bridge br0, VLAN 10, without a device, should be gone"},
		"stale, transient": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) {
			i.ExternalIDs, p.OtherConfig = nil, map[string]string{"transient": "true"}
		})), gone, off,
			"port vnet0 of VM (not named in the row): left behind on bridge br0, VLAN 10, without a device, should be gone"},
		"stale, OpenStack": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) { i.ExternalIDs = map[string]string{"vm-uuid": vm} })), gone, off,
			"port vnet0 of VM mail: left behind on bridge br0, VLAN 10, without a device, should be gone"},
		"other bridge": {on("br1", port(nil)), there, runs, "port vnet0 of VM mail: on bridge br1, should be on bridge br0"},
		"other VLAN, healthy": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) { p.VLAN.Tag = new(77) })), there, runs,
			"port vnet0 of VM mail: VLAN 77, should be VLAN 10"},
		"other VLAN and bridge": {on("br1", port(func(p *ovs.Port, i *ovs.Interface) { p.VLAN = ovs.VLAN{Trunks: []int{3, 4}} })), there, runs,
			"port vnet0 of VM mail: on bridge br1, trunk of VLANs 3,4, should be on bridge br0, VLAN 10"},
		"other owner": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) {
			i.ExternalIDs = map[string]string{"vm-id": "1", "iface-id": "6f3a", "attached-mac": "52:54:00:AA:00:01"}
		})), there, runs, `port vnet0 of VM mail: vm-id "1", should be "` + vm + `"`},
		"in error": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) { i.OFPort, i.Error = -1, "busy" })), there, runs,
			"port vnet0 of VM mail: in error: busy, should be in use"},
		"without a number": {on("br0", port(func(p *ovs.Port, i *ovs.Interface) { i.OFPort = 0 })), there, runs,
			"port vnet0 of VM mail: not taken up by the switch, should be in use"},
		"no row": {on("br0"), there, runs, "port vnet0 of VM mail: missing, should be on bridge br0, VLAN 10"},
		"no device, no row": {on("br0"), gone, runs,
			"port vnet0 of VM mail: without its device, should be there: stop the VM and start it"},
		"a bridge that is a VLAN of another": {on("br0", ovs.Port{Name: "vlan5", FakeBridge: true, VLAN: ovs.VLAN{Tag: new(5)}, Interfaces: []ovs.Interface{{Name: "vlan5", Type: "internal"}}},
			port(func(p *ovs.Port, i *ovs.Interface) { p.VLAN.Tag = new(5) })), there, vlan5, ""},
	} {
		var got []string
		for _, f := range Diagnose(c.bridges, c.links, []virt.Domain{c.domain}) {
			got = append(got, f.String())
		}
		if s := strings.Join(got, "\n"); s != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", name, s, c.want)
		}
	}
}
