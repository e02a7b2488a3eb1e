package disc

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"platter/images"
)

// Discs are a source of an images.Store: what the volumes at hand have is served
// from where it lies. Every chunk is compared before a byte of it goes out, and
// the last ones are kept, so that many nodes that install at once do not make a
// drive go back and forth.
var _ images.Source = (*Discs)(nil)

// Refs are the names that can be had from the volumes at hand.
func (d *Discs) Refs() []string {
	blocked := d.Blocked()
	var out []string
	for _, r := range d.Set.Refs {
		if _, is := blocked[r.Name]; !is {
			out = append(out, r.Name)
		}
	}
	return out
}

// Ref is as images.Source has it. A name that needs a volume which is not at
// hand is an error that says which.
func (d *Discs) Ref(name string) (digest string, signature []byte, err error) {
	for _, r := range d.Set.Refs {
		if r.Name != name {
			continue
		}
		if needs, blocked := d.Blocked()[name]; blocked {
			if len(needs) == 0 {
				return "", nil, fmt.Errorf("%s: %s is a patch for the store %.12s and is not whole: import it with 'platter disc import'", name, d.Set, d.Set.Base)
			}
			return "", nil, fmt.Errorf("%s is on volumes of %s that are not at hand: %v", name, d.Set, needs)
		}
		return r.Digest, []byte(r.Signature), nil
	}
	return "", nil, fmt.Errorf("%s has no %s: %w", d.Set, name, fs.ErrNotExist)
}

// Open opens an object that lies on the volumes at hand.
func (d *Discs) Open(hash string) (images.File, error) {
	for i, o := range d.Set.Objects {
		if o.Hash != hash {
			continue
		}
		f := &discFile{d: d, o: &d.Set.Objects[i]}
		at := int64(0)
		for _, c := range o.Chunks {
			p, on := d.where[c.Hash]
			if !on || d.volumes[p.volume] == nil {
				return nil, fmt.Errorf("object %s is not whole on the volumes of %s at hand: %w", hash, d.Set, fs.ErrNotExist)
			}
			f.starts = append(f.starts, at)
			at += c.Size
		}
		f.SectionReader = io.NewSectionReader(f, 0, o.Size)
		return f, nil
	}
	return nil, fmt.Errorf("%s has no object %s: %w", d.Set, hash, fs.ErrNotExist)
}

// discFile is an object on discs.
type discFile struct {
	*io.SectionReader // over ReadAt below
	d                 *Discs
	o                 *Object
	starts            []int64 // of the chunks
}

func (f *discFile) ReadAt(b []byte, at int64) (n int, err error) {
	// The first chunk that ends behind at.
	k := 0
	for step := len(f.starts); step > 0; step /= 2 {
		for k+step < len(f.starts) && f.starts[k+step] <= at {
			k += step
		}
	}
	for ; n < len(b) && k < len(f.starts); k++ {
		chunk, err := f.d.chunk(f.o.Chunks[k])
		if err != nil {
			return n, err
		}
		if from := at + int64(n) - f.starts[k]; from < int64(len(chunk)) {
			n += copy(b[n:], chunk[from:])
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *discFile) Close() error               { return nil }
func (f *discFile) Stat() (fs.FileInfo, error) { return f, nil }
func (f *discFile) Name() string               { return f.o.Hash }
func (f *discFile) Size() int64                { return f.o.Object.Size }
func (f *discFile) Mode() fs.FileMode          { return 0o444 }
func (f *discFile) ModTime() time.Time         { return f.d.Set.Made }
func (f *discFile) IsDir() bool                { return false }
func (f *discFile) Sys() any                   { return nil }

// chunk returns a chunk, compared. The bytes must not be changed.
func (d *Discs) chunk(c Chunk) ([]byte, error) {
	return d.cache.get(c.Hash, func() ([]byte, error) {
		p, on := d.where[c.Hash]
		v := d.volumes[p.volume]
		if !on || v == nil {
			return nil, fmt.Errorf("chunk %s is on no volume at hand: %w", c.Hash, fs.ErrNotExist)
		}
		f, err := v.open(p.path)
		if err != nil {
			return nil, d.damage(v, p.path, p.at, c, err)
		}
		defer f.close()
		b, err := readChunk(f, p.at, c, make([]byte, c.Size))
		if err != nil {
			return nil, d.damage(v, p.path, p.at, c, err)
		}
		return b, nil
	})
}

// chunkCache keeps the chunks that were used last, and has those who want the
// same one at the same time wait for one reading of it.
type chunkCache struct {
	mu    sync.Mutex
	order []string // the oldest first
	have  map[string]*cached
}

type cached struct {
	once sync.Once
	b    []byte
	err  error
}

// cachedChunks are at most 128 MiB of frames.
const cachedChunks = 32

func (c *chunkCache) get(hash string, read func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	e := c.have[hash]
	if e == nil {
		if c.have == nil {
			c.have = map[string]*cached{}
		}
		e = &cached{}
		c.have[hash] = e
		if c.order = append(c.order, hash); len(c.order) > cachedChunks {
			delete(c.have, c.order[0])
			c.order = c.order[1:]
		}
	}
	c.mu.Unlock()
	e.once.Do(func() {
		e.err = errors.New("reading was cut short")
		e.b, e.err = read()
	})
	if e.err != nil { // the next one tries again
		c.mu.Lock()
		if c.have[hash] == e {
			delete(c.have, hash)
		}
		c.mu.Unlock()
	}
	return e.b, e.err
}
