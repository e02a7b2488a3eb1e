package stack

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"platter/provision"
)

// ReleasesDir is where a node keeps the releases of its stack:
//
//	DIGEST/manifest.json           the release, a provision.Release
//	DIGEST/manifest.json.minisig   its signature
//	DIGEST/files/NAME              every file of it
//	DIGEST/complete                empty; there once every byte is verified
//	current, previous              digests of the release in use and of the one before
const ReleasesDir = "/var/lib/platter/stack"

const (
	releaseManifest  = "manifest.json"
	releaseSignature = "manifest.json.minisig"
	releaseComplete  = "complete"
	releaseFiles     = "files"
)

// ErrNotStaged is the cause where a node does not have all of a release.
var ErrNotStaged = errors.New("the release is not complete on this node: run 'platter stack stage'")

// Release reads the release of that digest below dir, ReleasesDir on a node.
// Its files were complete and right when it was staged; the error is
// ErrNotStaged where they never were.
func Release(dir, digest string) (*provision.Release, error) {
	if !provision.ValidDigest(digest) {
		return nil, fmt.Errorf("%.80q is not the digest of a release", digest)
	}
	if _, err := os.Stat(filepath.Join(dir, digest, releaseComplete)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("release %.12s: %w", digest, ErrNotStaged)
	} else if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, digest, releaseManifest))
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != digest {
		return nil, fmt.Errorf("the manifest of release %.12s is damaged: %w", digest, ErrNotStaged)
	}
	return provision.ReadRelease(raw)
}

// ReleaseFile is the path of a file of a release.
func ReleaseFile(dir, digest, name string) string {
	return filepath.Join(dir, digest, releaseFiles, name)
}

// InUse are the digests of the release in use and of the one before; empty
// where there is none.
func InUse(dir string) (current, previous string, err error) {
	read := func(name string) string {
		b, rerr := os.ReadFile(filepath.Join(dir, name))
		if rerr != nil {
			if !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	current, previous = read("current"), read("previous")
	return current, previous, err
}
