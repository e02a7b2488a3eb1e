package hostprep

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"platter/provision"
)

// Steps lists the preparation of the host, in order.
func (h *Host) Steps() []Step {
	return []Step{
		kernel(),
		h.cmdline(), h.modules(), h.sysctl(), h.sysfs(), h.disks(), h.cpu(), h.limits(), h.share(),
		h.versions(),
		h.unitOrder(),
		services(h.Systemd, [][]string{
			{"openvswitch-switch.service", "openvswitch.service"},
			{"ovsdb-server.service"}, {"ovs-vswitchd.service"},
			// A socket that starts its daemon on demand is as good as the daemon.
			{"libvirtd.socket", "libvirtd.service", "virtqemud.socket"},
			{"ssh.service", "sshd.service", "ssh.socket"},
		}),
		bridges(Bridges(h.Spec), command),
		virt("/run/libvirt/libvirt-sock", func(ctx context.Context) error {
			return startFirst(ctx, h.Systemd, "libvirtd.service", "virtqemud.service")
		}),
	}
}

// Bridges are the Open vSwitch bridges that the host shall have: the ones of
// the rack file, or one named br-vm.
func Bridges(spec provision.HostSpec) []provision.Bridge {
	if len(spec.Bridges) > 0 {
		return spec.Bridges
	}
	return []provision.Bridge{{Name: "br-vm"}}
}

// KernelRelease is what uname -r prints.
func KernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// SinceBoot is the time since the kernel started, in milliseconds, as a fact.
func SinceBoot() string {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return ""
	}
	return fmt.Sprint(time.Duration(t.Nano()).Milliseconds())
}

// kernel: the running kernel is one whose modules are on the disk. After a
// kexec of another kernel, or an upgrade without a reboot, it may not be.
func kernel() Step {
	return Step{
		Name: "kernel",
		Next: "Reboot the node into the kernel of its image",
		Check: func(context.Context) ([]Finding, error) {
			release := KernelRelease()
			_, err := os.Stat("/lib/modules/" + release + "/modules.dep")
			return []Finding{{What: "running kernel", OK: err == nil, Is: release, Want: "a kernel with modules in /lib/modules",
				Why: "Open vSwitch and KVM are modules"}}, nil
		},
	}
}

// runner runs a program and returns what it printed.
type runner func(ctx context.Context, name string, args ...string) (string, error)

func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// bridges: every bridge is in the switch's database, its device exists, is up
// and has the MTU that was asked for.
func bridges(want []provision.Bridge, run runner) Step {
	// missing tells what is wrong with one bridge; empty: nothing.
	missing := func(b provision.Bridge, have []string) string {
		if !slices.Contains(have, b.Name) {
			return "not in Open vSwitch"
		}
		link, err := netlink.LinkByName(b.Name)
		switch {
		case err != nil:
			return "has no device"
		case link.Attrs().Flags&net.FlagUp == 0:
			return "down"
		case b.MTU != 0 && link.Attrs().MTU != b.MTU:
			return fmt.Sprintf("MTU %d", link.Attrs().MTU)
		}
		return ""
	}
	return Step{
		Name: "bridges",
		Next: "Look at 'ovs-vsctl show' and 'journalctl -u ovs-vswitchd' on the node",
		Check: func(ctx context.Context) ([]Finding, error) {
			out, err := run(ctx, "ovs-vsctl", "--timeout=60", "list-br")
			if err != nil {
				return nil, err
			}
			var found []Finding
			for _, b := range want {
				f := Finding{What: "bridge " + b.Name, Is: missing(b, strings.Fields(out)), Want: "up", Why: "libvirt attaches VMs to it"}
				if f.Is == "" {
					f.OK, f.Is = true, "up"
				}
				if b.MTU != 0 {
					f.Want += fmt.Sprintf(" with MTU %d", b.MTU)
				}
				found = append(found, f)
			}
			return found, nil
		},
		Apply: func(ctx context.Context, _ *Journal) error {
			for _, b := range want {
				args := []string{"--timeout=60", "--may-exist", "add-br", b.Name}
				if b.MTU != 0 {
					args = append(args, "--", "set", "interface", b.Name, fmt.Sprintf("mtu_request=%d", b.MTU))
				}
				// Returns when the switch has made the device.
				if _, err := run(ctx, "ovs-vsctl", args...); err != nil {
					return err
				}
				link, err := netlink.LinkByName(b.Name)
				if err != nil {
					return fmt.Errorf("bridge %s: Open vSwitch made no device for it: %w: is the module openvswitch there?", b.Name, err)
				}
				if err := netlink.LinkSetUp(link); err != nil {
					return fmt.Errorf("bridge %s: setting it up: %w", b.Name, err)
				}
			}
			return nil
		},
	}
}

// virt: libvirt answers at its socket. start starts it and waits until it has.
func virt(socket string, start func(context.Context) error) Step {
	return Step{
		Name:  "libvirt",
		Apply: func(ctx context.Context, _ *Journal) error { return start(ctx) },
		Next:  "Look at 'journalctl -u libvirtd' on the node",
		Check: func(ctx context.Context) ([]Finding, error) {
			f := Finding{What: "libvirt", Want: "an answer", Why: "it runs the VMs"}
			// A daemon that the socket starts first may take a while on a
			// slow machine.
			ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
			defer cancel()
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, fmt.Errorf("libvirt does not answer: %w", err)
			}
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			l := libvirt.NewWithDialer(dialed{conn})
			if err := l.ConnectToURI(libvirt.QEMUSystem); err != nil {
				conn.Close()
				return nil, fmt.Errorf("libvirt does not answer: %w", errors.Join(context.Cause(ctx), err))
			}
			defer l.Disconnect()
			v, err := l.ConnectGetLibVersion()
			if err != nil {
				return nil, fmt.Errorf("libvirt does not tell its version: %w", err)
			}
			f.OK, f.Is = true, fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1_000%1_000, v%1_000)
			return []Finding{f}, nil
		},
	}
}

// dialed is a connection that was made already.
type dialed struct{ net.Conn }

func (d dialed) Dial() (net.Conn, error) { return d.Conn, nil }
