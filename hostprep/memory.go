package hostprep

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"

	"platter/provision"
)

// Reserve is the memory of a host of that size that no domain is promised: for
// the kernel, the switch, libvirt and the IM service. One sixteenth, at least
// 512 MiB and at most 16 GiB.
func Reserve(total uint64) uint64 {
	return min(max(total/16, 512<<20), 16<<30, total)
}

// Admit tells why a domain that wants so many bytes may not start on a host
// that has total and has promised its running domains promised; nil: it may.
// percent is provision.GuestSpec.MemoryPercent, 0 its default. It counts what
// is promised, not what is used: guests that start together use little at
// first and all of it later.
func Admit(total, promised, want uint64, percent int) error {
	if percent == 0 {
		percent = 100
	}
	limit := (total - Reserve(total)) * uint64(percent) / 100
	if want <= limit && promised <= limit-want {
		return nil
	}
	free := limit - min(promised, limit)
	return fmt.Errorf("it wants %s of memory and %s are left: of the host's %s its own services keep %s, %d %% of the rest may be promised and %s are: stop another domain, or give this one less",
		humanize.IBytes(want), humanize.IBytes(free), humanize.IBytes(total), humanize.IBytes(Reserve(total)), percent, humanize.IBytes(promised))
}

// TotalMemory is the memory of the host at root, in bytes.
func TotalMemory(root string) (uint64, error) {
	m, err := memory(root)
	return m["MemTotal"], err
}

// memory is /proc/meminfo in bytes.
func memory(root string) (map[string]uint64, error) {
	b, err := os.ReadFile(filepath.Join(root, "/proc/meminfo"))
	if err != nil {
		return nil, fmt.Errorf("the host's memory: %w", err)
	}
	out := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) > 0 {
			n, err := strconv.ParseUint(f[0], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("the host's memory: /proc/meminfo: %s", strings.TrimSpace(line))
			}
			out[name] = n << 10
		}
	}
	if out["MemTotal"] == 0 {
		return nil, fmt.Errorf("the host's memory: /proc/meminfo has no MemTotal")
	}
	return out, nil
}

// Alarms are the warnings that the host's settings of kind alarm ask for, in
// the order of the settings: what may soon end in the OOM killer. Each begins
// with the alarm's name and a colon. What the kernel does not tell gives no
// warning.
func Alarms(root string, spec provision.HostSpec) []string {
	settings := spec.Of(provision.Alarm)
	if len(settings) == 0 {
		return nil
	}
	m, err := memory(root)
	if err != nil {
		return []string{"memory: " + err.Error()}
	}
	total, available := float64(m["MemTotal"]), float64(m["MemAvailable"])
	var out []string
	for _, s := range settings {
		say := func(format string, args ...any) { out = append(out, s.Key+": "+fmt.Sprintf(format, args...)) }
		limit, err := strconv.ParseFloat(s.Value, 64)
		if err != nil {
			say("%q is not a number", s.Value)
			continue
		}
		switch s.Key {
		case "memory-available":
			if p := 100 * available / total; p < limit {
				say("only %s of memory are available, %.1f %%, below %s %%: stop or move a domain before the kernel ends one", humanize.IBytes(m["MemAvailable"]), p, s.Value)
			}
		case "memory-pressure":
			if p, ok := pressure(root, "memory"); ok && p > limit {
				say("something waited for memory in %.0f %% of the last minute, more than %s %%: stop or move a domain", p, s.Value)
			}
		case "ksm-ratio":
			merged := ksmMerged(root)
			if r := (total - available + float64(merged)) / total; merged > 0 && r > limit {
				say("without merged pages (%s) %.2f times the host's memory would be in use, more than %s: it runs out when guests change them; stop or move a domain", humanize.IBytes(merged), r, s.Value)
			}
		}
	}
	return out
}

// pressure is the share of the last minute, in percent, in which something
// waited for the resource (PSI, some avg60).
func pressure(root, resource string) (float64, bool) {
	b, err := os.ReadFile(filepath.Join(root, "/proc/pressure", resource))
	if err != nil {
		return 0, false
	}
	for word := range strings.FieldsSeq(string(b)) { // the first line is "some"
		if v, ok := strings.CutPrefix(word, "avg60="); ok {
			p, err := strconv.ParseFloat(v, 64)
			return p, err == nil
		}
	}
	return 0, false
}

// ksmMerged is the memory that merging saves, in bytes.
func ksmMerged(root string) uint64 {
	b, err := os.ReadFile(filepath.Join(root, "/sys/kernel/mm/ksm/pages_sharing"))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0
	}
	return n * uint64(os.Getpagesize())
}

// shareFiles give the host's own services, in system.slice, four times the
// share of all domains together, in machine.slice: a storm of starting guests
// must not keep the switch, libvirt or the agent from their work. Shares count
// only while both want more than there is.
func shareFiles() []File {
	const why = "a storm of starting guests must not keep the host's own services from the CPU and the disk"
	const source = "systemd.resource-control(5); kernel.org admin-guide/cgroup-v2"
	slice := func(name, comment string, weight int) File {
		return File{Path: "/etc/systemd/system/" + name + ".slice.d/platter.conf", Why: why, Source: source,
			Content: fmt.Sprintf("# Written by Platter: %s.\n[Slice]\nCPUWeight=%d\nIOWeight=%d\n", comment, weight, weight)}
	}
	return []File{
		slice("system", "the host's own services. The share of I/O counts on disks with the scheduler bfq", 400),
		slice("machine", "all domains together", 100),
	}
}

// share keeps the slices' files and looks at what the kernel was told.
func (h *Host) share() Step {
	s := h.filesStep("share", "Look at 'systemctl show -p CPUWeight system.slice' on the node", shareFiles(), h.reload)
	laid := s.Check
	look := &Journal{root: h.Root}
	s.Check = func(ctx context.Context) ([]Finding, error) {
		found, err := laid(ctx)
		if err != nil || h.Systemd == nil {
			return found, err
		}
		if _, err := os.Stat(filepath.Join(h.Root, "/sys/fs/cgroup/cgroup.controllers")); err != nil {
			return append(found, Finding{What: "CPU share of the host", OK: true, Is: "not to be seen with cgroups of version 1", Want: "400",
				Why: found[0].Why, Source: found[0].Source}), nil
		}
		onDisk := len(Result{Findings: found}.Deviations()) == 0
		f := place{what: "CPU share of the host", set: provision.Setting{Value: "400", Why: found[0].Why, Source: found[0].Source},
			paths: []string{"/sys/fs/cgroup/system.slice/cpu.weight"}}.find(look)
		f.Boot = !f.OK && onDisk
		return append(found, f), nil
	}
	return s
}
