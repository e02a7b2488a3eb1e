package stackfile

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"platter/provision"
	"platter/provision/yamlfile"
)

// archive is an OCI archive that a test can spoil.
type archive struct {
	names []string
	files map[string][]byte
	// Digests of its parts.
	manifest, config, layer string
}

func (a *archive) add(name string, content []byte) {
	a.names = append(a.names, name)
	a.files[name] = content
}

func (a *archive) blob(content []byte) (digest string) {
	sum := sha256.Sum256(content)
	a.add("blobs/sha256/"+hex.EncodeToString(sum[:]), content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func newArchive() *archive {
	a := &archive{files: map[string][]byte{}}
	config, layer := []byte(`{"architecture":"amd64"}`), bytes.Repeat([]byte("layer "), 10000)
	a.config, a.layer = a.blob(config), a.blob(layer)
	manifest, _ := json.Marshal(map[string]any{"schemaVersion": 2,
		"config": descriptor{"application/vnd.oci.image.config.v1+json", a.config, int64(len(config))},
		"layers": []descriptor{{"application/vnd.oci.image.layer.v1.tar", a.layer, int64(len(layer))}}})
	a.manifest = a.blob(manifest)
	index, _ := json.Marshal(map[string]any{"schemaVersion": 2,
		"manifests": []descriptor{{"application/vnd.oci.image.manifest.v1+json", a.manifest, int64(len(manifest))}}})
	a.add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	a.add("index.json", index)
	return a
}

func blobFile(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

func (a *archive) bytes(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range a.names {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(a.files[name]))}); err != nil {
			t.Fatal(err)
		}
		w.Write(a.files[name])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func writeFile(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// goodStack is testdata/good with its container image.
func goodStack(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "stack")
	if err := os.CopyFS(dir, os.DirFS("testdata/good")); err != nil {
		t.Fatal(err)
	}
	a := newArchive()
	writeFile(t, dir, "board.oci.tar", string(a.bytes(t)))
	text, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir, FileName, strings.ReplaceAll(string(text), "@DIGEST@", a.manifest))
	return dir
}

func TestEveryKeyIsRead(t *testing.T) {
	dir := goodStack(t)
	got, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	text := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	images := []provision.OCIImage{{Name: "localhost/board:1", File: "board.oci.tar", Digest: newArchive().manifest}}
	want := &provision.Stack{Name: "im", Version: "1.2-3", Components: []provision.Component{
		{Name: "etcd", About: "elects the database's primary", Kind: provision.KindPackages,
			Packages: []provision.Package{{Name: "etcd-server"}, {Name: "etcd-client", Version: "3.5.16-4"}},
			Place:    provision.Placement{Role: "storage", Count: 3, Odd: true}, Units: []string{"etcd.service"},
			Ports:  []provision.Port{{Name: "client", Number: 2379}, {Name: "metrics", Number: 2381, Local: true}, {Name: "gossip", Number: 2379, UDP: true}},
			Health: provision.Health{TCP: `127.0.0.1:{{.Port "etcd" "client"}}`}, Data: []string{"/var/lib/etcd"}, Member: provision.MemberEtcd,
			Files: []provision.StackFile{{Path: "/etc/default/etcd", Template: text("etcd/etcd.env"), Mode: 0o640, Owner: "root", Group: "etcd", Reload: true}}},
		{Name: "db", Kind: provision.KindPackages, Packages: []provision.Package{{Name: "patroni"}}, Needs: []string{"etcd"},
			Place: provision.Placement{Role: "storage"}, Units: []string{"patroni.service"}, Ports: []provision.Port{{Name: "sql", Number: 5432}},
			Member: provision.MemberPatroni, Secrets: []provision.Secret{{Name: "patroni-replication", Length: 40}},
			Files:    []provision.StackFile{{Path: "/etc/patroni/config.yml", Template: text("patroni.yml"), Mode: 0o640, Group: "postgres"}},
			Upgrade:  []provision.Command{{Args: []string{"psql", "-c", "ALTER EXTENSION pg_trgm UPDATE -- {{.Node}}"}, User: "postgres", Once: true, After: true}},
			Rollback: []provision.Command{{Args: []string{"patronictl", "reinit"}}}},
		{Name: "board", About: "shows what happens", Kind: provision.KindCompose, Images: images, Manifest: text("compose.yaml"), Units: []string{"board_board.service"},
			Needs: []string{"db", "etcd"}, Optional: true, Place: provision.Placement{Count: 1}, Ports: []provision.Port{{Name: "web", Number: 8088}},
			Health: provision.Health{URL: `http://{{.Address}}:{{.Port "board" "web"}}/`}, Secrets: []provision.Secret{{Name: "board", Length: 32}},
			Files: []provision.StackFile{{Path: "/etc/board.env", Template: text("board.env"), Mode: 0o600}}},
		{Name: "pod", Kind: provision.KindKube, Images: images, Manifest: text("pod.yaml"), Units: []string{"pod_pod.service"}, Optional: true},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// All mistakes come at once, each at its own place, those of the files beside
// the stack file after its own.
func TestEveryMistakeIsNamedWithItsPlace(t *testing.T) {
	_, err := Load("testdata/mistakes")
	var got yamlfile.Problems
	if !errors.As(err, &got) {
		t.Fatalf("want problems, got %v", err)
	}
	var lines []string
	for _, p := range got {
		p.File = strings.TrimPrefix(p.File, "testdata/mistakes/")
		lines = append(lines, strings.TrimPrefix(p.String(), "stack.yaml:"))
	}
	want, err := os.ReadFile("testdata/mistakes.txt")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(strings.TrimSpace(string(want)), "\n"), lines); d != "" {
		t.Errorf("mistakes (-want +got): %s", d)
	}
}

func TestDefault(t *testing.T) {
	s, err := Default()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "new")
	if err := Export(dir); err != nil {
		t.Fatal(err)
	}
	exported, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s, exported); d != "" {
		t.Error("what is exported is another stack:", d)
	}
	writeFile(t, dir, FileName, "mine")
	if err := Export(dir); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("exported over somebody's work: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, FileName)); string(b) != "mine" {
		t.Error("somebody's work is gone")
	}
	if err := Export(filepath.Join(dir, FileName)); err == nil {
		t.Error("exported into a file")
	}
}

// small is a stack of components with nothing but names and needs.
func small(t *testing.T, components string, files map[string]string) (*provision.Stack, error) {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, dir, FileName, "name: s\nversion: 1\ncomponents:\n"+components)
	for name, text := range files {
		writeFile(t, dir, name, text)
	}
	return Load(dir)
}

func TestOrder(t *testing.T) {
	for in, want := range map[string]string{
		"a b c":                      "a b c",
		"c b a":                      "c b a", // as in the file
		"a:c b c":                    "b c a",
		"a:d b:c c d":                "c b d a",
		"a:b,c b:c c:d d e":          "d c b a e",
		"a:b b:a":                    "a needs b needs a",
		"a:a":                        "a needs a",
		"a:b b:c c:a d:a":            "a needs b needs c needs a",
		"x:a a:b b:c c:b y:z z:y":    "b needs c needs b|y needs z needs y",
		"a:b b:c,d c:d d:e e f:e,a ": "e d c b a f",
	} {
		t.Run(in, func(t *testing.T) {
			var yaml strings.Builder
			for _, c := range strings.Fields(in) {
				name, needs, _ := strings.Cut(c, ":")
				fmt.Fprintf(&yaml, "  - {name: %s, kind: packages, packages: [x1], needs: [%s]}\n", name, needs)
			}
			s, err := small(t, yaml.String(), nil)
			if strings.Contains(want, "needs") {
				for _, cycle := range strings.Split(want, "|") {
					if err == nil || !strings.Contains(err.Error(), "no component can be the first to start: "+cycle+"\n") && !strings.HasSuffix(err.Error(), ": "+cycle) {
						t.Errorf("error is %v, want one that says %s", err, cycle)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range s.Components {
				got = append(got, c.Name)
			}
			if strings.Join(got, " ") != want {
				t.Errorf("order is %v, want %s", got, want)
			}
		})
	}
}

// What a template does wrong only on some nodes or in some racks is found too.
func TestTrial(t *testing.T) {
	const components = `
  - {name: db, kind: packages, packages: [x1], place: {role: storage, count: 2}, ports: [{name: sql, number: 5432}]}
  - {name: mq, kind: packages, packages: [x1], optional: true, needs: [io]}
  - {name: io, kind: packages, packages: [x1], optional: true}
  - {name: a, kind: packages, packages: [x1], files: [{path: /etc/a, from: a.conf}]}
`
	for template, want := range map[string]string{
		`{{.Port "db" "sql"}}{{if .Has "mq"}}{{.Members "io"}}{{end}}`: "",
		"\n{{range .Members \"mq\"}}{{end}}":                           `a.conf:2:9: at <.Members>: there is no component "mq"`,    // it is optional
		`{{if .Has "io"}}{{.Members "mq"}}{{end}}`:                     `there is no component "mq"`,                               // io alone
		`{{if not (.Has "io")}}{{.Members "mq"}}{{end}}`:               `there is no component "mq"`,                               // none
		`{{(index (.Members "db") 1).Name}}`:                           "index out of range",                                       // a rack of one node
		"{{if eq .Node \"node3\"}}\n{{.Port \"db\" \"x\"}}{{end}}":     `a.conf:2:3: at <.Port>: the component db has no port "x"`, // there is no db on it
		`{{.Secret "x"}}`:  `the secret "x" is not among those`,
		`{{template "x"}}`: `a.conf:1:12: at <{{template "x"}}>: template "x" not defined`,
		`{{define "x"}}{{.Nod}}{{end}}{{template "x" .}}`: `a.conf:1:17: at <.Nod>: can't evaluate field Nod`,
		`{{nothing}}`: `a.conf:1: function "nothing" not defined`,
	} {
		_, err := small(t, components, map[string]string{"a.conf": template})
		switch {
		case want == "" && err != nil, want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s\n gives %v\nwant %s", template, err, want)
		case err != nil && strings.Count(err.Error(), "\n") > 0:
			t.Errorf("%s: said more than once:\n%v", template, err)
		}
	}
}

// Files beside the stack file that cannot be what they should.
func TestFilesBeside(t *testing.T) {
	const components = "  - {name: a, kind: packages, packages: [x1], files: [{path: /etc/a, from: a.conf}, {path: /etc/b, from: b.conf}]}\n"
	half := strings.Repeat("x", provision.MaxStackText/2)
	for name, c := range map[string]struct{ a, b, want string }{
		"full":      {half, half, ""},
		"too large": {half, half + "x", "b.conf is too large: all templates and manifests of a stack together may have 1024 KiB"},
		"binary":    {"\xff", "", "a.conf is not text in UTF-8"},
		"zeros":     {"\x00", "", "a.conf is not text in UTF-8"},
	} {
		_, err := small(t, components, map[string]string{"a.conf": c.a, "b.conf": c.b})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Nothing outside of the folder gets onto nodes.
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "secret")
	writeFile(t, filepath.Dir(outside), "secret", "hidden")
	writeFile(t, dir, FileName, "name: s\nversion: 1\ncomponents:\n"+components)
	if err := errors.Join(os.Symlink(outside, filepath.Join(dir, "a.conf")), os.Mkdir(filepath.Join(dir, "b.conf"), 0o755)); err != nil {
		t.Fatal(err)
	}
	_, err := Load(dir)
	for _, want := range []string{"a.conf cannot be read", "b.conf is no file"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one that says %q", err, want)
		}
	}
	if _, err := Load(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := Load(t.TempDir()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), FileName) {
		t.Error(err)
	}
}

// A component whose image is not whole is refused, and the blob is named.
func TestImages(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(a *archive)
		want  func(a *archive) string
	}{
		"a flipped bit": {func(a *archive) { a.files[blobFile(a.layer)][30000] ^= 1 },
			func(a *archive) string {
				return "image localhost/board:1 of board: board.oci.tar is corrupt: blob " + a.layer
			}},
		"a blob under another's name": {func(a *archive) { a.files[blobFile(a.config)] = []byte("{}") },
			func(a *archive) string { return "is corrupt: blob " + a.config }},
		"a blob is missing": {func(a *archive) { a.names = a.names[1:] },
			func(a *archive) string { return "is incomplete: blob " + a.config + " is missing" }},
		"the manifest is missing": {func(a *archive) { a.names = append(a.names[:2:2], a.names[3:]...) },
			func(a *archive) string { return "is incomplete: blob " + a.manifest + " is missing" }},
		"another image": {func(a *archive) {
			a.files["index.json"] = bytes.Replace(a.files["index.json"], []byte(a.manifest), []byte(a.config), 1)
		}, func(a *archive) string { return "does not hold " + a.manifest + ", but " + a.config }},
		"a blob of another size": {func(a *archive) {
			a.files["index.json"] = bytes.Replace(a.files["index.json"], []byte(`"size":`), []byte(`"size":1`), 1)
		}, func(a *archive) string { return "is corrupt: blob " + a.manifest + " has " }},
		"no index":    {func(a *archive) { a.names = a.names[:4] }, func(*archive) string { return "is no OCI archive: it has no index.json" }},
		"two indexes": {func(a *archive) { a.names = append(a.names, "./index.json"); a.files["./index.json"] = []byte("{}") }, func(*archive) string { return "or several" }},
		"no JSON":     {func(a *archive) { a.files["index.json"] = []byte("[") }, func(*archive) string { return "its index.json cannot be read" }},
	} {
		t.Run(name, func(t *testing.T) {
			dir, a := goodStack(t), newArchive()
			c.spoil(a)
			writeFile(t, dir, "board.oci.tar", string(a.bytes(t)))
			_, err := Load(dir)
			if err == nil || !strings.Contains(err.Error(), c.want(a)) {
				t.Errorf("error is %v\nwant one that says %s", err, c.want(a))
			}
		})
	}
	t.Run("cut off", func(t *testing.T) {
		dir, whole := goodStack(t), newArchive().bytes(t)
		for _, n := range []int{0, 100, 1000, 30000, len(whole) - 2000} {
			writeFile(t, dir, "board.oci.tar", string(whole[:n]))
			if _, err := Load(dir); err == nil {
				t.Errorf("%d of %d bytes are taken", n, len(whole))
			}
		}
	})
}

func FuzzLoad(f *testing.F) {
	for _, name := range []string{"testdata/good/stack.yaml", "testdata/mistakes/stack.yaml"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, "{{.Node}}")
	}
	f.Fuzz(func(t *testing.T, file []byte, template string) {
		dir := fstest.MapFS{FileName: {Data: file}}
		for _, name := range []string{"board.env", "patroni.yml", "compose.yaml", "pod.yaml", "d.conf", "etcd/etcd.env"} {
			dir[name] = &fstest.MapFile{Data: []byte(template)}
		}
		s, err := read(dir, "fuzz")
		if err != nil {
			return
		}
		// What is accepted has an order.
		for i, c := range s.Components {
			for _, n := range c.Needs {
				before := false
				for _, o := range s.Components[:i] {
					before = before || o.Name == n
				}
				if !before {
					t.Errorf("%s comes before %s, which it needs", c.Name, n)
				}
			}
		}
	})
}
