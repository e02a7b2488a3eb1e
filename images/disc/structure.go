package disc

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// The structure of an ISO, all that is not content of the set's files: loaders,
// partition tables, folders, the gaps between files. structureFile lists the
// hashes of its stretches, the file itself left out, and ends in a signature; it
// is filled in when the rest is final. Space that is left is newlines.
//
//	size BYTES
//	set ID
//	SHA256 OFFSET BYTES
//	...
//	(empty line)
//	a minisign signature of all lines above
const (
	structureFile  = "platter/structure"
	structureSize  = 256 << 10
	structurePiece = 64 << 10
)

// structureFiles are files that the ISO has beside those that the set lists.
var structureFiles = []string{structureFile, elToritoFile, catalogFile}

type stretch struct{ at, size int64 }

// gaps are the stretches of size bytes that no extent covers, in pieces.
func gaps(extents []stretch, size int64) (out []stretch) {
	slices.SortFunc(extents, func(a, b stretch) int { return int(min(max(a.at-b.at, -1), 1)) })
	at := int64(0)
	add := func(end int64) {
		for at < end {
			n := min(structurePiece, end-at)
			out = append(out, stretch{at, n})
			at += n
		}
	}
	for _, e := range extents {
		add(min(e.at, size))
		at = max(at, e.at+e.size)
	}
	add(size)
	return out
}

// structure are the lines about the ISO at i.
func (v Volume) structure(i *iso, id string, size int64) ([]byte, error) {
	var extents []stretch
	paths := []string{SetFile, signatureFile, sumsFile, listFile, structureFile}
	for _, f := range v.Files {
		paths = append(paths, f.Path)
	}
	for _, p := range paths {
		e, err := i.extent(p)
		if err != nil {
			return nil, err
		}
		extents = append(extents, e)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "size %d\nset %s\n", size, id)
	buf := make([]byte, structurePiece)
	for _, g := range gaps(extents, size) {
		if _, err := i.f.ReadAt(buf[:g.size], g.at); err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%x %d %d\n", sha256.Sum256(buf[:g.size]), g.at, g.size)
	}
	return b.Bytes(), nil
}

// extent is where a file lies in the ISO.
func (i *iso) extent(path string) (stretch, error) {
	e, ok := i.all[path]
	if !ok {
		return stretch{}, fmt.Errorf("there is no %s", path)
	}
	return e, nil
}

// coverStructure fills in structureFile of the ISO.
func (b *builder) coverStructure(file string, v Volume, manifest []byte) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	i, err := openISO(f)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	lines, err := v.structure(i, ID(manifest), st.Size())
	if err != nil {
		return err
	}
	signature, err := b.Store.Sign(lines, v.Label, b.SecretKey)
	if err != nil {
		return err
	}
	text := append(append(lines, '\n'), signature...)
	if len(text) > structureSize {
		return fmt.Errorf("its structure takes %d bytes to describe, more than %d", len(text), structureSize)
	}
	text = append(text, bytes.Repeat([]byte("\n"), structureSize-len(text))...)
	at, err := i.extent(structureFile)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(text, at.at); err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// checkStructure compares everything in the ISO f that is not in a file of its
// set. It looks for the table by its first line, not by its name, so that damaged
// folders do not hide it. found is false where there is none.
func checkStructure(f *os.File, check func(manifest, signature []byte) error) (damaged []stretch, size int64, id string, found bool) {
	head := make([]byte, sector)
	for at := int64(0); at < 64<<20; at += sector {
		if n, _ := f.ReadAt(head, at); n < len(head) {
			break
		}
		if !bytes.HasPrefix(head, []byte("size ")) {
			continue
		}
		text := make([]byte, structureSize)
		if n, _ := f.ReadAt(text, at); n < len(text) {
			continue
		}
		lines, signature, ok := bytes.Cut(text, []byte("\n\n"))
		lines = append(bytes.Clone(lines), '\n')
		rest := bytes.TrimRight(signature, "\n")
		if !ok || check(lines, append(bytes.Clone(rest), '\n')) != nil {
			continue
		}
		buf := make([]byte, structurePiece)
		for line := range strings.Lines(string(lines)) {
			var hash string
			var s stretch
			if n, _ := fmt.Sscanf(line, "size %d", &size); n == 1 {
				continue
			}
			if n, _ := fmt.Sscanf(line, "set %s", &id); n == 1 {
				continue
			}
			if n, _ := fmt.Sscanf(line, "%s %d %d", &hash, &s.at, &s.size); n != 3 || s.size < 0 || s.size > structurePiece {
				continue
			}
			if _, err := readChunk(mediumFile{ReaderAt: f, from: f}, s.at, Chunk{Size: s.size, Hash: hash}, buf); err != nil {
				damaged = append(damaged, s)
			}
		}
		return damaged, size, id, true
	}
	return nil, 0, "", false
}

// structureDamage names what checkStructure found; found is as there.
func (d *Discs) structureDamage(v *volume, f *os.File) (wrong []error, found bool) {
	damaged, size, id, found := checkStructure(f, d.check)
	if !found {
		return nil, false
	}
	for _, s := range damaged {
		wrong = append(wrong, d.damage(v, "(the disc's own structure)", s.at, Chunk{Size: s.size}, errDiffers))
	}
	if n := end(f, size); n < size {
		wrong = append(wrong, fmt.Errorf("volume %s (%s) is short by %d bytes: copy or burn it again", v.name(), v.source, size-n))
	}
	if d.ID != "" && id != d.ID {
		wrong = append(wrong, fmt.Errorf("volume %s (%s): file %s is of the set %.12s", v.name(), v.source, structureFile, id))
	}
	return wrong, true
}

// end is where f ends, or size where it goes on.
func end(f io.ReaderAt, size int64) int64 {
	var b [1]byte
	n := int64(0)
	for step := int64(1) << 50; step > 0; step >>= 1 {
		if n+step <= size {
			if k, _ := f.ReadAt(b[:], n+step-1); k == 1 {
				n += step
			}
		}
	}
	return n
}
