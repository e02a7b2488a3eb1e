package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"platter/provision"
)

// Verify reads every byte that name stands for, an image, boot/ARCH, or stack, and
// names the first that is wrong by object and offset. progress, which may be
// nil, is told bytes read of all.
func (s *Store) Verify(ctx context.Context, name string, progress func(done, total int64)) error {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	c, err := s.Contents(name)
	if err != nil {
		return err
	}
	if c.Image != nil {
		return s.verifyPack(ctx, c.Image, progress)
	}
	var total, done int64
	for _, o := range c.Objects {
		total += o.Size
	}
	for _, o := range c.Objects {
		if err := s.verifyObject(ctx, o.Object, o.What); err != nil {
			return err
		}
		done += o.Size
		progress(done, total)
	}
	return nil
}

func (s *Store) verifyObject(ctx context.Context, o provision.Object, what string) error {
	f, err := s.OpenObject(o.Hash)
	if err != nil {
		return fmt.Errorf("object %s, the %s, cannot be read: %w", o.Hash, what, err)
	}
	defer f.Close()
	sum := sha256.New()
	buf := make([]byte, 1<<20)
	for offset := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		sum.Write(buf[:n])
		offset += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("object %s, the %s, cannot be read at offset %d: %w", o.Hash, what, offset, err)
		}
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != o.Hash {
		return fmt.Errorf("object %s, the %s, is damaged, its content hashes to %s: copy the disc again", o.Hash, what, got)
	}
	return nil
}

// verifyPack checks every frame packed and unpacked, and that no byte of the
// pack lies outside of a frame.
func (s *Store) verifyPack(ctx context.Context, im *provision.Image, progress func(done, total int64)) error {
	f, err := s.OpenObject(im.Pack.Hash)
	if err != nil {
		return fmt.Errorf("object %s, the pack of image %s, cannot be read: %w", im.Pack.Hash, im.Name, err)
	}
	defer f.Close()
	dec, err := newDecoder()
	if err != nil {
		return err
	}
	defer dec.Close()

	end := int64(0)
	for _, part := range im.Parts {
		for _, fr := range part.Frames {
			if fr.At != end || fr.Packed <= 0 || fr.Size <= 0 || fr.Size > provision.FrameSize || fr.Offset < 0 || fr.Offset+int64(fr.Size) > part.Size {
				return fmt.Errorf("manifest of image %s is wrong at part %s offset %d, pack offset %d: build it again", im.Name, part.Name, fr.Offset, fr.At)
			}
			end += int64(fr.Packed)
		}
	}
	if end != im.Pack.Size {
		return fmt.Errorf("manifest of image %s covers %d of the %d bytes of object %s: build it again", im.Name, end, im.Pack.Size, im.Pack.Hash)
	}

	var mu sync.Mutex // progress is told in order
	var done int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, part := range im.Parts {
		for _, fr := range part.Frames {
			g.Go(func() error {
				if err := ctx.Err(); err != nil {
					return err
				}
				if _, err := readFrame(f, dec, fr); err != nil {
					return damaged(im, part, fr, err)
				}
				mu.Lock()
				defer mu.Unlock()
				done += int64(fr.Packed)
				progress(done, im.Pack.Size)
				return nil
			})
		}
	}
	return g.Wait()
}

func damaged(im *provision.Image, part provision.Part, fr provision.Frame, err error) error {
	return fmt.Errorf("object %s is damaged at offset %d (image %s, part %s at %d), copy the disc again: %w", im.Pack.Hash, fr.At, im.Name, part.Name, fr.Offset, err)
}

func newDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(4*provision.FrameSize))
}

// readFrame returns the raw bytes of a frame of the pack r, checked before and
// after they are decompressed.
func readFrame(r io.ReaderAt, dec *zstd.Decoder, fr provision.Frame) ([]byte, error) {
	packed := make([]byte, fr.Packed)
	if n, err := r.ReadAt(packed, fr.At); n < len(packed) {
		return nil, fmt.Errorf("it ends after %d of %d bytes: %w", n, len(packed), err)
	}
	if got := hexSum(packed); got != fr.Hash {
		return nil, fmt.Errorf("its bytes hash to %s instead of %s", got, fr.Hash)
	}
	raw, err := dec.DecodeAll(packed, make([]byte, 0, fr.Size))
	if err != nil {
		return nil, fmt.Errorf("it does not unpack: %w", err)
	}
	if len(raw) != fr.Size || hexSum(raw) != fr.Raw {
		return nil, errors.New("it unpacks to something else")
	}
	return raw, nil
}
