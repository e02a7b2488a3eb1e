//go:build e2e || bench

package vmtest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"platter/hostprep"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/install"
	"platter/provision/stack"
)

// A box stands in for a machine where only its services matter: the OS image
// with its own systemd in namespaces of this machine, at native speed. It boots
// by the disc host's script as a machine does, enrols, and gets the files that
// the installer writes; it has no firmware, kernel or disk of its own.
type box struct {
	r               *rig
	image           string // where the OS image is mounted
	name, mac, addr string
	dir             string
	ns, port        string // network namespace; its end of the cable in the lab
	cgroup          string
	process         *exec.Cmd
	dead            chan struct{}
}

// installBox is what the test binary does under this name, in the lab's network.
const installBox = "install-box"

func init() {
	if len(os.Args) == 6 && os.Args[1] == installBox {
		if err := installRoot(context.Background(), os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// installRoot is the installer without a disk: root is the image's file system,
// store has the keys that the initramfs would have.
func installRoot(ctx context.Context, script, root, program, store string) error {
	resp, err := http.Get(script)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var cmdline install.Cmdline
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "platter.token=") {
			if cmdline, err = install.ParseCmdline(line); err != nil {
				return err
			}
		}
	}
	if cmdline.Token == "" {
		return fmt.Errorf("the boot script is not that of an install:\n%s", text)
	}
	node, plan, err := client.Enrol(ctx, cmdline.URL, cmdline.Pin, cmdline.Token)
	if err != nil {
		return err
	}
	rep := client.NewReporter(io.Discard)
	defer rep.Close()
	rep.Attach(node)
	rep.Stage(provision.StageInstalling)
	sec, err := node.Secrets(ctx)
	if err != nil {
		return err
	}
	keys, err := install.ReadKeys(store + "/keys")
	if err != nil {
		return err
	}
	files := install.Files{Plan: *plan, Identity: node.Identity(), RootUUID: "0", ESPUUID: "0", Executable: program, Keys: keys}
	if err := files.Write(root); err != nil {
		return err
	}
	j, err := hostprep.OpenJournal(root)
	if err != nil {
		return err
	}
	host := hostprep.Host{Root: root, Spec: plan.Host, Self: hostprep.NodeSelf, Reach: hostprep.ReachOf(*plan)}
	if err := errors.Join(host.Prepare(j), stack.Prepare(root, *plan, sec)); err != nil {
		return err
	}
	rep.Stage(provision.StageInstalled)
	return rep.Flush(ctx)
}

// boxes counts them: racks of them run side by side.
var boxes atomic.Int64

// newBox is a blank machine with a cable into the lab.
func (r *rig) newBox(image, name, mac, addr string) *box {
	r.t.Helper()
	b := &box{r: r, image: image, name: name, mac: mac, addr: addr, dir: filepath.Join(r.dir, "box-"+name)}
	id := fmt.Sprintf("%x-%x", os.Getpid(), boxes.Add(1)) // short: a port's name has 15 characters
	b.ns, b.port, b.cgroup = "pb-"+id+"-"+name, "p"+id, "platter-"+id+"-"+name
	r.run("mkdir", "-p", b.dir+"/root")
	r.run("ip", "netns", "add", b.ns)
	r.t.Cleanup(func() {
		b.off()
		b.unmount()
		r.run("ip", "netns", "del", b.ns)
	})
	r.inLab("ip", "link", "add", b.port, "type", "veth", "peer", "name", "eth0", "netns", b.ns)
	r.inLab("ip", "link", "set", b.port, "master", "br0", "up")
	r.run("ip", "-n", b.ns, "link", "set", "eth0", "address", mac)
	return b
}

func (r *rig) inLab(args ...string) string {
	r.t.Helper()
	return r.platter(append([]string{"lab", "exec", "--state", r.lab, "--"}, args...)...)
}

// boxImage mounts the image's root file system, read-only, until the test ends.
func (r *rig) boxImage() string {
	r.t.Helper()
	file, dir := filepath.Join(r.dir, "root.ext4"), filepath.Join(r.dir, "image")
	r.platter("image", "export", "debian-13", "root", file, "--store", r.store)
	r.run("mkdir", dir)
	r.run("mount", "-o", "ro,loop,noload", file, dir)
	r.t.Cleanup(func() { r.run("umount", dir) })
	return dir
}

// install is a boot from the network with an install.
func (b *box) install() {
	b.r.t.Helper()
	b.off()
	b.unmount()
	for _, d := range []string{"up", "work"} {
		b.r.run("rm", "-rf", filepath.Join(b.dir, d))
		b.r.run("mkdir", filepath.Join(b.dir, d))
	}
	b.r.run("mount", "-t", "overlay", "overlay", "-o", fmt.Sprintf("lowerdir=%s,upperdir=%s/up,workdir=%s/work", b.image, b.dir, b.dir), b.dir+"/root")
	self, err := os.Executable()
	if err != nil {
		b.r.t.Fatal(err)
	}
	b.r.run("ip", "-n", b.ns, "address", "replace", b.addr+"/24", "dev", "eth0")
	b.r.run("ip", "-n", b.ns, "link", "set", "eth0", "up")
	b.r.run("nsenter", "--net=/run/netns/"+b.ns, self, installBox,
		"http://10.77.0.1/boot.ipxe?mac="+b.mac+"&platform=pcbios&arch=i386", b.dir+"/root", filepath.Join(b.r.repo, "bin/platter-node"), b.r.store)
	b.r.run("ip", "-n", b.ns, "address", "flush", "dev", "eth0")
	// Its cable is a veth, and its kernel is this machine's.
	b.r.run("sed", "-i", "/^Kind=/d", b.dir+"/root/etc/systemd/network/10-platter.network")
	b.r.run("sed", "-i", "s/platter-node agent$/platter-node agent --leave-host/", b.dir+"/root/etc/systemd/system/platter-agent.service")
	for _, unit := range []string{"libvirtd.service", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "virtlogd.service", "openvswitch-switch.service", "console-getty.service"} {
		b.r.run("ln", "-sf", "/dev/null", b.dir+"/root/etc/systemd/system/"+unit)
	}
}

func (b *box) unmount() {
	if err := syscall.Unmount(b.dir+"/root", syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
		b.r.t.Errorf("unmount of %s: %v", b.name, err)
	}
}

func cgroupRoot() string {
	if _, err := os.Stat("/sys/fs/cgroup/unified/cgroup.procs"); err == nil {
		return "/sys/fs/cgroup/unified"
	}
	return "/sys/fs/cgroup"
}

// enter makes the shell that runs it the box's first process.
const enter = `set -eu
root=$1 cgroup=$2 name=$3 console=$4
mount --make-rprivate /
mount --rbind "$root" "$root"
cd "$root"
mount -t proc proc proc
# Only what belongs to the network is the box's own.
mount --bind proc/sys proc/sys; mount -o remount,ro,bind proc/sys; mount -t proc proc mnt; mount --bind mnt/sys/net proc/sys/net; umount -l mnt
mount -t sysfs -o ro sysfs sys
mount -t tmpfs cgroup sys/fs; mkdir sys/fs/cgroup; mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
for d in null zero full random urandom tty; do : > dev/$d; mount --bind /dev/$d dev/$d; done
: > dev/console; mount --bind "$console" dev/console
mkdir dev/shm dev/pts; mount -t tmpfs shm dev/shm; mount -t devpts -o newinstance,ptmxmode=666 pts dev/pts
ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 run run; mount -t tmpfs tmp tmp
hostname "$name"
pivot_root . mnt; umount -l /mnt
exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin /sbin/init
`

// on boots the box.
func (b *box) on() {
	b.r.t.Helper()
	console := filepath.Join(b.dir, "console")
	b.r.run("touch", console)
	cg := filepath.Join(cgroupRoot(), b.cgroup)
	if err := os.MkdirAll(cg, 0o755); err != nil {
		b.r.t.Fatal(err)
	}
	b.process = exec.Command("sh", "-c", `echo $$ > "$1"/cgroup.procs; shift; exec "$@"`, "sh", cg,
		"nsenter", "--net=/run/netns/"+b.ns, "unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child=KILL",
		"sh", "-c", enter, "sh", b.dir+"/root", cg, b.name, console)
	b.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := os.OpenFile(filepath.Join(b.dir, "output"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		b.r.t.Fatal(err)
	}
	defer out.Close()
	b.process.Stdout, b.process.Stderr = out, out
	// The test's thread must outlive the box, see PR_SET_PDEATHSIG(2).
	started := make(chan error)
	dead := make(chan struct{})
	b.dead = dead
	go func(cmd *exec.Cmd) {
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(dead)
	}(b.process)
	if err := <-started; err != nil {
		b.r.t.Fatal(err)
	}
}

// off is a power cut: no process of the box sees another one end.
func (b *box) off() {
	if b.process == nil {
		return
	}
	cg := filepath.Join(cgroupRoot(), b.cgroup)
	control := func(file string) {
		if err := os.WriteFile(filepath.Join(cg, file), []byte("1"), 0); err != nil {
			b.r.t.Error(err)
		}
	}
	until := func(event string) { // no longer than 5 s: one in an uninterruptible sleep comes late
		for range 5000 {
			if text, err := os.ReadFile(cg + "/cgroup.events"); err != nil || strings.Contains(string(text), event) {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	control("cgroup.freeze")
	until("frozen 1")
	// Frozen processes die without running again. The first process closes its
	// files before its namespace kills the others, so it is not left to that.
	control("cgroup.kill")
	until("populated 0")
	<-b.dead
	// The kernel kills what is later started in a control group below.
	if out, err := exec.Command("find", cg, "-depth", "-type", "d", "-delete").CombinedOutput(); err != nil {
		b.r.t.Errorf("the control group of box %s stays: %v\n%s", b.name, err, out)
	}
	b.process = nil
	// Nothing of its network outlives it but the cable.
	next, ok := strings.CutSuffix(b.ns, "-2")
	if !ok {
		next += "-2"
	}
	b.r.run("ip", "netns", "add", next)
	b.r.run("ip", "-n", b.ns, "link", "set", "eth0", "netns", next)
	b.r.run("ip", "netns", "del", b.ns)
	b.ns = next
}

// init is the number of the box's first process; 0 before there is one.
func (b *box) init() int {
	pid := strconv.Itoa(b.process.Process.Pid)
	text, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	child, _, _ := strings.Cut(string(text), " ")
	n, _ := strconv.Atoi(child)
	return n
}

// sh runs a script in the box.
func (b *box) sh(script string) string {
	b.r.t.Helper()
	out, err := b.try(script)
	if err != nil {
		b.r.t.Fatalf("on %s: %s: %v\n%s", b.name, script, err, out)
	}
	return out
}

func (b *box) try(script string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "-t", strconv.Itoa(b.init()), "-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w", "/bin/sh", "-c", script)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// cable plugs the box in or cuts it off.
func (b *box) cable(state string) { b.r.t.Helper(); b.r.inLab("ip", "link", "set", b.port, state) }
