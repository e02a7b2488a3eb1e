package hostprep

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"platter/hostprep/ovs"
	"platter/hostprep/virt"
	"platter/provision"
)

// Fault is a port of a VM in Open vSwitch that is not as the VM needs it.
type Fault struct {
	Port string // also the name of its device
	VM   string // its name, or its UUID where libvirt does not know it
	Is   string
	Want string

	stale   bool         // the row speaks of a device that is gone
	changes []ovs.Change // that put it right, as one transaction
	beyond  bool         // nothing here can put it right
}

// String is the fault in one line.
func (f Fault) String() string {
	return fmt.Sprintf("port %s of VM %s: %s, should be %s", f.Port, f.VM, f.Is, f.Want)
}

// guest tells whether somebody who runs VMs made the port, and the UUID of the
// VM where it says so. libvirt writes vm-id, OpenStack vm-uuid; libvirt from
// about 10 on also marks its ports as transient, which to the switch means: not
// to outlive a boot.
func guest(p ovs.Port) (id string, yes bool) {
	for _, i := range p.Interfaces {
		for _, key := range []string{"vm-id", "vm-uuid"} {
			if id := i.ExternalIDs[key]; id != "" {
				return id, true
			}
		}
	}
	return "", p.OtherConfig["transient"] == "true"
}

// staleIn returns the rows of VMs whose device is gone. The switch keeps them
// and takes up whatever gets that name next, with the bridge and the VLAN of the
// former: libvirt adds a port with --may-exist, which changes nothing of one
// that is there.
func staleIn(bridges []ovs.Bridge, links map[string]bool, names map[string]string) []Fault {
	var out []Fault
	for _, b := range bridges {
		for _, p := range b.Ports {
			id, yes := guest(p)
			// Only a port without a type needs a device of the host.
			if !yes || slices.ContainsFunc(p.Interfaces, func(i ovs.Interface) bool { return i.Type != "" && i.Type != "system" || links[i.Name] }) {
				continue
			}
			vm := names[id]
			switch {
			case vm != "":
			case id != "":
				vm = id + " (unknown to libvirt)"
			default:
				vm = "(not named in the row)"
			}
			out = append(out, Fault{Port: p.Name, VM: vm, stale: true, changes: []ovs.Change{ovs.DeletePort(p.Name)},
				Is: fmt.Sprintf("left behind on bridge %s, %s, without a device", b.Name, p.VLAN), Want: "gone"})
		}
	}
	return out
}

// Diagnose compares the ports of the switch with the devices of the host, by
// name, and with what the running domains ask for. That a row has a number and
// no error says little: one that was left behind and got its device back looks
// healthy in a VLAN of the past.
func Diagnose(bridges []ovs.Bridge, links map[string]bool, domains []virt.Domain) []Fault {
	names := map[string]string{}
	for _, d := range domains {
		names[d.UUID] = d.Name
	}
	out := staleIn(bridges, links, names)
	for _, d := range domains {
		for _, i := range d.Interfaces {
			if !d.Active || d.Starting || i.Device == "" {
				continue
			}
			if f, bad := diagnose(bridges, links, d, i); bad {
				out = append(out, f)
			}
		}
	}
	return out
}

// diagnose looks at one interface of a running domain.
func diagnose(bridges []ovs.Bridge, links map[string]bool, d virt.Domain, i virt.Interface) (Fault, bool) {
	f := Fault{Port: i.Device, VM: d.Name}
	if !links[i.Device] {
		f.Is, f.Want, f.beyond = "without its device", "there: stop the VM and start it", true
		return f, true
	}
	bridge, vlan := belongs(bridges, i)
	ids := map[string]string{"vm-id": d.UUID}
	for key, value := range map[string]string{"iface-id": i.ID, "attached-mac": i.MAC, "port-profile": i.Profile} {
		if value != "" {
			ids[key] = value
		}
	}
	on, port := find(bridges, i.Device)
	if port == nil {
		ids["iface-status"] = "active"
		f.Is, f.Want = "missing", fmt.Sprintf("on bridge %s, %s", bridge, vlan)
		f.changes = []ovs.Change{ovs.AddPort(bridge, ovs.Port{Name: i.Device, VLAN: vlan, OtherConfig: map[string]string{"transient": "true"},
			Interfaces: []ovs.Interface{{Name: i.Device, ExternalIDs: ids}}})}
		return f, true
	}
	var is, want []string
	bad := func(a, b string, c ...ovs.Change) {
		is, want, f.changes = append(is, a), append(want, b), append(f.changes, c...)
	}
	if on.Name != bridge {
		bad("on bridge "+on.Name, "on bridge "+bridge, ovs.MovePort(i.Device, bridge))
	}
	if !port.VLAN.Equal(vlan) {
		bad(port.VLAN.String(), vlan.String(), ovs.SetVLAN(i.Device, vlan))
	}
	own := port.Interfaces[0]
	for _, key := range slices.Sorted(maps.Keys(ids)) {
		if !strings.EqualFold(own.ExternalIDs[key], ids[key]) {
			bad(fmt.Sprintf("%s %q", key, own.ExternalIDs[key]), fmt.Sprintf("%q", ids[key]), ovs.SetIDs(i.Device, map[string]string{key: ids[key]}))
		}
	}
	// The switch takes it up anew with every change.
	switch {
	case own.Error != "":
		bad("in error: "+own.Error, "in use")
	case own.OFPort <= 0:
		bad("not taken up by the switch", "in use")
	}
	f.Is, f.Want = strings.Join(is, ", "), strings.Join(want, ", ")
	return f, len(is) > 0
}

// belongs is where the port of an interface belongs. A bridge that only stands
// for a VLAN of another is that VLAN there.
func belongs(bridges []ovs.Bridge, i virt.Interface) (bridge string, vlan ovs.VLAN) {
	if on, p := find(bridges, i.Bridge); p != nil && p.FakeBridge {
		return on.Name, p.VLAN
	}
	return i.Bridge, i.VLAN
}

func find(bridges []ovs.Bridge, port string) (*ovs.Bridge, *ovs.Port) {
	for b := range bridges {
		for p := range bridges[b].Ports {
			if bridges[b].Ports[p].Name == port {
				return &bridges[b], &bridges[b].Ports[p]
			}
		}
	}
	return nil, nil
}

// deviceNames are the network devices of the host.
func deviceNames() (map[string]bool, error) {
	list, err := os.ReadDir("/sys/class/net")
	if err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for _, e := range list {
		out[e.Name()] = true
	}
	return out, nil
}

func deviceExists(name string) bool {
	_, err := os.Stat("/sys/class/net/" + name)
	return err == nil
}

// plumbing is what ports are judged by and repaired with.
type plumbing struct {
	sw   *ovs.Switch
	virt *virt.Conn
}

func plumb(ctx context.Context) (plumbing, error) {
	sw, err := ovs.Dial(ctx, "")
	if err != nil {
		return plumbing{}, err
	}
	conn, err := virt.Dial(ctx, virt.Sockets...)
	return plumbing{sw, conn}, err
}

// faults looks once and tells how many ports of running domains there are.
func (p plumbing) faults(ctx context.Context) (faults []Fault, ports int, err error) {
	domains, err := p.virt.Domains()
	if err != nil {
		return nil, 0, err
	}
	bridges, err := p.sw.Bridges(ctx)
	if err != nil {
		return nil, 0, err
	}
	links, err := deviceNames()
	if err != nil {
		return nil, 0, err
	}
	for _, d := range domains {
		if d.Active {
			ports += len(d.Interfaces)
		}
	}
	return Diagnose(bridges, links, domains), ports, nil
}

// secondLook is how long a fault must last. libvirt makes a device before its
// port and deletes the port after the device, which nothing tells of: what is
// seen in between is not a fault.
const secondLook = time.Second

// lasting looks, and where something is wrong looks again.
func (p plumbing) lasting(ctx context.Context) ([]Fault, int, error) {
	first, ports, err := p.faults(ctx)
	if err != nil || len(first) == 0 {
		return nil, ports, err
	}
	if err := provision.Sleep(ctx, secondLook); err != nil {
		return nil, 0, err
	}
	second, ports, err := p.faults(ctx)
	return slices.DeleteFunc(second, func(f Fault) bool {
		return !slices.ContainsFunc(first, func(g Fault) bool { return f.String() == g.String() })
	}), ports, err
}

// lookTime is how long libvirt and the switch may take to answer everything.
const lookTime = 5 * time.Minute

// switchTime is how long the switch may take to act on a change.
const switchTime = time.Minute

// mend puts one fault right, in one transaction. The guest notices at most
// that frames were lost.
func (p plumbing) mend(ctx context.Context, f Fault) error {
	switch {
	case f.beyond:
		return errors.New(f.String())
	case f.stale && deviceExists(f.Port):
		return nil // it came back, and is judged as a living one with the next look
	}
	act := p.sw.Apply
	if f.stale {
		act = p.sw.Commit // the switch need not act on what it could not use
	}
	ctx, cancel := context.WithTimeout(ctx, switchTime)
	defer cancel()
	if err := act(ctx, f.changes...); err != nil {
		return fmt.Errorf("%s: %w", f, err)
	}
	return nil
}

// mendAll puts right what it can, tells each, and returns what it could not.
func (p plumbing) mendAll(ctx context.Context, faults []Fault, rep Progress) error {
	var errs []error
	for _, f := range faults {
		if err := p.mend(ctx, f); err != nil {
			errs = append(errs, err)
			continue
		}
		rep.Logf("ports: repaired: %s", f)
	}
	return errors.Join(errs...)
}

// Repair finds the ports of VMs that are not as they should be and puts them
// right: rows that were left behind go, ports of running VMs are moved, tagged
// or taken up anew without the guest being stopped. What is wrong at the end is
// named in the error.
func (h *Host) Repair(ctx context.Context, rep Progress) error {
	left, err := h.repair(ctx, rep)
	for _, f := range left {
		err = errors.Join(err, errors.New(f.String()))
	}
	return err
}

// repair also returns what it cannot put right.
func (h *Host) repair(ctx context.Context, rep Progress) (left []Fault, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	p, err := plumb(ctx)
	if err != nil {
		return nil, err
	}
	defer p.virt.Close()
	faults, ports, err := p.lasting(ctx)
	if err != nil {
		return nil, err
	}
	if len(faults) == 0 {
		rep.Logf("ports: %d of running VMs, all right", ports)
		return nil, nil
	}
	if err := p.mendAll(ctx, slices.DeleteFunc(faults, func(f Fault) bool { return f.beyond }), rep); err != nil {
		return nil, err
	}
	left, _, err = p.lasting(ctx)
	return left, err
}

// ports is the step that keeps the ports of VMs right.
func (h *Host) ports() Step {
	return Step{
		Name: "ports",
		Next: "Look at 'ovs-vsctl show' and 'journalctl -u ovs-vswitchd -u libvirtd' on the node",
		Check: func(ctx context.Context) ([]Finding, error) {
			ctx, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			p, err := plumb(ctx)
			if err != nil {
				return nil, err
			}
			defer p.virt.Close()
			faults, ports, err := p.lasting(ctx)
			const why = "a port that is left over or wrong cuts a VM off, or puts it into the network of another"
			if len(faults) == 0 {
				return []Finding{{What: "ports of VMs", OK: true, Is: fmt.Sprintf("%d right", ports), Want: "all right", Why: why}}, err
			}
			var out []Finding
			for _, f := range faults {
				out = append(out, Finding{What: fmt.Sprintf("port %s of VM %s", f.Port, f.VM), Is: f.Is, Want: f.Want, Why: why, Person: f.beyond})
			}
			return out, err
		},
		Apply: func(ctx context.Context, _ *Journal) error {
			_, err := h.repair(ctx, silent{}) // what is left is looked at again
			return err
		},
	}
}

// silent is a Progress that nobody hears.
type silent struct{}

func (silent) Phase(string, int, int)  {}
func (silent) Logf(string, ...any)     {}
func (silent) Facts(map[string]string) {}

// PurgePorts deletes the rows of VMs whose device is gone. It needs the
// database alone and is for the time before the switch starts, when every row
// of a former life is one. A port whose device exists stays: a restart of the
// switch must not cut off the VMs that run.
func (h *Host) PurgePorts(ctx context.Context, rep Progress) error {
	sw, err := ovs.Dial(ctx, "")
	if err != nil {
		return err
	}
	bridges, err := sw.Bridges(ctx)
	if err != nil {
		return err
	}
	links, err := deviceNames()
	if err != nil {
		return err
	}
	faults := staleIn(bridges, links, h.definedVMs())
	var changes []ovs.Change
	for _, f := range faults {
		changes = append(changes, f.changes...)
	}
	if err := sw.Commit(ctx, changes...); err != nil {
		return err
	}
	for _, f := range faults {
		rep.Logf("ports: deleted port %s of VM %s: %s", f.Port, f.VM, f.Is)
	}
	if len(faults) == 0 {
		rep.Logf("ports: nothing is left over")
	}
	return nil
}

// definedVMs are the names of the VMs by UUID, for when libvirt does not run
// and only its files can be asked. What cannot be read has no name.
func (h *Host) definedVMs() map[string]string {
	names := map[string]string{}
	files, _ := filepath.Glob(filepath.Join(h.Root, "/etc/libvirt/qemu/*.xml"))
	for _, file := range files {
		var d struct {
			Name string `xml:"name"`
			UUID string `xml:"uuid"`
		}
		if b, err := os.ReadFile(file); err == nil && xml.Unmarshal(b, &d) == nil {
			names[d.UUID] = d.Name
		}
	}
	return names
}
