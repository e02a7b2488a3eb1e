package stack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/provision"
)

// fakePodman keeps images by name; an archive's content is its digest.
type fakePodman struct {
	names   map[string]string // to digests
	damaged bool
	log     []string
}

func (p *fakePodman) run(_ context.Context, args ...string) (string, error) {
	switch line := strings.Join(args, " "); {
	case line == "system check --repair --force":
		p.log = append(p.log, "repair")
		p.damaged, p.names = false, map[string]string{}
		return "", errors.New("image is in use by a container")
	case line == "system check":
		if p.damaged {
			return "", errors.New("layer: content incorrect")
		}
		return "", nil
	case args[0] == "pull":
		digest, err := os.ReadFile(strings.TrimPrefix(args[2], "oci-archive:"))
		if err != nil || !strings.HasPrefix(string(digest), "sha256:") {
			return "", fmt.Errorf("no archive: %v", err)
		}
		p.names[string(digest)] = string(digest)
		p.log = append(p.log, "pull "+string(digest))
		return string(digest), nil
	case args[0] == "tag":
		p.names[args[2]] = p.names[args[1]]
		return "", nil
	case args[0] == "untag":
		return "", nil
	case args[0] == "image":
		if digest, there := p.names[args[4]]; there {
			return digest, nil
		}
		return "", errors.New("image not known")
	}
	return "", fmt.Errorf("podman %v", args)
}

type mute struct{}

func (mute) Phase(string, int, int)  {}
func (mute) Logf(string, ...any)     {}
func (mute) Facts(map[string]string) {}

func hashed(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// Images are in podman's store as the plan pins them, whatever was there before.
func TestBringImages(t *testing.T) {
	image := provision.OCIImage{Name: "localhost/board:1", File: "board/one.oci.tar", Digest: "sha256:1"}
	c := provision.PlacedComponent{Members: []string{"a"}, Component: provision.Component{Name: "board", Kind: provision.KindCompose,
		Images: []provision.OCIImage{image}, Units: []string{"keeper.service", "web.service"}}}
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write(containersDir+"/x", "")
	p := &fakePodman{names: map[string]string{}}
	bring := func() (bool, error) {
		p.log = nil
		n := &node{plan: provision.Plan{Node: "a", Stack: provision.StackPlan{Components: []provision.PlacedComponent{c}}}, root: root, rep: mute{}, podman: p.run,
			units: func(name string) unit {
				return fakeUnit{stop: func() error { p.log = append(p.log, "stop "+name); return nil }}
			}}
		return n.bringImages(t.Context(), c)
	}
	want := func(what string, changed bool, log string) {
		t.Helper()
		got, err := bring()
		if err != nil || got != changed || strings.Join(p.log, ", ") != log {
			t.Errorf("%s: changed %v, %v, %v; want %v, %s", what, got, err, p.log, changed, log)
		}
	}
	_, err := bring()
	isFailure(t, err, "stack-image", "localhost/board:1 of the component board", "board_one.oci.tar is in no release")
	write(imagesDir+"/board_one.oci.tar", "sha256:1")
	want("at first", true, "pull sha256:1")
	want("once more", false, "")
	p.names[image.Name] = "sha256:2"
	want("another image has its name", true, "pull sha256:1")
	p.damaged = true
	want("a damaged store", true, "stop web.service, stop keeper.service, repair, pull sha256:1")

	// A release brings another one, under the same names.
	newer := image
	newer.Digest = "sha256:3"
	release := func(i provision.OCIImage, content string) string {
		t.Helper()
		r := provision.Release{Format: provision.ReleaseFormat, Stack: provision.Stack{Components: []provision.Component{{Name: "board", Images: []provision.OCIImage{i}}}},
			Files: []provision.ReleaseFile{{Name: i.ReleaseName(), Kind: provision.FileImage, Size: int64(len(i.Digest)), Digest: hashed(i.Digest)}}}
		manifest, digest, err := r.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		write(ReleasesDir+"/"+digest+"/manifest.json", string(manifest))
		write(ReleasesDir+"/"+digest+"/complete", "")
		write(ReleasesDir+"/"+digest+"/files/"+i.ReleaseName(), content)
		return digest
	}
	release(image, image.Digest)
	damaged := release(newer, "sha256:X")
	check := func(want string, i provision.OCIImage) {
		t.Helper()
		releases, err := releasesAt(filepath.Join(root, ReleasesDir))
		if err != nil {
			t.Fatal(err)
		}
		if err := archived(root, releases, i); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", i.Digest, err, want)
		}
	}
	if err := os.Remove(filepath.Join(root, imagesDir, "board_one.oci.tar")); err != nil {
		t.Fatal(err)
	}
	check("", image)
	check(damaged+"/files/board_one.oci.tar is damaged", newer)
	other := image
	other.Digest = "sha256:4"
	check("board_one.oci.tar is in no release", other)
	write(ReleasesDir+"/"+damaged+"/files/board_one.oci.tar", newer.Digest)
	check("", newer)
	c.Images[0] = newer
	want("the release's", true, "pull sha256:3")
	c.Images[0] = image
	want("and back", true, "pull sha256:1")
}
