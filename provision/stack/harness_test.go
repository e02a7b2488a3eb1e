//go:build slow

package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/site"
)

// These tests run real ejabberd nodes from a root of the OS image, each in a
// network namespace of its own on a bridge without a way out. They need root,
// overlayfs and PLATTER_TEST_ROOT: the root file system that
// 'platter image export' writes.

const testDomain = "im.test"

// lab is a bridge and nodes on it.
type lab struct {
	t     *testing.T
	dir   string
	base  string // the mounted root, shared and never written
	bed   string // namespace of the bridge: where users and the disc host are
	site  *site.Site
	sec   provision.StackSecrets // of the first node; all have the same accounts and CA
	nodes []*testNode
}

func newLab(t *testing.T, names ...string) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir(), base: mountedRoot(t), bed: unique("pt-"), site: openSite(t)}
	l.run("ip", "netns", "add", l.bed)
	t.Cleanup(func() { l.run("ip", "netns", "del", l.bed) })
	l.run("ip", "-n", l.bed, "link", "add", "br0", "type", "bridge")
	l.run("ip", "-n", l.bed, "addr", "add", "10.99.0.254/24", "dev", "br0")
	l.run("ip", "-n", l.bed, "link", "set", "br0", "up")
	var hosts []provision.Host
	for i, name := range names {
		hosts = append(hosts, provision.Host{Name: name, Address: netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)})})
	}
	for _, h := range hosts {
		l.nodes = append(l.nodes, l.newNode(h.Name, h.Address, hosts))
	}
	l.sec = l.nodes[0].sec
	for _, n := range l.nodes {
		n.install()
	}
	return l
}

func (l *lab) run(args ...string) {
	l.t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		l.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// testNode is one machine: a root of its own and its own network.
type testNode struct {
	*member
	l           *lab
	name        string
	addr        netip.Addr
	sec         provision.StackSecrets
	ns, machine string
	port        string // of the bridge
	proc        *service
}

func (l *lab) newNode(name string, addr netip.Addr, hosts []provision.Host) *testNode {
	plan := alone(l.t, planOf(l.t, name, hosts...))
	n := &testNode{l: l, name: name, addr: addr, sec: secretsOf(l.t, l.site, plan), ns: unique("pt-"), machine: filepath.Join(l.dir, name)}
	l.run("ip", "netns", "add", n.ns)
	l.t.Cleanup(func() { l.run("ip", "netns", "del", n.ns) })
	n.port = unique("p")
	l.run("ip", "link", "add", n.port, "netns", l.bed, "type", "veth", "peer", "name", "eth0", "netns", n.ns)
	l.run("ip", "-n", l.bed, "link", "set", n.port, "master", "br0", "up")
	l.run("ip", "-n", n.ns, "addr", "add", addr.String()+"/24", "dev", "eth0")
	l.run("ip", "-n", n.ns, "link", "set", "eth0", "up")
	l.run("ip", "-n", n.ns, "link", "set", "lo", "up")
	n.proc = &service{n: n}
	n.member = &member{plan: plan, root: filepath.Join(n.machine, "root"), unit: n.proc, patience: time.Minute,
		pause: func(int) time.Duration { return 100 * time.Millisecond }, command: n.inside, eval: erlCall("ejabberd", name, netip.AddrPortFrom(addr, DistPort), n.inside)}
	l.t.Cleanup(n.unmount)
	l.t.Cleanup(n.proc.kill)
	return n
}

// install gives the node an empty disk with the image and the prepared files.
func (n *testNode) install() {
	n.l.t.Helper()
	n.proc.kill()
	n.unmount()
	for _, d := range []string{"up", "work", "root"} {
		if err := os.MkdirAll(filepath.Join(n.machine, d), 0o755); err != nil {
			n.l.t.Fatal(err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/up,workdir=%s/work", n.l.base, n.machine, n.machine)
	if err := syscall.Mount("overlay", n.root, "overlay", 0, opts); err != nil {
		n.l.t.Fatalf("overlay: %v", err)
	}
	if err := syscall.Mount("/dev", n.root+"/dev", "", syscall.MS_BIND, ""); err != nil {
		n.l.t.Fatal(err)
	}
	if err := syscall.Mount("run", n.root+"/run", "tmpfs", 0, ""); err != nil {
		n.l.t.Fatal(err)
	}
	hosts := "127.0.0.1 localhost\n"
	for _, h := range n.plan.Hosts {
		hosts += h.Address.String() + " " + h.Name + "\n"
	}
	if err := os.WriteFile(n.root+"/etc/hosts", []byte(hosts), 0o644); err != nil {
		n.l.t.Fatal(err)
	}
	if err := Prepare(n.root, n.plan, n.sec); err != nil {
		n.l.t.Fatal(err)
	}
	uid, gid := n.ejabberd()
	if err := errors.Join(os.Mkdir(n.root+"/run/ejabberd", 0o755), os.Chown(n.root+"/run/ejabberd", uid, gid)); err != nil {
		n.l.t.Fatal(err)
	}
}

// ejabberd is the user and group of that name on the node.
func (n *testNode) ejabberd() (uid, gid int) {
	n.l.t.Helper()
	uid, err1 := idOf(n.root, "passwd", "ejabberd")
	gid, err2 := idOf(n.root, "group", "ejabberd")
	if err := errors.Join(err1, err2); err != nil {
		n.l.t.Fatal(err)
	}
	return uid, gid
}

func (n *testNode) unmount() {
	for _, d := range []string{"run", "dev", ""} {
		if err := syscall.Unmount(filepath.Join(n.machine, "root", d), syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			n.l.t.Errorf("unmount of %s: %v", d, err)
		}
	}
	for _, d := range []string{"up", "work"} {
		if err := os.RemoveAll(filepath.Join(n.machine, d)); err != nil {
			n.l.t.Error(err)
		}
	}
}

// inside makes a command that runs as ejabberd on the node: its files, its
// network, its host name, and a process tree that dies with it.
func (n *testNode) inside(ctx context.Context, name string, args ...string) *exec.Cmd {
	uid, gid := n.ejabberd()
	script := fmt.Sprintf(`hostname %s; mount -t proc proc %s/proc
chroot --userspec=%d:%d --groups=%d %s /usr/bin/env -i HOME=/%s USER=ejabberd PATH=/usr/sbin:/usr/bin:/bin NOTIFY_SOCKET=/run/notify "$@"
exit $?`, // the shell stays: it is process 1 in there, with it all die
		n.name, n.root, uid, gid, gid, n.root, spool)
	all := append([]string{"--net=/run/netns/" + n.ns, "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL",
		"sh", "-c", script, "sh", name}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", all...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// service is what systemd does for ejabberd.service: it starts the command of
// the unit, waits for READY=1, and starts it again when it ends by itself.
type service struct {
	n      *testNode
	mu     sync.Mutex
	cmd    *exec.Cmd
	dead   chan struct{}
	starts atomic.Int32 // so far
	said   []string     // every notification since the start
	out    bytes.Buffer
}

func (s *service) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		select {
		case <-s.dead:
		default:
			return nil
		}
	}
	path := s.n.root + "/run/notify"
	os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o777); err != nil {
		return err
	}
	s.said = nil
	s.cmd = s.n.inside(context.Background(), "/usr/sbin/ejabberdctl", "foreground")
	s.out.Reset()
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.starts.Add(1)
	dead, ready := make(chan struct{}), make(chan struct{})
	s.dead = dead
	go func(cmd *exec.Cmd) {
		cmd.Wait()
		conn.Close()
		close(dead)
	}(s.cmd)
	go func() {
		b := make([]byte, 4096)
		for once := false; ; {
			k, err := conn.Read(b)
			if err != nil {
				return
			}
			s.note(string(b[:k]))
			if !once && strings.Contains(string(b[:k]), "READY=1") {
				once = true
				close(ready)
			}
		}
	}()
	select {
	case <-ready:
		return nil
	case <-dead:
		return fmt.Errorf("ejabberd ended:\n%s", s.out.String())
	case <-ctx.Done():
		return fmt.Errorf("%w; ejabberd said:\n%s", ctx.Err(), s.out.String())
	}
}

var noteLock sync.Mutex

func (s *service) note(text string) {
	noteLock.Lock()
	defer noteLock.Unlock()
	s.said = append(s.said, text)
}

func (s *service) notifications() string {
	noteLock.Lock()
	defer noteLock.Unlock()
	return strings.Join(s.said, "; ")
}

func (s *service) Restart(ctx context.Context) error {
	s.kill()
	return s.Start(ctx)
}

// Stop is what ExecStop of the unit does.
func (s *service) Stop(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return nil
	}
	if _, err := s.n.eval(ctx, `init:stop(), "stops".`); err != nil {
		return err
	}
	select {
	case <-s.dead:
		s.cmd = nil
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// kill is kill -9 of the whole service, or a power cut.
func (s *service) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Kill()
	<-s.dead
	s.cmd = nil
}

// quiet is a Progress that goes to the test's log.
type quiet struct{ t *testing.T }

func (q quiet) Phase(name string, n, of int)    { q.t.Logf("[%d/%d] %s", n, of, name) }
func (q quiet) Logf(format string, args ...any) { q.t.Logf(format, args...) }
func (q quiet) Facts(facts map[string]string)   { q.t.Logf("%v", facts) }

// mountedRoot mounts PLATTER_TEST_ROOT, read-only, until the test is over.
func mountedRoot(t *testing.T) string {
	t.Helper()
	file := os.Getenv("PLATTER_TEST_ROOT")
	if file == "" {
		t.Fatal("PLATTER_TEST_ROOT is not set: these tests need the OS image's root file system; run them with 'make slow'")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-o", "ro,loop,noload", file, dir).CombinedOutput(); err != nil {
		t.Fatalf("mounting %s: %v\n%s", file, err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("unmounting %s: %v\n%s", file, err, out)
		}
	})
	return dir
}

var counter = struct {
	sync.Mutex
	n int
}{}

// unique is a short name that no other test run uses.
func unique(prefix string) string {
	counter.Lock()
	defer counter.Unlock()
	counter.n++
	return fmt.Sprintf("%s%x-%x", prefix, os.Getpid(), counter.n)
}
