package rack

import (
	"errors"
	"slices"

	"platter/provision"
	"platter/provision/yamlfile"
)

// bridges reads the Open vSwitch bridges of every node.
func (p *parser) bridges(v yamlfile.Value) []provision.Bridge {
	var out []provision.Bridge
	var uplinks []yamlfile.Value
	for _, b := range v.List() {
		m := b.Fields("name", "mtu", "uplink", "vlans", "management")
		br := provision.Bridge{
			Name:       yamlfile.Get(m["name"].Required(), parseDevice),
			MTU:        yamlfile.Get(m["mtu"], yamlfile.Int(576, 65535)),
			Management: yamlfile.Get(m["management"], yamlfile.Bool),
		}
		p.unique(m["name"], "bridge", br.Name)
		if m["uplink"].Exists() {
			u := m["uplink"].Fields("interfaces", "bond")
			br.Uplink.Bond = yamlfile.Get(u["bond"], parseBond)
			for _, i := range u["interfaces"].Required().List() {
				name := yamlfile.Get(i, parseDevice)
				p.unique(i, "uplink", name)
				br.Uplink.Interfaces = append(br.Uplink.Interfaces, name)
				uplinks = append(uplinks, i)
			}
			switch n := len(br.Uplink.Interfaces); {
			case u["interfaces"].Exists() && n == 0:
				u["interfaces"].Failf("interfaces has no interface: leave uplink out for a bridge that ends at the host")
			case n == 1 && u["bond"].Exists():
				u["bond"].Failf("bond needs at least two interfaces")
			case n > 1 && !u["bond"].Exists():
				u["interfaces"].Failf("bond is missing: with several interfaces it says how they act as one, active-backup or lacp")
			}
		}
		for _, t := range m["vlans"].List() {
			tag := yamlfile.Get(t, yamlfile.Int(1, 4094))
			if tag != 0 && slices.Contains(br.VLANs, tag) {
				t.Failf("vlan %d is named twice", tag)
			}
			br.VLANs = append(br.VLANs, tag)
		}
		if !m["uplink"].Exists() {
			const why = "%s needs an uplink: this bridge ends at the host"
			if m["vlans"].Exists() {
				m["vlans"].Failf(why, "vlans")
			}
			if br.Management {
				m["management"].Failf(why, "management")
			}
		}
		if br.Management {
			if line, dup := p.seen["management"]; dup {
				m["management"].Failf("management is already on the bridge on line %d: a node has one address", line)
			}
			p.seen["management"] = m["management"].Line()
		}
		out = append(out, br)
	}
	for _, i := range uplinks {
		name := yamlfile.Get(i, parseDevice)
		if slices.ContainsFunc(out, func(b provision.Bridge) bool { return b.Name == name && name != "" }) {
			i.Failf("uplink %s is the name of a bridge", name)
		}
	}
	return out
}

func parseBond(s string) (provision.BondMode, error) {
	switch b := provision.BondMode(s); b {
	case provision.BondActiveBackup, provision.BondLACP:
		return b, nil
	}
	return "", errors.New("must be active-backup or lacp")
}
