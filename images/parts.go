package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

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

// makeParts turns the tree work/root into the parts of a disk; equal trees become
// equal parts. The manifest it returns lacks name and pack.
func makeParts(ctx context.Context, work string, date time.Time, out io.Writer) ([]source, *provision.Image, error) {
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
		{provision.PartESP, func(to string) error { return makeESP(ctx, filepath.Join(extra, "grubx64.efi"), to, date) }},
		{provision.PartRoot, func(to string) error { return makeRoot(ctx, root, to, date) }},
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
func makeESP(ctx context.Context, loader, to string, date time.Time) error {
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
		if err := toolAt(ctx, date, args...); err != nil {
			return err
		}
	}
	return nil
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
func tool(ctx context.Context, args ...string) error { return toolAt(ctx, time.Time{}, args...) }

// toolAt runs a tool to which the time is now, unless now is zero. mtools and e2fsprogs
// can be told, each in its way.
func toolAt(ctx context.Context, now time.Time, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MTOOLS_SKIP_CHECK=1")
	if !now.IsZero() {
		cmd.Env = append(cmd.Env, "TZ=UTC", fmt.Sprintf("SOURCE_DATE_EPOCH=%d", now.Unix()), fmt.Sprintf("E2FSPROGS_FAKE_TIME=%d", now.Unix()))
	}
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s failed: %w\n%s", args[0], err, bytes.TrimSpace(said))
	}
	return nil
}
