package vmtest

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"platter/provision/yamlfile"
)

const goodFile = `lab: demo
network: {bridge: br0, address: 10.77.0.1/24}
machines:
  - {name: a, mac: "52:54:00:AA:00:01"}
  - name: b
    mac: 52-54-00-aa-00-02
    firmware: uefi
    pxe: ipxe
    cpus: 4
    memory: 3GiB
    disks:
      - {size: 12GiB, serial: WD_1.x+y-z}
      - {size: 100MiB}
  - {name: c, mac: "52:54:00:aa:00:03", firmware: uefi, memory: 512MiB}
`

func TestEveryKeyIsRead(t *testing.T) {
	got, err := Parse("lab.yaml", []byte(goodFile))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Name:    "demo",
		Network: Network{"br0", netip.MustParsePrefix("10.77.0.1/24")},
		Machines: []Machine{
			{Name: "a", MAC: "52:54:00:aa:00:01", Firmware: BIOS, PXE: PXEiPXE, CPUs: 2, Memory: 2 << 30},
			{Name: "b", MAC: "52:54:00:aa:00:02", Firmware: UEFI, PXE: PXEiPXE, CPUs: 4, Memory: 3 << 30, Disks: []Disk{{12 << 30, "WD_1.x+y-z"}, {100 << 20, ""}}},
			{Name: "c", MAC: "52:54:00:aa:00:03", Firmware: UEFI, PXE: PXEPlain, CPUs: 2, Memory: 512 << 20},
		},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); d != "" {
		t.Error(d)
	}
}

func TestEveryMistakeIsNamedWithItsLine(t *testing.T) {
	_, err := Parse("lab.yaml", []byte(`lab: Demo!
network:
  bridge: vnet0
  address: 10.77.0.0/24
  gateway: 10.77.0.254
machines:
  - name: a
    mac: 53:54:00:00:00:01
    firmware: coreboot
    cpus: 0
    memory: 2 GiBs
  - {name: a, mac: "52:54:00:00:00:02", pxe: plain}
  - mac: 52:54:00:00:00:02
    disks:
      - {serial: far-too-long-for-a-virtio-disk}
      - {size: 1000B}
    memory: 64MiB
    ram: 1GiB
`))
	var got yamlfile.Problems
	if !errors.As(err, &got) {
		t.Fatalf("want problems, got %v", err)
	}
	want := []struct {
		line int
		text string
	}{
		{1, "lower-case letters"},
		{3, "not vnetN"},
		{4, "disc host's IPv4 address"},
		{5, `unknown key "gateway"`},
		{8, "unicast"},
		{9, "must be bios or uefi"},
		{10, "from 1 to 64"},
		{11, "must be a size"},
		{12, "name a is already used on line 7"},
		{12, "pxe plain needs firmware uefi"},
		{13, "name is missing"},
		{13, "mac 52:54:00:00:00:02 is already used on line 12"},
		{15, "size is missing"},
		{15, "at most 20"},
		{16, "whole MiB"},
		{17, "at least 128 MiB"},
		{18, `unknown key "ram"`},
	}
	for _, w := range want {
		found := false
		for _, p := range got {
			found = found || p.Line == w.line && strings.Contains(p.Message, w.text)
		}
		if !found {
			t.Errorf("no problem on line %d that says %q", w.line, w.text)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d problems, want %d", len(got), len(want))
	}
	if t.Failed() {
		t.Log("\n" + err.Error())
	}
}

func TestTheDemoLabIsGood(t *testing.T) {
	if _, err := Load("demo/lab.yaml"); err != nil {
		t.Error(err)
	}
	if _, err := Load("demo/absent.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent file gives %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(goodFile))
	f.Add([]byte("lab: a\nmachines: [{name: a, mac: 0}]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("lab.yaml", data)
		if err != nil {
			return
		}
		for _, m := range c.Machines {
			if _, err := domainXML(c.Name, m, TCG, c.Network.Bridge); err != nil {
				t.Error(err)
			}
		}
	})
}
