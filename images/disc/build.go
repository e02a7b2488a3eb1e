package disc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"

	"platter/images"
	"platter/provision"
)

// BuildOptions say which set to build, and from what.
type BuildOptions struct {
	Spec  *Spec
	Store *images.Store
	// Platter and Node are the programs.
	Platter, Node string
	// IPXE is the folder of iPXE's loaders.
	IPXE string
	// Files are further files for the first volume: path there -> file here.
	Files map[string]string
	// VolumeSize is the most that a volume has, in bytes.
	VolumeSize int64
	// Have is what a site has: the set becomes a patch for it.
	Have *Inventory
	// SecretKey is the file of a minisign key that the store trusts.
	SecretKey string
	// Out is the folder for the volumes. What is there under their names is
	// replaced.
	Out string
	// Progress is told what is being done, and bytes of it.
	Progress func(what string, done, total int64)
}

// Built is what came of a build.
type Built struct {
	Set     *Set
	ID      string
	Volumes []string // files, in their order
	Sizes   []int64  // of these, bytes
}

// loaders are the iPXE programs that a disc host serves.
var loaders = []string{"undionly.kpxe", "snponly.efi", "ipxe.efi"}

// Build makes a set of discs in Out. It needs xorriso, mkfs.vfat and mtools. All
// that is wrong with its options is said at once, before it begins. Equal inputs
// give an equal set. When it is cut short no new volume is in Out.
func Build(ctx context.Context, o BuildOptions) (*Built, error) {
	b := &builder{BuildOptions: o}
	if err := b.check(); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(o.Out, ".new-")
	if err != nil {
		return nil, fmt.Errorf("volumes cannot be written to %s: %w", o.Out, err)
	}
	defer os.RemoveAll(work)
	b.work = work
	if err := b.cut(ctx); err != nil {
		return nil, err
	}
	if err := b.fixed(ctx); err != nil {
		return nil, err
	}
	layout, err := b.place()
	if err != nil {
		return nil, err
	}
	if err := b.write(ctx, layout); err != nil {
		return nil, err
	}
	return b.finish(ctx)
}

// builder is a set while it is built.
type builder struct {
	BuildOptions
	work     string
	contents []images.Contents
	set      Set
	boot     *images.BootSet
	objects  []images.Content // as in set.Objects
	// files of the first volume, of every volume, and one that each has of its own.
	first, every, lines []source
}

// source is a file that goes onto a volume as it is.
type source struct {
	File
	from string // a file here
	text []byte // or this
}

// check finds everything that can be wrong before anything is done.
func (b *builder) check() error {
	var wrong []error
	fail := func(err error) { wrong = append(wrong, err) }
	s := b.Spec
	var names []string // in the order in which nodes read them
	for _, a := range s.Arch {
		names = append(names, "boot/"+a)
	}
	names = append(names, s.Images...)
	for _, r := range s.Releases {
		if r == Newest {
			ref, _, err := b.Store.Release("")
			if err != nil {
				fail(fmt.Errorf("releases: %w", err))
				continue
			}
			r = ref.Version
		}
		names = append(names, "stack@"+r)
	}
	for _, n := range names {
		c, err := b.Store.Contents(n)
		if err != nil {
			fail(err)
			continue
		}
		b.contents = append(b.contents, c)
	}
	// The newest release of the set is what nodes move to by default.
	if ref, _, err := b.Store.Release(""); err == nil && slices.Contains(names, "stack@"+ref.Version) {
		if c, err := b.Store.Contents("stack"); err == nil {
			b.contents = append(b.contents, c)
		}
	}
	if boot, err := b.Store.Boot(s.Arch[0]); err == nil {
		b.boot = &boot
		if boot.Disc == (images.DiscLoaders{}) && b.Have == nil {
			fail(errors.New("the store's boot/" + s.Arch[0] + " was made without loaders for discs: run 'platter image build' and 'platter image initramfs' again"))
		}
	}
	for _, f := range append([]string{b.Platter, b.Node, b.SecretKey}, slices.Collect(maps.Values(b.Files))...) {
		if st, err := os.Stat(f); err != nil || !st.Mode().IsRegular() {
			fail(fmt.Errorf("the file %s is not there", f))
		}
	}
	if b.Have == nil {
		for _, f := range loaders {
			if _, err := os.Stat(filepath.Join(b.IPXE, f)); err != nil {
				fail(fmt.Errorf("the iPXE loader %s is not in %s: install Debian's package ipxe", f, b.IPXE))
			}
		}
	}
	if _, err := Pages(s.Languages); err != nil {
		fail(err)
	}
	for _, tool := range []string{"xorriso", "mkfs.vfat", "mmd", "mcopy"} {
		if err := haveTool(tool); err != nil {
			fail(err)
		}
	}
	if _, err := b.Store.Sign(nil, "set", b.SecretKey); err != nil {
		fail(err)
	}
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		fail(fmt.Errorf("volumes cannot be written to %s: %w", b.Out, err))
	}
	if err := errors.Join(wrong...); err != nil {
		return fmt.Errorf("the set %s %s was not built:\n%w", s.Name, s.Version, err)
	}
	return nil
}

// cut finds the chunks of all objects.
func (b *builder) cut(ctx context.Context) error {
	s := &b.set
	*s = Set{Format: SetFormat, Name: b.Spec.Name, Version: b.Spec.Version, Arch: b.Spec.Arch, Made: b.Spec.Date.UTC()}
	if b.Have != nil {
		s.Base = b.Have.Store
	}
	index := map[string]int{}
	var total, done int64
	for _, c := range b.contents {
		r := Ref{Name: c.Name, Digest: c.Digest, Signature: string(c.Signature)}
		for _, o := range c.Objects {
			i, known := index[o.Hash]
			if !known {
				i = len(b.objects)
				index[o.Hash] = i
				b.objects = append(b.objects, o)
				s.Objects = append(s.Objects, Object{Object: o.Object})
				total += o.Size
			}
			if !slices.Contains(r.Objects, i) {
				r.Objects = append(r.Objects, i)
			}
		}
		s.Refs = append(s.Refs, r)
	}
	slices.SortFunc(s.Refs, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	for i, o := range b.objects {
		err := objectChunks(ctx, b.Store, o, func(c Chunk, _ []byte) error {
			s.Objects[i].Chunks = append(s.Objects[i].Chunks, c)
			done += c.Size
			b.Progress("reading", done, total)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// fixed are the files beside the payload.
func (b *builder) fixed(ctx context.Context) error {
	pages, err := Pages(b.Spec.Languages)
	if err != nil {
		return err
	}
	in := SBOMInput{Name: b.Spec.Name, Version: b.Spec.Version, Time: b.set.Made, Programs: []string{b.Platter, b.Node},
		Boot: map[string]images.BootSet{b.Spec.Arch[0]: *b.boot}, URoot: b.boot.URoot}
	for _, c := range b.contents {
		switch {
		case c.Image != nil:
			in.Images = append(in.Images, c.Image)
			if in.WebLock == nil {
				in.WebLock = images.WebLock(c.Name)
			}
		case c.Release != nil && c.Name != "stack":
			in.Releases = append(in.Releases, c.Release)
		}
	}
	sbom, err := SBOM(in)
	if err != nil {
		return err
	}
	every := map[string]source{"sbom.cdx.json": {text: sbom}}
	for p, text := range pages {
		every[p] = source{text: text}
	}
	first := map[string]source{}
	for p, f := range b.Files {
		first[p] = source{from: f}
	}
	if b.Have != nil { // nobody starts anything from a patch
		packed := filepath.Join(b.work, "platter.gz")
		if err := gzipped(b.Platter, packed); err != nil {
			return err
		}
		first[packedProgram] = source{from: packed}
	} else {
		first[Program] = source{from: b.Platter}
		first["bin/platter-node"] = source{from: b.Node}
		for _, f := range loaders {
			first["ipxe/"+f] = source{from: filepath.Join(b.IPXE, f)}
		}
		for p, o := range map[string]provision.Object{"boot/vmlinuz": b.boot.Kernel, "boot/initrd.img": b.boot.Initramfs} {
			to := filepath.Join(b.work, filepath.Base(p))
			if err := b.extract(o, to); err != nil {
				return err
			}
			first[p] = source{from: to}
		}
		first["boot/grub/grub.cfg"] = source{text: grubConfig(b.Spec)}
	}
	for to, from := range map[*[]source]map[string]source{&b.every: every, &b.first: first} {
		for _, p := range slices.Sorted(maps.Keys(from)) {
			f := from[p]
			if err := f.describe(ctx, p); err != nil {
				return err
			}
			*to = append(*to, f)
		}
	}
	return nil
}

// extract writes an object of the store to a file.
func (b *builder) extract(o provision.Object, to string) error {
	from, err := b.Store.OpenObject(o.Hash)
	if err != nil {
		return err
	}
	defer from.Close()
	return writeAll(to, from)
}

// gzipped packs a file: the same bytes for the same bytes.
func gzipped(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
		if err == nil {
			_, err = io.Copy(z, in)
			err = errors.Join(err, z.Close())
		}
		w.CloseWithError(err)
	}()
	return writeAll(to, r)
}

func writeAll(to string, r io.Reader) error {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	return f.Close()
}

func (f *source) open() (io.ReadCloser, error) {
	if f.from == "" {
		return io.NopCloser(strings.NewReader(string(f.text))), nil
	}
	return os.Open(f.from)
}

// describe fills in what the manifest says of the file.
func (f *source) describe(ctx context.Context, path string) error {
	r, err := f.open()
	if err != nil {
		return err
	}
	defer r.Close()
	f.File = File{Path: path}
	sum := sha256.New()
	err = chunks(ctx, io.TeeReader(r, sum), func(c Chunk, _ []byte) error {
		f.Chunks = append(f.Chunks, c)
		f.Size += c.Size
		return nil
	})
	f.Hash = hex.EncodeToString(sum.Sum(nil))
	return err
}

// What a volume needs beside its files: the file system's own blocks, the EFI
// partition of the first, and the table that covers them.
const (
	isoOverhead  = 1 << 20
	bootOverhead = 8 << 20
	maxPack      = 1 << 30
)

// pack is a file of payload.
type pack struct {
	path   string
	chunks []Chunk
}

// place decides on which volume each chunk goes, in the order in which they are
// read, and into which pack.
func (b *builder) place() ([][]pack, error) {
	placed := map[string]bool{} // or not to be placed
	var manifest int64 = 64 << 10
	for _, list := range [][]source{b.first, b.every} {
		for _, f := range list {
			manifest += 512 + 100*int64(len(f.Chunks))
			for _, c := range f.Chunks {
				placed[c.Hash] = true
			}
		}
	}
	if b.Have != nil {
		for _, h := range b.Have.Chunks {
			placed[h] = true
		}
	}
	var payload []Chunk
	for _, o := range b.set.Objects {
		manifest += 1024
		for _, c := range o.Chunks {
			manifest += 200
			if !placed[c.Hash] {
				placed[c.Hash] = true
				payload = append(payload, c)
			}
		}
	}
	return placeChunks(payload, func(n int) int64 {
		left := b.VolumeSize - isoOverhead - manifest - manifest/16
		for _, f := range b.every {
			left -= blocks(f.Size)
		}
		if n == 1 {
			for _, f := range b.first {
				left -= blocks(f.Size)
			}
			left -= bootOverhead
		}
		return left
	})
}

func blocks(n int64) int64 { return (n + sector - 1) / sector * sector }

// placeChunks fills volumes with chunks in their order; room says what volume n
// takes.
func placeChunks(payload []Chunk, room func(n int) int64) ([][]pack, error) {
	var out [][]pack
	for n := 1; n == 1 || len(payload) > 0; n++ {
		left := room(n)
		if left < 0 || len(payload) > 0 && n > 1 && left < payload[0].Size {
			return nil, fmt.Errorf("volumes are too small: volume %d would have %d bytes for its share of the payload. Choose a larger --volume-size", n, max(left, 0))
		}
		var packs []pack
		size := int64(maxPack) // of the last pack: begin one
		for len(payload) > 0 && payload[0].Size+sector <= left {
			c := payload[0]
			if size+c.Size > maxPack {
				packs = append(packs, pack{path: fmt.Sprintf("platter/pack-%d-%d", n, len(packs)+1)})
				size = 0
				left -= sector
			}
			p := &packs[len(packs)-1]
			p.chunks = append(p.chunks, c)
			size += c.Size
			left -= c.Size
			payload = payload[1:]
		}
		out = append(out, packs)
		if n > 999 {
			return nil, errors.New("the set would need more than 999 volumes: choose a larger --volume-size")
		}
	}
	return out, nil
}

// write makes the packs and completes the manifest.
func (b *builder) write(ctx context.Context, layout [][]pack) error {
	type spot struct {
		f  *os.File
		at int64
	}
	spots := map[string]spot{}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	var total, done int64
	packs := make([][]File, len(layout))
	for i, v := range layout {
		for _, p := range v {
			f, err := os.Create(filepath.Join(b.work, filepath.Base(p.path)))
			if err != nil {
				return err
			}
			files = append(files, f)
			file := File{Path: p.path, Chunks: p.chunks}
			for _, c := range p.chunks {
				spots[c.Hash] = spot{f, file.Size}
				file.Size += c.Size
			}
			total += file.Size
			packs[i] = append(packs[i], file)
		}
	}
	for _, o := range b.objects {
		err := objectChunks(ctx, b.Store, o, func(c Chunk, bytes []byte) error {
			s, wanted := spots[c.Hash]
			if !wanted {
				return nil
			}
			delete(spots, c.Hash)
			if _, err := s.f.WriteAt(bytes, s.at); err != nil {
				return fmt.Errorf("packs cannot be written to %s: %w", b.Out, err)
			}
			done += c.Size
			b.Progress("packing", done, total)
			return nil
		})
		if err != nil {
			return err
		}
	}
	for i := range layout {
		v := Volume{Label: label(b.Spec, i+1)}
		line := source{text: fmt.Appendf(nil, "Volume %d of %d of %s %s. index.html says what to do with it.\n", i+1, len(layout), b.Spec.Name, b.Spec.Version)}
		if err := line.describe(ctx, fmt.Sprint(volumePrefix, i+1)); err != nil {
			return err
		}
		b.lines = append(b.lines, line)
		v.Files = append(v.Files, line.File)
		for _, f := range b.every {
			v.Files = append(v.Files, f.File)
		}
		if i == 0 {
			for _, f := range b.first {
				v.Files = append(v.Files, f.File)
			}
		}
		for k := range packs[i] {
			f, err := os.Open(filepath.Join(b.work, filepath.Base(packs[i][k].Path)))
			if err != nil {
				return err
			}
			sum := sha256.New()
			_, err = io.Copy(sum, f)
			f.Close()
			if err != nil {
				return err
			}
			packs[i][k].Hash = hex.EncodeToString(sum.Sum(nil))
			v.Files = append(v.Files, packs[i][k])
		}
		b.set.Volumes = append(b.set.Volumes, v)
	}
	return nil
}

// label of a volume's file system.
func label(s *Spec, n int) string {
	var out strings.Builder
	for _, r := range strings.ToUpper(s.Name + "_" + s.Version) {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			out.WriteRune(r)
		} else {
			out.WriteByte('_')
		}
	}
	end := fmt.Sprint("_", n)
	return out.String()[:min(out.Len(), 32-len(end))] + end
}

// finish signs the manifest and makes an ISO of every volume.
func (b *builder) finish(ctx context.Context) (*Built, error) {
	manifest, id, err := b.set.Manifest()
	if err != nil {
		return nil, err
	}
	if _, err := Read(manifest); err != nil {
		return nil, fmt.Errorf("the set is not consistent: %w", err)
	}
	signature, err := b.Store.Sign(manifest, b.set.Name+"-"+b.set.Version, b.SecretKey)
	if err != nil {
		return nil, err
	}
	built := &Built{Set: &b.set, ID: id}
	var made []string
	for i := range b.set.Volumes {
		file, err := b.volume(ctx, i+1, manifest, signature)
		if err != nil {
			return nil, err
		}
		st, err := os.Stat(file)
		if err != nil {
			return nil, err
		}
		if st.Size() > b.VolumeSize {
			return nil, fmt.Errorf("volume %d came to %d bytes, more than %d: choose a larger --volume-size", i+1, st.Size(), b.VolumeSize)
		}
		made = append(made, file)
		built.Sizes = append(built.Sizes, st.Size())
	}
	// One after the other, when all are there.
	for i, file := range made {
		to := filepath.Join(b.Out, b.fileName(i+1))
		if err := os.Rename(file, to); err != nil {
			return nil, err
		}
		built.Volumes = append(built.Volumes, to)
	}
	if d, err := os.Open(b.Out); err == nil {
		d.Sync()
		d.Close()
	}
	return built, nil
}

func (b *builder) fileName(n int) string {
	name := b.set.Name + "-" + b.set.Version
	if b.set.Base != "" {
		name += "-patch"
	}
	if len(b.set.Volumes) > 1 {
		name += fmt.Sprintf("-%dof%d", n, len(b.set.Volumes))
	}
	return name + ".iso"
}

// Inventory says which chunks a site has.
type Inventory struct {
	Format int    `json:"format"`
	Store  string `json:"store"` // images.Store.Hash
	// Refs are names and the manifests that they point to.
	Refs   map[string]string `json:"refs"`
	Chunks []string          `json:"chunks"` // SHA-256, hex, sorted
}

const inventoryFormat = 1

// TakeInventory lists what the store has, and reads all of it for that.
func TakeInventory(ctx context.Context, s *images.Store) (*Inventory, error) {
	hash, err := s.Hash()
	if err != nil {
		return nil, err
	}
	inv := &Inventory{Format: inventoryFormat, Store: hash, Refs: map[string]string{}}
	names, err := s.Refs()
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, name := range names {
		c, err := s.Contents(name)
		if err != nil {
			return nil, err
		}
		inv.Refs[name] = c.Digest
		for _, o := range c.Objects {
			if seen[o.Hash] {
				continue
			}
			seen[o.Hash] = true
			if err := objectChunks(ctx, s, o, func(c Chunk, _ []byte) error {
				inv.Chunks = append(inv.Chunks, c.Hash)
				return nil
			}); err != nil {
				return nil, err
			}
		}
	}
	slices.Sort(inv.Chunks)
	inv.Chunks = slices.Compact(inv.Chunks)
	return inv, nil
}

// ReadInventory reads what TakeInventory made, as JSON.
func ReadInventory(file string) (*Inventory, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no inventory %s: 'platter disc inventory' at the site makes one", file)
	}
	if err != nil {
		return nil, err
	}
	var inv Inventory
	if err := json.Unmarshal(b, &inv); err != nil || inv.Format != inventoryFormat || !hexHash.MatchString(inv.Store) {
		return nil, fmt.Errorf("%s is no inventory of a site that this program reads: make it with 'platter disc inventory'", file)
	}
	for _, h := range inv.Chunks {
		if !hexHash.MatchString(h) {
			return nil, fmt.Errorf("%s is damaged: make it again with 'platter disc inventory'", file)
		}
	}
	return &inv, nil
}
