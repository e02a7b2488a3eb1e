package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"platter/provision"
)

// Wherever the power goes, the disk either does not boot or is complete, and
// the next start brings it to completion.
func TestPowerCutAnywhere(t *testing.T) {
	ctx := context.Background()
	old, im := smallImage(t, 10), smallImage(t, 20)
	installed := newFlakyDisk(6 * mib)
	if err := install(ctx, installed, smallPlan("node1", 1, "old"), old, memSource{old}); err != nil {
		t.Fatal(err)
	}
	for _, start := range []struct {
		name string
		plan *provision.Plan
		make func(*flakyDisk)
	}{
		{"blank disk", smallPlan("node1", 1, "new"), func(*flakyDisk) {}},
		{"older install", smallPlan("node1", 2, "new"), func(d *flakyDisk) {
			copy(d.stable, installed.stable)
			copy(d.live, installed.stable)
		}},
	} {
		t.Run(start.name, func(t *testing.T) {
			cuts, resumed := 0, 0
			// Every cut while the disk is cleared, then every other one.
			for cut := 0; ; cut += 1 + min(cut/16, 1) {
				r := rand.New(rand.NewPCG(uint64(cut), 7))
				d := newFlakyDisk(6 * mib)
				start.make(d)
				d.left = cut
				err := install(ctx, d, start.plan, im, memSource{im})
				if err == nil {
					break
				}
				cuts++
				if !errors.Is(err, errPower) && !isCode(err, "disk-error") {
					t.Fatalf("cut %d: %v", cut, err)
				}
				// The power goes twice: while writing, and while resuming.
				d.powerOn(r)
				check := func(when string) {
					if bootable(d) && checkContent(d, im) != nil && checkContent(d, old) != nil {
						t.Fatalf("cut %d: %s the disk boots but holds neither system: %v", cut, when, checkContent(d, im))
					}
				}
				check("after the first cut")
				d.left = 3 + r.IntN(30)
				if err := install(ctx, d, start.plan, im, memSource{im}); err != nil {
					d.powerOn(r)
					check("after the second cut")
				}
				d.left = -1
				in, err := Begin(d, start.plan, im.manifest)
				if err != nil {
					t.Fatalf("cut %d: the next start: %v", cut, err)
				}
				if in.Resumed() {
					resumed++
				}
				if bootable(d) {
					t.Fatalf("cut %d: the disk boots while it is written", cut)
				}
				if err := in.Write(ctx, memSource{im}, quiet); err != nil {
					t.Fatalf("cut %d: %v", cut, err)
				}
				if err := in.Commit(ctx); err != nil {
					t.Fatalf("cut %d: %v", cut, err)
				}
				if err := checkContent(d, im); err != nil {
					t.Fatalf("cut %d: after the last start: %v", cut, err)
				}
			}
			if cuts < 24 || resumed < 12 {
				t.Fatalf("only %d cuts, %d resumed: the test does not reach the install", cuts, resumed)
			}
		})
	}
}

func isCode(err error, code string) bool {
	var f *provision.Failure
	return errors.As(err, &f) && f.Code == code
}

// countSource counts what is fetched and stops after limit bytes.
type countSource struct {
	memSource
	limit, fetched int64
}

func (s *countSource) Open(ctx context.Context, object string, off, n int64) (io.ReadCloser, error) {
	b, err := s.memSource.Open(ctx, object, off, n)
	return struct {
		io.Reader
		io.Closer
	}{countReader{s, b}, b}, err
}

type countReader struct {
	s *countSource
	r io.Reader
}

func (c countReader) Read(b []byte) (int, error) {
	if c.s.fetched >= c.s.limit {
		return 0, errors.New("cut off")
	}
	n, err := c.r.Read(b[:min(len(b), 4096)])
	c.s.fetched += int64(n)
	return n, err
}

func TestResumeSkipsWhatIsThere(t *testing.T) {
	im := smallImage(t, 1)
	d := newFlakyDisk(6 * mib)
	plan := smallPlan("node1", 1, "x")
	ctx, cancel := context.WithCancel(context.Background())
	in, err := Begin(d, plan, im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	half := im.manifest.Pack.Size / 2
	err = in.Write(ctx, &countSource{memSource{im}, half, 0}, func(done, _ int64) {
		if done > half*8/10 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled write: %v", err)
	}
	if err := in.Commit(context.Background()); err == nil {
		t.Fatal("half an image was made bootable")
	}
	d.powerOn(rand.New(rand.NewPCG(1, 1)))
	src := &countSource{memSource{im}, 1 << 40, 0}
	if in, err = Begin(d, plan, im.manifest); err != nil {
		t.Fatal(err)
	}
	if err := in.Write(context.Background(), src, quiet); err != nil {
		t.Fatal(err)
	}
	if src.fetched > im.manifest.Pack.Size*3/4 {
		t.Errorf("fetched %d of %d bytes again", src.fetched, im.manifest.Pack.Size)
	}
	// What was grown and changed since must not be written over.
	root, _ := in.Slot(provision.PartRoot)
	if _, err := d.WriteAt([]byte("changed"), root.Start); err != nil {
		t.Fatal(err)
	}
	hole := root.Start + 400<<10
	if _, err := d.WriteAt([]byte("in a hole"), hole); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	src.fetched = 0
	if in, err = Begin(d, plan, im.manifest); err != nil {
		t.Fatal(err)
	}
	if err := in.Write(context.Background(), src, quiet); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 9)
	if d.ReadAt(b, hole); string(b) != "in a hole" || src.fetched > 1000 {
		t.Errorf("a complete image was written again: %q, %d bytes fetched", b, src.fetched)
	}
	// Unless it turned out to be damaged.
	if err := in.Forget(); err != nil {
		t.Fatal(err)
	}
	if err := in.Write(context.Background(), src, quiet); err != nil {
		t.Fatal(err)
	}
	if err := in.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := checkContent(d, im); err != nil {
		t.Error(err)
	}
}

func TestPermit(t *testing.T) {
	im := smallImage(t, 1)
	lay := func(plan *provision.Plan) *flakyDisk {
		d := newFlakyDisk(6 * mib)
		if err := install(context.Background(), d, plan, im, memSource{im}); err != nil {
			t.Fatal(err)
		}
		return d
	}
	wipe := func(p *provision.Plan) *provision.Plan { p.Disk.Wipe = true; return p }
	other := func(p *provision.Plan) *provision.Plan { p.Slot = "other"; return p }
	half := func(p *provision.Plan) *flakyDisk {
		d := newFlakyDisk(6 * mib)
		if _, err := Begin(d, p, im.manifest); err != nil {
			t.Fatal(err)
		}
		return d
	}
	with := func(at int64, data string) *flakyDisk {
		d := newFlakyDisk(6 * mib)
		d.WriteAt([]byte(data), at)
		return d
	}
	repartitioned := lay(smallPlan("node1", 1, "x"))
	_, primary, backup, at := Table{Disk: NewGUID(), Slots: []Slot{{Name: "data", Type: NewGUID(), Start: mib, Size: mib}}}.encode(6*mib, 512)
	repartitioned.WriteAt(primary, 512)
	repartitioned.WriteAt(backup, at)

	for i, c := range []struct {
		disk   *flakyDisk
		plan   *provision.Plan
		code   string // empty: allowed
		resume bool
	}{
		{newFlakyDisk(6 * mib), smallPlan("node1", 1, "x"), "", false},
		{with(510, "\x55\xaa"), smallPlan("node1", 1, "x"), "disk-foreign", false},
		{with(1080, "\x53\xef"), smallPlan("node1", 1, "x"), "disk-foreign", false},
		{with(700_000, "?"), smallPlan("node1", 1, "x"), "disk-foreign", false},
		{with(6*mib-512, "?"), smallPlan("node1", 1, "x"), "disk-foreign", false},
		{with(700_000, "?"), wipe(smallPlan("node1", 1, "x")), "", false},
		{lay(smallPlan("node1", 1, "x")), smallPlan("node1", 1, "x"), "", true},
		{lay(smallPlan("node1", 1, "x")), other(smallPlan("node1", 1, "x")), "disk-installed", false},
		{lay(smallPlan("node1", 1, "x")), smallPlan("node1", 2, "x"), "", false},
		{lay(smallPlan("node1", 3, "x")), smallPlan("node1", 2, "x"), "disk-installed", false},
		{lay(smallPlan("node2", 1, "x")), smallPlan("node1", 2, "x"), "disk-foreign", false},
		{lay(smallPlan("node2", 1, "x")), wipe(smallPlan("node1", 2, "x")), "", false},
		{half(smallPlan("node1", 1, "x")), other(smallPlan("node1", 1, "x")), "", false},
		{half(smallPlan("node1", 1, "x")), smallPlan("node1", 1, "x"), "", true},
		{half(smallPlan("node2", 1, "x")), smallPlan("node1", 1, "x"), "disk-foreign", false},
		{repartitioned, smallPlan("node1", 2, "x"), "disk-foreign", false},
	} {
		before := fmt.Sprintf("%x", c.disk.live[:mib])
		in, err := Begin(c.disk, c.plan, im.manifest)
		switch {
		case c.code == "" && err != nil:
			t.Errorf("case %d: refused: %v", i, err)
		case c.code != "" && !isCode(err, c.code):
			t.Errorf("case %d: %v instead of %s", i, err, c.code)
		case c.code != "" && fmt.Sprintf("%x", c.disk.live[:mib]) != before:
			t.Errorf("case %d: a refused disk was changed", i)
		case err == nil && in.Resumed() != c.resume:
			t.Errorf("case %d: resumed %v", i, in.Resumed())
		}
	}
}

// A disk that fails to flush must not be marked as written.
func TestFailedFlush(t *testing.T) {
	im := smallImage(t, 1)
	d := &unflushable{flakyDisk: newFlakyDisk(6 * mib)}
	in, err := Begin(d, smallPlan("node1", 1, "x"), im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	d.failOnce = true
	if err := in.Write(context.Background(), memSource{im}, quiet); !isCode(err, "disk-error") {
		t.Fatalf("a failed flush gave %v", err)
	}
	if in.written() {
		t.Error("frames that the disk may have lost count as written")
	}
}

type unflushable struct {
	*flakyDisk
	failOnce bool
}

func (u *unflushable) Sync() error {
	if u.failOnce {
		u.failOnce = false
		return errors.New("I/O error")
	}
	return u.flakyDisk.Sync()
}

// A manifest is signed, but a bug that signs nonsense must not reach the disk.
func TestImpossibleFrames(t *testing.T) {
	for name, spoil := range map[string]func(*provision.Frame){
		"beyond the part":  func(f *provision.Frame) { f.Offset = 1 << 40 },
		"negative offset":  func(f *provision.Frame) { f.Offset = -4096 },
		"unaligned offset": func(f *provision.Frame) { f.Offset = 100 },
		"beyond the pack":  func(f *provision.Frame) { f.At = 1 << 40 },
		"too large":        func(f *provision.Frame) { f.Size = provision.FrameSize + 1 },
		"empty":            func(f *provision.Frame) { f.Packed = 0 },
		"wrong raw size":   func(f *provision.Frame) { f.Size = 4096 },
		"bad hash":         func(f *provision.Frame) { f.Hash = "xyz" },
	} {
		im := smallImage(t, 1)
		spoil(&im.manifest.Parts[2].Frames[0])
		d := newFlakyDisk(6 * mib)
		if err := install(context.Background(), d, smallPlan("n", 1, "x"), im, memSource{im}); !isCode(err, "image-broken") {
			t.Errorf("%s: %v", name, err)
		}
		if bootable(d) {
			t.Errorf("%s: the disk boots", name)
		}
	}
}
