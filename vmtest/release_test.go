//go:build e2e

package vmtest_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
)

// storeCopy is a store with what the built one has, by hard links, and a new key.
func storeCopy(t *testing.T) (store, key string) {
	t.Helper()
	dir, err := os.MkdirTemp("../build", "store-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	store, key = filepath.Join(dir, "store"), filepath.Join(dir, "key")
	for _, args := range [][]string{
		{"mkdir", store},
		{"sh", "-c", `cp -al ../build/store/. "$1" || cp -a ../build/store/. "$1"`, "sh", store},
		{"../bin/platter", "image", "keygen", "--store", store, key},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	return store, key
}

// release builds a release of the built-in stack with packages that only install
// one file of that many random bytes each.
func (r *rig) release(key, version string, files map[string]int) provision.StoredRelease {
	r.t.Helper()
	dir := filepath.Join(r.dir, "stack-"+version)
	r.platter("stack", "export", dir)
	text, err := os.ReadFile(filepath.Join(dir, "stack.yaml"))
	if err != nil {
		r.t.Fatal(err)
	}
	var names []string
	for name, size := range files {
		tree := filepath.Join(r.t.TempDir(), name)
		r.run("mkdir", "-p", tree+"/DEBIAN", tree+"/usr/share/platter-test", dir+"/packages")
		b := make([]byte, size)
		rand.Read(b)
		if err := os.WriteFile(tree+"/usr/share/platter-test/"+name, b, 0o644); err != nil {
			r.t.Fatal(err)
		}
		control := "Package: " + name + "\nVersion: 1.0\nArchitecture: all\nMaintainer: a test <test@example.org>\nDescription: nothing\n"
		if err := os.WriteFile(tree+"/DEBIAN/control", []byte(control), 0o644); err != nil {
			r.t.Fatal(err)
		}
		r.run("dpkg-deb", "-Znone", "--build", tree, dir+"/packages")
		names = append(names, name)
	}
	slices.Sort(names)
	i := strings.Index(string(text), "\nversion:")
	if i < 0 {
		r.t.Fatalf("the built-in stack has no version:\n%s", text)
	}
	_, rest, _ := strings.Cut(string(text[i+1:]), "\n")
	changed := string(text[:i]) + "\nversion: \"" + version + "\"\n" + rest +
		"\n  - {name: extra, kind: packages, optional: true, packages: [" + strings.Join(names, ", ") + "]}\n"
	if err := os.WriteFile(filepath.Join(dir, "stack.yaml"), []byte(changed), 0o644); err != nil {
		r.t.Fatal(err)
	}
	r.t.Log(r.platter("stack", "build", "-f", dir, "--offline", "--complete=false", "--store", r.store, "--key", key, "--work", filepath.Join(r.dir, "work")))
	for _, s := range r.releases() {
		if s.Version == version {
			return s
		}
	}
	r.t.Fatalf("release %s is not listed", version)
	return provision.StoredRelease{}
}

func (r *rig) releases() (list []provision.StoredRelease) {
	r.t.Helper()
	if err := json.Unmarshal([]byte(r.stack("releases", "-o", "json")), &list); err != nil {
		r.t.Fatal(err)
	}
	return list
}

// inode tells a file that was replaced from one that was left.
func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Ino
}

// TestStackStage: a release comes onto the disks of two nodes; a bit that flips
// there is put right; one more release comes although its disc is taken out and
// the node loses power meanwhile.
func TestStackStage(t *testing.T) {
	store, key := storeCopy(t)
	r, boxes := boxRackOn(t, store, 2)
	two := r.release(key, "2", map[string]int{"platter-one": 1 << 20, "platter-two": 300_000})
	for _, b := range boxes {
		b.on()
	}
	t.Log(r.stack("stage"))
	check := func(rel provision.StoredRelease, want ...string) {
		t.Helper()
		for _, s := range r.releases() {
			if s.Digest == rel.Digest && !slices.Equal(s.Nodes, want) {
				t.Errorf("release %s is on %v, want %v", s.Version, s.Nodes, want)
			}
		}
	}
	check(two, "node1", "node2")
	path := func(b *box, rel provision.StoredRelease, name string) string {
		return filepath.Join(b.dir, "root/var/lib/platter/stack", rel.Digest, name)
	}
	const one, other = "files/platter-one_1.0_all.deb", "files/platter-two_1.0_all.deb"
	want := boxes[0].sh("cd /var/lib/platter/stack/" + two.Digest + " && [ -e complete ] && sha256sum files/*")

	kept := []uint64{inode(t, path(boxes[0], two, other)), inode(t, path(boxes[1], two, one)), inode(t, path(boxes[1], two, other))}
	boxes[0].sh(`f=/var/lib/platter/stack/` + two.Digest + `/` + one + `
printf '\377\000\377\000\377\000\377\000' | dd of=$f bs=1 seek=500000 conv=notrunc status=none`)
	if now := boxes[0].sh("cd /var/lib/platter/stack/" + two.Digest + " && sha256sum files/*"); now == want {
		t.Fatal("nothing was damaged")
	}
	t.Log(r.stack("stage", "2"))
	if now := boxes[0].sh("cd /var/lib/platter/stack/" + two.Digest + " && [ -e complete ] && sha256sum files/*"); now != want {
		t.Errorf("after staging again there is\n%s\ninstead of\n%s", now, want)
	}
	if now := []uint64{inode(t, path(boxes[0], two, other)), inode(t, path(boxes[1], two, one)), inode(t, path(boxes[1], two, other))}; !slices.Equal(now, kept) {
		t.Errorf("files that were right were replaced: inodes %v, before %v", now, kept)
	}

	// The disc is taken out: the largest file cannot be read.
	three := r.release(key, "3", map[string]int{"platter-one": 4 << 20, "platter-three": 1000})
	var manifest provision.Release
	text, err := os.ReadFile(filepath.Join(store, "objects", three.Digest))
	if err == nil {
		err = json.Unmarshal(text, &manifest)
	}
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(manifest.Files, func(f provision.ReleaseFile) bool { return f.Package == "platter-one" })
	object := filepath.Join(store, "objects", manifest.Files[i].Digest)
	if err := os.Rename(object, object+".out"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	o, err := r.op.Order(ctx, "node1", provision.OrderStage, three.ReleaseRef, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	waited := func() string {
		for o, err := range r.op.FollowOrder(ctx, o.ID) {
			if err != nil || o.State.Final() {
				t.Fatalf("the order ended without the disc: %+v, %v", o, err)
			}
			if strings.HasPrefix(o.Line, "waits for the disc host: ") {
				return o.Line
			}
		}
		t.Fatal("nothing more is said of the order")
		return ""
	}
	t.Log(waited())
	boxes[0].off()
	boxes[0].on()
	if err := os.Rename(object+".out", object); err != nil {
		t.Fatal(err)
	}
	for o, err = range r.op.FollowOrder(ctx, o.ID) {
		if err != nil {
			t.Fatal(err)
		}
	}
	if o.State != provision.OrderDone {
		t.Fatalf("after the disc was back: %+v", o)
	}
	boxes[0].sh("[ -e /var/lib/platter/stack/" + three.Digest + "/complete ]")
	t.Log(r.stack("stage"))
	check(three, "node1", "node2")
}
