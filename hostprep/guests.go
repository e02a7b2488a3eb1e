package hostprep

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"platter/hostprep/virt"
	"platter/provision"
)

// The domains of a host are started and stopped here, by
// platter-guests.service:
//
//	(*Host).StartGuests(ctx, rep)  starts those that are marked autostart
//	(*Host).StopGuests(ctx, rep)   ends all
//	(*Host).Repair(ctx, rep)       puts the ports of the running ones right
//	(*Host).PurgePorts(ctx, rep)   deletes what a former boot left, before the switch runs
//
// All may be repeated and cut off. None takes the host's lock: the unit runs
// while the agent, which holds it, waits for the unit.

// libvirt is the step that wants libvirt to answer at one of the sockets.
func (h *Host) libvirt(sockets ...string) Step {
	return Step{
		Name: "libvirt",
		Next: "Look at 'journalctl -u libvirtd -u virtqemud' on the node",
		Check: func(ctx context.Context) ([]Finding, error) {
			// A daemon that the socket starts first may take a while on a
			// slow machine.
			ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
			defer cancel()
			conn, err := virt.Dial(ctx, sockets...)
			if err != nil {
				return nil, err
			}
			defer conn.Close()
			v, err := conn.Version()
			return []Finding{{What: "libvirt", OK: err == nil, Is: v, Want: "an answer", Why: "it runs the VMs"}}, err
		},
		Apply: func(ctx context.Context, _ *Journal) error {
			return startFirst(ctx, h.Systemd, "libvirtd.service", "virtqemud.service")
		},
	}
}

// guestSpec is the host's with the defaults in place.
func (h *Host) guestSpec() provision.GuestSpec {
	g := h.Spec.Guests
	if g.Parallel == 0 {
		g.Parallel = 2
	}
	if g.StopWithin == 0 {
		g.StopWithin = 2 * time.Minute
	}
	return g
}

// guests is the step that wants the guests' unit to be active, and with it every
// domain that is marked autostart. One that is off while the unit is active did
// not come up, or somebody has shut it down: that is for a person, and no reason
// to keep the node from its service.
func (h *Host) guests() Step {
	return Step{
		Name: "guests",
		Next: "Look at 'journalctl -u " + guestsUnit + "' on the node",
		Check: func(ctx context.Context) ([]Finding, error) {
			unit := Finding{What: guestsUnit, OK: true, Is: "active", Want: "active", Why: "it starts the VMs, and ends them before libvirt and the switch stop"}
			if h.Systemd != nil {
				_, active, err := h.Systemd.Unit(guestsUnit).state(ctx) // waits while it is starting them
				if err != nil {
					return nil, err
				}
				unit.OK, unit.Is = active == "active", active
			}
			ctx, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			conn, err := virt.Dial(ctx, virt.Sockets...)
			if err != nil {
				return []Finding{unit}, err
			}
			defer conn.Close()
			domains, err := conn.Domains()
			out := []Finding{unit}
			for _, d := range domains {
				if !d.Autostart {
					continue
				}
				f := Finding{What: "VM " + d.Name, OK: d.Active, Is: "running", Want: "running", Why: "it is marked autostart"}
				if !d.Active {
					f.Is, f.Person = "off, see 'journalctl -u "+guestsUnit+"'", unit.OK
				}
				out = append(out, f)
			}
			return out, err
		},
		Apply: func(ctx context.Context, _ *Journal) error {
			if h.Systemd == nil {
				return nil
			}
			return h.Systemd.Unit(guestsUnit).Start(ctx)
		},
	}
}

const (
	startTries = 3
	startPause = time.Second // after the first failure, then twice that
	// ioBusy is the share of the last ten seconds, in percent, in which
	// something waited for a disk, above which no further domain is started;
	// but none waits longer than ioPatience.
	ioBusy     = 40
	ioPatience = 2 * time.Minute
	// startTime is how long one try to start a domain may take: one whose
	// storage hangs must not keep the others.
	startTime = 10 * time.Minute
	// bridgeTime is how long a bridge may take to appear.
	bridgeTime = time.Minute
)

// StartGuests starts the domains that are marked autostart and do not run, a
// few at a time, no faster than the disks bear and no more than the memory
// holds. A domain counts as started when its ports are taken up by the switch,
// on the right bridge and in the right VLAN. Domains that do not come up are
// named in the error; the others run.
func (h *Host) StartGuests(ctx context.Context, rep Progress) error {
	rep = &oneAtATime{rep: rep}
	// The switch makes its bridges anew at each start, and leaves them down.
	for _, b := range Bridges(h.Spec) {
		if err := raise(b.Name, 0); err != nil {
			rep.Logf("guests: bridge: %v", err)
		}
	}
	p, err := plumb(ctx)
	if err != nil {
		return err
	}
	defer p.virt.Close()
	// What an earlier life left would stand in the way of the first start.
	faults, _, err := p.lasting(ctx)
	if err != nil {
		return err
	}
	if err := p.mendAll(ctx, faults, rep); err != nil {
		rep.Logf("guests: %v", err)
	}
	domains, err := p.virt.Domains()
	if err != nil {
		return err
	}
	total, err := TotalMemory(h.Root)
	if err != nil {
		return err
	}
	var due []virt.Domain
	var promised uint64
	for _, d := range domains {
		switch {
		case d.Active:
			promised += d.Memory
		case d.Autostart:
			due = append(due, d)
		}
	}
	spec := h.guestSpec()
	rep.Logf("guests: %d to start, %d at a time", len(due), spec.Parallel)
	var mu sync.Mutex // over failed and promised
	var failed []error
	var group errgroup.Group
	group.SetLimit(spec.Parallel)
	for n, d := range due {
		if n > 0 && provision.Sleep(ctx, spec.Delay) != nil {
			break
		}
		if err := h.calm(ctx, rep); err != nil {
			break
		}
		fail := func(err error) {
			mu.Lock()
			defer mu.Unlock()
			failed = append(failed, fmt.Errorf("VM %s: %w", d.Name, err))
			rep.Logf("guests: %d/%d %s: failed: %v", n+1, len(due), d.Name, err)
		}
		mu.Lock()
		err := Admit(total, promised, d.Memory, spec.MemoryPercent)
		if err == nil {
			promised += d.Memory
		}
		mu.Unlock()
		if err != nil {
			fail(err)
			continue
		}
		group.Go(func() error {
			began := time.Now()
			is, err := p.bringUp(ctx, d, rep)
			if err != nil {
				fail(err)
				mu.Lock()
				promised -= d.Memory
				mu.Unlock()
				return nil
			}
			rep.Logf("guests: %d/%d %s: runs, %s (%.1f s)", n+1, len(due), d.Name, is, time.Since(began).Seconds())
			return nil
		})
	}
	_ = group.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if len(failed) == 0 {
		return nil
	}
	return &provision.Failure{Code: "guests", Message: fmt.Sprintf("%d of %d VMs did not start: %s", len(failed), len(due), oneLine(failed)),
		Next: "Put right what is named and run '" + h.self("start-guests") + "'; a restart of " + guestsUnit + " would stop all VMs first"}
}

// oneAtATime lets several goroutines tell.
type oneAtATime struct {
	mu  sync.Mutex
	rep Progress
}

func (o *oneAtATime) Phase(name string, n, of int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rep.Phase(name, n, of)
}

func (o *oneAtATime) Logf(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rep.Logf(format, args...)
}

func (o *oneAtATime) Facts(facts map[string]string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rep.Facts(facts)
}

func oneLine(errs []error) string {
	var parts []string
	for _, err := range errs {
		parts = append(parts, err.Error())
	}
	return strings.Join(parts, "; ")
}

// calm waits until the disks have time for another start.
func (h *Host) calm(ctx context.Context, rep Progress) error {
	for began, told := time.Now(), false; ; told = true {
		busy, ok := ioPressure(h.Root)
		switch {
		case !ok || busy < ioBusy:
			return ctx.Err()
		case time.Since(began) > ioPatience:
			rep.Logf("guests: the disks are still busy, %.0f %% of the time: going on all the same", busy)
			return ctx.Err()
		case !told:
			rep.Logf("guests: waiting for the disks, which are busy %.0f %% of the time", busy)
		}
		if err := provision.Sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}

// ioPressure is the share of the last ten seconds, in percent, in which
// something waited for a disk; not ok where the kernel does not tell.
func ioPressure(root string) (percent float64, ok bool) {
	b, err := os.ReadFile(filepath.Join(root, "/proc/pressure/io"))
	if err != nil {
		return 0, false
	}
	for word := range strings.FieldsSeq(string(b)) { // the first line is "some"
		if v, ok := strings.CutPrefix(word, "avg10="); ok {
			percent, err := strconv.ParseFloat(v, 64)
			return percent, err == nil
		}
	}
	return 0, false
}

// bringUp starts a domain and sees to its ports, and says what it is plugged
// into.
func (p plumbing) bringUp(ctx context.Context, d virt.Domain, rep Progress) (string, error) {
	for try := 1; ; try++ {
		is, err := p.bringUpOnce(ctx, d, rep)
		if err == nil || ctx.Err() != nil {
			return is, err
		}
		if try == startTries {
			return "", fmt.Errorf("%w (tried %d times)", err, try)
		}
		rep.Logf("guests: %s: %v: trying again", d.Name, err)
		if err := provision.Sleep(ctx, startPause<<(try-1)); err != nil {
			return "", err
		}
		// libvirt refuses a device whose row is on another bridge.
		if faults, _, err := p.lasting(ctx); err == nil {
			if err := p.mendAll(ctx, slices.DeleteFunc(faults, func(f Fault) bool { return !f.stale }), rep); err != nil {
				rep.Logf("guests: %s: %v", d.Name, err)
			}
		}
	}
}

func (p plumbing) bringUpOnce(ctx context.Context, d virt.Domain, rep Progress) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	conn, err := virt.Dial(ctx, virt.Sockets...) // one that ends with the try
	if err != nil {
		return "", err
	}
	defer conn.Close()
	p.virt = conn
	for _, i := range d.Interfaces {
		if err := p.bridgeUp(ctx, i.Bridge); err != nil {
			return "", err
		}
	}
	if err := p.virt.Start(d); err != nil {
		return "", err
	}
	// What the switch says of its ports is right by now: libvirt has waited for
	// it.
	faults, d, err := p.of(ctx, d)
	if err != nil {
		return "", err
	}
	if err := p.mendAll(ctx, faults, rep); err != nil {
		return "", err
	}
	if len(faults) > 0 {
		if faults, d, err = p.of(ctx, d); err != nil {
			return "", err
		}
	}
	var bad []string
	for _, f := range faults {
		bad = append(bad, f.String())
	}
	if len(bad) > 0 {
		return "", errors.New(strings.Join(bad, "; "))
	}
	var is []string
	for _, i := range d.Interfaces {
		is = append(is, fmt.Sprintf("%s on %s: %s", i.Device, i.Bridge, i.VLAN))
	}
	if len(is) == 0 {
		return "without a port", nil
	}
	return strings.Join(is, ", "), nil
}

// of looks at the ports of one domain.
func (p plumbing) of(ctx context.Context, d virt.Domain) ([]Fault, virt.Domain, error) {
	d, err := p.virt.Again(d)
	if err != nil {
		return nil, d, err
	}
	if !d.Active {
		return nil, d, errors.New("it ended right after its start: look at /var/log/libvirt/qemu/" + d.Name + ".log")
	}
	bridges, err := p.sw.Bridges(ctx)
	if err != nil {
		return nil, d, err
	}
	links, err := deviceNames()
	if err != nil {
		return nil, d, err
	}
	return slices.DeleteFunc(Diagnose(bridges, links, []virt.Domain{d}), func(f Fault) bool { return f.stale }), d, nil
}

// bridgeUp waits until the bridge has its device and sets it up. The switch
// makes the device; nothing sets it up after a boot.
func (p plumbing) bridgeUp(ctx context.Context, name string) error {
	bridges, err := p.sw.Bridges(ctx)
	if err != nil {
		return err
	}
	if _, port := find(bridges, name); port == nil {
		return fmt.Errorf("bridge %s is not in Open vSwitch: put it into the rack file, or into the VM's definition one that is there", name)
	}
	ctx, cancel := context.WithTimeout(ctx, bridgeTime)
	defer cancel()
	link, err := awaitLink(ctx, name)
	if err != nil {
		return fmt.Errorf("bridge %s has no device: %w: look at 'ovs-vsctl show'", name, err)
	}
	if link.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bridge %s: setting it up: %w", name, err)
	}
	return nil
}

// awaitLink returns the device when it is there.
func awaitLink(ctx context.Context, name string) (netlink.Link, error) {
	if link, err := netlink.LinkByName(name); err == nil {
		return link, nil
	}
	news, done := make(chan netlink.LinkUpdate), make(chan struct{})
	if err := netlink.LinkSubscribe(news, done); err != nil {
		return nil, err
	}
	defer func() {
		close(done)
		for range news { // it is closed when nothing more comes
		}
	}()
	for {
		link, err := netlink.LinkByName(name)
		if err == nil {
			return link, nil
		}
		select {
		case _, more := <-news:
			if !more {
				return nil, err
			}
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

// StopGuests ends all domains of the host: with the power button, together and
// within the time of the rack file, then by force. When it returns without an
// error none runs and no row of theirs is left in the switch.
func (h *Host) StopGuests(ctx context.Context, rep Progress) error {
	rep = &oneAtATime{rep: rep}
	// Where none runs libvirt need not be woken, least of all during a
	// shutdown. It keeps a file for each that runs.
	if running, _ := filepath.Glob("/run/libvirt/qemu/*.xml"); len(running) > 0 {
		if err := h.endGuests(ctx, rep); err != nil {
			return err
		}
	} else {
		rep.Logf("guests: none runs")
	}
	return h.PurgePorts(ctx, rep)
}

func (h *Host) endGuests(ctx context.Context, rep Progress) error {
	conn, err := virt.Dial(ctx, virt.Sockets...)
	if err != nil {
		return err
	}
	defer conn.Close()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	changes, err := conn.Changes(watch)
	if err != nil {
		return err
	}
	left, err := active(conn)
	if err != nil {
		return err
	}
	within := h.guestSpec().StopWithin
	rep.Logf("guests: shutting down %s, within %s", listed(left), within)
	over := time.After(within)
	// An agent in a guest may take its time to answer; nobody waits for it.
	go together(left, func(d virt.Domain) {
		if err := conn.Shutdown(d); err != nil && watch.Err() == nil {
			rep.Logf("guests: %v", err)
		}
	})
	for running := true; running && len(left) > 0; {
		select {
		case _, running = <-changes:
		case <-over:
			running = false
		case <-ctx.Done():
			return ctx.Err()
		}
		if left, err = active(conn); err != nil {
			return err
		}
	}
	stop()
	for _, graceful := range []bool{true, false} {
		if len(left) == 0 {
			break
		}
		rep.Logf("guests: still running, ended now: %s", listed(left))
		together(left, func(d virt.Domain) {
			if err := conn.Destroy(d, graceful); err != nil {
				rep.Logf("guests: %v", err)
			}
		})
		if left, err = active(conn); err != nil {
			return err
		}
	}
	if len(left) > 0 {
		return &provision.Failure{Code: "guests", Message: "These VMs cannot be ended: " + listed(left),
			Next: "Look at 'journalctl -u libvirtd -u virtqemud'; a process that waits for its storage ends when that answers"}
	}
	rep.Logf("guests: all ended")
	return nil
}

func active(conn *virt.Conn) ([]virt.Domain, error) {
	domains, err := conn.Domains()
	return slices.DeleteFunc(domains, func(d virt.Domain) bool { return !d.Active }), err
}

func listed(domains []virt.Domain) string {
	var out []string
	for _, d := range domains {
		out = append(out, d.Name)
	}
	return strings.Join(out, ", ")
}

// together does something with all domains at the same time.
func together(domains []virt.Domain, do func(virt.Domain)) {
	var all sync.WaitGroup
	for _, d := range domains {
		all.Go(func() { do(d) })
	}
	all.Wait()
}
