package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mount mounts the file system in slot s on dir. The disk needs no partition
// table: the kernel is told of the partition, or, on a file, a loop device
// shows that stretch of it. The returned function undoes everything.
//
// The exclusive claim rests while the file system is mounted: the mount claims
// the disk itself.
func (d *Device) Mount(s Slot, dir, fstype string) (unmount func() error, err error) {
	node, release, err := d.expose(s)
	if err != nil {
		return nil, fmt.Errorf("show partition %s of %s: %w", s.Name, d.path, err)
	}
	// The installer leaves soon: inode tables are zeroed by the installed system.
	if err := unix.Mount(node, dir, fstype, unix.MS_NOATIME, map[string]string{"ext4": "noinit_itable"}[fstype]); err != nil {
		return nil, errors.Join(fmt.Errorf("mount partition %s of %s (%s): %w", s.Name, d.path, node, err), release())
	}
	return func() error {
		if err := unix.Unmount(dir, 0); err != nil {
			return fmt.Errorf("unmount partition %s of %s: %w", s.Name, d.path, err)
		}
		return release()
	}, nil
}

func (d *Device) expose(s Slot) (node string, release func() error, err error) {
	if d.claim == nil {
		return d.exposeFile(s)
	}
	if err := d.dropPartitions(); err != nil {
		return "", nil, err
	}
	if err := d.blkpg(unix.BLKPG_ADD_PARTITION, s.Number, s.Start, s.Size); err != nil {
		return "", nil, fmt.Errorf("tell the kernel of it: %w", err)
	}
	name := filepath.Base(d.path)
	if c := name[len(name)-1]; c >= '0' && c <= '9' {
		name += "p"
	}
	name += strconv.Itoa(s.Number)
	node = filepath.Join(filepath.Dir(d.path), name)
	made := false
	if _, err := os.Stat(node); errors.Is(err, os.ErrNotExist) {
		if err := mknod(node, name); err != nil {
			return "", nil, err
		}
		made = true
	}
	d.claim.Close()
	return node, func() error {
		if made {
			os.Remove(node)
		}
		if err := d.blkpg(unix.BLKPG_DEL_PARTITION, s.Number, 0, 0); err != nil {
			return fmt.Errorf("forget partition %s: %w", name, err)
		}
		return d.take()
	}, nil
}

// mknod makes the device file where /dev is not kept by the kernel.
func mknod(node, name string) error {
	b, err := os.ReadFile("/sys/class/block/" + name + "/dev")
	if err != nil {
		return err
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(b)), ":")
	ma, err1 := strconv.ParseUint(major, 10, 32)
	mi, err2 := strconv.ParseUint(minor, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(ma), uint32(mi)))); err != nil {
		return fmt.Errorf("make %s: %w", node, err)
	}
	return nil
}

// exposeFile shows a stretch of a regular file as a loop device, which goes
// away by itself with its last user.
func (d *Device) exposeFile(s Slot) (node string, release func() error, err error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer ctl.Close()
	for {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", nil, fmt.Errorf("find a free loop device: %w", err)
		}
		node = "/dev/loop" + strconv.Itoa(n)
		loop, err := os.OpenFile(node, os.O_RDWR, 0)
		if err != nil {
			return "", nil, err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{
			Fd:   uint32(d.file.Fd()),
			Info: unix.LoopInfo64{Offset: uint64(s.Start), Sizelimit: uint64(s.Size), Flags: unix.LO_FLAGS_AUTOCLEAR},
		})
		if errors.Is(err, unix.EBUSY) { // someone else was quicker
			loop.Close()
			continue
		}
		if err != nil {
			loop.Close()
			return "", nil, fmt.Errorf("set up %s: %w", node, err)
		}
		return node, loop.Close, nil
	}
}

// ext4ResizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64), of the kernel's
// include/uapi/linux/ext4.h.
const ext4ResizeFS = 0x40086610

// Grow grows the mounted ext4 file system at dir to size bytes. Growing to the
// size it has is no error.
func Grow(dir string, size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("grow the file system on %s: %w", dir, err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("grow the file system: %w", err)
	}
	defer f.Close()
	blocks := uint64(size / st.Bsize)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return fmt.Errorf("grow the file system on %s to %s: %w", dir, Bytes(size), errno)
	}
	return nil
}
