package disk

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/provision"
)

func TestSelect(t *testing.T) {
	a := Disk{Name: "sda", Path: "/dev/sda", Links: []string{"pci-0000:00:1f.2-ata-1"}, Serial: "AAA", WWN: "5000c500a1b2c3d4", Model: "ST4000", Size: 4e12}
	b := Disk{Name: "nvme0n1", Path: "/dev/nvme0n1", Links: []string{"pci-0000:01:00.0-nvme-1"}, Serial: "BBB", Model: "Fast 1T", Size: 1e12}
	usb := Disk{Name: "sdb", Path: "/dev/sdb", Serial: "USB", Size: 16e9, Removable: true}
	ro := Disk{Name: "sdc", Path: "/dev/sdc", Serial: "RO", Size: 1e12, ReadOnly: true}
	used := Disk{Name: "sdd", Path: "/dev/sdd", Serial: "USED", Size: 1e12, InUse: "mounted on /"}
	all := []Disk{a, b, usb, ro, used}
	for _, c := range []struct {
		rule  provision.DiskRule
		disks []Disk
		want  string // name, or a failure's code
	}{
		{provision.DiskRule{}, []Disk{a}, "sda"},
		{provision.DiskRule{}, []Disk{a, usb, ro, used}, "sda"},
		{provision.DiskRule{}, all, "disk-ambiguous"},
		{provision.DiskRule{}, []Disk{usb, ro, used}, "disk-none"},
		{provision.DiskRule{}, nil, "disk-none"},
		{provision.DiskRule{Serial: "BBB"}, all, "nvme0n1"},
		{provision.DiskRule{Serial: " bbb "}, all, "nvme0n1"},
		{provision.DiskRule{Serial: "BB"}, all, "disk-none"},
		{provision.DiskRule{Serial: "USB"}, all, "sdb"},
		{provision.DiskRule{Serial: "RO"}, all, "disk-none"},
		{provision.DiskRule{Serial: "USED"}, all, "disk-none"},
		{provision.DiskRule{WWN: "0x5000C500A1B2C3D4"}, all, "sda"},
		{provision.DiskRule{WWN: "naa.5000c500a1b2c3d4"}, all, "sda"},
		{provision.DiskRule{Path: "/dev/sd?"}, all, "disk-ambiguous"},
		{provision.DiskRule{Path: "pci-0000:00:1f.2-*"}, all, "sda"},
		{provision.DiskRule{Path: "/dev/disk/by-path/pci-0000:01:*"}, all, "nvme0n1"},
		{provision.DiskRule{Model: "ST*"}, all, "sda"},
		{provision.DiskRule{MinSize: 2e12}, all, "sda"},
		{provision.DiskRule{MaxSize: 1e12}, all, "nvme0n1"},
		{provision.DiskRule{MinSize: 1e12, MaxSize: 1e12, Serial: "AAA"}, all, "disk-none"},
		{provision.DiskRule{Path: "[", Serial: "AAA"}, all, "disk-none"},
	} {
		d, f := Select(c.rule, c.disks)
		got := d.Name
		if f != nil {
			got = f.Code
			for _, seen := range c.disks {
				if !strings.Contains(f.Message, seen.Path) {
					t.Errorf("%+v: the message does not list %s: %s", c.rule, seen.Path, f.Message)
				}
			}
			if f.Next == "" || f.Closed {
				t.Errorf("%+v: %+v", c.rule, f)
			}
		}
		if got != c.want {
			t.Errorf("%+v: %s instead of %s", c.rule, got, c.want)
		}
	}
}

// List reads what the kernel shows of different controllers.
func TestList(t *testing.T) {
	root := t.TempDir()
	put := func(path, content string) {
		t.Helper()
		p := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	block := func(name, device, size string) string {
		t.Helper()
		dir := "sys/devices/" + device + "/block/" + name
		put(dir+"/size", size+"\n")
		if err := os.MkdirAll(filepath.Join(root, "sys/block"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../devices/"+device+"/block/"+name, filepath.Join(root, "sys/block", name)); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../..", filepath.Join(root, dir, "device")); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	vda := block("vda", "pci0000:00/0000:00:04.0/virtio2", "8388608")
	put(vda+"/serial", "platter-1")
	put(vda+"/dev", "254:0\n")
	put(vda+"/vda1/dev", "254:1\n")
	sda := block("sda", "pci0000:00/0000:00:1f.2/ata3/host2/target2:0:0/2:0:0:0", "100")
	put("sys/devices/pci0000:00/0000:00:1f.2/ata3/ata_port/ata3/port_no", "1\n")
	put(sda+"/../../model", "QEMU HARDDISK   \n")
	put(sda+"/../../wwid", "naa.5000C500DEADBEEF\n")
	put(sda+"/../../vpd_pg80", "\x00\x80\x00\x08QM00001 ")
	put(sda+"/queue/logical_block_size", "4096\n")
	put(sda+"/holders/md0", "")
	put(sda+"/ro", "1\n")
	sdb := block("sdb", "pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0/host3/target3:0:0/3:0:0:0", "7")
	put(sdb+"/removable", "1\n")
	block("sr0", "pci0000:00/0000:00:1f.2/ata4/host4/target4:0:0/4:0:0:0", "1000")
	block("sdc", "pci0000:00/0000:00:1f.2/ata5/host5/target5:0:0/5:0:0:0", "0") // card reader
	nvme := "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1"
	put(nvme+"/size", "200")
	put(nvme+"/wwid", "eui.0025385B71B00000")
	put(nvme+"/../serial", "S4EV       \n")
	put(nvme+"/../model", "Samsung   SSD\n")
	if err := os.Symlink("../devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1", filepath.Join(root, "sys/block/nvme0n1")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..", filepath.Join(root, nvme, "device")); err != nil {
		t.Fatal(err)
	}
	put("proc/self/mountinfo", "22 1 254:1 / /srv rw - ext4 /dev/vda1 rw\n")
	if err := os.MkdirAll(filepath.Join(root, "dev/disk/by-path"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../vda", filepath.Join(root, "dev/disk/by-path/virtio-pci-0000:00:04.0")); err != nil {
		t.Fatal(err)
	}

	disks, err := List(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range disks {
		got = append(got, strings.Join([]string{d.Name, d.Serial, d.WWN, d.Model, strings.Join(d.Links, "+"), Bytes(d.Size), d.InUse}, "|"))
	}
	want := []string{
		"nvme0n1|S4EV|0025385b71b00000|Samsung SSD|pci-0000:01:00.0-nvme-1|102.4 kB|",
		"sda|QM00001|5000c500deadbeef|QEMU HARDDISK|pci-0000:00:1f.2-ata-1|51.2 kB|part of md0",
		"sdb||||pci-0000:00:14.0-usb-0:2:1.0-scsi-0:0:0:0|3.6 kB|",
		"vda|platter-1|||pci-0000:00:04.0+virtio-pci-0000:00:04.0|4.3 GB|mounted on /srv",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if disks[1].SectorSize != 4096 || !disks[1].ReadOnly || !disks[2].Removable {
		t.Errorf("%+v", disks)
	}
}

func TestMarkerCopies(t *testing.T) {
	d := newFlakyDisk(2 * mib)
	m := Marker{Rack: "r", Node: "n", State: Writing, Disk: NewGUID(), Frames: []byte{1, 2}}
	for want := uint64(1); want < 6; want++ {
		if err := writeMarker(d, &m); err != nil {
			t.Fatal(err)
		}
		got, ok, err := readMarker(d)
		if err != nil || !ok || got.Seq != want || got.Disk != m.Disk {
			t.Fatalf("%+v %v %v", got, ok, err)
		}
	}
	// The newer copy is torn: the older counts.
	d.live[markerA+100] ^= 1
	if got, ok, _ := readMarker(d); !ok || got.Seq != 4 {
		t.Errorf("after a torn write: %+v, %v", got, ok)
	}
}

func FuzzMarker(f *testing.F) {
	b, err := Marker{Rack: "r", Node: "n", Frames: []byte{1}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("PLATTER1\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, ok := decodeMarker(b)
		if !ok {
			return
		}
		again, err := m.encode()
		if err != nil {
			return // a bitmap that is too large to have been written by us
		}
		if n, ok := decodeMarker(again); !ok || n.Node != m.Node || n.Seq != m.Seq {
			t.Fatalf("%+v became %+v", m, n)
		}
	})
}

func FuzzTable(f *testing.F) {
	_, primary, _, _ := Table{Disk: NewGUID(), Slots: []Slot{{Number: 1, Name: "x", Type: NewGUID(), Start: mib, Size: mib}}}.encode(3*mib, 512)
	f.Add(primary)
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newFlakyDisk(3 * mib)
		copy(d.live[512:], b)
		table, err := readTable(d)
		for _, s := range table.Slots {
			if err == nil && (s.Start < 0 || s.Size <= 0 || s.Start+s.Size > 3*mib) {
				t.Fatalf("a partition outside the disk: %+v", s)
			}
		}
		if _, err := Inspect(newFlakyDisk(4 * mib)); err != nil {
			t.Fatal(err)
		}
	})
}
