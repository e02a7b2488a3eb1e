package hostprep

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"platter/hostprep/ovs"
	"platter/provision"
)

// Bridges are the Open vSwitch bridges that the host shall have: the ones of
// the rack file, or one named br-vm.
func Bridges(spec provision.HostSpec) []provision.Bridge {
	if len(spec.Bridges) > 0 {
		return spec.Bridges
	}
	return []provision.Bridge{{Name: "br-vm"}}
}

const (
	bridgeWhy = "libvirt attaches VMs to it"
	uplinkWhy = "without it VMs do not reach the rack"
	// Rows of ours in the switch's database carry this key.
	ourKey = "platter"
)

// bridges is the step for the host's bridges. What would cut the host off is
// refused or tried under a guard, see trial.
func (h *Host) bridges() Step {
	return Step{
		Name: "bridges",
		Next: "Look at 'ovs-vsctl show' and 'journalctl -u ovs-vswitchd' on the node",
		Check: func(ctx context.Context) ([]Finding, error) {
			v, err := h.viewBridges(ctx)
			if err != nil {
				return []Finding{{What: "Open vSwitch", Is: err.Error(), Want: "an answer", Why: "bridges are made of it"}}, nil
			}
			out := v.findings()
			for _, f := range h.uplinkUnit() {
				out = append(out, f.find(&Journal{root: h.Root}))
			}
			return out, nil
		},
		Apply: func(ctx context.Context, j *Journal) error {
			err := h.applyBridges(ctx, j)
			if err == nil {
				return nil
			}
			if on, failed := h.fallBack(); failed != nil {
				err = fmt.Errorf("%w; and the host's address is nowhere: %w", err, failed)
			} else if on != "" {
				err = fmt.Errorf("%w; until then the host's address is on %s", err, on)
			}
			return err
		},
	}
}

// bridgeView is everything that matters for the bridges, at one moment.
type bridgeView struct {
	h       *Host
	rows    map[string]ovs.Bridge
	devices map[string]device
	// managed is the interface that the node's own address is on and that
	// Reach is reached through; empty: unknown, or nothing to manage.
	managed  string
	networkd bool
	trial    *trial            // one that was not brought to its end
	silent   error             // why nobody could tell whether a change cuts the host off
	failed   map[string]string // bridges whose change was taken back, with the reason
	// confirmed are management bridges that the host was reached over before,
	// with what was there before them. To go back to one asks nobody.
	confirmed map[string]trial
}

func (h *Host) viewBridges(ctx context.Context) (bridgeView, error) {
	v := bridgeView{h: h, rows: map[string]ovs.Bridge{}, failed: map[string]string{}, confirmed: map[string]trial{}, networkd: h.networkd()}
	s, err := ovs.Dial(ctx, "")
	if err != nil {
		return v, err
	}
	rows, err := s.Bridges(ctx)
	if err != nil {
		return v, err
	}
	for _, b := range rows {
		v.rows[b.Name] = b
	}
	if v.devices, err = devices(); err != nil {
		return v, err
	}
	if v.trial, err = h.pendingTrial(); err != nil {
		return v, err
	}
	v.managed = wayTo(h.Reach)
	before, err := h.before()
	if err != nil {
		return v, err
	}
	for _, b := range Bridges(h.Spec) {
		for _, t := range before {
			if t.Bridge == b.Name && b.Management && sameUplink(uplinkOf(v.rows[b.Name], b), b) {
				v.confirmed[b.Name] = t
			}
		}
	}
	risky := false
	for _, b := range Bridges(h.Spec) {
		if reason := h.takenBack(b); reason != "" && !h.Retry {
			v.failed[b.Name] = reason
		} else {
			risky = risky || v.risky(b)
		}
	}
	switch {
	case risky && len(h.Reach) == 0:
		v.silent = errors.New("no disc host or gateway is known that could confirm a change: with -c, name the node with --node")
	case risky && v.managed == "":
		v.silent = fmt.Errorf("there is no way to %s", names(h.Reach))
	case risky:
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		v.silent = answers(ctx, h.Reach)
	}
	return v, nil
}

// findings looks at every bridge. A single refusal keeps everything else from
// being applied.
func (v bridgeView) findings() []Finding {
	var out, refused []Finding
	if v.trial != nil {
		out = append(out, Finding{What: "uplink of " + v.trial.Bridge, Is: "being changed, or cut off in the middle of a change", Want: "as before, or changed", Why: uplinkWhy})
	}
	for _, b := range Bridges(v.h.Spec) {
		out = append(out, v.bridge(b)...)
		for _, why := range v.refusals(b) {
			refused = append(refused, Finding{What: "bridge " + b.Name, Is: "refused: " + why, Want: "a rack file that fits this host", Why: "nothing was changed: half a set of bridges helps nobody", Person: true})
		}
	}
	for i := range out {
		if !out[i].OK && len(refused) > 0 && v.trial == nil {
			out[i].Person = true
		}
	}
	return append(refused, out...)
}

func (v bridgeView) bridge(b provision.Bridge) []Finding {
	row, made := v.rows[b.Name]
	d, there := v.devices[b.Name]
	f := Finding{What: "bridge " + b.Name, Want: "up", Why: bridgeWhy, Is: "up", OK: true}
	if b.MTU != 0 {
		f.Want += fmt.Sprintf(" with MTU %d", b.MTU)
	}
	switch {
	case !made:
		f.Is, f.OK = "not in Open vSwitch", false
	case !there:
		f.Is, f.OK = "has no device", false
	case !d.Up:
		f.Is, f.OK = "down", false
	case b.MTU != 0 && d.MTU != b.MTU:
		f.Is, f.OK = fmt.Sprintf("MTU %d", d.MTU), false
	}
	out := []Finding{f}
	p := uplinkOf(row, b)
	if p == nil && len(b.Uplink.Interfaces) == 0 {
		return out
	}
	u := Finding{What: "uplink of " + b.Name, Is: "none", Want: "none", Why: uplinkWhy, OK: sameUplink(p, b)}
	if p != nil {
		u.Is = describePort(*p)
	}
	if len(b.Uplink.Interfaces) > 0 {
		u.Want = describePort(uplinkPort(b))
	}
	out = append(out, u)
	linked := 0
	for _, name := range b.Uplink.Interfaces {
		d := v.devices[name]
		if d.carrier {
			linked++
		}
		f := Finding{What: "uplink interface " + name, Is: "up", OK: d.Up, Want: "up", Why: uplinkWhy}
		switch {
		case !d.Up:
			f.Is = "down"
		case b.MTU != 0 && d.MTU != b.MTU:
			f.Is, f.OK, f.Want = fmt.Sprintf("MTU %d", d.MTU), false, fmt.Sprintf("MTU %d", b.MTU)
		}
		out = append(out, f)
	}
	if linked == 0 && u.OK && p != nil {
		out = append(out, Finding{What: "carrier of the uplink of " + b.Name, Is: "none", Want: "a link", Why: "a cable is out, or the other end is off", Person: true})
	}
	if b.Management {
		f := Finding{What: "address of the host", Is: "on " + v.managed, Want: "on " + b.Name, OK: v.managed == b.Name,
			Why: "the interface belongs to the bridge, frames for the host arrive at the bridge"}
		if t, ok := v.confirmed[b.Name]; ok {
			f.OK, f.Is = v.has(b.Name, t.managed().Addrs), "not on "+b.Name
			if f.OK {
				f.Is = f.Want
			}
		} else if v.managed == "" {
			f.Is = "unknown: there is no way to " + names(v.h.Reach)
		}
		out = append(out, f)
	}
	for _, file := range v.files(b) {
		out = append(out, file.find(&Journal{root: v.h.Root}))
	}
	// Why a change is not begun.
	why := ""
	switch {
	case v.failed[b.Name] != "":
		why = v.failed[b.Name] + ". 'host apply' by a person tries again"
	case v.silent != nil && v.risky(b):
		why = v.silent.Error() + ": a change of the uplink is only begun while somebody can tell that it did not cut the host off"
	}
	if why != "" && v.trial == nil {
		for i := range out {
			if !out[i].OK {
				out[i].Person, out[i].Why = true, why
			}
		}
	}
	return out
}

// has tells whether the interface has all these addresses.
func (v bridgeView) has(name string, addrs []addr) bool {
	for _, a := range addrs {
		if !slices.ContainsFunc(v.devices[name].Addrs, func(x addr) bool { return x.Prefix == a.Prefix }) {
			return false
		}
	}
	return true
}

// refusals are the reasons why b cannot be on this host at all.
func (v bridgeView) refusals(b provision.Bridge) []string {
	var out []string
	no := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if d, ok := v.devices[b.Name]; ok && v.rows[b.Name].Name == "" {
		no("%s is another interface of this host (%s)", b.Name, cmp.Or(d.kind, "a card"))
	}
	for _, name := range b.Uplink.Interfaces {
		d, ok := v.devices[name]
		if !ok {
			no("interface %s does not exist", name)
			continue
		}
		if d.maxMTU != 0 && b.MTU > d.maxMTU {
			no("MTU %d is more than interface %s can, %d", b.MTU, name, d.maxMTU)
		}
		if d.master != "" && d.master != "ovs-system" {
			no("interface %s is part of %s already", name, d.master)
		}
		for _, row := range v.rows {
			if row.Name != b.Name && hasInterface(row, name) {
				no("interface %s is part of the bridge %s already", name, row.Name)
			}
		}
		if t, ok := v.confirmed[b.Name]; ok && t.Managed == name {
			continue
		}
		if len(d.Addrs) > 0 && !(b.Management && (name == v.managed || v.managed == "")) {
			no("interface %s has the address %s, which would be cut off: say management: true, or use another interface", name, d.Addrs[0].Prefix)
		}
	}
	if _, ok := v.confirmed[b.Name]; !ok && b.Management && v.managed != b.Name && v.managed != "" {
		d := v.devices[v.managed]
		for _, a := range d.Addrs {
			if a.Leased {
				no("the address %s of %s was given by DHCP or a router: only a static one can move", a.Prefix, d.Name)
			}
		}
		if !v.networkd || v.h.networkFile(d) == "" {
			no("systemd-networkd does not configure %s: the address could not stay on the bridge over a reboot", d.Name)
		}
	}
	return out
}

// risky tells whether bringing b about touches the interface that the host is
// managed over.
func (v bridgeView) risky(b provision.Bridge) bool {
	if _, ok := v.confirmed[b.Name]; ok && v.managed != b.Name {
		return false
	}
	if b.Management && v.managed != b.Name {
		return true
	}
	row := v.rows[b.Name]
	over := v.managed != "" && (v.managed == b.Name || slices.Contains(b.Uplink.Interfaces, v.managed))
	if !over {
		return false
	}
	if !sameUplink(uplinkOf(row, b), b) {
		return true
	}
	for _, name := range append(slices.Clone(b.Uplink.Interfaces), b.Name) {
		if d, ok := v.devices[name]; ok && b.MTU != 0 && d.MTU != b.MTU {
			return true
		}
	}
	return false
}

// uplinkPort is the port that joins a bridge to its uplink.
func uplinkPort(b provision.Bridge) ovs.Port {
	p := ovs.Port{Name: b.Uplink.Interfaces[0], ExternalIDs: map[string]string{ourKey: "uplink"}}
	for _, name := range b.Uplink.Interfaces {
		p.Interfaces = append(p.Interfaces, ovs.Interface{Name: name, MTURequest: b.MTU})
	}
	switch b.Uplink.Bond {
	case provision.BondActiveBackup:
		p.Name, p.Bond.Mode = b.Name+"-uplink", "active-backup"
		p.OtherConfig = map[string]string{"bond-detect-mode": "carrier"}
	case provision.BondLACP:
		p.Name, p.Bond = b.Name+"-uplink", ovs.Bond{Mode: "balance-tcp", LACP: "active"}
		// Until the other end speaks LACP one interface does all the work.
		p.OtherConfig = map[string]string{"lacp-fallback-ab": "true"}
	}
	if len(b.VLANs) > 0 {
		p.VLAN.Trunks = slices.Sorted(slices.Values(b.VLANs))
		if b.Management { // the host's own frames have no tag
			p.VLAN.Trunks = append([]int{0}, p.VLAN.Trunks...)
		}
	}
	return p
}

// uplinkOf is the port that joins the bridge to wires now; nil: none.
func uplinkOf(row ovs.Bridge, b provision.Bridge) *ovs.Port {
	for i, p := range row.Ports {
		ours := p.ExternalIDs[ourKey] == "uplink" || slices.ContainsFunc(p.Interfaces, func(x ovs.Interface) bool { return slices.Contains(b.Uplink.Interfaces, x.Name) })
		if ours {
			return &row.Ports[i]
		}
	}
	return nil
}

func hasInterface(row ovs.Bridge, name string) bool {
	return slices.ContainsFunc(row.Ports, func(p ovs.Port) bool {
		return slices.ContainsFunc(p.Interfaces, func(x ovs.Interface) bool { return x.Name == name })
	})
}

// describePort says what matters of an uplink's port, equal for equal ones.
func describePort(p ovs.Port) string {
	var names []string
	for _, i := range p.Interfaces {
		names = append(names, i.Name)
	}
	slices.Sort(names)
	s := strings.Join(names, "+")
	if p.Bond.Mode != "" {
		s += " " + p.Bond.Mode
	}
	if p.Bond.LACP != "" && p.Bond.LACP != "off" {
		s += " LACP " + p.Bond.LACP
	}
	for _, k := range slices.Sorted(maps.Keys(p.OtherConfig)) {
		if k == "bond-detect-mode" || k == "lacp-fallback-ab" {
			s += " " + k + "=" + p.OtherConfig[k]
		}
	}
	return s + ", " + p.VLAN.String()
}

// applyBridges first ends what was cut off, then brings every bridge about.
func (h *Host) applyBridges(ctx context.Context, j *Journal) error {
	if err := h.endTrial(ctx); err != nil {
		return err
	}
	v, err := h.viewBridges(ctx)
	if err != nil {
		return err
	}
	s, err := ovs.Dial(ctx, "")
	if err != nil {
		return err
	}
	for _, b := range Bridges(h.Spec) {
		if len(v.refusals(b)) > 0 {
			return nil // the check names them all
		}
	}
	if err := h.layFiles(ctx, j, h.uplinkUnit()); err != nil {
		return err
	}
	for _, b := range Bridges(h.Spec) {
		risky := v.risky(b)
		switch {
		case v.failed[b.Name] != "", risky && v.silent != nil:
			continue // the check says why
		case risky:
			err = h.try(ctx, s, v, b, j)
		default:
			if err = h.makeBridge(ctx, s, v, b); err == nil {
				err = v.settle(b)
			}
			if err == nil {
				err = h.layFiles(ctx, j, v.files(b))
			}
		}
		if err != nil {
			return fmt.Errorf("bridge %s: %w", b.Name, err)
		}
	}
	return nil
}

// settle puts the host's address back onto a bridge that was confirmed before.
func (v bridgeView) settle(b provision.Bridge) error {
	t, ok := v.confirmed[b.Name]
	if !ok || v.has(b.Name, t.managed().Addrs) {
		return nil
	}
	return errors.Join(t.managed().drop(t.Managed), t.managed().carry(b.Name))
}

// makeBridge brings rows and devices of b about; ports of VMs are not touched.
func (h *Host) makeBridge(ctx context.Context, s *ovs.Switch, v bridgeView, b provision.Bridge) error {
	row, made := v.rows[b.Name]
	var changes []ovs.Change
	if !made {
		changes = append(changes, ovs.AddBridge(ovs.Bridge{Name: b.Name, Datapath: h.datapath, ExternalIDs: map[string]string{ourKey: "made"}, Ports: []ovs.Port{
			{Name: b.Name, Interfaces: []ovs.Interface{{Name: b.Name, Type: "internal", MTURequest: b.MTU}}}}}))
	} else if b.MTU != 0 && v.devices[b.Name].MTU != b.MTU {
		changes = append(changes, ovs.SetMTU(b.Name, b.MTU))
	}
	if old := uplinkOf(row, b); !sameUplink(old, b) {
		if old != nil {
			changes = append(changes, ovs.DeletePort(old.Name))
		}
		if len(b.Uplink.Interfaces) > 0 {
			changes = append(changes, ovs.AddPort(b.Name, uplinkPort(b)))
		}
	}
	if _, ok := v.confirmed[b.Name]; !ok && b.Management && v.managed != b.Name && v.managed != "" {
		// The rack shall see the address at the place where it was.
		changes = append(changes, ovs.SetHardwareAddr(b.Name, v.devices[v.managed].MAC))
	}
	if _, there := v.devices[b.Name]; len(changes) > 0 || !there {
		// Also where only the device is missing: the switch may still be
		// about to make it.
		ctx, cancel := context.WithTimeout(ctx, cmp.Or(h.patience, time.Minute))
		defer cancel()
		if err := s.Apply(ctx, changes...); err != nil {
			return err
		}
	}
	for _, name := range b.Uplink.Interfaces {
		if err := raise(name, b.MTU); err != nil {
			return err
		}
	}
	if err := raise(b.Name, 0); err != nil {
		return fmt.Errorf("%w: Open vSwitch made no device for it: is the module openvswitch there?", err)
	}
	return nil
}

// sameUplink tells whether the port, nil for none, is the one that b asks for.
func sameUplink(p *ovs.Port, b provision.Bridge) bool {
	if p == nil || len(b.Uplink.Interfaces) == 0 {
		return p == nil && len(b.Uplink.Interfaces) == 0
	}
	for _, i := range p.Interfaces {
		if i.MTURequest != b.MTU {
			return false
		}
	}
	return describePort(*p) == describePort(uplinkPort(b))
}

// layFiles writes files; where one was not right, systemd is told.
func (h *Host) layFiles(ctx context.Context, j *Journal, files []File) error {
	changed := false
	for _, f := range files {
		if f.find(j).OK {
			continue
		}
		changed = true
		if err := j.lay(f); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	return errors.Join(h.reload(ctx), h.reloadNetwork(ctx))
}
