package disc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"aead.dev/minisign"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"platter/images"
	"platter/provision"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// shop is a store to build sets from, small but with everything.
type shop struct {
	t     *testing.T
	store *images.Store
	key   string
	dir   string
}

// bytesOf are n bytes that nothing compresses, the same for the same seed.
func bytesOf(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

func newShop(t *testing.T, dir string) *shop {
	t.Helper()
	s := &shop{t: t, store: must[*images.Store](t)(images.Open(filepath.Join(dir, "store"))), key: filepath.Join(dir, "key"), dir: dir}
	if err := images.GenerateKey(s.key); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Trust(s.key + ".pub"); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"platter", "platter-node"} { // the list of what is in the set wants Go programs
		if err := os.WriteFile(filepath.Join(dir, f), program(t), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range loaders {
		if err := os.WriteFile(filepath.Join(dir, f), bytesOf(uint64(len(f)), 100_000), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// program is a small one.
func program(t *testing.T) []byte {
	t.Helper()
	file := filepath.Join(common.dir, "program")
	if _, err := os.Stat(file); err != nil {
		src := filepath.Join(common.dir, "main.go")
		if err := os.WriteFile(src, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, "", "go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, src)
	}
	return must[[]byte](t)(os.ReadFile(file))
}

// put stores an object.
func (s *shop) put(b []byte) provision.Object {
	s.t.Helper()
	o := provision.Object{Hash: ID(b), Size: int64(len(b))}
	a := must[*images.Arriving](s.t)(s.store.Arrive(o))
	must[int](s.t)(a.WriteAt(b, 0))
	if err := a.Commit(); err != nil {
		s.t.Fatal(err)
	}
	return o
}

// publish signs a manifest and lets name point to it.
func (s *shop) publish(name string, manifest any) {
	s.t.Helper()
	raw := must[[]byte](s.t)(json.Marshal(manifest))
	o := s.put(raw)
	if err := s.store.SetRef(name, o.Hash, must[[]byte](s.t)(s.store.Sign(raw, name, s.key))); err != nil {
		s.t.Fatal(err)
	}
}

// image publishes one whose pack has a frame for each of seeds.
func (s *shop) image(frames ...uint64) {
	s.t.Helper()
	zip := must[*zstd.Encoder](s.t)(zstd.NewWriter(nil))
	defer zip.Close()
	var pack []byte
	im := provision.Image{Format: provision.ImageFormat, Name: "debian-13", Version: "1", Arch: "amd64", Parts: []provision.Part{{Name: provision.PartRoot}}}
	p := &im.Parts[0]
	for _, f := range frames {
		raw := bytesOf(f, 600_000+int(f%7)*10_000)
		b := zip.EncodeAll(raw, nil)
		p.Frames = append(p.Frames, provision.Frame{Offset: p.Size, Size: len(raw), At: int64(len(pack)), Packed: len(b), Hash: ID(b), Raw: ID(raw)})
		p.Size += int64(len(raw))
		pack = append(pack, b...)
	}
	im.Pack = s.put(pack)
	s.publish("debian-13", im)
}

func (s *shop) boot(seed uint64) {
	s.t.Helper()
	o := func(n uint64, size int) provision.Object { return s.put(bytesOf(seed<<4+n, size)) }
	boot := images.BootSet{Kernel: o(1, 300_000), Initramfs: o(2, 700_000), Local: o(3, 30_000), Release: "6.12.0-test",
		Disc: images.DiscLoaders{ElTorito: o(4, 40_000), Hybrid: o(5, 512), EFI: o(6, 60_000)}}
	s.publish("boot/amd64", struct {
		Format int    `json:"format"`
		Arch   string `json:"arch"`
		images.BootSet
	}{1, "amd64", boot})
}

func (s *shop) release(version string, seed uint64) {
	s.t.Helper()
	o := s.put(bytesOf(1000+seed, 7_000_000))
	r := provision.Release{Format: provision.ReleaseFormat, Name: "im", Version: version,
		Files: []provision.ReleaseFile{{Name: "a_1_amd64.deb", Kind: provision.FilePackage, Package: "a", Version: "1", Size: o.Size, Digest: o.Hash}}}
	s.publish("stack@"+version, r)
	s.publish("stack", r)
}

func spec(version string) *Spec {
	return &Spec{Name: "platter", Version: version, Date: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC), Arch: []string{"amd64"},
		Images: []string{"debian-13"}, Releases: []string{Newest}, Languages: []string{"en"}}
}

func silent(string, int64, int64) {}

func (s *shop) options(version string, size int64) BuildOptions {
	return BuildOptions{Spec: spec(version), Store: s.store, Platter: filepath.Join(s.dir, "platter"), Node: filepath.Join(s.dir, "platter-node"),
		IPXE: s.dir, VolumeSize: size, SecretKey: s.key, Out: s.t.TempDir(), Progress: silent}
}

// product is a store with everything, of the first version.
func product(t *testing.T) *shop { return newProduct(t, t.TempDir()) }

func newProduct(t *testing.T, dir string) *shop {
	s := newShop(t, dir)
	s.image(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	s.boot(1)
	s.release("1.0", 1)
	return s
}

const small = 14 << 20 // of volumes, so that the product takes several

// common is a product that nobody changes, built once as several volumes and as
// one.
var common struct {
	dir string
	sync.Mutex
	shop
	several, one *Built
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "disc")
	if err != nil {
		panic(err)
	}
	common.dir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func shared(t *testing.T) (s *shop, several, one *Built) {
	t.Helper()
	common.Lock()
	defer common.Unlock()
	if common.one == nil {
		common.shop = *newProduct(t, common.dir)
		build := func(size int64) *Built {
			o := common.options("1.0", size)
			o.Out = filepath.Join(common.dir, fmt.Sprint("out-", size))
			return must[*Built](t)(Build(t.Context(), o))
		}
		common.several, common.one = build(small), build(1<<30)
	}
	mine := common.shop
	mine.t = t
	return &mine, common.several, common.one
}

func (s *shop) build(version string, size int64) *Built {
	s.t.Helper()
	return must[*Built](s.t)(Build(s.t.Context(), s.options(version, size)))
}

// site is an empty store that trusts the shop.
func (s *shop) site() *images.Store {
	s.t.Helper()
	st := must[*images.Store](s.t)(images.Open(filepath.Join(s.t.TempDir(), "store")))
	if err := st.Trust(s.key + ".pub"); err != nil {
		s.t.Fatal(err)
	}
	return st
}

func (s *shop) open(st *images.Store, paths ...string) *Discs {
	s.t.Helper()
	d := must[*Discs](s.t)(Open(st.CheckSignature, paths...))
	s.t.Cleanup(func() { d.Close() })
	return d
}

func bring(ctx context.Context, st *images.Store, d *Discs, with ...func(*ImportOptions)) (*Imported, error) {
	o := ImportOptions{Store: st, Progress: func(int64, int64) {}}
	for _, w := range with {
		w(&o)
	}
	return Import(ctx, d, o)
}

func whole(t *testing.T, st *images.Store) {
	t.Helper()
	for _, name := range []string{"debian-13", "boot/amd64", "stack", "stack@1.0"} {
		if err := st.Verify(t.Context(), name, nil); err != nil {
			t.Error(err)
		}
	}
}

// Volumes in any order, one at a time, give the store that all at once give, which
// is the one that the set was built from.
func TestImportInAnyOrder(t *testing.T) {
	s, set, _ := shared(t)
	if len(set.Volumes) != 3 {
		t.Fatalf("%d volumes, want 3", len(set.Volumes))
	}
	want := must[string](t)(s.store.Hash())
	st := s.site()
	for i, n := range []int{3, 1, 2} {
		got := must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes[n-1])))
		missing := [][]int{{1, 2}, {2}, nil}[i]
		if !slices.Equal(got.Missing, missing) {
			t.Errorf("after volume %d: missing %v, want %v", n, got.Missing, missing)
		}
		for name, needs := range got.Blocked {
			if !slices.Equal(needs, missing) && !slices.Contains(missing, needs[0]) {
				t.Errorf("after volume %d: %s needs %v", n, name, needs)
			}
			if _, err := st.Contents(name); err == nil {
				t.Errorf("after volume %d: %s is said to be blocked and can be used", n, name)
			}
		}
		names := must[[]string](t)(st.Refs())
		if len(names)+len(got.Blocked) != len(set.Set.Refs) {
			t.Errorf("after volume %d: names %v, blocked %v", n, names, got.Blocked)
		}
		for _, name := range names { // the rest is usable
			if err := st.Verify(t.Context(), name, nil); err != nil {
				t.Error(err)
			}
		}
		if i == 2 && got.Hash != want {
			t.Errorf("the store's hash is %s, want %s", got.Hash, want)
		}
	}
	whole(t, st)
	sets := must[[]Held](t)(Sets(st))
	if len(sets) != 1 || !sets[0].Complete || sets[0].ID != set.ID {
		t.Errorf("sets %+v", sets)
	}
	// At once, and again: nothing is read.
	at := s.site()
	if got := must[*Imported](t)(bring(t.Context(), at, s.open(at, set.Volumes...))); got.Hash != want || got.Missing != nil {
		t.Errorf("at once: %+v", got)
	}
	if got := must[*Imported](t)(bring(t.Context(), at, s.open(at, set.Volumes...))); got.Read != 0 || got.Hash != want {
		t.Errorf("again: %+v", got)
	}
}

// Equal inputs give equal sets and equal volumes, whatever the clock and the
// folders are.
func TestBuildIsReproducible(t *testing.T) {
	s := product(t)
	a := s.build("1.0", small)
	for _, f := range []string{"platter", "platter-node"} {
		now := time.Now().Add(time.Hour)
		if err := os.Chtimes(filepath.Join(s.dir, f), now, now); err != nil {
			t.Fatal(err)
		}
	}
	b := s.build("1.0", small)
	if a.ID != b.ID {
		t.Errorf("set %s, then %s", a.ID, b.ID)
	}
	for i := range a.Volumes {
		if x, y := sum(t, a.Volumes[i]), sum(t, b.Volumes[i]); x != y {
			t.Errorf("volume %d: %s, then %s", i+1, x, y)
		}
	}
}

func sum(t *testing.T, file string) string {
	t.Helper()
	return ID(must[[]byte](t)(os.ReadFile(file)))
}

// What others say of the volumes: the tools that people have everywhere.
func TestVolumesByHand(t *testing.T) {
	s, set, _ := shared(t)
	dirs := make([]string, len(set.Volumes))
	for i, v := range set.Volumes {
		dirs[i] = t.TempDir()
		run(t, "", "xorriso", "-osirrox", "on", "-indev", v, "-extract", "/", dirs[i])
		run(t, dirs[i], "sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS")
	}
	report := run(t, "", "xorriso", "-indev", set.Volumes[0], "-report_el_torito", "plain", "-report_system_area", "plain")
	for _, want := range []string{"BIOS  y   none", "UEFI  y   none", "grub2-mbr", "0xef"} {
		if !strings.Contains(report, want) {
			t.Errorf("volume 1 is not known to have %q:\n%s", want, report)
		}
	}
	// Mounted ones serve as well as ISO files.
	st := s.site()
	if got := must[*Imported](t)(bring(t.Context(), st, s.open(st, dirs...))); got.Hash != must[string](t)(s.store.Hash()) {
		t.Errorf("imported from folders: %+v", got)
	}
	d := s.open(st, dirs...)
	if err := d.Verify(t.Context(), func(int64, int64) {}); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dirs[1], "more"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := d.Verify(t.Context(), func(int64, int64) {}); err == nil || !strings.Contains(err.Error(), "file more does not belong to the set") {
		t.Errorf("a file that is not the set's: %v", err)
	}
}

func run(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// counting counts the bytes that are read, also by several at once.
type counting struct {
	medium
	mu   *sync.Mutex
	read map[string]int64
}

func (c counting) open(path string) (mediumFile, error) {
	f, err := c.medium.open(path)
	f.ReaderAt = countingReader{f.ReaderAt, func(n int) { c.mu.Lock(); defer c.mu.Unlock(); c.read[path] += int64(n) }}
	return f, err
}

type countingReader struct {
	io.ReaderAt
	count func(int)
}

func (c countingReader) ReadAt(b []byte, at int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(b, at)
	c.count(n)
	return n, err
}

// One bit flipped anywhere on a volume is found, and its place is named.
func TestEveryBitCounts(t *testing.T) {
	s, set, _ := shared(t)
	st := s.site()
	file := set.Volumes[1]
	good := must[[]byte](t)(os.ReadFile(file))
	bad := filepath.Join(t.TempDir(), "bad.iso")
	if err := os.WriteFile(bad, good, 0o644); err != nil {
		t.Fatal(err)
	}
	clean := s.open(st, file)
	if err := clean.Verify(t.Context(), func(int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	i := clean.volumes[2].medium.(*iso)
	f := must[*os.File](t)(os.OpenFile(bad, os.O_RDWR, 0))
	defer f.Close()
	hit := map[string]int{}
	paths := must[[]string](t)(i.files())
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 5))
		at := r.Int64N(int64(len(good)))
		if seed%4 == 0 { // most of the bytes are payload
			e := must[stretch](t)(i.extent(paths[r.IntN(len(paths))]))
			at = e.at + r.Int64N(e.size)
		}
		flipped := good[at] ^ 1<<r.IntN(8)
		must[int](t)(f.WriteAt([]byte{flipped}, at))
		want, offset := "(the disc's own structure)", at
		for p := range i.all {
			if e, err := i.extent(p); err == nil && e.at <= at && at < e.at+e.size {
				want, offset = p, at-e.at
			}
		}
		hit[want]++
		d, err := Open(st.CheckSignature, bad)
		if err == nil {
			err = d.Verify(t.Context(), func(int64, int64) {})
			d.Close()
		}
		switch {
		case err == nil:
			t.Errorf("seed %d: bit at %d, in %s at %d: nothing was found", seed, at, want, offset)
		case !strings.Contains(err.Error(), "volume 2") && !strings.Contains(err.Error(), "volume ?") && want != "(the disc's own structure)":
			t.Errorf("seed %d: bit in %s at %d: the volume is not named: %v", seed, want, offset, err)
		case !named(err, want, offset):
			t.Errorf("seed %d: bit in %s at %d: its place is not named: %v", seed, want, offset, err)
		}
		must[int](t)(f.WriteAt(good[at:at+1], at))
	}
	if !bytes.Equal(must[[]byte](t)(os.ReadFile(bad)), good) {
		t.Error("the disc was changed")
	}
	if len(hit) < 5 {
		t.Errorf("only these were hit: %v", hit)
	}
}

// named tells whether err names a stretch of file with offset in it.
func named(err error, file string, offset int64) bool {
	text := err.Error()
	for _, part := range strings.Split(text, "file "+file+": ")[1:] {
		var size, at int64
		if n, _ := fmt.Sscanf(part, "the %d bytes at offset %d", &size, &at); n == 2 && at <= offset && offset < at+size {
			return true
		}
		if n, _ := fmt.Sscanf(part, "damaged within %d bytes at offset %d", &size, &at); n == 2 && at <= offset && offset < at+size {
			return true
		}
	}
	return false
}

// A damaged chunk is refused, named, and the only one that is read twice; all the
// rest comes, and the next import reads that chunk alone.
func TestImportFromDamaged(t *testing.T) {
	s, _, set := shared(t)
	dir := t.TempDir()
	run(t, "", "xorriso", "-osirrox", "on", "-indev", set.Volumes[0], "-extract", "/", dir)
	run(t, "", "chmod", "-R", "u+w", dir)
	pack := "platter/pack-1-1"
	file := filepath.Join(dir, pack)
	good := must[[]byte](t)(os.ReadFile(file))
	at := len(good) / 2
	bad := bytes.Clone(good)
	bad[at] ^= 4
	if err := os.WriteFile(file, bad, 0o644); err != nil {
		t.Fatal(err)
	}
	st := s.site()
	d := s.open(st, dir)
	read := map[string]int64{}
	d.volumes[1].medium = counting{d.volumes[1].medium, &sync.Mutex{}, read}
	got, err := bring(t.Context(), st, d)
	var damage *Damage
	if !errors.As(err, &damage) || damage.File != pack || damage.Volume != 1 || damage.At > int64(at) || damage.At+damage.Size <= int64(at) {
		t.Fatalf("got %v", err)
	}
	listed, _ := set.Set.Volumes[0].File(pack)
	once := int64(0) // what of the pack is payload
	for _, c := range listed.Chunks {
		once += c.Size
	}
	if read[pack] != once+2*damage.Size {
		t.Errorf("%d bytes of the pack were read, want %d once and %d twice more", read[pack], once, damage.Size)
	}
	if len(got.Blocked) == 0 || len(got.Blocked) == len(set.Set.Refs) {
		t.Errorf("blocked are %v", got.Blocked)
	}
	if sum(t, file) != ID(bad) {
		t.Error("the disc was changed")
	}
	if err := os.WriteFile(file, good, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := must[*Imported](t)(bring(t.Context(), st, s.open(st, dir))); got.Read != damage.Size {
		t.Errorf("then %d bytes were read, want %d", got.Read, damage.Size)
	}
	whole(t, st)
}

// What rots in a store is brought anew from the disc, and nothing else.
func TestImportRepairs(t *testing.T) {
	s, _, set := shared(t)
	st := s.site()
	must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...)))
	_, im, err := st.Image("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	pack := filepath.Join(st.Dir(), "objects", im.Pack.Hash)
	b := must[[]byte](t)(os.ReadFile(pack))
	b[len(b)/2] ^= 1
	if err := os.Chmod(pack, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(pack, b, 0o644); err != nil {
		t.Fatal(err)
	}
	got := must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...), func(o *ImportOptions) { o.Repair = true }))
	if got.Read == 0 || got.Read > maxChunk {
		t.Errorf("%d bytes were read, want one chunk", got.Read)
	}
	whole(t, st)
}

func TestOneImportAtATime(t *testing.T) {
	s, _, set := shared(t)
	st := s.site()
	tried := false
	must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...), func(o *ImportOptions) {
		o.Progress = func(int64, int64) {
			if tried {
				return
			}
			tried = true
			if _, err := bring(t.Context(), st, s.open(st, set.Volumes...)); err == nil || !strings.Contains(err.Error(), "another import") {
				t.Errorf("a second import: %v", err)
			}
		}
	}))
	if !tried {
		t.Error("nothing was copied")
	}
}

func TestVolumeCutShort(t *testing.T) {
	s, set, _ := shared(t)
	st := s.site()
	short := filepath.Join(t.TempDir(), "short.iso")
	good := must[[]byte](t)(os.ReadFile(set.Volumes[1]))
	if err := os.WriteFile(short, good[:len(good)-1_000_000], 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(st.CheckSignature, set.Volumes[0], short); err == nil || !strings.Contains(err.Error(), "short by 1000000 bytes") {
		t.Errorf("an ISO file that is cut short: %v", err)
	}
	dir := t.TempDir()
	run(t, "", "xorriso", "-osirrox", "on", "-indev", set.Volumes[1], "-extract", "/", dir)
	run(t, "", "chmod", "-R", "u+w", dir)
	if err := os.Truncate(filepath.Join(dir, "platter/pack-2-1"), 1000); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "sbom.cdx.json")); err != nil {
		t.Fatal(err)
	}
	_, err := Open(st.CheckSignature, dir)
	for _, want := range []string{"volume 2 of platter 1.0", "file platter/pack-2-1 has 1000 bytes", "file sbom.cdx.json is missing"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a folder that is cut short: %q is not in %v", want, err)
		}
	}
}

func TestForeignVolumes(t *testing.T) {
	s := product(t)
	one := s.build("1.0", small)
	s.release("2.0", 2)
	two := s.build("2.0", small)
	st := s.site()
	_, err := Open(st.CheckSignature, one.Volumes[0], two.Volumes[1])
	for _, want := range []string{one.ID[:12], two.ID[:12], "platter 2.0", "does not belong"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("volumes of two sets: %q is not in %v", want, err)
		}
	}
	// The same, one at a time.
	must[*Imported](t)(bring(t.Context(), st, s.open(st, one.Volumes[0])))
	_, err = bring(t.Context(), st, s.open(st, two.Volumes[1]))
	for _, want := range []string{one.ID[:12], two.ID[:12], "--instead"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a volume of another set: %q is not in %v", want, err)
		}
	}
	must[*Imported](t)(bring(t.Context(), st, s.open(st, two.Volumes...), func(o *ImportOptions) { o.Instead = true }))
	if parts := must[[]string](t)(filepath.Glob(filepath.Join(st.Dir(), "objects", ".part-*"))); len(parts) > 0 {
		t.Errorf("of the other set are left: %v", parts)
	}
	// Older ones come only when they are asked for.
	_, err = bring(t.Context(), st, s.open(st, one.Volumes...))
	if err == nil || !strings.Contains(err.Error(), "newer than platter 1.0") || !strings.Contains(err.Error(), "--older") {
		t.Errorf("an older set: %v", err)
	}
	must[*Imported](t)(bring(t.Context(), st, s.open(st, one.Volumes...), func(o *ImportOptions) { o.Older = true }))
	if ref, _, err := st.Release(""); err != nil || ref.Version != "1.0" {
		t.Errorf("release %v, %v", ref, err)
	}
	// No volume at all.
	for _, p := range []string{t.TempDir(), s.key, filepath.Join(s.dir, "none")} {
		if _, err := Open(st.CheckSignature, p); err == nil || !strings.Contains(err.Error(), p) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if _, err := Open(st.CheckSignature, one.Volumes[0], one.Volumes[0]); err == nil || !strings.Contains(err.Error(), "both volume 1") {
		t.Errorf("a volume twice: %v", err)
	}
}

func TestUnknownKey(t *testing.T) {
	s, _, set := shared(t)
	st := must[*images.Store](t)(images.Open(filepath.Join(t.TempDir(), "store")))
	other := filepath.Join(t.TempDir(), "other")
	if err := errors.Join(images.GenerateKey(other), st.Trust(other+".pub")); err != nil {
		t.Fatal(err)
	}
	var pub minisign.PublicKey
	if err := pub.UnmarshalText(bytes.TrimSpace(must[[]byte](t)(os.ReadFile(s.key + ".pub")))); err != nil {
		t.Fatal(err)
	}
	_, err := Open(st.CheckSignature, set.Volumes[0])
	if want := fmt.Sprintf("unknown key %016X", pub.ID()); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "volume 1") {
		t.Errorf("%q is not in %v", want, err)
	}
	if strings.Contains(fmt.Sprint(err), "structure") {
		t.Errorf("the disc is said to be damaged: %v", err)
	}
	// With the key built into the program nobody has to trust anything.
	images.VendorKey = strings.Split(strings.TrimSpace(string(must[[]byte](t)(os.ReadFile(s.key+".pub")))), "\n")[1]
	defer func() { images.VendorKey = "" }()
	must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...)))
	whole(t, st)
}

// An import that is cut short, by whatever, goes on where it was.
func TestImportGoesOn(t *testing.T) {
	s, _, set := shared(t)
	st := s.site()
	ctx, cancel := context.WithCancel(t.Context())
	var total int64
	_, err := bring(ctx, st, s.open(st, set.Volumes...), func(o *ImportOptions) {
		o.Progress = func(done, all int64) {
			if total = all; done > all/2 {
				cancel()
			}
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if names := must[[]string](t)(st.Refs()); len(names) > 0 {
		t.Errorf("names are there: %v", names)
	}
	// A power cut loses what was not written yet.
	lost := int64(0)
	for _, p := range must[[]string](t)(filepath.Glob(filepath.Join(st.Dir(), "objects", ".part-*"))) {
		f := must[*os.File](t)(os.OpenFile(p, os.O_RDWR, 0))
		st := must[fs.FileInfo](t)(f.Stat())
		if n := min(st.Size(), 4096); lost == 0 && st.Size() > 1_000_000 {
			must[int](t)(f.WriteAt(make([]byte, n), 0))
			lost = n
		}
		f.Close()
	}
	got := must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...)))
	if got.Read >= total*3/4 || got.Read == 0 {
		t.Errorf("%d of %d bytes were read again", got.Read, total)
	}
	whole(t, st)
}

// A disk that is full ends an import with what came kept.
func TestImportOnFullDisk(t *testing.T) {
	s, _, set := shared(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=28m"); err != nil {
		t.Fatalf("a small disk cannot be made, this test needs root: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	st := must[*images.Store](t)(images.Open(filepath.Join(dir, "store")))
	if err := st.Trust(s.key + ".pub"); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	fill := func(left int64) {
		var fsys unix.Statfs_t
		if err := unix.Statfs(dir, &fsys); err != nil {
			t.Fatal(err)
		}
		if n := int64(fsys.Bavail)*fsys.Bsize - left; n > 0 {
			old, _ := os.ReadFile(filler)
			os.WriteFile(filler, append(old, make([]byte, n)...), 0o644) // as far as it goes
		}
	}
	fill(1 << 20)
	if _, err := bring(t.Context(), st, s.open(st, set.Volumes...)); err == nil || !strings.Contains(err.Error(), "MB free") {
		t.Errorf("no room from the start: %v", err)
	}
	os.Remove(filler)
	full := false
	_, err := bring(t.Context(), st, s.open(st, set.Volumes...), func(o *ImportOptions) {
		o.Progress = func(done, all int64) {
			if done > all/3 && !full {
				full = true
				fill(100_000)
			}
		}
	})
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "it goes on") {
		t.Fatalf("no room in the middle: %v", err)
	}
	os.Remove(filler)
	got := must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...)))
	if got.Kept == 0 {
		t.Error("nothing was kept")
	}
	whole(t, st)
}

// A patch holds what a site lacks and makes its store that of the whole set.
func TestPatch(t *testing.T) {
	s := product(t)
	old := s.build("1.0", 1<<30)
	inv := must[*Inventory](t)(TakeInventory(t.Context(), s.store))
	site := s.site()
	must[*Imported](t)(bring(t.Context(), site, s.open(site, old.Volumes...)))
	if at := must[*Inventory](t)(TakeInventory(t.Context(), site)); !slices.Equal(at.Chunks, inv.Chunks) || at.Store != inv.Store {
		t.Error("the site's inventory is another than that of the store that the set was built from")
	}
	// One frame changed, one more in between: the ones behind it move.
	s.image(1, 2, 3, 4, 105, 106, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	full := s.build("1.1", 1<<30)
	o := s.options("1.1", 1<<30)
	o.Have = inv
	patch := must[*Built](t)(Build(t.Context(), o))
	if patch.Sizes[0] > full.Sizes[0]/4 {
		t.Errorf("the patch has %d bytes, the whole set %d", patch.Sizes[0], full.Sizes[0])
	}
	if _, err := bring(t.Context(), s.site(), s.open(site, patch.Volumes...)); err == nil || !strings.Contains(err.Error(), "is a patch for the store "+inv.Store[:12]) {
		t.Errorf("a patch for another store: %v", err)
	}
	got := must[*Imported](t)(bring(t.Context(), site, s.open(site, patch.Volumes...)))
	fresh := s.site()
	want := must[*Imported](t)(bring(t.Context(), fresh, s.open(fresh, full.Volumes...)))
	if got.Hash != want.Hash {
		t.Errorf("the patched store is %s, that of the whole set %s", got.Hash, want.Hash)
	}
	whole(t, site)
	// The program is there, to be unpacked.
	bin := t.TempDir()
	if err := s.open(site, patch.Volumes...).Extract("bin", bin); err != nil {
		t.Error(err)
	}
	if got := run(t, "", "gzip", "-dc", filepath.Join(bin, "platter.gz")); got != string(must[[]byte](t)(os.ReadFile(o.Platter))) {
		t.Error("the program that comes with the patch is another one")
	}
	// It cannot be served from, and says so.
	mounted := must[*images.Store](t)(images.Open(filepath.Join(t.TempDir(), "s"), s.open(site, patch.Volumes...)))
	if _, _, err := mounted.Image("debian-13"); err == nil || !strings.Contains(err.Error(), "disc import") {
		t.Errorf("served from a patch: %v", err)
	}
}

// A store serves from discs as from its folder.
func TestServeFromDiscs(t *testing.T) {
	s, set, _ := shared(t)
	st := s.site()
	all := must[*images.Store](t)(images.Open(st.Dir(), s.open(st, set.Volumes...)))
	whole(t, all)
	if got, want := must[string](t)(all.Hash()), must[string](t)(s.store.Hash()); got != want {
		t.Errorf("hash %s, want %s", got, want)
	}
	_, im, err := all.Image("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(all.Handler(slog.New(slog.DiscardHandler)))
	defer srv.Close()
	pack := must[[]byte](t)(os.ReadFile(filepath.Join(s.store.Dir(), "objects", im.Pack.Hash)))
	for _, r := range []struct{ from, n int64 }{{0, im.Pack.Size}, {1, 10}, {150_000, 400_000}, {im.Pack.Size - 5, 5}} {
		got := run(t, "", "curl", "-sf", "-r", fmt.Sprintf("%d-%d", r.from, r.from+r.n-1), srv.URL+"/objects/"+im.Pack.Hash)
		if got != string(pack[r.from:r.from+r.n]) {
			t.Errorf("bytes %d to %d are different", r.from, r.from+r.n)
		}
	}
	ref, _, _ := all.Image("debian-13")
	sig := run(t, "", "curl", "-sf", srv.URL+"/objects/"+ref.Digest+".minisig")
	if err := all.CheckSignature(must[[]byte](t)(os.ReadFile(filepath.Join(s.store.Dir(), "objects", ref.Digest))), []byte(sig)); err != nil {
		t.Error(err)
	}
	// What the discs have counts, and not what was kept of an earlier set.
	earlier := s.site()
	if err := os.CopyFS(earlier.Dir(), os.DirFS(s.store.Dir())); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(earlier.Dir(), "refs/debian-13"), []byte(`{"digest":"`+strings.Repeat("0", 64)+`"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if now, _, err := must[*images.Store](t)(images.Open(earlier.Dir(), s.open(st, set.Volumes...))).Image("debian-13"); err != nil || now.Digest != ref.Digest {
		t.Errorf("the disc has %s, served is %s, %v", ref.Digest, now.Digest, err)
	}
	// All of it as the files of a folder: a store of its own.
	copied := filepath.Join(t.TempDir(), "copied")
	files, err := all.Files()
	if err != nil {
		t.Fatal(err)
	}
	for p, open := range files {
		f := must[images.File](t)(open())
		b := must[[]byte](t)(io.ReadAll(f))
		f.Close()
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(copied, p)), 0o755), os.WriteFile(filepath.Join(copied, p), b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	own := must[*images.Store](t)(images.Open(copied))
	whole(t, own)
	if got, want := must[string](t)(own.Hash()), must[string](t)(s.store.Hash()); got != want {
		t.Errorf("copied: hash %s, want %s", got, want)
	}
	// Without a volume: what is blocked is said, the rest is usable.
	part := s.open(st, set.Volumes[:2]...)
	blocked := part.Blocked()
	if len(blocked) == 0 || len(blocked) == len(set.Set.Refs) {
		t.Fatalf("blocked are %v", blocked)
	}
	some := must[*images.Store](t)(images.Open(st.Dir(), part))
	for _, r := range set.Set.Refs {
		_, err := some.Contents(r.Name)
		if _, is := blocked[r.Name]; is != (err != nil) {
			t.Errorf("%s: blocked %v, %v", r.Name, is, err)
		} else if is && !strings.Contains(err.Error(), "not at hand: [3]") {
			t.Errorf("%s: %v", r.Name, err)
		}
	}
}

func TestBuildRefusals(t *testing.T) {
	s := product(t)
	o := s.options("1.0", 1<<30)
	o.Spec.Images = []string{"debian-13", "debian-99"}
	o.Spec.Releases = []string{"9.9"}
	o.Spec.Languages = []string{"en"}
	o.Platter = filepath.Join(s.dir, "none")
	o.IPXE = t.TempDir()
	_, err := Build(t.Context(), o)
	for _, want := range []string{"debian-99", "9.9", o.Platter, "undionly.kpxe"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	o = s.options("1.0", 4<<20)
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("volumes of 4 MiB: %v", err)
	}
	if left := must[[]os.DirEntry](t)(os.ReadDir(o.Out)); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
	ctx, cancel := context.WithCancel(t.Context())
	o = s.options("1.0", small)
	o.Progress = func(what string, done, total int64) {
		if what == "packing" && done > total/2 {
			cancel()
		}
	}
	if _, err := Build(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("cut short: %v", err)
	}
	if left := must[[]os.DirEntry](t)(os.ReadDir(o.Out)); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

func TestSpec(t *testing.T) {
	_, err := ParseSpec("disc.yaml", []byte("name: Platter!\nversion: x\ndate: today\narch: [amd64, vax]\nimages: [debian-13, debian-13]\nlanguages: [en, tlh]\nfoo: 1\n"))
	for _, want := range []string{"disc.yaml:1", "disc.yaml:2", "disc.yaml:3", `"vax"`, "debian-13 is there twice", `"tlh"`, "foo"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	s, err := ParseSpec("disc.yaml", []byte("name: platter\nversion: \"1.0\"\ndate: 2026-11-22\nimages: [debian-13]\nreleases: [newest]\n"))
	if err != nil || s.Name != "platter" || !slices.Equal(s.Languages, Languages()) || s.Date.Day() != 22 {
		t.Errorf("%+v, %v", s, err)
	}
	for text, want := range map[string]int64{"cd": 681_984_000, "DVD": 4_700_372_992, "700MB": 700_000_000, "4GiB": 4 << 30} {
		if got, err := VolumeSize(text); got != want || err != nil {
			t.Errorf("%s: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "floppy", "0"} {
		if _, err := VolumeSize(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

// Chunks of equal stretches are equal, wherever these lie.
func TestChunksFollowContent(t *testing.T) {
	cut := func(b []byte) map[string]bool {
		out := map[string]bool{}
		var all []byte
		if err := chunks(t.Context(), bytes.NewReader(b), func(c Chunk, b []byte) error {
			if c.Hash != ID(b) || c.Size != int64(len(b)) || c.Size > maxChunk {
				t.Errorf("chunk %+v of %d bytes", c, len(b))
			}
			out[c.Hash] = true
			all = append(all, b...)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(all) != sha256.Sum256(b) {
			t.Error("the chunks are not the whole")
		}
		return out
	}
	b := bytesOf(7, 20<<20)
	before := cut(b)
	after := cut(slices.Concat(b[:5<<20], []byte("a few bytes more"), b[5<<20:]))
	both := 0
	for h := range after {
		if before[h] {
			both++
		}
	}
	if len(before) < 15 || both < len(after)-3 {
		t.Errorf("%d of %d chunks are the same as before", both, len(after))
	}
	if len(cut(nil)) != 0 {
		t.Error("nothing has chunks")
	}
}

func FuzzRead(f *testing.F) {
	set := Set{Format: SetFormat, Name: "a", Version: "1", Refs: []Ref{{Name: "x", Digest: strings.Repeat("0", 64), Objects: []int{0}}},
		Objects: []Object{{provision.Object{Hash: strings.Repeat("0", 64), Size: 1}, []Chunk{{1, strings.Repeat("1", 64)}}}},
		Volumes: []Volume{{Label: "A", Files: []File{{Path: "p", Size: 1, Hash: strings.Repeat("2", 64), Chunks: []Chunk{{1, strings.Repeat("1", 64)}}}}}}}
	good, _, err := set.Manifest()
	if err != nil {
		f.Fatal(err)
	}
	if _, err := Read(good); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("{}"))
	f.Add(bytes.ReplaceAll(good, []byte(`"p"`), []byte(`"../p"`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Read(b)
		if err != nil {
			return
		}
		for _, v := range s.Volumes {
			for _, file := range v.Files {
				if filepath.IsAbs(file.Path) || strings.HasPrefix(file.Path, "..") {
					t.Errorf("path %q", file.Path)
				}
			}
		}
		where := s.places()
		for h := range maps.Keys(where) {
			if !hexHash.MatchString(h) {
				t.Errorf("chunk %q", h)
			}
		}
		s.blocked(func(Chunk) (int, bool) { return 0, false })
	})
}

// With one drive: volumes are asked for until the set is whole, and what is no
// volume of it is said and changes nothing.
func TestGatherWithOneDrive(t *testing.T) {
	s, set, _ := shared(t)
	st := s.site()
	other := s.build("0.1", 1<<30) // what is not of the set changes nothing
	drive := []string{set.Volumes[1], t.TempDir(), set.Volumes[1], other.Volumes[0], set.Volumes[2], set.Volumes[0]}
	want := [][]int{nil, {1, 3}, {1, 3}, {1, 3}, {1, 3}, {1}}
	failed, n := 0, 0
	err := Gather(t.Context(), ImportOptions{Store: st, Instead: true, Older: true, Progress: func(int64, int64) {}}, func(_ context.Context, missing []int) (string, error) {
		if n >= len(drive) {
			return "", errors.New("asked again")
		}
		if !slices.Equal(missing, want[n]) {
			t.Errorf("request %d is for %v, want %v", n+1, missing, want[n])
		}
		n++
		return drive[n-1], nil
	}, func(_ *Discs, _ *Imported, err error) {
		if err != nil {
			failed++
		}
	})
	if err != nil || n != len(drive) || failed != 2 {
		t.Errorf("%d volumes, %d failed, %v", n, failed, err)
	}
	whole(t, st)
	nobody := errors.New("nobody is there")
	if err := Gather(t.Context(), ImportOptions{Store: s.site(), Progress: func(int64, int64) {}}, func(context.Context, []int) (string, error) { return "", nobody },
		func(*Discs, *Imported, error) {}); !errors.Is(err, nobody) {
		t.Errorf("got %v", err)
	}
}
