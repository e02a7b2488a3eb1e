package virt

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"platter/hostprep/ovs"
)

// TestInterfaces: the definitions are as libvirt writes them of running
// domains.
func TestInterfaces(t *testing.T) {
	const head, foot = `<domain type='kvm' id='4'><name>web1</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><devices>`, `</devices></domain>`
	port := `<virtualport type='openvswitch'><parameters interfaceid='6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0001'/></virtualport>`
	for name, c := range map[string]struct {
		xml  string
		want []Interface
	}{
		"plain": {`<interface type='bridge'><mac address='52:54:00:AA:00:01'/><source bridge='br0'/>` + port + `<target dev='vnet0'/><model type='virtio'/></interface>`,
			[]Interface{{Device: "vnet0", Bridge: "br0", MAC: "52:54:00:aa:00:01", ID: "6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0001"}}},
		"off": {`<interface type='bridge'><source bridge='br0'/><vlan><tag id='77'/></vlan>` + port + `</interface>`,
			[]Interface{{Bridge: "br0", ID: "6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0001", VLAN: ovs.VLAN{Tag: new(77)}}}},
		"trunk": {`<interface type='bridge'><source bridge='br0'/><vlan trunk='yes'><tag id='42'/><tag id='123' nativeMode='untagged'/></vlan>` + port + `<target dev='vnet1'/></interface>`,
			[]Interface{{Device: "vnet1", Bridge: "br0", ID: "6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0001", VLAN: ovs.VLAN{Tag: new(123), Trunks: []int{42, 123}, Mode: "native-untagged"}}}},
		"trunk of one": {`<interface type='bridge'><source bridge='br0'/><vlan trunk='yes'><tag id='42'/></vlan>` + port + `</interface>`,
			[]Interface{{Bridge: "br0", ID: "6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0001", VLAN: ovs.VLAN{Trunks: []int{42}}}}},
		// A network with a portgroup, as it is written of a running domain.
		"network": {`<interface type='bridge'><source network='tenants' portgroup='blue' portid='1c2a' bridge='br1'/><vlan><tag id='5'/></vlan><virtualport type='openvswitch'><parameters interfaceid='6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0002' profileid='p'/></virtualport><target dev='vnet2'/></interface>`,
			[]Interface{{Device: "vnet2", Bridge: "br1", ID: "6f3a4c11-7d0e-4f1c-9a57-0e7b4a1f0002", Profile: "p", VLAN: ovs.VLAN{Tag: new(5)}}}},
		"others": {`<interface type='bridge'><source bridge='virbr0'/><target dev='vnet3'/></interface><interface type='user'/><interface type='network'><source network='default'/></interface>`, nil},
	} {
		got, err := interfaces(head + c.xml + foot)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if got, err := interfaces(`<domain type='kvm'><name>x</name></domain>`); err != nil || got != nil {
		t.Errorf("no devices: %v, %v", got, err)
	}
	if _, err := interfaces("<domain"); err == nil {
		t.Error("nonsense passes")
	}
}
