package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// webRecipe has a web part whose only package, client, comes as a file: npm
// needs no registry. The hash in its lock file is sum, or the right one.
func webRecipe(t *testing.T, sum string) fstest.MapFS {
	t.Helper()
	var tgz bytes.Buffer
	z := gzip.NewWriter(&tgz)
	w := tar.NewWriter(z)
	content := map[string]string{
		"package.json": `{"name": "client", "version": "1.0.0", "scripts": {"install": "touch ran"}}`, "LICENSE.md": "free", "README.md": "read me",
		"dist/client.min.js": "run()", "dist/client.min.js.map": "{}", "dist/client.js": "// all of it",
		"dist/locales/de.js": "ja", "dist/locales/de.js.map": "{}", "dist/locales/de.d.ts": "x", "dist/locales/deep/fr.js": "oui",
	}
	for _, name := range slices.Sorted(maps.Keys(content)) {
		if err := w.WriteHeader(&tar.Header{Name: "package/" + name, Mode: 0o600, Size: int64(len(content[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if sum == "" {
		b := sha512.Sum512(tgz.Bytes())
		sum = "sha512-" + base64.StdEncoding.EncodeToString(b[:])
	}
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	return fstest.MapFS{
		"packages":         file("base-files # everything else\n"),
		"web/client.tgz":   file(tgz.String()),
		"web/package.json": file(`{"name": "web", "dependencies": {"client": "file:client.tgz"}}`),
		"web/package-lock.json": file(fmt.Sprintf(`{"name": "web", "lockfileVersion": 3, "requires": true, "packages": {
			"": {"name": "web", "dependencies": {"client": "file:client.tgz"}},
			"node_modules/client": {"version": "1.0.0", "resolved": "file:client.tgz", "integrity": %q, "hasInstallScript": true}}}`, sum)),
		"web/files": file("# from, to\nclient/dist/client.min.js chat/client.js # renamed\nclient/dist/locales chat/locales\n"),
	}
}

// webBuild is a build with a scratch folder, and npm with a home of its own.
func webBuild(t *testing.T) (BuildOptions, *scratch, *strings.Builder) {
	t.Helper()
	if _, err := exec.LookPath("npm"); err != nil {
		t.Fatal("npm is missing: install Node.js with npm (on Debian: apt install npm)")
	}
	t.Setenv("HOME", t.TempDir())
	var said strings.Builder
	o := BuildOptions{Name: "test", WorkDir: t.TempDir(), Out: &said}
	work, err := newScratch(o.WorkDir, o.Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(work.remove)
	return o, work, &said
}

// npm itself fetches the packages; what is named and the licences are taken, the
// rest is not, and no script of a package runs.
func TestWeb(t *testing.T) {
	o, work, said := webBuild(t)
	r := recipe{files: webRecipe(t, "")}
	var log strings.Builder
	dir, err := o.web(context.Background(), work, r, &log)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if info, err := d.Info(); err != nil || info.Mode() != 0o644 {
			t.Errorf("%s has mode %v, %v", path, info.Mode(), err)
		}
		b, err := os.ReadFile(path)
		got[strings.TrimPrefix(path, dir+"/")] = string(b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"chat/client.js": "run()", "chat/locales/de.js": "ja", "chat/locales/deep/fr.js": "oui", "licences/client/LICENSE.md": "free"}
	if !maps.Equal(got, want) {
		t.Errorf("the image gets %v, want %v", got, want)
	}
	if _, err := os.Stat(filepath.Join(work.dir, "npm/node_modules/client/ran")); err == nil {
		t.Error("a script of a package has run")
	}
	if !strings.Contains(log.String(), "added 1 package") {
		t.Errorf("the build log lacks what npm says: %q", &log)
	}

	// The same part once more needs no npm; another one does.
	t.Setenv("PATH", "")
	said.Reset()
	if again, err := o.web(context.Background(), work, r, io.Discard); err != nil || again != dir || !strings.Contains(said.String(), "reused") {
		t.Errorf("once more: %s, %v, said %q", again, err, said)
	}
	other := webRecipe(t, "sha512-other")
	_, err = o.web(context.Background(), work, recipe{files: other}, io.Discard)
	wantError(t, err, "image test was not built", "npm", "install Node.js with npm", "apt install npm")

	// What is hashed is all of it, so an image is not reused after a change.
	one, err1 := o.inputs(r, secretKey{}, nil)
	two, err2 := o.inputs(recipe{files: other}, secretKey{}, nil)
	if err1 != nil || err2 != nil || one == two {
		t.Errorf("inputs with another lock file of npm: %s, %s, %v, %v", one, two, err1, err2)
	}

	plain := recipe{files: fstest.MapFS{"packages": r.files.(fstest.MapFS)["packages"]}}
	if dir, err := o.web(context.Background(), work, plain, io.Discard); dir != "" || err != nil {
		t.Errorf("a recipe without a web part: %q, %v", dir, err)
	}
}

// What does not have the locked hash is refused, and nothing is kept of it.
func TestWebRefused(t *testing.T) {
	o, work, _ := webBuild(t)
	wrong := sha512.Sum512([]byte("something else"))
	_, err := o.web(context.Background(), work, recipe{files: webRecipe(t, "sha512-"+base64.StdEncoding.EncodeToString(wrong[:]))}, io.Discard)
	wantError(t, err, "image test was not built", "npm could not fetch", "EINTEGRITY")

	modules := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(modules, "client"), 0o755), os.WriteFile(filepath.Join(modules, "client/x.js"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"client/gone.js chat/x.js":   "gone.js",
		"client/x.js":                "want 'from to'",
		"client/x.js ../x.js":        "want 'from to'",
		"../client/x.js chat/x.js":   "want 'from to'",
		"client/x.js chat/x.js more": "want 'from to'",
	} {
		wantError(t, pickWeb(modules, []string{"client/x.js chat/x.js", line}, t.TempDir()), webFiles, want)
	}
	work.remove()
	if kept, err := filepath.Glob(filepath.Join(o.WorkDir, "*")); err != nil || len(kept) != 1 {
		t.Errorf("beside the lock of the scratch folder there is %v, %v", kept, err)
	}
}

// The recipe's lock file pins every package by its hash and names no registry.
func TestWebRecipe(t *testing.T) {
	r, err := openRecipe("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string, v any) {
		t.Helper()
		b, err := fs.ReadFile(r.files, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if strings.Contains(string(b), "://") {
			t.Errorf("%s names an address", name)
		}
	}
	var named struct{ Dependencies map[string]string }
	read("web/package.json", &named)
	var lock struct {
		Packages map[string]struct {
			Version, Resolved, Integrity string
			Link                         bool
		}
	}
	read("web/package-lock.json", &lock)
	exact := regexp.MustCompile(`^\d+\.\d+\.\d+$`)
	for name, version := range named.Dependencies {
		if !exact.MatchString(version) || lock.Packages["node_modules/"+name].Version != version {
			t.Errorf("%s is wanted in version %q and locked to %q", name, version, lock.Packages["node_modules/"+name].Version)
		}
	}
	linked := map[string]bool{} // parts of another package, pinned with it
	for _, p := range lock.Packages {
		linked[p.Resolved] = p.Link
	}
	for path, p := range lock.Packages {
		if path != "" && !p.Link && !linked[path] && !strings.HasPrefix(p.Integrity, "sha512-") {
			t.Errorf("%s is not pinned by a hash", path)
		}
	}
}
