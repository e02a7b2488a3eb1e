package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"platter/provision"
)

// Content is what was found on a disk.
type Content struct {
	Marker *Marker // an install of ours; nil: none
	// Foreign describes data that Platter did not write; empty: none.
	Foreign string
}

// Blank tells whether the disk holds nothing.
func (c Content) Blank() bool { return c.Marker == nil && c.Foreign == "" }

// Inspect tells what is on the disk, from its first and last MiB.
func Inspect(v Volume) (Content, error) {
	head, tail := aligned(mib), aligned(mib)
	if v.Size() < 4*mib {
		return Content{}, fmt.Errorf("a disk of %s is too small for anything", Bytes(v.Size()))
	}
	if _, err := v.ReadAt(head, 0); err != nil {
		return Content{}, fmt.Errorf("read the start of the disk: %w", err)
	}
	end := v.Size() / 4096 * 4096
	if _, err := v.ReadAt(tail, end-mib); err != nil {
		return Content{}, fmt.Errorf("read the end of the disk: %w", err)
	}
	m, ours, err := readMarker(v)
	if err != nil {
		return Content{}, err
	}
	t, terr := readTable(v)
	switch {
	case ours && terr == nil && t.Disk != m.Disk:
		// Someone else has partitioned the disk since.
		return Content{Foreign: describeTable(t)}, nil
	case ours && terr != nil && head[510] == 0x55 && head[511] == 0xaa && head[450] != 0xee:
		return Content{Foreign: "an MBR partition table"}, nil
	case ours:
		return Content{Marker: &m}, nil
	case terr == nil:
		return Content{Foreign: describeTable(t)}, nil
	case zero(head) && zero(tail):
		return Content{}, nil
	}
	return Content{Foreign: describe(head, tail)}, nil
}

func describeTable(t Table) string {
	var names []string
	for _, s := range t.Slots {
		names = append(names, fmt.Sprintf("%s of %s", orElse(s.Name, "an unnamed one"), Bytes(s.Size)))
	}
	if len(names) == 0 {
		return "a GPT without partitions"
	}
	return "a GPT with partitions " + strings.Join(names, ", ")
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// signatures name what commonly lies at the start of a disk.
var signatures = []struct {
	at          int
	magic, what string
}{
	{0, "LUKS\xba\xbe", "a LUKS volume"},
	{0, "XFSB", "an XFS file system"},
	{512, "LABELONE", "an LVM physical volume"},
	{0x438, "\x53\xef", "an ext file system"},
	{0x10040, "_BHRfS_M", "a Btrfs file system"},
	{4086, "SWAPSPACE2", "swap space"},
	{4096, "\xfc\x4e\x2b\xa9", "a member of a Linux RAID"},
	{0, "\xfc\x4e\x2b\xa9", "a member of a Linux RAID"},
	{3, "NTFS", "an NTFS file system"},
	{0x8001, "CD001", "an ISO 9660 image"},
	{512, "EFI PART", "a damaged GPT"},
	{4096, "EFI PART", "a damaged GPT"},
	{54, "FAT", "a FAT file system"},
	{82, "FAT", "a FAT file system"},
	{510, "\x55\xaa", "an MBR partition table"},
}

// describe names what a disk that is not blank holds.
func describe(head, tail []byte) string {
	for _, s := range signatures {
		if string(head[s.at:s.at+len(s.magic)]) == s.magic {
			return s.what
		}
	}
	for i := 0; i+4 <= len(tail); i += 512 {
		if binary.LittleEndian.Uint32(tail[i:]) == 0xa92b4efc {
			return "a member of a Linux RAID"
		}
	}
	return "data of an unknown kind"
}

// Permit decides whether plan may replace what is on the disk, and whether it
// takes up an install that was cut off instead of starting anew.
func Permit(c Content, plan *provision.Plan) (resume bool, f *provision.Failure) {
	m := c.Marker
	wipe := "If that may be erased, set wipe for this node's disk in the rack file, then start the machine again"
	switch {
	case c.Foreign != "" && !plan.Disk.Wipe:
		return false, &provision.Failure{Code: "disk-foreign",
			Message: fmt.Sprintf("the disk holds %s, which Platter did not write", c.Foreign), Next: wipe}
	case m == nil:
		return false, nil
	case m.same(plan):
		return true, nil
	case plan.Disk.Wipe:
		return false, nil
	case m.Rack != plan.Rack || m.Node != plan.Node:
		return false, &provision.Failure{Code: "disk-foreign",
			Message: fmt.Sprintf("the disk belongs to node %s of rack %s (install %d, %s)", m.Node, m.Rack, m.Generation, m.State), Next: wipe}
	case m.State == Writing && m.Generation <= plan.Generation:
		return false, nil // half an install of this node: nothing to lose
	case plan.Reinstall && m.Generation <= plan.Generation:
		return false, nil
	}
	return false, &provision.Failure{Code: "disk-installed",
		Message: fmt.Sprintf("the disk already holds install %d of %s and this plan (install %d) does not replace it", m.Generation, m.Node, plan.Generation),
		Next:    fmt.Sprintf("To install it anew run 'platter node reinstall %s' on the disc host, then start the machine again", plan.Node)}
}

// zero tells whether b is all zeros.
func zero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}
