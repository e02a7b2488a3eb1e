package images

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/gobusybox/src/pkg/golang"
	"github.com/u-root/mkuimage/cpio"
	"github.com/u-root/mkuimage/uimage"
	"github.com/u-root/mkuimage/uimage/initramfs"
	"github.com/u-root/uio/llog"

	"platter/provision"
)

// MaxInitramfs is how large a compressed initramfs may be, in bytes. It is
// fetched by every node, over whatever its firmware speaks.
const MaxInitramfs = 25 << 20

// InitramfsOptions say what to build a boot set from.
type InitramfsOptions struct {
	Store *Store
	// PlatterNode is the static binary that u-root's init starts.
	PlatterNode string
	// Image in the store, whose kernel and drivers are taken.
	Image string
	// Source is the folder of our go.mod, which fixes the versions of u-root.
	Source string
	// SecretKey is the file of a minisign key that the store trusts.
	SecretKey string
	// WorkDir is for scratch, about 1.5 GB, and keeps u-root's commands between
	// builds.
	WorkDir string
	// Out gets lines for people.
	Out io.Writer
}

// BuildInitramfs publishes boot/ARCH: the image's kernel and an initramfs of
// u-root's commands, platter-node as its uinit, the drivers that servers need
// and the store's trusted keys in /etc/platter/keys. It needs a Go toolchain
// and debugfs. A set whose inputs have not changed is not built again.
func BuildInitramfs(ctx context.Context, o InitramfsOptions) (*BootSet, error) {
	key, err := o.Store.readSecretKey(o.SecretKey)
	if err != nil {
		return nil, err
	}
	keys, err := o.Store.trusted()
	if err != nil {
		return nil, err
	}
	ref, im, err := o.Store.Image(o.Image)
	if err != nil {
		return nil, err
	}
	name := "boot/" + im.Arch
	if err := checkStatic(o.PlatterNode); err != nil {
		return nil, err
	}
	commandsHash, err := o.commandsHash(ctx)
	if err != nil {
		return nil, err
	}
	inputs, err := o.inputs(ref, keys, key, commandsHash)
	if err != nil {
		return nil, err
	}
	if old, err := o.Store.readRef(name); err == nil && old.Inputs == inputs {
		if set, err := o.Store.Boot(im.Arch); err == nil {
			fmt.Fprintf(o.Out, "initramfs for %s reused: nothing it is made of has changed\n", im.Arch)
			return &set, nil
		}
	}

	work, err := newScratch(o.WorkDir, "initramfs-"+im.Arch)
	if err != nil {
		return nil, err
	}
	defer work.remove()
	commands, err := o.commands(ctx, work, commandsHash)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(o.Out, "  taking kernel %s and its drivers from image %s\n", im.Kernel, o.Image)
	if err := o.extract(ctx, im, work.dir); err != nil {
		return nil, err
	}
	files, err := o.files(work.dir, im.Kernel, keys)
	if err != nil {
		return nil, err
	}
	packed, err := archive(ctx, files, commands)
	if err != nil {
		return nil, err
	}
	if err := checkBudget(len(packed)); err != nil {
		return nil, err
	}

	m := bootManifest{Format: bootFormat, Arch: im.Arch, BootSet: BootSet{Release: im.Kernel}}
	if m.URoot, err = o.uroot(); err != nil {
		return nil, err
	}
	if m.Kernel, err = o.Store.putFile(filepath.Join(work.dir, "vmlinuz")); err != nil {
		return nil, err
	}
	if m.Local, err = o.Store.putFile(filepath.Join(work.dir, "local.efi")); err != nil {
		return nil, err
	}
	if m.Initramfs, err = o.Store.put(bytes.NewReader(packed)); err != nil {
		return nil, err
	}
	if m.Disc, err = o.discLoaders(work.dir); err != nil {
		return nil, err
	}
	if _, err := o.Store.publish(name, m, inputs, key); err != nil {
		return nil, err
	}
	fmt.Fprintf(o.Out, "initramfs for %s, kernel %s: %s, kernel %s\n", im.Arch, im.Kernel, mb(m.Initramfs.Size), mb(m.Kernel.Size))
	return &m.BootSet, nil
}

func checkBudget(size int) error {
	if size > MaxInitramfs {
		return fmt.Errorf("initramfs is %s and must not exceed %s: take commands or drivers out of it", mb(int64(size)), mb(MaxInitramfs))
	}
	return nil
}

// initramfsVersion changes when the code that puts an initramfs together does.
const initramfsVersion = "4"

// inputs is a hash over everything that decides how the boot set comes out.
func (o InitramfsOptions) inputs(image provision.ImageRef, keys []publicKey, key secretKey, commands string) (string, error) {
	node, err := os.ReadFile(o.PlatterNode)
	if err != nil {
		return "", fmt.Errorf("platter-node cannot be read: %w", err)
	}
	in := []any{initramfsVersion, image.Digest, hexSum(node), key.ID(), commands}
	for _, k := range keys {
		in = append(in, k.name, string(k.text))
	}
	for _, list := range []string{storageModules, nodeModules} {
		w, err := words(recipes, list)
		if err != nil {
			return "", err
		}
		in = append(in, w)
	}
	b, err := json.Marshal(in)
	return hexSum(b), err
}

// checkStatic refuses a binary that would need a loader and libraries: the
// initramfs has none.
func checkStatic(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("platter-node cannot be used: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically: build it with CGO_ENABLED=0", file)
		}
	}
	return nil
}

// uroot is the version of u-root that the commands are built of.
func (o InitramfsOptions) uroot() (string, error) {
	file := filepath.Join(o.Source, "go.mod")
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "github.com/u-root/u-root" {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("%s does not name u-root", file)
}

// commandsHash changes with the commands wanted, their versions and the
// compiler.
func (o InitramfsOptions) commandsHash(ctx context.Context) (string, error) {
	version := exec.CommandContext(ctx, "go", "env", "GOVERSION")
	version.Dir = o.Source
	goVersion, err := version.Output()
	if err != nil {
		return "", fmt.Errorf("u-root needs a Go toolchain, and 'go env' fails: %w", err)
	}
	var parts [][]byte
	for _, f := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(o.Source, f))
		if err != nil {
			return "", fmt.Errorf("u-root is built in the versions of Platter's go.mod, which is not in %s: %w", o.Source, err)
		}
		// Only what u-root is made of counts: the rest changes often.
		var relevant []string
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "u-root/") || strings.Contains(line, "golang.org/x/") || strings.Contains(line, "mvdan.cc/") || strings.Contains(line, "netlink") {
				relevant = append(relevant, strings.TrimSpace(line))
			}
		}
		parts = append(parts, []byte(strings.Join(relevant, "\n")))
	}
	list, err := fs.ReadFile(recipes, commandList)
	if err != nil {
		return "", err
	}
	return hexSum(bytes.Join(append(parts, goVersion, list), []byte{0})), nil
}

const (
	commandList = "recipe/commands"
	// commandTag gives u-root's shell the smaller of its two line editors.
	commandTag = "goshliner"
)

// commands compiles u-root's commands into an archive, or finds one that an
// earlier build left.
func (o InitramfsOptions) commands(ctx context.Context, work *scratch, hash string) (string, error) {
	kept := filepath.Join(o.WorkDir, "uroot-"+hash[:16]+".cpio")
	if _, err := os.Stat(kept); err == nil {
		fmt.Fprintf(o.Out, "  u-root's commands reused\n")
		return kept, nil
	}
	names, err := words(recipes, commandList)
	if err != nil {
		return "", err
	}
	var packages []string
	for _, n := range names {
		packages = append(packages, "github.com/u-root/u-root/cmds/core/"+n)
	}
	fmt.Fprintf(o.Out, "  compiling %d commands of u-root, about a minute\n", len(names))
	source, err := filepath.Abs(o.Source)
	if err != nil {
		return "", err
	}
	tmp, fresh := filepath.Join(work.dir, "uroot"), filepath.Join(work.dir, "uroot.cpio")
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return "", err
	}
	// A program built with -trimpath does not know where its toolchain was.
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("u-root's commands need a Go toolchain, and go does not answer: %w", err)
	}
	opts, err := uimage.OptionsFor(
		uimage.WithReplaceEnv(golang.Default(golang.DisableCGO(), golang.WithGOROOT(strings.TrimSpace(string(root))), golang.WithGOARCH("amd64"), golang.WithBuildTag(commandTag), golang.WithWorkingDir(source))),
		uimage.WithTempDir(tmp),
		uimage.WithBusyboxCommands(packages...),
		uimage.WithInit("init"),
		uimage.WithUinit("/bin/platter-node"),
		uimage.WithShell("gosh"),
		uimage.WithCPIOOutput(fresh),
	)
	if err != nil {
		return "", err
	}
	// The library has no context. What it does is bounded and touches only the
	// scratch folder.
	built := make(chan error, 1)
	go func() { built <- opts.Create(llog.New(slog.LevelError, func(string, ...any) {})) }()
	select {
	case err := <-built:
		if err != nil {
			return "", fmt.Errorf("u-root's commands cannot be compiled: %w", err)
		}
	case <-ctx.Done():
		return "", ctx.Err()
	}
	return kept, os.Rename(fresh, kept)
}

// extract gets the kernel and its modules out of the image's root file system,
// through the same checks that a node makes.
func (o InitramfsOptions) extract(ctx context.Context, im *provision.Image, dir string) error {
	part, ok := im.Part(provision.PartRoot)
	if !ok {
		return fmt.Errorf("image %s has no part %s: build it again", o.Image, provision.PartRoot)
	}
	disk := filepath.Join(dir, "root.part")
	if err := o.Store.unpack(ctx, im, part, disk); err != nil {
		return err
	}
	defer os.Remove(disk)
	modules := filepath.Join(dir, "modules")
	if err := os.Mkdir(modules, 0o755); err != nil {
		return err
	}
	release := im.Kernel
	for _, request := range []string{
		fmt.Sprintf("dump /boot/vmlinuz-%s %s", release, debugfsQuote(filepath.Join(dir, "vmlinuz"))),
		fmt.Sprintf("dump /boot/grub/local.efi %s", debugfsQuote(filepath.Join(dir, "local.efi"))),
		fmt.Sprintf("rdump /usr/lib/modules/%s %s", release, debugfsQuote(modules)),
		fmt.Sprintf("dump /usr/lib/platter/iso/eltorito.img %s", debugfsQuote(filepath.Join(dir, "eltorito.img"))),
		fmt.Sprintf("dump /usr/lib/platter/iso/boot_hybrid.img %s", debugfsQuote(filepath.Join(dir, "boot_hybrid.img"))),
		fmt.Sprintf("dump /usr/lib/platter/iso/bootx64.efi %s", debugfsQuote(filepath.Join(dir, "bootx64.efi"))),
	} {
		if err := tool(ctx, "debugfs", "-R", request, disk); err != nil {
			return err
		}
	}
	// debugfs ends well whatever happens.
	for _, f := range []string{"vmlinuz", "local.efi", "modules/" + release + "/modules.dep"} {
		if st, err := os.Stat(filepath.Join(dir, f)); err != nil || st.Size() == 0 {
			return fmt.Errorf("image %s does not hold %s of kernel %s: build it again", o.Image, path.Base(f), release)
		}
	}
	return nil
}

// discLoaders stores what makes discs bootable. An image that does not bring it
// makes nodes, but no discs.
func (o InitramfsOptions) discLoaders(dir string) (l DiscLoaders, err error) {
	for name, to := range map[string]*provision.Object{"eltorito.img": &l.ElTorito, "boot_hybrid.img": &l.Hybrid, "bootx64.efi": &l.EFI} {
		file := filepath.Join(dir, name)
		if st, err := os.Stat(file); err != nil || st.Size() == 0 {
			return DiscLoaders{}, nil
		}
		if *to, err = o.Store.putFile(file); err != nil {
			return DiscLoaders{}, err
		}
	}
	return l, nil
}

func debugfsQuote(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// Export writes one part of an image to the file to, sparse. Every frame is
// checked; a file that is there is replaced.
func (s *Store) Export(ctx context.Context, name, part, to string) error {
	_, im, err := s.Image(name)
	if err != nil {
		return err
	}
	p, ok := im.Part(part)
	if !ok {
		return fmt.Errorf("image %s has no part %q: it has boot, bios, esp and root", name, part)
	}
	return s.unpack(ctx, im, p, to)
}

// unpack writes one part of an image to a sparse file. Every frame is checked.
func (s *Store) unpack(ctx context.Context, im *provision.Image, part provision.Part, to string) error {
	pack, err := s.OpenObject(im.Pack.Hash)
	if err != nil {
		return fmt.Errorf("object %s, the pack of image %s, cannot be read: %w", im.Pack.Hash, im.Name, err)
	}
	defer pack.Close()
	if err := sparse(to, part.Size); err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	dec, err := newDecoder()
	if err != nil {
		return err
	}
	defer dec.Close()
	for _, fr := range part.Frames {
		if err := ctx.Err(); err != nil {
			return err
		}
		raw, err := readFrame(pack, dec, fr)
		if err != nil {
			return damaged(im, part, fr, err)
		}
		if _, err := f.WriteAt(raw, fr.Offset); err != nil {
			return err
		}
	}
	return f.Close()
}

// files are ours in the initramfs, beside u-root's.
func (o InitramfsOptions) files(dir, release string, keys []publicKey) (*initramfs.Files, error) {
	files := initramfs.NewFiles()
	add := func(records ...cpio.Record) error {
		for _, r := range records {
			if err := files.AddRecord(r); err != nil {
				return err
			}
		}
		return nil
	}
	// init opens the console before it mounts anything.
	err := add(cpio.CharDev("dev/console", 0o600, 5, 1), cpio.CharDev("dev/null", 0o666, 1, 3), cpio.CharDev("dev/tty", 0o666, 5, 0),
		cpio.Directory("proc", 0o555), cpio.Directory("sys", 0o555), cpio.Directory("run", 0o755), cpio.Directory("mnt", 0o755),
		cpio.Directory("tmp", 0o777), cpio.Directory("root", 0o700), cpio.Directory("var/log", 0o755))
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if err := add(cpio.StaticFile("etc/platter/keys/"+k.name, string(k.text), 0o644)); err != nil {
			return nil, err
		}
	}
	if err := files.AddFile(o.PlatterNode, "bin/platter-node"); err != nil {
		return nil, err
	}

	tree := filepath.Join(dir, "modules", release)
	modules, err := readModules(tree)
	if err != nil {
		return nil, err
	}
	var wanted []string
	for _, list := range []string{storageModules, nodeModules} {
		w, err := words(recipes, list)
		if err != nil {
			return nil, err
		}
		wanted = append(wanted, w...)
	}
	closure, err := modules.closure(wanted)
	if err != nil {
		return nil, err
	}
	to := "lib/modules/" + release + "/"
	for name := range closure {
		ko, err := unpackModule(filepath.Join(tree, modules.file[name]))
		if err != nil {
			return nil, err
		}
		if err := add(cpio.StaticFile(to+modules.plainFile(name), string(ko), 0o644)); err != nil {
			return nil, err
		}
	}
	dep, alias := modules.index(closure)
	builtin, err := os.ReadFile(filepath.Join(tree, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	return files, add(cpio.StaticFile(to+"modules.dep", string(dep), 0o644),
		cpio.StaticFile(to+"modules.alias", string(alias), 0o644),
		cpio.StaticFile(to+"modules.builtin", string(builtin), 0o644))
}

// archive packs files and the archive at commands into one zstd stream. Equal
// input gives equal bytes.
func archive(ctx context.Context, files *initramfs.Files, commands string) ([]byte, error) {
	var packed bytes.Buffer
	// One thread: with several the bytes depend on timing.
	z, err := zstd.NewWriter(&packed, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	out := &archiveWriter{ctx: ctx, w: z}
	err = initramfs.Write(&initramfs.Opts{Files: files, OutputFile: out, BaseArchive: &initramfs.CPIOFile{Path: commands}, UseExistingInit: true})
	if err != nil {
		return nil, fmt.Errorf("initramfs cannot be put together: %w", errors.Join(err, ctx.Err()))
	}
	return packed.Bytes(), nil
}

// archiveWriter is where mkuimage writes the archive to: into z.
type archiveWriter struct {
	ctx context.Context
	w   *zstd.Encoder
	cpio.RecordWriter
}

func (a *archiveWriter) OpenWriter() (initramfs.Writer, error) {
	a.RecordWriter = cpio.Newc.Writer(a)
	return a, nil
}

func (a *archiveWriter) Write(p []byte) (int, error) {
	if err := a.ctx.Err(); err != nil {
		return 0, err
	}
	return a.w.Write(p)
}

func (a *archiveWriter) Finish() error {
	return errors.Join(cpio.WriteTrailer(a), a.w.Close())
}
