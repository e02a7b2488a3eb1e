package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"platter/provision"
)

// Verify reads every byte that name stands for, an image or boot/ARCH, and
// names the first that is wrong by object and offset. progress, which may be
// nil, is told bytes read of all.
func (s *Store) Verify(ctx context.Context, name string, progress func(done, total int64)) error {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	if arch, ok := strings.CutPrefix(name, "boot/"); ok {
		set, err := s.Boot(arch)
		if err != nil {
			return err
		}
		total := set.Kernel.Size + set.Initramfs.Size
		if err := s.verifyObject(ctx, set.Kernel, "kernel of "+name); err != nil {
			return err
		}
		progress(set.Kernel.Size, total)
		if err := s.verifyObject(ctx, set.Initramfs, "initramfs of "+name); err != nil {
			return err
		}
		progress(total, total)
		return nil
	}
	_, im, err := s.Image(name)
	if err != nil {
		return err
	}
	return s.verifyPack(ctx, im, progress)
}

func (s *Store) verifyObject(ctx context.Context, o provision.Object, what string) error {
	f, err := os.Open(s.objectPath(o.Hash))
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
	f, err := os.Open(s.objectPath(im.Pack.Hash))
	if err != nil {
		return fmt.Errorf("object %s, the pack of image %s, cannot be read: %w", im.Pack.Hash, im.Name, err)
	}
	defer f.Close()
	dec, err := newDecoder()
	if err != nil {
		return err
	}
	defer dec.Close()

	var done atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	end := int64(0)
	for _, part := range im.Parts {
		for _, fr := range part.Frames {
			if fr.At != end || fr.Packed <= 0 || fr.Size <= 0 || fr.Size > provision.FrameSize || fr.Offset < 0 || fr.Offset+int64(fr.Size) > part.Size {
				return fmt.Errorf("manifest of image %s is wrong at part %s offset %d, pack offset %d: build it again", im.Name, part.Name, fr.Offset, fr.At)
			}
			end += int64(fr.Packed)
			if ctx.Err() != nil {
				break
			}
			g.Go(func() error {
				if err := ctx.Err(); err != nil {
					return err
				}
				if _, err := readFrame(f, dec, fr); err != nil {
					return damaged(im, part, fr, err)
				}
				progress(done.Add(int64(fr.Packed)), im.Pack.Size)
				return nil
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if end != im.Pack.Size {
		return fmt.Errorf("manifest of image %s covers %d of the %d bytes of object %s: build it again", im.Name, end, im.Pack.Size, im.Pack.Hash)
	}
	return nil
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
