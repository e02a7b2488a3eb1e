// Package ovstest gives a test an Open vSwitch of its own: the real database
// and the real switch with its datapath in user space, and namespaces in which
// nothing of the machine can be touched.
package ovstest

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"platter/hostprep/ovs"
)

// inside is set in the processes that have their own namespaces: the first of
// them, whose name ends in init, and the one in which the test runs.
const inside = "PLATTER_TEST_ALONE"

// Alone runs the calling test in a process of its own, with a network, process
// numbers, /run and /etc/openvswitch that nobody else sees; what the test
// starts ends with it. It is the first that a test does and tells whether this
// is that process; elsewhere the test has run when it returns:
//
//	if !ovstest.Alone(t) {
//		return
//	}
//
// It needs root.
func Alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) == t.Name() {
		furnish(t)
		return true
	}
	if os.Getenv(inside) == t.Name()+"/init" {
		initialise(t)
	}
	if os.Getuid() != 0 {
		t.Fatal("needs root, for namespaces")
	}
	for _, tool := range []string{"ovsdb-server", "ovsdb-tool", "ovs-vswitchd", "ovs-vsctl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: install openvswitch-switch", tool)
		}
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.count=1", "-test.timeout=0"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), inside+"="+t.Name()+"/init")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID,
		// As an unsharing, the mounts are made private too.
		Unshareflags: unix.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig means this thread
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in its own namespaces: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	return false
}

// initialise is the first process of the namespace: it starts the test and
// takes note of every process that ends. Daemons that nobody waited for would
// be there for ever.
func initialise(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for {
		var status unix.WaitStatus
		switch pid, err := unix.Wait4(-1, &status, 0, nil); {
		case err == unix.EINTR:
		case err != nil:
			t.Fatal(err)
		case pid == cmd.Process.Pid:
			os.Exit(status.ExitStatus())
		}
	}
}

func furnish(t *testing.T) {
	for _, m := range []struct{ what, kind, where string }{
		{"proc", "proc", "/proc"}, {"sysfs", "sysfs", "/sys"}, {"run", "tmpfs", "/run"}, {"etc", "tmpfs", "/etc/openvswitch"},
	} {
		if err := os.MkdirAll(m.where, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(m.what, m.where, m.kind, 0, ""); err != nil {
			t.Fatalf("mounting %s: %v", m.where, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Daemons are the two daemons of Open vSwitch, at their usual places.
type Daemons struct {
	t          *testing.T
	db, daemon *exec.Cmd
}

// Start starts both, with an empty configuration. Bridges must have the
// Datapath "netdev". Call Alone before.
func Start(t *testing.T) *Daemons {
	t.Helper()
	if os.Getenv(inside) != t.Name() {
		t.Fatal("Start without Alone would use the machine's own Open vSwitch")
	}
	d := &Daemons{t: t}
	run(t, "ovsdb-tool", "create", "/etc/openvswitch/conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
	if err := os.MkdirAll(filepath.Dir(ovs.DefaultSocket), 0o755); err != nil {
		t.Fatal(err)
	}
	d.StartDatabase()
	run(t, "ovs-vsctl", "--no-wait", "init")
	d.StartSwitch()
	return d
}

// StartDatabase and StartSwitch start one of the two again.
func (d *Daemons) StartDatabase() {
	d.t.Helper()
	d.db = d.start(ovs.DefaultSocket, "ovsdb-server", "/etc/openvswitch/conf.db", "--remote=punix:"+ovs.DefaultSocket, "--log-file=/run/openvswitch/ovsdb.log")
}

func (d *Daemons) StartSwitch() {
	d.t.Helper()
	d.daemon = d.start("", "ovs-vswitchd", "unix:"+ovs.DefaultSocket, "--disable-system", "--log-file=/run/openvswitch/switch.log")
}

// StopDatabase and StopSwitch end one of the two as systemd does.
func (d *Daemons) StopDatabase() { d.stop(d.db) }
func (d *Daemons) StopSwitch()   { d.stop(d.daemon) }

// start starts a daemon and returns when it listens at the socket.
func (d *Daemons) start(socket, name string, args ...string) *exec.Cmd {
	d.t.Helper()
	cmd := exec.Command(name, append(args, "--pidfile=/run/openvswitch/"+name+".pid", "-vconsole:off")...)
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); socket != ""; time.Sleep(5 * time.Millisecond) {
		if c, err := ovs.Dial(d.t.Context(), socket); err == nil && c != nil {
			break
		} else if time.Now().After(deadline) {
			d.t.Fatalf("%s: %v", name, err)
		}
	}
	return cmd
}

func (d *Daemons) stop(cmd *exec.Cmd) {
	d.t.Helper()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		d.t.Fatal(err)
	}
	_ = cmd.Wait()
}

// Tap makes a tap device, up, as libvirt makes one for a machine. It stays
// until it is deleted.
func Tap(t *testing.T, name string) netlink.Link {
	t.Helper()
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_ONE_QUEUE}
	if err := netlink.LinkAdd(tap); err != nil {
		t.Fatalf("tap %s: %v", name, err)
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		t.Fatal(err)
	}
	return tap
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}
