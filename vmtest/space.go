package vmtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsFolder is where named network namespaces are (ip-netns(8)).
const netnsFolder = "/run/netns"

// onThread runs f on an operating system thread that ends with f, so that f
// may change the thread's namespaces. What f starts inherits them.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end and is what /proc/self shows. While
			// it is held here, f gets another.
			defer runtime.UnlockOSThread()
			done <- onThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}

// ensureNetNS makes the named network namespace unless it is there.
func ensureNetNS(name string) error {
	if _, err := identifyNetNS(name); err == nil {
		return nil
	}
	if err := deleteNetNS(name); err != nil { // a name without a namespace: cut off while it was made
		return err
	}
	return onThread(func() error {
		err := shareNetNS()
		if err == nil {
			var ns netns.NsHandle
			if ns, err = netns.NewNamed(name); err == nil {
				return ns.Close()
			}
		}
		return fmt.Errorf("cannot make the network namespace %s, the lab needs root: %w", name, err)
	})
}

// shareNetNS makes the folder of network namespaces a shared mount, as the first
// 'ip netns add' of a machine does: that mount would hide the namespaces that
// are in the folder already, and no name could be removed any more. ip holds the
// same lock meanwhile.
func shareNetNS() error {
	if err := os.MkdirAll(netnsFolder, 0o755); err != nil {
		return err
	}
	lock, err := os.Open(netnsFolder)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	err = unix.Mount("", netnsFolder, "", unix.MS_SHARED|unix.MS_REC, "")
	if err != unix.EINVAL { // it is no mount yet
		return err
	}
	if err := unix.Mount(netnsFolder, netnsFolder, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", netnsFolder, "", unix.MS_SHARED|unix.MS_REC, "")
}

// deleteNetNS removes the name; the namespace goes with its last process.
func deleteNetNS(name string) error {
	path := filepath.Join(netnsFolder, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("cannot unmount the network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the network namespace %s: %w", path, err)
	}
	return nil
}

// ensureNetwork brings lo and the bridge up in the named namespace.
func ensureNetwork(name string, nw Network) error {
	ns, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := h.LinkSetUp(lo); err != nil {
		return err
	}
	link, err := h.LinkByName(nw.Bridge)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = nw.Bridge
		// An address of its own: otherwise a bridge takes a port's, and all
		// zeros when the last port goes.
		a := nw.Address.Addr().As4()
		attrs.HardwareAddr = append([]byte{0x02, 0x50}, a[:]...)
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("cannot make the bridge %s: %w", nw.Bridge, err)
		}
		link, err = h.LinkByName(nw.Bridge)
	}
	if err != nil {
		return err
	}
	want, err := netlink.ParseAddr(nw.Address.String())
	if err != nil {
		return err
	}
	have, err := h.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, a := range have {
		if !a.Equal(*want) {
			if err := h.AddrDel(link, &a); err != nil {
				return err
			}
		}
	}
	if err := h.AddrReplace(link, want); err != nil {
		return fmt.Errorf("cannot give %s the address %s: %w", nw.Bridge, nw.Address, err)
	}
	return h.LinkSetUp(link)
}

// A bind shows source, a file or folder, at the path target.
type bind struct{ source, target string }

// startIn starts cmd in the named network namespace and, where there are
// binds, in a mount namespace of its own that has them.
func startIn(cmd *exec.Cmd, name string, binds []bind) error {
	return onThread(func() error {
		ns, err := netns.GetFromName(name)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			return err
		}
		if len(binds) > 0 {
			if err := privateMounts(binds); err != nil {
				return err
			}
		}
		return cmd.Start()
	})
}

// keptMounts are the top folders whose mounts a lab's daemon needs.
var keptMounts = []string{"", "bin", "dev", "etc", "lib", "lib64", "nix", "proc", "sbin", "sys", "usr"}

// privateMounts gives the calling thread a mount namespace of its own with
// binds in it, without other people's mounts, which would stay busy for as
// long as the lab runs, and without cgroups.
func privateMounts(binds []bind) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("cannot make a mount namespace, the lab needs root: %w", err)
	}
	// Slave: what is mounted here stays here, what is unmounted outside goes.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private: %w", err)
	}
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, p := range slices.Backward(points) {
		top, _, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/")
		holds := func(b bind) bool { return within(p, b.source) }
		if p == "/sys/fs/cgroup" || !slices.Contains(keptMounts, top) && !slices.ContainsFunc(binds, holds) {
			// One that another mount hides is not there any more: fine.
			unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
	// Every source is opened first: a bind may hide where the next one is.
	fds := make([]int, len(binds))
	for i, b := range binds {
		if fds[i], err = unix.Open(b.source, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("cannot open %s: %w", b.source, err)
		}
		defer unix.Close(fds[i])
	}
	for i, b := range binds {
		if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fds[i]), b.target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot show %s as %s: %w", b.source, b.target, err)
		}
	}
	return nil
}

// within tells whether path is dir or below it.
func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// mountPoints lists the calling thread's mounts in the order of proc(5)
// mountinfo: a mount comes after the one it lies on.
func mountPoints() ([]string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/mountinfo", unix.Gettid()))
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 {
			points = append(points, unescapeMount.Replace(f[4]))
		}
	}
	return points, nil
}

// space is where the processes of one lab live.
type space struct {
	netns  string // name of the network namespace
	varDir string // the folder that the lab's daemons see as /var
}

// Process is a running process of a lab.
type Process struct {
	PID     int    `json:"pid"`
	Command string `json:"command"` // the kernel's short name, for example libvirtd
}

// fileID is the kernel's identity of a file, a folder or a namespace.
type fileID struct{ dev, ino uint64 }

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return fileID{uint64(st.Dev), st.Ino}, err
}

// identifyNetNS returns the namespace of that name, if there is one.
func identifyNetNS(name string) (fileID, error) {
	path := filepath.Join(netnsFolder, name)
	var fsys unix.Statfs_t
	if err := unix.Statfs(path, &fsys); err != nil {
		return fileID{}, err
	}
	if fsys.Type != unix.NSFS_MAGIC {
		return fileID{}, fmt.Errorf("%s is no namespace", path)
	}
	return identify(path)
}

// member returns a function that tells whether a process is in the space.
func (s space) member() (func(pid int) bool, error) {
	net, netErr := identifyNetNS(s.netns)
	folder, dirErr := identify(s.varDir)
	for path, id := range map[string]fileID{"ns/net": net, "root/var": folder} {
		if own, err := identify("/proc/1/" + path); err == nil && own == id {
			return nil, fmt.Errorf("the lab's %s is the machine's own: refusing to take the machine's processes for the lab's", path)
		}
	}
	return func(pid int) bool {
		proc := filepath.Join("/proc", strconv.Itoa(pid))
		if id, err := identify(filepath.Join(proc, "ns/net")); netErr == nil && err == nil && id == net {
			return true
		}
		id, err := identify(filepath.Join(proc, "root/var"))
		return dirErr == nil && err == nil && id == folder
	}, nil
}

// processes finds every process in the space but the caller.
func (s space) processes() ([]Process, error) {
	member, err := s.member()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !member(pid) {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
		out = append(out, Process{pid, strings.TrimSpace(string(comm))})
	}
	return out, nil
}

// endGrace is how long processes may take to end by themselves.
const endGrace = 5 * time.Second

// end ends the processes in the space that match, and those they start
// meanwhile: first it asks, then it kills.
func (s space) end(ctx context.Context, match func(Process) bool) error {
	asked := map[int]bool{}
	for start := time.Now(); ; {
		ps, err := s.processes()
		ps = slices.DeleteFunc(ps, func(p Process) bool { return !match(p) })
		if err != nil || len(ps) == 0 {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		spent := time.Since(start)
		if spent > 4*endGrace {
			return fmt.Errorf("process %d (%s) does not end even when killed: the kernel holds it, see dmesg, then try again", ps[0].PID, ps[0].Command)
		}
		for _, p := range ps {
			switch {
			case spent > endGrace:
				err = s.signal(p.PID, unix.SIGKILL)
			case !asked[p.PID]:
				asked[p.PID] = true
				err = s.signal(p.PID, unix.SIGTERM)
			}
			if err != nil {
				return fmt.Errorf("cannot end process %d (%s): %w", p.PID, p.Command, err)
			}
		}
		waitExit(ps[0].PID, 200*time.Millisecond)
	}
}

// signal sends sig to a process if it is in the space. A pidfd never comes to
// mean another process, so the question and the signal are about the same one.
func (s space) signal(pid int, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return ignoreGone(err)
	}
	defer unix.Close(fd)
	member, err := s.member()
	if err != nil || !member(pid) {
		return err
	}
	return ignoreGone(unix.PidfdSendSignal(fd, sig, nil, 0))
}

func ignoreGone(err error) error {
	if err == unix.ESRCH {
		return nil
	}
	return err
}

// waitExit waits until a process has ended or limit has passed.
func waitExit(pid int, limit time.Duration) {
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(limit/time.Millisecond))
		unix.Close(fd)
	}
}
