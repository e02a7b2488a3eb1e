package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// jail is a folder that holds a file system of somebody else. Links in it lead
// where they would lead if the folder were the root, and never out of it
// (openat2(2), RESOLVE_IN_ROOT).
type jail struct {
	dir *os.File
}

func openJail(dir string) (*jail, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	return &jail{f}, nil
}

// newJail makes dir, as / of a system is, whatever the umask.
func newJail(dir string) (*jail, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	return openJail(dir)
}

func (j *jail) Close() error { return j.dir.Close() }

// at opens what name leads to.
func (j *jail) at(name string, flags uint64) (*os.File, error) {
	name = path.Join(".", name)
	fd, err := unix.Openat2(int(j.dir.Fd()), name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// open opens a regular file to read. Nothing else is opened even to look at it:
// that alone starts a watchdog or rewinds a tape.
func (j *jail) open(name string) (*os.File, error) {
	f, err := j.at(name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: "/" + name, Err: errors.Join(errors.New("not a regular file"), err)}
	}
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

func (j *jail) has(name string) bool {
	f, err := j.at(name, unix.O_PATH)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// hasAny tells whether one of names is there.
func (j *jail) hasAny(names ...string) bool { return slices.ContainsFunc(names, j.has) }

// maxText bounds the files that are read as a whole, in bytes.
const maxText = 64 << 20

func (j *jail) read(name string) ([]byte, error) {
	f, err := j.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxText+1))
	if len(b) > maxText {
		return nil, fmt.Errorf("/%s is larger than %s", name, mb(maxText))
	}
	return b, err
}

// maxCopy bounds the files that are copied out of a jail, in bytes. The largest is
// the database of rpm, with all file names of a large system.
const maxCopy = 2 << 30

// copyOut copies a file out of the jail.
func (j *jail) copyOut(name, to string) error {
	f, err := j.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	n, err := io.Copy(out, io.LimitReader(f, maxCopy+1))
	if n > maxCopy {
		return fmt.Errorf("/%s is larger than %s", name, mb(maxCopy))
	}
	return errors.Join(err, out.Close())
}

// text is a file's content, or nothing.
func (j *jail) text(name string) string {
	b, _ := j.read(name)
	return string(b)
}

// list are the names in a folder, sorted; none where there is no folder.
func (j *jail) list(name string) []string {
	d, err := j.at(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	slices.Sort(names)
	return names
}

// glob are the files in folder whose names begin with prefix.
func (j *jail) glob(folder, prefix string) (out []string) {
	for _, n := range j.list(folder) {
		if strings.HasPrefix(n, prefix) {
			out = append(out, path.Join(folder, n))
		}
	}
	return out
}

// parent opens the folder that name lies in, made where it is missing, and
// returns the last word of name.
func (j *jail) parent(name string) (*os.File, string, error) {
	dir, base := path.Split(path.Join(".", name))
	d, err := j.at(dir, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) && dir != "" {
		up, last, err := j.parent(path.Clean(dir))
		if err != nil {
			return nil, "", err
		}
		err = unix.Mkdirat(int(up.Fd()), last, 0o755)
		if err == nil { // whatever the umask
			err = unix.Fchmodat(int(up.Fd()), last, 0o755, 0)
		}
		up.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, "", &fs.PathError{Op: "mkdir", Path: "/" + dir, Err: err}
		}
		d, err = j.at(dir, unix.O_PATH|unix.O_DIRECTORY)
		return d, base, err
	}
	return d, base, err
}

// put replaces a file by one with that content.
func (j *jail) put(name, content string, mode uint32) error {
	d, base, err := j.parent(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Unlinkat(int(d.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "unlink", Path: "/" + name, Err: err}
	}
	fd, err := unix.Openat(int(d.Fd()), base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return &fs.PathError{Op: "create", Path: "/" + name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.WriteString(content)
	return errors.Join(err, f.Chmod(fs.FileMode(mode)), f.Close())
}

// link makes name a symbolic link, in the place of a file or link that is there.
func (j *jail) link(target, name string) error {
	d, base, err := j.parent(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Unlinkat(int(d.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "unlink", Path: "/" + name, Err: err}
	}
	if err := unix.Symlinkat(target, int(d.Fd()), base); err != nil {
		return &fs.PathError{Op: "symlink", Path: "/" + name, Err: err}
	}
	return nil
}

// rename gives name another last word; a link is renamed itself.
func (j *jail) rename(name, base string) error {
	d, old, err := j.parent(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Renameat(int(d.Fd()), old, int(d.Fd()), base)
}

// remove takes a file or link away and tells whether it was there.
func (j *jail) remove(name string) (bool, error) {
	d, base, err := j.parent(name)
	if err != nil {
		return false, err
	}
	defer d.Close()
	err = unix.Unlinkat(int(d.Fd()), base, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// readlink is the target of a link; "" where name is none.
func (j *jail) readlink(name string) string {
	d, base, err := j.parent(name)
	if err != nil {
		return ""
	}
	defer d.Close()
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(d.Fd()), base, b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// unpacker lays the entries of tar streams into a jail: owners, modes, times,
// hard links, device nodes and extended attributes, among them capabilities.
// Labels of SELinux are left out. Runs of zeros become holes. Memory does not
// grow with the size of files.
type unpacker struct {
	*jail
	// below is where in the jail the next stream goes.
	below string
	// room is how much must stay free below the jail, in bytes.
	room int64

	files, bytes int64
	labels       int64     // of SELinux, left out
	newest       time.Time // of what was last written
	late         []tar.Header
	folders      []tar.Header // their times come last
	sinceLooked  int64
	buf          []byte
}

// lookEvery is after how many bytes the free space is looked at.
const lookEvery = 64 << 20

var errLeadsOut = errors.New("it leads out of the archive: the file is damaged or made to do harm, nothing of it is used")

// inside checks the name of an entry and makes it relative.
func inside(name string) (string, error) {
	if slices.Contains(strings.Split(name, "/"), "..") || strings.ContainsRune(name, 0) {
		return "", errLeadsOut
	}
	return path.Join(".", strings.TrimLeft(name, "/")), nil
}

// unpack lays down all of one stream and reads it to its very end: behind the
// last entry is padding, and the checksum of a stream that was packed. Everything
// of a stream is in place after finish.
func (u *unpacker) unpack(ctx context.Context, r io.Reader) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			if _, err := io.Copy(io.Discard, r); err != nil {
				return fmt.Errorf("the archive is damaged, copy the file again: %w", err)
			}
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("the archive cannot be read after %d entries: %w", u.files, err)
		}
		if err := u.entry(ctx, h, t); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

func (u *unpacker) entry(ctx context.Context, h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := inside(h.Name)
	if err != nil {
		return err
	}
	u.files++
	if h.ModTime.After(u.newest) {
		u.newest = h.ModTime
	}
	h.Name = path.Join(u.below, name)
	if h.Typeflag == tar.TypeLink {
		target, err := inside(h.Linkname)
		if err != nil {
			return err
		}
		h.Linkname = path.Join(u.below, target)
		err = u.hardLink(h)
		if errors.Is(err, unix.ENOENT) { // what it is a link to comes later
			u.late = append(u.late, *h)
			return nil
		}
		return err
	}
	if h.Name == "." || h.Name == u.below { // the root folder itself
		d, err := u.at(h.Name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer d.Close()
		u.folders = append(u.folders, tar.Header{Name: h.Name, ModTime: h.ModTime})
		return u.attributes(d, h)
	}
	d, base, err := u.parent(h.Name)
	if err != nil {
		return err
	}
	defer d.Close()
	dir := int(d.Fd())
	if h.Typeflag == tar.TypeDir {
		return u.folder(dir, base, h)
	}
	if err := unix.Unlinkat(dir, base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("it cannot take the place of what has that name already: %w", err)
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse: // whose holes are read as zeros
		return u.file(ctx, dir, base, h, content)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, dir, base); err != nil {
			return err
		}
		return errors.Join(unix.Fchownat(dir, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW), setTime(dir, base, h.ModTime))
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		if err := unix.Mknodat(dir, base, kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))); err != nil {
			return err
		}
		// It was made just now: there is no link to follow.
		return errors.Join(unix.Fchownat(dir, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW), unix.Fchmodat(dir, base, uint32(h.Mode&0o7777), 0), setTime(dir, base, h.ModTime))
	}
	return fmt.Errorf("its kind %q is unknown: pack the tree anew with GNU tar", h.Typeflag)
}

func (u *unpacker) folder(dir int, base string, h *tar.Header) error {
	err := unix.Mkdirat(dir, base, 0o700)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	d, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		// A layer of an OCI image may call a folder what is a link to one.
		if to, err := u.at(h.Name, unix.O_PATH|unix.O_DIRECTORY); err == nil {
			return to.Close()
		}
		return errors.New("it is a folder, and something else before")
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(d), h.Name)
	defer f.Close()
	u.folders = append(u.folders, tar.Header{Name: h.Name, ModTime: h.ModTime})
	return u.attributes(f, h)
}

func (u *unpacker) file(ctx context.Context, dir int, base string, h *tar.Header, content io.Reader) error {
	fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), h.Name)
	defer f.Close()
	if err := u.copy(ctx, f, content, h.Size); err != nil {
		return err
	}
	if err := u.attributes(f, h); err != nil {
		return err
	}
	return errors.Join(setTime(dir, base, h.ModTime), f.Close())
}

// copy writes n bytes, zeros as holes.
func (u *unpacker) copy(ctx context.Context, f *os.File, r io.Reader, n int64) error {
	if u.buf == nil {
		u.buf = make([]byte, 256<<10)
	}
	for at := int64(0); at < n; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := u.buf[:min(int64(len(u.buf)), n-at)]
		if _, err := io.ReadFull(r, b); err != nil {
			return fmt.Errorf("it ends after %d of %d bytes: %w", at, n, err)
		}
		if !allZero(b) {
			if err := u.enough(int64(len(b))); err != nil {
				return err
			}
			if _, err := f.WriteAt(b, at); err != nil {
				return err
			}
		}
		at += int64(len(b))
	}
	u.bytes += n
	return f.Truncate(n)
}

// enough looks now and then whether there is room for more.
func (u *unpacker) enough(more int64) error {
	if u.sinceLooked += more; u.sinceLooked < lookEvery {
		return nil
	}
	u.sinceLooked = 0
	return enoughRoom(u.dir.Name(), u.room, "the work folder")
}

// enoughRoom refuses a folder with less than need bytes free.
func enoughRoom(dir string, need int64, what string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%s %s has %s free and needs %s: make room there, or name another folder", what, dir, mb(free), mb(need))
	}
	return nil
}

func (u *unpacker) hardLink(h *tar.Header) error {
	from, name, err := u.parent(h.Linkname)
	if err != nil {
		return err
	}
	defer from.Close()
	d, base, err := u.parent(h.Name)
	if err != nil {
		return err
	}
	defer d.Close()
	err = unix.Linkat(int(from.Fd()), name, int(d.Fd()), base, 0)
	if errors.Is(err, unix.EEXIST) {
		err = errors.Join(unix.Unlinkat(int(d.Fd()), base, 0), unix.Linkat(int(from.Fd()), name, int(d.Fd()), base, 0))
	}
	return err
}

// attributes gives an open file or folder its owner, mode and extended
// attributes, in the order in which one does not undo the other.
func (u *unpacker) attributes(f *os.File, h *tar.Header) error {
	if err := unix.Fchown(int(f.Fd()), h.Uid, h.Gid); err != nil {
		return err
	}
	if err := unix.Fchmod(int(f.Fd()), uint32(h.Mode&0o7777)); err != nil {
		return err
	}
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		switch {
		case !ok || strings.HasPrefix(attr, "trusted.overlay."):
			continue
		case attr == "security.selinux":
			u.labels++
			continue
		}
		if err := unix.Fsetxattr(int(f.Fd()), attr, []byte(value), 0); err != nil {
			return fmt.Errorf("extended attribute %s: %w", attr, err)
		}
	}
	return nil
}

// finish makes the hard links whose targets came later and sets the times of
// folders, which every entry in them has changed.
func (u *unpacker) finish() error {
	for _, h := range u.late {
		if err := u.hardLink(&h); err != nil {
			return fmt.Errorf("entry %q is a hard link to %q: %w", h.Name, h.Linkname, err)
		}
	}
	u.late = nil
	for _, h := range slices.Backward(u.folders) {
		d, base, err := u.parent(h.Name)
		if err != nil {
			return err
		}
		if base == "" || h.Name == "." {
			base = "."
		}
		err = setTime(int(d.Fd()), base, h.ModTime)
		d.Close()
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	u.folders = nil
	return nil
}

func setTime(dir int, base string, t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	return unix.UtimesNanoAt(dir, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// sparseCopy writes r to the new file path, zeros as holes.
func sparseCopy(ctx context.Context, path string, r io.Reader, room int64) (int64, error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var at, written int64
	b := make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return at, err
		}
		n, err := io.ReadFull(r, b)
		if n > 0 && !allZero(b[:n]) {
			if _, err := f.WriteAt(b[:n], at); err != nil {
				return at, err
			}
			if written += int64(n); written > lookEvery {
				written = 0
				if err := enoughRoom(path, room, "the work folder"); err != nil {
					return at, err
				}
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return at, errors.Join(f.Truncate(at), f.Close())
		}
		if err != nil {
			return at, err
		}
	}
}
