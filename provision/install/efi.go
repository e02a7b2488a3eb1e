package install

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"golang.org/x/sys/unix"

	"platter/provision/disk"
)

// LoadOption is one boot entry of UEFI, an EFI_LOAD_OPTION (UEFI specification
// 2.10, 3.1.3), of a file on a GPT partition.
type LoadOption struct {
	Active      bool
	Description string
	Partition   int       // number
	Start       uint64    // first sector
	Size        uint64    // sectors
	ID          disk.GUID // of the partition
	File        string    // with backslashes
	Data        []byte    // what follows; kept as it is
}

const (
	loadOptionActive = 1
	// Device path nodes, 10.3.5.1 and 10.3.5.4.
	mediaPath     = 4
	hardDriveNode = 1
	filePathNode  = 4
	endPath       = 0x7f
	hardDriveSize = 42
)

// Encode returns the value of a Boot#### variable.
func (o LoadOption) Encode() []byte {
	le := binary.LittleEndian
	hd := make([]byte, hardDriveSize)
	hd[0], hd[1] = mediaPath, hardDriveNode
	le.PutUint16(hd[2:], hardDriveSize)
	le.PutUint32(hd[4:], uint32(o.Partition))
	le.PutUint64(hd[8:], o.Start)
	le.PutUint64(hd[16:], o.Size)
	copy(hd[24:], o.ID[:])
	hd[40], hd[41] = 2, 2 // GPT, signature is a GUID
	name := utf16z(o.File)
	path := append(hd, mediaPath, filePathNode)
	path = le.AppendUint16(path, uint16(4+len(name)))
	path = append(path, name...)
	path = append(path, endPath, 0xff, 4, 0)

	attributes := uint32(0)
	if o.Active {
		attributes = loadOptionActive
	}
	b := le.AppendUint32(nil, attributes)
	b = le.AppendUint16(b, uint16(len(path)))
	b = append(b, utf16z(o.Description)...)
	return append(append(b, path...), o.Data...)
}

func utf16z(s string) []byte {
	var b []byte
	for _, c := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	return b
}

// takeUTF16z reads text up to its zero and returns what follows.
func takeUTF16z(b []byte) (string, []byte, bool) {
	var units []uint16
	for len(b) >= 2 {
		c := binary.LittleEndian.Uint16(b)
		b = b[2:]
		if c == 0 {
			return string(utf16.Decode(units)), b, true
		}
		units = append(units, c)
	}
	return "", nil, false
}

// ParseLoadOption reads any boot entry. Of entries that are not a file on a
// GPT partition only the description is known; ok tells whether it is one.
func ParseLoadOption(b []byte) (o LoadOption, ok bool) {
	le := binary.LittleEndian
	if len(b) < 6 {
		return o, false
	}
	o.Active = le.Uint32(b)&loadOptionActive != 0
	pathLen := int(le.Uint16(b[4:]))
	var good bool
	if o.Description, b, good = takeUTF16z(b[6:]); !good || len(b) < pathLen {
		return o, false
	}
	path, data := b[:pathLen], b[pathLen:]
	o.Data = bytes.Clone(data)
	for len(path) >= 4 {
		n := int(le.Uint16(path[2:]))
		if n < 4 || n > len(path) {
			return o, false
		}
		node := path[:n]
		path = path[n:]
		switch {
		case node[0] == mediaPath && node[1] == hardDriveNode && n == hardDriveSize && node[40] == 2 && node[41] == 2:
			o.Partition, o.Start, o.Size, o.ID = int(le.Uint32(node[4:])), le.Uint64(node[8:]), le.Uint64(node[16:]), disk.GUID(node[24:40])
		case node[0] == mediaPath && node[1] == filePathNode:
			if o.File, _, good = takeUTF16z(node[4:]); !good {
				return o, false
			}
		case node[0] == endPath:
			return o, o.ID != disk.GUID{} && o.File != ""
		}
	}
	return o, false
}

// Variables are the firmware's, of the vendor EFI_GLOBAL_VARIABLE.
type Variables interface {
	Names() ([]string, error)
	// Get returns the value without its attributes. A variable that does not
	// exist is fs.ErrNotExist.
	Get(name string) ([]byte, error)
	Set(name string, value []byte) error
	Delete(name string) error
}

// ourFile is our loader on the EFI system partition, ourPrefix begins the name
// of every entry of ours.
const (
	ourFile   = `\EFI\platter\grubx64.efi`
	ourPrefix = "Platter "
)

// SetBootEntry makes want the node's one boot entry of ours, right behind the
// entry this boot came from, so that the network keeps being asked first.
// next: the firmware's next start uses it, once. Everything is read back.
func SetBootEntry(v Variables, want LoadOption, next bool) error {
	names, err := v.Names()
	if err != nil {
		return fmt.Errorf("boot entries of the firmware: %w", err)
	}
	value := want.Encode()
	taken, stale, ours := map[uint16]bool{}, map[uint16]bool{}, -1
	for _, name := range names {
		n, ok := bootNumber(name)
		if !ok {
			continue
		}
		taken[n] = true
		b, err := v.Get(name)
		if err != nil {
			continue // an entry that cannot be read is not ours to judge
		}
		o, ok := ParseLoadOption(b)
		switch {
		case !ok || o.File != ourFile || !strings.HasPrefix(o.Description, ourPrefix):
		case ours < 0 && bytes.Equal(b, value):
			ours = int(n)
		default:
			stale[n] = true
		}
	}
	if ours < 0 {
		for ours = 0; taken[uint16(ours)]; ours++ {
		}
	}
	entry := fmt.Sprintf("Boot%04X", ours)
	order, err := numbers(v, "BootOrder")
	if err != nil {
		return err
	}
	current := -1
	if c, err := numbers(v, "BootCurrent"); err == nil && len(c) == 1 {
		current = int(c[0])
	}
	order = bootOrder(order, current, uint16(ours), stale)
	changes := []struct {
		name  string
		value []byte
	}{{entry, value}, {"BootOrder", encodeNumbers(order)}}
	if next {
		changes = append(changes, struct {
			name  string
			value []byte
		}{"BootNext", encodeNumbers([]uint16{uint16(ours)})})
	}
	for _, c := range changes {
		if old, err := v.Get(c.name); err == nil && bytes.Equal(old, c.value) {
			continue
		}
		if err := v.Set(c.name, c.value); err != nil {
			return fmt.Errorf("set the firmware's variable %s: %w", c.name, err)
		}
		if b, err := v.Get(c.name); err != nil || !bytes.Equal(b, c.value) {
			return fmt.Errorf("the firmware took the variable %s but gives back something else (%v)", c.name, err)
		}
	}
	// Entries go last: the order no longer names them.
	for n := range stale {
		if err := v.Delete(fmt.Sprintf("Boot%04X", n)); err != nil {
			return fmt.Errorf("remove the stale boot entry Boot%04X: %w", n, err)
		}
	}
	return nil
}

// bootOrder puts ours behind current, or first where current is not in the
// order, and leaves stale entries out.
func bootOrder(old []uint16, current int, ours uint16, stale map[uint16]bool) []uint16 {
	order := slices.DeleteFunc(slices.Clone(old), func(n uint16) bool { return n == ours || stale[n] })
	at := 0
	if current >= 0 {
		at = slices.Index(order, uint16(current)) + 1
	}
	return slices.Insert(order, at, ours)
}

func bootNumber(name string) (uint16, bool) {
	digits, ok := strings.CutPrefix(name, "Boot")
	if !ok || len(digits) != 4 {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 16, 16)
	return uint16(n), err == nil
}

func numbers(v Variables, name string) ([]uint16, error) {
	b, err := v.Get(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the firmware's variable %s: %w", name, err)
	}
	var list []uint16
	for ; len(b) >= 2; b = b[2:] {
		list = append(list, binary.LittleEndian.Uint16(b))
	}
	return list, nil
}

func encodeNumbers(list []uint16) []byte {
	var b []byte
	for _, n := range list {
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	return b
}

// EFIVars are the variables in an efivarfs: files of four bytes of attributes
// and the value.
type EFIVars string

const (
	globalVendor = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	// non-volatile, boot services, run time
	variableAttributes = 7
	immutableFlag      = 0x10 // FS_IMMUTABLE_FL
)

func (d EFIVars) path(name string) string { return filepath.Join(string(d), name+globalVendor) }

// Names lists the variables.
func (d EFIVars) Names() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), globalVendor); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// Get reads a variable.
func (d EFIVars) Get(name string) ([]byte, error) {
	b, err := os.ReadFile(d.path(name))
	if err != nil {
		return nil, err
	}
	if len(b) < 4 {
		return nil, fmt.Errorf("variable %s has no attributes", name)
	}
	return b[4:], nil
}

// Set writes a variable in one call, as the file system demands.
func (d EFIVars) Set(name string, value []byte) error {
	if err := d.unlock(name); err != nil {
		return err
	}
	f, err := os.OpenFile(d.path(name), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append([]byte{variableAttributes, 0, 0, 0}, value...))
	return errors.Join(err, f.Close())
}

// Delete removes a variable.
func (d EFIVars) Delete(name string) error {
	return errors.Join(d.unlock(name), os.Remove(d.path(name)))
}

// unlock clears the flag that protects variables from accidents.
func (d EFIVars) unlock(name string) error {
	f, err := os.Open(d.path(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&immutableFlag == 0 {
		return nil // a file system without such flags protects nothing
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^immutableFlag)
}
