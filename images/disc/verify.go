package disc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Verify compares every byte of the volumes at hand with the manifest, in the
// order in which they lie there. The error names all that is wrong, each with
// volume, file and offset (Damage); a damaged chunk is read once more before it
// is. progress is told bytes of all.
func (d *Discs) Verify(ctx context.Context, progress func(done, total int64)) error {
	var total, done int64
	for _, n := range d.Have() {
		total += d.Set.Volumes[n-1].Size()
	}
	var mu sync.Mutex
	var wrong faults
	bad := wrong.add
	for _, n := range d.Have() {
		v := d.volumes[n]
		var dr drive
		d.verifyDerived(v, bad)
		for _, f := range d.Set.Volumes[n-1].Files {
			if dr.isGone() {
				break
			}
			err := d.verifyFile(ctx, v, f, &dr, bad, func(n int64) {
				mu.Lock()
				defer mu.Unlock()
				done += n
				progress(done, total)
			})
			if err != nil {
				return err
			}
		}
		if f := v.device(); f != nil && !dr.isGone() {
			found, ok := d.structureDamage(v, f)
			if !ok {
				found = []error{d.damage(v, structureFile, 0, Chunk{Size: structureSize}, errDiffers)}
			}
			for _, err := range found {
				bad(err)
			}
		}
	}
	return wrong.err()
}

// FilesOnly are the numbers of those volumes at hand of which Verify sees the files
// alone, not what the disc boots from: copies of the files, and mounted ones whose
// drive cannot be read.
func (d *Discs) FilesOnly() (numbers []int) {
	for _, n := range d.Have() {
		if d.volumes[n].device() == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

// verifyDerived compares the files that follow from the manifest, and looks for
// ones that do not belong there.
func (d *Discs) verifyDerived(v *volume, bad func(error)) {
	should := d.Set.Volumes[v.number-1].derived(d.manifest, d.signature)
	for path, want := range should {
		is, err := readAll(v, path, maxManifest)
		if err != nil {
			bad(d.damage(v, path, 0, Chunk{Size: int64(len(want))}, err))
			continue
		}
		if !bytes.Equal(is, want) {
			at := 0
			for at < min(len(is), len(want)) && is[at] == want[at] {
				at++
			}
			bad(d.damage(v, path, int64(at), Chunk{Size: int64(len(want) - at)}, errDiffers))
		}
	}
	files, err := v.files()
	if err != nil {
		bad(fmt.Errorf("volume %d of %s (%s): its files cannot be listed: %w", v.number, d.Set, v.source, err))
	}
	for _, path := range files {
		_, listed := d.Set.Volumes[v.number-1].File(path)
		if _, ok := should[path]; !ok && !listed && !slices.Contains(structureFiles, path) && !strings.HasPrefix(path, "lost+found") {
			bad(fmt.Errorf("volume %d of %s (%s): file %s does not belong to the set", v.number, d.Set, v.source, path))
		}
	}
}

func (d *Discs) verifyFile(ctx context.Context, v *volume, f File, dr *drive, bad func(error), count func(int64)) error {
	m, err := v.open(f.Path)
	if err != nil {
		bad(d.damage(v, f.Path, 0, Chunk{Size: f.Size}, err))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return ctx.Err()
	}
	defer m.close()
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	bufs := sync.Pool{New: func() any { b := make([]byte, maxChunk); return &b }}
	at := int64(0)
	for _, c := range f.Chunks {
		if ctx.Err() != nil || dr.isGone() {
			break
		}
		start := at
		g.Go(func() error {
			buf := bufs.Get().(*[]byte)
			defer bufs.Put(buf)
			_, err := readChunk(m, start, c, *buf)
			if dr.lost(err) {
				bad(d.takenOut(v, f.Path, start, err))
			} else if err != nil && !dr.isGone() {
				bad(d.damage(v, f.Path, start, c, err))
			}
			count(c.Size)
			return nil
		})
		at += c.Size
	}
	g.Wait()
	return ctx.Err()
}
