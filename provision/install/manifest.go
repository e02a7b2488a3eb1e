package install

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"

	"aead.dev/minisign"

	"platter/provision"
)

// ReadKeys reads the public keys (*.pub, minisign) whose signature makes an
// image, or a release of the stack, trusted.
func ReadKeys(dir string) ([]minisign.PublicKey, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.pub"))
	if err != nil {
		return nil, err
	}
	var keys []minisign.PublicKey
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read trusted key: %w", err)
		}
		var k minisign.PublicKey
		if err := k.UnmarshalText(bytes.TrimSpace(b)); err != nil {
			return nil, fmt.Errorf("trusted key %s: %w", f, err)
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no trusted key in %s: build the initramfs again with the key that signs the images, then install again", dir)
	}
	return keys, nil
}

// manifestLimit bounds a manifest, in bytes: 25,000 frames (100 GB) take 6 MB.
const manifestLimit = 64 << 20

// fetchManifest gets the manifest that ref names and believes it only with the
// right content and a trusted signature.
func fetchManifest(ctx context.Context, hc *http.Client, base string, ref provision.ImageRef, keys []minisign.PublicKey) (*provision.Image, error) {
	raw, err := fetch(ctx, hc, base+"/objects/"+ref.Digest, manifestLimit)
	if err != nil {
		return nil, err
	}
	sig, err := fetch(ctx, hc, base+"/objects/"+ref.Digest+".minisig", 64<<10)
	if err != nil {
		return nil, err
	}
	im, err := verifyManifest(raw, sig, ref.Digest, keys)
	if err != nil {
		return nil, &provision.Failure{Code: "image-untrusted",
			Message: fmt.Sprintf("the manifest of image %s is not to be trusted: %v", ref.Name, err),
			Next:    "Import or build the image again on the disc host with a key that the initramfs trusts, then start the machine again"}
	}
	return im, nil
}

func verifyManifest(raw, sig []byte, digest string, keys []minisign.PublicKey) (*provision.Image, error) {
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != digest {
		return nil, fmt.Errorf("its SHA-256 is %x and not the plan's %s", sum, digest)
	}
	signed := false
	for _, k := range keys {
		signed = signed || minisign.Verify(k, raw, sig)
	}
	if !signed {
		return nil, errors.New("no trusted key has signed it")
	}
	var im provision.Image
	if err := json.Unmarshal(raw, &im); err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	if im.Format != provision.ImageFormat {
		return nil, fmt.Errorf("it has format %d and this installer reads %d", im.Format, provision.ImageFormat)
	}
	return &im, nil
}

func fetch(ctx context.Context, hc *http.Client, url string, limit int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := hc.Do(req)
	if err != nil {
		return nil, passing(err)
	}
	defer res.Body.Close()
	switch {
	case res.StatusCode == http.StatusNotFound:
		return nil, &provision.Failure{Code: "object-missing", Message: fmt.Sprintf("the disc host does not have %s", url),
			Next: "Import the image into the disc host's store again, then start the machine again"}
	case res.StatusCode != http.StatusOK:
		return nil, passing(fmt.Errorf("fetch %s: %s", url, res.Status))
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err != nil {
		return nil, passing(fmt.Errorf("fetch %s: %w", url, err))
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("fetch %s: it is larger than %d bytes", url, limit)
	}
	return b, nil
}
