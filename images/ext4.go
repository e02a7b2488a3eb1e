package images

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The root file system has to come out the same wherever and whenever it is made, and
// one with a few other files has to differ in little more than those. mkfs.ext4 -d alone
// does neither: it takes over when files were copied (ctime), and it puts folders and
// blocks of extents, which hold numbers of inodes and of blocks, between the contents
// of files, so that a single new file changes half of all frames.
//
// So mkfs.ext4 makes a file system of everything but the contents, which fills the
// first blocks. The contents follow, in the order of the paths, each in one piece but for
// what lies in its way, described in the inode itself.

// The same for all images: it goes into the checksum of every folder and inode. Disks
// are told from each other by the identifiers of their partitions.
const (
	rootUUID = "506c6174-7465-4d72-8072-6f6f74667331"
	hashSeed = "506c6174-7465-4d72-8068-617368733031"
)

const (
	blockSize = 4096
	// One inode for this many bytes, where files are not many and small. The default
	// of 16 KiB doubles the inode tables that a grown file system has to clear.
	bytesPerInode = 32768
	journalMiB    = 64
)

// ext4Features are named one by one, so that every version of mkfs.ext4 makes
// the same file system. 64bit and resize_inode let it grow while mounted, far
// beyond 16 TiB; orphan_file and metadata_csum_seed stay off, older GRUBs and
// kernels refuse them.
var ext4Features = []string{
	"none", "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg",
	"sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
}

// makeRoot makes an ext4 file system that holds the tree root and little room
// beside: the installer grows it. Free blocks are zeros and cost nothing. No file is
// younger than date, and no inode tells more than when its file was last written. It
// needs room for a copy of the tree without its contents, at to + ".tree".
func makeRoot(ctx context.Context, root, to string, date time.Time) error {
	used, err := treeSize(root)
	if err != nil {
		return err
	}
	tree := to + ".tree"
	defer os.RemoveAll(tree)
	if err := tool(ctx, "cp", "-a", "--attributes-only", "-T", root, tree); err != nil {
		return err
	}
	files, err := numberFiles(root, tree)
	if err != nil {
		return err
	}
	if err := mkfs(ctx, tree, to, used, int64(len(files)), date); err != nil {
		return err
	}
	if err := fill(ctx, to, root, files, date); err != nil {
		return fmt.Errorf("files cannot be put into the root file system: %w", err)
	}
	return tool(ctx, "e2fsck", "-f", "-n", to)
}

// mkfs makes an ext4 file system with room for used bytes in that many inodes, and
// puts tree into it.
func mkfs(ctx context.Context, tree, to string, used, inodes int64, date time.Time) error {
	size, count := rootShape(used, inodes)
	if err := sparse(to, size); err != nil {
		return err
	}
	args := []string{"mkfs.ext4", "-q", "-F", "-b", fmt.Sprint(blockSize), "-I", fmt.Sprint(inodeSize),
		"-J", fmt.Sprintf("size=%d", journalMiB), "-m", "1", "-L", "platter-root", "-U", rootUUID,
		"-O", strings.Join(ext4Features, ","), "-E", fmt.Sprintf("hash_seed=%s,resize=%d,lazy_itable_init=1,lazy_journal_init=1", hashSeed, uint32(1<<32-1)),
		"-d", tree}
	return toolAt(ctx, date, append(append(args, count...), to)...)
}

// rootShape is the size of a file system with room for used bytes in that many
// inodes, and what mkfs.ext4 is told about the number of its inodes.
func rootShape(used, inodes int64) (size int64, count []string) {
	// Inode tables and bitmaps come to about one per cent.
	size = max(used+used/20+(journalMiB+64)<<20, 4*journalMiB<<20)
	count = []string{"-i", fmt.Sprint(bytesPerInode)}
	// mkfs.ext4 keeps a few inodes for itself and rounds.
	if inodes+inodes/16+1024 > size/bytesPerInode {
		many := inodes + inodes/4 + 4096
		size += many * inodeSize
		count = []string{"-N", fmt.Sprint(many)}
	}
	return size - size%(1<<20), count
}

// treeFile is one inode of a tree.
type treeFile struct {
	path  string // below the tree
	size  int64  // of a regular file's content, else 0
	mtime time.Time
}

// numberFiles lists the inodes of root in the order of their paths and makes the number
// in that list the time, in seconds since 1970, of the same file in tree: the inodes
// that mkfs.ext4 makes of tree tell by it which they are.
func numberFiles(root, tree string) (files []treeFile, err error) {
	seen := map[uint64]bool{} // hard links
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if ino := info.Sys().(*syscall.Stat_t).Ino; seen[ino] {
			return nil
		} else {
			seen[ino] = true
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f := treeFile{path: rel, mtime: info.ModTime()}
		if d.Type().IsRegular() {
			f.size = info.Size()
		}
		at := unix.NsecToTimespec(int64(len(files)) * 1e9)
		files = append(files, f)
		return unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(tree, rel), []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	})
	return files, err
}

// treeSize is the space that the tree takes in whole blocks.
func treeSize(root string) (int64, error) {
	var size int64
	err := filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		size += (info.Size() + blockSize - 1) / blockSize * blockSize
		return nil
	})
	return size, err
}

// Where things lie in an ext4 file system with our features, in bytes
// (https://docs.kernel.org/filesystems/ext4/, "Data Structures"). Numbers are
// little-endian.
const (
	superAt   = 1024
	superSize = 1024
	descSize  = 64
	inodeSize = 256

	superBlocks         = 0x4
	superFree           = 0xC
	superPerGroup       = 0x20
	superInodesPerGroup = 0x28
	superInodeSize      = 0x58
	superUUID           = 0x68
	superReservedGDT    = 0xCE
	superDescSize       = 0xFE
	superFreeHigh       = 0x158
	superSum            = 0x3FC

	descBitmap      = 0x0
	descInodes      = 0x8
	descFree        = 0xC
	descFlags       = 0x12
	descBitmapSum   = 0x18
	descSum         = 0x1E
	descFreeHigh    = 0x2C
	descBitmapSumHi = 0x38
	blockUninit     = 0x2 // in descFlags: the bitmap has not been written

	inodeMode     = 0x0
	inodeSizeLow  = 0x4
	inodeAtime    = 0x8
	inodeCtime    = 0xC
	inodeMtime    = 0x10
	inodeLinks    = 0x1A
	inodeBlocks   = 0x1C // of 512 bytes
	inodeFlags    = 0x20
	inodeExtents  = 0x28
	inodeGen      = 0x64
	inodeSizeHigh = 0x6C
	inodeSum      = 0x7C
	inodeSumHigh  = 0x82
	inodeExtra    = 0x84 // of ctime, mtime and atime, 4 bytes each; then crtime and its own
	inodeCrtime   = 0x90
	inodeCrExtra  = 0x94
	extentsFlag   = 0x80000
	extentMagic   = 0xF30A

	firstInode = 11 // lost+found
	rootInode  = 2
	maxExtents = 4 // in an inode
	maxExtent  = 32768
)

var le = binary.LittleEndian

// ext4Sum is CRC-32C without the inversions at its start and end, as ext4 has it.
func ext4Sum(sum uint32, b []byte) uint32 { return ^crc32.Update(^sum, castagnoli, b) }

// filler puts contents into the free blocks of a file system, one after the other.
type filler struct {
	f         *os.File
	super     []byte
	descs     []byte // of all groups
	groups    int
	perGroup  int64 // blocks
	blocks    int64
	seed      uint32 // of all checksums
	group     int    // whose bitmap this is
	bitmap    []byte
	next      int64 // block to try
	allocated int64
}

// fill gives the files in image, which numberFiles has numbered, their contents from root
// and their times.
func fill(ctx context.Context, image, root string, files []treeFile, date time.Time) error {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	w := &filler{f: f, super: make([]byte, superSize), group: -1}
	if _, err := f.ReadAt(w.super, superAt); err != nil {
		return err
	}
	w.blocks, w.perGroup = int64(le.Uint32(w.super[superBlocks:])), int64(le.Uint32(w.super[superPerGroup:]))
	if le.Uint16(w.super[superInodeSize:]) != inodeSize || le.Uint16(w.super[superDescSize:]) != descSize || w.perGroup != 8*blockSize {
		return errors.New("mkfs.ext4 has made a file system of another shape than it was asked for")
	}
	w.seed = ext4Sum(^uint32(0), w.super[superUUID:superUUID+16])
	w.groups = int((w.blocks + w.perGroup - 1) / w.perGroup)
	w.descs = make([]byte, w.groups*descSize)
	if _, err := f.ReadAt(w.descs, blockSize); err != nil {
		return err
	}

	inodes, err := w.number(files, date)
	if err != nil {
		return err
	}
	for i, file := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if file.size == 0 {
			continue
		}
		if inodes[i] == 0 {
			return fmt.Errorf("mkfs.ext4 has left out %s", file.path)
		}
		if err := w.put(inodes[i], filepath.Join(root, file.path), file.size); err != nil {
			return fmt.Errorf("%s: %w", file.path, err)
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	if _, err := f.WriteAt(w.descs, blockSize); err != nil {
		return err
	}
	free := int64(le.Uint32(w.super[superFree:])) + int64(le.Uint32(w.super[superFreeHigh:]))<<32 - w.allocated
	le.PutUint32(w.super[superFree:], uint32(free))
	le.PutUint32(w.super[superFreeHigh:], uint32(free>>32))
	le.PutUint32(w.super[superSum:], ext4Sum(^uint32(0), w.super[:superSum]))
	if _, err := f.WriteAt(w.super, superAt); err != nil {
		return err
	}
	return f.Close()
}

// number sets the times of all inodes and returns the inode of every file.
func (w *filler) number(files []treeFile, date time.Time) ([]uint32, error) {
	inodes := make([]uint32, len(files))
	perGroup := le.Uint32(w.super[superInodesPerGroup:])
	table := make([]byte, perGroup*inodeSize)
	for g := range w.groups {
		at := w.tableAt(g)
		if _, err := w.f.ReadAt(table, at); err != nil {
			return nil, err
		}
		for i := range perGroup {
			n, b := uint32(g)*perGroup+i+1, table[i*inodeSize:][:inodeSize]
			if n != rootInode && n < firstInode || le.Uint16(b[inodeLinks:]) == 0 {
				continue
			}
			at := date
			// What mkfs.ext4 makes itself has the time that it was told.
			if k := le.Uint32(b[inodeMtime:]); k < uint32(len(files)) {
				inodes[k] = n
				if files[k].mtime.Before(date) {
					at = files[k].mtime
				}
			}
			for _, field := range []int{inodeAtime, inodeCtime, inodeMtime, inodeCrtime} {
				le.PutUint32(b[field:], uint32(at.Unix()))
			}
			clear(b[inodeExtra:inodeCrtime])
			clear(b[inodeCrExtra : inodeCrExtra+4])
			w.sumInode(n, b)
		}
		if _, err := w.f.WriteAt(table, at); err != nil {
			return nil, err
		}
	}
	return inodes, nil
}

func (w *filler) tableAt(group int) int64 {
	return int64(le.Uint32(w.descs[group*descSize+descInodes:])) * blockSize
}

func (w *filler) sumInode(n uint32, b []byte) {
	le.PutUint16(b[inodeSum:], 0)
	le.PutUint16(b[inodeSumHigh:], 0)
	sum := ext4Sum(w.seed, le.AppendUint32(nil, n))
	sum = ext4Sum(ext4Sum(sum, b[inodeGen:inodeGen+4]), b)
	le.PutUint16(b[inodeSum:], uint16(sum))
	le.PutUint16(b[inodeSumHigh:], uint16(sum>>16))
}

// extent is a run of blocks.
type extent struct{ start, n int64 }

// put makes the content of the file at path, which has size bytes, that of inode n.
func (w *filler) put(n uint32, path string, size int64) error {
	extents, err := w.allocate((size + blockSize - 1) / blockSize)
	if err != nil {
		return err
	}
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	left := size
	for _, e := range extents {
		part := min(left, e.n*blockSize)
		if _, err := io.CopyN(io.NewOffsetWriter(w.f, e.start*blockSize), in, part); err != nil {
			return err
		}
		left -= part
	}

	perGroup := le.Uint32(w.super[superInodesPerGroup:])
	at := w.tableAt(int((n-1)/perGroup)) + int64((n-1)%perGroup)*inodeSize
	b := make([]byte, inodeSize)
	if _, err := w.f.ReadAt(b, at); err != nil {
		return err
	}
	tree := b[inodeExtents:]
	if le.Uint32(b[inodeFlags:])&extentsFlag == 0 || le.Uint16(tree) != extentMagic || le.Uint16(tree[2:]) != 0 || le.Uint16(b[inodeMode:])>>12 != syscall.S_IFREG>>12 {
		return errors.New("mkfs.ext4 has made something else of it than a file without content")
	}
	le.PutUint16(tree[2:], uint16(len(extents)))
	logical := int64(0)
	for i, e := range extents {
		to := tree[12*(i+1):]
		le.PutUint32(to, uint32(logical))
		le.PutUint16(to[4:], uint16(e.n))
		le.PutUint16(to[6:], uint16(e.start>>32))
		le.PutUint32(to[8:], uint32(e.start))
		logical += e.n
	}
	le.PutUint32(b[inodeSizeLow:], uint32(size))
	le.PutUint32(b[inodeSizeHigh:], uint32(size>>32))
	le.PutUint32(b[inodeBlocks:], le.Uint32(b[inodeBlocks:])+uint32(logical*blockSize/512))
	w.sumInode(n, b)
	_, err = w.f.WriteAt(b, at)
	return err
}

// allocate takes the next n free blocks.
func (w *filler) allocate(n int64) (extents []extent, err error) {
	for ; n > 0; w.next++ {
		if w.next >= w.blocks {
			return nil, errors.New("the file system is too small")
		}
		if err := w.load(int(w.next / w.perGroup)); err != nil {
			return nil, err
		}
		bit := w.next % w.perGroup
		if w.bitmap[bit/8]&(1<<(bit%8)) != 0 {
			continue
		}
		w.bitmap[bit/8] |= 1 << (bit % 8)
		n--
		w.allocated++
		if last := len(extents) - 1; last >= 0 && extents[last].start+extents[last].n == w.next && extents[last].n < maxExtent {
			extents[last].n++
		} else if len(extents) == maxExtents {
			return nil, fmt.Errorf("it does not fit into %d runs of at most %d MiB: leave it out of the image", maxExtents, maxExtent*blockSize>>20)
		} else {
			extents = append(extents, extent{w.next, 1})
		}
	}
	return extents, nil
}

// load makes the bitmap that of group g, which is never before the last one.
func (w *filler) load(g int) error {
	if g == w.group {
		return nil
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.group, w.bitmap = g, make([]byte, blockSize)
	desc := w.descs[g*descSize:][:descSize]
	if flags := le.Uint16(desc[descFlags:]); flags&blockUninit == 0 {
		_, err := w.f.ReadAt(w.bitmap, int64(le.Uint32(desc[descBitmap:]))*blockSize)
		return err
	} else {
		le.PutUint16(desc[descFlags:], flags&^blockUninit)
	}
	// Nothing is in it but, in some groups, a copy of the superblock and of what
	// describes the groups; and behind the end of the last one is nothing at all.
	taken := int64(0)
	if hasSuper(g) {
		taken = 1 + int64(w.groups*descSize+blockSize-1)/blockSize + int64(le.Uint16(w.super[superReservedGDT:]))
	}
	for bit := range w.perGroup {
		if bit < taken || int64(g)*w.perGroup+bit >= w.blocks {
			w.bitmap[bit/8] |= 1 << (bit % 8)
		}
	}
	return nil
}

// hasSuper tells whether a group holds a copy of the superblock (sparse_super).
func hasSuper(g int) bool {
	for _, base := range []int{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return g <= 1
}

// flush writes the bitmap and describes its group anew.
func (w *filler) flush() error {
	if w.group < 0 {
		return nil
	}
	desc := w.descs[w.group*descSize:][:descSize]
	free := uint32(0)
	for _, b := range w.bitmap {
		free += uint32(bits.OnesCount8(^b))
	}
	le.PutUint16(desc[descFree:], uint16(free))
	le.PutUint16(desc[descFreeHigh:], uint16(free>>16))
	sum := ext4Sum(w.seed, w.bitmap)
	le.PutUint16(desc[descBitmapSum:], uint16(sum))
	le.PutUint16(desc[descBitmapSumHi:], uint16(sum>>16))
	le.PutUint16(desc[descSum:], 0)
	le.PutUint16(desc[descSum:], uint16(ext4Sum(ext4Sum(w.seed, le.AppendUint32(nil, uint32(w.group))), desc)))
	_, err := w.f.WriteAt(w.bitmap, int64(le.Uint32(desc[descBitmap:]))*blockSize)
	return err
}
