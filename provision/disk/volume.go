package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Volume is what an install is laid on.
type Volume interface {
	io.ReaderAt
	// WriteAt writes without a promise that the bytes survive a power cut
	// before the next Sync.
	io.WriterAt
	// Zero makes n bytes from off read as zeros.
	Zero(off, n int64) error
	// Sync returns when everything written is on stable storage.
	Sync() error
	Size() int64     // bytes
	SectorSize() int // logical, bytes
}

// directAlign is the alignment of offset, length and memory that direct
// writes need on every disk.
const directAlign = 4096

// aligned returns n zero bytes that direct writes accept.
func aligned(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (directAlign - 1))
	return b[skip : skip+n : skip+n]
}

// Device is a block device, or a regular file that stands in for one, locked
// for this process.
type Device struct {
	path   string
	file   *os.File // through the page cache; carries the flock
	direct *os.File // past the page cache; nil on files
	claim  *os.File // holds the exclusive claim of a block device
	size   int64
	sector int
}

var _ Volume = (*Device)(nil)

// Open opens and locks the disk at path. A disk that anything else uses, or
// that another install has locked, is refused.
func Open(path string) (d *Device, err error) {
	d = &Device{path: path, sector: 512}
	defer func() {
		if err != nil {
			d.Close()
			d = nil
		}
	}()
	if d.file, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		return d, fmt.Errorf("open the disk: %w", err)
	}
	if err = unix.Flock(int(d.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return d, fmt.Errorf("lock %s: another install holds it: %w", path, err)
	}
	info, err := d.file.Stat()
	if err != nil {
		return d, fmt.Errorf("open the disk: %w", err)
	}
	if info.Mode().IsRegular() {
		d.size = info.Size()
		return d, nil
	}
	if info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0 {
		return d, fmt.Errorf("%s is neither a block device nor a file", path)
	}
	if d.size, err = d.file.Seek(0, io.SeekEnd); err != nil {
		return d, fmt.Errorf("size of %s: %w", path, err)
	}
	if d.sector, err = unix.IoctlGetInt(int(d.file.Fd()), unix.BLKSSZGET); err != nil {
		return d, fmt.Errorf("sector size of %s: %w", path, err)
	}
	if err = d.take(); err != nil {
		return d, err
	}
	// Some stacked devices refuse direct I/O: the page cache is slower, not wrong.
	d.direct, _ = os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	return d, nil
}

// take claims the block device for us alone, as a mount would.
func (d *Device) take() (err error) {
	if d.claim, err = os.OpenFile(d.path, os.O_RDONLY|unix.O_EXCL, 0); err != nil {
		return fmt.Errorf("claim %s: something uses it: %w", d.path, err)
	}
	return nil
}

// Close unlocks the disk.
func (d *Device) Close() error {
	var errs []error
	for _, f := range []*os.File{d.claim, d.direct, d.file} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Path is the path given to Open.
func (d *Device) Path() string { return d.path }

// Size is in bytes.
func (d *Device) Size() int64 { return d.size }

// SectorSize is the logical sector size in bytes.
func (d *Device) SectorSize() int { return d.sector }

// pick returns the file for one transfer: past the page cache where the
// alignment allows it.
func (d *Device) pick(b []byte, off int64) *os.File {
	if d.direct != nil && (off|int64(len(b))|int64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))))%directAlign == 0 {
		return d.direct
	}
	return d.file
}

// ReadAt reads from the disk.
func (d *Device) ReadAt(b []byte, off int64) (int, error) { return d.pick(b, off).ReadAt(b, off) }

// WriteAt writes to the disk; aligned transfers bypass the page cache.
func (d *Device) WriteAt(b []byte, off int64) (int, error) { return d.pick(b, off).WriteAt(b, off) }

// Sync returns when everything written is on stable storage.
func (d *Device) Sync() error { return unix.Fdatasync(int(d.file.Fd())) }

// zeroStep bounds one request to the disk, so that a large range can be
// interrupted between two.
const zeroStep = 256 << 20

// Zero makes a range read as zeros, by the disk itself where it can.
func (d *Device) Zero(off, n int64) error {
	for n > 0 {
		step := min(n, zeroStep)
		if err := d.zeroOnce(off, step); err != nil {
			return fmt.Errorf("zero %s at byte %d: %w", d.path, off, err)
		}
		off, n = off+step, n-step
	}
	return nil
}

func (d *Device) zeroOnce(off, n int64) error {
	const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if d.claim != nil && (off|n)%int64(d.sector) == 0 {
		r := [2]uint64{uint64(off), uint64(n)}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&r)))
		runtime.KeepAlive(d)
		if errno == 0 {
			return nil
		}
	}
	if d.claim == nil && unix.Fallocate(int(d.file.Fd()), punch, off, n) == nil {
		return nil
	}
	return writeZeros(d, off, n)
}

func writeZeros(w io.WriterAt, off, n int64) error {
	b := aligned(int(min(n, mib)))
	for n > 0 {
		step := min(n, int64(len(b)))
		if _, err := w.WriteAt(b[:step], off); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// dropPartitions makes the kernel forget the partitions of a table that is no
// longer on the disk.
func (d *Device) dropPartitions() error {
	if d.claim == nil {
		return nil
	}
	base := filepath.Base(d.path)
	entries, err := os.ReadDir("/sys/block/" + base)
	if err != nil {
		return nil // not a whole disk as sysfs knows it: it has none
	}
	for _, e := range entries {
		var n int
		b, err := os.ReadFile("/sys/block/" + base + "/" + e.Name() + "/partition")
		if err != nil {
			continue
		}
		if _, err := fmt.Sscan(string(b), &n); err != nil {
			continue
		}
		if err := d.blkpg(unix.BLKPG_DEL_PARTITION, n, 0, 0); err != nil {
			return fmt.Errorf("forget partition %s: %w", e.Name(), err)
		}
	}
	return nil
}

// blkpg tells the kernel of a partition, or to forget it, without a table.
func (d *Device) blkpg(op int32, number int, start, size int64) error {
	p := unix.BlkpgPartition{Start: start, Length: size, Pno: int32(number)}
	arg := unix.BlkpgIoctlArg{Op: op, Datalen: int32(unsafe.Sizeof(p)), Data: (*byte)(unsafe.Pointer(&p))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(&p)
	if errno != 0 {
		return errno
	}
	return nil
}
