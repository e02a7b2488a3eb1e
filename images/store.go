package images

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"platter/provision"
)

// Store is a folder of objects, refs and trusted keys, and what the sources
// beside it have. Its methods may be called at the same time, also by several
// processes.
type Store struct {
	dir     string
	sources []Source
}

// Source has refs and objects that lie elsewhere than in the store's folder, on
// discs for example. What it says is believed no more than what the folder
// holds.
type Source interface {
	// Refs are the names that it has.
	Refs() []string
	// Ref is the digest of the manifest that name points to, and the manifest's
	// signature. An error that is fs.ErrNotExist: it has no such name.
	Ref(name string) (digest string, signature []byte, err error)
	// Open opens the object with this SHA-256. An error that is fs.ErrNotExist:
	// it has no such object.
	Open(hash string) (File, error)
}

// File is an open object.
type File interface {
	io.ReadSeekCloser
	io.ReaderAt
	Stat() (fs.FileInfo, error)
}

// BootSet is what a machine gets when it boots over the network.
type BootSet struct {
	Kernel    provision.Object `json:"kernel"`
	Initramfs provision.Object `json:"initramfs"`
	// Local is a UEFI program that starts the loader on the machine's own disk.
	Local provision.Object `json:"local"`
	// Release of the kernel as uname -r prints it.
	Release string `json:"release"`
	// URoot is the version of u-root in the initramfs.
	URoot string `json:"uroot,omitempty"`
	// Disc are the loaders of a disc that machines boot from; empty where the
	// image had none.
	Disc DiscLoaders `json:"disc,omitzero"`
}

// DiscLoaders are GRUB's images that make an ISO bootable.
type DiscLoaders struct {
	ElTorito provision.Object `json:"eltorito"` // what a BIOS starts from a CD
	Hybrid   provision.Object `json:"hybrid"`   // the boot sector where the disc is a USB stick
	EFI      provision.Object `json:"efi"`      // EFI/BOOT/BOOTX64.EFI
}

func (l DiscLoaders) objects() []provision.Object {
	if l == (DiscLoaders{}) {
		return nil
	}
	return []provision.Object{l.ElTorito, l.Hybrid, l.EFI}
}

// bootManifest is what is signed under the ref boot/ARCH.
type bootManifest struct {
	Format int    `json:"format"`
	Arch   string `json:"arch"`
	BootSet
}

const bootFormat = 1

// ref is the content of refs/<name>.
type ref struct {
	Digest string `json:"digest"`
	// Inputs is a hash over everything the manifest was built from; equal
	// inputs need no second build.
	Inputs string `json:"inputs,omitempty"`

	signature []byte // where a source said it
}

// Open opens the store at dir and makes its folders if they are missing. Names are
// looked for in sources first, in their order; objects that it lacks are theirs.
func Open(dir string, sources ...Source) (*Store, error) {
	for _, d := range []string{"objects", "refs", "keys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, fmt.Errorf("image store %s cannot be opened: %w", dir, err)
		}
	}
	return &Store{dir: dir, sources: sources}, nil
}

// Dir is the store's folder.
func (s *Store) Dir() string { return s.dir }

// Refs lists every name in the store, sorted.
func (s *Store) Refs() ([]string, error) {
	root := filepath.Join(s.dir, "refs")
	var names []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if name, err := filepath.Rel(root, path); err == nil && refName.MatchString(name) {
			names = append(names, name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("refs of the image store cannot be listed: %w", err)
	}
	for _, src := range s.sources {
		names = append(names, src.Refs()...)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Image returns the image called name. Its manifest carries the signature of a
// trusted key and names a pack that is there in full length; Verify also reads
// the pack.
func (s *Store) Image(name string) (provision.ImageRef, *provision.Image, error) {
	r, raw, err := s.signed(name)
	if err != nil {
		return provision.ImageRef{}, nil, err
	}
	var im provision.Image
	if err := json.Unmarshal(raw, &im); err != nil {
		return provision.ImageRef{}, nil, fmt.Errorf("manifest %s of image %s is signed but is no image manifest: %w", r.Digest, name, err)
	}
	if im.Format != provision.ImageFormat {
		return provision.ImageRef{}, nil, fmt.Errorf("manifest %s of image %s has format %d, this program reads format %d: use the release of Platter that came with the image", r.Digest, name, im.Format, provision.ImageFormat)
	}
	if im.Name != name {
		return provision.ImageRef{}, nil, fmt.Errorf("ref %s points to manifest %s, which is of image %q: build %s again", name, r.Digest, im.Name, name)
	}
	if err := s.complete(im.Pack, "pack of image "+name); err != nil {
		return provision.ImageRef{}, nil, err
	}
	return provision.ImageRef{Name: name, Digest: r.Digest}, &im, nil
}

// Boot returns the kernel and initramfs for machines of arch (amd64), under the
// same guarantees as Image.
func (s *Store) Boot(arch string) (BootSet, error) {
	name := "boot/" + arch
	r, raw, err := s.signed(name)
	if err != nil {
		return BootSet{}, err
	}
	var m bootManifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return BootSet{}, fmt.Errorf("manifest %s of %s is signed but is no boot manifest: %w", r.Digest, name, err)
	}
	if m.Format != bootFormat || m.Arch != arch {
		return BootSet{}, fmt.Errorf("manifest %s of %s has format %d for %q, wanted format %d for %q: run 'platter image initramfs' again", r.Digest, name, m.Format, m.Arch, bootFormat, arch)
	}
	if err := s.complete(m.Kernel, "kernel of "+name); err != nil {
		return BootSet{}, err
	}
	if err := s.complete(m.Initramfs, "initramfs of "+name); err != nil {
		return BootSet{}, err
	}
	if err := s.complete(m.Local, "local loader of "+name); err != nil {
		return BootSet{}, err
	}
	for _, o := range m.Disc.objects() {
		if err := s.complete(o, "disc loader of "+name); err != nil {
			return BootSet{}, err
		}
	}
	return m.BootSet, nil
}

// signed returns the manifest that name points to, after its digest and its
// signature have been checked.
func (s *Store) signed(name string) (ref, []byte, error) {
	r, err := s.readRef(name)
	if err != nil {
		return ref{}, nil, err
	}
	raw, err := s.read(r.Digest)
	if err != nil {
		return ref{}, nil, fmt.Errorf("manifest %s of %s is missing from the store: copy the disc again: %w", r.Digest, name, err)
	}
	if got := hexSum(raw); got != r.Digest {
		return ref{}, nil, fmt.Errorf("manifest %s of %s is damaged, its content hashes to %s: copy the disc again", r.Digest, name, got)
	}
	sig := r.signature
	if sig == nil {
		if sig, err = os.ReadFile(s.objectPath(r.Digest) + sigSuffix); err != nil {
			return ref{}, nil, fmt.Errorf("manifest %s of %s has no signature: build it again with --key: %w", r.Digest, name, err)
		}
	}
	if err := s.CheckSignature(raw, sig); err != nil {
		return ref{}, nil, fmt.Errorf("manifest %s of %s is refused: %w", r.Digest, name, err)
	}
	return r, raw, nil
}

// complete checks that an object is there with all its bytes.
func (s *Store) complete(o provision.Object, what string) error {
	if !hexHash.MatchString(o.Hash) {
		return fmt.Errorf("%s has no valid hash (%q): build it again", what, o.Hash)
	}
	f, err := s.OpenObject(o.Hash)
	if err != nil {
		return fmt.Errorf("object %s, the %s, is missing from the store: copy the disc again: %w", o.Hash, what, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("object %s, the %s, cannot be read: %w", o.Hash, what, err)
	}
	if st.Size() != o.Size {
		return fmt.Errorf("object %s, the %s, is %d bytes instead of %d: copy the disc again", o.Hash, what, st.Size(), o.Size)
	}
	return nil
}

// publish stores manifest and its signature and then lets name point to it.
func (s *Store) publish(name string, manifest any, inputs string, key secretKey) (string, error) {
	raw, err := json.Marshal(manifest)
	if err != nil {
		return "", fmt.Errorf("manifest of %s cannot be written: %w", name, err)
	}
	o, err := s.put(bytes.NewReader(raw))
	if err != nil {
		return "", err
	}
	if err := writeFile(s.objectPath(o.Hash)+sigSuffix, key.sign(raw, name)); err != nil {
		return "", err
	}
	return o.Hash, s.writeRef(name, ref{Digest: o.Hash, Inputs: inputs})
}

// refName is one or two words, or a version of the stack: debian-13, boot/amd64,
// stack@2.0-1.
var (
	refName = regexp.MustCompile(`^([a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)?|stack@[0-9][A-Za-z0-9.+~-]*)$`)
	hexHash = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

func (s *Store) readRef(name string) (ref, error) {
	if !refName.MatchString(name) {
		return ref{}, fmt.Errorf("%q is no image name: use a-z, 0-9, '.', '_' and '-'", name)
	}
	for _, src := range s.sources {
		digest, signature, err := src.Ref(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return ref{Digest: digest, signature: signature}, err
	}
	b, err := os.ReadFile(filepath.Join(s.dir, "refs", name))
	if errors.Is(err, fs.ErrNotExist) {
		have, _ := s.Refs()
		return ref{}, fmt.Errorf("%s is not in the image store %s (it has: %s): build it with 'platter image' or name another store: %w", name, s.dir, strings.Join(have, ", "), fs.ErrNotExist)
	}
	if err != nil {
		return ref{}, fmt.Errorf("ref %s cannot be read: %w", name, err)
	}
	var r ref
	if err := json.Unmarshal(b, &r); err != nil || !hexHash.MatchString(r.Digest) {
		return ref{}, fmt.Errorf("ref %s in %s is damaged: build it again", name, s.dir)
	}
	return r, nil
}

func (s *Store) writeRef(name string, r ref) error {
	if !refName.MatchString(name) {
		return fmt.Errorf("%q is no image name: use a-z, 0-9, '.', '_' and '-'", name)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(s.dir, "refs", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return writeFile(path, append(b, '\n'))
}

// OpenObject opens the object with this SHA-256, in the folder or in the first
// source that has it. The error is fs.ErrNotExist where none has.
func (s *Store) OpenObject(hash string) (File, error) {
	f, err := os.Open(s.objectPath(hash))
	if err == nil {
		return f, nil
	}
	for _, src := range s.sources {
		if f, err := src.Open(hash); !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return nil, err
}

// read returns a whole object.
func (s *Store) read(hash string) ([]byte, error) {
	f, err := s.OpenObject(hash)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func (s *Store) objectPath(hash string) string { return filepath.Join(s.dir, "objects", hash) }

// objectWriter receives the bytes of a new object. Nobody sees it before
// commit.
type objectWriter struct {
	s    *Store
	f    *os.File
	sum  hash.Hash
	size int64
}

func (s *Store) create() (*objectWriter, error) {
	f, err := os.CreateTemp(filepath.Join(s.dir, "objects"), ".new-")
	if err != nil {
		return nil, fmt.Errorf("image store %s cannot be written: %w", s.dir, err)
	}
	return &objectWriter{s: s, f: f, sum: sha256.New()}, nil
}

func (w *objectWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.sum.Write(p[:n])
	w.size += int64(n)
	return n, err
}

// commit makes the object durable under its hash.
func (w *objectWriter) commit() (provision.Object, error) {
	o := provision.Object{Hash: hex.EncodeToString(w.sum.Sum(nil)), Size: w.size}
	defer w.abort()
	if err := w.f.Chmod(0o444); err != nil {
		return o, err
	}
	if err := w.f.Sync(); err != nil {
		return o, fmt.Errorf("object %s cannot be written: %w", o.Hash, err)
	}
	if err := os.Rename(w.f.Name(), w.s.objectPath(o.Hash)); err != nil {
		return o, fmt.Errorf("object %s cannot be stored: %w", o.Hash, err)
	}
	return o, syncDir(filepath.Join(w.s.dir, "objects"))
}

// abort drops what was written; after commit it does nothing.
func (w *objectWriter) abort() {
	w.f.Close()
	os.Remove(w.f.Name())
}

// put stores everything r yields as one object.
func (s *Store) put(r io.Reader) (provision.Object, error) {
	w, err := s.create()
	if err != nil {
		return provision.Object{}, err
	}
	defer w.abort()
	if _, err := io.Copy(w, r); err != nil {
		return provision.Object{}, fmt.Errorf("object cannot be stored: %w", err)
	}
	return w.commit()
}

func (s *Store) putFile(path string) (provision.Object, error) {
	f, err := os.Open(path)
	if err != nil {
		return provision.Object{}, err
	}
	defer f.Close()
	return s.put(f)
}

// writeFile replaces path in one step that survives power loss.
func writeFile(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return fmt.Errorf("%s cannot be written: %w", path, err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("%s cannot be written: %w", path, err)
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync(), os.Rename(f.Name(), path)); err != nil {
		return fmt.Errorf("%s cannot be written: %w", path, err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("%s cannot be made durable: %w", dir, err)
	}
	return nil
}

func hexSum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
