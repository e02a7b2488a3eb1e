package disk

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Disk is one whole disk of the machine.
type Disk struct {
	Name       string   // kernel name: sda, nvme0n1
	Path       string   // /dev/sda
	Links      []string // names as in /dev/disk/by-path: pci-0000:00:1f.2-ata-1
	Serial     string
	WWN        string // naa or eui identifier in lower-case hex without prefix
	Model      string
	Size       int64 // bytes
	SectorSize int   // logical, bytes
	Removable  bool
	ReadOnly   bool
	InUse      string // what uses it, for people; empty: nothing
}

// String describes the disk on one line, for messages and logs.
func (d Disk) String() string {
	s := d.Path + " (" + Bytes(d.Size)
	for _, f := range []struct{ name, value string }{
		{"model", d.Model}, {"serial", d.Serial}, {"wwn", d.WWN}, {"path", strings.Join(d.Links, " ")},
	} {
		if f.value != "" {
			s += ", " + f.name + " " + f.value
		}
	}
	return s + ")"
}

// Bytes prints a size for people, in the powers of ten that disks are sold in.
func Bytes(n int64) string {
	units := []string{"B", "kB", "MB", "GB", "TB", "PB"}
	f, i := float64(n), 0
	for f >= 1000 && i < len(units)-1 {
		f, i = f/1000, i+1
	}
	return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[i]
}

// notDisks are block devices that never hold an install: optical and floppy
// drives, memory, and devices made of other devices.
var notDisks = []string{"loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtdblock", "drbd", "zd"}

// List returns the machine's disks by name. root is where sys, dev and proc
// are: "/" on a machine. Devices without a medium are left out.
func List(root string) ([]Disk, error) {
	dir := filepath.Join(root, "sys/block")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	links := byPathLinks(filepath.Join(root, "dev/disk/by-path"))
	used := mountedDevices(filepath.Join(root, "proc"))
	var disks []Disk
	for _, e := range entries {
		name := e.Name()
		if slices.ContainsFunc(notDisks, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		d := read(dir, name, used)
		if d.Size == 0 {
			continue
		}
		d.Links = append(d.Links, links[name]...)
		slices.Sort(d.Links)
		d.Links = slices.Compact(d.Links)
		disks = append(disks, d)
	}
	return disks, nil
}

func read(dir, name string, used map[string]string) Disk {
	at := func(parts ...string) string {
		b, _ := os.ReadFile(filepath.Join(append([]string{dir, name}, parts...)...))
		return strings.Join(strings.Fields(string(bytes.ReplaceAll(b, []byte{0}, nil))), " ")
	}
	first := func(values ...string) string {
		for _, v := range values {
			if v != "" {
				return v
			}
		}
		return ""
	}
	sectors, _ := strconv.ParseInt(at("size"), 10, 64)
	d := Disk{
		Name: name, Path: "/dev/" + name, Size: sectors * 512, SectorSize: 512,
		Model:     at("device/model"),
		Removable: at("removable") == "1", ReadOnly: at("ro") == "1",
		// virtio-blk, NVMe, SCSI and SATA keep the serial in different places.
		Serial: first(at("serial"), at("device/serial"), vpdSerial(filepath.Join(dir, name, "device/vpd_pg80"))),
		WWN:    NormalWWN(first(at("wwid"), at("device/wwid"))),
	}
	if n, err := strconv.Atoi(at("queue/logical_block_size")); err == nil && n >= 512 {
		d.SectorSize = n
	}
	if real, err := filepath.EvalSymlinks(filepath.Join(dir, name)); err == nil {
		if l := pathLink(real); l != "" {
			d.Links = append(d.Links, l)
		}
	}
	d.InUse = inUse(dir, name, used)
	return d
}

// vpdSerial reads the unit serial number page of SCSI (SPC-4, 7.8.15): four
// bytes of header, then text.
func vpdSerial(path string) string {
	b, err := os.ReadFile(path)
	if err != nil || len(b) < 4 {
		return ""
	}
	n := min(int(b[2])<<8|int(b[3]), len(b)-4)
	return strings.TrimSpace(strings.Trim(string(b[4:4+n]), "\x00"))
}

// NormalWWN brings the spellings of a world wide name to one: lower case
// without naa., eui., 0x or wwn-. Vendor designators (t10.) are no WWN.
func NormalWWN(s string) string {
	s = strings.ToLower(strings.TrimSpace(s))
	if strings.HasPrefix(s, "t10.") || strings.HasPrefix(s, "nvme.") {
		return ""
	}
	for _, p := range []string{"wwn-", "naa.", "eui.", "uuid.", "0x"} {
		s = strings.TrimPrefix(s, p)
	}
	return s
}

// pathLink makes the by-path name, as udev's path_id does, of a disk's real
// sysfs folder. The initramfs has no udev.
func pathLink(real string) string {
	parts := strings.Split(real, "/")
	pci, rest := "", []string(nil)
	for i, p := range parts {
		if len(p) == 12 && p[4] == ':' && p[7] == ':' && p[10] == '.' {
			pci, rest = p, parts[i+1:]
		}
	}
	if pci == "" {
		return ""
	}
	link, usb := "pci-"+pci, false
	for i, p := range rest {
		switch {
		case strings.HasPrefix(p, "usb") && i+1 < len(rest):
			usb = true
		case usb && strings.Contains(p, ":") && strings.Contains(p, "-") && !strings.Contains(link, "-usb-"):
			// 1-2:1.0 is port 2, configuration 1, interface 0.
			link += "-usb-0:" + p[strings.Index(p, "-")+1:]
		case strings.HasPrefix(p, "ata") && len(p) > 3:
			if n := ataPort(parts, p); n != "" {
				return link + "-ata-" + n
			}
		case p == "block" && i > 0 && strings.Count(rest[i-1], ":") == 3:
			// The host number depends on the order of discovery: udev counts
			// from the controller's first host, which for one host is 0.
			_, tail, _ := strings.Cut(rest[i-1], ":")
			return link + "-scsi-0:" + tail
		case p == "nvme" && i+2 < len(rest):
			ns := rest[i+2]
			if j := strings.LastIndex(ns, "n"); j > 0 {
				return link + "-nvme-" + ns[j+1:]
			}
		}
	}
	return link
}

// ataPort returns the port's number on its controller.
func ataPort(parts []string, ata string) string {
	dir := strings.Join(parts[:slices.Index(parts, ata)+1], "/")
	b, err := os.ReadFile(filepath.Join(dir, "ata_port", ata, "port_no"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// byPathLinks maps a kernel name to the links that udev made for it.
func byPathLinks(dir string) map[string][]string {
	links := map[string][]string{}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			name := filepath.Base(target)
			links[name] = append(links[name], e.Name())
		}
	}
	return links
}

// mountedDevices maps major:minor to what is mounted or swapped there.
func mountedDevices(proc string) map[string]string {
	used := map[string]string{}
	b, _ := os.ReadFile(filepath.Join(proc, "self/mountinfo"))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			used[f[2]] = "mounted on " + f[4]
		}
	}
	b, _ = os.ReadFile(filepath.Join(proc, "swaps"))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], "/dev/") {
			used[strings.TrimPrefix(f[0], "/dev/")] = "swap"
		}
	}
	return used
}

// inUse tells what uses the disk or one of its partitions.
func inUse(dir, name string, used map[string]string) string {
	devices := []string{name}
	if entries, err := os.ReadDir(filepath.Join(dir, name)); err == nil {
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), name) {
				devices = append(devices, name+"/"+e.Name())
			}
		}
	}
	for _, d := range devices {
		if b, err := os.ReadFile(filepath.Join(dir, d, "dev")); err == nil {
			if u := used[strings.TrimSpace(string(b))]; u != "" {
				return u
			}
		}
		if u := used[filepath.Base(d)]; u != "" {
			return u
		}
		if holders, err := os.ReadDir(filepath.Join(dir, d, "holders")); err == nil && len(holders) > 0 {
			return "part of " + holders[0].Name()
		}
	}
	return ""
}
