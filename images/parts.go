package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"platter/provision"
)

// GRUB's boot code is shipped as GRUB's own tools make it, and what depends on
// the place on a disk is filled in by the installer (GRUB 2.12,
// util/setup.c and include/grub/i386/pc/boot.h):
//
//   - PartBoot goes to the first 440 bytes of the disk. At 0x5c stands, as a
//     little-endian uint64, the sector that it loads: the first one of PartBIOS.
//   - PartBIOS goes to the start of the BIOS boot partition. The last entry of
//     its first sector, at 0x1f4, says where the rest of it lies: uint64 first
//     sector (the partition's first plus one), uint16 sectors, uint16 segment
//     0x820. grub-mkimage has filled in the last two.
//
// The root file system is found through GRUB's prefix "(,gpt3)/boot/grub": the
// third partition of the disk that GRUB was started from, as in
// provision.DefaultLayout.
const (
	bootCodeSize = 440
	// bootDriveCheck is a jump of two bytes that boot.img takes where the BIOS
	// hands over a sane drive number. Like grub-bios-setup for hard disks we
	// replace it by no-ops.
	bootDriveCheck = 0x66
	coreBlocklist  = 512 - 12
	coreSegment    = 0x820
)

// makeParts turns the tree work/root into the parts of a disk. The manifest it
// returns lacks name and pack.
func makeParts(ctx context.Context, work string, out io.Writer) ([]source, *provision.Image, error) {
	root := filepath.Join(work, "root")
	extra := filepath.Join(work, "extra")
	if err := os.Rename(filepath.Join(root, "platter"), extra); err != nil {
		return nil, nil, fmt.Errorf("the image's finish script left no parts: %w", err)
	}
	im, err := describe(root, extra)
	if err != nil {
		return nil, nil, err
	}
	path := func(part string) string { return filepath.Join(work, part+".part") }
	steps := []struct {
		part string
		make func(string) error
	}{
		{provision.PartBoot, func(to string) error { return makeBoot(filepath.Join(extra, "boot"), to) }},
		{provision.PartBIOS, func(to string) error { return makeBIOS(filepath.Join(extra, "bios"), to) }},
		{provision.PartESP, func(to string) error { return makeESP(ctx, filepath.Join(extra, "grubx64.efi"), to) }},
		{provision.PartRoot, func(to string) error { return makeRoot(ctx, root, to) }},
	}
	var sources []source
	for _, s := range steps {
		fmt.Fprintf(out, "  making part %s\n", s.part)
		if err := s.make(path(s.part)); err != nil {
			return nil, nil, fmt.Errorf("part %s of the image cannot be made: %w", s.part, err)
		}
		sources = append(sources, source{s.part, path(s.part)})
	}
	return sources, im, nil
}

// describe reads from the tree what its manifest says about it.
func describe(root, extra string) (*provision.Image, error) {
	installed, err := os.ReadFile(filepath.Join(extra, "installed"))
	if err != nil {
		return nil, err
	}
	packages, err := parseLock(installed)
	if err != nil {
		return nil, err
	}
	version, err := os.ReadFile(filepath.Join(root, "etc/debian_version"))
	if err != nil {
		return nil, err
	}
	// /vmlinuz is the link that GRUB follows.
	kernel, err := os.Readlink(filepath.Join(root, "vmlinuz"))
	if err != nil {
		return nil, fmt.Errorf("the image has no kernel: %w", err)
	}
	if _, err := os.Stat(filepath.Join(root, "initrd.img")); err != nil {
		return nil, fmt.Errorf("the image has no initramfs of its own: %w", err)
	}
	return &provision.Image{
		Format: provision.ImageFormat, Version: strings.TrimSpace(string(version)), Arch: "amd64", Family: "debian",
		Kernel: strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-"), Packages: packages,
	}, nil
}

func makeBoot(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if len(b) != 512 {
		return fmt.Errorf("boot.img is %d bytes instead of one sector", len(b))
	}
	b = b[:bootCodeSize]
	b[bootDriveCheck], b[bootDriveCheck+1] = 0x90, 0x90
	return os.WriteFile(to, b, 0o644)
}

func makeBIOS(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if len(b) <= 512 {
		return fmt.Errorf("core.img is only %d bytes", len(b))
	}
	sectors := (len(b) - 1) / 512 // behind the first
	if int(binary.LittleEndian.Uint16(b[coreBlocklist+8:])) != sectors || binary.LittleEndian.Uint16(b[coreBlocklist+10:]) != coreSegment {
		return fmt.Errorf("core.img has an unknown block list % x", b[coreBlocklist:512])
	}
	if limit := partition(provision.PartBIOS).Size; int64(len(b)) > limit {
		return fmt.Errorf("core.img is %d bytes and does not fit into its partition of %d", len(b), limit)
	}
	b = append(b, make([]byte, (512-len(b)%512)%512)...)
	return os.WriteFile(to, b, 0o644)
}

func partition(part string) provision.Partition {
	for _, p := range provision.DefaultLayout() {
		if p.Part == part {
			return p
		}
	}
	return provision.Partition{}
}

// makeESP makes the EFI system partition: the loader under the name that every
// firmware tries by itself, and under ours for the boot entry.
func makeESP(ctx context.Context, loader, to string) error {
	if err := sparse(to, partition(provision.PartESP).Size); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"mkfs.vfat", "--invariant", "-F", "32", "-s", "1", "-n", "PLATTER-ESP", to},
		{"mmd", "-i", to, "::/EFI", "::/EFI/BOOT", "::/EFI/platter"},
		{"mcopy", "-i", to, loader, "::/EFI/BOOT/BOOTX64.EFI"},
		{"mcopy", "-i", to, loader, "::/EFI/platter/grubx64.efi"},
		{"fsck.vfat", "-n", to},
	} {
		if err := tool(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

const (
	blockSize = 4096
	// One inode for this many bytes. The default of 16 KiB doubles the inode
	// tables that a grown file system has to clear.
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
// beside: the installer grows it. Free blocks are zeros and cost nothing.
func makeRoot(ctx context.Context, root, to string) error {
	used, err := treeSize(root)
	if err != nil {
		return err
	}
	// Inode tables and bitmaps come to about one per cent.
	size := max(used+used/20+(journalMiB+64)<<20, 4*journalMiB<<20)
	size -= size % (1 << 20)
	if err := sparse(to, size); err != nil {
		return err
	}
	if err := tool(ctx, "mkfs.ext4", "-q", "-F", "-b", fmt.Sprint(blockSize), "-i", fmt.Sprint(bytesPerInode),
		"-J", fmt.Sprintf("size=%d", journalMiB), "-m", "1", "-L", "platter-root",
		"-O", strings.Join(ext4Features, ","), "-E", fmt.Sprintf("resize=%d,lazy_itable_init=1,lazy_journal_init=1", uint32(1<<32-1)),
		"-d", root, to); err != nil {
		return err
	}
	return tool(ctx, "e2fsck", "-f", "-n", to)
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

func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

// tool runs one of the file system tools and returns an error that holds what
// it said.
func tool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MTOOLS_SKIP_CHECK=1")
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s failed: %w\n%s", args[0], err, bytes.TrimSpace(said))
	}
	return nil
}
