package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
)

const libvirtdConf = `auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
host_uuid = %q
log_outputs = "3:stderr"
`

// The lab's files are its own, so that libvirt need not change owners, label
// or confine; QEMU writes logs itself, so that no virtlogd is needed.
const qemuConf = `user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
hugetlbfs_mount = []
stdio_handler = "file"
`

// ensureDaemon starts the lab's libvirtd unless it answers.
func (l *Lab) ensureDaemon(ctx context.Context) error {
	if err := l.virt(ctx, func(*virt) error { return nil }); err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	path, err := findTool("libvirtd", "libvirt-daemon")
	if err != nil {
		return err
	}
	if _, err := findTool("qemu-system-x86_64", "qemu-system-x86"); err != nil {
		return err
	}
	// One that runs and does not answer would stand in the way. Machines that
	// run stay, the next libvirtd takes them over.
	if err := l.space().end(ctx, func(p Process) bool { return p.Command == "libvirtd" }); err != nil {
		return err
	}
	left, err := l.space().processes()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(left, func(p Process) bool { return strings.HasPrefix(p.Command, "qemu-system") }) {
		// What is in run speaks of processes; they are gone.
		if err := os.RemoveAll(filepath.Join(l.dir, "run")); err != nil {
			return err
		}
	}
	if err := l.furnish(); err != nil {
		return err
	}
	logPath := filepath.Join(l.dir, "var/log/libvirtd.log")
	log, err := os.Create(logPath)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(path)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	// A signal to the caller's terminal is not for the lab. The address of
	// D-Bus leads nowhere: a system's machined would mix up labs.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin", "HOME=/var", "LANG=C", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/no-dbus"}
	if err := startIn(cmd, l.rec.NetNS, []bind{
		{filepath.Join(l.dir, "etc"), "/etc/libvirt"},
		{filepath.Join(l.dir, "etc/passwd"), "/etc/passwd"},
		{filepath.Join(l.dir, "etc/group"), "/etc/group"},
		{filepath.Join(l.dir, "var"), "/var"},
		{filepath.Join(l.dir, "run"), "/run"},
		{filepath.Join(l.dir, "console"), consoleFolder},
	}); err != nil {
		return fmt.Errorf("cannot start libvirtd: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		err := l.virt(ctx, func(*virt) error { return nil })
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("libvirtd did not answer (%v), see %s: %w", err, logPath, ctx.Err())
		case err := <-ended:
			said, _ := os.ReadFile(logPath)
			lines := strings.Split(strings.TrimSpace(string(said)), "\n")
			return fmt.Errorf("libvirtd ended at once (%v), more in %s: %s", err, logPath, lines[len(lines)-1])
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// furnish fills the folders that libvirtd sees as /etc/libvirt, /run and /var.
func (l *Lab) furnish() error {
	for _, d := range []string{"run/lock", "run" + strings.TrimPrefix(consoleFolder, "/run"), "run" + strings.TrimPrefix(serialFolder, "/run"), "var/lib", "var/cache", "var/log", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(l.dir, d), 0o755); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"var/run": "/run", "var/lock": "/run/lock"} {
		if err := os.Symlink(target, filepath.Join(l.dir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	id := uuid.NewSHA1(uuid.NameSpaceOID, []byte("platter lab "+l.dir))
	for name, content := range map[string]string{"libvirtd.conf": fmt.Sprintf(libvirtdConf, id), "qemu.conf": qemuConf} {
		if err := os.WriteFile(filepath.Join(l.dir, "etc", name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	// Debian's libvirt refuses to start without this user and these groups,
	// though the lab uses none of them; only the package that brings a system
	// libvirtd makes them.
	for name, entries := range map[string][]string{
		"passwd": {"libvirt-qemu:x:65534:65534::/nonexistent:/usr/sbin/nologin"},
		"group":  {"libvirt-qemu:x:65534:", "kvm:x:65534:"},
	} {
		content, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(l.dir, "etc", name), withEntries(content, entries), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// withEntries adds those entries to a passwd(5) or group(5) file whose names
// it does not have.
func withEntries(content []byte, entries []string) []byte {
	for _, e := range entries {
		name, _, _ := strings.Cut(e, ":")
		if !slices.ContainsFunc(strings.Split(string(content), "\n"), func(l string) bool { return strings.HasPrefix(l, name+":") }) {
			content = fmt.Appendf(bytes.TrimRight(content, "\n"), "\n%s\n", e)
		}
	}
	return content
}

// virt is a connection to a lab's libvirtd.
type virt struct{ *libvirt.Libvirt }

// virt connects to the lab's libvirtd for as long as f runs. When ctx ends the
// connection is cut, and with it what f waits for.
func (l *Lab) virt(ctx context.Context, f func(*virt) error) error {
	conn, err := dialUnix(ctx, l.socket())
	if err != nil {
		return fmt.Errorf("lab %s is not up: %w", l.rec.Config.Name, err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	v := &virt{libvirt.NewWithDialer(dialed{conn})}
	if err := v.Connect(); err != nil {
		conn.Close()
		return errors.Join(ctx.Err(), fmt.Errorf("the libvirtd of lab %s does not answer: %w", l.rec.Config.Name, err))
	}
	defer v.Disconnect()
	if err := f(v); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	return nil
}

type dialed struct{ conn net.Conn }

func (d dialed) Dial() (net.Conn, error) { return d.conn, nil }

// dialUnix connects to a Unix socket whose path may be longer than the 107
// bytes that an address holds (unix(7)).
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

// Power is a machine's power, or what to do with it.
type Power string

const (
	On  Power = "on"
	Off Power = "off" // as if the plug was pulled
	// Cycle is Off and On.
	Cycle Power = "cycle"
	// Reset is the reset button: the machine starts anew without losing power.
	Reset Power = "reset"
)

// Power switches a machine and returns when it is done. To switch to what a
// machine is already does nothing.
func (l *Lab) Power(ctx context.Context, machine string, to Power) error {
	if _, err := l.machine(machine); err != nil {
		return err
	}
	err := l.virt(ctx, func(v *virt) error { return v.power(machine, to) })
	if err != nil {
		return fmt.Errorf("power %s of %s: %w", to, machine, err)
	}
	return nil
}

// find tells libvirt's handle of a machine, and whether it is on.
func (v *virt) find(machine string) (d libvirt.Domain, on bool, err error) {
	if d, err = v.DomainLookupByName(machine); err != nil {
		return d, false, err
	}
	state, _, err := v.DomainGetState(d, 0)
	return d, err == nil && isOn(state), err
}

func (v *virt) power(machine string, to Power) error {
	d, on, err := v.find(machine)
	if err != nil {
		return err
	}
	switch to {
	case On:
		if on {
			return nil
		}
		return v.DomainCreate(d)
	case Off:
		if !on {
			return nil
		}
		// It may have switched itself off meanwhile.
		if err := v.DomainDestroyFlags(d, libvirt.DomainDestroyDefault); err != nil && !hasCode(err, libvirt.ErrOperationInvalid) {
			return err
		}
		return nil
	case Cycle:
		if err := v.power(machine, Off); err != nil {
			return err
		}
		return v.power(machine, On)
	case Reset:
		if !on {
			return errors.New("the machine is off, there is nothing to reset")
		}
		return v.DomainReset(d, 0)
	}
	return fmt.Errorf("unknown action %q: use %s, %s, %s or %s", to, On, Off, Cycle, Reset)
}

// Insert puts an image, *.iso, into the machine's first CD drive in the place of
// what is there. It stays there when the machine is switched off. A drive that the
// machine has locked, as it does while a disc is mounted, is refused.
func (l *Lab) Insert(ctx context.Context, machine, file string) error {
	m, err := l.machine(machine)
	if err != nil {
		return err
	}
	fail := func(err error) error { return fmt.Errorf("%s cannot be put into %s: %w", file, machine, err) }
	abs, err := filepath.Abs(file)
	if err != nil {
		return fail(err)
	}
	if st, err := os.Stat(abs); err != nil || !st.Mode().IsRegular() || !isCD(abs) {
		return fail(errors.New("this is no file *.iso"))
	}
	drive := slices.IndexFunc(m.Media, isCD)
	if drive < 0 {
		return fail(errors.New("it has no CD drive: its media in the lab file name no *.iso"))
	}
	m.Media = slices.Clone(m.Media)
	m.Media[drive] = abs
	d := mediumXML(m.Media, drive)
	text, err := d.Marshal()
	if err != nil {
		return fail(err)
	}
	err = l.virt(ctx, func(v *virt) error {
		d, on, err := v.find(machine)
		if err != nil {
			return err
		}
		flags := libvirt.DomainDeviceModifyConfig
		if on {
			flags |= libvirt.DomainDeviceModifyLive
		}
		return v.DomainUpdateDeviceFlags(d, text, flags)
	})
	if err != nil {
		return fail(err)
	}
	i := slices.IndexFunc(l.rec.Config.Machines, func(o Machine) bool { return o.Name == machine })
	l.rec.Config.Machines[i] = m
	return l.save()
}

func isOn(state int32) bool {
	s := libvirt.DomainState(state)
	return s != libvirt.DomainShutoff && s != libvirt.DomainNostate
}

func hasCode(err error, code libvirt.ErrorNumber) bool {
	var e libvirt.Error
	return errors.As(err, &e) && e.Code == uint32(code)
}

// powers returns the power of every machine that libvirtd knows.
func (v *virt) powers() (map[string]Power, error) {
	ds, _, err := v.ConnectListAllDomains(1, 0)
	if err != nil {
		return nil, err
	}
	out := map[string]Power{}
	for _, d := range ds {
		state, _, err := v.DomainGetState(d, 0)
		if err != nil {
			return nil, err
		}
		if out[d.Name] = Off; isOn(state) {
			out[d.Name] = On
		}
	}
	return out, nil
}

// defineDomains tells libvirtd of every machine, and to forget those that the
// lab does not have.
func (l *Lab) defineDomains(ctx context.Context) error {
	c := l.rec.Config
	return l.virt(ctx, func(v *virt) error {
		known, err := v.powers()
		if err != nil {
			return err
		}
		for name := range known {
			if _, err := l.machine(name); err == nil {
				continue
			}
			if err := v.power(name, Off); err != nil {
				return err
			}
			d, err := v.DomainLookupByName(name)
			if err != nil {
				return err
			}
			if err := v.DomainUndefineFlags(d, libvirt.DomainUndefineNvram); err != nil {
				return err
			}
		}
		for _, m := range c.Machines {
			text, err := domainXML(c.Name, m, l.rec.Accel.Kind, c.Network.Bridge)
			if err != nil {
				return err
			}
			if _, err := v.DomainDefineXML(text); err != nil {
				return fmt.Errorf("libvirt does not take machine %s: %w", m.Name, err)
			}
		}
		return nil
	})
}
