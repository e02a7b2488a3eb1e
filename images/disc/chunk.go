package disc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/restic/chunker"

	"platter/images"
)

// How content is cut. Each of these decides which chunks two sets have in
// common: other values make every patch as large as its set.
const (
	polynomial = chunker.Pol(0x28f202e1803fdb) // irreducible over GF(2), of degree 53
	minCut     = 128 << 10
	averageCut = 19 // bits: 512 KiB
	maxCut     = 2 << 20
)

// chunks cuts r where its content says so, and hands out each chunk with its
// bytes, which are valid until the next one.
func chunks(ctx context.Context, r io.Reader, each func(c Chunk, b []byte) error) error {
	cut := chunker.NewWithBoundaries(r, polynomial, minCut, maxCut)
	cut.SetAverageBits(averageCut)
	buf := make([]byte, maxCut)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		c, err := cut.Next(buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := each(Chunk{int64(c.Length), ID(c.Data)}, c.Data); err != nil {
			return err
		}
	}
}

// objectChunks cuts an object of a store and hands out each chunk with its bytes.
// It fails where they are not what the object's name says.
func objectChunks(ctx context.Context, s *images.Store, o images.Content, each func(c Chunk, b []byte) error) error {
	f, err := s.OpenObject(o.Hash)
	if err != nil {
		return fmt.Errorf("object %s, the %s, cannot be read: %w", o.Hash, o.What, err)
	}
	defer f.Close()
	sum := sha256.New()
	r := io.TeeReader(f, sum)
	if len(o.Frames) > 0 {
		err = frameChunks(ctx, r, o, each)
	} else {
		err = chunks(ctx, r, each)
	}
	if err != nil {
		return fmt.Errorf("object %s, the %s: %w", o.Hash, o.What, err)
	}
	return checkSum(sum, o)
}

func checkSum(sum hash.Hash, o images.Content) error {
	if got := hex.EncodeToString(sum.Sum(nil)); got != o.Hash {
		return fmt.Errorf("object %s, the %s, is damaged, its content hashes to %s: build it again, or copy the disc again", o.Hash, o.What, got)
	}
	return nil
}

func frameChunks(ctx context.Context, r io.Reader, o images.Content, each func(c Chunk, b []byte) error) error {
	buf := make([]byte, maxChunk)
	at := int64(0)
	for _, f := range o.Frames {
		if err := ctx.Err(); err != nil {
			return err
		}
		if f.At != at || f.Packed <= 0 || f.Packed > maxChunk {
			return fmt.Errorf("its frames do not follow each other at %d: build the image again", at)
		}
		b := buf[:f.Packed]
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		if err := each(Chunk{int64(f.Packed), ID(b)}, b); err != nil {
			return err
		}
		at += int64(f.Packed)
	}
	if at != o.Size {
		return fmt.Errorf("its frames cover %d of %d bytes: build the image again", at, o.Size)
	}
	return nil
}
