package hostprep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/hostprep/virt"
)

// Steps lists the whole preparation of the host, in order.
func (h *Host) Steps() []Step { return append(h.HostSteps(), h.GuestSteps()...) }

// HostSteps lists the preparation of the host itself, in order.
func (h *Host) HostSteps() []Step {
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
		h.bridges(),
		h.libvirt(virt.Sockets...),
	}
}

// GuestSteps lists what comes after HostSteps and takes as long as the starts of
// the VMs do: nothing but the VMs needs to wait for it.
func (h *Host) GuestSteps() []Step {
	return []Step{
		h.guests(),
		h.ports(), // after the guests' unit, which repairs ports too
	}
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
	t := sinceBoot()
	if t == 0 {
		return ""
	}
	return fmt.Sprint(t.Milliseconds())
}

func sinceBoot() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
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
