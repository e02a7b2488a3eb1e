package images

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"platter/provision"
)

// makeDeb builds a package with one file, with Debian's own tool.
func makeDeb(t *testing.T, dir, name, version, arch, depends string) string {
	t.Helper()
	tree := t.TempDir()
	control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: a test <test@example.org>\nDescription: nothing\n that matters\n", name, version, arch)
	if depends != "" {
		control += "Depends: " + depends + "\n"
	}
	for file, text := range map[string]string{"DEBIAN/control": control, "usr/share/" + name: version + "\n"} {
		path := filepath.Join(tree, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// Its name says nothing.
	file := filepath.Join(dir, fmt.Sprintf("%s-%s.deb", name, strings.ReplaceAll(version, ":", "-")))
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", tree, file).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	return file
}

// releaseLab is a store with a key and an image that has the packages base and
// tool, and a folder for a stack.
type releaseLab struct {
	*testing.T
	o   ReleaseOptions
	out bytes.Buffer
}

func newReleaseLab(t *testing.T) *releaseLab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("a release can only be built as root: run the tests as root")
	}
	s, _ := testStore(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	if err := GenerateKey(file); err != nil {
		t.Fatal(err)
	}
	if err := s.Trust(file + ".pub"); err != nil {
		t.Fatal(err)
	}
	key, err := s.readSecretKey(file)
	if err != nil {
		t.Fatal(err)
	}
	status := ""
	for _, name := range []string{"base", "tool"} {
		status += fmt.Sprintf("Package: %s\nStatus: install ok installed\nArchitecture: all\nMaintainer: x <x@example.org>\nVersion: 1.0\nProvides: %s-abi\nDescription: x\n\n", name, name)
	}
	root, part := filepath.Join(dir, "root"), filepath.Join(dir, "root.part")
	if err := os.MkdirAll(filepath.Join(root, "var/lib/dpkg"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), []byte(status), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := makeRoot(t.Context(), root, part, testDate); err != nil {
		t.Fatal(err)
	}
	im := &provision.Image{Format: provision.ImageFormat, Name: "debian-13", Version: "1", Packages: map[string]string{"base": "1.0", "tool": "1.0"}}
	if im.Pack, im.Parts, err = s.pack(t.Context(), []source{{provision.PartRoot, part}}, func(int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.publish(im.Name, im, "", key); err != nil {
		t.Fatal(err)
	}
	l := &releaseLab{T: t}
	l.o = ReleaseOptions{Store: s, Dir: filepath.Join(dir, "stack"), Image: "debian-13", Offline: true, LockFile: filepath.Join(dir, "lock"),
		SecretKey: file, WorkDir: filepath.Join(dir, "work"), Suite: "trixie", Out: &l.out}
	if err := os.MkdirAll(filepath.Join(l.o.Dir, "board"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.o.Dir, "board/board.oci.tar"), []byte("layers"), 0o644); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *releaseLab) stack(version string, packages ...string) {
	c := provision.Component{Name: "a", Kind: provision.KindPackages}
	for _, p := range packages {
		name, v, _ := strings.Cut(p, "=")
		c.Packages = append(c.Packages, provision.Package{Name: name, Version: v})
	}
	l.o.Stack = &provision.Stack{Name: "im", Version: version, Components: []provision.Component{c,
		{Name: "b", Kind: provision.KindCompose, Images: []provision.OCIImage{{Name: "localhost/board:1", File: "board/board.oci.tar"}}},
		{Name: "c", Kind: provision.KindPackages, Packages: []provision.Package{{Name: "base"}}}}}
}

func (l *releaseLab) build() *BuiltRelease {
	l.Helper()
	b, err := BuildRelease(context.Background(), l.o)
	if err != nil {
		l.Fatalf("%v\n%s", err, l.out.Bytes())
	}
	return b
}

func (l *releaseLab) packages() string { return filepath.Join(l.o.Dir, PackagesFolder) }

func names(r *provision.Release) (out []string) {
	for _, f := range r.Files {
		out = append(out, fmt.Sprintf("%s %s %s %s", f.Name, f.Kind, f.Component, f.Version))
	}
	return out
}

func TestBuildRelease(t *testing.T) {
	t.Parallel()
	l := newReleaseLab(t)
	makeDeb(t, l.packages(), "tool", "1:2.0", "amd64", "helper (>= 1) | nothing, base-abi")
	makeDeb(t, l.packages(), "helper", "1.0", "all", "")
	l.stack("1.0", "tool=1:2.0")
	b := l.build()
	want := []string{"Packages index  ", "Release index  ", "board_board.oci.tar image b ", "helper_1.0_all.deb package a 1.0", "tool_2.0_amd64.deb package a 1:2.0"}
	if got := names(b.Release); !slices.Equal(got, want) {
		t.Errorf("the release has %q, want %q", got, want)
	}
	if got := b.Release.Stack.Components[2].Packages[0].Version; got != "1.0" {
		t.Errorf("base, which the image has, is %q in the release", got)
	}
	if l.o.Stack.Components[2].Packages[0].Version != "" {
		t.Error("the stack itself was changed")
	}
	ref, r, err := l.o.Store.Release("")
	if err != nil || ref != b.Ref || r.Version != "1.0" {
		t.Fatalf("the newest release is %v, %v", ref, err)
	}
	if err := l.o.Store.Verify(t.Context(), "stack@1.0", nil); err != nil {
		t.Error(err)
	}

	// The same again, elsewhere and later.
	l.o.WorkDir = t.TempDir()
	for _, f := range []string{"tool-1-2.0.deb", "helper-1.0.deb"} {
		path := filepath.Join(l.packages(), f)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		os.Remove(path)
		if err := os.WriteFile(filepath.Join(l.packages(), "other-"+f), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if again := l.build(); again.Ref != b.Ref {
		t.Errorf("the same inputs make %v and %v", b.Ref, again.Ref)
	}
	readByApt(t, l.o.Store, b.Release)

	// Other content needs another version. From here on without packages: apt is
	// not asked.
	if err := os.RemoveAll(l.packages()); err != nil {
		t.Fatal(err)
	}
	l.stack("1.0", "tool")
	l.o.Stack.Components[0].About = "changed"
	_, err = BuildRelease(t.Context(), l.o)
	wantError(t, err, "release 1.0", "with other content", "raise the version", "--replace")
	l.o.Replace = true
	if b2 := l.build(); b2.Ref == b.Ref {
		t.Error("other inputs make the same release")
	}
	for _, v := range []string{"1.10", "1.9"} {
		l.stack(v, "tool")
		l.build()
	}
	if ref, _, err := l.o.Store.Release(""); err != nil || ref.Version != "1.10" {
		t.Errorf("the newest release is %v, %v", ref, err)
	}
	list, err := l.o.Store.Releases()
	var have []string
	for _, r := range list {
		have = append(have, r.Version)
	}
	if err != nil || !slices.Equal(have, []string{"1.10", "1.9", "1.0"}) {
		t.Errorf("releases: %v, %v", have, err)
	}
	if list[0].Files != 3 || list[0].Size == 0 || list[0].Built.IsZero() || !slices.Equal(list[0].Components, []string{"a", "b", "c"}) {
		t.Errorf("listed as %+v", list[0])
	}
	_, _, err = l.o.Store.Release("7")
	wantError(t, err, `no release "7"`, "1.10, 1.9", "platter stack build")

	// One damaged byte, one missing file.
	i := slices.IndexFunc(r.Files, func(f provision.ReleaseFile) bool { return f.Kind == provision.FileImage })
	object := l.o.Store.objectPath(r.Files[i].Digest)
	damage(t, object, 3)
	wantError(t, l.o.Store.Verify(t.Context(), "stack", nil), "board_board.oci.tar", "is damaged", "copy the disc again")
	if err := os.Remove(object); err != nil {
		t.Fatal(err)
	}
	_, _, err = l.o.Store.Release("1.9")
	wantError(t, err, "board_board.oci.tar", "is missing")
}

// readByApt has apt install from the files of the release as they lie on a
// node.
func readByApt(t *testing.T, s *Store, r *provision.Release) {
	t.Helper()
	dir, files := t.TempDir(), t.TempDir()
	for _, d := range []string{"etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "var/lib/dpkg"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range r.Files {
		if err := os.Symlink(s.objectPath(f.Digest), filepath.Join(files, f.Name)); err != nil {
			t.Fatal(err)
		}
	}
	status := "Package: base\nStatus: install ok installed\nArchitecture: all\nMaintainer: x <x@example.org>\nVersion: 1.0\nProvides: base-abi\nDescription: x\n"
	for name, text := range map[string]string{"etc/apt/sources.list": "deb [trusted=yes] file:" + files + " ./\n", "var/lib/dpkg/status": status} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	apt := func(args ...string) string {
		cmd := exec.Command("apt-get", append([]string{"-o", "Dir=" + dir, "-o", "Dir::State::status=" + dir + "/var/lib/dpkg/status", "-o", "APT::Architecture=amd64", "-o", "APT::Sandbox::User=root"}, args...)...)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		if err != nil || bytes.Contains(out, []byte("W:")) {
			t.Errorf("apt-get %s: %v\n%s", args[0], err, out)
		}
		return string(out)
	}
	apt("update")
	if out := apt("install", "-y", "--download-only", "tool=1:2.0"); !strings.Contains(out, "helper") {
		t.Errorf("apt takes other packages:\n%s", out)
	}
	if out := apt("install", "-s", "tool=1:2.0"); !strings.Contains(out, "Inst helper (1.0") || !strings.Contains(out, "Inst tool (1:2.0") {
		t.Errorf("apt installs something else:\n%s", out)
	}
}

func TestBuildReleaseRefuses(t *testing.T) {
	t.Parallel()
	l := newReleaseLab(t)
	refs := func() string { names, _ := l.o.Store.Refs(); return strings.Join(names, " ") }
	try := func(parts ...string) {
		t.Helper()
		_, err := BuildRelease(t.Context(), l.o)
		wantError(t, err, parts...)
		if refs() != "debian-13" {
			t.Errorf("the store has %s", refs())
		}
	}
	l.o.Complete = true
	l.stack("1", "tool=3.0", "unheard")
	makeDeb(t, l.packages(), "tool", "2.0", "amd64", "")
	try("component a: the package tool=3.0 is not to be had, there are: 2.0", "component a: the package unheard is not to be had, there is none",
		"component c: the package base=1.0", "the image debian-13 has it", "--complete=false", "folder packages")
	l.o.Complete = false

	l.stack("1", "tool=2.0")
	stray := makeDeb(t, l.packages(), "stray", "1.0", "all", "")
	try(stray, "needed by no component")
	os.Remove(stray)

	arm := makeDeb(t, l.packages(), "arm", "1.0", "arm64", "")
	junk, text := filepath.Join(l.packages(), "junk.deb"), filepath.Join(l.packages(), "README")
	for _, f := range []string{junk, text} {
		if err := os.WriteFile(f, []byte("hello"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	try(arm+" is for arm64", junk+" is no sound Debian package", text+" is no .deb")
	for _, f := range []string{arm, junk, text} {
		os.Remove(f)
	}

	os.Remove(filepath.Join(l.packages(), "tool-2.0.deb"))
	makeDeb(t, l.packages(), "tool", "2.0", "amd64", "missing-library")
	try("apt finds no way", "missing-library")

	l.o.Image = "debian-14"
	try("debian-14")
	l.o.Image = "debian-13"
	other := filepath.Join(t.TempDir(), "other")
	if err := GenerateKey(other); err != nil {
		t.Fatal(err)
	}
	l.o.SecretKey = other
	try("does not trust the key")
}

// A release is complete where the image's version of a named package is there
// too, and the lock holds what came from elsewhere.
func TestBuildReleaseCompleteAndLocked(t *testing.T) {
	t.Parallel()
	l := newReleaseLab(t)
	l.o.Complete = true
	l.stack("1", "tool")
	// What a mirror has; base in two versions.
	mirror := t.TempDir()
	var debs []deb
	for _, d := range [][3]string{{"base", "1.0"}, {"base", "1.5"}, {"tool", "1.0"}, {"tool", "2.0", "extra"}, {"extra", "5"}} {
		made, err := readDeb(t.Context(), makeDeb(t, filepath.Join(mirror, "made"), d[0], d[1], "all", d[2]))
		if err != nil {
			t.Fatal(err)
		}
		debs = append(debs, made)
	}
	if err := writeArchive(filepath.Join(mirror, "archive"), debs); err != nil {
		t.Fatal(err)
	}
	l.o.Offline, l.o.Mirrors = false, []string{"deb [trusted=yes] copy:" + filepath.Join(mirror, "archive") + " ./"}
	l.o.Frozen = true
	_, err := BuildRelease(t.Context(), l.o)
	wantError(t, err, "nothing to be frozen to")
	l.o.Frozen = false
	b := l.build()
	want := []string{"Packages index  ", "Release index  ", "base_1.0_all.deb package c 1.0", "board_board.oci.tar image b ", "tool_1.0_all.deb package a 1.0"}
	if got := names(b.Release); !slices.Equal(got, want) {
		t.Errorf("the release has %q, want %q", got, want)
	}
	lock, err := os.ReadFile(l.o.LockFile)
	if err != nil || !strings.Contains(string(lock), "base 1.0\ntool 1.0\n") {
		t.Errorf("the lock file: %v\n%s", err, lock)
	}
	l.stack("2", "tool=2.0")
	l.o.Frozen = true
	_, err = BuildRelease(t.Context(), l.o)
	wantError(t, err, "release 2", "without --frozen")
	l.o.Frozen = false
	b = l.build()
	want = []string{"Packages index  ", "Release index  ", "base_1.0_all.deb package c 1.0", "board_board.oci.tar image b ", "extra_5_all.deb package a 5", "tool_2.0_all.deb package a 2.0"}
	if got := names(b.Release); !slices.Equal(got, want) {
		t.Errorf("the release has %q, want %q", got, want)
	}
	if len(b.Changes) != 2 || !strings.Contains(l.out.String(), "tool: 1.0 -> 2.0") || !strings.Contains(l.out.String(), "extra: new, 5") {
		t.Errorf("changes: %v\n%s", b.Changes, l.out.Bytes())
	}
}
