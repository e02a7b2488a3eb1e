package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// testDate is when images of tests are made.
var testDate = time.Unix(1754697600, 0)

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
	if err := makeRoot(context.Background(), root, fsImage, testDate); err != nil {
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

// testFiles makes a tree of files of many sizes in many folders, the same
// whatever the seed. Nothing else of two such trees is the same: neither the order in
// which they were written nor any time.
func testFiles(t *testing.T, seed uint64, at time.Time) string {
	t.Helper()
	root := t.TempDir()
	random := mathrand.NewChaCha8([32]byte{})
	r := mathrand.New(random)
	type file struct {
		name string
		body []byte
	}
	var files []file
	for i := range 400 {
		body := make([]byte, r.IntN(100_000))
		random.Read(body)
		files = append(files, file{fmt.Sprintf("d%02d/sub%d/f%03d", i%20, i%3, i), body})
	}
	mathrand.New(mathrand.NewPCG(seed, 0)).Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	for _, f := range files {
		path := filepath.Join(root, f.name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, f.body, 0o644), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	old := testDate.Add(-time.Hour)
	if err := errors.Join(os.WriteFile(filepath.Join(root, "old"), nil, 0o644), os.Chtimes(filepath.Join(root, "old"), at, old)); err != nil {
		t.Fatal(err)
	}
	return root
}

// The same files make the same parts, wherever and whenever they were written.
func TestSamePartsAgain(t *testing.T) {
	var roots, esps []string
	loader := filepath.Join(t.TempDir(), "loader")
	for i, at := range []time.Time{time.Unix(1800000000, 1), time.Unix(1900000000, 123456789)} {
		roots, esps = append(roots, filepath.Join(t.TempDir(), "root")), append(esps, filepath.Join(t.TempDir(), "esp"))
		if err := makeRoot(t.Context(), testFiles(t, uint64(i), at), roots[i], testDate); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(loader, []byte("loader"), 0o644), os.Chtimes(loader, at, at), makeESP(t.Context(), loader, esps[i], testDate)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "cmp", roots[0], roots[1])
	run(t, "cmp", esps[0], esps[1])
	for path, want := range map[string]time.Time{"/": testDate, "/old": testDate.Add(-time.Hour), "/d01": testDate, "/d01/sub1/f001": testDate} {
		out := run(t, "debugfs", "-R", "stat "+path, roots[0])
		for _, field := range []string{"ctime", "atime", "mtime", "crtime"} {
			if at := fmt.Sprintf("%s: 0x%08x:00000000", field, want.Unix()); !strings.Contains(out, at) {
				t.Errorf("%s has not %s:\n%s", path, at, out)
			}
		}
	}
	if out := run(t, "mdir", "-i", esps[0], "::/EFI/platter/grubx64.efi"); !strings.Contains(out, testDate.UTC().Format("2006-01-02")) {
		t.Errorf("the loader is not of %s:\n%s", testDate, out)
	}
	left, err := filepath.Glob(roots[0] + "*")
	if err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// An image with a few other files lacks few frames of the one before.
func TestFewNewFrames(t *testing.T) {
	s, _ := testStore(t)
	tree := testFiles(t, 0, testDate)
	have, lacks, all := map[string]bool{}, int64(0), int64(0)
	for i := range 2 {
		part := filepath.Join(t.TempDir(), "root")
		if err := makeRoot(t.Context(), tree, part, testDate); err != nil {
			t.Fatal(err)
		}
		_, parts, err := s.pack(t.Context(), []source{{provision.PartRoot, part}}, func(int64, int64) {})
		if err != nil {
			t.Fatal(err)
		}
		lacks, all = 0, 0
		for _, f := range parts[0].Frames {
			if all += int64(f.Packed); !have[f.Hash] {
				lacks += int64(f.Packed)
			}
			have[f.Hash] = true
		}
		if i == 0 {
			// A new inode, and a file that is longer, before most others.
			if err := errors.Join(os.WriteFile(filepath.Join(tree, "d01/aaa"), []byte("new"), 0o644),
				os.WriteFile(filepath.Join(tree, "d02/sub0/f042"), make([]byte, 130_000), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if lacks == 0 || lacks > all/5 {
		t.Errorf("two files of 400 are new, and %d of %d bytes", lacks, all)
	}
}

// What comes out of the file system is what went in, also a file that has the copies of
// the superblock in its way, links, long and hard, and attributes.
func TestRootContents(t *testing.T) {
	root := smallTree(t)
	netRaw := append([]byte{1, 0, 0, 2, 0, 0x20}, make([]byte, 14)...) // as ping has it (capabilities(7), struct vfs_cap_data)
	big := filepath.Join(root, "big")
	f, err := os.Create(big)
	if err != nil {
		t.Fatal(err)
	}
	const size = 150<<20 + 17
	for at := int64(0); at < size; at += 1<<20 + 4096 {
		if _, err := f.WriteAt(fmt.Appendf(nil, "at %d", at), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(size), f.Close(), os.Link(big, filepath.Join(root, "same")), os.Symlink(strings.Repeat("/long", 30), filepath.Join(root, "far")),
		unix.Lsetxattr(filepath.Join(root, "etc/secret"), "security.capability", netRaw, 0)); err != nil {
		t.Fatal(err)
	}
	part, out := filepath.Join(t.TempDir(), "root"), t.TempDir()
	if err := makeRoot(t.Context(), root, part, testDate); err != nil {
		t.Fatal(err)
	}
	run(t, "e2fsck", "-f", "-n", part)
	if said := run(t, "debugfs", "-R", "stat /big", part); !strings.Contains(said, "Links: 2") || strings.Count(said, "):") < 2 {
		t.Errorf("it is in one piece or has not two names:\n%s", said)
	}
	if said := run(t, "debugfs", "-R", "ea_get -x /etc/secret security.capability", part); !strings.Contains(said, fmt.Sprintf("% x", netRaw)) {
		t.Errorf("attribute: %s", said)
	}
	run(t, "debugfs", "-R", "rdump / "+out, part)
	if err := errors.Join(os.Remove(filepath.Join(root, "fifo")), os.Remove(filepath.Join(out, "lost+found"))); err != nil { // debugfs makes none
		t.Fatal(err)
	}
	run(t, "diff", "-r", "--no-dereference", root, out)
}

func TestESP(t *testing.T) {
	dir := t.TempDir()
	loader := filepath.Join(dir, "grubx64.efi")
	content := bytes.Repeat([]byte("efi "), 50000)
	if err := os.WriteFile(loader, content, 0o644); err != nil {
		t.Fatal(err)
	}
	esp := filepath.Join(dir, "esp")
	if err := makeESP(context.Background(), loader, esp, testDate); err != nil {
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
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	if _, err := BuildOS(context.Background(), o); err == nil || !strings.Contains(err.Error(), "npm") {
		t.Errorf("at another date: %v", err)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "today")
	_, err = BuildOS(context.Background(), o)
	wantError(t, err, "SOURCE_DATE_EPOCH", "today", "seconds since 1970")
	os.Unsetenv("SOURCE_DATE_EPOCH")
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
