package disc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"platter/provision"
)

// haveTool says what to install where a tool is missing.
func haveTool(name string) error {
	packages := map[string]string{"xorriso": "xorriso", "mkfs.vfat": "dosfstools", "mmd": "mtools", "mcopy": "mtools"}
	if _, err := exec.LookPath(name); err != nil {
		return fmt.Errorf("the program %s is missing: install Debian's package %s", name, packages[name])
	}
	return nil
}

// tool runs a program that makes equal bytes of equal input at any time.
func (b *builder) tool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC", "MTOOLS_SKIP_CHECK=1", fmt.Sprint("SOURCE_DATE_EPOCH=", b.set.Made.Unix()))
	said, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%s failed: %w\n%s", args[0], err, bytes.TrimSpace(said))
	}
	return nil
}

// volume makes the ISO of volume n in the work folder. Its packs go.
func (b *builder) volume(ctx context.Context, n int, manifest, signature []byte) (string, error) {
	v := b.set.Volumes[n-1]
	root := filepath.Join(b.work, fmt.Sprint("volume-", n))
	texts := v.derived(manifest, signature)
	texts[structureFile] = make([]byte, structureSize)
	for p, text := range texts {
		if err := b.lay(root, p, bytes.NewReader(text)); err != nil {
			return "", err
		}
	}
	sources := append([]source{b.lines[n-1]}, b.every...)
	if n == 1 {
		sources = append(sources, b.first...)
	}
	for _, s := range sources {
		r, err := s.open()
		if err != nil {
			return "", err
		}
		err = b.lay(root, s.Path, r)
		r.Close()
		if err != nil {
			return "", err
		}
	}
	for _, f := range v.Files {
		if strings.HasPrefix(f.Path, "platter/pack-") {
			if err := os.Rename(filepath.Join(b.work, filepath.Base(f.Path)), filepath.Join(root, f.Path)); err != nil {
				return "", err
			}
		}
	}
	to := filepath.Join(b.work, fmt.Sprint(n, ".iso"))
	weights, err := b.weights(v)
	if err != nil {
		return "", err
	}
	args := []string{"xorriso", "-as", "mkisofs", "-quiet", "-r", "-J", "-joliet-long", "-V", v.Label, "--sort-weight-list", weights, "-o", to}
	if n == 1 && b.set.Base == "" {
		more, err := b.bootable(ctx, root)
		if err != nil {
			return "", err
		}
		args = append(args, more...)
	}
	if err := b.sameTime(root); err != nil {
		return "", err
	}
	if err := b.tool(ctx, append(args, root)...); err != nil {
		return "", fmt.Errorf("volume %d cannot be made: %w", n, err)
	}
	if err := os.RemoveAll(root); err != nil {
		return "", err
	}
	if err := b.coverStructure(to, v, manifest); err != nil {
		return "", fmt.Errorf("volume %d cannot be made: %w", n, err)
	}
	return to, nil
}

// lay writes a file of a volume.
func (b *builder) lay(root, path string, r io.Reader) error {
	to := filepath.Join(root, filepath.FromSlash(path))
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := writeAll(to, r); err != nil {
		return fmt.Errorf("volumes cannot be written to %s: %w", b.Out, err)
	}
	if strings.HasPrefix(path, "bin/") {
		return os.Chmod(to, 0o755)
	}
	return nil
}

// weights is a file that tells xorriso to lay files as they are listed: drives
// read on faster than they seek.
func (b *builder) weights(v Volume) (string, error) {
	var text strings.Builder
	w := 1 << 20
	add := func(p string) {
		fmt.Fprintf(&text, "%d /%s\n", w, p)
		w--
	}
	for _, p := range []string{SetFile, signatureFile, sumsFile, listFile, structureFile} {
		add(p)
	}
	for _, f := range v.Files {
		add(f.Path)
	}
	file := filepath.Join(b.work, "weights")
	return file, os.WriteFile(file, []byte(text.String()), 0o644)
}

// sameTime gives every file the set's date.
func (b *builder) sameTime(root string) error {
	return filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, b.set.Made, b.set.Made)
	})
}

// Where the loaders of the disc lie on it.
const (
	elToritoFile = "boot/grub/eltorito.img"
	catalogFile  = "boot/grub/boot.cat"
)

// bootable lays the loaders below root and returns what xorriso has to be told:
// BIOS starts from a CD through El Torito and from a USB stick through the
// hybrid boot sector, UEFI from either through the EFI partition behind the file
// system.
func (b *builder) bootable(ctx context.Context, root string) ([]string, error) {
	l := b.boot.Disc
	efi, hybrid, loader := filepath.Join(b.work, "efi.img"), filepath.Join(b.work, "hybrid.img"), filepath.Join(b.work, "bootx64.efi")
	for o, to := range map[provision.Object]string{l.ElTorito: filepath.Join(root, elToritoFile), l.Hybrid: hybrid, l.EFI: loader} {
		if err := b.extract(o, to); err != nil {
			return nil, err
		}
	}
	st, err := os.Stat(loader)
	if err != nil {
		return nil, err
	}
	os.Remove(efi)
	f, err := os.Create(efi)
	if err != nil {
		return nil, err
	}
	// FAT12 up to 4 MiB, with room for its own tables.
	err = errors.Join(f.Truncate((st.Size()+(512<<10)+(1<<20)-1)>>20<<20), f.Close(), os.Chtimes(loader, b.set.Made, b.set.Made))
	if err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"mkfs.vfat", "--invariant", "-n", "PLATTEREFI", efi},
		{"mmd", "-i", efi, "::/EFI", "::/EFI/BOOT"},
		{"mcopy", "-m", "-i", efi, loader, "::/EFI/BOOT/BOOTX64.EFI"},
	} {
		if err := b.tool(ctx, args...); err != nil {
			return nil, err
		}
	}
	return []string{
		"-c", catalogFile,
		"-b", elToritoFile, "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "--grub2-boot-info",
		"--grub2-mbr", hybrid,
		"-append_partition", "2", "0xef", efi,
		"-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot",
	}, nil
}

// grubConfig is the menu of the disc. %s serves nobody: it is the same on every
// machine.
func grubConfig(s *Spec) []byte {
	return fmt.Appendf(nil, `# %[1]s %[2]s. Both the screen and the first serial line are asked.
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout=10
set default=0

menuentry "%[1]s %[2]s: serve a rack from this machine" {
	linux /boot/vmlinuz platter.life=dischost console=tty0 console=ttyS0,115200 panic=30 quiet
	initrd /boot/initrd.img
}
menuentry "Check every byte of this disc" {
	linux /boot/vmlinuz platter.life=dischost platter.do=verify console=tty0 console=ttyS0,115200 panic=30 quiet
	initrd /boot/initrd.img
}
menuentry "A shell, with all disks left alone" {
	linux /boot/vmlinuz platter.life=rescue console=tty0 console=ttyS0,115200 quiet
	initrd /boot/initrd.img
}
menuentry "Restart" { reboot }
menuentry "Switch off" { halt }
`, s.Name, s.Version)
}
