package disk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"platter/provision"
)

// job is one frame on its way to the disk.
type job struct {
	provision.Frame
	index int // over all parts; -1: not on the disk by itself
	at    int64
	part  string
	hash  [sha256.Size]byte
	buf   []byte // packed bytes
}

// maxPacked is what a frame that does not compress may need (zstd's bound).
const maxPacked = provision.FrameSize + provision.FrameSize/128 + 4096

// Write brings every frame that is not yet on the disk onto it: fetched in the
// order of the pack, verified, decompressed and written by several workers at
// once. What no frame covers becomes zeros. A broken connection goes on at the
// first missing frame. progress hears packed bytes; it is called from several
// goroutines and must not block.
//
// A frame that is not what the manifest says, twice, is a *provision.Failure,
// as is a disk that does not take a write. Any other error is worth another
// call, which goes on where this one ended.
func (in *Install) Write(ctx context.Context, src Source, progress func(done, total int64)) error {
	todo, done, total, err := in.jobs()
	if err != nil {
		return err
	}
	w := &writer{Install: in, src: src, total: total, progress: progress, fresh: map[int]bool{}}
	for _, j := range todo {
		w.packed, w.raw = max(w.packed, j.Packed), max(w.raw, j.Size)
	}
	w.count(done)
	if in.boot.Size > 0 && len(in.code) == 0 {
		if in.code, err = w.bootCode(ctx); err != nil {
			return err
		}
	}
	if len(todo) == 0 && in.marker.Zeroed {
		return nil
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	workers := runtime.GOMAXPROCS(0) + 2
	full := make(chan job, 2)
	free := make(chan []byte, workers+cap(full)+1)
	for range cap(free) {
		free <- nil
	}
	g.Go(func() error {
		defer close(full)
		return w.stream(gctx, todo, free, full)
	})
	for range workers {
		g.Go(func() error { return w.work(gctx, full, free) })
	}
	if !in.marker.Zeroed {
		g.Go(func() error { return w.zeroHoles(gctx) })
	}
	written, checked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(checked)
		w.checkpoints(written, cancel)
	}()
	err = g.Wait()
	close(written)
	<-checked
	// What made it to the disk is worth a last checkpoint even when err says
	// that not everything did. A disk that failed to flush is the first cause.
	if cerr := w.checkpoint(); cerr != nil {
		return cerr
	}
	if serr := in.vol.Sync(); serr != nil { // the marker itself
		return diskFailure("flush", 0, serr)
	}
	return err
}

// jobs lists the frames that are missing, in the order of the pack, and counts
// packed bytes.
func (in *Install) jobs() (todo []job, done, total int64, err error) {
	i := -1
	for _, p := range in.image.Parts {
		s, placed := in.Slot(p.Name)
		for _, f := range p.Frames {
			i++
			if !placed {
				continue
			}
			j, err := in.job(p, f)
			if err != nil {
				return nil, 0, 0, err
			}
			j.index, j.at = i, s.Start+f.Offset
			total += int64(f.Packed)
			if in.marker.has(i) {
				done += int64(f.Packed)
				continue
			}
			todo = append(todo, j)
		}
	}
	slices.SortFunc(todo, func(a, b job) int { return int(min(max(a.At-b.At, -1), 1)) })
	return todo, done, total, nil
}

// job checks what the manifest says of one frame.
func (in *Install) job(p provision.Part, f provision.Frame) (job, error) {
	j := job{Frame: f, index: -1, part: p.Name}
	hash, err := hex.DecodeString(f.Hash)
	if err != nil || len(hash) != sha256.Size || f.Size <= 0 || f.Size > provision.FrameSize || f.Packed <= 0 || f.Packed > maxPacked ||
		f.Offset < 0 || f.Offset%directAlign != 0 || f.Offset > p.Size-int64(f.Size) || f.At < 0 || f.At > in.image.Pack.Size-int64(f.Packed) {
		return j, &provision.Failure{Code: "image-broken",
			Message: fmt.Sprintf("the manifest of image %s has a frame that cannot be: part %s, offset %d", in.image.Name, p.Name, f.Offset),
			Next:    "Build the image again, then start the machine again"}
	}
	copy(j.hash[:], hash)
	return j, nil
}

type writer struct {
	*Install
	src      Source
	total    int64
	done     int64 // under mu
	progress func(done, total int64)
	packed   int // the largest frame, packed
	raw      int // and raw
	// fresh are frames that the disk has taken but not confirmed, under mu;
	// holes says the same of the zeros.
	fresh map[int]bool
	holes bool
	// broken is why checkpoints have ended.
	broken error
}

func (w *writer) count(n int64) {
	w.mu.Lock()
	w.done += n
	done := w.done
	w.mu.Unlock()
	w.progress(done, w.total)
}

// stream fetches the frames and hands them out, over as few requests as the
// gaps allow. It tries again for as long as bytes arrive within Stall.
func (w *writer) stream(ctx context.Context, todo []job, free chan []byte, full chan<- job) error {
	last, failures := time.Now(), 0
	for len(todo) > 0 {
		n, moved, err := w.run(ctx, todo, free, full)
		todo = todo[n:]
		if moved {
			last, failures = time.Now(), 0
		}
		var f *provision.Failure
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &f):
			return err
		case err == nil:
			continue
		case time.Since(last) > w.Stall:
			return &provision.Failure{Code: "fetch-stalled",
				Message: fmt.Sprintf("no byte of the image has arrived for %s: %v", w.Stall, err),
				Next:    "Check that 'platter serve' runs on the disc host and the cable is in, then start the machine again"}
		}
		if err := provision.Sleep(ctx, backOff(failures)); err != nil {
			return err
		}
		failures++
	}
	return nil
}

// backOff is the pause before try n+1: from 100 ms up to 5 s, spread so that a
// rack does not come back in step.
func backOff(n int) time.Duration {
	d := min(100*time.Millisecond<<min(n, 10), 5*time.Second)
	return d/2 + rand.N(d)
}

const (
	// idle is how long a connection may be silent before it is dropped.
	idle = 30 * time.Second
	// maxGap is read and dropped rather than asked for anew.
	maxGap = 1 << 20
)

// run serves the head of todo from one request and returns how many frames it
// handed out and whether any byte came.
func (w *writer) run(ctx context.Context, todo []job, free chan []byte, full chan<- job) (n int, moved bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	start := todo[0].At
	end := start
	for n < len(todo) && todo[n].At-end <= maxGap && todo[n].At >= end {
		end = todo[n].At + int64(todo[n].Packed)
		n++
	}
	if n == 0 {
		n, end = 1, start+int64(todo[0].Packed)
	}
	batch := todo[:n]
	watchdog := time.AfterFunc(idle, cancel)
	defer watchdog.Stop()
	body, err := w.src.Open(ctx, w.image.Pack.Hash, start, end-start)
	if err != nil {
		return 0, false, err
	}
	defer body.Close()
	r := &watched{r: body, kick: func() { watchdog.Reset(idle) }}
	pos := start
	for i, j := range batch {
		if _, err := io.CopyN(io.Discard, r, j.At-pos); err != nil {
			return i, r.moved, fmt.Errorf("read object %s at %d: %w", w.image.Pack.Hash, pos, err)
		}
		// Workers that are busy are no silence of the connection.
		watchdog.Stop()
		select {
		case <-ctx.Done():
			return i, r.moved, ctx.Err()
		case j.buf = <-free:
		}
		if j.buf == nil {
			j.buf = make([]byte, w.packed)
		}
		watchdog.Reset(idle)
		if _, err := io.ReadFull(r, j.buf[:j.Packed]); err != nil {
			free <- j.buf
			return i, r.moved, fmt.Errorf("read object %s at %d: %w", w.image.Pack.Hash, j.At, err)
		}
		pos = j.At + int64(j.Packed)
		watchdog.Stop()
		select {
		case <-ctx.Done():
			return i, r.moved, ctx.Err()
		case full <- j:
		}
		watchdog.Reset(idle)
	}
	return n, r.moved, nil
}

// watched tells a watchdog of every byte that arrives.
type watched struct {
	r     io.Reader
	kick  func()
	moved bool
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.r.Read(b)
	if n > 0 {
		w.moved = true
		w.kick()
	}
	return n, err
}

// work verifies, decompresses and writes frames until there are no more.
func (w *writer) work(ctx context.Context, full <-chan job, free chan<- []byte) error {
	dec, err := newDecoder()
	if err != nil {
		return err
	}
	defer dec.Close()
	raw := aligned(int(roundUp(int64(w.raw))))
	for j := range full {
		b, err := w.unpack(ctx, dec, j, raw)
		if err != nil {
			return err
		}
		free <- j.buf
		if err := w.put(b, j); err != nil {
			return err
		}
		w.mu.Lock()
		w.fresh[j.index] = true
		w.mu.Unlock()
		w.count(int64(j.Packed))
	}
	return nil
}

func newDecoder() (*zstd.Decoder, error) {
	// The SHA-256 of the packed bytes has been checked: a second checksum
	// proves nothing more.
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.IgnoreChecksum(true),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("set up decompression: %w", err)
	}
	return dec, nil
}

// unpack verifies a frame, once more from the source if it is damaged, and
// decompresses it into raw.
func (w *writer) unpack(ctx context.Context, dec *zstd.Decoder, j job, raw []byte) ([]byte, error) {
	packed := j.buf[:j.Packed]
	if sha256.Sum256(packed) != j.hash {
		// The wire may have flipped a bit that its checksums missed.
		if err := w.again(ctx, packed, j.At); err != nil {
			return nil, err
		}
		if sha256.Sum256(packed) != j.hash {
			return nil, &provision.Failure{Code: "chunk-corrupt",
				Message: fmt.Sprintf("object %s is damaged at byte %d: the frame of part %s at offset %d (%d bytes) is not what the signed manifest says; the disk is left unbootable",
					w.image.Pack.Hash, j.At, j.part, j.Offset, j.Packed),
				Next: "Import or build the image again on the disc host, then start the machine again"}
		}
	}
	b, err := dec.DecodeAll(packed, raw[:0])
	if err != nil || len(b) != j.Size || unsafe.SliceData(b) != unsafe.SliceData(raw) {
		return nil, &provision.Failure{Code: "image-broken",
			Message: fmt.Sprintf("the frame of part %s at offset %d of image %s does not unpack to its %d bytes (%v)", j.part, j.Offset, w.image.Name, j.Size, err),
			Next:    "Build the image again, then start the machine again"}
	}
	return b, nil
}

// again fetches the bytes of one frame on a connection of its own.
func (w *writer) again(ctx context.Context, packed []byte, at int64) error {
	ctx, cancel := context.WithTimeout(ctx, idle)
	defer cancel()
	body, err := w.src.Open(ctx, w.image.Pack.Hash, at, int64(len(packed)))
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err := io.ReadFull(body, packed); err != nil {
		return fmt.Errorf("read object %s at %d: %w", w.image.Pack.Hash, at, err)
	}
	return nil
}

// put writes one frame; its tail is filled up with zeros to a whole block.
func (w *writer) put(b []byte, j job) error {
	n := (len(b) + directAlign - 1) &^ (directAlign - 1)
	clear(b[len(b):n])
	if _, err := w.vol.WriteAt(b[:n], j.at); err != nil {
		return diskFailure("write", j.at, err)
	}
	return nil
}

func diskFailure(verb string, at int64, err error) error {
	return &provision.Failure{Code: "disk-error",
		Message: fmt.Sprintf("the disk fails to %s at byte %d: %v", verb, at, err),
		Next:    "Replace the disk, or choose another in the rack file, then start the machine again"}
}

// zeroHoles zeros what no frame covers, within every part.
func (w *writer) zeroHoles(ctx context.Context) error {
	for _, s := range w.slots {
		at := int64(0)
		for _, f := range append(slices.Clone(s.Part.Frames), provision.Frame{Offset: roundUp(s.Part.Size)}) {
			for at < f.Offset {
				if err := ctx.Err(); err != nil {
					return err
				}
				n := min(f.Offset-at, zeroStep)
				if err := w.vol.Zero(s.Start+at, n); err != nil {
					return diskFailure("zero", s.Start+at, err)
				}
				at += n
			}
			at = max(at, roundUp(f.Offset+int64(f.Size)))
		}
	}
	w.mu.Lock()
	w.holes = true
	w.mu.Unlock()
	return nil
}

func roundUp(n int64) int64 { return (n + directAlign - 1) &^ (directAlign - 1) }

// checkpoints keeps the marker near the truth until everything is written, or
// cancels the rest when the disk fails.
func (w *writer) checkpoints(written <-chan struct{}, cancel func()) {
	t := time.NewTicker(w.CheckpointEvery)
	defer t.Stop()
	for {
		select {
		case <-written:
			return
		case <-t.C:
			if err := w.checkpoint(); err != nil {
				cancel()
				return
			}
		}
	}
}

// checkpoint asks the disk to confirm what it has taken, then marks it. The
// marker itself is confirmed by the next one's flush. After a flush has failed
// nothing is marked any more: the kernel reports such an error only once.
func (w *writer) checkpoint() error {
	if w.broken != nil {
		return w.broken
	}
	w.mu.Lock()
	var taken []int
	for i := range w.fresh {
		taken = append(taken, i)
	}
	holes := w.holes
	w.mu.Unlock()
	if err := w.vol.Sync(); err != nil {
		w.broken = diskFailure("flush", 0, err)
		return w.broken
	}
	w.mu.Lock()
	for _, i := range taken {
		w.marker.set(i)
		delete(w.fresh, i)
	}
	w.marker.Zeroed = w.marker.Zeroed || holes
	w.mu.Unlock()
	// Only this goroutine changes the marker while frames are written.
	if err := writeMarker(w.vol, &w.marker); err != nil {
		w.broken = diskFailure("write", markerA, err)
		return w.broken
	}
	return nil
}

// bootCode fetches the part that Commit puts into the first sector.
func (w *writer) bootCode(ctx context.Context) ([]byte, error) {
	dec, err := newDecoder()
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	code := make([]byte, w.boot.Size)
	if len(code) > 440 {
		return nil, &provision.Failure{Code: "image-broken", Message: fmt.Sprintf("the boot code of image %s is %d bytes long: 440 fit", w.image.Name, len(code)),
			Next: "Build the image again, then start the machine again"}
	}
	for _, f := range w.boot.Frames {
		j, err := w.job(w.boot, f)
		if err != nil {
			return nil, err
		}
		j.buf = make([]byte, f.Packed)
		// A first read that fails is repaired or reported by unpack.
		if err := w.again(ctx, j.buf, f.At); err != nil {
			return nil, err
		}
		b, err := w.unpack(ctx, dec, j, make([]byte, 0, f.Size)[:f.Size])
		if err != nil {
			return nil, err
		}
		copy(code[f.Offset:], b)
	}
	return code, nil
}
