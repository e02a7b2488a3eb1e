package disc

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"platter/images"
)

// Discs are those volumes of one set that are at hand.
type Discs struct {
	Set                 *Set
	ID                  string // of the set
	manifest, signature []byte
	where               map[string]place
	volumes             map[int]*volume
	check               func(manifest, signature []byte) error
	cache               chunkCache
}

// volume is one that is at hand.
type volume struct {
	medium
	number int
	source string
}

// Open opens volumes of one set: folders that they are mounted on, ISO files or
// drives. check says whose signatures count, such as images.Store.CheckSignature.
// Every file is there in full length when it succeeds; what is in them is
// checked as it is read. The error names everything that is wrong with any of
// them.
func Open(check func(manifest, signature []byte) error, paths ...string) (d *Discs, err error) {
	if len(paths) == 0 {
		return nil, errors.New("name at least one volume: a folder it is mounted on, an ISO file, or a drive")
	}
	d = &Discs{volumes: map[int]*volume{}, check: check}
	defer func() {
		if err != nil {
			d.Close()
			d = nil
		}
	}()
	var wrong []error
	for _, p := range paths {
		if err := d.add(p); err != nil {
			wrong = append(wrong, err)
		}
	}
	return d, errors.Join(wrong...)
}

// add opens one more volume.
func (d *Discs) add(path string) error {
	m, err := openMedium(path, d.check)
	if err != nil {
		return err
	}
	v := &volume{medium: m, source: path}
	if err := d.take(v); err != nil {
		if f := m.device(); f != nil {
			// Folders may be what is damaged: say where.
			found, _ := d.structureDamage(v, f)
			err = errors.Join(append([]error{err}, found...)...)
		}
		m.Close()
		return err
	}
	d.volumes[v.number] = v
	return nil
}

func (d *Discs) take(v *volume) error {
	manifest, err := readAll(v, SetFile, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is no volume of a set: it has no %s", v.source, SetFile)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: clean the disc and try again", v.source, err)
	}
	signature, err := readAll(v, signatureFile, 1<<16)
	if err != nil {
		return fmt.Errorf("%s: %w: clean the disc and try again", v.source, err)
	}
	v.number = v.find()
	if err := d.check(manifest, signature); err != nil {
		return errors.Join(fmt.Errorf("%s: %s of volume %s is refused: %w", v.source, SetFile, v.name(), err), v.locate(manifest, signature))
	}
	if !images.PlainSignature(signature) {
		return errors.Join(fmt.Errorf("%s: %s of volume %s is damaged, though it still fits: get this volume anew", v.source, signatureFile, v.name()), v.locate(manifest, signature))
	}
	id := ID(manifest)
	if d.Set == nil {
		if d.Set, err = Read(manifest); err != nil {
			return fmt.Errorf("%s: %w", v.source, err)
		}
		d.ID, d.manifest, d.signature, d.where = id, manifest, signature, d.Set.places()
	}
	if id != d.ID {
		other := "of another set"
		if s, err := Read(manifest); err == nil {
			other = s.String()
		}
		return fmt.Errorf("%s is volume %s of the set %.12s (%s) and does not belong to the set %.12s (%s)", v.source, v.name(), id, other, d.ID, d.Set)
	}
	if v.number < 1 || v.number > len(d.Set.Volumes) {
		return fmt.Errorf("%s says that it is volume %d of %s, which has %d", v.source, v.number, d.Set, len(d.Set.Volumes))
	}
	if have, twice := d.volumes[v.number]; twice {
		return fmt.Errorf("%s and %s are both volume %d", have.source, v.source, v.number)
	}
	return d.lengths(v)
}

// find tells which volume this is by the name of one of its files; 0 where
// there is none.
func (v *volume) find() int {
	files, _ := v.files()
	for _, f := range files {
		if n, ok := strings.CutPrefix(f, volumePrefix); ok {
			if n, err := strconv.Atoi(n); err == nil {
				return n
			}
		}
	}
	return 0
}

func (v *volume) name() string {
	if v.number == 0 {
		return "?"
	}
	return strconv.Itoa(v.number)
}

// locate finds the piece of a manifest or signature that is damaged, by the
// hashes beside them. They prove nothing, but they help.
func (v *volume) locate(manifest, signature []byte) error {
	is, err := readAll(v, sumsFile, maxManifest)
	if err != nil {
		return nil
	}
	have := strings.Split(string(is), "\n")
	var found []error
	for line := range strings.Lines(string(sums(manifest, signature))) {
		line = strings.TrimSuffix(line, "\n")
		f := strings.Fields(line)
		if !slices.Contains(have, line) && slices.ContainsFunc(have, func(l string) bool { return strings.HasSuffix(l, " "+f[1]+" "+f[2]) }) {
			found = append(found, fmt.Errorf("volume %s (%s): file %s: damaged within %d bytes at offset %s", v.name(), v.source, f[2], sumsPiece, f[1]))
		}
	}
	return errors.Join(found...)
}

// lengths checks that every file of the volume is there in full length.
func (d *Discs) lengths(v *volume) error {
	var wrong []error
	short, missing := int64(0), 0
	for _, f := range d.Set.Volumes[v.number-1].Files {
		m, err := v.open(f.Path)
		if errors.Is(err, fs.ErrNotExist) {
			wrong = append(wrong, fmt.Errorf("file %s is missing, %d bytes", f.Path, f.Size))
			short += f.Size
			missing++
			continue
		}
		if err != nil {
			wrong = append(wrong, fmt.Errorf("file %s cannot be read: %w", f.Path, err))
			continue
		}
		m.close()
		if m.size != f.Size {
			wrong = append(wrong, fmt.Errorf("file %s has %d bytes instead of %d, short by %d bytes", f.Path, m.size, f.Size, f.Size-m.size))
			short += f.Size - m.size
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	if len(wrong) > 8 {
		wrong = append(wrong[:8], fmt.Errorf("and %d more", len(wrong)-8))
	}
	return fmt.Errorf("volume %d of %s (%s) is short by %d bytes: copy or burn it again:\n%w", v.number, d.Set, v.source, short, errors.Join(wrong...))
}

// Close closes all volumes.
func (d *Discs) Close() error {
	var errs []error
	for _, v := range d.volumes {
		errs = append(errs, v.Close())
	}
	return errors.Join(errs...)
}

// Have are the numbers of the volumes at hand, sorted.
func (d *Discs) Have() (numbers []int) {
	for n := range d.volumes {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	return numbers
}

// Missing are the numbers of those that are not.
func (d *Discs) Missing() (numbers []int) {
	for n := range d.Set.Volumes {
		if d.volumes[n+1] == nil {
			numbers = append(numbers, n+1)
		}
	}
	return numbers
}

// Blocked says for every name that cannot be had from the volumes at hand which
// others it needs; none where a patch's base is needed.
func (d *Discs) Blocked() map[string][]int {
	return d.Set.blocked(func(c Chunk) (int, bool) {
		p, on := d.where[c.Hash]
		return p.volume, on && d.volumes[p.volume] != nil
	})
}

// blocked asks of every chunk where it is and whether it is at hand.
func (s *Set) blocked(at func(Chunk) (volume int, have bool)) map[string][]int {
	out := map[string][]int{}
	for _, r := range s.Refs {
		for _, i := range r.Objects {
			for _, c := range s.Objects[i].Chunks {
				n, have := at(c)
				if have {
					continue
				}
				if _, noted := out[r.Name]; !noted {
					out[r.Name] = []int{}
				}
				if n > 0 && !slices.Contains(out[r.Name], n) {
					out[r.Name] = append(out[r.Name], n)
				}
			}
		}
		slices.Sort(out[r.Name])
	}
	return out
}

// ReadFile returns a file of volume 1, after every byte has been compared.
func (d *Discs) ReadFile(path string) ([]byte, error) {
	v := d.volumes[1]
	if v == nil {
		return nil, fmt.Errorf("%s is on volume 1 of %s, which is not at hand: %w", path, d.Set, fs.ErrNotExist)
	}
	f, ok := d.Set.Volumes[0].File(path)
	if !ok {
		return nil, fmt.Errorf("volume 1 of %s has no file %s: %w", d.Set, path, fs.ErrNotExist)
	}
	m, err := v.open(path)
	if err != nil {
		return nil, err
	}
	defer m.close()
	var b bytes.Buffer
	buf := make([]byte, maxChunk)
	at := int64(0)
	for _, c := range f.Chunks {
		chunk, err := readChunk(m, at, c, buf)
		if err != nil {
			return nil, d.damage(v, path, at, c, err)
		}
		b.Write(chunk)
		at += c.Size
	}
	return b.Bytes(), nil
}

// Extract writes the files of volume 1 that are in folder to dir, after every
// byte has been compared.
func (d *Discs) Extract(folder, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, f := range d.Set.Volumes[0].Files {
		if path.Dir(f.Path) != folder {
			continue
		}
		b, err := d.ReadFile(f.Path)
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, path.Base(f.Path)), b); err != nil {
			return fmt.Errorf("%s of the disc cannot be copied to %s: %w", f.Path, dir, err)
		}
	}
	return nil
}
