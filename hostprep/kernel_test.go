package hostprep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"platter/hostprep/profile"
	"platter/hostprep/versions"
	"platter/provision"
)

func put(t *testing.T, root, name, content string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, root, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// lists are files of /sys that list every choice, the chosen one in brackets.
var lists = map[string][]string{
	"sys/kernel/mm/transparent_hugepage/enabled": {"always", "madvise", "never"},
	"sys/kernel/mm/transparent_hugepage/defrag":  {"always", "defer", "defer+madvise", "madvise", "never"},
	"sys/block/sda/queue/scheduler":              {"none", "mq-deadline", "bfq"},
	"sys/block/sdb/queue/scheduler":              {"none", "mq-deadline"},
	"sys/block/vda/queue/scheduler":              {"none", "mq-deadline"},
	"sys/block/nvme0n1/queue/scheduler":          {"none", "mq-deadline"},
}

// render shows such files as the kernel does.
func render(t *testing.T, root string) {
	for name, words := range lists {
		is := get(t, root, name)
		if strings.Contains(is, "[") {
			continue
		}
		put(t, root, name, strings.Join(words, " ")+"\n")
		text := get(t, root, name)
		put(t, root, name, regexp.MustCompile(`(^| )`+regexp.QuoteMeta(is)+`( |\n)`).ReplaceAllString(text, "${1}["+is+"]$2"))
	}
}

// fakeHost is a tree that looks like a host on which nothing was ever set, and
// that can have everything.
func fakeHost(t *testing.T, spec provision.HostSpec) *Host {
	root := t.TempDir()
	for _, dir := range []string{"etc", "var/lib", "sys/block/loop0/queue", "sys/block/sr0/queue", "sys/block/dm-0/queue", "sys/devices/system/cpu/cpufreq"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range spec.Settings {
		switch s.Kind {
		case provision.Sysctl:
			put(t, root, "proc/sys/"+strings.ReplaceAll(s.Key, ".", "/"), strings.Repeat("7\t", len(strings.Fields(s.Value)))+"\n")
		case provision.Sysfs:
			put(t, root, "sys/"+s.Key, "7\n")
		}
	}
	for name, words := range lists {
		put(t, root, name, words[len(words)-1])
		put(t, root, filepath.Dir(name)+"/read_ahead_kb", "128\n")
	}
	put(t, root, "sys/block/sda/queue/rotational", "1\n")
	put(t, root, "sys/block/sda/device/vendor", "ATA     \n")
	put(t, root, "sys/block/sdb/queue/rotational", "0\n")
	put(t, root, "sys/module/nf_conntrack/parameters/hashsize", "65536\n")
	put(t, root, "sys/module/kvm_intel/parameters/nested", "N\n")
	if err := os.Chmod(filepath.Join(root, "sys/module/kvm_intel/parameters/nested"), 0o444); err != nil {
		t.Fatal(err)
	}
	for cpu := range 3 {
		put(t, root, fmt.Sprintf("sys/devices/system/cpu/cpu%d/cpufreq/scaling_governor", cpu), "schedutil\n")
	}
	put(t, root, "sys/devices/system/cpu/cpu2/online", "0\n")
	put(t, root, "proc/cmdline", "BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet mitigations=off\n")
	render(t, root)
	return &Host{Root: root, Spec: spec, run: func(_ context.Context, name string, args ...string) (string, error) {
		return "", fmt.Errorf("%s %q was run", name, args)
	}}
}

// settingSteps are the steps of the kernel profile.
func (h *Host) settingSteps() []Step {
	return []Step{h.cmdline(), h.modules(), h.sysctl(), h.sysfs(), h.disks(), h.cpu(), h.limits(), h.share()}
}

// boots are the three ways in which a host keeps its kernel arguments, and
// what the tools of that host make of them.
var boots = map[string]struct {
	files map[string]string
	tool  func(t *testing.T, root string, name string, args []string) error
}{
	"Platter": {files: map[string]string{
		"boot/grub/platter.cfg": "# Written by the installer.\nset platter_args=\"root=PARTUUID=1 odd=\\\"\\$x\\\" mitigations=off quiet\"\n",
	}},
	"Debian": {
		files: map[string]string{
			"etc/default/grub":   "GRUB_CMDLINE_LINUX_DEFAULT=quiet\nGRUB_CMDLINE_LINUX=\n",
			"boot/grub/grub.cfg": "menuentry 'Debian' {\n\tlinux\t/vmlinuz root=UUID=1 ro quiet\n}\nmenuentry 'recovery' {\n\tlinux\t/vmlinuz root=UUID=1 ro single\n}\nlinux16 /memtest\n",
		},
		tool: func(t *testing.T, root, name string, args []string) error {
			if name != "update-grub" {
				return errors.New("no such program")
			}
			// As grub-mkconfig does it.
			more := ""
			for _, m := range regexp.MustCompile(`(?m)^GRUB_CMDLINE_LINUX="\$GRUB_CMDLINE_LINUX (.*)"$`).FindAllStringSubmatch(get(t, root, "etc/default/grub.d/platter.cfg"), -1) {
				more += " " + m[1]
			}
			put(t, root, "boot/grub/grub.cfg", strings.ReplaceAll(get(t, root, "boot/grub/grub.cfg"), "root=UUID=1 ro", "root=UUID=1 ro"+more))
			return nil
		},
	},
	"RHEL": {
		files: map[string]string{
			"etc/default/grub":             "GRUB_CMDLINE_LINUX=quiet\n",
			"boot/grub2/grubenv":           "# GRUB Environment Block\nkernelopts=root=UUID=1 ro mitigations=off\n",
			"boot/loader/entries/a-5.conf": "title A 5\nlinux /vmlinuz-5\noptions $kernelopts\n",
			"boot/loader/entries/a-6.conf": "title A 6\nlinux /vmlinuz-6\noptions root=UUID=1 ro mitigations=off\n",
		},
		tool: func(t *testing.T, root, name string, args []string) error {
			more, ok := strings.CutPrefix(args[len(args)-1], "--args=")
			if name != "grubby" || !ok || args[0] != "--update-kernel=ALL" {
				return errors.New("no such program")
			}
			for _, f := range []string{"boot/grub2/grubenv", "boot/loader/entries/a-6.conf"} {
				put(t, root, f, strings.ReplaceAll(get(t, root, f), "root=UUID=1 ro mitigations=off", "root=UUID=1 ro "+more))
			}
			return nil
		},
	},
}

// TestSettings: a host on which nothing is set deviates in everything; apply
// sets it, a boot brings the rest into effect, then all is clean and applying
// again changes nothing; undoing brings every byte back.
func TestSettings(t *testing.T) {
	ctx := t.Context()
	for name, boot := range boots {
		t.Run(name, func(t *testing.T) {
			settings, errs := profile.Resolve(profile.Wish{Hugepages: profile.Hugepages{Size: "2M", Count: 64}, Overrides: []provision.Setting{
				{Kind: provision.Limit, Key: "memlock", Value: "1073741824"},
				{Kind: provision.Sysctl, Key: "net.ipv4.tcp_rmem", Value: "4096 131072 16777216"},
			}})
			if errs != nil {
				t.Fatal(errs)
			}
			h := fakeHost(t, provision.HostSpec{Settings: settings})
			for f, text := range boot.files {
				put(t, h.Root, f, text)
			}
			if boot.tool != nil {
				h.run = func(_ context.Context, name string, args ...string) (string, error) {
					return "", boot.tool(t, h.Root, name, args)
				}
			}
			untouched := snapshot(t, h.Root)
			results, err := Check(ctx, h.settingSteps(), &heard{})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range results {
				if r.Outcome != Drift || r.Reason != nil {
					t.Errorf("%s of an untouched host: %s, %v", r.Step, r.Outcome, r.Reason)
				}
				for _, f := range r.Findings {
					if f.Why == "" || f.Source == "" {
						t.Errorf("%s has no reason", f.What)
					}
				}
			}
			if snapshot(t, h.Root) != untouched {
				t.Error("a check changed something")
			}

			j, err := OpenJournal(h.Root)
			if err != nil {
				t.Fatal(err)
			}
			results, err = Apply(ctx, h.settingSteps(), j, &heard{})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range results {
				want := Changed
				if r.Step == "cmdline" || r.Step == "modules" {
					want = Reboot
				}
				if r.Outcome != want {
					t.Errorf("%s applied: %s, %v", r.Step, r.Outcome, r.Deviations())
				}
			}

			// The boot: a kernel that is given what the boot loader holds.
			b, err := h.loader()
			if err != nil {
				t.Fatal(err)
			}
			entries, err := b.entries()
			if err != nil || len(entries) == 0 {
				t.Fatal(entries, err)
			}
			cmdline := get(t, h.Root, "proc/cmdline")
			put(t, h.Root, "proc/cmdline", strings.Join(entries[0], " ")+"\n")
			put(t, h.Root, "sys/module/kvm_intel/parameters/nested", "Y\n")
			render(t, h.Root)
			for what, run := range map[string]func() ([]Result, error){
				"check": func() ([]Result, error) { return Check(ctx, h.settingSteps(), &heard{}) },
				"apply": func() ([]Result, error) { return Apply(ctx, h.settingSteps(), j, &heard{}) },
			} {
				clean := snapshot(t, h.Root)
				results, err := run()
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range results {
					if r.Outcome != OK {
						t.Errorf("%s after the boot: %s %s %v", what, r.Step, r.Outcome, r.Deviations())
					}
				}
				if snapshot(t, h.Root) != clean {
					t.Errorf("%s changed what was right", what)
				}
			}
			for file, want := range map[string]string{
				"etc/sysctl.d/90-platter.conf":                         "\nnet.ipv4.tcp_rmem = 4096 131072 16777216\n",
				"etc/security/limits.d/90-platter.conf":                "\nroot hard memlock 1048576\n",
				"etc/systemd/system.conf.d/90-platter.conf":            "\nDefaultLimitMEMLOCK=1073741824\n",
				"etc/modprobe.d/platter-host.conf":                     "\noptions nf_conntrack hashsize=262144\n",
				"etc/modules-load.d/platter.conf":                      "\nnf_conntrack\n",
				"etc/tmpfiles.d/platter-sysfs.conf":                    "\nw /sys/kernel/mm/ksm/run - - - - 0\n",
				"sys/block/sda/queue/scheduler":                        "none mq-deadline [bfq]\n",
				"sys/block/sda/queue/read_ahead_kb":                    "4096",
				"sys/block/sdb/queue/scheduler":                        "none [mq-deadline]\n",
				"sys/block/nvme0n1/queue/scheduler":                    "[none] mq-deadline\n",
				"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance",
				"sys/devices/system/cpu/cpu2/cpufreq/scaling_governor": "schedutil\n", // switched off
			} {
				if got := get(t, h.Root, file); !strings.Contains(got, want) {
					t.Errorf("%s is %q, want %q in it", file, got, want)
				}
			}

			if err := j.Undo(func(string) {}); err != nil {
				t.Fatal(err)
			}
			put(t, h.Root, "proc/cmdline", cmdline)
			put(t, h.Root, "sys/module/kvm_intel/parameters/nested", "N\n")
			render(t, h.Root)
			if got := snapshot(t, h.Root); got != untouched {
				t.Errorf("after undoing:\n%s\nbefore:\n%s", got, untouched)
			}
		})
	}
}

// What the installer lays down is all that the files of a later check want.
func TestPreparedImage(t *testing.T) {
	settings, _ := profile.Resolve(profile.Wish{})
	h := &Host{Root: t.TempDir(), Spec: provision.HostSpec{Settings: settings}}
	j, err := OpenJournal(h.Root)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Prepare(j); err != nil {
		t.Fatal(err)
	}
	for _, s := range h.settingSteps()[1:] { // the installer itself writes the kernel arguments
		found, err := s.Check(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if strings.HasPrefix(f.What, "/") && !f.OK {
				t.Errorf("%s: %s is %s", s.Name, f.What, f.Is)
			}
		}
	}
}

// A module that is missing is loaded before its sysctls are set; what the
// kernel does not have, or what could not be done, is named.
func TestWhatTheKernelLacks(t *testing.T) {
	set := func(kind provision.SettingKind, key, value string) provision.Setting {
		return provision.Setting{Kind: kind, Key: key, Value: value}
	}
	h := fakeHost(t, provision.HostSpec{Settings: []provision.Setting{
		set(provision.Module, "nf_conntrack", "load"), set(provision.Module, "kvm_amd.nested", "1"), set(provision.Module, "kvm_intel.no_such", "1"),
		set(provision.Sysctl, "vm.swappiness", "10"), set(provision.Cmdline, "panic", "10"),
	}})
	if err := errors.Join(os.RemoveAll(filepath.Join(h.Root, "sys/module/nf_conntrack")), os.Remove(filepath.Join(h.Root, "proc/sys/vm/swappiness"))); err != nil {
		t.Fatal(err)
	}
	j, err := OpenJournal(h.Root)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Apply(t.Context(), h.settingSteps(), j, &heard{})
	for _, want := range []string{
		`modprobe ["--" "nf_conntrack"] was run`, "has no /sys/module/kvm_intel/parameters/no_such",
		"sysctl: the running kernel has no /proc/sys/vm/swappiness", "no boot loader that Platter knows",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nlacks %q", err, want)
		}
	}
	if err != nil && strings.Contains(err.Error(), "kvm_amd") {
		t.Error("a module that the machine has no use for is a failure:", err)
	}
	h.run = func(_ context.Context, name string, args ...string) (string, error) {
		put(t, h.Root, "sys/module/"+args[1]+"/refcnt", "0")
		return "", nil
	}
	h.Spec.Settings = h.Spec.Settings[:2]
	if r, err := Apply(t.Context(), []Step{h.modules()}, j, &heard{}); err != nil || r[0].Outcome != Changed {
		t.Errorf("a module that could be loaded: %+v, %v", r, err)
	}
	// A virtual machine.
	if err := os.RemoveAll(filepath.Join(h.Root, "sys/devices")); err != nil {
		t.Fatal(err)
	}
	h.Spec.Settings = []provision.Setting{set(provision.CPU, "scaling_governor", "performance")}
	r, err := Apply(t.Context(), []Step{h.cpu()}, j, &heard{})
	if err != nil || r[0].Outcome != Changed || r[0].Findings[1].Is != "no cpufreq" {
		t.Errorf("no cpufreq: %+v, %v", r, err)
	}
	// Nothing asked, nothing to look at.
	h.Spec.Settings = nil
	r, err = Check(t.Context(), h.settingSteps()[:7], &heard{})
	if err != nil || slices.ContainsFunc(r, func(r Result) bool { return r.Outcome != OK }) {
		t.Errorf("a host without settings: %+v, %v", r, err)
	}
}

func TestDiskKind(t *testing.T) {
	for _, c := range []struct{ name, rotational, vendor, want string }{
		{"nvme0n1", "0", "", "nvme"}, {"nvme0c0n1", "0", "", ""}, {"vda", "1", "0x1af4", "virtual"}, {"xvdb", "0", "", "virtual"},
		{"sda", "1", "ATA     ", "rotational"}, {"sdaa", "0", "DELL", "ssd"}, {"sda", "1", "QEMU    ", "virtual"}, {"sda", "", "", "rotational"},
		{"loop0", "0", "", ""}, {"zram0", "0", "", ""}, {"dm-0", "1", "", ""}, {"md0", "1", "", ""}, {"sr0", "1", "QEMU", ""}, {"ram0", "0", "", ""},
	} {
		if got := diskKind(c.name, c.rotational, c.vendor); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestVersionsOfAHost(t *testing.T) {
	h := &Host{Root: t.TempDir()}
	const stanza = "Package: %s\nStatus: install ok installed\nArchitecture: amd64\nVersion: %s\nDescription: x\n Version: 9\n\n"
	put(t, h.Root, "var/lib/dpkg/status", fmt.Sprintf(stanza, "openvswitch-switch", "3.5.0-1+b1")+fmt.Sprintf(stanza, "libvirt-daemon", "11.3.0-3+deb13u3")+
		fmt.Sprintf(stanza, "linux-image-6.12.117+deb13-amd64", "6.12.117-1")+"Package: qemu-system-x86\nStatus: deinstall ok config-files\nVersion: 1:9\n\n")
	const running = "Linux version 6.12.%s (debian-kernel@lists.debian.org) (x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0, " +
		"GNU ld (GNU Binutils for Debian) 2.44) #1 SMP PREEMPT_DYNAMIC Debian 6.12.%s-1 (2026-01-01)\n"
	put(t, h.Root, "proc/version", fmt.Sprintf(running, "117+deb13-amd64", "117"))
	check := func() Result {
		r, err := Check(t.Context(), []Step{h.versions()}, &heard{})
		if err != nil {
			t.Fatal(err)
		}
		return r[0]
	}
	// Without the file only what is known to be bad counts; a warning is told.
	r := check()
	if r.Outcome != OK || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Is, "ovs 3.5.0-1+b1 (known, accepted)") {
		t.Errorf("good versions: %+v", r)
	}
	lock := versions.Locked{Versions: versions.Set{"kernel": "6.12.117-1", "qemu": "1:10.0.13-1", "ovs": "3.5.0-1+b1"}}
	put(t, h.Root, versions.File, lock.String())
	r = check()
	if bad := r.Deviations(); r.Outcome != Drift || len(bad) != 1 || bad[0].What != "version of qemu" || bad[0].Is != "not installed" {
		t.Errorf("another QEMU than the locked one: %+v", r)
	}
	delete(lock.Versions, "qemu")
	put(t, h.Root, versions.File, lock.String())
	// The right kernel is on the disk, another one runs, and that is a bad one.
	put(t, h.Root, "proc/version", fmt.Sprintf(running, "64+deb13-amd64", "64"))
	r = check()
	if bad := r.Deviations(); len(bad) != 3 || !bad[0].Boot || bad[0].Is != "6.12.64-1" || bad[1].What != "combination ovs-port-use-after-free" {
		t.Errorf("a bad kernel: %+v", bad)
	}
	lock.Allowed, lock.Versions["kernel"] = []string{"ovs-port-use-after-free", "ovs-flow-dump-lockup"}, "6.12.64-1"
	put(t, h.Root, versions.File, lock.String())
	if r = check(); r.Outcome != OK {
		t.Errorf("what the image's builder allowed: %+v", r.Deviations())
	}
	put(t, h.Root, versions.File, "kernel\n")
	if r = check(); r.Outcome != Failed || !strings.Contains(r.Reason.Error(), "line 1") {
		t.Errorf("a damaged file: %+v", r)
	}
	// The RHEL family.
	if err := errors.Join(os.RemoveAll(filepath.Join(h.Root, "var")), os.Remove(filepath.Join(h.Root, versions.File))); err != nil {
		t.Fatal(err)
	}
	put(t, h.Root, "proc/version", "Linux version 5.14.0-503.11.1.el9_5.x86_64 (mockbuild@x) #1 SMP\n")
	h.run = func(context.Context, string, ...string) (string, error) {
		return "kernel-core 5.14.0-503.11.1.el9_5\nopenvswitch3.5 3.5.0-1.el9\nlibvirt-daemon 10.5.0-7.el9\n", nil
	}
	if r = check(); r.Outcome != OK || len(r.Findings) != 1 {
		t.Errorf("RHEL family: %+v", r)
	}
}
