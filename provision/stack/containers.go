package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/stack/quadlet"
)

// imagesDir is where an operating system image may bring archives of container
// images along.
const imagesDir = "/usr/share/platter/stack"

// containersDir is podman's.
const containersDir = "var/lib/containers"

// podmanSecrets are lines of tmpfiles.d(5). podman plays no manifest while its
// file of secrets is damaged, and it writes it in place: a power cut leaves it
// empty. Only manifests have secrets, and each brings its own when it is played.
const podmanSecrets = "# Written by Platter.\nR! /" + containersDir + "/storage/secrets\n"

// contained tells whether podman runs the component.
func contained(c provision.PlacedComponent) bool {
	return c.Kind == provision.KindCompose || c.Kind == provision.KindKube
}

// containerFiles are what podman's systemd generator makes the component's
// services of.
func containerFiles(view provision.View, c provision.PlacedComponent) ([]file, error) {
	name := "manifest of " + c.Name
	text, err := view.Render(name, c.Manifest)
	if err != nil {
		return nil, err
	}
	units, err := quadlet.Of(c.Component, name, text)
	if err != nil {
		return nil, err
	}
	var out []file
	for _, f := range units.Files {
		out = append(out, file{component: c.Name, path: strings.TrimPrefix(quadlet.Dir, "/") + "/" + f.Name, mode: fs.FileMode(f.Mode), text: f.Text})
	}
	return out, nil
}

// dropContainers removes what an earlier plan left of containers.
func dropContainers(root string, keep []file) error {
	dir := filepath.Join(root, quadlet.Dir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if slices.ContainsFunc(keep, func(f file) bool { return filepath.Join(root, f.path) == path }) {
			continue
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return syncDir(dir)
}

// makeData makes the component's data folders below root: podman makes none.
func makeData(root string, c provision.PlacedComponent) error {
	for _, d := range c.Data {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// podman runs podman and returns what it prints.
func podman(ctx context.Context, args ...string) (string, error) {
	var out, wrong bytes.Buffer
	cmd := exec.CommandContext(ctx, "/usr/bin/podman", args...)
	cmd.Stdout, cmd.Stderr = &out, &wrong
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(wrong.String())
		if len(said) > 500 {
			said = "..." + said[len(said)-500:]
		}
		return "", fmt.Errorf("podman %s: %w: %s", args[0], err, said)
	}
	return strings.TrimSpace(out.String()), nil
}

// bringImages sees that every image of the component is in podman's store as the
// stack file pins it, and lets the component's services start. What is missing or
// damaged is imported again from its archive. It tells whether services that run
// have to be restarted.
func (n *node) bringImages(ctx context.Context, c provision.PlacedComponent) (changed bool, err error) {
	if !n.sound {
		if err := n.checkImages(ctx); err != nil {
			return false, err
		}
		n.sound = true
	}
	// The file says that all of these were written to the disk.
	var lines strings.Builder
	for _, i := range c.Images {
		fmt.Fprintf(&lines, "%s %s\n", i.Name, i.Digest)
	}
	kept, err := os.ReadFile(filepath.Join(n.root, memberDir, c.Name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	imported := slices.Collect(strings.Lines(string(kept)))
	for _, i := range c.Images {
		if slices.Contains(imported, i.Name+" "+i.Digest+"\n") {
			if digest, err := n.podman(ctx, "image", "inspect", "--format", "{{.Digest}}", i.Name); err == nil && digest == i.Digest {
				continue
			}
			n.rep.Logf("the image %s of %s is gone from this node or is another one", i.Name, c.Name)
		}
		file, err := n.importImage(ctx, i)
		if err != nil {
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			return false, &provision.Failure{Code: "stack-image",
				Message: fmt.Sprintf("the image %s of the component %s cannot be imported on node %s: %v", i.Name, c.Name, n.plan.Node, err),
				Next:    fmt.Sprintf("Run 'platter stack check' on the stack file, then bring %s to the node again; the agent keeps trying", i.ReleaseName())}
		}
		n.rep.Logf("imported the image %s of %s from %s", i.Name, c.Name, file)
		changed = true
	}
	if changed {
		if err := syncTree(filepath.Join(n.root, containersDir)); err != nil {
			return false, fmt.Errorf("node %s: writing container images: %w: look at the disk's free space and health", n.plan.Node, err)
		}
	}
	if _, err := put(n.root, file{path: memberDir + c.Name, mode: 0o644, text: lines.String()}); err != nil {
		return false, fmt.Errorf("node %s: writing /%s%s: %w: look at the disk's free space and health", n.plan.Node, memberDir, c.Name, err)
	}
	return changed || n.repaired, nil
}

// checkImages hashes every layer in podman's store. Where it is damaged all
// containers of the node stop, and what is wrong is removed with the containers on
// it; named volumes are elsewhere.
func (n *node) checkImages(ctx context.Context) error {
	_, err := n.podman(ctx, "system", "check")
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	n.rep.Logf("the store of container images is damaged, what is wrong in it is removed: %v", err)
	// Containers that are removed under their services leave their addresses and
	// ports taken.
	own := here(n.plan)
	for _, c := range slices.Backward(own) {
		if !contained(c) {
			continue
		}
		for _, u := range slices.Backward(c.Units) {
			if err := n.units(u).Stop(ctx); err != nil {
				return err
			}
		}
	}
	// It may fail halfway over a pod that uses what it removes, having done its work.
	_, repair := n.podman(ctx, "system", "check", "--repair", "--force")
	if _, err := n.podman(ctx, "system", "check"); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &provision.Failure{Code: "stack-image-store",
			Message: fmt.Sprintf("the store of container images on node %s is damaged and cannot be repaired: %v", n.plan.Node, errors.Join(err, repair)),
			Next:    "Look at the disk's health; 'platter node reinstall " + n.plan.Node + "' makes the store anew"}
	}
	n.repaired = true
	return nil
}

// importImage puts the image into podman's store, from the first archive that
// holds it, whose name it returns. podman hashes everything that it reads.
func (n *node) importImage(ctx context.Context, i provision.OCIImage) (file string, err error) {
	releases, err := releasesAt(filepath.Join(n.root, ReleasesDir))
	if err != nil {
		return "", err
	}
	var wrong []error
	files := archives(n.root, releases, i)
	if len(files) == 0 {
		return "", notArchived(i)
	}
	for _, a := range files {
		file := a.path
		id, err := n.podman(ctx, "pull", "--quiet", "oci-archive:"+file)
		if err != nil {
			wrong = append(wrong, fmt.Errorf("%s: %w", file, err))
			continue
		}
		digest, err := n.podman(ctx, "image", "inspect", "--format", "{{.Digest}}", id)
		switch {
		case err != nil:
			wrong = append(wrong, fmt.Errorf("%s: %w", file, err))
		case digest != i.Digest:
			// It may have taken the name.
			_, err := n.podman(ctx, "untag", id)
			wrong = append(wrong, errors.Join(fmt.Errorf("%s holds %s, not %s", file, digest, i.Digest), err))
		default:
			_, err := n.podman(ctx, "tag", id, i.Name)
			return file, err
		}
	}
	return "", errors.Join(wrong...)
}

// archives are the files on this node that should hold the image: of its
// releases, and of its operating system image, whose digest nobody has noted.
func archives(root string, releases map[string]*provision.Release, image provision.OCIImage) (out []stored) {
	dir := filepath.Join(root, ReleasesDir)
	for _, digest := range slices.Sorted(maps.Keys(releases)) {
		r := releases[digest]
		for _, c := range r.Stack.Components {
			for _, i := range c.Images {
				k := slices.IndexFunc(r.Files, func(f provision.ReleaseFile) bool { return f.Kind == provision.FileImage && f.Name == i.ReleaseName() })
				if i.Digest == image.Digest && k >= 0 {
					out = append(out, stored{r.Files[k], ReleaseFile(dir, digest, i.ReleaseName())})
				}
			}
		}
	}
	brought := filepath.Join(root, imagesDir, image.ReleaseName())
	if _, err := os.Stat(brought); err == nil {
		out = append(out, stored{path: brought})
	}
	return out
}

func notArchived(i provision.OCIImage) error {
	return fmt.Errorf("%s is in no release on this node and not in %s", i.ReleaseName(), imagesDir)
}

// archived tells why the node could not import the image; nil: it can.
func archived(root string, releases map[string]*provision.Release, i provision.OCIImage) error {
	wrong := []error{notArchived(i)}
	for _, a := range archives(root, releases, i) {
		if a.Digest == "" {
			return nil // podman will hash it
		}
		err := a.verify()
		if err == nil {
			return nil
		}
		wrong = append(wrong[1:], err)
	}
	return errors.Join(wrong...)
}

// syncTree writes the file system that dir is on to its disk.
func syncTree(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}
