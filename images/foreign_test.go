package images

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
	"golang.org/x/sys/unix"

	"platter/provision"
)

const testKernel = "6.1.0-9-amd64"

// foreignTree is a Debian in miniature that boots as far as anybody can tell
// without booting it, with what a copy can lose.
func foreignTree(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("an image can only be imported as root: run the tests as root")
	}
	root := t.TempDir()
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"etc/os-release":                 "PRETTY_NAME=\"Testian GNU/Linux 13\"\nID=testian\nID_LIKE=debian\nVERSION_ID=\"13\"\n",
		"etc/passwd":                     "root:x:0:0:root:/root:/bin/bash\n",
		"etc/group":                      "root:x:0:\n",
		"etc/machine-id":                 "0123456789abcdef0123456789abcdef\n",
		"etc/ssh/sshd_config":            "Include /etc/ssh/sshd_config.d/*.conf\n",
		"etc/ssh/ssh_host_rsa_key":       "SECRET",
		"etc/cloud/cloud.cfg":            "x",
		"etc/network/interfaces":         "iface eth0 inet dhcp\n",
		"usr/sbin/ifup":                  "",
		"etc/netplan/50-cloud-init.yaml": "network: {}\n",
		"etc/systemd/network/10-cloud-init-eth0.network":     "theirs\n",
		"etc/systemd/network/05-bond.netdev":                 "theirs\n",
		"etc/systemd/network/20-wlan.network":                "comes later\n",
		"etc/deep/big":                                       strings.Repeat("0123456789abcdef", 1<<15),
		"boot/vmlinuz-" + testKernel:                         "kernel",
		"boot/vmlinuz-5.0.0-1-amd64":                         "an older kernel without modules",
		"boot/grub/grub.cfg":                                 "theirs\n",
		"usr/lib/systemd/systemd-networkd":                   string(program),
		"usr/lib/systemd/system/systemd-networkd.service":    "[Service]\n",
		"usr/lib/systemd/systemd":                            string(program),
		"usr/bin/bash":                                       string(program),
		"usr/sbin/sshd":                                      string(program),
		"usr/lib/modules/" + testKernel + "/modules.dep":     "kernel/net/openvswitch/openvswitch.ko.xz: kernel/x/libcrc32c.ko.xz\nkernel/kvm.ko:\n",
		"usr/lib/modules/" + testKernel + "/modules.builtin": "kernel/fs/ext4/ext4.ko\n",
		"var/lib/dpkg/status":                                "Package: etcd-server\nStatus: install ok installed\nVersion: 3.5.16-4\n\nPackage: haproxy\nStatus: deinstall ok config-files\nVersion: 3.0\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	if err := errors.Join(
		os.Symlink("usr/sbin", at("sbin")), os.Symlink("usr/bin", at("bin")), os.Symlink("/lib/systemd/systemd", at("usr/sbin/init")), os.Symlink("usr/lib", at("lib")),
		os.WriteFile(at("boot/initrd.img-"+testKernel), testInitramfs(t, "virtio_blk", "nvme", "virtio-pci"), 0o600),
		os.WriteFile(at("etc/secret"), []byte("s3cret"), 0o640), os.Chown(at("etc/secret"), 101, 102),
		os.Link(at("etc/secret"), at("etc/hard")), syscall.Mkfifo(at("fifo"), 0o600),
		os.Chmod(at("usr/bin/bash"), 0o755|fs.ModeSetuid), os.Mkdir(at("srv"), 0o755), os.Chown(at("srv"), 7, 8), os.Chmod(at("srv"), 0o710|fs.ModeSticky),
		os.MkdirAll(at("dev"), 0o755), unix.Mknod(at("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		// cap_net_raw=ep, as setcap(8) writes it
		unix.Setxattr(at("usr/bin/bash"), "security.capability", []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0),
		os.WriteFile(at("etc/holes"), nil, 0o644), os.Truncate(at("etc/holes"), 16<<20),
		os.Lchown(at("bin"), 3, 4),
	); err != nil {
		t.Fatal(err)
	}
	return root
}

// testInitramfs is an uncompressed archive, as microcode comes, and one with
// drivers, packed with zstd.
func testInitramfs(t testing.TB, drivers ...string) []byte {
	t.Helper()
	archive := func(names ...string) []byte {
		var b bytes.Buffer
		w := cpio.Newc.Writer(&b)
		for _, n := range names {
			if err := w.WriteRecord(cpio.StaticFile(n, "content of "+n, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		if err := cpio.WriteTrailer(w); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	var names []string
	for _, d := range drivers {
		names = append(names, "usr/lib/modules/"+testKernel+"/kernel/drivers/"+d+".ko.xz")
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	early := archive("kernel/x86/microcode/GenuineIntel.bin")
	early = append(early, make([]byte, 512-len(early)%512)...)
	return append(early, enc.EncodeAll(archive(append(names, "init")...), nil)...)
}

// listing is everything about a tree that a copy has to keep.
func listing(t testing.TB, root string) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if rel == "lost+found" {
			return fs.SkipDir
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d %d:%d mtime %d", rel, st.Mode, st.Uid, st.Gid, unix.Major(st.Rdev), unix.Minor(st.Rdev), st.Mtim.Sec)
		if rel == "." { // made by the disk's file system, or by nobody
			line = "."
		}
		switch d.Type() {
		case 0:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			cap := make([]byte, 64)
			n, err := unix.Lgetxattr(path, "security.capability", cap)
			line += fmt.Sprintf(" %d bytes %x, %d links, capability %x %v", st.Size, sha256.Sum256(b), st.Nlink, cap[:max(n, 0)], err)
		case fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// gptDisk is a disk with the trees on ext4 partitions, behind a small one that
// holds nothing.
func gptDisk(t testing.TB, roots ...string) string {
	t.Helper()
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	const size = 64 << 20
	script := "label: gpt\nstart=2048, size=2048\n"
	for i := range roots {
		script += fmt.Sprintf("start=%d, size=%d\n", 4096+i*size/512, size/512)
	}
	if err := sparse(disk, int64(len(roots))*size+(4<<20)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sfdisk", "--quiet", disk)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	for i, root := range roots {
		run(t.(*testing.T), "mkfs.ext4", "-q", "-F", "-b", "4096", "-d", root, "-E", fmt.Sprintf("offset=%d", 4096*512+i*size), disk, fmt.Sprint(size/4096))
	}
	return disk
}

// foreignOCI has the tree in its first layer, with a file and a folder more
// that the second one takes away.
func foreignOCI(t testing.TB, root string) string {
	t.Helper()
	dir := t.TempDir()
	lower := filepath.Join(dir, "lower.tar")
	tarOf(t, root, lower)
	withMore := filepath.Join(dir, "more.tar")
	var more bytes.Buffer
	w := tar.NewWriter(&more)
	add := func(w *tar.Writer, h tar.Header, content string) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, content)
	}
	add(w, tar.Header{Name: "etc/gone", Mode: 0o644}, "gone")
	add(w, tar.Header{Name: "opt/", Typeflag: tar.TypeDir, Mode: 0o755}, "")
	add(w, tar.Header{Name: "opt/gone/file", Mode: 0o644}, "gone")
	w.Close()
	var upper bytes.Buffer
	w = tar.NewWriter(&upper)
	add(w, tar.Header{Name: "etc/.wh.gone", Mode: 0o644}, "")
	add(w, tar.Header{Name: ".wh.opt", Mode: 0o644}, "")
	w.Close()
	if err := errors.Join(os.WriteFile(withMore, more.Bytes(), 0o600), os.WriteFile(filepath.Join(dir, "upper.tar"), upper.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	img := empty.Image
	for _, file := range []string{withMore, lower, filepath.Join(dir, "upper.tar")} {
		layer, err := tarball.LayerFromFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c.OS, c.Architecture = "linux", "amd64"
	return ociOf(t, img, c)
}

func ociOf(t testing.TB, img v1.Image, c *v1.ConfigFile) string {
	t.Helper()
	img, err := mutate.ConfigFile(img, c)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "oci")
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	file := dir + ".archive"
	tarOf(t, dir, file)
	return file
}

func tarOf(t testing.TB, dir, file string) {
	t.Helper()
	run(t.(*testing.T), "tar", "--numeric-owner", "--sparse", "--format=posix", "--xattrs", "--xattrs-include=*", "-cf", file, "-C", dir, ".")
}

func unpackTest(t testing.TB, file string) (*reading, string, error) {
	t.Helper()
	work, err := newScratch(t.TempDir(), "import")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(work.remove)
	x, err := unpackForeign(t.Context(), work, file, io.Discard)
	return x, filepath.Join(work.dir, "root"), err
}

// Whatever it comes as, it is the same tree, and the name of the file says nothing.
func TestForeignKinds(t *testing.T) {
	root := foreignTree(t)
	want := listing(t, root)
	dir := t.TempDir()
	plain := filepath.Join(dir, "tar")
	tarOf(t, root, plain)
	packed := func(name, what string, args ...string) string {
		file := filepath.Join(dir, name)
		out, err := exec.Command(args[0], append(args[1:], "-c", what)...).Output()
		if err == nil {
			err = os.WriteFile(file, out, 0o600)
		}
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return file
	}
	disk := gptDisk(t, root)
	qcow := filepath.Join(dir, "qcow2")
	run(t, "qemu-img", "convert", "-c", "-O", "qcow2", disk, qcow)
	bare := filepath.Join(dir, "bare")
	run(t, "mkfs.ext4", "-q", "-d", root, bare, "64m")

	// /boot on a partition of its own.
	split := filepath.Join(dir, "split")
	run(t, "cp", "-a", root, split)
	boot := filepath.Join(dir, "boot")
	if err := errors.Join(os.Rename(filepath.Join(split, "boot"), boot), os.Mkdir(filepath.Join(split, "boot"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for kind, file := range map[string]string{
		kindTar: plain, kindTar + " gzip": packed("gz", plain, "gzip", "-1"), kindTar + " zstd": packed("zst", plain, "zstd", "-q"), kindTar + " xz": packed("xz", plain, "xz", "-0"),
		kindRaw: disk, kindRaw + " gzip": packed("disk", disk, "gzip", "-1"), kindQCOW2: qcow, kindRaw + " ": bare, kindRaw + "  ": gptDisk(t, boot, split), kindOCI: foreignOCI(t, root),
	} {
		x, tree, err := unpackTest(t, file)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if x.kind != strings.TrimSpace(kind) {
			t.Errorf("%s is taken for %q", kind, x.kind)
		}
		got := listing(t, tree)
		if kind == kindRaw+"  " { // its boot is another file system's root
			got, want := strings.Split(got, "\n"), strings.Split(want, "\n")
			got = slices.DeleteFunc(got, func(l string) bool { return strings.HasPrefix(l, "boot ") || strings.HasPrefix(l, "boot/lost+found") })
			want = slices.DeleteFunc(want, func(l string) bool { return strings.HasPrefix(l, "boot ") })
			if !slices.Equal(got, want) {
				t.Errorf("%s gives\n%s", kind, strings.Join(got, "\n"))
			}
			continue
		}
		if got != want {
			t.Errorf("%s gives\n%s\nthe tree is\n%s", kind, got, want)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(tree, "etc/holes"), &st); err != nil || st.Blocks > 64 {
			t.Errorf("%s: a hole of %d bytes takes %d blocks, %v", kind, st.Size, st.Blocks, err)
		}
	}
}

// No entry of an archive leads out of the folder that it is unpacked into.
func TestForeignTraversal(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "victim"), []byte("whole"), 0o644); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20) + outside[1:]
	for name, c := range map[string]struct {
		entries []tar.Header
		refused bool
	}{
		"dots":                {[]tar.Header{{Name: "etc/../../evil", Mode: 0o644}}, true},
		"dots to a folder":    {[]tar.Header{{Name: up + "/evil", Mode: 0o644}}, true},
		"hard link":           {[]tar.Header{{Name: "etc/h", Typeflag: tar.TypeLink, Linkname: up + "/victim"}}, true},
		"absolute link":       {[]tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "out/victim", Mode: 0o600}, {Name: "out/evil", Mode: 0o600}}, true},
		"link within":         {[]tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: outside + "/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "out/victim", Mode: 0o600}}, false},
		"relative link":       {[]tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: up}, {Name: "out/victim", Mode: 0o600}}, true},
		"link to a file":      {[]tar.Header{{Name: "v", Typeflag: tar.TypeSymlink, Linkname: outside + "/victim"}, {Name: "v", Mode: 0o600}}, false},
		"hard link by a link": {[]tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "out/victim"}, {Name: "h", Mode: 0o600}}, true},
		"folder over a link":  {[]tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "out/", Typeflag: tar.TypeDir, Mode: 0}}, true},
		"absolute name":       {[]tar.Header{{Name: outside + "/victim", Mode: 0o600}}, false},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range append([]tar.Header{{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}}, c.entries...) {
			h.Uid = 4711
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		file := filepath.Join(t.TempDir(), "tar")
		if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := unpackTest(t, file); (err != nil) != c.refused {
			t.Errorf("%s: %v", name, err)
		}
		if got := listing(t, outside); !strings.Contains(got, "victim 100644 0:0") || strings.Contains(got, "evil") || !strings.Contains(got, "5 bytes") || strings.Count(got, "\n") != 1 {
			t.Fatalf("%s reached out: %s", name, got)
		}
	}
}

// A disk that was copied while it ran is read as it is, and that is said.
func TestForeignUnclean(t *testing.T) {
	root := foreignTree(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
		if err := sparse(file, 320<<20); err != nil {
			t.Fatal(err)
		}
		run(t, "mkfs."+kind, "-q", file)
		run(t, "unshare", "--mount", "sh", "-ec", `mount -o loop "$1" "$2"; cp -a "$3/." "$2"; umount "$2"; mount -o loop "$1" "$2"
			dd if=/dev/zero of="$2/late" bs=4k count=1 conv=fsync status=none; cp --sparse=always "$1" "$1.running"; umount "$2"`, "sh", file, dir, root)
		x, _, err := unpackTest(t, file)
		if err != nil || len(x.findings) > 0 {
			t.Errorf("%s, unmounted: %+v, %v", kind, x, err)
		}
		x, tree, err := unpackTest(t, file+".running")
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if _, err := os.Stat(filepath.Join(tree, "boot/vmlinuz-"+testKernel)); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if l := (&look{Foreign: Foreign{Findings: x.findings}}); !has(l, Lacks, "the whole file", "cleanly") || len(x.findings) != 1 {
			t.Errorf("%s: %+v", kind, x.findings)
		}
	}
}

// A partition that cannot be read does not keep the others from being read, and
// /boot may be ext2.
func TestForeignOddPartitions(t *testing.T) {
	root := foreignTree(t)
	boot := filepath.Join(t.TempDir(), "boot")
	if err := errors.Join(os.Rename(filepath.Join(root, "boot"), boot), os.Mkdir(filepath.Join(root, "boot"), 0o755)); err != nil {
		t.Fatal(err)
	}
	disk := gptDisk(t, boot, t.TempDir(), root, t.TempDir())
	const size = 64 << 20
	at := func(i int) int64 { return 4096*512 + int64(i)*size }
	run(t, "mkfs.ext2", "-q", "-F", "-b", "4096", "-d", boot, "-E", fmt.Sprintf("offset=%d", at(0)), disk, fmt.Sprint(size/4096))
	xfs := filepath.Join(t.TempDir(), "xfs")
	if err := sparse(xfs, 320<<20); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", xfs)
	mark, err := os.ReadFile(xfs)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// A feature that no kernel knows; and before ext4 the mark of XFS.
	for offset, b := range map[int64][]byte{at(1) + 1024 + 0x60: {0, 0, 0, 0x40}, at(3): mark[:512]} {
		if _, err := f.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
	}
	x, tree, err := unpackTest(t, disk)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(tree, "boot/vmlinuz-"+testKernel)); err != nil {
		t.Error(err)
	}
	l := &look{Foreign: Foreign{Findings: x.findings}}
	if !has(l, Lacks, "partition 3", "does not mount it (ext4): ") || !has(l, Lacks, "partition 5", "several file systems") || len(x.findings) != 2 {
		t.Errorf("%+v", x.findings)
	}
}

// A link on a disk does not have this machine's own files taken for the disk's.
func TestForeignDiskLinks(t *testing.T) {
	if _, err := os.Stat("/etc/os-release"); err != nil {
		t.Fatalf("this machine has no os-release that could be taken: %v", err)
	}
	for what, link := range map[string]func(root string) error{
		"folder":    func(root string) error { return os.Symlink("/", filepath.Join(root, "root")) },
		"subvolume": func(root string) error { return os.Symlink("/", filepath.Join(root, "@")) },
		"its etc":   func(root string) error { return os.Symlink("/etc", filepath.Join(root, "etc")) },
		"its own etc": func(root string) error {
			return errors.Join(os.Mkdir(filepath.Join(root, "@rootfs"), 0o755), os.Symlink("/etc", filepath.Join(root, "@rootfs/etc")))
		},
	} {
		root := t.TempDir()
		if err := link(root); err != nil {
			t.Fatal(err)
		}
		bare := filepath.Join(t.TempDir(), "bare")
		run(t, "mkfs.ext4", "-q", "-d", root, bare, "16m")
		_, _, err := unpackTest(t, bare)
		if err == nil {
			t.Errorf("%s: this machine was taken in", what)
			continue
		}
		wantError(t, err, "no partition holds one")
	}
}

// A device node in the place of a file is not opened: one without a driver would
// say so.
func TestForeignDeviceForFile(t *testing.T) {
	root := t.TempDir()
	for name, dev := range map[string]uint64{"null": unix.Mkdev(1, 3), "none": unix.Mkdev(4000, 0)} {
		if err := unix.Mknod(filepath.Join(root, name), unix.S_IFCHR|0o600, int(dev)); err != nil {
			t.Fatal(err)
		}
		j, err := openJail(root)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		_, err = j.open(name)
		wantError(t, err, "not a regular file")
	}
}

// The checksum at the end of a packed archive counts.
func TestForeignDamagedArchive(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "tar")
	if err := os.MkdirAll(filepath.Join(dir, "tree/etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "dd", "if=/dev/urandom", "of="+filepath.Join(dir, "tree/etc/random"), "bs=1M", "count=1", "status=none")
	tarOf(t, filepath.Join(dir, "tree"), plain)
	for tool, checksum := range map[string]int64{"gzip": 8, "zstd": 1} { // how far before the end
		out, err := exec.Command(tool, "-c", plain).Output()
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, tool)
		for _, damaged := range []bool{false, true} {
			if damaged {
				out[int64(len(out))-checksum] ^= 1
			}
			if err := os.WriteFile(file, out, 0o600); err != nil {
				t.Fatal(err)
			}
			_, _, err := unpackTest(t, file)
			if damaged {
				wantError(t, err, "damaged", "copy the file again", file)
			} else if err != nil {
				t.Error(err)
			}
		}
	}
}

// GNU tar has a form of its own for files with holes.
func TestForeignGNUSparse(t *testing.T) {
	root := foreignTree(t)
	if err := os.Truncate(filepath.Join(root, "etc/deep/big"), 8<<20); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "tar")
	run(t, "tar", "--format=gnu", "--numeric-owner", "--sparse", "-cf", file, "-C", root, "etc")
	_, tree, err := unpackTest(t, file)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := listing(t, filepath.Join(tree, "etc")), listing(t, filepath.Join(root, "etc")); got != want {
		t.Errorf("it gives\n%s\nthe tree is\n%s", got, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(tree, "etc/holes"), &st); err != nil || st.Size != 16<<20 || st.Blocks > 64 {
		t.Errorf("a hole of %d bytes takes %d blocks, %v", st.Size, st.Blocks, err)
	}
}

// While a tree is unpacked nobody else gets into it, and what the import makes of
// its own accord has the same modes with any umask.
func TestForeignWorkFolder(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "etc/deep/file", Mode: 0o644}), w.Close()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file, work := filepath.Join(dir, "tar"), filepath.Join(dir, "work")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := closedScratch(work)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unpackForeign(t.Context(), s, file, io.Discard); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{".": 0o700, "root": 0o755, "root/etc": 0o755, "root/etc/deep": 0o755, "root/etc/deep/file": 0o644} {
		if st, err := os.Stat(filepath.Join(s.dir, name)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s is %v, %v", name, st.Mode(), err)
		}
	}
	s.remove()
	for what, spoil := range map[string]func(string) error{
		"open to all":   func(name string) error { return errors.Join(os.Mkdir(name, 0o700), os.Chmod(name, 0o777)) },
		"another's":     func(name string) error { return errors.Join(os.Mkdir(name, 0o700), os.Chown(name, 4711, 0)) },
		"a link":        func(name string) error { return os.Symlink(work, name) },
		"open to group": func(name string) error { return errors.Join(os.Mkdir(name, 0o700), os.Chmod(name, 0o770)) },
	} {
		name := filepath.Join(dir, what)
		if err := spoil(name); err != nil {
			t.Fatal(err)
		}
		_, err := Import(t.Context(), ImportOptions{File: file, WorkDir: name, Check: true, Out: io.Discard})
		wantError(t, err, "other users", "--work", name)
	}
}

// What is no image of a system is refused by name, and nothing of this machine
// is read through it.
func TestForeignRefusedFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, at int, content string) string {
		file := filepath.Join(dir, name)
		b := append(make([]byte, at), content...)
		if err := os.WriteFile(file, append(b, make([]byte, 1<<20)...), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	backed := filepath.Join(dir, "backed")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", backed, "1M")
	outer := filepath.Join(dir, "outer")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), outer, "1M")

	locked := gptDisk(t, t.TempDir(), t.TempDir())
	f, err := os.OpenFile(locked, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	// A label of LVM as pvcreate(8) writes it (lib/label/label.h), and the head
	// of a LUKS volume.
	label := make([]byte, 512)
	copy(label, "LABELONE")
	binary.LittleEndian.PutUint64(label[8:], 1)
	binary.LittleEndian.PutUint32(label[20:], 32)
	copy(label[24:], "LVM2 001")
	const firstCRC = uint32(0xf597a6cf)
	binary.LittleEndian.PutUint32(label[16:], ^crc32.Update(^firstCRC, crc32.IEEETable, label[20:]))
	for at, b := range map[int64][]byte{4096 * 512: make([]byte, 1<<20), 4096*512 + 64<<20: make([]byte, 1<<20)} {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(label, 4096*512+512); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("LUKS\xba\xbe\x00\x01aes"), 4096*512+64<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	short := filepath.Join(dir, "short")
	run(t, "cp", "--sparse=always", gptDisk(t, t.TempDir()), short)
	if err := os.Truncate(short, 20<<20); err != nil {
		t.Fatal(err)
	}
	docker := filepath.Join(dir, "docker")
	if err := os.MkdirAll(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "d/manifest.json"), []byte("[]"), 0o600); err != nil {
		t.Fatal(err)
	}
	tarOf(t, filepath.Join(dir, "d"), docker)

	arm := &v1.ConfigFile{OS: "linux", Architecture: "arm64", RootFS: v1.RootFS{Type: "layers"}}
	for what, c := range map[string]struct {
		file  string
		wants []string
	}{
		"disc":    {write("disc", 0x8001, "CD001"), []string{"installation disc"}},
		"vmdk":    {write("vmdk", 0, "KDMV"), []string{"VMware", "qemu-img convert"}},
		"zip":     {write("zip", 0, "PK\x03\x04"), []string{"ZIP"}},
		"nothing": {write("nothing", 0, "?"), []string{"unknown kind", "OCI archive"}},
		"empty":   {gptDisk(t, t.TempDir()), []string{"no partition holds one", "partition 2: ext4", "tar --numeric-owner"}},
		"locked":  {locked, []string{"partition 2 is a volume of LVM", "partition 3 is encrypted (LUKS)", "tar --numeric-owner"}},
		"short":   {short, []string{"cut short"}},
		"backed":  {backed, []string{"backing file", "qemu-img convert"}},
		"outer":   {outer, []string{"its data in another file"}},
		"docker":  {docker, []string{"Docker", "--format oci-archive"}},
		"arm":     {ociOf(t, empty.Image, arm), []string{"linux/arm64", "amd64"}},
	} {
		_, tree, err := unpackTest(t, c.file)
		var unfit *Unfit
		if !errors.As(err, &unfit) {
			t.Errorf("%s: %v", what, err)
			continue
		}
		wantError(t, err, append(c.wants, c.file, "the store is as it was")...)
		if left, _ := os.ReadDir(tree); what != "docker" && what != "arm" && len(left) > 0 {
			t.Errorf("%s left %v", what, left)
		}
	}
	// A layer that is not what the manifest says.
	good := foreignOCI(t, foreignTree(t))
	b, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(good, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err = unpackTest(t, good)
	wantError(t, err, "layers")
}

// An index that names itself ends.
func TestForeignIndexInItself(t *testing.T) {
	_, _, err := imageOf(endless{empty.Index}, maxIndexes)
	wantError(t, err, "names itself")
}

type anIndex = v1.ImageIndex

type endless struct{ anIndex }

func (e endless) ImageIndex(v1.Hash) (v1.ImageIndex, error) { return e, nil }
func (endless) IndexManifest() (*v1.IndexManifest, error) {
	return &v1.IndexManifest{Manifests: []v1.Descriptor{{MediaType: types.OCIImageIndex}}}, nil
}

func lookAt(t testing.TB, root string, stack ...provision.Component) *look {
	t.Helper()
	j, err := openJail(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	l := &look{jail: j, scratch: t.TempDir(), stack: stack}
	l.all()
	return l
}

func has(l *look, d Degree, what, why string) bool {
	return slices.ContainsFunc(l.Of(d), func(f Finding) bool {
		return strings.Contains(f.What, what) && strings.Contains(f.Why, why) && (f.Next != "" || d == Changed)
	})
}

// A tree that boots has the newest kernel that can; what is missing is named.
func TestForeignLooks(t *testing.T) {
	l := lookAt(t, foreignTree(t), provision.Component{Name: "etcd", Kind: provision.KindPackages, Packages: []provision.Package{{Name: "etcd-server"}}},
		provision.Component{Name: "database", Kind: provision.KindPackages, Packages: []provision.Package{{Name: "haproxy"}}},
		provision.Component{Name: "board", Kind: provision.KindCompose})
	if refused := l.Of(Refused); len(refused) > 0 {
		t.Fatalf("%+v", refused)
	}
	if l.Family != provision.FamilyDebian || l.Name != "testian-13" || l.Arch != "amd64" || l.Kernel != testKernel || l.initramfs != "boot/initrd.img-"+testKernel || l.Packages["etcd-server"] != "3.5.16-4" || len(l.Packages) != 1 {
		t.Errorf("%+v", l.Foreign)
	}
	for _, c := range []struct{ what, why string }{
		{"drivers in the initramfs", "ahci"}, {"Open vSwitch", "bridges"}, {"libvirt", ""}, {"podman", "board"}, {"component database", "haproxy"}, {"sudo", ""},
	} {
		if !has(l, Lacks, c.what, c.why) {
			t.Errorf("not said: %v in %+v", c, l.Findings)
		}
	}
	for _, what := range []string{"component etcd", "OpenSSH", "kernel module"} {
		if has(l, Lacks, what, "") {
			t.Errorf("%s is not lacking", what)
		}
	}
	if has(l, Lacks, "drivers in the initramfs", "nvme") {
		t.Error("nvme is there")
	}
}

// What keeps a tree from booting is told all at once.
func TestForeignRefusals(t *testing.T) {
	bare := t.TempDir() // an image of a container
	if err := errors.Join(os.MkdirAll(filepath.Join(bare, "etc"), 0o755), os.MkdirAll(filepath.Join(bare, "bin"), 0o755), os.WriteFile(filepath.Join(bare, "etc/os-release"), []byte("ID=alpine\nVERSION_ID=3.20\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	run(t, "cp", "/bin/true", filepath.Join(bare, "bin/sh"))
	l := lookAt(t, bare)
	for _, what := range []string{"kernel", "initramfs", "systemd", "network service", "/etc/passwd"} {
		if !has(l, Refused, what, "") {
			t.Errorf("not refused for %s: %+v", what, l.Findings)
		}
	}
	if err := (&Unfit{l.Foreign}).Error(); strings.Count(err, "\n") < 5 {
		t.Error(err)
	}
	for what, c := range map[string]struct {
		spoil func(at func(string) string) error
		says  string
	}{
		"architecture": {func(at func(string) string) error {
			b, err := os.ReadFile("/bin/true")
			binary.LittleEndian.PutUint16(b[18:], 183) // EM_AARCH64
			return errors.Join(err, os.WriteFile(at("usr/lib/systemd/systemd"), b, 0o755))
		}, "aarch64"},
		"modules of kernel": {func(at func(string) string) error { return os.RemoveAll(at("usr/lib/modules")) }, "modules.dep"},
		"initramfs": {func(at func(string) string) error {
			return os.WriteFile(at("boot/initrd.img-"+testKernel), testInitramfs(t, "loop"), 0o600)
		}, "no driver for any disk"},
		"initramfs of": {func(at func(string) string) error { return os.Remove(at("boot/initrd.img-" + testKernel)) }, "neither"},
		"initramfs ": {func(at func(string) string) error {
			return os.WriteFile(at("usr/lib/modules/"+testKernel+"/modules.builtin"), nil, 0o644)
		}, "ext4"},
		"/sbin/init": {func(at func(string) string) error {
			return errors.Join(os.Remove(at("usr/sbin/init")), os.Symlink("../bin/bash", at("usr/sbin/init")))
		}, "bash"},
		"os-release": {func(at func(string) string) error { return os.Remove(at("etc/os-release")) }, "ID"},
		"network":    {func(at func(string) string) error { return os.Remove(at("usr/lib/systemd/systemd-networkd")) }, "neither"},
	} {
		root := foreignTree(t)
		if err := c.spoil(func(name string) string { return filepath.Join(root, name) }); err != nil {
			t.Fatal(err)
		}
		if l := lookAt(t, root); !has(l, Refused, strings.TrimSpace(what), c.says) || len(l.Of(Refused)) != 1 {
			t.Errorf("%s: %+v", what, l.Of(Refused))
		}
	}
	// A damaged initramfs is not judged.
	root := foreignTree(t)
	if err := os.WriteFile(filepath.Join(root, "boot/initrd.img-"+testKernel), []byte("070701 and no more of it, at all"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l := lookAt(t, root); !has(l, Lacks, "drivers in the initramfs", "unknown") {
		t.Errorf("%+v", l.Findings)
	}
	// Other partitions of a disk hold a part of the system.
	root = foreignTree(t)
	if err := os.WriteFile(filepath.Join(root, "etc/fstab"), []byte("UUID=1 / ext4 defaults 0 1\nUUID=2 /boot ext4 defaults 0 2\n# UUID=3 /usr xfs\nUUID=4 /var xfs defaults 0 0\nUUID=5 none swap sw 0 0\nLABEL=UEFI /boot/efi vfat umask=0077 0 1\ntmpfs /tmp tmpfs defaults 0 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	l = lookAt(t, root)
	l.Findings, l.disk = nil, true
	if l.mounts(); len(l.Findings) != 1 || !has(l, Refused, "/var", "UUID=4") {
		t.Errorf("%+v", l.Findings)
	}
	// A subvolume is one of the root's own file system; what is not mounted by
	// itself is no part of the system.
	if err := os.WriteFile(filepath.Join(root, "etc/fstab"), []byte("UUID=1 / btrfs subvol=@ 0 0\nUUID=1 /home btrfs subvol=@home 0 0\nUUID=2 /var btrfs\nUUID=3 /backup ext4 rw,noauto 0 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	l.Findings = nil
	if l.mounts(); len(l.Findings) != 2 || !has(l, Lacks, "/home", "subvolume") || !has(l, Refused, "/var", "UUID=2") {
		t.Errorf("%+v", l.Findings)
	}
}

// Families by the os-release that the distributions have.
func TestForeignFamilies(t *testing.T) {
	for _, c := range []struct{ text, family, name string }{
		{"PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"13\"\nVERSION=\"13 (trixie)\"\nID=debian\n", "debian", "debian-13"},
		{"PRETTY_NAME=\"Ubuntu 24.04.1 LTS\"\nNAME=\"Ubuntu\"\nVERSION_ID=\"24.04\"\nID=ubuntu\nID_LIKE=debian\n", "debian", "ubuntu-24.04"},
		{"NAME=\"CentOS Stream\"\nVERSION=\"9\"\nID=\"centos\"\nID_LIKE=\"rhel fedora\"\nVERSION_ID=\"9\"\nPLATFORM_ID=\"platform:el9\"\n", "rhel", "centos-9"},
		{"NAME=\"CentOS Linux\"\nID='centos'\nID_LIKE='rhel fedora'\nVERSION_ID='7'\n", "rhel", "centos-7"},
		{"NAME=\"Rocky Linux\"\nID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\n", "rhel", "rocky-9.4"},
		{"NAME=\"openEuler\"\nVERSION=\"22.03 (LTS-SP3)\"\nID=\"openEuler\"\nVERSION_ID=\"22.03\"\n", "rhel", "openeuler-22.03"},
		{"NAME=\"Kylin Linux Advanced Server\"\nVERSION=\"V10 (Sword)\"\nID=\"kylin\"\nVERSION_ID=\"V10\"\n", "rhel", "kylin-v10"},
		{"NAME=\"Something\"\nID=something\nID_LIKE=\"alsonobody ubuntu debian\"\n", "debian", "something"},
		{"NAME=Alpine\nID=alpine\nVERSION_ID=3.20.0\n", "alpine", "alpine-3.20.0"},
		{"# nothing\n", "", ""},
	} {
		r := osRelease(c.text)
		if family, name := familyOf(r, c.family == "debian", c.family == "rhel"), nameOf(r); family != c.family || name != c.name {
			t.Errorf("%q is %s of the family %s", c.text, name, family)
		}
	}
	if got := familyOf(map[string]string{"ID": "kylin"}, true, false); got != provision.FamilyDebian {
		t.Errorf("Kylin's desktop is of the family %s", got)
	}
}

// importLab is a store with a loader to take.
func importLab(t *testing.T) (ImportOptions, *bytes.Buffer) {
	t.Helper()
	s, _ := testStore(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	if err := errors.Join(GenerateKey(file), s.Trust(file+pubSuffix)); err != nil {
		t.Fatal(err)
	}
	key, err := s.readSecretKey(file)
	if err != nil {
		t.Fatal(err)
	}
	var sources []source
	for _, part := range []string{provision.PartBoot, provision.PartBIOS, provision.PartESP, provision.PartRoot} {
		path := filepath.Join(dir, part)
		if err := os.WriteFile(path, []byte("loader's "+part), 0o600); err != nil {
			t.Fatal(err)
		}
		sources = append(sources, source{part, path})
	}
	im := &provision.Image{Format: provision.ImageFormat, Name: "debian-13", Version: "1", Arch: "amd64", Family: provision.FamilyDebian}
	if im.Pack, im.Parts, err = s.pack(t.Context(), sources, func(int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.publish(im.Name, im, "", key); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	return ImportOptions{Store: s, Loader: "debian-13", SecretKey: file, WorkDir: filepath.Join(dir, "work"), Out: &out}, &out
}

// The image in the store verifies, its root is sound and holds the tree, what
// had to change is changed, and the loader is another image's.
func TestForeignImport(t *testing.T) {
	o, out := importLab(t)
	root := foreignTree(t)
	o.File = gptDisk(t, root)
	o.Name = "mine"
	f, err := Import(t.Context(), o)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := o.Store.Verify(t.Context(), "mine", nil); err != nil {
		t.Fatal(err)
	}
	_, im, err := o.Store.Image("mine")
	if err != nil || im.Family != provision.FamilyDebian || im.Kernel != testKernel || im.Arch != "amd64" || im.Origin != "disk" || !strings.HasPrefix(im.Version, "13-") || im.Packages["etcd-server"] == "" {
		t.Errorf("%+v, %v", im, err)
	}
	dir := t.TempDir()
	for _, part := range []string{provision.PartBoot, provision.PartBIOS, provision.PartESP, provision.PartRoot} {
		if err := o.Store.Export(t.Context(), "mine", part, filepath.Join(dir, part)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, part)); part != provision.PartRoot && (err != nil || string(b) != "loader's "+part) {
			t.Errorf("part %s is %q, %v", part, b, err)
		}
	}
	fsImage := filepath.Join(dir, provision.PartRoot)
	run(t, "e2fsck", "-f", "-n", fsImage)
	debugfs := func(request string) string { return run(t, "debugfs", "-R", request, fsImage) }
	for request, want := range map[string]string{
		"stat /vmlinuz":                                      "Fast link dest: \"boot/vmlinuz-" + testKernel,
		"stat /initrd.img":                                   "Fast link dest: \"boot/initrd.img-" + testKernel,
		"cat /boot/grub/grub.cfg":                            "source /boot/grub/platter.cfg",
		"cat /boot/grub/platter.cfg":                         "platter_args",
		"cat /boot/grub/grub.cfg.before-platter":             "theirs",
		"stat /etc/machine-id":                               "Size: 0",
		"ls /etc/ssh":                                        "sshd_config",
		"stat /etc/secret":                                   "User:   101   Group:   102",
		"ea_list /bin/bash":                                  "security.capability",
		"stat /etc/hard":                                     "Links: 2",
		"stat /" + networkdWanted:                            "symlink",
		"cat /etc/network/interfaces":                        "iface lo",
		"cat /etc/network/interfaces.before-platter":         "iface eth0",
		"cat /etc/cloud/cloud-init.disabled":                 "Platter",
		"cat /etc/netplan/50-cloud-init.yaml.before-platter": "network",
		"cat /etc/systemd/network/10-cloud-init-eth0.network.before-platter": "theirs",
		"cat /etc/systemd/network/05-bond.netdev.before-platter":             "theirs",
		"cat /etc/systemd/network/20-wlan.network":                           "comes later",
		"stat /dev/null": "major/minor number: 01:03",
	} {
		if got := debugfs(request); !strings.Contains(got, want) {
			t.Errorf("%s: %s", request, got)
		}
	}
	if got := debugfs("ls /etc/ssh") + debugfs("ls -l /etc/netplan") + debugfs("ls -l /etc/systemd/network"); strings.Contains(got, "ssh_host") ||
		strings.Contains(got, "init.yaml\n") || strings.Contains(got, "eth0.network\n") || strings.Contains(got, "bond.netdev\n") {
		t.Errorf("left in it: %s", got)
	}
	if len(f.Of(Changed)) < 5 || len(f.Of(Refused)) > 0 {
		t.Errorf("%+v", f.Findings)
	}
	if left, err := os.ReadDir(o.WorkDir); err != nil || len(left) != 1 { // the lock
		t.Errorf("scratch left: %v, %v", left, err)
	}

	// The same file makes the same image again. It takes no name of what was built.
	if _, err := Import(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, again, err := o.Store.Image("mine"); err != nil || again.Pack != im.Pack || again.Version != im.Version {
		t.Errorf("imported again it is %s, not %s: %v", again.Version, im.Version, err)
	}
	o.Name = "debian-13"
	_, err = Import(t.Context(), o)
	wantError(t, err, "built here", "--name")
	// Nor where what was built is incomplete: it may come back from a disc.
	if err := os.Remove(o.Store.objectPath(im.Pack.Hash)); err != nil {
		t.Fatal(err)
	}
	o.Name = "mine"
	wantError(t, o.free("mine"), "something called mine", "--name")
	for _, name := range []string{"stack", "boot", "boot/amd64", "Name"} {
		o.Name = name
		_, err = Import(t.Context(), o)
		wantError(t, err, "no name for an image")
	}
	// A check needs neither key nor store, changes nothing and says the same.
	o.Name, o.Check, o.SecretKey, o.Store = "mine", true, "", nil
	again, err := Import(t.Context(), o)
	if err != nil || fmt.Sprint(again.Findings) != fmt.Sprint(f.Findings) {
		t.Errorf("a check finds %+v, %v", again.Findings, err)
	}
}

// A tree with a file that is larger than its file system, most of it a hole,
// keeps it so.
func TestForeignLargeFile(t *testing.T) {
	root := foreignTree(t)
	file := filepath.Join(root, "etc/lastlog")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("last"), 3<<30); err != nil {
		t.Fatal(err)
	}
	f.Close()
	part := filepath.Join(t.TempDir(), "root")
	if err := makeForeignRoot(t.Context(), root, part, time.Unix(1700000000, 0)); err != nil {
		t.Fatal(err)
	}
	run(t, "e2fsck", "-f", "-n", part)
	if out := run(t, "debugfs", "-R", "stat /etc/lastlog", part); !strings.Contains(out, fmt.Sprintf("Size: %d", 3<<30+4)) || !strings.Contains(out, "Blockcount: 8") {
		t.Errorf("%s", out)
	}
	if st, err := os.Stat(part); err != nil || st.Size() > 1<<30 {
		t.Errorf("the file system has %d bytes, %v", st.Size(), err)
	}
	if out := run(t, "debugfs", "-R", "ea_list /bin/bash", part); !strings.Contains(out, "security.capability") {
		t.Errorf("%s", out)
	}
}

// A tree of small files has as many inodes as it needs, in both ways that its
// file system is made; another has as many as always.
func TestForeignManyFiles(t *testing.T) {
	root := foreignTree(t)
	many := filepath.Join(root, "usr/share/many")
	const folders, files = 100, 200 // mkfs.ext4 is slow with large folders
	for i := range folders * files {
		name := filepath.Join(many, fmt.Sprint(i/files), fmt.Sprint(i%files))
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	part := filepath.Join(t.TempDir(), "root")
	for _, large := range []int64{0, maxFilled + 1} {
		if err := os.Truncate(filepath.Join(root, "etc/holes"), large); err != nil {
			t.Fatal(err)
		}
		if err := makeForeignRoot(t.Context(), root, part, time.Unix(1700000000, 0)); err != nil {
			t.Fatal(err)
		}
		if out := run(t, "debugfs", "-R", fmt.Sprintf("stat /usr/share/many/%d/%d", folders-1, files-1), part); !strings.Contains(out, "Type: regular") {
			t.Error(out)
		}
	}
	// What Debian's image of today has.
	if size, count := rootShape(826<<20, 21089); size != 995<<20 || !slices.Equal(count, []string{"-i", "32768"}) {
		t.Errorf("a tree of few files gets %d bytes, %v", size, count)
	}
}

// stopAt is where a person presses Ctrl-C: when that is said.
type stopAt struct {
	said string
	stop func()
}

func (s stopAt) Write(p []byte) (int, error) {
	if strings.Contains(string(p), s.said) {
		s.stop()
	}
	return len(p), nil
}

// An import that is cut off leaves the store as it was and no scratch.
func TestForeignInterrupted(t *testing.T) {
	o, _ := importLab(t)
	root := foreignTree(t)
	disk := gptDisk(t, root)
	qcow := filepath.Join(t.TempDir(), "qcow2")
	run(t, "qemu-img", "convert", "-O", "qcow2", disk, qcow)
	o.File = qcow
	before := listing(t, o.Store.Dir())
	for _, said := range []string{"converting", "copying the tree", "making the root"} {
		ctx, stop := context.WithCancel(t.Context())
		o.Out = stopAt{said, stop}
		_, err := Import(ctx, o)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", said, err)
		}
		wantError(t, err, "the store is as it was")
		if after := listing(t, o.Store.Dir()); after != before {
			t.Errorf("%s: the store has changed:\n%s\n%s", said, before, after)
		}
		if left, err := os.ReadDir(o.WorkDir); err != nil || len(left) != 1 {
			t.Errorf("%s left %v, %v", said, left, err)
		}
		stop()
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), o.WorkDir) {
		t.Errorf("mounts are left: %v", err)
	}
	if free := enoughRoom(t.TempDir(), 1<<60, "the work folder"); free == nil || !strings.Contains(free.Error(), "make room") {
		t.Error(free)
	}
}
