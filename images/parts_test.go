package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
)

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return string(out)
}

// smallTree is a root file system in miniature, with what a copy can lose.
func smallTree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "etc/deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"etc/secret":    []byte("s3cret"),
		"etc/deep/big":  bytes.Repeat([]byte("0123456789abcdef"), 1<<16),
		"etc/deep/zero": nil,
	} {
		if err := os.WriteFile(filepath.Join(root, name), content, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chown(filepath.Join(root, "etc/secret"), 101, 102), os.Symlink("etc/secret", filepath.Join(root, "link")),
		syscall.Mkfifo(filepath.Join(root, "fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return root
}

// The file system is clean, holds the tree with its owners, and grows as far as a
// large disk.
func TestRootFileSystem(t *testing.T) {
	root := smallTree(t)
	fsImage := filepath.Join(t.TempDir(), "root.part")
	if err := makeRoot(context.Background(), root, fsImage); err != nil {
		t.Fatal(err)
	}
	run(t, "e2fsck", "-f", "-n", fsImage)
	if out := run(t, "dumpe2fs", "-h", fsImage); !strings.Contains(out, "platter-root") || !strings.Contains(out, "metadata_csum") || strings.Contains(out, "orphan_file") {
		t.Errorf("unexpected file system:\n%s", out)
	}
	if out := run(t, "debugfs", "-R", "cat /etc/secret", fsImage); !strings.Contains(out, "s3cret") {
		t.Errorf("/etc/secret is %q", out)
	}
	if out := run(t, "debugfs", "-R", "stat /etc/secret", fsImage); !strings.Contains(out, "User:   101   Group:   102") || !strings.Contains(out, "0640") {
		t.Errorf("owner and mode of /etc/secret:\n%s", out)
	}

	// To the size of a large disk. Only the growing node mounts it for that: not
	// every machine that runs tests may.
	const large = 2 << 40
	if err := os.Truncate(fsImage, large); err != nil {
		t.Fatal(err)
	}
	if out := run(t, "resize2fs", fsImage); !strings.Contains(out, fmt.Sprint(large/blockSize)) {
		t.Errorf("resize2fs says %s", out)
	}
	run(t, "e2fsck", "-n", fsImage)
}

func TestESP(t *testing.T) {
	dir := t.TempDir()
	loader := filepath.Join(dir, "grubx64.efi")
	content := bytes.Repeat([]byte("efi "), 50000)
	if err := os.WriteFile(loader, content, 0o644); err != nil {
		t.Fatal(err)
	}
	esp := filepath.Join(dir, "esp")
	if err := makeESP(context.Background(), loader, esp); err != nil {
		t.Fatal(err)
	}
	run(t, "fsck.vfat", "-n", esp)
	for _, name := range []string{"::/EFI/BOOT/BOOTX64.EFI", "::/EFI/platter/grubx64.efi"} {
		if out := run(t, "mtype", "-i", esp, name); out != string(content) {
			t.Errorf("%s has %d bytes", name, len(out))
		}
	}
	if st, err := os.Stat(esp); err != nil || st.Size() != partition(provision.PartESP).Size {
		t.Errorf("size %d, %v", st.Size(), err)
	}
	if out := run(t, "blkid", "-p", "-o", "value", "-s", "VERSION", esp); strings.TrimSpace(out) != "FAT32" {
		t.Errorf("it is %s", out)
	}
}

func TestBootCode(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	boot := bytes.Repeat([]byte{0xeb}, 512)
	to := filepath.Join(dir, "boot")
	if err := makeBoot(write("boot.img", boot), to); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(to)
	if err != nil || len(got) != 440 || got[0x66] != 0x90 || got[0x67] != 0x90 || got[0x65] != 0xeb || got[0x68] != 0xeb {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	wantError(t, makeBoot(write("short", boot[:511]), to), "511 bytes")

	core := make([]byte, 512+3*512-7)
	binary.LittleEndian.PutUint16(core[0x1f4+8:], 3)
	binary.LittleEndian.PutUint16(core[0x1f4+10:], 0x820)
	if err := makeBIOS(write("core.img", core), to); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(to); err != nil || len(got) != 4*512 || !bytes.HasPrefix(got, core) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	core[0x1f4+8] = 4
	wantError(t, makeBIOS(write("wrong", core), to), "unknown block list")
	huge := make([]byte, 1<<20+512)
	binary.LittleEndian.PutUint16(huge[0x1f4+8:], 1<<11)
	binary.LittleEndian.PutUint16(huge[0x1f4+10:], 0x820)
	wantError(t, makeBIOS(write("huge", huge), to), "does not fit")
}

// A build that has nothing new to build runs nothing.
func TestBuildReused(t *testing.T) {
	s, _ := testStore(t)
	file := filepath.Join(t.TempDir(), "key")
	if err := errors.Join(GenerateKey(file), s.Trust(file+".pub")); err != nil {
		t.Fatal(err)
	}
	key, err := s.readSecretKey(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o := BuildOptions{Store: s, Name: "debian-13", LockFile: filepath.Join(dir, "lock"), SecretKey: file, WorkDir: dir, Suite: "trixie", Out: io.Discard}
	lock := map[string]string{"systemd": "257"}
	if err := os.WriteFile(o.LockFile, formatLock(o.Name, lock), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := openRecipe(o.Name)
	if err != nil {
		t.Fatal(err)
	}
	inputs, err := o.inputs(r, key, lock)
	if err != nil {
		t.Fatal(err)
	}
	im := &provision.Image{Format: provision.ImageFormat, Name: o.Name}
	im.Pack, im.Parts = packParts(t, s, sampleParts())
	digest, err := s.publish(o.Name, im, inputs, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", "") // nothing to build with
	built, err := BuildOS(context.Background(), o)
	if err != nil || !built.Reused || built.Ref.Digest != digest {
		t.Fatalf("%+v, %v", built, err)
	}
	// Any other input does want a build, which cannot run here.
	for what, change := range map[string]func(*BuildOptions){
		"update": func(o *BuildOptions) { o.Update = true },
		"suite":  func(o *BuildOptions) { o.Suite = "forky" },
		"lock":   func(o *BuildOptions) { o.LockFile = filepath.Join(dir, "none") },
		"mirror": func(o *BuildOptions) { o.Mirrors = []string{"file:/mnt"} },
	} {
		other := o
		change(&other)
		if _, err := BuildOS(context.Background(), other); err == nil || !strings.Contains(err.Error(), "npm") {
			t.Errorf("with another %s: %v", what, err)
		}
	}
	if _, im, err := s.Image("debian-13"); err != nil || im.Pack.Size == 0 {
		t.Errorf("failed builds have damaged the image: %v", err)
	}
	o.Frozen, o.LockFile = true, filepath.Join(dir, "none")
	_, err = BuildOS(context.Background(), o)
	wantError(t, err, "nothing to be frozen to")
}

// A cancelled tool takes its children, its mounts and its lock with it.
func TestScratchCancelled(t *testing.T) {
	dir := t.TempDir()
	s, err := newScratch(dir, "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newScratch(dir, "x"); err == nil || !strings.Contains(err.Error(), "another build of x is running") {
		t.Errorf("a second build: %v", err)
	}
	mnt := filepath.Join(s.dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// The child holds the pipe open for as long as it lives.
	cmd := exec.CommandContext(ctx, "sh", "-c", `mount -t tmpfs none "$0" && touch "$0"/inside && sleep 1000 & wait; sleep 1000`, mnt)
	cmd.Stdout = w
	ended := make(chan error, 1)
	go func() { ended <- s.run(cmd) }()
	time.AfterFunc(200*time.Millisecond, cancel)
	if err := <-ended; err == nil {
		t.Error("no error")
	}
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("a child lives on: %v", err)
	}
	if _, err := os.Stat(filepath.Join(mnt, "inside")); err == nil {
		t.Error("the mount is visible outside of its namespace")
	}
	s.remove()
	again, err := newScratch(dir, "x")
	if err != nil {
		t.Fatal(err)
	}
	again.remove()
}
