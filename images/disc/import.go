package disc

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"platter/hostprep/versions"
	"platter/images"
)

// ImportOptions say how to bring a set into a store.
type ImportOptions struct {
	Store *images.Store
	// Older takes a set that is older than the one that the store has.
	Older bool
	// Instead gives up a set of which only some volumes have come.
	Instead bool
	// Repair compares what the store has already, and brings anew what is damaged.
	Repair bool
	// Progress is told bytes that came, of those that the volumes at hand have
	// for the store.
	Progress func(done, total int64)
	// Looked, which may be nil, is told bytes of the store that were read before
	// that: what came earlier, and what the set may have in common with it.
	Looked func(done, total int64)
}

// Imported is what a store has of a set after an import.
type Imported struct {
	// Missing are the volumes that are still needed; none: the set is complete.
	Missing []int
	// Blocked says for each name that cannot be used yet which of them it needs.
	Blocked map[string][]int
	// Read and Kept are bytes that came from the discs, and that the store had.
	Read, Kept int64
	// Hash is the store's (images.Store.Hash).
	Hash string
}

// Import brings what the volumes at hand have into a store, chunk by chunk: what
// the store has already is not read, what is damaged is read once more and then
// named, when all the rest has come. Volumes may come in any order and one at a time. Whatever ends it, the
// next import of a volume of the set goes on; a name of the store points to
// something new only once all of that is there. The discs are only read.
func Import(ctx context.Context, d *Discs, o ImportOptions) (*Imported, error) {
	im := &importer{Discs: d, ImportOptions: o}
	unlock, err := lock(o.Store)
	if err != nil {
		return nil, err
	}
	defer unlock()
	defer im.close()
	if err := im.admit(); err != nil {
		return nil, err
	}
	if err := im.prepare(ctx); err != nil {
		return nil, err
	}
	damage, err := im.copy(ctx)
	if err != nil {
		return nil, im.explain(err)
	}
	out, err := im.settle()
	return out, errors.Join(damage, err)
}

// lock keeps other imports away from the store until it is released.
func lock(s *images.Store) (release func(), err error) {
	dir, err := os.Open(s.Dir())
	if err != nil {
		return nil, fmt.Errorf("the store %s cannot be read: %w", s.Dir(), err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("another import into the store %s is running: wait for it", s.Dir())
	}
	return func() { dir.Close() }, nil
}

// setsFolder of a store holds the manifests of the sets that came into it.
const setsFolder = "sets"

// Held is a set of which a store has taken in something.
type Held struct {
	*Set
	ID string
	// Complete: all objects are there. Current: the store's names stand for them.
	Complete, Current bool
}

// Sets lists the sets that the store has taken in, wholly or not, in the order of
// their names and versions.
func Sets(s *images.Store) ([]Held, error) {
	entries, err := os.ReadDir(filepath.Join(s.Dir(), setsFolder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the sets of the store %s cannot be listed: %w", s.Dir(), err)
	}
	var out []Held
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		b, err := os.ReadFile(filepath.Join(s.Dir(), setsFolder, e.Name()))
		if err != nil {
			return nil, err
		}
		set, err := Read(b)
		if err != nil || ID(b) != id {
			return nil, fmt.Errorf("%s of the store %s is damaged: remove it and import the set again", e.Name(), s.Dir())
		}
		h := Held{Set: set, ID: id, Complete: true}
		for _, obj := range set.Objects {
			h.Complete = h.Complete && s.Has(obj.Object)
		}
		h.Current = h.Complete && !slices.ContainsFunc(set.Refs, func(r Ref) bool { return !s.PointsTo(r.Name, r.Digest) })
		out = append(out, h)
	}
	slices.SortFunc(out, func(a, b Held) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return order(a.Set, b.Set)
	})
	return out, nil
}

// order says which of two sets of one name is newer. One that was made again
// keeps its version.
func order(a, b *Set) int {
	if c := versions.Order(a.Version, b.Version); c != 0 {
		return c
	}
	return a.Made.Compare(b.Made)
}

type importer struct {
	*Discs
	ImportOptions
	held    []Held      // by the store, before
	noted   bool        // by this import, as a set that the store takes in
	objects []*arriving // those that the store lacks
	kept    int64
	total   int64 // to be read

	mu             sync.Mutex
	read           int64 // under mu, and what the objects have
	looked, toLook int64
}

// arriving is an object on its way.
type arriving struct {
	*Object
	at   []int64 // where its chunks begin
	have []bool
	file *images.Arriving
	left int
}

// admit says whether the set may come into the store.
func (im *importer) admit() error {
	var err error
	if im.held, err = Sets(im.Store); err != nil {
		return err
	}
	if at := im.at(); at != nil && order(at, im.Set) > 0 && !im.Older {
		return fmt.Errorf("the store %s has %s of %s, which is newer than %s of %s: go back to the older one with --older",
			im.Store.Dir(), at, at.Made.Format(time.DateOnly), im.Set, im.Set.Made.Format(time.DateOnly))
	}
	for _, h := range im.held {
		switch {
		case h.ID == im.ID || h.Complete:
			continue
		case !im.Instead:
			return fmt.Errorf("the store %s has taken in a part of the set %.12s (%s); volume %v is of the set %.12s (%s). Insert the other volumes of %s first, or give them up with --instead",
				im.Store.Dir(), h.ID, h.Set, im.Have(), im.ID, im.Set, h.Set)
		}
		if err := im.drop(h); err != nil {
			return err
		}
	}
	return nil
}

// at is the set that the store's names stand for. Where they were changed since
// and stand for no set as a whole, it is the newest that came.
func (im *importer) at() (newest *Set) {
	current := false
	for _, h := range im.held { // in order
		if h.Name == im.Set.Name && h.Complete && (h.Current || !current) {
			newest, current = h.Set, h.Current
		}
	}
	return newest
}

// prepare finds out what the store lacks. Where it cannot take the set it is left
// as it was.
func (im *importer) prepare(ctx context.Context) error {
	if err := im.note(); err != nil {
		return im.explain(err)
	}
	if err := im.arrive(ctx); err != nil {
		return im.refuse(err)
	}
	if err := im.survey(ctx); err != nil {
		return im.explain(err)
	}
	if err := im.based(); err != nil {
		return im.refuse(err)
	}
	if err := im.room(); err != nil {
		return im.refuse(err)
	}
	return nil
}

// note makes the set one that the store takes in, before anything of it is there:
// what is there without a note nobody would give up.
func (im *importer) note() error {
	dir := filepath.Join(im.Store.Dir(), setsFolder)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("the store %s cannot be written: %w", im.Store.Dir(), err)
	}
	im.noted = !slices.ContainsFunc(im.held, func(h Held) bool { return h.ID == im.ID })
	return errors.Join(writeFile(filepath.Join(dir, im.ID+".json.minisig"), im.signature), writeFile(filepath.Join(dir, im.ID+".json"), im.manifest))
}

// refuse takes back what this import began.
func (im *importer) refuse(why error) error {
	errs := []error{why}
	for _, a := range im.objects {
		if a.file.New {
			errs = append(errs, im.Store.Drop(a.Object.Object))
		}
	}
	if im.noted {
		errs = append(errs, unnote(im.Store, im.ID))
	}
	return errors.Join(errs...)
}

// unnote forgets that the store takes in a set.
func unnote(s *images.Store, id string) error {
	name := filepath.Join(s.Dir(), setsFolder, id+".json")
	return errors.Join(os.Remove(name), os.Remove(name+".minisig"))
}

// drop forgets a set that has not come whole.
func (im *importer) drop(h Held) error {
	for _, o := range h.Objects {
		if err := im.Store.Drop(o.Object); err != nil {
			return err
		}
	}
	return unnote(im.Store, h.ID)
}

// arrive opens the objects that the store lacks.
func (im *importer) arrive(ctx context.Context) error {
	var lacks []*Object
	for i := range im.Set.Objects {
		o := &im.Set.Objects[i]
		right, err := im.right(ctx, o)
		if err != nil {
			return err
		}
		if right {
			im.kept += o.Size
		} else {
			lacks = append(lacks, o)
		}
	}
	for _, o := range lacks {
		f, err := im.Store.Arrive(o.Object)
		if errors.Is(err, unix.ENOSPC) {
			return im.crowded(lacks, err)
		}
		if err != nil {
			return err
		}
		a := &arriving{Object: o, file: f, have: make([]bool, len(o.Chunks)), left: len(o.Chunks)}
		at := int64(0)
		for _, c := range o.Chunks {
			a.at = append(a.at, at)
			at += c.Size
		}
		im.objects = append(im.objects, a)
	}
	return nil
}

// crowded is the error where the disk gives objects all of their bytes at once and
// is full then.
func (im *importer) crowded(lacks []*Object, err error) error {
	var need int64
	for _, o := range lacks {
		need += o.Object.Size
	}
	return fmt.Errorf("the disk of the store %s is full before the %.1f MB of objects that the store lacks have their places: make room, or name a store on another disk: %w",
		im.Store.Dir(), float64(need)/1e6, err)
}

// survey finds out which chunks the store lacks. Those that it has in other
// objects are copied.
func (im *importer) survey(ctx context.Context) error {
	// What came before is asked, not remembered.
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	var begun []*arriving
	for _, a := range im.objects {
		if a.begun() {
			begun = append(begun, a)
			im.toLook += a.Object.Size
		}
	}
	for _, a := range begun {
		g.Go(func() error { return im.ask(gctx, a) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	missing := map[string][]spot{}
	for _, a := range im.objects {
		for k, c := range a.Chunks {
			if a.have[k] {
				im.kept += c.Size
			} else {
				missing[c.Hash] = append(missing[c.Hash], spot{a, k})
			}
		}
	}
	return im.fromStore(ctx, missing)
}

// ask finds out which chunks of an object are there.
func (im *importer) ask(ctx context.Context, a *arriving) error {
	buf := make([]byte, maxChunk)
	for k, c := range a.Chunks {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b := buf[:c.Size]
		if n, _ := a.file.ReadAt(b, a.at[k]); int64(n) == c.Size && hashIs(b, c.Hash) {
			a.have[k] = true
			a.left--
		}
		im.look(c.Size)
	}
	return nil
}

// look tells how much of the store was read.
func (im *importer) look(n int64) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.looked += n
	if im.Looked != nil {
		im.Looked(im.looked, im.toLook)
	}
}

// right tells whether the store has an object, and, with Repair, whether that is
// what it should be.
func (im *importer) right(ctx context.Context, o *Object) (bool, error) {
	if !im.Store.Has(o.Object) || !im.Repair {
		return im.Store.Has(o.Object), nil
	}
	f, err := im.Store.OpenObject(o.Hash)
	if err != nil {
		return false, err
	}
	defer f.Close()
	buf := make([]byte, maxChunk)
	im.toLook += o.Object.Size
	for _, c := range o.Chunks {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		im.look(c.Size)
		if _, err := io.ReadFull(f, buf[:c.Size]); err != nil || !hashIs(buf[:c.Size], c.Hash) {
			return false, nil
		}
	}
	return true, nil
}

// based refuses a patch for another store than this one.
func (im *importer) based() error {
	var lost []string
	for _, a := range im.objects {
		for k, c := range a.Chunks {
			if _, on := im.where[c.Hash]; !on && !a.have[k] {
				lost = append(lost, a.Hash)
				break
			}
		}
	}
	if len(lost) == 0 {
		return nil
	}
	return fmt.Errorf("%s is a patch for the store %.12s, and the store %s lacks what %d of its objects build on: import the whole set, or ask for a patch with this store's inventory ('platter disc inventory')",
		im.Set, im.Set.Base, im.Store.Dir(), len(lost))
}

// begun tells whether anything was written to the object's file before.
func (a *arriving) begun() bool {
	n, err := a.file.Allocated()
	return err == nil && n > 0 && !a.file.New
}

type spot struct {
	*arriving
	k int
}

// fromStore copies what is missing from other objects of the store, until nothing
// is.
func (im *importer) fromStore(ctx context.Context, missing map[string][]spot) error {
	found := func(c Chunk, b []byte) error {
		spots := missing[c.Hash]
		delete(missing, c.Hash)
		if err := put(spots, b); err != nil {
			return err
		}
		done(spots)
		im.kept += c.Size * int64(len(spots))
		return nil
	}
	listed, err := im.fromListed(ctx, missing, found)
	if err != nil || len(missing) == 0 {
		return err
	}
	others, err := im.unlisted(listed)
	if err != nil {
		return err
	}
	for _, o := range others {
		im.toLook += o.Size
	}
	for _, o := range others {
		err := objectChunks(ctx, im.Store, o, func(c Chunk, b []byte) error {
			im.look(c.Size)
			if err := found(c, b); err != nil {
				return err
			}
			if len(missing) == 0 {
				return errEnough
			}
			return nil
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOSPC):
			return err
		case errors.Is(err, errEnough):
			return nil
		} // one that is damaged is not needed: the disc may have it
	}
	return nil
}

// errEnough ends the reading of an object early.
var errEnough = errors.New("nothing is missing any more")

// fromListed looks where the sets that came into the store say that a missing chunk
// is. It returns the objects of which they say what is in them.
func (im *importer) fromListed(ctx context.Context, missing map[string][]spot, found func(Chunk, []byte) error) (listed map[string]bool, err error) {
	listed = map[string]bool{}
	for _, h := range append(im.held, Held{Set: im.Set}) {
		for i := range h.Objects {
			o := &h.Objects[i]
			if listed[o.Hash] || !im.Store.Has(o.Object) {
				continue
			}
			listed[o.Hash] = true
			if err := im.fromObject(ctx, o, missing, found); err != nil {
				return nil, err
			}
		}
	}
	return listed, nil
}

// fromObject reads the chunks of an object that are missing elsewhere.
func (im *importer) fromObject(ctx context.Context, o *Object, missing map[string][]spot, found func(Chunk, []byte) error) error {
	var f images.File
	buf := make([]byte, maxChunk)
	at := int64(0)
	for _, c := range o.Chunks {
		start := at
		at += c.Size
		if len(missing[c.Hash]) == 0 {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if f == nil {
			var err error
			if f, err = im.Store.OpenObject(o.Hash); err != nil {
				return nil // the disc may have it
			}
			defer f.Close()
		}
		if n, _ := f.ReadAt(buf[:c.Size], start); int64(n) < c.Size || !hashIs(buf[:c.Size], c.Hash) {
			continue
		}
		if err := found(c, buf[:c.Size]); err != nil {
			return err
		}
	}
	return nil
}

// unlisted are the objects of the store that came with no set. Only cutting them
// tells what is in them.
func (im *importer) unlisted(listed map[string]bool) (out []images.Content, err error) {
	names, err := im.Store.Refs()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		contents, err := im.Store.Contents(name)
		if err != nil {
			continue // one that is damaged is not needed: the disc may have it
		}
		for _, o := range contents.Objects {
			if !listed[o.Hash] && im.Store.Has(o.Object) {
				listed[o.Hash] = true
				out = append(out, o)
			}
		}
	}
	return out, nil
}

// put writes a chunk to its places.
func put(spots []spot, b []byte) error {
	for _, s := range spots {
		if _, err := s.file.WriteAt(b, s.at[s.k]); err != nil {
			return fmt.Errorf("object %s cannot be written: %w", s.Hash, err)
		}
	}
	return nil
}

// done notes that they have it.
func done(spots []spot) {
	for _, s := range spots {
		s.have[s.k] = true
		s.left--
	}
}

// task is a chunk on a volume at hand and all its places in the store.
type task struct {
	Chunk
	place
	spots []spot
}

// tasks are the chunks to be read, in the order in which they lie.
func (im *importer) tasks() (out []*task, total int64) {
	byHash := map[string]*task{}
	for _, a := range im.objects {
		for k, c := range a.Chunks {
			p, on := im.where[c.Hash]
			if a.have[k] || !on || im.volumes[p.volume] == nil {
				continue
			}
			t := byHash[c.Hash]
			if t == nil {
				t = &task{Chunk: c, place: p}
				byHash[c.Hash] = t
				out = append(out, t)
				total += c.Size
			}
			t.spots = append(t.spots, spot{a, k})
		}
	}
	order := map[string]int{}
	for i, v := range im.Set.Volumes {
		for k, f := range v.Files {
			order[fmt.Sprint(i+1, " ", f.Path)] = k
		}
	}
	slices.SortFunc(out, func(a, b *task) int {
		if a.volume != b.volume {
			return a.volume - b.volume
		}
		if a.path != b.path {
			return order[fmt.Sprint(a.volume, " ", a.path)] - order[fmt.Sprint(b.volume, " ", b.path)]
		}
		return int(min(max(a.place.at-b.place.at, -1), 1))
	})
	return out, total
}

// room says before anything is copied when the disk cannot take it.
func (im *importer) room() error {
	var st unix.Statfs_t
	if err := unix.Statfs(im.Store.Dir(), &st); err != nil {
		return fmt.Errorf("the store %s: %w", im.Store.Dir(), err)
	}
	tasks, _ := im.tasks()
	missing := map[*arriving]int64{}
	for _, t := range tasks {
		for _, s := range t.spots {
			missing[s.arriving] += t.Chunk.Size
		}
	}
	var need int64
	for a, n := range missing {
		allocated, err := a.file.Allocated()
		if err != nil {
			return err
		}
		need += takes(n, a.Object.Size, allocated)
	}
	if have := int64(st.Bavail) * st.Bsize; have < need {
		return fmt.Errorf("the disk of the store %s has %.1f MB free and the volumes at hand bring %.1f MB: make room, or name a store on another disk", im.Store.Dir(), float64(have)/1e6, float64(need)/1e6)
	}
	return nil
}

// takes is how many bytes of the disk an object will still take when missing ones of
// its size come, where the disk has given it some already.
func takes(missing, size, allocated int64) int64 {
	return min(missing, max(size-allocated, 0))
}

// copy reads in the order in which chunks lie, by one reader, and has several
// compare and write them. Damaged chunks are left out and returned, and what comes
// after a volume was taken out.
func (im *importer) copy(ctx context.Context) (damage, err error) {
	var tasks []*task
	tasks, im.total = im.tasks()
	workers := runtime.GOMAXPROCS(0)
	type load struct {
		*task
		b   []byte
		f   mediumFile
		err error // of reading
	}
	free := make(chan []byte, workers+3)
	for range cap(free) {
		free <- make([]byte, maxChunk)
	}
	files := map[string]mediumFile{}
	defer func() {
		for _, f := range files {
			f.close()
		}
	}()
	full := make(chan load, 2)
	var wrong faults
	drives := map[int]*drive{}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(full)
		for _, t := range tasks {
			dr := drives[t.volume]
			if dr == nil {
				dr = &drive{}
				drives[t.volume] = dr
			}
			if dr.isGone() {
				continue
			}
			var buf []byte
			select {
			case <-gctx.Done():
				return gctx.Err()
			case buf = <-free:
			}
			l := load{task: t, b: buf[:t.Chunk.Size]}
			key := fmt.Sprint(t.volume, " ", t.path)
			f, open := files[key]
			if !open {
				if f, l.err = im.volumes[t.volume].open(t.path); l.err == nil {
					files[key] = f
				}
			}
			if l.f = f; l.err == nil {
				var n int
				if n, l.err = f.ReadAt(l.b, t.place.at); n == len(l.b) {
					l.err = nil
				}
			}
			if dr.lost(l.err) {
				wrong.add(im.takenOut(im.volumes[t.volume], t.path, t.place.at, l.err))
				free <- buf
				continue
			}
			select {
			case <-gctx.Done():
				return gctx.Err()
			case full <- l:
			}
		}
		return nil
	})
	for range workers {
		g.Go(func() error {
			for l := range full {
				if l.err != nil || !hashIs(l.b, l.Hash) {
					if l.f.ReaderAt != nil { // this chunk alone, once more
						_, l.err = readChunk(l.f, l.place.at, l.Chunk, l.b)
					}
				}
				if l.err != nil {
					wrong.add(im.damage(im.volumes[l.volume], l.path, l.place.at, l.Chunk, l.err))
				} else if err := im.take(l.task, l.b); err != nil {
					return err
				}
				free <- l.b[:cap(l.b)]
			}
			return nil
		})
	}
	err = g.Wait()
	return wrong.err(), err
}

// take writes a chunk to all its places.
func (im *importer) take(t *task, b []byte) error {
	if err := put(t.spots, b); err != nil {
		return err
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	done(t.spots)
	im.read += t.Chunk.Size
	im.Progress(im.read, im.total)
	return nil
}

func (im *importer) explain(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("the disk of the store %s is full, what came is kept: make room and run the import again, it goes on: %w", im.Store.Dir(), err)
	}
	return err
}

// settle makes objects of what is whole, and names of what these stand for.
func (im *importer) settle() (*Imported, error) {
	for _, a := range im.objects {
		if a.left > 0 {
			continue
		}
		if err := a.file.Commit(); err != nil {
			return nil, im.explain(err)
		}
		a.file = nil
	}
	out := &Imported{Read: im.read, Kept: im.kept}
	chunks := map[string]bool{} // that the store lacks
	for _, a := range im.objects {
		for k, c := range a.Chunks {
			if !a.have[k] {
				chunks[c.Hash] = true
			}
		}
	}
	out.Blocked = im.Set.blocked(func(c Chunk) (int, bool) { return im.where[c.Hash].volume, !chunks[c.Hash] })
	for _, r := range im.Set.Refs {
		needs, blocked := out.Blocked[r.Name]
		for _, n := range needs {
			if !slices.Contains(out.Missing, n) {
				out.Missing = append(out.Missing, n)
			}
		}
		if blocked {
			continue
		}
		if err := im.Store.SetRef(r.Name, r.Digest, []byte(r.Signature)); err != nil {
			return nil, err
		}
	}
	slices.Sort(out.Missing)
	hash, err := im.Store.Hash()
	out.Hash = hash
	return out, err
}

func (im *importer) close() {
	for _, a := range im.objects {
		if a.file != nil {
			a.file.Close()
		}
	}
}

func hashIs(b []byte, want string) bool {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]) == want
}

// writeFile replaces path in one step that survives power loss.
func writeFile(path string, b []byte) error {
	return renameio.WriteFile(path, b, 0o644)
}
