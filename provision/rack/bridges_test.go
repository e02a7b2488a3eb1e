package rack

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"platter/provision"
	"platter/provision/yamlfile"
)

func TestBridges(t *testing.T) {
	r, err := Load("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := []provision.Bridge{{Name: "br-vm", MTU: 1500}, {Name: "br-rack", MTU: 9000, VLANs: []int{10, 20}, Management: true,
		Uplink: provision.Uplink{Interfaces: []string{"eno1", "eno2"}, Bond: provision.BondActiveBackup}}}
	if d := cmp.Diff(want, r.Host.Bridges); d != "" {
		t.Error(d)
	}
}

// Every mistake of every bridge comes at once, on its own line.
func TestBridgeMistakes(t *testing.T) {
	_, err := Parse("r.yaml", []byte(`host:
  bridges:
    - {name: br0, mtu: 100, uplink: {interfaces: [eth0], bond: lacp}}
    - {name: br0, uplink: {interfaces: [eth1, eth0], bond: xor}}
    - {name: br1, uplink: {interfaces: [eth2, eth3]}, management: true}
    - {name: br2, vlans: [0, 4095, 7, 7]}
    - {name: br3, management: true}
    - {name: br4, uplink: {interfaces: []}}
    - {name: br5, uplink: {bond: lacp}}
    - {name: br6, uplink: {interfaces: [br1]}, managment: true}
    - {name: a-name-of-16-char}
`))
	var got yamlfile.Problems
	if !errors.As(err, &got) {
		t.Fatal(err)
	}
	text := err.Error()
	for _, want := range []string{
		"3: mtu \"100\"", "3: bond needs at least two", "4: bridge br0 is already used on line 3", "4: uplink eth0 is already used on line 3",
		"4: bond \"xor\": must be active-backup or lacp", "5: bond is missing", "6: vlans[0] \"0\"", "6: vlans[1] \"4095\"", "6: vlan 7 is named twice",
		"6: vlans needs an uplink", "7: management needs an uplink", "7: management is already on the bridge on line 5", "8: interfaces has no interface",
		"9: interfaces is missing", "10: uplink br1 is the name of a bridge", "10: unknown key \"managment\", did you mean \"management\"?", "11: name \"a-name-of-16-char\"",
	} {
		line, says, _ := strings.Cut(want, ": ")
		found := false
		for _, p := range got {
			found = found || fmt.Sprint(p.Line) == line && strings.Contains(p.Message, says)
		}
		if !found {
			t.Errorf("no problem on line %s that says %q", line, says)
		}
	}
	if t.Failed() {
		t.Log("\n" + text)
	}
}
