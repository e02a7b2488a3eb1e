// Package virt speaks with the libvirt of a host: which virtual machines it
// has, to what they are plugged in, and how they start and stop.
package virt

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"strings"
	"syscall"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
	"libvirt.org/go/libvirtxml"

	"platter/hostprep/ovs"
)

// Sockets are where libvirt listens: the one daemon, or the one of several
// that runs QEMU.
var Sockets = []string{"/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"}

// Conn is a connection to libvirt. Its methods may be called at the same time.
type Conn struct {
	l    *libvirt.Libvirt
	stop func() bool
	ctx  context.Context // the connection ends with it
}

// Dial connects to the first of the sockets that takes the connection. The
// connection ends with ctx, and with it whatever is being waited for: libvirt's
// calls know no other limit.
func Dial(ctx context.Context, sockets ...string) (*Conn, error) {
	var conn net.Conn
	var errs []error
	for _, s := range sockets {
		var err error
		if conn, err = new(net.Dialer).DialContext(ctx, "unix", s); err == nil {
			break
		}
		// That it does not listen is worth telling before that it is not there.
		if errs = append(errs, err); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	if conn == nil {
		return nil, fmt.Errorf("libvirt does not answer: %w: look at 'systemctl status libvirtd virtqemud'", errors.Join(errs...))
	}
	c := &Conn{l: libvirt.NewWithDialer(dialed{conn}), ctx: ctx, stop: context.AfterFunc(ctx, func() { conn.Close() })}
	if err := c.l.ConnectToURI(libvirt.QEMUSystem); err != nil {
		c.stop()
		conn.Close()
		return nil, fmt.Errorf("libvirt does not answer: %w", c.why(err))
	}
	return c, nil
}

// dialed is a connection that was made already.
type dialed struct{ net.Conn }

func (d dialed) Dial() (net.Conn, error) { return d.Conn, nil }

// Close ends the connection.
func (c *Conn) Close() {
	if c.stop() {
		_ = c.l.Disconnect()
	}
}

// why puts the reason for which the connection was cut before its error.
func (c *Conn) why(err error) error {
	if err == nil || context.Cause(c.ctx) == nil {
		return err
	}
	return errors.Join(context.Cause(c.ctx), err)
}

// Version is the version of the libvirt that answers.
func (c *Conn) Version() (string, error) {
	v, err := c.l.ConnectGetLibVersion()
	if err != nil {
		return "", fmt.Errorf("libvirt does not tell its version: %w", c.why(err))
	}
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1_000%1_000, v%1_000), nil
}

// Domain is a virtual machine.
type Domain struct {
	Name       string
	UUID       string
	Active     bool   // it has a process: it runs, is paused, or is on its way down
	Starting   bool   // active, but still being plugged in
	Autostart  bool   // it is to run whenever the host does
	Memory     uint64 // bytes that it may use at most
	Interfaces []Interface

	handle libvirt.Domain
}

// Interface is a network interface of a domain that is plugged into Open
// vSwitch.
type Interface struct {
	Device  string // the host's end, for example vnet3; empty while the domain is off
	Bridge  string
	MAC     string
	ID      string // interfaceid of its virtual port
	Profile string // profileid of its virtual port
	VLAN    ovs.VLAN
}

// Domains returns all domains in the order of their names.
func (c *Conn) Domains() ([]Domain, error) {
	handles, _, err := c.l.ConnectListAllDomains(1, 0)
	if err != nil {
		return nil, fmt.Errorf("libvirt does not list its domains: %w", c.why(err))
	}
	var out []Domain
	for _, h := range handles {
		switch d, err := c.domain(h); {
		case has(err, libvirt.ErrNoDomain): // it went meanwhile
		case err != nil:
			return nil, fmt.Errorf("VM %s: %w", h.Name, c.why(err))
		default:
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b Domain) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

// Again reads a domain anew.
func (c *Conn) Again(d Domain) (Domain, error) {
	d, err := c.domain(d.handle)
	if err != nil {
		return Domain{}, fmt.Errorf("VM %s: %w", d.Name, c.why(err))
	}
	return d, nil
}

func (c *Conn) domain(h libvirt.Domain) (Domain, error) {
	d := Domain{Name: h.Name, UUID: uuid.UUID(h.UUID).String(), handle: h}
	active, err := c.l.DomainIsActive(h)
	if err != nil {
		return d, err
	}
	d.Active = active == 1
	state, reason, err := c.l.DomainGetState(h, 0)
	if err != nil {
		return d, err
	}
	d.Starting = libvirt.DomainState(state) == libvirt.DomainPaused && libvirt.DomainPausedReason(reason) == libvirt.DomainPausedStartingUp
	auto, err := c.l.DomainGetAutostart(h)
	if err != nil && !has(err, libvirt.ErrOperationInvalid) { // of one that lives only until it ends
		return d, err
	}
	d.Autostart = auto == 1
	_, kib, _, _, _, err := c.l.DomainGetInfo(h)
	if err != nil {
		return d, err
	}
	d.Memory = kib << 10
	text, err := c.l.DomainGetXMLDesc(h, 0)
	if err != nil {
		return d, err
	}
	d.Interfaces, err = interfaces(text)
	return d, err
}

// interfaces reads them from a domain's XML. Of a running domain that also
// holds what a libvirt network made of an interface that names one: it is
// written as the bridge with its virtual port and VLANs.
func interfaces(text string) ([]Interface, error) {
	var d libvirtxml.Domain
	if err := d.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("its definition: %w", err)
	}
	if d.Devices == nil {
		return nil, nil
	}
	var out []Interface
	for _, i := range d.Devices.Interfaces {
		if i.Source == nil || i.Source.Bridge == nil || i.VirtualPort == nil || i.VirtualPort.Params == nil || i.VirtualPort.Params.OpenVSwitch == nil {
			continue
		}
		n := Interface{Bridge: i.Source.Bridge.Bridge, VLAN: vlan(i.VLan),
			ID: i.VirtualPort.Params.OpenVSwitch.InterfaceID, Profile: i.VirtualPort.Params.OpenVSwitch.ProfileID}
		if i.Target != nil {
			n.Device = i.Target.Dev
		}
		if i.MAC != nil {
			n.MAC = strings.ToLower(i.MAC.Address)
		}
		out = append(out, n)
	}
	return out, nil
}

// vlan is what libvirt tells the switch about such an element (its
// virNetDevOpenvswitchConstructVlans): a native VLAN is a tag with a mode, and
// that or several tags make a trunk of all that are named.
func vlan(x *libvirtxml.DomainInterfaceVLan) ovs.VLAN {
	var v ovs.VLAN
	if x == nil {
		return v
	}
	var all []int
	for _, t := range x.Tags {
		all = append(all, int(t.ID))
		if t.NativeMode != "" {
			v.Tag, v.Mode = new(int(t.ID)), "native-"+t.NativeMode
		}
	}
	if x.Trunk == "yes" || len(all) > 1 || v.Mode != "" {
		v.Trunks = all
	} else if len(all) == 1 {
		v.Tag = new(all[0])
	}
	return v
}

// Start starts a domain and returns when its process runs and is plugged in.
// One that runs already is left alone.
func (c *Conn) Start(d Domain) error {
	return c.do(d, true, "cannot be started", c.l.DomainCreate(d.handle))
}

// Shutdown presses the power button of a domain; whether that does anything is
// up to the guest.
func (c *Conn) Shutdown(d Domain) error {
	return c.do(d, false, "does not take the power button", c.l.DomainShutdown(d.handle))
}

// Destroy ends the process of a domain: gracefully, which may fail where
// storage hangs, or however it takes.
func (c *Conn) Destroy(d Domain, graceful bool) error {
	var flags libvirt.DomainDestroyFlagsValues
	if graceful {
		flags = libvirt.DomainDestroyGraceful
	}
	return c.do(d, false, "cannot be ended", c.l.DomainDestroyFlags(d.handle, flags))
}

// do judges the error of what was to make a domain active, or not: there is
// none if it is so.
func (c *Conn) do(d Domain, active bool, what string, err error) error {
	if err == nil || !active && has(err, libvirt.ErrNoDomain) {
		return nil
	}
	if is, e := c.l.DomainIsActive(d.handle); e == nil && (is == 1) == active {
		return nil
	}
	return fmt.Errorf("VM %s %s: %w", d.Name, what, c.why(err))
}

// Changes tells whenever domains have started, stopped or changed otherwise;
// several changes may be told as one. It ends with ctx or the connection.
func (c *Conn) Changes(ctx context.Context) (<-chan struct{}, error) {
	events, err := c.l.LifecycleEvents(ctx)
	if err != nil {
		return nil, fmt.Errorf("libvirt does not tell of changes: %w", c.why(err))
	}
	out := make(chan struct{}, 1)
	go func() {
		defer close(out)
		for range events {
			select {
			case out <- struct{}{}:
			default: // told already
			}
		}
	}()
	return out, nil
}

func has(err error, code libvirt.ErrorNumber) bool {
	var e libvirt.Error
	return errors.As(err, &e) && e.Code == uint32(code)
}
