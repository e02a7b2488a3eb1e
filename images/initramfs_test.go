package images

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/u-root/mkuimage/cpio"
	"github.com/u-root/mkuimage/uimage/initramfs"
	"github.com/ulikunitz/xz"
)

// fakeModules writes a module tree in depmod's format: wanted modules, their
// dependencies, and some that nobody wants.
func fakeModules(t *testing.T, dir string) {
	t.Helper()
	write := func(name string, b []byte) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var dep strings.Builder
	var wanted []string
	for _, list := range []string{storageModules, nodeModules} {
		w, err := words(recipes, list)
		if err != nil {
			t.Fatal(err)
		}
		wanted = append(wanted, w...)
	}
	for _, name := range wanted {
		if name == "virtio_pci" { // built in
			continue
		}
		deps := ""
		if name == "ext4" {
			deps = " kernel/fs/jbd2.ko.xz kernel/lib/crc16.ko"
		}
		fmt.Fprintf(&dep, "kernel/x/%s.ko.xz:%s\n", name, deps)
		write("kernel/x/"+name+".ko.xz", xzPack(t, []byte("module "+name)))
	}
	dep.WriteString("kernel/fs/jbd2.ko.xz:\nkernel/lib/crc16.ko:\nkernel/crypto/crc32c-intel.ko.xz:\nkernel/crypto/crc32c_generic.ko.xz:\nkernel/sound/snd.ko.xz:\n")
	write("kernel/fs/jbd2.ko.xz", xzPack(t, []byte("module jbd2")))
	write("kernel/lib/crc16.ko", []byte("module crc16"))
	write("kernel/crypto/crc32c_generic.ko.xz", xzPack(t, []byte("module crc32c")))
	write("modules.dep", []byte(dep.String()))
	write("modules.alias", []byte("# Aliases\nalias crypto-crc32c crc32c_intel\nalias crypto-crc32c crc32c_generic\nalias pci:v00001AF4d00001000* virtio_net\nalias snd:* snd\n"))
	write("modules.softdep", []byte("# Soft\nsoftdep ext4 pre: crypto-crc32c post: snd\nsoftdep jbd2 pre: crypto-crc32c\n"))
	write("modules.builtin", []byte("kernel/drivers/virtio/virtio_pci.ko\n"))
}

func xzPack(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestModuleClosure(t *testing.T) {
	tree := &moduleTree{
		file:     map[string]string{"a": "k/a.ko", "b": "k/b.ko.xz", "c": "k/c-d.ko", "loop1": "k/loop1.ko", "loop2": "k/loop2.ko"},
		needs:    map[string][]string{"a": {"b", "c"}, "b": {"c"}, "broken": {"nowhere"}},
		soft:     map[string][]string{"c": {"not-there"}, "loop1": {"loop2"}, "loop2": {"loop1"}},
		builtins: map[string]bool{"in_kernel": true},
	}
	got, err := tree.closure([]string{"a", "in-kernel"})
	// modules.dep lists what is loaded first last.
	want := map[string][]string{"a": {"c", "b"}, "b": {"c"}, "c": nil}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("closure %v, %v, want %v", got, err, want)
	}
	dep, _ := tree.index(got)
	if string(dep) != "k/a.ko: k/b.ko k/c-d.ko\nk/b.ko: k/c-d.ko\nk/c-d.ko:\n" {
		t.Errorf("modules.dep:\n%s", dep)
	}
	if _, err := tree.closure([]string{"loop1"}); err != nil {
		t.Errorf("soft dependencies in a circle: %v", err)
	}
	_, err = tree.closure([]string{"gone"})
	wantError(t, err, "no module gone")
	tree.file["broken"] = "k/broken.ko"
	_, err = tree.closure([]string{"broken"})
	wantError(t, err, "broken needs nowhere")
}

// The initramfs, taken apart by zstd and read as an archive, holds init, the
// commands, platter-node as uinit, the keys, and exactly the wanted drivers.
func TestInitramfsContent(t *testing.T) {
	dir := t.TempDir()
	const release = "6.12.0-test"
	fakeModules(t, filepath.Join(dir, "modules", release))
	node := filepath.Join(dir, "platter-node")
	if err := os.WriteFile(node, []byte("#!node"), 0o755); err != nil {
		t.Fatal(err)
	}
	// What u-root's part looks like.
	commands := filepath.Join(dir, "commands.cpio")
	base := initramfs.NewFiles()
	for _, r := range []cpio.Record{
		cpio.StaticFile("bbin/bb", "busybox", 0o755), cpio.Symlink("bbin/init", "bb"), cpio.Symlink("init", "bbin/init"),
		cpio.Symlink("bin/uinit", "platter-node"), cpio.Symlink("bin/sh", "../bbin/gosh"),
	} {
		if err := base.AddRecord(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := initramfs.Write(&initramfs.Opts{Files: base, OutputFile: &initramfs.CPIOFile{Path: commands}}); err != nil {
		t.Fatal(err)
	}
	s, _ := testStore(t)
	keys, err := s.trusted()
	if err != nil {
		t.Fatal(err)
	}
	pack := func() []byte {
		t.Helper()
		files, err := InitramfsOptions{PlatterNode: node}.files(dir, release, keys)
		if err != nil {
			t.Fatal(err)
		}
		b, err := archive(context.Background(), files, commands)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	packed := pack()
	if !bytes.Equal(packed, pack()) {
		t.Error("a second build gives other bytes")
	}
	if err := checkBudget(len(packed)); err != nil {
		t.Error(err)
	}
	wantError(t, checkBudget(MaxInitramfs+1), "must not exceed")

	zstd := exec.Command("zstd", "-dc")
	zstd.Stdin = bytes.NewReader(packed)
	plain, err := zstd.Output()
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(plain)))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]cpio.Record{}
	for _, r := range records {
		have[r.Name] = r
	}
	content := func(name string) string {
		t.Helper()
		r, ok := have[name]
		if !ok {
			t.Errorf("%s is missing", name)
			return ""
		}
		b, err := io.ReadAll(io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	m := "lib/modules/" + release + "/"
	for name, want := range map[string]string{
		"init": "bbin/init", "bin/uinit": "platter-node", "bin/platter-node": "#!node",
		"etc/platter/keys/" + keys[0].name: string(keys[0].text),
		m + "kernel/x/nvme.ko":             "module nvme", m + "kernel/lib/crc16.ko": "module crc16",
		m + "kernel/fs/jbd2.ko": "module jbd2", m + "kernel/crypto/crc32c_generic.ko": "module crc32c",
		m + "modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\n",
	} {
		if got := content(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if alias := content(m + "modules.alias"); !strings.Contains(alias, "virtio_net") || strings.Contains(alias, "snd") {
		t.Errorf("modules.alias:\n%s", alias)
	}
	if dep := content(m + "modules.dep"); !strings.Contains(dep, "kernel/x/ext4.ko: kernel/fs/jbd2.ko kernel/crypto/crc32c_generic.ko kernel/lib/crc16.ko\n") &&
		!strings.Contains(dep, "kernel/x/ext4.ko: kernel/fs/jbd2.ko kernel/lib/crc16.ko kernel/crypto/crc32c_generic.ko\n") {
		t.Errorf("ext4 in modules.dep:\n%s", dep)
	}
	for name := range have {
		if strings.Contains(name, "snd") || strings.HasSuffix(name, ".xz") || strings.Contains(name, "intel.ko") {
			t.Errorf("%s should not be there", name)
		}
	}
	if r := have["dev/console"]; r.Mode&0o170000 != 0o020000 || r.Rmajor != 5 || r.Rminor != 1 {
		t.Errorf("dev/console is %v", r.Info)
	}
}

func TestCheckStatic(t *testing.T) {
	wantError(t, checkStatic("/bin/sh"), "linked dynamically", "CGO_ENABLED=0")
	wantError(t, checkStatic(filepath.Join(t.TempDir(), "none")), "platter-node cannot be used")
}

// Every command of the initramfs is named in tools.go too, or its version would
// not be in go.mod.
func TestCommandsHaveVersions(t *testing.T) {
	names, err := words(recipes, commandList)
	if err != nil {
		t.Fatal(err)
	}
	tools, err := os.ReadFile("tools.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if !strings.Contains(string(tools), "/cmds/core/"+n+`"`) {
			t.Errorf("%s is not in tools.go", n)
		}
	}
	if n := strings.Count(string(tools), "/cmds/"); n != len(names) {
		t.Errorf("tools.go names %d commands, %s %d", n, commandList, len(names))
	}
}

// Every package of a recipe says why it is there, and scripts are valid shell.
func TestRecipe(t *testing.T) {
	r, err := openRecipe("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	b, err := fs.ReadFile(r.files, "packages")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, why, ok := strings.Cut(line, "#")
		if !ok || len(strings.Fields(name)) != 1 || strings.TrimSpace(why) == "" {
			t.Errorf("%q: want a package and its reason", line)
		}
	}
	dir := t.TempDir()
	if err := copyTree(r.files, ".", dir); err != nil {
		t.Fatal(err)
	}
	initramfs := "overlay/etc/initramfs-tools/"
	for _, script := range []string{"finish", initramfs + "hooks/platter", initramfs + "scripts/init-top/udev", initramfs + "scripts/init-bottom/udev", initramfs + "scripts/local-block/platter"} {
		run(t, "sh", "-n", filepath.Join(dir, script))
		if st, err := os.Stat(filepath.Join(dir, script)); err != nil || st.Mode()&0o111 == 0 {
			t.Errorf("%s is not executable: %v", script, err)
		}
	}
	_, err = openRecipe("plan-9")
	wantError(t, err, "no recipe", "plan-9")
}
