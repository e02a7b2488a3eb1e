package disc

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/images"
)

// smallDisk is a site's store on a disk of its own.
func smallDisk(t *testing.T, s *shop, size string) *images.Store {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("a small disk cannot be made, this test needs root: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	st := must[*images.Store](t)(images.Open(filepath.Join(dir, "store")))
	if err := st.Trust(s.key + ".pub"); err != nil {
		t.Fatal(err)
	}
	return st
}

func parts(t *testing.T, st *images.Store) []string {
	t.Helper()
	return must[[]string](t)(filepath.Glob(filepath.Join(st.Dir(), "objects", ".part-*")))
}

// A file system without holes gives an object all its bytes at once: they are not
// asked for again.
func TestImportWithoutHoles(t *testing.T) {
	s, _, set := shared(t)
	st := smallDisk(t, s, "32m")
	for _, o := range set.Set.Objects {
		a := must[*images.Arriving](t)(st.Arrive(o.Object))
		if err := unix.Fallocate(int(a.Fd()), 0, 0, o.Object.Size); err != nil {
			t.Fatal(err)
		}
		a.Close()
	}
	var fsys unix.Statfs_t
	if err := unix.Statfs(st.Dir(), &fsys); err != nil {
		t.Fatal(err)
	}
	if free := int64(fsys.Bavail) * fsys.Bsize; free > 16<<20 {
		t.Fatalf("%d bytes are free, more than what is missing", free)
	}
	must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...)))
	whole(t, st)
	for _, r := range []struct{ missing, size, allocated, want int64 }{
		{5, 10, 0, 5}, {5, 10, 7, 3}, {5, 10, 10, 0}, {5, 10, 12, 0}, {0, 10, 0, 0},
	} {
		if got := takes(r.missing, r.size, r.allocated); got != r.want {
			t.Errorf("%+v: %d", r, got)
		}
	}
}

// A set that is refused for want of room leaves no trace, so that another one can
// come.
func TestRefusedLeavesNoTrace(t *testing.T) {
	s, _, set := shared(t)
	st := smallDisk(t, s, "6m")
	if _, err := bring(t.Context(), st, s.open(st, set.Volumes...)); err == nil || !strings.Contains(err.Error(), "MB free") {
		t.Fatalf("got %v", err)
	}
	if held := must[[]Held](t)(Sets(st)); len(held) > 0 || len(parts(t, st)) > 0 {
		t.Errorf("left are %v and %v", held, parts(t, st))
	}
}

// What is there of a set is always noted, so that it can be given up.
func TestNotedFirst(t *testing.T) {
	s, _, set := shared(t)
	st := s.site()
	_, err := bring(t.Context(), st, s.open(st, set.Volumes...), func(o *ImportOptions) {
		o.Progress = func(int64, int64) {
			if held := must[[]Held](t)(Sets(st)); len(held) != 1 || held[0].Complete {
				t.Errorf("while it is copied: %v", held)
			}
		}
	})
	if err != nil {
		t.Error(err)
	}
	// A patch for another store comes to nothing.
	p := product(t)
	o := p.options("1.1", 1<<30)
	o.Have = must[*Inventory](t)(TakeInventory(t.Context(), p.store))
	p.image(1, 2, 3, 105)
	patch := must[*Built](t)(Build(t.Context(), o))
	other := p.site()
	if _, err := bring(t.Context(), other, p.open(other, patch.Volumes...)); err == nil || !strings.Contains(err.Error(), "is a patch") {
		t.Errorf("got %v", err)
	}
	if held := must[[]Held](t)(Sets(other)); len(held) > 0 || len(parts(t, other)) > 0 {
		t.Errorf("left are %v and %v", held, parts(t, other))
	}
}

// Which set a store has is what its names stand for.
func TestCurrentSet(t *testing.T) {
	s := product(t)
	st := s.site()
	sets := map[string]*Built{}
	for i, v := range []string{"1.0", "1.5", "2.0"} {
		s.release(v, uint64(i+1))
		sets[v] = s.build(v, 1<<30)
	}
	older := func(o *ImportOptions) { o.Older = true }
	take := func(v string, with ...func(*ImportOptions)) error {
		_, err := bring(t.Context(), st, s.open(st, sets[v].Volumes...), with...)
		return err
	}
	current := func() (out string) {
		for _, h := range must[[]Held](t)(Sets(st)) {
			if !h.Complete {
				t.Errorf("%s is not complete", h.Set)
			}
			if h.Current {
				out += h.Version + " "
			}
		}
		return out
	}
	if err := errors.Join(take("1.0"), take("2.0")); err != nil || current() != "2.0 " {
		t.Fatalf("%s, %v", current(), err)
	}
	if err := take("1.5"); err == nil || !strings.Contains(err.Error(), "newer than platter 1.5") {
		t.Errorf("got %v", err)
	}
	if err := take("1.0", older); err != nil || current() != "1.0 " {
		t.Errorf("%s, %v", current(), err)
	}
	if err := errors.Join(take("1.0"), take("1.5")); err != nil || current() != "1.5 " {
		t.Errorf("%s, %v", current(), err)
	}
	// A power cut came between the last object and the names.
	if err := take("2.0"); err != nil {
		t.Fatal(err)
	}
	for _, r := range sets["1.5"].Set.Refs {
		if err := st.SetRef(r.Name, r.Digest, []byte(r.Signature)); err != nil {
			t.Fatal(err)
		}
	}
	if current() != "1.5 " {
		t.Errorf("after a cut: %s", current())
	}
	if err := take("2.0"); err != nil || current() != "2.0 " {
		t.Errorf("%s, %v", current(), err)
	}
	// The same version, made on another day.
	o := s.options("2.0", 1<<30)
	o.Spec.Date = o.Spec.Date.Add(-24 * time.Hour)
	o.Spec.Languages = []string{"zh"}
	sets["2.0 of the day before"] = must[*Built](t)(Build(t.Context(), o))
	if err := take("2.0 of the day before"); err == nil || !strings.Contains(err.Error(), "platter 2.0 of 2026-11-22, which is newer than platter 2.0 of 2026-11-21") {
		t.Errorf("got %v", err)
	}
}

// A volume that is taken out ends the import at once, with one line, and it goes on
// later.
func TestTakenOut(t *testing.T) {
	s, set, _ := shared(t)
	for _, cause := range []error{unix.EIO, unix.ENOMEDIUM} {
		st := s.site()
		d := s.open(st, set.Volumes...)
		out := &ejected{medium: d.volumes[2].medium, after: 3, cause: cause}
		d.volumes[2].medium = out
		got, err := bring(t.Context(), st, d)
		if !errors.Is(err, cause) || !strings.Contains(fmt.Sprint(err), "volume 2 of platter 1.0 ("+set.Volumes[1]+") was taken out") {
			t.Errorf("got %v", err)
		}
		if lines := strings.Count(fmt.Sprint(err), "\n") + 1; lines > 4 || out.failed > 3*maxFailed {
			t.Errorf("%d lines, %d reads failed: %v", lines, out.failed, err)
		}
		if got == nil || len(got.Missing) != 1 || got.Missing[0] != 2 {
			t.Fatalf("got %+v", got)
		}
		d = s.open(st, set.Volumes...)
		d.volumes[2].medium = &ejected{medium: d.volumes[2].medium, cause: cause} // from the first read on: it has few chunks
		if err := d.Verify(t.Context(), func(int64, int64) {}); err == nil || strings.Count(err.Error(), "\n") > 4 || !strings.Contains(err.Error(), "was taken out") {
			t.Errorf("verified: %v", err)
		}
		must[*Imported](t)(bring(t.Context(), st, s.open(st, set.Volumes...)))
		whole(t, st)
	}
}

// ejected is a volume whose packs cannot be read after some reads.
type ejected struct {
	medium
	mu            sync.Mutex
	after, failed int
	cause         error
}

func (e *ejected) open(path string) (mediumFile, error) {
	f, err := e.medium.open(path)
	if strings.HasPrefix(path, "platter/pack-") {
		f.ReaderAt = ejectedReader{f.ReaderAt, e}
	}
	return f, err
}

type ejectedReader struct {
	io.ReaderAt
	e *ejected
}

func (r ejectedReader) ReadAt(b []byte, at int64) (int, error) {
	r.e.mu.Lock()
	defer r.e.mu.Unlock()
	if r.e.after--; r.e.after < 0 {
		r.e.failed++
		return 0, &os.PathError{Op: "read", Path: "drive", Err: r.e.cause}
	}
	return r.ReaderAt.ReadAt(b, at)
}

func TestFaultsSideBySide(t *testing.T) {
	var f faults
	for _, at := range []int64{20, 0, 10, 40} {
		f.add(&Damage{File: "a", At: at, Size: 10})
	}
	for i := range int64(100) {
		f.add(&Damage{File: "b", At: 20 * i, Size: 10})
	}
	text := f.err().Error()
	for _, want := range []string{"file a: the 30 bytes at offset 0", "file a: the 10 bytes at offset 40", "and 52 places more"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in %s", want, text)
		}
	}
}

// What the store has in common with a set is found by the lists of sets that came
// before, and only the rest of the store is cut, as far as something is missing.
func TestFromStore(t *testing.T) {
	s := product(t)
	st := s.site()
	must[*Imported](t)(bring(t.Context(), st, s.open(st, s.build("1.0", 1<<30).Volumes...)))
	s.image(1, 2, 3, 4, 105, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	next := s.build("1.1", 1<<30)
	var looked int64
	got := must[*Imported](t)(bring(t.Context(), st, s.open(st, next.Volumes...), func(o *ImportOptions) {
		o.Looked = func(done, total int64) { looked = done }
	}))
	if looked > 0 || got.Read > 2_000_000 {
		t.Errorf("%d bytes of the store were cut, %d read from the disc", looked, got.Read)
	}
	// A store of its own, which came with no set.
	own := s.site()
	for _, o := range s.build("1.1", 1<<30).Set.Objects {
		b := must[[]byte](t)(os.ReadFile(filepath.Join(s.store.Dir(), "objects", o.Hash)))
		a := must[*images.Arriving](t)(own.Arrive(o.Object))
		must[int](t)(a.WriteAt(b, 0))
		if err := a.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range next.Set.Refs {
		if err := own.SetRef(r.Name, r.Digest, []byte(r.Signature)); err != nil {
			t.Fatal(err)
		}
	}
	s.image(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	back := s.build("1.2", 1<<30)
	var total int64
	got = must[*Imported](t)(bring(t.Context(), own, s.open(own, back.Volumes...), func(o *ImportOptions) {
		o.Looked = func(done, all int64) { looked, total = done, all }
	}))
	if looked == 0 || looked > total || got.Read > 2_000_000 {
		t.Errorf("%d of %d bytes of the store were cut, %d read from the disc", looked, total, got.Read)
	}
	whole(t, own)
}

// Every bit of the signature file counts, also those that minisign does not look at.
func TestEveryBitOfSignature(t *testing.T) {
	s, set, _ := shared(t)
	dir := t.TempDir()
	run(t, "", "xorriso", "-osirrox", "on", "-indev", set.Volumes[1], "-extract", "/", dir)
	run(t, "", "chmod", "-R", "u+w", dir)
	check := must[func(raw, sig []byte) error](t)(images.Signatures(s.key + ".pub"))
	file := filepath.Join(dir, signatureFile)
	good := must[[]byte](t)(os.ReadFile(file))
	for at := range good {
		for bit := byte(1); bit != 0; bit <<= 1 {
			bad := append([]byte{}, good...)
			bad[at] ^= bit
			if err := os.WriteFile(file, bad, 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := Open(check, dir)
			if err == nil || !named(err, signatureFile, int64(at)) || !strings.Contains(err.Error(), "volume 2") {
				t.Errorf("bit %d of byte %d: %v", bit, at, err)
			}
		}
	}
}

// Damage that is met while a disc is served is logged.
func TestServedDamageIsLogged(t *testing.T) {
	s, set, _ := shared(t)
	st := s.site()
	d := s.open(st, set.Volumes...)
	d.volumes[1].medium = &ejected{medium: d.volumes[1].medium, cause: unix.EIO}
	var said strings.Builder
	all := must[*images.Store](t)(images.Open(st.Dir(), d))
	srv := httptest.NewServer(all.Handler(slog.New(slog.NewTextHandler(&said, nil))))
	p := set.Set.Objects[0]
	for _, o := range set.Set.Objects {
		if at := d.where[o.Chunks[0].Hash]; at.volume == 1 && strings.HasPrefix(at.path, "platter/pack-") {
			p = o
		}
	}
	r, err := http.Get(srv.URL + "/objects/" + p.Hash)
	if err == nil {
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	srv.Close() // after which nothing is written any more
	for _, want := range []string{p.Hash, "volume 1 of platter 1.0", "platter/pack-1-1", "input/output error"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("%q is not in %q", want, said.String())
		}
	}
}

func TestMountedFrom(t *testing.T) {
	const mounts = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 22 11:0 / /mnt/disc ro,relatime shared:9 master:2 - iso9660 /dev/sr0 ro,nojoliet
37 22 11:1 / /mnt/my\040disc ro - iso9660 /dev/my\040drive ro
38 22 11:0 /boot /mnt/part ro - iso9660 /dev/sr0 ro
39 22 11:0 / /mnt/under ro - iso9660 /dev/sr0 ro
40 39 0:30 / /mnt/under rw - tmpfs tmpfs rw
41 22
`
	for path, want := range map[string]string{"/": "", "/mnt": "", "/mnt/disc": "/dev/sr0", "/mnt/my disc": "/dev/my drive", "/mnt/part": "", "/mnt/under": ""} {
		if got := mountedFrom(mounts, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// Of files that were copied to a folder the boot areas are not there to be compared.
func TestFilesOnly(t *testing.T) {
	s, set, _ := shared(t)
	dir := t.TempDir()
	run(t, "", "xorriso", "-osirrox", "on", "-indev", set.Volumes[1], "-extract", "/", dir)
	if got := s.open(s.site(), set.Volumes[0], dir).FilesOnly(); len(got) != 1 || got[0] != 2 {
		t.Errorf("got %v", got)
	}
}
