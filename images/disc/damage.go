package disc

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Damage is a stretch of a volume that is not what the set's manifest says.
type Damage struct {
	Set    string // for people
	Volume int
	Source string // what was opened
	File   string
	At     int64 // where the damaged chunk begins in the file
	Size   int64 // of the chunk
	Err    error // why it could not be read; nil: it was read and is different
}

func (d *Damage) Error() string {
	what := "is not what the set's manifest says"
	if d.Err != nil {
		what = fmt.Sprintf("cannot be read (%v)", d.Err)
	}
	return fmt.Sprintf("volume %d of %s (%s): file %s: the %d bytes at offset %d: %s. Clean the disc and try again, or get this volume anew; the others are not concerned",
		d.Volume, d.Set, d.Source, d.File, d.Size, d.At, what)
}

func (d *Damage) Unwrap() error { return d.Err }

func (d *Discs) damage(v *volume, path string, at int64, c Chunk, err error) error {
	if errors.Is(err, errDiffers) {
		err = nil
	}
	set := "a set"
	if d.Set != nil {
		set = d.Set.String()
	}
	return &Damage{Set: set, Volume: v.number, Source: v.source, File: path, At: at, Size: c.Size, Err: err}
}

// drive tells whether the volume that is read is still there.
type drive struct {
	mu     sync.Mutex
	failed int // reads in a row
	gone   bool
}

// maxFailed are so many reads in a row that they are no scratch.
const maxFailed = 16

// lost takes in what came of a read, and tells once when the volume is gone.
func (d *drive) lost(err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failed++; err == nil || errors.Is(err, errDiffers) {
		d.failed = 0
	}
	before := d.gone
	d.gone = d.gone || d.failed >= maxFailed || errors.Is(err, unix.ENOMEDIUM) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
	return d.gone && !before
}

func (d *drive) isGone() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.gone
}

func (d *Discs) takenOut(v *volume, path string, at int64, err error) error {
	return fmt.Errorf("volume %d of %s (%s) was taken out, or cannot be read from file %s, offset %d on: insert it and run this again, it goes on: %w", v.number, d.Set, v.source, path, at, err)
}

// faults are what is wrong with volumes, found by several at once.
type faults struct {
	mu     sync.Mutex
	damage []*Damage
	others []error
}

func (f *faults) add(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d, ok := err.(*Damage); ok {
		f.damage = append(f.damage, d)
		return
	}
	f.others = append(f.others, err)
}

// maxFaults are the places that are named one by one.
const maxFaults = 50

// err names what is wrong in the order in which it lies. Damage side by side is
// one; of very many places the first are named.
func (f *faults) err() error {
	slices.SortFunc(f.damage, func(a, b *Damage) int {
		return cmp.Or(a.Volume-b.Volume, cmp.Compare(a.File, b.File), cmp.Compare(a.At, b.At))
	})
	var places []*Damage
	for _, d := range f.damage {
		if n := len(places); n > 0 && places[n-1].join(d) {
			continue
		}
		one := *d
		places = append(places, &one)
	}
	errs := slices.Clone(f.others)
	for i, d := range places {
		if i == maxFaults {
			errs = append(errs, fmt.Errorf("and %d places more", len(places)-i))
			break
		}
		errs = append(errs, d)
	}
	return errors.Join(errs...)
}

// join takes in damage that follows without a gap and is of the same kind.
func (d *Damage) join(next *Damage) bool {
	same := d.Source == next.Source && d.File == next.File && d.At+d.Size == next.At && fmt.Sprint(d.Err) == fmt.Sprint(next.Err)
	if same {
		d.Size += next.Size
	}
	return same
}
