package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"platter/provision"
)

// These tests need root: loop devices, mounts.

// realImage has a real FAT and a real ext4 file system that holds one file.
func realImage(t *testing.T) testImage {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := os.MkdirAll(filepath.Join(tree, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "etc/hello"), pattern(9, 3*mib, 0, 0), 0o644); err != nil {
		t.Fatal(err)
	}
	file := func(name string, size int64) string {
		p := filepath.Join(dir, name)
		f, err := os.Create(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		return p
	}
	esp, root := file("esp", 64*mib), file("root", 48*mib)
	tool(t, "mkfs.vfat", "-F", "32", "-s", "1", esp)
	tool(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "resize=4294967295", "-d", tree, root)
	read := func(p string) []byte {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return makeImage(t, provision.FrameSize, map[string][]byte{
		provision.PartBoot: pattern(1, 440, 0, 0),
		provision.PartBIOS: pattern(2, 70*512, 0, 0),
		provision.PartESP:  read(esp),
		provision.PartRoot: read(root),
	})
}

func realPlan() *provision.Plan {
	p := smallPlan("node1", 1, "real")
	p.Layout = provision.DefaultLayout()
	return p
}

// diskFile makes a file full of old data, that nothing may leave behind.
func diskFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	junk := bytes.Repeat([]byte("old data"), mib/8)
	for at := int64(0); at < size; at += mib {
		if _, err := f.WriteAt(junk, at); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// attach shows the file as a loop device that reads partition tables.
func attach(t *testing.T, file string, sector string) string {
	t.Helper()
	dev := strings.TrimSpace(tool(t, "losetup", "--find", "--show", "--partscan", "--sector-size", sector, file))
	t.Cleanup(func() { tool(t, "losetup", "--detach", dev) })
	return dev
}

func TestInstallOnRealDisks(t *testing.T) {
	im := realImage(t)
	for _, c := range []struct {
		name string
		open func(t *testing.T, file string) string
	}{
		{"file", func(_ *testing.T, file string) string { return file }},
		{"loop device", func(t *testing.T, file string) string { return attach(t, file, "512") }},
		{"loop device with 4 KiB sectors", func(t *testing.T, file string) string { return attach(t, file, "4096") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := diskFile(t, 144*mib)
			path := c.open(t, file)
			installOn(t, path, im)
			judge(t, file, path, im)
		})
	}
}

func installOn(t *testing.T, path string, im testImage) {
	t.Helper()
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := Open(path); err == nil {
		t.Fatal("the disk was opened twice")
	}
	plan := realPlan()
	if _, err := Begin(d, plan, im.manifest); !isCode(err, "disk-foreign") {
		t.Fatalf("old data: %v", err)
	}
	plan.Disk.Wipe = true
	in, err := Begin(d, plan, im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	var most, total atomic.Int64
	if err := in.Write(context.Background(), memSource{im}, func(done, of int64) {
		total.Store(of)
		for old := most.Load(); done > old && !most.CompareAndSwap(old, done); old = most.Load() {
		}
	}); err != nil {
		t.Fatal(err)
	}
	if most.Load() != total.Load() || total.Load() == 0 {
		t.Errorf("progress ended at %d of %d", most.Load(), total.Load())
	}
	root, _ := in.Slot(provision.PartRoot)
	dir := t.TempDir()
	unmount, err := d.Mount(root, dir, "ext4")
	if err != nil {
		t.Fatal(err)
	}
	checkGrow(t, dir, root.Size)
	if b, err := os.ReadFile(filepath.Join(dir, "etc/hello")); err != nil || !bytes.Equal(b, pattern(9, 3*mib, 0, 0)) {
		t.Errorf("the file on the root differs: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "etc/new"), []byte("new"), 0o600); err != nil {
		t.Error(err)
	}
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	if bootable(d) {
		t.Error("the disk boots before the last step")
	}
	if err := in.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	content, err := Inspect(d)
	if err != nil || content.Marker == nil || content.Marker.State != Complete {
		t.Errorf("after the install: %+v, %v", content, err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
}

// checkGrow grows the file system. Where root lacks CAP_SYS_RESOURCE, as in
// many containers, the kernel refuses that and Grow must say so.
func checkGrow(t *testing.T, dir string, size int64) {
	t.Helper()
	head, data := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
	if err := unix.Capget(&head, &data[0]); err != nil {
		t.Fatal(err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		if err := Grow(dir, size); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), dir) {
			t.Errorf("growing without the right to: %v", err)
		}
		return
	}
	for range 2 {
		if err := Grow(dir, size); err != nil {
			t.Error(err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Error(err)
	} else if got := int64(st.Blocks) * st.Bsize; got < size*9/10 {
		t.Errorf("after growing the file system has %d of %d bytes", got, size)
	}
}

// judge asks the foreign tools.
func judge(t *testing.T, file, path string, im testImage) {
	t.Helper()
	if out := tool(t, "sfdisk", "--verify", path); !strings.Contains(out, "No errors detected") {
		t.Errorf("sfdisk: %s", out)
	}
	if out := tool(t, "sgdisk", "--verify", path); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk: %s", out)
	}
	dump := tool(t, "sfdisk", "--dump", path)
	for _, want := range []string{provision.TypeBIOSBoot, provision.TypeESP, provision.TypeRootX64, `name="platter-root"`} {
		if !strings.Contains(dump, want) {
			t.Errorf("sfdisk does not show %s:\n%s", want, dump)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	part := func(name string, at, size int64) string {
		p := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(p, b[at:at+size], 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	tool(t, "dosfsck", "-n", part("esp", 2*mib, 64*mib))
	root := part("root", 66*mib, int64(len(b))-67*mib)
	tool(t, "e2fsck", "-f", "-n", root)
	if out := tool(t, "debugfs", "-R", "cat /etc/new", root); !strings.Contains(out, "new") {
		t.Errorf("the new file is not there: %s", out)
	}
	if !bytes.Equal(b[2*mib:66*mib], im.raw[provision.PartESP]) {
		t.Error("the ESP differs from the image, holes or not")
	}
	// The BIOS finds the loader and the loader its other sectors.
	sector := int64(512)
	if bytes.Equal(b[4096:4104], []byte("EFI PART")) {
		sector = 4096
	}
	if at := binary.LittleEndian.Uint64(b[bootKernelSector:]); int64(at)*sector != mib {
		t.Errorf("the boot code looks for the loader in sector %d", at)
	}
	if at, n := binary.LittleEndian.Uint64(b[mib+coreBlocklist:]), binary.LittleEndian.Uint16(b[mib+coreBlocklist+8:]); at != mib/512+1 || n != 69 {
		t.Errorf("the loader looks for %d sectors from %d", n, at)
	}
}

// A disk that something uses is refused.
func TestOpenRefusesUsedDisk(t *testing.T) {
	file := diskFile(t, 64*mib)
	dev := attach(t, file, "512")
	tool(t, "mkfs.ext4", "-q", "-F", dev)
	dir := t.TempDir()
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	if d, err := Open(dev); err == nil {
		d.Close()
		t.Fatal("a mounted disk was opened")
	} else if !strings.Contains(err.Error(), "something uses it") {
		t.Error(err)
	}
	if _, err := Open(os.DevNull); err == nil {
		t.Error("/dev/null was opened as a disk")
	}
}

// GPTs of every size are what the foreign tools expect, and are read back.
func TestTable(t *testing.T) {
	for _, size := range []int64{8 * mib, 100*mib + 512*7, 3 << 40} {
		path := filepath.Join(t.TempDir(), "gpt")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		f.Close()
		d, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		slots, failure := Place([]provision.Partition{{Name: "one", Type: provision.TypeBIOSBoot, Size: mib}, {Name: "ünï", Type: provision.TypeRootX64}}, &provision.Image{}, size)
		if failure != nil {
			t.Fatal(failure)
		}
		for i := range slots {
			slots[i].ID = NewGUID()
		}
		want := Table{Disk: NewGUID(), Slots: slots}
		mbr, primary, backup, at := want.encode(size, 512)
		for off, b := range map[int64][]byte{0: mbr, 512: primary, at: backup} {
			if _, err := d.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
		}
		if out := tool(t, "sgdisk", "--verify", path); !strings.Contains(out, "No problems found") {
			t.Errorf("%d: sgdisk: %s", size, out)
		}
		tool(t, "sfdisk", "--verify", path)
		if out := strings.ToLower(tool(t, "sfdisk", "--dump", path)); !strings.Contains(out, want.Disk.String()) || !strings.Contains(out, slots[1].ID.String()) {
			t.Errorf("%d: sfdisk sees other identifiers than %s, %s: %s", size, want.Disk, slots[1].ID, out)
		}
		check := func(when string) {
			got, err := readTable(d)
			if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%d: %s: %v, %v", size, when, got, err)
			}
		}
		check("as written")
		if err := d.Zero(512, 4096); err != nil {
			t.Fatal(err)
		}
		check("from the backup")
		d.Close()
	}
}

func TestPlace(t *testing.T) {
	im := &provision.Image{Name: "x", Parts: []provision.Part{{Name: provision.PartRoot, Size: 10 * mib}, {Name: provision.PartESP, Size: 65 * mib}}}
	root := provision.Partition{Name: "root", Type: provision.TypeRootX64, Part: provision.PartRoot}
	for _, c := range []struct {
		layout []provision.Partition
		size   int64
		code   string
	}{
		{[]provision.Partition{root}, 12 * mib, ""},
		{[]provision.Partition{root}, 12*mib - 1, "disk-small"},
		{[]provision.Partition{root, root}, 100 * mib, "plan-broken"},
		{[]provision.Partition{{Name: "esp", Type: provision.TypeESP, Size: 64 * mib, Part: provision.PartESP}}, 1000 * mib, "plan-broken"},
		{[]provision.Partition{{Name: "a", Type: provision.TypeESP, Size: 64 * mib}, root}, 70 * mib, "disk-small"},
		{[]provision.Partition{{Name: "a", Type: "x"}}, 70 * mib, "plan-broken"},
		{[]provision.Partition{{Name: "a", Type: provision.TypeESP, Part: "nothing"}}, 70 * mib, "plan-broken"},
	} {
		slots, f := Place(c.layout, im, c.size)
		if (f == nil) != (c.code == "") || f != nil && f.Code != c.code {
			t.Errorf("%+v on %d: %v", c.layout, c.size, f)
		}
		if f == nil && (slots[0].Start != mib || slots[0].Size != 10*mib) {
			t.Errorf("placed at %d, %d", slots[0].Start, slots[0].Size)
		}
	}
}
