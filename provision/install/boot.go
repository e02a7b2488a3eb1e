package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/disk"
)

// System is what Boot needs beside the machine itself.
type System struct {
	Console io.Writer
	Prepare func(root string, plan provision.Plan, sec provision.StackSecrets) error
}

const (
	efivarsDir = "/sys/firmware/efi/efivars"
	mountDir   = "/mnt/platter"
	selfPath   = "/proc/self/exe"
	// stopWait is how long a stopped install stays on the console. Then the
	// machine asks the disc host again what to boot: an operator who has put
	// things right need not come to the machine.
	stopWait = 5 * time.Minute
	// nicWait is how long the network card may take to show up.
	nicWait = 60 * time.Second
	// clockSkew is how wrong the clock may be before it is set.
	clockSkew = time.Minute
	// approvalEvery is how often a machine that waits asks, hardwareEvery how
	// often it looks at its hardware.
	approvalEvery = 10 * time.Second
)

// Boot is the life of the initramfs, from what the kernel was told to the
// restart into something else. It returns only with an error, when ctx ends, or for
// a rescue, which is a shell with the disks left alone.
func Boot(ctx context.Context, sys System) error {
	report := client.NewReporter(sys.Console)
	defer report.Close()
	err := boot(ctx, sys, report)
	if ctx.Err() != nil || err == nil {
		return ctx.Err()
	}
	fmt.Fprintf(sys.Console, "\nPLATTER HAS STOPPED\n%v\n\nThe machine starts again in %s.\n", err, stopWait)
	flush, cancel := context.WithTimeout(ctx, stopWait)
	report.Flush(flush)
	<-flush.Done()
	cancel()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, Host{}.Leave(false))
}

func boot(ctx context.Context, sys System, report *client.Reporter) error {
	start := time.Now()
	if err := mounts(); err != nil {
		return err
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("kernel command line: %w", err)
	}
	cmdline, err := ParseCmdline(string(line))
	if err != nil {
		return err
	}
	report.Logf("platter-node starts as %s, %s after the kernel", cmdline.Life, uptime())

	devices, modules, err := drivers(report)
	if err != nil {
		return err
	}
	defer devices.Close()
	switch cmdline.Life {
	case LifeRescue:
		return nil
	case LifeDiscHost:
		return startDiscHost(ctx, cmdline, devices, modules, report.Logf)
	}
	efi := mountEFI(modules, report)
	if err := network(ctx, cmdline, devices, report); err != nil {
		return err
	}
	report.Facts(Hardware("/"))
	report.Facts(map[string]string{"drivers_ms": fmt.Sprint(time.Since(start).Milliseconds())})

	// No device asks for this driver, the install will: begin early.
	go modules.Load("ext4")
	start = time.Now()
	node, plan, err := client.Enrol(ctx, cmdline.URL, cmdline.Pin, cmdline.Token, client.WithPatience(10*time.Minute))
	if err != nil {
		return err
	}
	setClock(node.Time(), report)
	// The clock is right now: the identity is used with it.
	if node, err = client.NewNode(node.Identity()); err != nil {
		return err
	}
	report.Attach(node)
	report.Facts(map[string]string{"enrol_ms": fmt.Sprint(time.Since(start).Milliseconds())})

	if cmdline.Life == LifeInventory {
		return inventory(ctx, node, devices, report)
	}
	if plan == nil {
		return fmt.Errorf("the disc host has no plan for this machine: look at 'platter node show %s'", node.Identity().Node)
	}
	keys, err := ReadKeys(KeysPath)
	if err != nil {
		return stopped(report, "keys", err)
	}
	env := Env{
		Root: "/", Mount: mountDir, Node: node, Report: report, HTTP: ObjectClient(), Keys: keys, Devices: devices,
		Machine: Host{}, LoadDriver: modules.Load, Prepare: sys.Prepare, Grow: disk.Grow, Executable: selfPath,
	}
	if efi {
		env.EFI = EFIVars(efivarsDir)
	}
	return Run(ctx, env, *plan)
}

// stopped reports an error of the early boot as Run does those of its phases.
func stopped(report *client.Reporter, phase string, err error) error {
	f := failure(phase, err)
	report.Fail(f)
	return f
}

// ObjectClient fetches objects over plain HTTP: hashes protect them. Nothing
// leaves the rack, so no proxy is ever asked.
func ObjectClient() *http.Client {
	d := &net.Dialer{Timeout: 10 * time.Second}
	return &http.Client{Transport: &http.Transport{
		DialContext: d.DialContext, DisableCompression: true, MaxIdleConnsPerHost: 4,
		ResponseHeaderTimeout: 30 * time.Second,
		// Frames are read into large buffers past this one.
		ReadBufferSize: 64 << 10,
	}}
}

// mounts brings up the file systems that everything else looks at, where the
// init before us has not.
func mounts() error {
	for _, m := range []struct{ dir, kind string }{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if entries, err := os.ReadDir(m.dir); err == nil && len(entries) > 3 {
			continue
		}
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return nil
}

func uptime() string {
	b, _ := os.ReadFile("/proc/uptime")
	s, _, _ := strings.Cut(string(b), " ")
	return s + " s"
}

// drivers loads what the machine's devices ask for, now and later.
func drivers(report *client.Reporter) (*Devices, *Modules, error) {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, nil, fmt.Errorf("version of the kernel: %w", err)
	}
	modules, err := OpenModules(filepath.Join("/lib/modules", strings.TrimSpace(string(release))))
	if err != nil {
		return nil, nil, err
	}
	devices, err := WatchDevices("/", modules, report.Logf)
	return devices, modules, err
}

// mountEFI makes the firmware's variables visible and tells whether there are
// any.
func mountEFI(modules *Modules, report *client.Reporter) bool {
	if _, err := os.Stat("/sys/firmware/efi"); err != nil {
		return false
	}
	if err := modules.Load("efivarfs"); err != nil {
		report.Logf("warning: %v", err)
	}
	if entries, err := os.ReadDir(efivarsDir); err == nil && len(entries) > 0 {
		return true
	}
	if err := unix.Mount("efivarfs", efivarsDir, "efivarfs", 0, ""); err != nil {
		report.Logf("warning: the firmware's boot entries cannot be seen: %v", err)
		return false
	}
	return true
}

// network brings up the card that the machine booted from.
func network(ctx context.Context, c Cmdline, devices *Devices, report *client.Reporter) error {
	limit, cancel := context.WithTimeout(ctx, nicWait)
	defer cancel()
	name := ""
	if err := devices.Wait(limit, func() bool { name = interfaceOf("/", c.MAC); return name != "" }); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var cards []string
		for k, v := range Hardware("/") {
			if name, ok := strings.CutPrefix(k, "nic."); ok {
				cards = append(cards, name+" "+v)
			}
		}
		return fmt.Errorf("no network card with address %s has appeared within %s, only %q: look for its driver in the initramfs", c.MAC, nicWait, cards)
	}
	report.Logf("network: %s (%s) with %s", name, c.MAC, c.Addr)
	return configure(ctx, name, c.Addr)
}

// setClock sets the clock to the disc host's where the two differ much:
// certificates and logs depend on it.
func setClock(now time.Time, report *client.Reporter) {
	off := time.Since(now).Round(time.Second)
	if off.Abs() <= clockSkew {
		return
	}
	tv := unix.NsecToTimeval(now.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		report.Logf("warning: the clock is off by %s and cannot be set: %v", off, err)
		return
	}
	report.Logf("the clock was off by %s and is set", off)
}

// Approver tells an unknown machine whether it has become a node.
type Approver interface {
	Approval(ctx context.Context) (client.Approval, error)
}

// inventory reports the hardware and waits for approval; then the machine
// starts again, to be installed.
func inventory(ctx context.Context, node Approver, devices *Devices, report Reporter) error {
	report.Stage(provision.StageUnknown)
	report.Logf("this machine is in no rack file: it waits for approval, its disks stay untouched")
	name, err := awaitApproval(ctx, node, approvalEvery, func() map[string]string { return Hardware("/") }, report)
	if err != nil {
		return err
	}
	report.Logf("approved as %s: starts again", name)
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	report.Flush(wait)
	return Host{}.Leave(false)
}

// awaitApproval asks every so often until the machine is a node. Hardware that
// changes meanwhile is reported.
func awaitApproval(ctx context.Context, node Approver, every time.Duration, hardware func() map[string]string, report Reporter) (string, error) {
	var known map[string]string
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if facts := hardware(); !maps.Equal(facts, known) {
			known = facts
			report.Facts(facts)
		}
		a, err := node.Approval(ctx)
		switch {
		case err == nil && a.Node != "":
			return a.Node, nil
		case ctx.Err() != nil:
			return "", ctx.Err()
		case err != nil && !client.Retryable(err):
			return "", err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}
