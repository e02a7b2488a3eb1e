package provision

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// Release is the signed manifest of one version of a stack: the checked stack
// file and every file that a node needs beyond its operating system image, so
// that the node can move to this version and back to it on its own. What a
// release holds follows from its inputs: there is no time in it.
type Release struct {
	Format  int           `json:"format"`  // ReleaseFormat
	Name    string        `json:"name"`    // the stack's
	Version string        `json:"version"` // the stack's
	Image   ImageRef      `json:"image"`   // of the nodes; what it has is not among the files, but for packages that the stack names
	Stack   Stack         `json:"stack"`   // every package with its exact version
	Files   []ReleaseFile `json:"files"`   // sorted by Name, which is unique
}

// ReleaseFormat is the value of Release.Format.
const ReleaseFormat = 1

// ReleaseFile is one file of a release.
type ReleaseFile struct {
	Name string `json:"name"` // for example etcd-server_3.5.16-4_amd64.deb
	// Component that the file is there for, the first of several; empty for
	// the index.
	Component string          `json:"component,omitempty"`
	Kind      ReleaseFileKind `json:"kind"`
	Package   string          `json:"package,omitempty"` // of kind package
	Version   string          `json:"version,omitempty"` // of kind package
	Size      int64           `json:"size"`              // bytes
	Digest    string          `json:"digest"`            // SHA-256, hex; the object's name in the store
}

// ReleaseFileKind says what a file of a release is.
type ReleaseFileKind string

const (
	FilePackage ReleaseFileKind = "package" // a Debian package
	FileImage   ReleaseFileKind = "image"   // container images as an OCI archive
	FileIndex   ReleaseFileKind = "index"   // what makes the packages a repository for apt: Packages and Release
)

// ReleaseRef names a release by content.
type ReleaseRef struct {
	Version string `json:"version"`
	Digest  string `json:"digest"` // SHA-256 of the manifest, hex
}

var (
	releaseFileName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,199}$`)
	releaseDigest   = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// ValidDigest tells whether s is a SHA-256 in lower-case hex.
func ValidDigest(s string) bool { return releaseDigest.MatchString(s) }

// Manifest returns the release as it is signed and kept, and its digest: the
// SHA-256, hex, of these bytes.
func (r Release) Manifest() (manifest []byte, digest string, err error) {
	if manifest, err = json.Marshal(r); err != nil {
		return nil, "", fmt.Errorf("release %s of the stack %s: %w", r.Version, r.Name, err)
	}
	sum := sha256.Sum256(manifest)
	return manifest, hex.EncodeToString(sum[:]), nil
}

// ReadRelease reads a manifest. It believes the content, not the signature:
// that is the caller's to check. All mistakes are returned at once.
func ReadRelease(manifest []byte) (*Release, error) {
	var r Release
	if err := json.Unmarshal(manifest, &r); err != nil {
		return nil, fmt.Errorf("the manifest of the release cannot be read: %w", err)
	}
	if r.Format != ReleaseFormat {
		return nil, fmt.Errorf("the release has format %d, this program reads format %d: use the version of Platter that came with it", r.Format, ReleaseFormat)
	}
	var wrong []error
	before := ""
	for _, f := range r.Files {
		switch {
		case !releaseFileName.MatchString(f.Name):
			wrong = append(wrong, fmt.Errorf("%.80q is not a name for a file of a release", f.Name))
		case f.Name <= before:
			wrong = append(wrong, fmt.Errorf("the file %s is out of order or listed twice", f.Name))
		case !ValidDigest(f.Digest) || f.Size < 0:
			wrong = append(wrong, fmt.Errorf("the file %s has no valid digest and size", f.Name))
		}
		before = f.Name
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, fmt.Errorf("release %s of the stack %s: %w", r.Version, r.Name, err)
	}
	return &r, nil
}

// ReleaseName is the name of the image's archive among the files of a release.
func (i OCIImage) ReleaseName() string { return strings.ReplaceAll(i.File, "/", "_") }

// Size is how many bytes all files have together.
func (r *Release) Size() (bytes int64) {
	for _, f := range r.Files {
		bytes += f.Size
	}
	return bytes
}

// StoredRelease is a release in the disc host's store.
type StoredRelease struct {
	ReleaseRef
	Name       string    `json:"name"`       // the stack's
	Components []string  `json:"components"` // in the order in which they start
	Image      string    `json:"image"`
	Files      int       `json:"files"`
	Size       int64     `json:"size"` // bytes of all files
	Built      time.Time `json:"built"`
	Nodes      []string  `json:"nodes"` // that have it whole on their disks
}

// Staged says which releases a node has on its disk.
type Staged struct {
	Releases []ReleaseRef `json:"releases"`          // complete ones
	Current  string       `json:"current,omitempty"` // digest of the one in use; empty: what the install laid down
}
