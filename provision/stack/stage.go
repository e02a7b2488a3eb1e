package stack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sys/unix"

	"platter/hostprep/versions"
	"platter/provision"
)

// Source is where the bytes of objects come from; disk.HTTPSource is one.
// Nothing it returns is trusted.
type Source interface {
	// Open returns the n bytes from off of the object; the reader may end early.
	Open(ctx context.Context, object string, off, n int64) (io.ReadCloser, error)
}

// Staging brings releases of the stack onto the disk of a node, into Dir.
type Staging struct {
	Dir  string // ReleasesDir
	Keys []minisign.PublicKey
	From Source
	// Say tells what is going on and how many bytes of how many are there.
	Say func(line string, done, total int64)
	// Patience is for how long no byte may come from the disc host; zero: an hour.
	Patience time.Duration
}

const (
	// maxManifest bounds the manifest of a release, in bytes: the texts of a
	// stack take six MaxStackText at most, a file some hundred bytes.
	maxManifest  = 16 << 20
	maxSignature = 64 << 10
	// maxWrong is how often a file may come whole and wrong.
	maxWrong = 3
	// idle is how long a connection may be silent before it is dropped.
	idle = 30 * time.Second
	// partFolder holds what has come so far of a file, by its digest.
	partFolder = "part"
)

// Stage makes the release complete and right on this node's disk: signature,
// then every byte. What is right already is not fetched again, what has come in
// part goes on. Called again after a crash or a loss of power it goes on too,
// and called for a release that is there it repairs it. Releases that are
// neither that one nor the one in use nor the one before are removed.
//
// The disc host may go away meanwhile: Stage keeps what it has and waits. Its
// error is a *provision.Failure where the operator can do something:
// release-untrusted, release-damaged, disk-too-small, disc-host-lost.
func (s Staging) Stage(ctx context.Context, ref provision.ReleaseRef) (provision.Staged, error) {
	if !provision.ValidDigest(ref.Digest) {
		return provision.Staged{}, fmt.Errorf("%.80q is not the digest of a release", ref.Digest)
	}
	j := &staging{Staging: s, ref: ref, dir: filepath.Join(s.Dir, ref.Digest), heard: time.Now(), since: time.Now()}
	if j.Patience == 0 {
		j.Patience = time.Hour
	}
	for _, step := range []func(context.Context) error{j.manifest, j.share, j.prune, j.check, j.room, j.fetchAll, j.seal} {
		if err := step(ctx); err != nil {
			if errors.Is(err, unix.ENOSPC) {
				err = j.tooSmall()
			}
			return provision.Staged{}, err
		}
	}
	return StagedReleases(s.Dir)
}

// staging is one release on its way.
type staging struct {
	Staging
	ref     provision.ReleaseRef
	dir     string
	release *provision.Release
	missing []provision.ReleaseFile
	done    int64 // bytes of the release that are here

	heard time.Time // when the last byte came from the disc host
	// said, since and fetched are for the rate.
	said, since time.Time
	fetched     int64
}

func (j *staging) name() string {
	return fmt.Sprintf("release %s (%.12s)", j.ref.Version, j.ref.Digest)
}

func (j *staging) path(name ...string) string {
	return filepath.Join(append([]string{j.dir}, name...)...)
}

// manifest reads the manifest that is here, or fetches it, and believes it only
// with a trusted signature.
func (j *staging) manifest(ctx context.Context) error {
	raw, err1 := os.ReadFile(j.path(releaseManifest))
	sig, err2 := os.ReadFile(j.path(releaseSignature))
	if err1 == nil && err2 == nil {
		if r, err := j.believe(raw, sig); err == nil {
			j.release = r
			return nil
		}
	}
	if err := errors.Join(j.reopen(), os.MkdirAll(j.dir, 0o755)); err != nil {
		return err
	}
	j.say("fetches the manifest", true)
	raw, err := j.small(ctx, j.ref.Digest, maxManifest)
	if err != nil {
		return err
	}
	if sig, err = j.small(ctx, j.ref.Digest+".minisig", maxSignature); err != nil {
		return err
	}
	if j.release, err = j.believe(raw, sig); err != nil {
		return err
	}
	return errors.Join(writeDurable(j.path(releaseManifest), raw), writeDurable(j.path(releaseSignature), sig), syncFolder(j.dir), syncFolder(j.Dir))
}

func (j *staging) believe(raw, sig []byte) (*provision.Release, error) {
	untrusted := func(why string) error {
		return &provision.Failure{Code: "release-untrusted", Message: fmt.Sprintf("the manifest of %s is not to be trusted: %s", j.name(), why),
			Next: "Build the release with the key that the node's image was built with, or reinstall the node with an image of the new key; then stage it again"}
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != j.ref.Digest {
		return nil, untrusted(fmt.Sprintf("its SHA-256 is %x", sum))
	}
	if !slices.ContainsFunc(j.Keys, func(k minisign.PublicKey) bool { return minisign.Verify(k, raw, sig) }) {
		return nil, untrusted("no key that this node trusts has signed it")
	}
	return provision.ReadRelease(raw)
}

// reopen says that the release is not complete, before anything of it changes.
func (j *staging) reopen() error {
	err := os.Remove(j.path(releaseComplete))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(err, syncFolder(j.dir))
}

// share takes over files that other releases here have too.
func (j *staging) share(context.Context) error {
	if err := os.MkdirAll(j.path(releaseFiles), 0o755); err != nil {
		return err
	}
	others, err := StagedReleases(j.Dir)
	if err != nil {
		return err
	}
	have := map[string]string{}
	for _, o := range others.Releases {
		if o.Digest == j.ref.Digest {
			continue
		}
		if r, err := Release(j.Dir, o.Digest); err == nil {
			for _, f := range r.Files {
				have[f.Digest] = ReleaseFile(j.Dir, o.Digest, f.Name)
			}
		}
	}
	for _, f := range j.release.Files {
		if from := have[f.Digest]; from != "" {
			// What cannot be linked is fetched; what is linked is checked.
			os.Link(from, j.path(releaseFiles, f.Name))
		}
	}
	return nil
}

// prune removes releases that nobody goes back to. While the node may go back to
// what the install brought, any of them may hold the packages that this takes.
func (j *staging) prune(context.Context) error {
	current, previous, err := InUse(j.Dir)
	if err != nil || current == "" || previous == "" {
		return err
	}
	entries, err := os.ReadDir(j.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !provision.ValidDigest(e.Name()) || slices.Contains([]string{j.ref.Digest, current, previous}, e.Name()) {
			continue
		}
		old := staging{dir: filepath.Join(j.Dir, e.Name())}
		if err := errors.Join(old.reopen(), os.RemoveAll(old.dir)); err != nil {
			return err
		}
	}
	return nil
}

// check finds out which files are missing or wrong, and removes what does not
// belong.
func (j *staging) check(ctx context.Context) error {
	entries, err := os.ReadDir(j.path(releaseFiles))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.ContainsFunc(j.release.Files, func(f provision.ReleaseFile) bool { return f.Name == e.Name() }) {
			if err := os.RemoveAll(j.path(releaseFiles, e.Name())); err != nil {
				return err
			}
		}
	}
	for _, f := range j.release.Files {
		j.say("checks "+f.Name, false)
		switch good, err := j.right(ctx, f); {
		case err != nil:
			return err
		case good:
			j.done += f.Size
		default:
			j.missing = append(j.missing, f)
			if st, err := os.Stat(j.path(partFolder, f.Digest)); err == nil && st.Size() <= f.Size {
				j.done += st.Size()
			}
		}
	}
	if len(j.missing) > 0 {
		return j.reopen()
	}
	return nil
}

// right tells whether a file is here as it should be. One that a disk cannot
// read is not.
func (j *staging) right(ctx context.Context, f provision.ReleaseFile) (bool, error) {
	path := j.path(releaseFiles, f.Name)
	st, err := os.Lstat(path)
	if err != nil || !st.Mode().IsRegular() || st.Size() != f.Size {
		return false, nil
	}
	file, err := os.Open(path)
	if err != nil {
		return false, nil
	}
	defer file.Close()
	sum := sha256.New()
	_, err = io.Copy(sum, untilDone{ctx, file})
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return err == nil && hex.EncodeToString(sum.Sum(nil)) == f.Digest, nil
}

// room makes sure that what is missing fits, and a fifth more.
func (j *staging) room(context.Context) error {
	if len(j.missing) == 0 {
		return nil
	}
	free, err := freeSpace(j.Dir)
	if err != nil {
		return err
	}
	if free < j.needs() {
		return j.tooSmall()
	}
	return nil
}

func (j *staging) needs() int64 { return (j.release.Size() - j.done) * 6 / 5 }

func (j *staging) tooSmall() error {
	free, _ := freeSpace(j.Dir)
	size, needs := int64(0), int64(0)
	if j.release != nil {
		size, needs = j.release.Size(), j.needs()
	}
	return &provision.Failure{Code: "disk-too-small",
		Message: fmt.Sprintf("the disk is too small for %s: it has %s, %s of which are here; the rest and a fifth more are %s, and %s are free in %s",
			j.name(), megabytes(size), megabytes(j.done), megabytes(needs), megabytes(free), j.Dir),
		Next: "Make room on the node ('du -xh / | sort -h' shows what is large), then stage the release again: it goes on where it stopped"}
}

func freeSpace(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// fetchAll brings the files that are missing.
func (j *staging) fetchAll(ctx context.Context) error {
	if err := os.MkdirAll(j.path(partFolder), 0o755); err != nil {
		return err
	}
	j.since, j.fetched = time.Now(), 0
	for _, f := range j.missing {
		if err := j.file(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

// file fetches one file, from where it broke off.
func (j *staging) file(ctx context.Context, f provision.ReleaseFile) error {
	part := j.path(partFolder, f.Digest)
	for wrong := 0; ; {
		sum := ""
		err := j.persist(ctx, func() (err error) {
			sum, err = j.goOn(ctx, f, part)
			return err
		})
		switch {
		case err != nil:
			return err
		case sum == f.Digest:
			return os.Rename(part, j.path(releaseFiles, f.Name))
		}
		wrong++
		if err := os.Remove(part); err != nil {
			return err
		}
		j.done -= f.Size
		if wrong == maxWrong {
			return &provision.Failure{Code: "release-damaged",
				Message: fmt.Sprintf("%s of %s came %d times with other content than its manifest says: the last had the SHA-256 %.12s instead of %.12s", f.Name, j.name(), wrong, sum, f.Digest),
				Next:    "Run 'platter image verify stack' on the disc host and copy the disc again if it says so, then stage the release again"}
		}
	}
}

// goOn appends to part until it has all of the file and returns its hash.
func (j *staging) goOn(ctx context.Context, f provision.ReleaseFile, part string) (string, error) {
	out, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	defer out.Close()
	sum := sha256.New()
	have, err := io.Copy(sum, untilDone{ctx, out})
	if err != nil {
		return "", err
	}
	if have > f.Size {
		if err := out.Truncate(0); err != nil {
			return "", err
		}
		if _, err := out.Seek(0, io.SeekStart); err != nil {
			return "", err
		}
		have = 0
		sum.Reset()
	}
	if have < f.Size {
		if err := j.copy(ctx, f, have, out, sum); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), errors.Join(out.Sync(), out.Close())
}

// copy appends the bytes of f from off.
func (j *staging) copy(ctx context.Context, f provision.ReleaseFile, off int64, out io.Writer, sum hash.Hash) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watchdog := time.AfterFunc(idle, cancel)
	defer watchdog.Stop()
	body, err := j.From.Open(ctx, f.Digest, off, f.Size-off)
	if err != nil {
		return remote(err)
	}
	defer body.Close()
	buf := make([]byte, 256<<10)
	for off < f.Size {
		n, err := body.Read(buf[:min(int64(len(buf)), f.Size-off)])
		if n > 0 {
			watchdog.Reset(idle)
			if _, err := out.Write(buf[:n]); err != nil {
				return err
			}
			sum.Write(buf[:n])
			off += int64(n)
			j.heard = time.Now()
			j.done += int64(n)
			j.fetched += int64(n)
			j.say(fmt.Sprintf("fetches %s, %s/s", f.Name, megabytes(j.rate())), false)
		}
		switch {
		case off == f.Size:
		case err == io.EOF:
			return remote(fmt.Errorf("%s broke off after %d of %d bytes", f.Name, off, f.Size))
		case err != nil:
			return remote(err)
		}
	}
	return nil
}

// rate is in bytes a second.
func (j *staging) rate() int64 {
	return int64(float64(j.fetched) / max(time.Since(j.since).Seconds(), 0.001))
}

// small fetches all of an object of unknown size.
func (j *staging) small(ctx context.Context, object string, limit int64) (b []byte, err error) {
	err = j.persist(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, idle)
		defer cancel()
		body, err := j.From.Open(ctx, object, 0, limit)
		if err != nil {
			return remote(err)
		}
		defer body.Close()
		if b, err = io.ReadAll(io.LimitReader(body, limit)); err != nil {
			return remote(err)
		}
		j.heard = time.Now()
		return nil
	})
	return b, err
}

// remoteError is trouble with the disc host: it may pass.
type remoteError struct{ error }

func (e remoteError) Unwrap() error { return e.error }

func remote(err error) error { return remoteError{err} }

// persist repeats try while the disc host or the way to it is in trouble.
func (j *staging) persist(ctx context.Context, try func() error) error {
	for n := 0; ; n++ {
		before := j.heard
		err := try()
		var r remoteError
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.As(err, &r) {
			return err
		}
		if j.heard.After(before) {
			n = 0
		}
		why := err.Error()
		var f *provision.Failure
		if errors.As(err, &f) {
			why = f.Message // its advice is for installs
		}
		if time.Since(j.heard) > j.Patience {
			return &provision.Failure{Code: "disc-host-lost",
				Message: fmt.Sprintf("no byte of %s has come from the disc host for %s; %s of it are here and are kept. The last trouble: %s", j.name(), j.Patience, megabytes(j.done), why),
				Next:    "Check that 'platter serve' runs, that the disc is in, and the cable; then stage the release again: it goes on where it stopped"}
		}
		j.say("waits for the disc host: "+why, true)
		if err := provision.Sleep(ctx, min(250*time.Millisecond<<min(n, 5), 5*time.Second)); err != nil {
			return err
		}
		// The rate is that of the bytes that come now.
		j.since, j.fetched = time.Now(), 0
	}
}

// seal makes everything durable and then says that it is complete.
func (j *staging) seal(context.Context) error {
	if err := errors.Join(os.RemoveAll(j.path(partFolder)), syncFolder(j.path(releaseFiles)), syncFolder(j.dir), syncFolder(j.Dir)); err != nil {
		return err
	}
	if err := errors.Join(writeDurable(j.path(releaseComplete), nil), syncFolder(j.dir)); err != nil {
		return err
	}
	j.say("is complete", true)
	return nil
}

// say tells of progress: now, or when nothing was told for a moment.
func (j *staging) say(line string, now bool) {
	if j.Say == nil || !now && time.Since(j.said) < 500*time.Millisecond {
		return
	}
	j.said = time.Now()
	total := int64(0)
	if j.release != nil {
		total = j.release.Size()
	}
	j.Say(line, min(j.done, total), total)
}

// StagedReleases are the complete releases below dir, oldest version first.
func StagedReleases(dir string) (provision.Staged, error) {
	out := provision.Staged{Releases: []provision.ReleaseRef{}}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return out, err
	}
	for _, e := range entries {
		if !provision.ValidDigest(e.Name()) {
			continue
		}
		if r, err := Release(dir, e.Name()); err == nil {
			out.Releases = append(out.Releases, provision.ReleaseRef{Version: r.Version, Digest: e.Name()})
		}
	}
	slices.SortFunc(out.Releases, func(a, b provision.ReleaseRef) int {
		return cmp.Or(versions.Order(a.Version, b.Version), cmp.Compare(a.Digest, b.Digest))
	})
	out.Current, _, err = InUse(dir)
	return out, err
}

// writeDurable replaces a file.
func writeDurable(path string, b []byte) error {
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close(), os.Rename(path+".new", path))
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// untilDone is a reader that ends with ctx.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
