package disk

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf16"

	"platter/provision"
)

// GUID is in the mixed byte order of the disk (UEFI specification 2.10,
// appendix A).
type GUID [16]byte

// NewGUID returns a random GUID (RFC 9562, version 4).
func NewGUID() GUID {
	var g GUID
	rand.Read(g[:]) // never fails, see crypto/rand
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

// ParseGUID reads the textual form, in either case.
func ParseGUID(s string) (GUID, error) {
	var g GUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 || len(s) != 36 {
		return g, fmt.Errorf("%q is not a GUID", s)
	}
	return GUID(swap(b)), nil
}

// String is the textual form in lower case, as Linux writes PARTUUID.
func (g GUID) String() string {
	b := swap(g[:])
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// swap turns the first three fields around: little endian on the disk, big
// endian in text.
func swap(b []byte) []byte {
	return []byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]}
}

// MarshalText and UnmarshalText make a GUID text in JSON.
func (g GUID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (g *GUID) UnmarshalText(b []byte) (err error) {
	*g, err = ParseGUID(string(b))
	return err
}

// Slot is one partition in its place.
type Slot struct {
	Number int // from 1
	Name   string
	Type   GUID
	ID     GUID
	Start  int64 // bytes
	Size   int64 // bytes
	Part   provision.Part
	Grow   bool
}

const (
	mib          = 1 << 20
	gptEntries   = 128
	gptEntrySize = 128
	gptHeader    = 92
)

// Place lays the partitions out on a disk of size bytes and gives each part of
// the image its place. Every partition starts on a full MiB.
func Place(layout []provision.Partition, image *provision.Image, size int64) ([]Slot, *provision.Failure) {
	broken := func(format string, args ...any) *provision.Failure {
		return &provision.Failure{Code: "plan-broken", Message: fmt.Sprintf(format, args...),
			Next: "Build the image again with this version of platter, then start the machine again"}
	}
	var slots []Slot
	at, end := int64(mib), size/mib*mib-mib // the last MiB is for the backup table
	for i, p := range layout {
		typ, err := ParseGUID(p.Type)
		if err != nil {
			return nil, broken("the plan's partition %s has a bad type: %v", p.Name, err)
		}
		s := Slot{Number: i + 1, Name: p.Name, Type: typ, Start: at, Size: p.Size, Grow: p.Grow}
		if p.Size == 0 {
			if i != len(layout)-1 {
				return nil, broken("the plan's partition %s takes the rest of the disk but is not the last", p.Name)
			}
			s.Size = end - at
		}
		if p.Part != "" {
			part, ok := image.Part(p.Part)
			if !ok {
				return nil, broken("image %s has no part %s", image.Name, p.Part)
			}
			s.Part = part
		}
		if s.Size <= 0 || s.Size%mib != 0 || s.Start+s.Size > end || s.Part.Size > s.Size {
			if p.Size > 0 && s.Part.Size > p.Size {
				return nil, broken("part %s of image %s (%s) does not fit its partition of %s", p.Part, image.Name, Bytes(s.Part.Size), Bytes(p.Size))
			}
			return nil, &provision.Failure{
				Code:    "disk-small",
				Message: fmt.Sprintf("the disk (%s) is too small: partition %s needs %s from byte %d on", Bytes(size), p.Name, Bytes(max(s.Part.Size, p.Size)), s.Start),
				Next:    "Choose a larger disk in the rack file, then start the machine again",
			}
		}
		slots = append(slots, s)
		at += s.Size
	}
	return slots, nil
}

// Table is a GPT.
type Table struct {
	Disk  GUID
	Slots []Slot // Part and Grow are not part of a table
}

// encode returns the protective MBR's partition entry and signature in a
// sector of zeros, and primary and backup copies with their offsets (UEFI
// specification 2.10, 5.2.3 and 5.3).
func (t Table) encode(size int64, sector int) (mbr []byte, primary, backup []byte, backupAt int64) {
	ss := int64(sector)
	last := size/ss - 1
	entrySectors := (gptEntries*gptEntrySize + ss - 1) / ss

	entries := make([]byte, entrySectors*ss)
	for i, s := range t.Slots {
		e := entries[i*gptEntrySize:]
		copy(e[0:], s.Type[:])
		copy(e[16:], s.ID[:])
		binary.LittleEndian.PutUint64(e[32:], uint64(s.Start/ss))
		binary.LittleEndian.PutUint64(e[40:], uint64((s.Start+s.Size)/ss-1))
		for j, c := range utf16.Encode([]rune(s.Name)) {
			if j < 36 {
				binary.LittleEndian.PutUint16(e[56+2*j:], c)
			}
		}
	}
	header := func(my, other, at int64) []byte {
		h := make([]byte, ss)
		le := binary.LittleEndian
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x00010000)
		le.PutUint32(h[12:], gptHeader)
		le.PutUint64(h[24:], uint64(my))
		le.PutUint64(h[32:], uint64(other))
		le.PutUint64(h[40:], uint64(2+entrySectors))
		le.PutUint64(h[48:], uint64(last-entrySectors-1))
		copy(h[56:], t.Disk[:])
		le.PutUint64(h[72:], uint64(at))
		le.PutUint32(h[80:], gptEntries)
		le.PutUint32(h[84:], gptEntrySize)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries[:gptEntries*gptEntrySize]))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:gptHeader]))
		return h
	}
	primary = append(header(1, last, 2), entries...)
	backup = append(bytes.Clone(entries), header(last, 1, last-entrySectors)...)

	mbr = make([]byte, ss)
	p := mbr[446:]
	copy(p, []byte{0x00, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	binary.LittleEndian.PutUint32(p[8:], 1)
	binary.LittleEndian.PutUint32(p[12:], uint32(min(last, 0xffffffff)))
	mbr[510], mbr[511] = 0x55, 0xaa
	return mbr, primary, backup, (last - entrySectors) * ss
}

// errNoTable says that there is no valid GPT.
var errNoTable = errors.New("no valid GPT")

// readTable reads the primary GPT, or the backup when the primary is damaged,
// with both checksums verified.
func readTable(v Volume) (Table, error) {
	ss := int64(v.SectorSize())
	t, err := readTableAt(v, ss)
	if err != nil {
		t, err = readTableAt(v, v.Size()/ss*ss-ss)
	}
	return t, err
}

func readTableAt(v Volume, at int64) (Table, error) {
	ss := int64(v.SectorSize())
	h := make([]byte, ss)
	if _, err := v.ReadAt(h, at); err != nil {
		return Table{}, fmt.Errorf("read the partition table: %w", err)
	}
	le := binary.LittleEndian
	if string(h[:8]) != "EFI PART" {
		return Table{}, errNoTable
	}
	sum := le.Uint32(h[16:])
	le.PutUint32(h[16:], 0)
	n, size, entriesAt := int64(le.Uint32(h[80:])), int64(le.Uint32(h[84:])), le.Uint64(h[72:])
	if le.Uint32(h[12:]) != gptHeader || crc32.ChecksumIEEE(h[:gptHeader]) != sum || le.Uint64(h[24:]) != uint64(at/ss) ||
		size != gptEntrySize || n > 1024 || entriesAt > uint64(v.Size()/ss) {
		return Table{}, errNoTable
	}
	entries := make([]byte, n*size)
	if _, err := v.ReadAt(entries, int64(entriesAt)*ss); err != nil {
		return Table{}, errNoTable
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(h[88:]) {
		return Table{}, errNoTable
	}
	t := Table{Disk: GUID(h[56:72])}
	for i := int64(0); i < n; i++ {
		e := entries[i*size:]
		s := Slot{Number: int(i) + 1, Type: GUID(e[:16]), ID: GUID(e[16:32])}
		if s.Type == (GUID{}) {
			continue
		}
		first, end := le.Uint64(e[32:]), le.Uint64(e[40:])
		if first > end || end >= uint64(v.Size()/ss) {
			return Table{}, errNoTable
		}
		s.Start, s.Size = int64(first)*ss, int64(end-first+1)*ss
		var name []uint16
		for j := 56; j < gptEntrySize; j += 2 {
			c := le.Uint16(e[j:])
			if c == 0 {
				break
			}
			name = append(name, c)
		}
		s.Name = string(utf16.Decode(name))
		t.Slots = append(t.Slots, s)
	}
	return t, nil
}
