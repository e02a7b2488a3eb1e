package install

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"aead.dev/minisign"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/ssh"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/disk"
)

// These tests need root: they mount what they have installed.

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// rackOfOne is a disc host and one node of it, as far as an install sees them.
type rackOfOne struct {
	objects map[string][]byte
	keys    []minisign.PublicKey
	plan    provision.Plan
	addr    string
	srv     *http.Server
	refuse  atomic.Int64 // object requests to answer with 503 first
}

// sum is the name of an object.
func sum(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

func newRack(t *testing.T) *rackOfOne {
	t.Helper()
	r := &rackOfOne{objects: map[string][]byte{}}
	pub, sec, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r.keys = []minisign.PublicKey{pub}

	im := provision.Image{Format: provision.ImageFormat, Name: "mini", Version: "1", Kernel: "6.0"}
	var pack []byte
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	esp := filepath.Join(t.TempDir(), "esp")
	sparse(t, esp, 64<<20)
	tool(t, "mkfs.vfat", "-F", "32", esp)
	for _, part := range []struct {
		name string
		raw  []byte
	}{
		{provision.PartBoot, bytes.Repeat([]byte{0x90}, 440)},
		{provision.PartBIOS, bytes.Repeat([]byte("core"), 4096)},
		{provision.PartESP, read(t, esp)},
		{provision.PartRoot, rootFS(t)},
	} {
		p := provision.Part{Name: part.name, Size: int64(len(part.raw))}
		for at := 0; at < len(part.raw); at += provision.FrameSize {
			b := part.raw[at:min(at+provision.FrameSize, len(part.raw))]
			if !bytes.ContainsFunc(b, func(c rune) bool { return c != 0 }) {
				continue
			}
			z := enc.EncodeAll(b, nil)
			p.Frames = append(p.Frames, provision.Frame{Offset: int64(at), Size: len(b), At: int64(len(pack)), Packed: len(z), Hash: sum(z), Raw: sum(b)})
			pack = append(pack, z...)
		}
		im.Parts = append(im.Parts, p)
	}
	im.Pack = provision.Object{Hash: sum(pack), Size: int64(len(pack))}
	raw, err := json.Marshal(im)
	if err != nil {
		t.Fatal(err)
	}
	r.objects[im.Pack.Hash] = pack
	r.objects[sum(raw)] = raw
	r.objects[sum(raw)+".minisig"] = minisign.Sign(sec, raw)

	r.start(t)
	t.Cleanup(func() { r.srv.Close() })
	r.plan = provision.Plan{
		Format: provision.PlanFormat, Rack: "rack", Node: "node1", Generation: 1,
		Image:  provision.ImageRef{Name: "mini", Digest: sum(raw)},
		Layout: provision.DefaultLayout(),
		Net: provision.NodeNet{MAC: "52:54:00:00:00:01", Address: netip.MustParsePrefix("10.0.0.11/24"),
			Gateway: netip.MustParseAddr("10.0.0.254"), DNS: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		Hosts:   []provision.Host{{Name: "node1", Address: netip.MustParseAddr("10.0.0.11")}, {Name: "node2", Address: netip.MustParseAddr("10.0.0.12")}},
		Users:   []provision.User{{Name: "root", Keys: []string{"ssh-ed25519 AAAA root@x"}}, {Name: "ada", Keys: []string{"ssh-ed25519 BBBB ada@x"}}},
		Cmdline: []string{"console=ttyS0", `odd="$x"`},
		Finish:  provision.FinishKexec,
		Files:   "http://" + r.addr,
	}
	return r
}

func (r *rackOfOne) start(t testing.TB) {
	t.Helper()
	if r.addr == "" {
		r.addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	r.addr = ln.Addr().String()
	r.srv = &http.Server{Handler: r}
	go r.srv.Serve(ln)
}

func (r *rackOfOne) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if r.refuse.Add(-1) >= 0 {
		http.Error(w, "later", http.StatusServiceUnavailable)
		return
	}
	b, ok := r.objects[strings.TrimPrefix(req.URL.Path, "/objects/")]
	if !ok {
		http.NotFound(w, req)
		return
	}
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(b))
}

func sparse(t testing.TB, path string, size int64) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// skeleton puts the few files of a Debian root below dir that matter here.
func skeleton(t testing.TB, dir string) {
	t.Helper()
	for name, content := range map[string]string{
		"etc/passwd":            "root:x:0:0:root:/root:/bin/bash\ntaken:x:1000:1000::/home/taken:/bin/sh\n",
		"etc/group":             "root:x:0:\nshadow:x:42:\ntaken:x:1000:\nusers:x:1001:\n",
		"etc/shadow":            "root:!*:1::::::\n",
		"etc/gshadow":           "root:*::\n",
		"etc/skel/.profile":     "# profile\n",
		"etc/machine-id":        "",
		"boot/vmlinuz-6.0":      "kernel",
		"boot/initrd.img-6.0":   "initrd",
		"boot/grub/grub.cfg":    "source /boot/grub/platter.cfg\n",
		"boot/grub/platter.cfg": "set platter_args=\"\"\n",
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"vmlinuz": "boot/vmlinuz-6.0", "initrd.img": "/boot/initrd.img-6.0"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(filepath.Join(dir, "etc/shadow"), 0o640), os.Chown(filepath.Join(dir, "etc/shadow"), 0, 42)); err != nil {
		t.Fatal(err)
	}
}

func rootFS(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	skeleton(t, dir)
	img := filepath.Join(t.TempDir(), "root")
	sparse(t, img, 24<<20)
	tool(t, "mkfs.ext4", "-q", "-F", "-d", dir, img)
	return read(t, img)
}

// recorder is a Reporter that remembers.
type recorder struct {
	mu       sync.Mutex
	lines    []string
	phases   []string
	stages   []provision.Stage
	facts    map[string]string
	failures []*provision.Failure
	done     int64
	total    int64
}

func (r *recorder) do(f func()) { r.mu.Lock(); defer r.mu.Unlock(); f() }

func (r *recorder) Stage(s provision.Stage) { r.do(func() { r.stages = append(r.stages, s) }) }
func (r *recorder) Phase(name string, n, of int) {
	r.do(func() { r.phases = append(r.phases, fmt.Sprintf("%s %d/%d", name, n, of)) })
}
func (r *recorder) Progress(done, total int64) {
	r.do(func() { r.done, r.total = max(r.done, done), total })
}
func (r *recorder) Logf(f string, a ...any) {
	r.do(func() { r.lines = append(r.lines, fmt.Sprintf(f, a...)) })
}
func (r *recorder) Facts(f map[string]string) {
	r.do(func() {
		if r.facts == nil {
			r.facts = map[string]string{}
		}
		for k, v := range f {
			r.facts[k] = v
		}
	})
}
func (r *recorder) Fail(f *provision.Failure)   { r.do(func() { r.failures = append(r.failures, f) }) }
func (r *recorder) Flush(context.Context) error { return nil }

// node answers for secrets.
type node struct{ errs []error }

func (n *node) Identity() client.Identity {
	return client.Identity{Node: "node1", Generation: 1, URL: "https://10.0.0.1:8443", Key: "SECRET"}
}

func (n *node) Secrets(context.Context) (provision.StackSecrets, error) {
	if len(n.errs) > 0 {
		err := n.errs[0]
		n.errs = n.errs[1:]
		return provision.StackSecrets{}, err
	}
	return provision.StackSecrets{Cookie: "cookie"}, nil
}

// machine remembers what would have happened to it.
type machine struct {
	refuse error
	kernel string
	args   string
	left   []bool
}

func (m *machine) LoadKernel(kernel, initrd, args string) error {
	if m.refuse != nil {
		return m.refuse
	}
	k, err1 := os.ReadFile(kernel)
	i, err2 := os.ReadFile(initrd)
	m.kernel, m.args = string(k)+"+"+string(i), args
	return errors.Join(err1, err2)
}

func (m *machine) Leave(kexec bool) error {
	m.left = append(m.left, kexec)
	return nil
}

// bench is one install, ready to run on a file.
type bench struct {
	Env
	rack    *rackOfOne
	report  *recorder
	machine *machine
	efi     efiMap
}

func newBench(t *testing.T, r *rackOfOne) *bench {
	t.Helper()
	target := filepath.Join(t.TempDir(), "disk")
	sparse(t, target, 160<<20)
	b := &bench{rack: r, report: &recorder{}, machine: &machine{}, efi: efiMap{}}
	b.Env = Env{
		Root: t.TempDir(), Target: target, Mount: filepath.Join(t.TempDir(), "mnt"), Node: &node{}, Report: b.report,
		HTTP: &http.Client{Transport: &http.Transport{}}, Keys: r.keys, Machine: b.machine, EFI: b.efi,
		Prepare: func(root string, p provision.Plan, s provision.StackSecrets) error {
			return os.WriteFile(filepath.Join(root, "etc/cookie"), []byte(s.Cookie+p.Node), 0o600)
		},
		// Growing needs a right that root lacks in many containers; package
		// disk tests it.
		Grow:       func(dir string, size int64) error { return nil },
		Executable: "/bin/sh",
	}
	return b
}

func (b *bench) run(t *testing.T) error {
	t.Helper()
	return Run(context.Background(), b.Env, b.rack.plan)
}

// mounted shows the installed root file system.
func (b *bench) mounted(t *testing.T, look func(root string)) {
	t.Helper()
	dir := t.TempDir()
	tool(t, "mount", "-o", fmt.Sprintf("loop,ro,offset=%d", 66<<20), b.Target, dir)
	defer tool(t, "umount", dir)
	look(dir)
}

func TestInstall(t *testing.T) {
	b := newBench(t, newRack(t))
	if err := b.run(t); err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(b.report.lines, "\n"))
	}
	var want []string
	for i, p := range phases {
		want = append(want, fmt.Sprintf("%s %d/%d", p.name, i+1, len(phases)))
	}
	if !slices.Equal(b.report.phases, want) || !slices.Equal(b.report.stages, []provision.Stage{provision.StageInstalling, provision.StageInstalled}) {
		t.Errorf("phases %v, stages %v", b.report.phases, b.report.stages)
	}
	if b.report.facts["write_ms"] == "" || b.report.done != b.report.total || b.report.total == 0 {
		t.Errorf("facts %v, progress %d of %d", b.report.facts, b.report.done, b.report.total)
	}
	if !slices.Equal(b.machine.left, []bool{true}) || b.machine.kernel != "kernel+initrd" {
		t.Errorf("left with %+v", b.machine)
	}
	if out := tool(t, "sgdisk", "--verify", b.Target); !strings.Contains(out, "No problems found") {
		t.Error(out)
	}
	uuid := strings.ToLower(strings.TrimSpace(tool(t, "sfdisk", "--part-uuid", b.Target, "3")))
	if !strings.Contains(b.machine.args, "root=PARTUUID="+uuid+" ") || !strings.HasSuffix(b.machine.args, `console=ttyS0 odd="$x"`) {
		t.Errorf("partition %s, kernel arguments %s", uuid, b.machine.args)
	}
	var id string
	b.mounted(t, func(root string) {
		id = string(read(t, filepath.Join(root, "etc/machine-id")))
		if got := string(read(t, filepath.Join(root, "boot/grub/platter.cfg"))); !strings.Contains(got, "PARTUUID="+uuid) || !strings.Contains(got, `odd=\"\$x\""`) {
			t.Errorf("platter.cfg: %s", got)
		}
		if got := string(read(t, filepath.Join(root, "etc/cookie"))); got != "cookienode1" {
			t.Errorf("the stack was prepared with %q", got)
		}
		if !bytes.Equal(read(t, filepath.Join(root, AgentPath)), read(t, "/bin/sh")) {
			t.Error("the agent is another program")
		}
	})
	// The report was lost, the power went: the same grant once more.
	again := newBench(t, b.rack)
	again.Target = b.Target
	if err := again.run(t); err != nil {
		t.Fatal(err)
	}
	again.mounted(t, func(root string) {
		if got := string(read(t, filepath.Join(root, "etc/machine-id"))); got != id {
			t.Error("the machine got another identity on the way")
		}
	})
	root := filepath.Join(t.TempDir(), "root")
	if err := os.WriteFile(root, read(t, b.Target)[66<<20:], 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "e2fsck", "-f", "-n", root)
	// A reinstall makes a new machine of it.
	b.rack.plan.Generation, b.rack.plan.Reinstall = 2, true
	third := newBench(t, b.rack)
	third.Target = b.Target
	if err := third.run(t); err != nil {
		t.Fatal(err)
	}
	third.mounted(t, func(root string) {
		if got := string(read(t, filepath.Join(root, "etc/machine-id"))); got == id {
			t.Error("a reinstalled machine kept its old identity")
		}
	})
	if n := len(third.efi); n != 2 {
		t.Errorf("variables %v", third.efi)
	}
}

// What goes wrong ends by name, and the disk does not boot.
func TestInstallStops(t *testing.T) {
	r := newRack(t)
	_, sec, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	manifest := r.objects[r.plan.Image.Digest]
	var im provision.Image
	if err := json.Unmarshal(manifest, &im); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		spoil func(*bench)
		code  string
		names string
	}{
		{"manifest signed by a stranger", func(b *bench) {
			b.rack.objects[b.rack.plan.Image.Digest+".minisig"] = minisign.Sign(sec, manifest)
		}, "image-untrusted", "mini"},
		{"manifest changed", func(b *bench) {
			b.rack.objects[b.rack.plan.Image.Digest] = bytes.Replace(manifest, []byte("6.0"), []byte("6.1"), 1)
		}, "image-untrusted", b0(manifest)},
		{"manifest missing", func(b *bench) { delete(b.rack.objects, b.rack.plan.Image.Digest) }, "object-missing", b0(manifest)},
		{"one bit flipped in the pack", func(b *bench) {
			pack := bytes.Clone(b.rack.objects[im.Pack.Hash])
			pack[len(pack)/2] ^= 1
			b.rack.objects[im.Pack.Hash] = pack
		}, "chunk-corrupt", im.Pack.Hash},
		{"no disk", func(b *bench) { b.Target = ""; os.MkdirAll(filepath.Join(b.Root, "sys/block"), 0o755) }, "disk-none", "node1"},
		{"two disks", func(b *bench) {
			b.Target = ""
			for _, d := range []string{"sda", "sdb"} {
				os.MkdirAll(filepath.Join(b.Root, "sys/block", d), 0o755)
				os.WriteFile(filepath.Join(b.Root, "sys/block", d, "size"), []byte("1000000\n"), 0o644)
			}
		}, "disk-ambiguous", "/dev/sdb"},
		{"somebody's data", func(b *bench) {
			tool(t, "mkfs.ext4", "-q", "-F", b.Target)
		}, "disk-foreign", "ext file system"},
		{"a disk that is too small", func(b *bench) { sparse(t, b.Target, 80<<20) }, "disk-small", "platter-root"},
		{"the stack cannot be prepared", func(b *bench) {
			b.Prepare = func(string, provision.Plan, provision.StackSecrets) error { return errors.New("no room") }
		}, "files-failed", "no room"},
		{"an identity that was replaced", func(b *bench) {
			b.Node = &node{errs: []error{&client.Error{Status: 403, Code: client.CodeSuperseded, Message: "a newer install", Next: "Wait."}}}
		}, client.CodeSuperseded, "a newer install"},
		{"a disc host that is gone", func(b *bench) { b.rack.refuse.Store(1 << 40); b.Patience = time.Millisecond }, "disc-host-lost", "node1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fresh := &rackOfOne{objects: map[string][]byte{}, keys: r.keys, plan: r.plan, addr: ""}
			for k, v := range r.objects {
				fresh.objects[k] = v
			}
			fresh.start(t)
			defer fresh.srv.Close()
			fresh.plan.Files = "http://" + fresh.addr
			b := newBench(t, fresh)
			target := b.Target
			c.spoil(b)
			err := b.run(t)
			var f *provision.Failure
			if !errors.As(err, &f) || f.Code != c.code || !strings.Contains(f.Message, c.names) || f.Next == "" || f.Closed {
				t.Fatalf("%v (%+v)", err, f)
			}
			if len(b.report.failures) != 1 || b.report.failures[0] != f {
				t.Errorf("reported %v", b.report.failures)
			}
			if len(b.machine.left) > 0 || slices.Contains(b.report.stages, provision.StageInstalled) {
				t.Error("the machine left as if it were installed")
			}
			disk, err := os.Open(target)
			if err != nil {
				t.Fatal(err)
			}
			defer disk.Close()
			sector := make([]byte, 512)
			if _, err := disk.ReadAt(sector, 0); err != nil || sector[510] == 0x55 {
				t.Errorf("the disk boots (%v)", err)
			}
		})
	}
}

func b0(b []byte) string { return sum(b)[:8] }

// Trouble that passes is waited out.
func TestInstallWaits(t *testing.T) {
	b := newBench(t, newRack(t))
	b.rack.refuse.Store(3)
	b.Node = &node{errs: []error{&client.Error{Status: 503, Code: "http-503"}, errors.New("connection refused")}}
	b.machine.refuse = errors.New("locked down")
	if err := b.run(t); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(b.machine.left, []bool{false}) {
		t.Errorf("without kexec the machine left with %v", b.machine.left)
	}
	if _, ok := b.efi["BootNext"]; !ok {
		t.Error("going through the firmware, it is not told where to")
	}
}

func TestInstallCancelled(t *testing.T) {
	b := newBench(t, newRack(t))
	ctx, cancel := context.WithCancel(context.Background())
	b.Prepare = func(string, provision.Plan, provision.StackSecrets) error { cancel(); return ctx.Err() }
	if err := Run(ctx, b.Env, b.rack.plan); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if len(b.report.failures) > 0 {
		t.Error("an install that was interrupted counts as failed")
	}
	if d, err := disk.Open(b.Target); err != nil {
		t.Errorf("the disk stays locked: %v", err)
	} else {
		d.Close()
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	skeleton(t, dir)
	// Links of the image that lead out must not lead the installer out.
	outside := t.TempDir()
	if err := os.Symlink(outside+"/resolv.conf", filepath.Join(dir, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	plan := newPlan()
	f := Files{Plan: plan, Identity: client.Identity{Node: "node1", Key: "SECRET"}, RootUUID: "11111111-2222-3333-4444-555555555555",
		ESPUUID: "66666666-2222-3333-4444-555555555555", Executable: "/bin/sh"}
	key, _, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Keys = append(f.Keys, key)
	if err := f.Write(dir); err != nil {
		t.Fatal(err)
	}
	if keys, err := ReadKeys(filepath.Join(dir, KeysPath)); err != nil || len(keys) != 1 || !keys[0].Equal(key) {
		t.Errorf("the host trusts %v, not the installer's key: %v", keys, err)
	}
	at := func(name string) string { return string(read(t, filepath.Join(dir, name))) }
	first := map[string]string{}
	for name, want := range map[string]string{
		"etc/hostname":                           "node1\n",
		"etc/hosts":                              "10.0.0.12 node2\n",
		"etc/resolv.conf":                        "nameserver 10.0.0.1\n",
		"etc/systemd/network/10-platter.network": "MACAddress=52:54:00:00:00:01\nType=ether\nKind=!*\n\n[Network]\nAddress=10.0.0.11/24\nGateway=10.0.0.254\nDNS=10.0.0.1\n",
		"etc/fstab":                              "PARTUUID=11111111-2222-3333-4444-555555555555 / ext4",
		"boot/grub/platter.cfg":                  "set platter_args=\"root=PARTUUID=11111111-2222-3333-4444-555555555555 rootfstype=ext4 ro quiet console=ttyS0\"\n",
		"etc/platter/identity.json":              `"key": "SECRET"`,
		"etc/platter/plan.json":                  `"node": "node1"`,
		"root/.ssh/authorized_keys":              "ssh-ed25519 AAAA root@x\n",
		"home/ada/.ssh/authorized_keys":          "ssh-ed25519 BBBB ada@x\n",
		"home/ada/.profile":                      "# profile\n",
		"etc/passwd":                             "ada:x:1002:1002::/home/ada:/bin/bash\n",
		"etc/shadow":                             "ada:*:",
		"etc/sudoers.d/platter":                  "ada ALL=(ALL:ALL) NOPASSWD: ALL\n",
		"etc/ssh/sshd_config.d/10-platter.conf":  "PasswordAuthentication no\n",
		"etc/machine-id":                         "",
		"etc/ssh/ssh_host_ed25519_key":           "PRIVATE KEY",
		"etc/ssh/ssh_host_ecdsa_key.pub":         "ecdsa-sha2-nistp256 ",
		"etc/systemd/system/multi-user.target.wants/platter-agent.service": "ExecStart=/usr/lib/platter/platter-node agent\n",
	} {
		if first[name] = at(name); !strings.Contains(first[name], want) {
			t.Errorf("%s is\n%s", name, first[name])
		}
	}
	if entries, _ := os.ReadDir(outside); len(entries) > 0 {
		t.Error("a link of the image led out of its root")
	}
	for name, want := range map[string]fs.FileMode{"etc/platter/identity.json": 0o600, "etc/ssh/ssh_host_ed25519_key": 0o600, "etc/shadow": 0o640,
		"home/ada/.ssh": fs.ModeDir | 0o700, "home/ada/.ssh/authorized_keys": 0o600, "etc/sudoers.d/platter": 0o440, "usr/lib/platter/platter-node": 0o755} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode() != want {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	if out := tool(t, "stat", "-c", "%u:%g", filepath.Join(dir, "etc/shadow"), filepath.Join(dir, "home/ada/.ssh/authorized_keys")); out != "0:42\n1002:1002\n" {
		t.Errorf("owners %q", out)
	}
	if k, err := ssh.ParsePrivateKey([]byte(at("etc/ssh/ssh_host_ed25519_key"))); err != nil || strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.PublicKey()))) != strings.TrimSpace(at("etc/ssh/ssh_host_ed25519_key.pub")) {
		t.Errorf("host key: %v", err)
	}
	// ssh-keygen is the oracle for the format.
	tool(t, "ssh-keygen", "-y", "-f", filepath.Join(dir, "etc/ssh/ssh_host_ecdsa_key"))
	tool(t, "ssh-keygen", "-l", "-f", filepath.Join(dir, "etc/ssh/ssh_host_ed25519_key.pub"))
	// A second time changes nothing.
	if err := f.Write(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range first {
		if at(name) != want {
			t.Errorf("%s changed:\n%s\n%s", name, want, at(name))
		}
	}
	// What a power cut has left empty is made anew.
	for _, name := range []string{"etc/machine-id", "etc/ssh/ssh_host_ed25519_key"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Write(dir); err != nil {
		t.Fatal(err)
	}
	if len(at("etc/machine-id")) != 33 || !strings.Contains(at("etc/ssh/ssh_host_ed25519_key"), "PRIVATE") {
		t.Error("an empty identity was kept")
	}
}

func newPlan() provision.Plan {
	return provision.Plan{
		Node: "node1",
		Net: provision.NodeNet{MAC: "52:54:00:00:00:01", Address: netip.MustParsePrefix("10.0.0.11/24"),
			Gateway: netip.MustParseAddr("10.0.0.254"), DNS: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		Hosts:   []provision.Host{{Name: "node1", Address: netip.MustParseAddr("10.0.0.11")}, {Name: "node2", Address: netip.MustParseAddr("10.0.0.12")}},
		Users:   []provision.User{{Name: "root", Keys: []string{"ssh-ed25519 AAAA root@x"}}, {Name: "ada", Keys: []string{"ssh-ed25519 BBBB ada@x"}}},
		Cmdline: []string{"console=ttyS0"},
	}
}

func TestWaitsForApproval(t *testing.T) {
	answers := []client.Approval{{}, {}, {Node: "node7"}}
	var asked int
	rep := &recorder{}
	hardware := []map[string]string{{"disk.sda": "1"}, {"disk.sda": "1", "disk.sdb": "2"}}
	name, err := awaitApproval(context.Background(), approver(func() (client.Approval, error) {
		asked++
		if asked == 2 {
			return client.Approval{}, errors.New("connection refused")
		}
		a := answers[0]
		answers = answers[1:]
		return a, nil
	}), time.Millisecond, func() map[string]string { return hardware[min(asked, 1)] }, rep)
	if err != nil || name != "node7" || asked != 4 || rep.facts["disk.sdb"] != "2" {
		t.Errorf("%s %v, asked %d times, %v", name, err, asked, rep.facts)
	}
	_, err = awaitApproval(context.Background(), approver(func() (client.Approval, error) {
		return client.Approval{}, &client.Error{Status: 403, Code: client.CodeSuperseded}
	}), time.Millisecond, func() map[string]string { return nil }, rep)
	if err == nil {
		t.Error("a machine that is turned away waits for ever")
	}
}

type approver func() (client.Approval, error)

func (a approver) Approval(context.Context) (client.Approval, error) { return a() }
