package disc

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"platter/provision"
)

// SetFormat is the value of Set.Format.
const SetFormat = 1

// Set is the signed manifest of a set of discs. It follows from what the set was
// built from: equal inputs give equal bytes.
type Set struct {
	Format  int       `json:"format"`
	Name    string    `json:"name"`    // of the product, for example platter
	Version string    `json:"version"` // in Debian's order: 1.10 is newer than 1.9
	Arch    []string  `json:"arch"`    // of the nodes it is for
	Made    time.Time `json:"made"`    // from the inputs, not from a clock
	// Base is the Store.Hash of the store that a patch is for; empty where the set
	// is whole.
	Base string `json:"base,omitempty"`
	// Refs are the names that a store has after an import.
	Refs []Ref `json:"refs"`
	// Objects are everything that these stand for, in the order in which it is read.
	Objects []Object `json:"objects"`
	Volumes []Volume `json:"volumes"`
}

// Ref is a name in a store.
type Ref struct {
	Name      string `json:"name"`
	Digest    string `json:"digest"`    // of the manifest
	Signature string `json:"signature"` // of the manifest, minisign's text
	// Objects are the indexes in Set.Objects of all that the name stands for; the
	// first one is the manifest.
	Objects []int `json:"objects"`
}

// Object is one of the store's.
type Object struct {
	provision.Object
	Chunks []Chunk `json:"chunks"` // they follow each other and cover it
}

// Chunk is a stretch of bytes: the unit that is read, hashed and repeated.
type Chunk struct {
	Size int64  `json:"n"` // bytes
	Hash string `json:"h"` // SHA-256, hex
}

// Volume is one disc.
type Volume struct {
	Label string `json:"label"` // of its file system
	Files []File `json:"files"` // all but those that depend on the manifest itself
}

// File of a volume.
type File struct {
	Path   string  `json:"path"`
	Size   int64   `json:"size"`   // bytes
	Hash   string  `json:"sha256"` // of all of it, hex
	Chunks []Chunk `json:"chunks"` // they follow each other and cover it
}

// Where a volume has what.
const (
	SetFile       = "platter/set.json" // on every volume
	Program       = "bin/platter"      // on volume 1 of a whole set
	packedProgram = Program + ".gz"    // on volume 1 of a patch
	signatureFile = SetFile + ".minisig"
	sumsFile      = "platter/set.sums"
	listFile      = "SHA256SUMS"
	volumePrefix  = "platter/volume-"
)

const (
	maxChunk    = provision.FrameSize + provision.FrameSize/128 + 4096 // a frame that does not compress
	maxManifest = 256 << 20
)

// ID is the SHA-256, hex, of a manifest: the set's hash.
func ID(manifest []byte) string {
	sum := sha256.Sum256(manifest)
	return hex.EncodeToString(sum[:])
}

// Size is how many bytes the files of the volume have together.
func (v Volume) Size() (bytes int64) {
	for _, f := range v.Files {
		bytes += f.Size
	}
	return bytes
}

// File finds a file of the volume.
func (v Volume) File(path string) (File, bool) {
	for _, f := range v.Files {
		if f.Path == path {
			return f, true
		}
	}
	return File{}, false
}

// String names the set for people.
func (s *Set) String() string { return s.Name + " " + s.Version }

// place is where a chunk lies.
type place struct {
	volume int // from 1
	path   string
	at     int64
	size   int64
}

// places finds every chunk of the set that is on some volume.
func (s *Set) places() map[string]place {
	where := map[string]place{}
	for i, v := range s.Volumes {
		for _, f := range v.Files {
			at := int64(0)
			for _, c := range f.Chunks {
				if _, have := where[c.Hash]; !have {
					where[c.Hash] = place{i + 1, f.Path, at, c.Size}
				}
				at += c.Size
			}
		}
	}
	return where
}

var (
	hexHash  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	setName  = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
	setLabel = regexp.MustCompile(`^[A-Z0-9_]{1,32}$`)
	version  = regexp.MustCompile(`^[0-9][A-Za-z0-9.+~-]{0,63}$`)
)

// Read reads a manifest. It believes the content, not the signature: that is the
// caller's to check. All mistakes are returned at once.
func Read(manifest []byte) (*Set, error) {
	var s Set
	if err := json.Unmarshal(manifest, &s); err != nil {
		return nil, fmt.Errorf("the manifest of the set cannot be read: %w", err)
	}
	if s.Format != SetFormat {
		return nil, fmt.Errorf("the set has format %d, this program reads format %d: use the program on the set's first volume", s.Format, SetFormat)
	}
	var wrong []error
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	if !setName.MatchString(s.Name) || !version.MatchString(s.Version) {
		bad("%.80q %.80q is no name and version of a set", s.Name, s.Version)
	}
	cover := func(what string, size int64, chunks []Chunk) {
		var sum int64
		for _, c := range chunks {
			if c.Size <= 0 || c.Size > maxChunk || !hexHash.MatchString(c.Hash) {
				bad("%s has a chunk that cannot be", what)
				return
			}
			sum += c.Size
		}
		if sum != size {
			bad("%s has chunks for %d of %d bytes", what, sum, size)
		}
	}
	for i, o := range s.Objects {
		if !hexHash.MatchString(o.Hash) {
			bad("object %d has no valid hash", i)
		}
		cover("object "+o.Hash, o.Size, o.Chunks)
	}
	for _, r := range s.Refs {
		if len(r.Objects) == 0 {
			bad("the name %.80q stands for nothing", r.Name)
			continue
		}
		for _, i := range r.Objects {
			if i < 0 || i >= len(s.Objects) {
				bad("the name %.80q stands for an object that is not there", r.Name)
			}
		}
		if first := r.Objects[0]; first >= 0 && first < len(s.Objects) && s.Objects[first].Hash != r.Digest {
			bad("the name %.80q has another manifest than its first object", r.Name)
		}
	}
	if len(s.Volumes) == 0 {
		bad("the set has no volume")
	}
	sizes := map[string]int64{}
	for i, v := range s.Volumes {
		if !setLabel.MatchString(v.Label) {
			bad("volume %d has the label %.80q", i+1, v.Label)
		}
		seen := map[string]bool{}
		for _, f := range v.Files {
			if f.Path == "" || path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || strings.HasPrefix(f.Path, "..") || seen[f.Path] {
				bad("volume %d has a file %.80q, which cannot be or is there twice", i+1, f.Path)
			}
			seen[f.Path] = true
			if !hexHash.MatchString(f.Hash) {
				bad("file %s of volume %d has no valid hash", f.Path, i+1)
			}
			cover(fmt.Sprintf("file %s of volume %d", f.Path, i+1), f.Size, f.Chunks)
			for _, c := range f.Chunks {
				sizes[c.Hash] = c.Size
			}
		}
	}
	for _, o := range s.Objects {
		for _, c := range o.Chunks {
			switch size, have := sizes[c.Hash]; {
			case !have && s.Base == "":
				bad("chunk %s of object %s is on no volume", c.Hash, o.Hash)
			case have && size != c.Size:
				bad("chunk %s has two sizes", c.Hash)
			}
		}
	}
	if err := errors.Join(wrong[:min(len(wrong), 20)]...); err != nil {
		return nil, fmt.Errorf("the manifest of the set %s: %w", &s, err)
	}
	return &s, nil
}

// Manifest returns the set as it is signed, and its ID.
func (s *Set) Manifest() (manifest []byte, id string, err error) {
	if manifest, err = json.Marshal(s); err != nil {
		return nil, "", fmt.Errorf("set %s: %w", s, err)
	}
	return manifest, ID(manifest), nil
}

// sums are the hashes of the manifest's and the signature's pieces, which tell
// where one of them is damaged.
func sums(manifest, signature []byte) []byte {
	var b strings.Builder
	for _, f := range []struct {
		name string
		text []byte
	}{{SetFile, manifest}, {signatureFile, signature}} {
		for at := 0; at < len(f.text); at += sumsPiece {
			fmt.Fprintf(&b, "%x %d %s\n", sha256.Sum256(f.text[at:min(at+sumsPiece, len(f.text))]), at, f.name)
		}
	}
	return []byte(b.String())
}

const sumsPiece = 4096

// list is SHA256SUMS of a volume.
func (v Volume) list(manifest, signature []byte) []byte {
	hashes := map[string]string{
		SetFile: ID(manifest), signatureFile: ID(signature), sumsFile: ID(sums(manifest, signature)),
	}
	for _, f := range v.Files {
		hashes[f.Path] = f.Hash
	}
	var b strings.Builder
	for _, p := range slices.Sorted(maps.Keys(hashes)) {
		fmt.Fprintf(&b, "%s  ./%s\n", hashes[p], p)
	}
	return []byte(b.String())
}

// derived are the files of the volume that follow from the manifest.
func (v Volume) derived(manifest, signature []byte) map[string][]byte {
	return map[string][]byte{
		SetFile: manifest, signatureFile: signature, sumsFile: sums(manifest, signature), listFile: v.list(manifest, signature),
	}
}
