package stack

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"platter/provision"
)

// networkLimits are the kernel's settings that decide how many connections are
// taken, and how soon a dead one is noticed.
var networkLimits = []string{"net.core.somaxconn", "net.ipv4.tcp_max_syn_backlog",
	"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes"}

// InEffect reads the limits that the node's ejabberd lives under, from the
// process, its sockets and the kernel below root. What cannot be read is not
// in effect.
func InEffect(ctx context.Context, root string, plan provision.Plan) []provision.InEffect {
	size := plan.Size()
	out := []provision.InEffect{
		atLeast("open files of ejabberd", size.Files, func() (int, error) { return openFiles(root) }),
		atLeast(fmt.Sprintf("listen backlog of port %d", ClientPort), size.Backlog, func() (int, error) { return backlog(ctx, ClientPort) }),
	}
	for _, s := range plan.Host.Of(provision.Sysctl) {
		if !slices.Contains(networkLimits, s.Key) {
			continue
		}
		b, err := os.ReadFile(filepath.Join(root, "proc/sys", strings.ReplaceAll(s.Key, ".", "/")))
		is := strings.Join(strings.Fields(string(b)), " ")
		if err != nil {
			is = err.Error()
		}
		out = append(out, provision.InEffect{What: s.Key, OK: is == s.Value, Is: is, Want: s.Value})
	}
	return out
}

func atLeast(what string, want int, read func() (int, error)) provision.InEffect {
	n, err := read()
	if err != nil {
		return provision.InEffect{What: what, Is: err.Error(), Want: fmt.Sprintf("at least %d", want)}
	}
	return provision.InEffect{What: what, OK: n >= want, Is: strconv.Itoa(n), Want: fmt.Sprintf("at least %d", want)}
}

// openFiles is the soft limit of the Erlang machine of ejabberd.service
// (proc(5), limits).
func openFiles(root string) (int, error) {
	names, err := filepath.Glob(filepath.Join(root, "proc/[0-9]*/comm"))
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		comm, _ := os.ReadFile(name)
		cgroup, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "cgroup"))
		if strings.TrimSpace(string(comm)) != "beam.smp" || !strings.Contains(string(cgroup), "/ejabberd.service") {
			continue
		}
		limits, err := os.ReadFile(filepath.Join(filepath.Dir(name), "limits"))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(limits)) {
			if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
				if f := strings.Fields(rest); len(f) > 0 {
					return strconv.Atoi(f[0])
				}
			}
		}
	}
	return 0, fmt.Errorf("ejabberd does not run")
}

// backlog is the smallest backlog of the sockets that listen on port, as the
// kernel has it: what the program asked for, capped at net.core.somaxconn.
func backlog(ctx context.Context, port int) (int, error) {
	out, err := exec.CommandContext(ctx, "ss", "-Hltn", fmt.Sprintf("sport = :%d", port)).Output()
	if err != nil {
		return 0, fmt.Errorf("ss: %w", err)
	}
	least := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line) // state, waiting now, backlog, address
		if len(f) < 4 {
			continue
		}
		n, err := strconv.Atoi(f[2])
		if err != nil {
			return 0, fmt.Errorf("ss: %q", line)
		}
		if least == 0 || n < least {
			least = n
		}
	}
	if least == 0 {
		return 0, fmt.Errorf("nobody listens on port %d", port)
	}
	return least, nil
}

// hostPackages are those of the host that decide how the service and VMs run.
var hostPackages = []string{"openvswitch-switch", "libvirt-daemon", "qemu-system-x86"}

// Versions are those of the running kernel, of the host's packages and of those
// that the node's components are made of.
func Versions(ctx context.Context, plan provision.Plan) map[string]string {
	out := map[string]string{}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		out["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	args := append([]string{"-W", "-f", "${binary:Package} ${Version} ${db:Status-Status}\n"}, hostPackages...)
	for _, c := range here(plan) {
		for _, p := range c.Packages {
			args = append(args, p.Name)
		}
	}
	// It fails for those that are not installed and tells of the others.
	text, _ := exec.CommandContext(ctx, "dpkg-query", args...).Output()
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) == 3 && f[2] == "installed" {
			name, _, _ := strings.Cut(f[0], ":")
			out[name] = f[1]
		}
	}
	return out
}

// Machine is what this host has, as a machine that root is the file system of.
func Machine(root string) provision.Machine {
	m := provision.Machine{CPUs: runtime.NumCPU(), Disk: diskOf(root)}
	b, _ := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			m.Memory = kib << 10
		}
	}
	return m
}

// diskOf is the size of the disk that root is on or, where that is no partition
// of one, of its file system.
func diskOf(root string) int64 {
	var st unix.Stat_t
	if unix.Stat(root, &st) == nil {
		dev, err := filepath.EvalSymlinks(filepath.Join(root, fmt.Sprintf("sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))))
		if _, part := os.Stat(filepath.Join(dev, "partition")); err == nil && part == nil {
			dev = filepath.Dir(dev)
		}
		b, _ := os.ReadFile(filepath.Join(dev, "size"))
		if sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil {
			return sectors * 512 // whatever the disk's own sectors are
		}
	}
	var fs unix.Statfs_t
	if unix.Statfs(root, &fs) != nil {
		return 0
	}
	return int64(fs.Blocks) * fs.Bsize
}
