package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"platter/provision"
)

// testImage is an image made of parts in memory.
type testImage struct {
	manifest *provision.Image
	pack     []byte
	raw      map[string][]byte
}

// makeImage packs the parts in frames of at most frameSize, leaving blocks of zeros at
// both ends of a frame out.
func makeImage(t testing.TB, frameSize int, parts map[string][]byte) testImage {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	im := testImage{manifest: &provision.Image{Format: provision.ImageFormat, Name: "test"}, raw: parts}
	hash := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	for _, name := range []string{provision.PartBoot, provision.PartBIOS, provision.PartESP, provision.PartRoot} {
		raw, ok := parts[name]
		if !ok {
			continue
		}
		p := provision.Part{Name: name, Size: int64(len(raw))}
		for off := 0; off < len(raw); off += frameSize {
			b, from := raw[off:min(off+frameSize, len(raw))], off
			for len(b) >= directAlign && zero(b[:directAlign]) {
				b, from = b[directAlign:], from+directAlign
			}
			for len(b) > 0 && zero(b[(len(b)-1)&^(directAlign-1):]) {
				b = b[:(len(b)-1)&^(directAlign-1)]
			}
			if len(b) == 0 {
				continue
			}
			packed := enc.EncodeAll(b, nil)
			p.Frames = append(p.Frames, provision.Frame{Offset: int64(from), Size: len(b), At: int64(len(im.pack)),
				Packed: len(packed), Hash: hash(packed), Raw: hash(b)})
			im.pack = append(im.pack, packed...)
		}
		im.manifest.Parts = append(im.manifest.Parts, p)
	}
	im.manifest.Pack = provision.Object{Hash: hash(im.pack), Size: int64(len(im.pack))}
	return im
}

// pattern is data that compresses badly, with a hole in it.
func pattern(seed uint64, n int, holeFrom, holeTo int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	clear(b[holeFrom:holeTo])
	return b
}

// smallImage has all four parts and 30 frames.
func smallImage(t testing.TB, seed uint64) testImage {
	return makeImage(t, 64<<10, map[string][]byte{
		provision.PartBoot: pattern(seed, 440, 0, 0),
		provision.PartBIOS: pattern(seed+1, 30*512, 0, 0),
		provision.PartESP:  pattern(seed+2, mib, 260<<10, 500<<10),
		provision.PartRoot: pattern(seed+3, mib+300, 188<<10, 600<<10),
	})
}

func smallPlan(node string, generation int, image string) *provision.Plan {
	return &provision.Plan{Format: provision.PlanFormat, Rack: "r", Node: node, Generation: generation, Reinstall: generation > 1,
		Image: provision.ImageRef{Name: "test", Digest: image},
		Layout: []provision.Partition{
			{Name: "platter-bios", Type: provision.TypeBIOSBoot, Size: mib, Part: provision.PartBIOS},
			{Name: "platter-esp", Type: provision.TypeESP, Size: mib, Part: provision.PartESP},
			{Name: "platter-root", Type: provision.TypeRootX64, Part: provision.PartRoot, Grow: true},
		}}
}

// memSource serves the pack from memory.
type memSource struct{ im testImage }

func (s memSource) Open(_ context.Context, object string, off, n int64) (io.ReadCloser, error) {
	if object != s.im.manifest.Pack.Hash {
		return nil, fmt.Errorf("no object %s", object)
	}
	return io.NopCloser(bytes.NewReader(s.im.pack[off : off+n])), nil
}

func quiet(int64, int64) {}

// install does everything that lays im on v.
func install(ctx context.Context, v Volume, plan *provision.Plan, im testImage, src Source) error {
	in, err := Begin(v, plan, im.manifest)
	if err != nil {
		return err
	}
	in.CheckpointEvery = 1e6 // 1 ms: as many states to be cut off in as possible
	if err := in.Write(ctx, src, quiet); err != nil {
		return err
	}
	return in.Commit(ctx)
}

// checkContent compares everything that im and its table put on v.
func checkContent(v Volume, im testImage) error {
	table, err := readTable(v)
	if err != nil {
		return err
	}
	for _, s := range table.Slots {
		name := map[string]string{"platter-bios": "bios", "platter-esp": "esp", "platter-root": "root"}[s.Name]
		want := bytes.Clone(im.raw[name])
		got := make([]byte, len(want))
		if _, err := v.ReadAt(got, s.Start); err != nil {
			return err
		}
		if name == provision.PartBIOS {
			copy(want[coreBlocklist:512], got[coreBlocklist:512]) // patched
		}
		if !bytes.Equal(got, want) {
			for i := range got {
				if got[i] != want[i] {
					return fmt.Errorf("part %s differs at byte %d", name, i)
				}
			}
		}
	}
	if len(table.Slots) != 3 {
		return fmt.Errorf("%d partitions", len(table.Slots))
	}
	mbr := make([]byte, 512)
	if _, err := v.ReadAt(mbr, 0); err != nil {
		return err
	}
	copy(mbr[bootKernelSector:], im.raw[provision.PartBoot][bootKernelSector:bootKernelSector+8])
	if !bytes.Equal(mbr[:440], im.raw[provision.PartBoot]) {
		return errors.New("the boot code differs")
	}
	return nil
}

// bootable tells whether any firmware could find something to start.
func bootable(v Volume) bool {
	mbr := make([]byte, 512)
	if _, err := v.ReadAt(mbr, 0); err != nil {
		panic(err)
	}
	_, err := readTable(v)
	return mbr[510] == 0x55 && mbr[511] == 0xaa || !zero(mbr) || err == nil && mbr[510] != 0
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

var errPower = errors.New("the power is gone")

// flakyDisk keeps what was written since the last Sync apart and loses some of
// it when the power goes.
type flakyDisk struct {
	mu      sync.Mutex
	stable  []byte
	live    []byte
	pending []write
	left    int // operations until the power goes; negative: never
	dead    bool
}

type write struct {
	off int64
	b   []byte
}

func newFlakyDisk(size int) *flakyDisk {
	return &flakyDisk{stable: make([]byte, size), live: make([]byte, size), left: -1}
}

func (d *flakyDisk) tick() error {
	if d.left == 0 {
		d.dead = true
	}
	if d.dead {
		return errPower
	}
	if d.left > 0 {
		d.left--
	}
	return nil
}

func (d *flakyDisk) WriteAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// The write under way when the power goes may reach the disk in part.
	err := d.tick()
	if err == nil || d.left == 0 {
		d.pending = append(d.pending, write{off, bytes.Clone(b)})

	}
	if err != nil {
		return 0, err
	}
	copy(d.live[off:], b)
	return len(b), nil
}

func (d *flakyDisk) Zero(off, n int64) error {
	_, err := d.WriteAt(make([]byte, n), off)
	return err
}

func (d *flakyDisk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.tick(); err != nil {
		return err
	}
	for _, w := range d.pending {
		copy(d.stable[w.off:], w.b)
	}
	d.pending = nil
	return nil
}

func (d *flakyDisk) ReadAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off+int64(len(b)) > int64(len(d.live)) {
		return 0, io.ErrUnexpectedEOF
	}
	return copy(b, d.live[off:]), nil
}

func (d *flakyDisk) Size() int64     { return int64(len(d.stable)) }
func (d *flakyDisk) SectorSize() int { return 512 }

// powerOn returns the disk after the cut: of every write that was not synced
// any sectors, or none, have arrived.
func (d *flakyDisk) powerOn(r *rand.Rand) {
	for _, w := range d.pending {
		switch r.IntN(3) {
		case 0:
		case 1:
			copy(d.stable[w.off:], w.b)
		case 2:
			for at := 0; at < len(w.b); at += 512 {
				if r.IntN(2) == 0 {
					copy(d.stable[w.off+int64(at):], w.b[at:min(at+512, len(w.b))])
				}
			}
		}
	}
	d.pending, d.dead, d.left = nil, false, -1
	copy(d.live, d.stable)
}
