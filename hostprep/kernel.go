package hostprep

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"platter/provision"
)

// The settings of the rack file, by kind. Each kind has files, which a boot
// reads, and values, which the running kernel shows: both are looked at, and
// what the kernel refuses or does not have is named.

// kernelFiles are the files of all settings.
func (h *Host) kernelFiles() []File {
	return slices.Concat(h.moduleFiles(), h.sysctlFiles(), h.sysfsFiles(), h.diskFiles(), h.cpuFiles(), h.limitFiles())
}

// place is one value of the running kernel.
type place struct {
	what  string
	set   provision.Setting
	paths []string // that hold it, below the root
	// fixed: it can only change at a boot.
	fixed bool
}

func (p place) find(j *Journal) Finding {
	f := Finding{What: p.what, OK: true, Want: p.set.Value, Why: p.set.Why, Source: p.set.Source}
	var seen []string
	for _, path := range p.paths {
		is, err := j.value(path)
		if err != nil {
			is = err.Error()
		}
		f.OK = f.OK && err == nil && same(is, p.set.Value)
		if !slices.Contains(seen, is) {
			seen = append(seen, is)
		}
	}
	f.Is = strings.Join(seen, ", ")
	return f
}

// same compares values; a module's parameter of yes and no reads Y and N.
func same(is, want string) bool {
	yes := map[string]string{"Y": "1", "N": "0"}
	return is == want || yes[is] == want && want != ""
}

// values is the step that keeps files and the values of the running kernel.
// before, if given, makes the places exist.
func (h *Host) values(name, next string, files []File, places func() ([]place, []Finding, error), before func(context.Context) error) Step {
	look := &Journal{root: h.Root}
	step := h.filesStep(name, next, files, nil)
	lay, laid := step.Apply, step.Check
	step.Check = func(ctx context.Context) ([]Finding, error) {
		found, err := laid(ctx)
		if err != nil {
			return nil, err
		}
		onDisk := len(Result{Findings: found}.Deviations()) == 0
		all, more, err := places()
		for _, p := range all {
			f := p.find(look)
			f.Boot = !f.OK && p.fixed && onDisk
			found = append(found, f)
		}
		return append(found, more...), err
	}
	step.Apply = func(ctx context.Context, j *Journal) error {
		if err := lay(ctx, j); err != nil {
			return err
		}
		var errs []error
		if before != nil {
			errs = append(errs, before(ctx))
		}
		all, _, err := places()
		errs = append(errs, err)
		for _, p := range all {
			if p.fixed {
				continue
			}
			for _, path := range p.paths {
				if is, err := look.value(path); err != nil {
					errs = append(errs, err)
				} else if !same(is, p.set.Value) {
					errs = append(errs, j.SetValue(path, p.set.Value))
				}
			}
		}
		return errors.Join(errs...)
	}
	return step
}

// command runs a program that changes the running machine.
func (h *Host) command(ctx context.Context, name string, args ...string) (string, error) {
	switch {
	case h.run != nil:
		return h.run(ctx, name, args...)
	case h.Root == "/":
		return command(ctx, name, args...)
	}
	return "", fmt.Errorf("%s was not run: %s is not the running host", name, h.Root)
}

// settingsFile is a file with one line for each setting, under its reason.
func settingsFile(name string, settings []provision.Setting, line func(provision.Setting) string) []File {
	if len(settings) == 0 {
		return nil
	}
	var b strings.Builder
	b.WriteString("# Written by Platter from the kernel profile.\n")
	for _, s := range settings {
		fmt.Fprintf(&b, "\n# %s\n# (%s)\n%s\n", s.Why, s.Source, line(s))
	}
	return []File{{Path: name, Content: b.String(), Why: "the next boot reads it", Source: "the kernel profile"}}
}

func (h *Host) sysctlFiles() []File {
	return settingsFile("/etc/sysctl.d/90-platter.conf", h.Spec.Of(provision.Sysctl), func(s provision.Setting) string {
		return s.Key + " = " + s.Value
	})
}

func (h *Host) sysctl() Step {
	return h.values("sysctl", "Take the sysctl out of the rack file, or run a kernel that has it; a file in /etc/sysctl.d that sorts after 90-platter.conf may set it too",
		h.sysctlFiles(), func() (all []place, _ []Finding, _ error) {
			for _, s := range h.Spec.Of(provision.Sysctl) {
				all = append(all, place{what: "sysctl " + s.Key, set: s, paths: []string{"/proc/sys/" + strings.ReplaceAll(s.Key, ".", "/")}})
			}
			return all, nil, nil
		}, nil)
}

func (h *Host) sysfsFiles() []File {
	return settingsFile("/etc/tmpfiles.d/platter-sysfs.conf", h.Spec.Of(provision.Sysfs), func(s provision.Setting) string {
		return "w /sys/" + s.Key + " - - - - " + s.Value
	})
}

func (h *Host) sysfs() Step {
	return h.values("sysfs", "Take the setting out of the rack file, or run a kernel that has it", h.sysfsFiles(),
		func() (all []place, _ []Finding, _ error) {
			for _, s := range h.Spec.Of(provision.Sysfs) {
				all = append(all, place{what: "sysfs " + s.Key, set: s, paths: []string{"/sys/" + s.Key}})
			}
			return all, nil, nil
		}, nil)
}

const cpuDir = "/sys/devices/system/cpu"

func (h *Host) cpuFiles() []File {
	return settingsFile("/etc/tmpfiles.d/platter-cpu.conf", h.Spec.Of(provision.CPU), func(s provision.Setting) string {
		return "w " + cpuDir + "/cpu[0-9]*/cpufreq/" + s.Key + " - - - - " + s.Value
	})
}

// cpu: a virtual machine has nothing to set, the host below does.
func (h *Host) cpu() Step {
	return h.values("cpu", "Look at the firmware's power settings: it may keep the CPUs' clock to itself", h.cpuFiles(),
		func() (all []place, more []Finding, _ error) {
			for _, s := range h.Spec.Of(provision.CPU) {
				p := place{what: "cpu " + s.Key, set: s}
				dirs, err := filepath.Glob(filepath.Join(h.Root, cpuDir, "cpu[0-9]*", "cpufreq"))
				if err != nil {
					return nil, nil, err
				}
				for _, dir := range dirs {
					cpu := path.Base(path.Dir(dir))
					// One that was switched off answers nothing.
					if on, err := os.ReadFile(filepath.Join(path.Dir(dir), "online")); err == nil && strings.TrimSpace(string(on)) == "0" {
						continue
					}
					p.paths = append(p.paths, path.Join(cpuDir, cpu, "cpufreq", s.Key))
				}
				if len(p.paths) == 0 {
					more = append(more, Finding{What: p.what, OK: true, Is: "no cpufreq", Want: s.Value, Why: s.Why, Source: s.Source})
					continue
				}
				all = append(all, p)
			}
			return all, more, nil
		}, nil)
}

// diskKind is the kind of a whole disk by its name in /sys/block, by
// queue/rotational and by the vendor that it tells. Empty: settings are not
// for it. The rules of diskFiles decide in the same way.
func diskKind(name, rotational, vendor string) string {
	switch {
	case nvmeDisk.MatchString(name):
		return "nvme"
	case virtualDisk.MatchString(name):
		return "virtual"
	case !scsiDisk.MatchString(name):
		return "" // loop, ram, zram, dm, md, sr, nbd
	case virtualVendor.MatchString(strings.TrimSpace(vendor)):
		return "virtual"
	case rotational == "0":
		return "ssd"
	}
	return "rotational"
}

var (
	nvmeDisk      = regexp.MustCompile(`^nvme[0-9]+n[0-9]+$`)
	virtualDisk   = regexp.MustCompile(`^(vd|xvd)[a-z]+$`)
	scsiDisk      = regexp.MustCompile(`^sd[a-z]+$`)
	virtualVendor = regexp.MustCompile(`^(QEMU|VMware|VBOX|Msft)`)
)

const diskRules = `# Written by Platter from the kernel profile.
ACTION!="add|change", GOTO="platter_end"
SUBSYSTEM!="block", GOTO="platter_end"
ENV{DEVTYPE}!="disk", GOTO="platter_end"

KERNEL=="sd*", ENV{PLATTER_DISK}="rotational"
KERNEL=="sd*", ATTR{queue/rotational}=="0", ENV{PLATTER_DISK}="ssd"
KERNEL=="sd*", ATTRS{vendor}=="QEMU*|VMware*|VBOX*|Msft*", ENV{PLATTER_DISK}="virtual"
KERNEL=="vd*|xvd*", ENV{PLATTER_DISK}="virtual"
KERNEL=="nvme*n*", ENV{PLATTER_DISK}="nvme"
`

func (h *Host) diskFiles() []File {
	settings := h.Spec.Of(provision.Disk)
	if len(settings) == 0 {
		return nil
	}
	var b strings.Builder
	b.WriteString(diskRules)
	for _, s := range settings {
		kind, attr, _ := strings.Cut(s.Key, "/")
		fmt.Fprintf(&b, "\n# %s\n# (%s)\nENV{PLATTER_DISK}==\"%s\", ATTR{queue/%s}=\"%s\"\n", s.Why, s.Source, kind, attr, s.Value)
	}
	b.WriteString("\nLABEL=\"platter_end\"\n")
	// After 60-persistent-storage.rules; udev reads new rules by itself.
	return []File{{Path: "/etc/udev/rules.d/61-platter-disks.rules", Content: b.String(), Why: "disks are set when they appear", Source: "the kernel profile"}}
}

func (h *Host) disks() Step {
	return h.values("disks", "Set another scheduler for this kind of disk in the rack file", h.diskFiles(),
		func() (all []place, _ []Finding, _ error) {
			blocks, err := os.ReadDir(filepath.Join(h.Root, "/sys/block"))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, nil, err
			}
			for _, b := range blocks {
				dir := path.Join("/sys/block", b.Name())
				read := func(name string) string {
					text, _ := os.ReadFile(filepath.Join(h.Root, dir, name))
					return strings.TrimSpace(string(text))
				}
				kind := diskKind(b.Name(), read("queue/rotational"), read("device/vendor"))
				for _, s := range h.Spec.Of(provision.Disk) {
					if k, attr, _ := strings.Cut(s.Key, "/"); k == kind {
						all = append(all, place{what: "disk " + b.Name() + " (" + kind + ") " + attr, set: s, paths: []string{path.Join(dir, "queue", attr)}})
					}
				}
			}
			return all, nil, nil
		}, nil)
}

func (h *Host) moduleFiles() []File {
	var load, options []provision.Setting
	for _, s := range h.Spec.Of(provision.Module) {
		if strings.Contains(s.Key, ".") {
			options = append(options, s)
		} else {
			load = append(load, s)
		}
	}
	return append(
		settingsFile("/etc/modules-load.d/platter.conf", load, func(s provision.Setting) string { return s.Key }),
		settingsFile("/etc/modprobe.d/platter-host.conf", options, func(s provision.Setting) string {
			module, param, _ := strings.Cut(s.Key, ".")
			return "options " + module + " " + param + "=" + s.Value
		})...)
}

func (h *Host) modules() Step {
	loaded := func(module string) bool {
		_, err := os.Stat(filepath.Join(h.Root, "/sys/module", module))
		return err == nil
	}
	return h.values("modules", "Look at 'dmesg' on the node, and at whether its kernel has the module", h.moduleFiles(),
		func() (all []place, more []Finding, _ error) {
			for _, s := range h.Spec.Of(provision.Module) {
				module, param, isParam := strings.Cut(s.Key, ".")
				there := loaded(module)
				if !isParam || !there {
					f := Finding{What: "module " + s.Key, OK: there, Is: "loaded", Want: "loaded", Why: s.Why, Source: s.Source}
					if !there {
						f.Is = "not loaded"
					}
					if isParam {
						// The file gives it the value when it is.
						f.OK, f.Is, f.Want = true, "module not loaded", s.Value
					}
					more = append(more, f)
					continue
				}
				p := place{what: "module " + s.Key, set: s, paths: []string{path.Join("/sys/module", module, "parameters", param)}}
				info, err := os.Stat(filepath.Join(h.Root, p.paths[0]))
				p.fixed = err == nil && info.Mode()&0o200 == 0
				all = append(all, p)
			}
			return all, more, nil
		},
		func(ctx context.Context) error {
			var errs []error
			for _, s := range h.Spec.Of(provision.Module) {
				if !strings.Contains(s.Key, ".") && !loaded(s.Key) {
					if _, err := h.command(ctx, "modprobe", "--", s.Key); err != nil {
						errs = append(errs, err)
					}
				}
			}
			return errors.Join(errs...)
		})
}

// limitNames are systemd's words for those of limits.conf(5).
var limitNames = map[string]string{"nofile": "NOFILE", "nproc": "NPROC", "memlock": "MEMLOCK"}

func limit(value string) (soft, hard string) {
	soft, hard, two := strings.Cut(value, ":")
	if !two {
		hard = soft
	}
	return soft, hard
}

func (h *Host) limitFiles() []File {
	settings := h.Spec.Of(provision.Limit)
	files := settingsFile("/etc/security/limits.d/90-platter.conf", settings, func(s provision.Setting) string {
		soft, hard := limit(s.Value)
		if s.Key == "memlock" { // KiB here, bytes in systemd
			soft, hard = kib(soft), kib(hard)
		}
		var lines []string
		for _, who := range []string{"*", "root"} { // the star does not mean root
			lines = append(lines, fmt.Sprintf("%s soft %s %s\n%s hard %s %s", who, s.Key, soft, who, s.Key, hard))
		}
		return strings.Join(lines, "\n")
	})
	manager := settingsFile("/etc/systemd/system.conf.d/90-platter.conf", settings, func(s provision.Setting) string {
		return "DefaultLimit" + limitNames[s.Key] + "=" + s.Value
	})
	for i := range manager {
		manager[i].Content = "[Manager]\n" + manager[i].Content
	}
	return append(files, manager...)
}

func kib(bytes string) string {
	var n int64
	fmt.Sscan(bytes, &n)
	return fmt.Sprint(n / 1024)
}

// limits: what the service manager gives to services that do not ask for
// their own.
func (h *Host) limits() Step {
	files := h.filesStep("limits", "Look at 'systemctl show -p DefaultLimitNOFILE' on the node", h.limitFiles(), h.reload)
	laid := files.Check
	files.Check = func(ctx context.Context) ([]Finding, error) {
		found, err := laid(ctx)
		if err != nil || h.Systemd == nil {
			return found, err
		}
		onDisk := len(Result{Findings: found}.Deviations()) == 0
		for _, s := range h.Spec.Of(provision.Limit) {
			soft, hard := limit(s.Value)
			f := Finding{What: "limit " + s.Key, Want: soft + ":" + hard, Why: s.Why, Source: s.Source}
			if f.Is, err = h.Systemd.defaultLimit(limitNames[s.Key]); err != nil {
				return found, err
			}
			f.OK = f.Is == f.Want
			f.Boot = !f.OK && onDisk
			found = append(found, f)
		}
		return found, nil
	}
	return files
}

// keys are the arguments of a kernel command line; of two with the same key
// the kernel follows the last.
func keys(args []string) map[string]string {
	out := map[string]string{}
	for _, a := range args {
		key, _, _ := strings.Cut(a, "=")
		out[key] = a
	}
	return out
}

func (h *Host) cmdline() Step {
	settings := h.Spec.Of(provision.Cmdline)
	return Step{
		Name: "cmdline",
		Next: "Look at the boot loader's configuration on the node: its kernel arguments are not those of the rack file",
		Check: func(context.Context) ([]Finding, error) {
			if len(settings) == 0 {
				return nil, nil
			}
			text, err := os.ReadFile(filepath.Join(h.Root, "/proc/cmdline"))
			if err != nil {
				return nil, fmt.Errorf("kernel arguments: %w", err)
			}
			running := keys(strings.Fields(string(text)))
			boot, err := h.loader()
			if err != nil {
				return nil, err
			}
			entries, err := boot.entries()
			if err != nil {
				return nil, err
			}
			var found []Finding
			for _, s := range settings {
				f := Finding{What: "kernel argument " + s.Key, Is: running[s.Key], Want: s.Arg(), Why: s.Why, Source: s.Source}
				stored := !slices.ContainsFunc(entries, func(args []string) bool { return keys(args)[s.Key] != f.Want })
				f.OK = stored && f.Is == f.Want
				switch {
				case f.Is == "":
					f.Is = "missing"
				case f.Is == f.Want && !stored:
					f.Is = "not in " + boot.name
				}
				f.Boot = stored && !f.OK
				found = append(found, f)
			}
			return found, nil
		},
		Apply: func(ctx context.Context, j *Journal) error {
			boot, err := h.loader()
			if err != nil {
				return err
			}
			return boot.write(ctx, j, settings)
		},
	}
}

// loader is where a host's kernel arguments are kept for the next boot.
type loader struct {
	name    string                     // the file that people look at
	entries func() ([][]string, error) // the arguments of every kernel that can be booted
	write   func(context.Context, *Journal, []provision.Setting) error
}

const (
	platterCfg = "/boot/grub/platter.cfg" // written by provision/install
	grubCfg    = "/boot/grub/grub.cfg"
	grubDropin = "/etc/default/grub.d/platter.cfg"
)

func (h *Host) loader() (loader, error) {
	there := func(name string) bool {
		_, err := os.Stat(filepath.Join(h.Root, name))
		return err == nil
	}
	blsEntries, _ := filepath.Glob(filepath.Join(h.Root, "/boot/loader/entries/*.conf"))
	switch {
	case there(platterCfg):
		return h.platterLoader(), nil
	case len(blsEntries) > 0:
		return h.grubby(blsEntries), nil
	case there("/etc/default/grub"):
		return h.updateGrub(), nil
	}
	return loader{}, fmt.Errorf("kernel arguments: no boot loader that Platter knows: none of %s, /boot/loader/entries/*.conf and /etc/default/grub is there", platterCfg)
}

// platterArgs is the line of platter.cfg, whose quoted text is a string of
// GRUB's script language.
var platterArgs = regexp.MustCompile(`(?m)^set platter_args="((?:[^"\\]|\\.)*)"$`)

func (h *Host) platterLoader() loader {
	read := func() (text string, args []string, err error) {
		b, err := os.ReadFile(filepath.Join(h.Root, platterCfg))
		if err != nil {
			return "", nil, fmt.Errorf("kernel arguments: %w", err)
		}
		m := platterArgs.FindSubmatch(b)
		if m == nil {
			return "", nil, fmt.Errorf("kernel arguments: %s has no line 'set platter_args=\"...\"': reinstall the node", platterCfg)
		}
		return string(b), strings.Fields(string(m[1])), nil
	}
	return loader{
		name:    platterCfg,
		entries: func() ([][]string, error) { _, args, err := read(); return [][]string{args}, err },
		write: func(_ context.Context, j *Journal, settings []provision.Setting) error {
			text, args, err := read()
			if err != nil {
				return err
			}
			for _, s := range settings {
				args = slices.DeleteFunc(args, func(a string) bool { key, _, _ := strings.Cut(a, "="); return key == s.Key })
			}
			for _, s := range settings {
				args = append(args, s.Arg()) // the catalogue has nothing that GRUB would interpret
			}
			line := "set platter_args=\"" + strings.Join(args, " ") + "\""
			return j.WriteFile(platterCfg, platterArgs.ReplaceAllLiteralString(text, line), 0o644)
		},
	}
}

// linuxLine is a Linux entry of grub.cfg.
var linuxLine = regexp.MustCompile(`(?m)^\s*linux(?:efi)?\s+\S+\s+(.*\broot=.*)$`)

// updateGrub is Debian's GRUB.
func (h *Host) updateGrub() loader {
	return loader{
		name: grubCfg,
		entries: func() ([][]string, error) {
			b, err := os.ReadFile(filepath.Join(h.Root, grubCfg))
			if err != nil {
				return nil, fmt.Errorf("kernel arguments: %w", err)
			}
			var out [][]string
			for _, m := range linuxLine.FindAllSubmatch(b, -1) {
				out = append(out, strings.Fields(string(m[1])))
			}
			if len(out) == 0 {
				return nil, fmt.Errorf("kernel arguments: %s starts no Linux: run update-grub and look at what it says", grubCfg)
			}
			return out, nil
		},
		write: func(ctx context.Context, j *Journal, settings []provision.Setting) error {
			f := settingsFile(grubDropin, settings, func(s provision.Setting) string {
				return `GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX ` + s.Arg() + `"`
			})[0]
			if err := errors.Join(j.lay(f), j.keep(grubCfg)); err != nil {
				return err
			}
			_, err := h.command(ctx, "update-grub")
			return err
		},
	}
}

var optionsLine = regexp.MustCompile(`(?m)^options\s+(.*)$`)

// grubby is the RHEL family, with one file for each entry (Boot Loader
// Specification).
func (h *Host) grubby(files []string) loader {
	return loader{
		name: "/boot/loader/entries",
		entries: func() ([][]string, error) {
			var out [][]string
			for _, name := range files {
				b, err := os.ReadFile(name)
				if err != nil {
					return nil, fmt.Errorf("kernel arguments: %w", err)
				}
				var args []string
				if m := optionsLine.FindSubmatch(b); m != nil {
					// Version 8 keeps what all entries share in GRUB's environment.
					args = strings.Fields(strings.ReplaceAll(string(m[1]), "$kernelopts", h.kernelopts()))
				}
				out = append(out, args)
			}
			return out, nil
		},
		write: func(ctx context.Context, j *Journal, settings []provision.Setting) error {
			// What grubby changes.
			touched := slices.Concat(files, h.grubenv())
			for _, name := range []string{"/etc/default/grub", "/etc/kernel/cmdline"} {
				touched = append(touched, filepath.Join(h.Root, name))
			}
			for _, name := range touched {
				if info, err := os.Lstat(name); err != nil || !info.Mode().IsRegular() {
					continue
				}
				if err := j.keep(path.Join("/", strings.TrimPrefix(name, filepath.Clean(h.Root)))); err != nil {
					return err
				}
			}
			var args []string
			for _, s := range settings {
				args = append(args, s.Arg())
			}
			_, err := h.command(ctx, "grubby", "--update-kernel=ALL", "--args="+strings.Join(args, " "))
			return err
		},
	}
}

func (h *Host) grubenv() []string {
	bios, _ := filepath.Glob(filepath.Join(h.Root, "/boot/grub2/grubenv"))
	efi, _ := filepath.Glob(filepath.Join(h.Root, "/boot/efi/EFI/*/grubenv"))
	return append(bios, efi...)
}

var kerneloptsLine = regexp.MustCompile(`(?m)^kernelopts=(.*)$`)

func (h *Host) kernelopts() string {
	for _, name := range h.grubenv() {
		if b, err := os.ReadFile(name); err == nil {
			if m := kerneloptsLine.FindSubmatch(b); m != nil {
				return string(m[1])
			}
		}
	}
	return ""
}
