package images

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"platter/provision"
)

// Contents is what a name of the store stands for.
type Contents struct {
	Name      string
	Digest    string // of the manifest
	Signature []byte // of the manifest, minisign's
	// Objects are the manifest and all that it names, in the order in which a
	// node reads them.
	Objects []Content
	// Image and Release are set for what they are.
	Image   *provision.Image
	Release *provision.Release
}

// Content is an object and what it is.
type Content struct {
	provision.Object
	What string // for people
	// Frames, of an image's pack, follow each other from its first byte to its
	// last.
	Frames []provision.Frame
}

// Contents lists everything that name stands for, under the same guarantees as
// Image.
func (s *Store) Contents(name string) (Contents, error) {
	r, raw, err := s.signed(name)
	if err != nil {
		return Contents{}, err
	}
	c := Contents{Name: name, Digest: r.Digest, Signature: r.signature}
	if c.Signature == nil {
		if c.Signature, err = os.ReadFile(s.objectPath(r.Digest) + sigSuffix); err != nil {
			return Contents{}, err
		}
	}
	add := func(o provision.Object, what string, frames ...provision.Frame) {
		c.Objects = append(c.Objects, Content{o, what + " of " + name, frames})
	}
	add(provision.Object{Hash: r.Digest, Size: int64(len(raw))}, "manifest")
	if arch, ok := strings.CutPrefix(name, "boot/"); ok {
		set, err := s.Boot(arch)
		if err != nil {
			return Contents{}, err
		}
		add(set.Kernel, "kernel")
		add(set.Initramfs, "initramfs")
		add(set.Local, "local loader")
		for _, o := range set.Disc.objects() {
			add(o, "disc loader")
		}
		return c, nil
	}
	if version, ok := ReleaseOf(name); ok {
		if _, c.Release, err = s.Release(version); err != nil {
			return Contents{}, err
		}
		for _, f := range c.Release.Files {
			add(provision.Object{Hash: f.Digest, Size: f.Size}, "file "+f.Name)
		}
		return c, nil
	}
	if _, c.Image, err = s.Image(name); err != nil {
		return Contents{}, err
	}
	var frames []provision.Frame
	for _, p := range c.Image.Parts {
		frames = append(frames, p.Frames...)
	}
	add(c.Image.Pack, "pack", frames...)
	return c, nil
}

// Has tells whether the store's own folder has the object in full length.
func (s *Store) Has(o provision.Object) bool {
	st, err := os.Stat(s.objectPath(o.Hash))
	return err == nil && st.Size() == o.Size
}

// Objects lists the SHA-256 of every object in the store's own folder, sorted.
func (s *Store) Objects() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, "objects"))
	if err != nil {
		return nil, fmt.Errorf("objects of the image store cannot be listed: %w", err)
	}
	var out []string
	for _, e := range entries {
		if hexHash.MatchString(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// partPrefix marks objects that are still arriving.
const partPrefix = ".part-"

// Arriving is an object of which not every byte is there yet. What is there
// outlives the program; which bytes are right is for the caller to find out.
type Arriving struct {
	*os.File
	// New: nothing of it had come before.
	New bool
	s   *Store
	o   provision.Object
}

// Arrive opens the object o as far as it has come, a file of its full length.
func (s *Store) Arrive(o provision.Object) (*Arriving, error) {
	if !hexHash.MatchString(o.Hash) || o.Size < 0 {
		return nil, fmt.Errorf("%.80q with %d bytes is no object", o.Hash, o.Size)
	}
	path := filepath.Join(s.dir, "objects", partPrefix+o.Hash)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrPermission) && os.Chmod(path, 0o644) == nil { // it was cut short while it was committed
		f, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	fresh := errors.Is(err, fs.ErrNotExist)
	if fresh {
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("image store %s cannot be written: %w", s.dir, err)
	}
	a := &Arriving{f, fresh, s, o}
	if err := f.Truncate(o.Size); err != nil { // a file system without holes may be full
		f.Close()
		if fresh {
			err = errors.Join(err, s.Drop(o))
		}
		return nil, fmt.Errorf("image store %s cannot be written: %w", s.dir, err)
	}
	return a, nil
}

// Allocated is how many bytes of the disk the object has, also those that have
// not come: a file system without holes, such as FAT, gives it all of them at once.
func (a *Arriving) Allocated() (int64, error) {
	st, err := a.Stat()
	if err != nil {
		return 0, fmt.Errorf("object %s cannot be looked at: %w", a.o.Hash, err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

// Commit makes the object durable under its hash and closes it. That every byte
// is right is the caller's word. It cannot be written any more only when all of it
// is durable: where that is cut short, the next one goes on.
func (a *Arriving) Commit() error {
	defer a.Close()
	if err := a.Sync(); err != nil {
		return fmt.Errorf("object %s cannot be written: %w", a.o.Hash, err)
	}
	if err := a.Chmod(0o444); err != nil {
		return fmt.Errorf("object %s cannot be written: %w", a.o.Hash, err)
	}
	if err := os.Rename(a.Name(), a.s.objectPath(a.o.Hash)); err != nil {
		return fmt.Errorf("object %s cannot be stored: %w", a.o.Hash, err)
	}
	return syncDir(filepath.Join(a.s.dir, "objects"))
}

// Drop removes what has arrived of the object.
func (s *Store) Drop(o provision.Object) error {
	if err := os.Remove(filepath.Join(s.dir, "objects", partPrefix+o.Hash)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("what arrived of object %s cannot be removed: %w", o.Hash, err)
	}
	return nil
}

// SetRef lets name point to the manifest with this digest, which is in the
// store and for which signature counts. Both are compared also where name points
// there already: what has rotted is said, and a signature that is another one is
// replaced. The name stays as it is when it returns an error.
func (s *Store) SetRef(name, digest string, signature []byte) error {
	if !refName.MatchString(name) || !hexHash.MatchString(digest) {
		return fmt.Errorf("%.80q with manifest %.80q is no name for the image store", name, digest)
	}
	raw, err := os.ReadFile(s.objectPath(digest))
	if err != nil {
		return fmt.Errorf("manifest %s of %s is missing from the store: %w", digest, name, err)
	}
	if got := hexSum(raw); got != digest {
		return fmt.Errorf("manifest %s of %s has rotted in the store %s, its content hashes to %s: bring it anew with 'platter disc import --repair'", digest, name, s.dir, got)
	}
	if err := s.CheckSignature(raw, signature); err != nil {
		return fmt.Errorf("manifest %s of %s is refused: %w", digest, name, err)
	}
	sigFile := s.objectPath(digest) + sigSuffix
	if have, err := os.ReadFile(sigFile); err != nil || !bytes.Equal(have, signature) {
		if err := writeFile(sigFile, signature); err != nil {
			return err
		}
	}
	if s.PointsTo(name, digest) {
		return nil
	}
	return s.writeRef(name, ref{Digest: digest})
}

// PointsTo tells whether name stands for the manifest with this digest in the
// store's own folder.
func (s *Store) PointsTo(name, digest string) bool {
	r, err := s.readRef(name)
	return err == nil && r.signature == nil && r.Digest == digest
}

// Hash is a hash over every name in the store and the manifest that it points to,
// and so over everything that can be had from it.
func (s *Store) Hash() (string, error) {
	names, err := s.Refs()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, name := range names {
		r, err := s.readRef(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%s %s\n", name, r.Digest)
	}
	return hexSum([]byte(b.String())), nil
}

// Files are the files of a folder that is this store with all that its sources
// have: how to open each, by its path in the folder. What is still arriving is
// left out.
func (s *Store) Files() (map[string]func() (File, error), error) {
	out := map[string]func() (File, error){}
	for _, folder := range []string{"objects", "refs", "keys", "sets"} {
		err := filepath.WalkDir(filepath.Join(s.dir, folder), func(file string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") {
				return err
			}
			rel, err := filepath.Rel(s.dir, file)
			out[filepath.ToSlash(rel)] = func() (File, error) { return os.Open(file) }
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("files of the image store cannot be listed: %w", err)
		}
	}
	keys, err := s.trusted()
	if err != nil {
		return nil, err
	}
	add := func(path string, open func() (File, error)) {
		if _, have := out[path]; !have {
			out[path] = open
		}
	}
	text := func(b []byte) func() (File, error) {
		return func() (File, error) { return memory{bytes.NewReader(b)}, nil }
	}
	for _, k := range keys {
		add("keys/"+k.name, text(k.text))
	}
	for _, src := range s.sources {
		for _, name := range src.Refs() {
			if _, have := out["refs/"+name]; have {
				continue
			}
			c, err := s.Contents(name)
			if err != nil {
				return nil, err
			}
			pointer, err := json.Marshal(ref{Digest: c.Digest})
			if err != nil {
				return nil, err
			}
			add("refs/"+name, text(append(pointer, '\n')))
			add("objects/"+c.Digest+sigSuffix, text(c.Signature))
			for _, o := range c.Objects {
				add("objects/"+o.Hash, func() (File, error) { return s.OpenObject(o.Hash) })
			}
		}
	}
	return out, nil
}
