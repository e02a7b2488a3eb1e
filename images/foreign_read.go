package images

import (
	"bytes"
	"cmp"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// The forms in which a foreign system comes.
const (
	kindQCOW2 = "qcow2"
	kindRaw   = "raw disk"
	kindTar   = "tar"
	kindOCI   = "OCI archive"
)

// headSize is how much of a file tells what it is: Btrfs has its mark at 64 KiB.
const headSize = 68 << 10

// marks of what a foreign image can be, or is taken for. A kind that is empty
// is refused, with what is said of it.
var marks = []struct {
	at          int
	magic, kind string
	said        string
}{
	{0, "QFI\xfb", kindQCOW2, ""},
	{0, "KDMV", "", "a disk of VMware (VMDK)"},
	{0, "# Disk DescriptorFile", "", "the description of a disk of VMware (VMDK)"},
	{0, "vhdxfile", "", "a disk of Hyper-V (VHDX)"},
	{0, "conectix", "", "a disk of Hyper-V (VHD)"},
	{0x40, "\x7f\x10\xda\xbe", "", "a disk of VirtualBox (VDI)"},
	{257, "ustar", kindTar, ""},
	{0, "070701", "", "a cpio archive"},
	{0, "\xed\xab\xee\xdb", "", "an RPM package"},
	{0, "!<arch>\n", "", "a Debian package or a library"},
	{0, "hsqs", "", "a SquashFS file system"},
	{0, "PK\x03\x04", "", "a ZIP archive"},
	{0, "LUKS\xba\xbe", kindRaw, ""},
	{0, "XFSB", kindRaw, ""},
	{0x438, "\x53\xef", kindRaw, ""},
	{0x10040, "_BHRfS_M", kindRaw, ""},
	{512, "EFI PART", kindRaw, ""},
	{4096, "EFI PART", kindRaw, ""},
	{512, "LABELONE", kindRaw, ""},
	{510, "\x55\xaa", kindRaw, ""},
}

// identify tells by its first bytes what a file is. why says what it is
// otherwise.
func identify(head []byte) (kind, why string) {
	has := func(at int, magic string) bool {
		return len(head) >= at+len(magic) && string(head[at:at+len(magic)]) == magic
	}
	if has(0x8001, "CD001") {
		// Hybrid discs have a partition table too.
		return "", "an installation disc (ISO 9660): it installs a system and is none"
	}
	for _, m := range marks {
		if has(m.at, m.magic) {
			return m.kind, m.said
		}
	}
	return "", "of an unknown kind, or damaged"
}

// decompress looks through a compression, told by its first bytes. packing is
// "" where there is none.
func decompress(r *bytes.Buffer, rest io.Reader) (io.ReadCloser, string, error) {
	head := r.Bytes()
	all := io.MultiReader(r, rest)
	has := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case has("\x1f\x8b"):
		z, err := gzip.NewReader(all)
		return z, "gzip", err
	case has("\xfd7zXZ\x00"):
		z, err := xz.NewReader(all)
		return io.NopCloser(z), "xz", err
	case has("\x28\xb5\x2f\xfd"):
		z, err := zstd.NewReader(all, zstd.WithDecoderMaxWindow(1<<30))
		if err != nil {
			return nil, "zstd", err
		}
		return z.IOReadCloser(), "zstd", nil
	case has("BZh"):
		return io.NopCloser(bzip2.NewReader(all)), "bzip2", nil
	case has("\x04\x22\x4d\x18"), has("\x02\x21\x4c\x18"):
		return io.NopCloser(lz4.NewReader(all)), "lz4", nil
	}
	return io.NopCloser(all), "", nil
}

// qcow2Needs reads a header of QCOW version 2 or 3 (QEMU, docs/interop/qcow2)
// and says why the image cannot be taken by itself: qemu-img would read
// whatever other file of this machine it names.
func qcow2Needs(head []byte) (virtual int64, why string) {
	if len(head) < 104 {
		return 0, "is cut short"
	}
	be := binary.BigEndian
	version := be.Uint32(head[4:])
	switch {
	case version < 2 || version > 3:
		return 0, fmt.Sprintf("is of version %d, of which nothing is known", version)
	case be.Uint64(head[8:]) != 0:
		return 0, "is only the difference to another image (backing file)"
	case be.Uint32(head[32:]) != 0:
		return 0, "is encrypted"
	case version == 3 && be.Uint64(head[72:])&(1<<2) != 0:
		return 0, "has its data in another file"
	}
	return int64(be.Uint64(head[24:])), ""
}

// counted counts the bytes that are read.
type counted struct {
	r    io.Reader
	each func(n int64)
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if n > 0 {
		c.each(int64(n))
	}
	return n, err
}

// untilDone reads until its context ends.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// reading is a foreign image on its way into a tree.
type reading struct {
	work *scratch
	file string
	size int64
	out  io.Writer
	tree *unpacker
	kind string
	// findings are what the tree does not show.
	findings []Finding
}

// keepFree is how much room is kept free in the work folder, in bytes.
const keepFree = 256 << 20

// unpackForeign makes a tree in work/root of the system in file. Its error is
// a *Unfit where the file is not what can be installed.
func unpackForeign(ctx context.Context, work *scratch, file string, out io.Writer) (*reading, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("the image cannot be read: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file: name a disk image, a tar archive or an OCI archive", file)
	}
	// The tree takes at least as much as it does packed; holes take nothing.
	packed := st.Size()
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		packed = min(packed, sys.Blocks*512)
	}
	if err := enoughRoom(work.dir, packed+keepFree, "the work folder"); err != nil {
		return nil, err
	}
	j, err := newJail(filepath.Join(work.dir, "root"))
	if err != nil {
		return nil, err
	}
	defer j.Close()
	x := &reading{work: work, file: file, size: st.Size(), out: out, tree: &unpacker{jail: j, room: keepFree}}
	if err := x.from(ctx, f); err != nil {
		return nil, err
	}
	return x, x.tree.finish()
}

func (x *reading) refuse(what, why, next string) error {
	return &Unfit{Foreign{File: x.file, Kind: x.kind, Findings: []Finding{{Refused, what, why, next}}}}
}

func (x *reading) from(ctx context.Context, f *os.File) error {
	show := progress(x.out, "reading")
	done := int64(0)
	r := counted{untilDone{ctx, f}, func(n int64) { done += n; show(done, x.size) }}
	first := &bytes.Buffer{}
	if _, err := io.CopyN(first, r, headSize); err != nil && err != io.EOF {
		return fmt.Errorf("%s cannot be read: %w", x.file, err)
	}
	z, packing, err := decompress(first, r)
	if err != nil {
		return fmt.Errorf("%s cannot be decompressed (%s): %w", x.file, packing, err)
	}
	defer z.Close()
	inner := &bytes.Buffer{}
	if _, err := io.CopyN(inner, z, headSize); err != nil && err != io.EOF {
		return fmt.Errorf("%s cannot be read: %w", x.file, err)
	}
	head := bytes.Clone(inner.Bytes())
	kind, why := identify(head)
	x.kind = strings.TrimSpace(kind + " " + packing)
	switch kind {
	case kindTar:
		fmt.Fprintf(x.out, "unpacking %s (%s)\n", x.file, x.kind)
		if err := x.tree.unpack(ctx, io.MultiReader(inner, z)); err != nil {
			return fmt.Errorf("%s: %w", x.file, err)
		}
		return x.archive(ctx)
	case kindRaw, kindQCOW2:
		disk := x.file
		if packing != "" {
			disk = filepath.Join(x.work.dir, "file")
			fmt.Fprintf(x.out, "decompressing %s (%s)\n", x.file, x.kind)
			if _, err := sparseCopy(ctx, disk, io.MultiReader(inner, z), keepFree); err != nil {
				return fmt.Errorf("%s cannot be decompressed: %w", x.file, err)
			}
		}
		if kind == kindQCOW2 {
			if disk, err = x.convert(ctx, disk, head); err != nil {
				return err
			}
		}
		if err := x.disk(ctx, disk); err != nil {
			return err
		}
		return x.drop(disk)
	}
	next := "Name a qcow2 or raw disk image, a tar archive of a root file system, or an OCI archive"
	if strings.Contains(why, "a disk of ") {
		next = "Convert it with 'qemu-img convert -O qcow2 FILE NEW' and import that"
	}
	return x.refuse("kind of file", "it is "+why, next)
}

// convert makes a raw disk of a qcow2 image.
func (x *reading) convert(ctx context.Context, file string, head []byte) (string, error) {
	virtual, why := qcow2Needs(head)
	if why != "" {
		return "", x.refuse("qcow2 image", "it "+why, "Make a whole image of it where it comes from: 'qemu-img convert -O qcow2 FILE NEW', and import that")
	}
	raw := filepath.Join(x.work.dir, "disk")
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-p", "-f", "qcow2", "-O", "raw", file, raw)
	show := progress(x.out, "converting")
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.Stdout = percentWriter(func(p float64) { show(int64(p/100*float64(virtual)), virtual) })
	fmt.Fprintf(x.out, "converting %s (%s, %s)\n", x.file, x.kind, mb(virtual))
	if err := x.work.run(cmd); err != nil {
		return "", x.failed(ctx, "qemu-img", err, said.Bytes())
	}
	return raw, x.drop(file)
}

// drop takes a file away that is no longer needed and that was made here.
func (x *reading) drop(file string) error {
	if filepath.Dir(file) != x.work.dir {
		return nil
	}
	return os.RemoveAll(file)
}

func (x *reading) failed(ctx context.Context, tool string, err error, said []byte) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%s is missing on this machine, 'make deps' installs it: %w", tool, err)
	}
	return fmt.Errorf("%s of %s failed: %w\n%s", tool, x.file, err, bytes.TrimSpace(said))
}

// percentWriter hears "    (12.34/100%)\r", as qemu-img -p writes it.
type percentWriter func(float64)

func (w percentWriter) Write(p []byte) (int, error) {
	for _, part := range bytes.Split(p, []byte("\r")) {
		var percent float64
		if _, err := fmt.Sscanf(strings.TrimSpace(string(part)), "(%f/100%%)", &percent); err == nil {
			w(percent)
		}
	}
	return len(p), nil
}

// volume is a stretch of a disk, a partition or the whole, and what is on it.
type volume struct {
	name        string
	start, size int64 // bytes
	fs          string
	why         string // it cannot be read
	unclean     bool   // it was not unmounted
}

func (v volume) String() string {
	said := fmt.Sprintf("%s: %s", v.name, cmp.Or(v.fs, "nothing known"))
	switch {
	case v.why != "":
		said += ", cannot be read: " + v.why
	case v.unclean:
		said += ", not shut down cleanly"
	}
	return said
}

func joined(volumes []volume) string {
	var said []string
	for _, v := range volumes {
		said = append(said, v.String())
	}
	return strings.Join(said, "; ")
}

// mountable are the file systems that a tree is read from: the options with
// which they are mounted, and those that do it without the journal, which is
// never replayed. The kernel refuses one that it would have to replay.
var mountable = map[string]struct{ options, noJournal string }{
	"ext2": {"ro", ""}, "ext3": {"ro", "noload"}, "ext4": {"ro", "noload"}, "xfs": {"ro,nouuid", "norecovery"}, "btrfs": {"ro,subvolid=5", "rescue=nologreplay"},
}

// disk reads the tree off a raw disk or a bare file system.
func (x *reading) disk(ctx context.Context, disk string) error {
	volumes, err := x.volumes(ctx, disk)
	if err != nil {
		return err
	}
	var root, boot *volume
	var sub string
	var closed []string
	for i, v := range volumes {
		if v.fs == "LVM2_member" || v.fs == "crypto_LUKS" || v.fs == "linux_raid_member" {
			closed = append(closed, fmt.Sprintf("%s is %s", v.name, map[string]string{"LVM2_member": "a volume of LVM", "crypto_LUKS": "encrypted (LUKS)", "linux_raid_member": "a member of a RAID"}[v.fs]))
			continue
		}
		if _, ok := mountable[v.fs]; !ok {
			continue
		}
		said, err := x.mounted(ctx, disk, v, nil, lookScript)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil { // another may hold all that is wanted
			volumes[i].why = err.Error()
			continue
		}
		for line := range strings.Lines(said) {
			switch key, value, _ := strings.Cut(strings.TrimSpace(line), " "); {
			case key == "root" && root == nil:
				root, sub = &volumes[i], value
			case key == "kernel" && boot == nil:
				boot = &volumes[i]
			case key == "unclean":
				volumes[i].unclean = true
			}
		}
	}
	if root == nil {
		const next = "On a machine that runs the system: 'tar --numeric-owner --xattrs --xattrs-include=* --one-file-system -cpzf root.tar.gz -C / .' (with /boot beside it where that is a file system of its own), and import root.tar.gz"
		if len(closed) > 0 {
			return x.refuse("root file system", "none can be read: "+strings.Join(closed, ", "), next)
		}
		return x.refuse("root file system", fmt.Sprintf("no partition holds one, with /etc/os-release; there are: %s", joined(volumes)), next)
	}
	x.judge(volumes, root, boot)
	fmt.Fprintf(x.out, "copying the tree from %s (%s)\n", root.name, root.fs)
	if err := x.copyTree(ctx, disk, *root, sub, ""); err != nil {
		return err
	}
	if boot != nil && boot != root {
		fmt.Fprintf(x.out, "copying /boot from %s (%s)\n", boot.name, boot.fs)
		return x.copyTree(ctx, disk, *boot, ".", "boot")
	}
	return nil
}

// judge tells what is lacking of the volumes of a disk whose tree can be copied.
func (x *reading) judge(volumes []volume, copied ...*volume) {
	for i, v := range volumes {
		if v.why != "" {
			x.findings = append(x.findings, Finding{Lacks, v.name, "it cannot be read, nothing of it was copied: " + v.why,
				"Where the system needs it, pack the running system with tar and import the archive"})
		}
		if v.unclean && slices.Contains(copied, &volumes[i]) {
			x.findings = append(x.findings, Finding{Lacks, v.name, "it was not shut down cleanly: what was written last may be missing or damaged",
				"Start the machine that it comes from, shut it down, copy its disk again, and import that"})
		}
	}
}

// volumes are the partitions of a disk, or the whole where it has none.
func (x *reading) volumes(ctx context.Context, disk string) ([]volume, error) {
	st, err := os.Stat(disk)
	if err != nil {
		return nil, err
	}
	whole := volume{name: "the whole file", size: st.Size()}
	if err := whole.probe(ctx, disk); err != nil {
		return nil, err
	}
	if whole.fs != "" {
		return []volume{whole}, nil
	}
	cmd := exec.CommandContext(ctx, "sfdisk", "--json", disk)
	var said bytes.Buffer
	cmd.Stderr = &said
	text, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil || errors.Is(err, exec.ErrNotFound) {
			return nil, x.failed(ctx, "sfdisk", err, nil)
		}
		return nil, x.refuse("partition table", fmt.Sprintf("it cannot be read: %s", bytes.TrimSpace(said.Bytes())), "See that the file was copied as a whole")
	}
	var table struct {
		PartitionTable struct {
			Label      string
			SectorSize int64 `json:"sectorsize"`
			Partitions []struct {
				Start, Size int64
			}
		}
	}
	if err := json.Unmarshal(text, &table); err != nil {
		return nil, fmt.Errorf("sfdisk's account of %s: %w", x.file, err)
	}
	if table.PartitionTable.Label != "gpt" && beginsGPT(disk) {
		return nil, x.refuse("partition table", "it is a GPT that is damaged, or the file was cut short", "Copy the file again, as a whole")
	}
	var out []volume
	sector := max(table.PartitionTable.SectorSize, 512)
	for i, p := range table.PartitionTable.Partitions {
		v := volume{name: fmt.Sprintf("partition %d", i+1), start: p.Start * sector, size: p.Size * sector}
		if v.size <= 0 || v.start < 0 || v.start > st.Size()-v.size {
			return nil, x.refuse("partition table", fmt.Sprintf("%s ends at byte %d, the disk at %d: the file was cut short", v.name, v.start+v.size, st.Size()), "Copy the file again, as a whole")
		}
		if err := v.probe(ctx, disk); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// beginsGPT tells whether there is the head of a GPT.
func beginsGPT(disk string) bool {
	f, err := os.Open(disk)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, 520)
	_, err = io.ReadFull(f, head)
	return err == nil && string(head[512:]) == "EFI PART"
}

// probe finds out what v holds: what blkid calls it, or nothing where it is a
// partition table or unknown.
func (v *volume) probe(ctx context.Context, disk string) error {
	out, err := exec.CommandContext(ctx, "blkid", "--probe", "--offset", fmt.Sprint(v.start), "--size", fmt.Sprint(v.size), "--output", "export", disk).Output()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit) && exit.ExitCode() == 2: // nothing found
		return nil
	case errors.As(err, &exit) && exit.ExitCode() == 8:
		v.why = "it has the marks of several file systems ('wipefs' lists them)"
		return nil
	case err != nil:
		return fmt.Errorf("blkid of %s: %w", disk, err)
	}
	for line := range strings.Lines(string(out)) {
		if t, ok := strings.CutPrefix(strings.TrimSpace(line), "TYPE="); ok {
			v.fs = t
		}
	}
	return nil
}

// Scripts that run where v is mounted on the folder $1. Links are not followed
// out of it: os-release may be one, the folders that lead to it may not.
const (
	mountScript = `
if ! said=$(mount -t "$2" -o "$3" "$5" "$1" 2>&1); then
	if [ -z "$4" ] || ! mount -t "$2" -o "$3,$4" "$5" "$1" 2>/dev/null; then echo "$said" >&2; exit 99; fi
	unclean=unclean
fi
dir=$1; shift 5; set -- "$dir" "$@"`
	lookScript = `
echo $unclean
for d in . root @ @rootfs; do
	if [ -L "$1/$d" ] || [ -L "$1/$d/etc" ]; then continue; fi
	if [ -f "$1/$d/etc/os-release" ] || [ -L "$1/$d/etc/os-release" ]; then echo "root $d"; break; fi
done
for k in "$1"/vmlinuz-*; do if [ -f "$k" ] && [ ! -L "$k" ]; then echo kernel; break; fi; done`
	copyScript = `
echo "used $(df --block-size=1 --output=used "$1" | tail -n 1)" >&2
exec tar --create --file=- --directory="$1/$2" --one-file-system --numeric-owner --sparse --format=posix --xattrs --xattrs-include='*' .`
)

// mounted mounts v in a mount namespace that ends with the script, read-only,
// and returns what the script printed, or leaves that to take. more are the
// script's arguments from $2 on.
func (x *reading) mounted(ctx context.Context, disk string, v volume, take func(*exec.Cmd) error, script string, more ...string) (string, error) {
	dir := filepath.Join(x.work.dir, "mnt")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	options := fmt.Sprintf("%s,nodev,nosuid,noexec,loop,offset=%d,sizelimit=%d", mountable[v.fs].options, v.start, v.size)
	args := append([]string{"-c", mountScript + script, "sh", dir, v.fs, options, mountable[v.fs].noJournal, disk}, more...)
	cmd := exec.CommandContext(ctx, "sh", args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	run := x.work.run
	if take != nil {
		run = take
	}
	err := run(cmd)
	var exit *exec.ExitError
	switch {
	case err == nil || ctx.Err() != nil:
		return out.String(), ctx.Err()
	case errors.As(err, &exit) && exit.ExitCode() == 99:
		why, _, _ := strings.Cut(strings.TrimPrefix(said.String(), "mount: "+dir+": "), "\n")
		return "", fmt.Errorf("the kernel of this machine does not mount it (%s): %s", v.fs, why)
	}
	return "", fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.Bytes()))
}

// copyTree copies what v holds in its folder sub to below.
func (x *reading) copyTree(ctx context.Context, disk string, v volume, sub, below string) error {
	x.tree.below = below
	show := progress(x.out, "copying")
	var done int64
	var total atomic.Int64
	_, err := x.mounted(ctx, disk, v, func(cmd *exec.Cmd) error {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		cmd.Stdout = w
		said := cmd.Stderr
		cmd.Stderr = &lineWriter{each: func(line string) {
			var used int64
			if _, err := fmt.Sscanf(line, "used %d", &used); err != nil {
				fmt.Fprintln(said, line)
				return
			}
			total.Store(used)
		}}
		ended := make(chan error, 1)
		go func() {
			err := x.work.run(cmd)
			w.Close()
			ended <- err
		}()
		err = x.tree.unpack(ctx, counted{r, func(n int64) { done += n; show(done, max(total.Load(), done+1)) }})
		r.Close() // tar ends where nobody reads on
		if runErr := <-ended; runErr != nil && (err == nil || done == 0) {
			return runErr
		}
		return err
	}, copyScript, sub)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("%s of %s cannot be copied: %w", v.name, x.file, err)
	}
	return err
}

// archive looks whether what was unpacked is an OCI archive and, if so, puts
// the tree of its image in its place.
func (x *reading) archive(ctx context.Context) error {
	j := x.tree.jail
	switch {
	case j.has("etc"):
		return nil
	case j.has("oci-layout") && j.has("index.json"):
	case j.has("manifest.json"):
		return x.refuse("kind of file", "it is an archive of Docker's own form", "Save it with 'podman save --format oci-archive' or 'skopeo copy docker-archive:FILE oci-archive:NEW', and import that")
	default:
		names := j.list(".")
		return x.refuse("root file system", fmt.Sprintf("the archive has no etc at its top, but %s", strings.Join(names[:min(len(names), 8)], ", ")), "Pack the tree from its root: 'tar --numeric-owner --xattrs --xattrs-include=* -cpf root.tar -C TREE .'")
	}
	x.kind = strings.Replace(x.kind, kindTar, kindOCI, 1)
	if err := x.tree.finish(); err != nil {
		return err
	}
	blobs, root := filepath.Join(x.work.dir, "oci"), filepath.Join(x.work.dir, "root")
	if err := os.Rename(root, blobs); err != nil {
		return err
	}
	fresh, err := newJail(root)
	if err != nil {
		return err
	}
	// The jail that the caller closes.
	x.tree.jail.dir, fresh.dir = fresh.dir, x.tree.jail.dir
	fresh.Close()
	x.tree.files, x.tree.bytes, x.tree.newest = 0, 0, time.Time{}
	if err := onlyFiles(blobs); err != nil {
		return x.refuse("OCI archive", err.Error(), "Save it anew with 'podman save --format oci-archive' or 'skopeo copy'")
	}
	index, err := layout.ImageIndexFromPath(blobs)
	if err != nil {
		return x.refuse("OCI archive", err.Error(), "Save it anew with 'podman save --format oci-archive' or 'skopeo copy'")
	}
	img, platforms, err := imageOf(index, maxIndexes)
	if err != nil {
		return x.refuse("OCI archive", err.Error(), "Save it anew with 'podman save --format oci-archive' or 'skopeo copy'")
	}
	if img == nil {
		return x.refuse("architecture", fmt.Sprintf("the archive has no image for linux/amd64, but for %s", strings.Join(platforms, ", ")), "Save the image for amd64: nodes are x86-64")
	}
	fmt.Fprintf(x.out, "checking the layers of %s\n", x.file)
	checked := make(chan error, 1)
	go func() { checked <- validate.Image(img) }() // which knows no context
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err = <-checked:
	}
	if err != nil {
		return x.refuse("OCI archive", "its layers are not what its manifest says: "+err.Error(), "Copy the file again, as a whole")
	}
	flat := mutate.Extract(img)
	defer flat.Close()
	if err := x.tree.unpack(ctx, flat); err != nil {
		return fmt.Errorf("%s: %w", x.file, err)
	}
	return x.drop(blobs)
}

// onlyFiles refuses a layout with anything but files and folders: a link would
// have other files of this machine read.
func onlyFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !d.Type().IsRegular() {
			return fmt.Errorf("%s in it is neither a file nor a folder", strings.TrimPrefix(path, dir))
		}
		return err
	})
}

// maxIndexes is how many indexes lie in each other; podman and skopeo make two.
const maxIndexes = 4

// imageOf finds the image for linux/amd64 in an index and what is below it, or
// tells for which platforms there are some. One that states no platform is
// judged by its configuration. It goes down at most depth indexes: one may name
// itself.
func imageOf(index v1.ImageIndex, depth int) (found v1.Image, platforms []string, err error) {
	if depth == 0 {
		return nil, nil, errors.New("its indexes lie too deep in each other, or one names itself")
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, nil, err
	}
	for _, d := range m.Manifests {
		switch d.MediaType {
		case types.OCIImageIndex, types.DockerManifestList:
			below, err := index.ImageIndex(d.Digest)
			if err != nil {
				return nil, nil, err
			}
			img, more, err := imageOf(below, depth-1)
			if err != nil || img != nil {
				return img, nil, err
			}
			platforms = append(platforms, more...)
		case types.OCIManifestSchema1, types.DockerManifestSchema2:
			img, err := index.Image(d.Digest)
			if err != nil {
				return nil, nil, err
			}
			c, err := img.ConfigFile()
			if err != nil {
				return nil, nil, err
			}
			if c.OS == "linux" && c.Architecture == "amd64" {
				return img, nil, nil
			}
			if p := c.OS + "/" + c.Architecture; !slices.Contains(platforms, p) {
				platforms = append(platforms, p)
			}
		}
	}
	return nil, platforms, nil
}
