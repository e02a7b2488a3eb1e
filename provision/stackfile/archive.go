package stackfile

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// maxJSON bounds an index or a manifest of an image, in bytes.
const maxJSON = 4 << 20

// descriptor points to content (OCI image specification 1.1, descriptor.md).
type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

// checkArchive reads the OCI archive called name, a tar of an image layout (OCI
// image specification 1.1, image-layout.md), and makes sure that it holds the
// image whose manifest has that digest, whole: every blob has the hash that it
// is named by. The error completes a sentence that begins with the name.
func checkArchive(fsys fs.FS, name, digest string) error {
	var index struct{ Manifests []descriptor }
	sizes := map[string]int64{} // of sound blobs, by digest
	seen := 0
	err := eachFile(fsys, name, func(file string, r io.Reader) error {
		if file == "index.json" {
			seen++
			return decodeJSON(r, file, &index)
		}
		hash, ok := strings.CutPrefix(file, "blobs/sha256/")
		if !ok {
			return nil
		}
		h := sha256.New()
		n, err := io.Copy(h, r)
		if err != nil {
			return err
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != hash {
			return fmt.Errorf("is corrupt: blob sha256:%s has the hash sha256:%s. Copy it again from where it was made", hash, got)
		}
		sizes["sha256:"+hash] = n
		return nil
	})
	switch {
	case err != nil:
		return err
	case seen != 1:
		return errors.New("is no OCI archive: it has no index.json, or several. Make it with 'podman save --format oci-archive'")
	}
	if n := len(index.Manifests); n > 1 {
		return fmt.Errorf("holds %d images: make an archive for each", n)
	}
	i := slices.IndexFunc(index.Manifests, func(d descriptor) bool { return d.Digest == digest })
	if i < 0 {
		var has []string
		for _, d := range index.Manifests {
			has = append(has, d.Digest)
		}
		return fmt.Errorf("does not hold %s, but %s", digest, strings.Join(has, ", "))
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	err = eachFile(fsys, name, func(file string, r io.Reader) error {
		if file != "blobs/sha256/"+strings.TrimPrefix(digest, "sha256:") {
			return nil
		}
		return decodeJSON(r, "manifest "+digest, &manifest)
	})
	if err != nil {
		return err
	}
	for _, d := range append([]descriptor{index.Manifests[i], manifest.Config}, manifest.Layers...) {
		size, ok := sizes[d.Digest]
		switch {
		case d.Digest == "":
			return fmt.Errorf("holds no image as %s: its manifest names no configuration", digest)
		case !ok:
			return fmt.Errorf("is incomplete: blob %s is missing. Make it anew", d.Digest)
		case size != d.Size:
			return fmt.Errorf("is corrupt: blob %s has %d bytes, its manifest says %d", d.Digest, size, d.Size)
		}
	}
	return nil
}

// eachFile calls f for every file of the tar called name.
func eachFile(fsys fs.FS, name string, f func(file string, r io.Reader) error) error {
	info, err := fs.Stat(fsys, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("does not exist")
	case err != nil:
		return fmt.Errorf("cannot be read: %w", err)
	case !info.Mode().IsRegular():
		return errors.New("is no file")
	}
	file, err := fsys.Open(name)
	if err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	}
	defer file.Close()
	t := tar.NewReader(file)
	for {
		h, err := t.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("is no tar archive or breaks off: %w", err)
		case h.Typeflag != tar.TypeReg:
			continue
		}
		if err := f(path.Clean(h.Name), t); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				return errors.New("breaks off. Copy it again from where it was made")
			}
			return err
		}
	}
}

func decodeJSON(r io.Reader, what string, out any) error {
	b, err := io.ReadAll(io.LimitReader(r, maxJSON))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("is no OCI archive: its %s cannot be read: %w", what, err)
	}
	return nil
}
