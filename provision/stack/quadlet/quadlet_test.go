package quadlet

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"platter/provision"
	"platter/provision/yamlfile"
)

var update = flag.Bool("update", false, "write what comes out as what is wanted")

func board(kind provision.ComponentKind) provision.Component {
	digest := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	return provision.Component{Name: "board", Kind: kind,
		Images: []provision.OCIImage{{Name: "localhost/board:1", Digest: digest}, {Name: "localhost:5000/db:1", Digest: digest}, {Name: "localhost/db:1", Digest: digest}, {Name: "localhost/old:latest", Digest: digest}},
		Ports:  []provision.Port{{Name: "web", Number: 8088}, {Name: "admin", Number: 8090, Local: true}, {Name: "dns", Number: 53, UDP: true}},
		Data:   []string{"/var/lib/board"},
		Files:  []provision.StackFile{{Path: "/etc/board.env", Mode: 0o600}}}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// golden compares text with the file called name.
func golden(t *testing.T, name, text string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff(read(t, name), text); d != "" {
		t.Errorf("%s (-want +got): %s", name, d)
	}
}

// Every key that is taken comes out. TestStackKinds and, for all of testdata/units,
// TestQuadletGenerator have podman judge that.
func TestOf(t *testing.T) {
	for _, c := range []struct {
		kind     provision.ComponentKind
		from, to string
		services []string
	}{
		{provision.KindCompose, "full.yaml", "units/compose", []string{"board_cache.service", "board_db.service", "board_web.service", "board_lone.service"}},
		{provision.KindKube, "full-kube.yaml", "units/kube", []string{"board_pod.service"}},
	} {
		u, err := Of(board(c.kind), c.from, read(t, c.from))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.services, u.Services); d != "" {
			t.Errorf("services of %s: %s", c.from, d)
		}
		var names []string
		for _, f := range u.Files {
			golden(t, filepath.Join(c.to, f.Name), f.Text)
			names = append(names, f.Name)
			if private := f.Name == "board_pod.yaml"; private != (f.Mode == 0o600) {
				t.Errorf("%s has mode %04o", f.Name, f.Mode)
			}
		}
		entries, err := os.ReadDir(filepath.Join("testdata", c.to))
		if err != nil || len(entries) != len(names) {
			t.Errorf("%s becomes %v, %s has other files: %v", c.from, names, c.to, err)
		}
	}
}

// All mistakes come at once, each with its place and a word why.
func TestMistakes(t *testing.T) {
	for name, kind := range map[string]provision.ComponentKind{"mistakes": provision.KindCompose, "mistakes-kube": provision.KindKube} {
		_, err := Of(board(kind), "f", read(t, name+".yaml"))
		var p yamlfile.Problems
		if !errors.As(err, &p) {
			t.Fatalf("%s: %v", name, err)
		}
		golden(t, name+".txt", p.Error()+"\n")
	}
	for text, want := range map[string]string{
		"":                                   "the file is empty",
		"services: {}":                       "services has no service",
		"a: [":                               "not valid YAML",
		"services: {a: {image: x}}\n---\n{}": "a second document begins here",
		"services: {a: {image: 'localhost/db:1', depends_on: [b]}, b: {image: 'localhost/db:1', depends_on: [a]}}": "no service can be the first to start: a, b wait for each other",
		"services: {a: {image: 'localhost/db:1', command: [\"\\e\"]}}":                                             "has control characters",
	} {
		if _, err := Of(board(provision.KindCompose), "f", text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, err := Of(board(provision.KindKube), "f", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n"); err == nil || !strings.Contains(err.Error(), "neither a Pod nor a Deployment") {
		t.Errorf("a manifest without a pod: %v", err)
	}
}

func TestReference(t *testing.T) {
	if got := Reference(provision.OCIImage{Name: "localhost:5000/a/b:1.2", Digest: "sha256:1"}); got != "localhost:5000/a/b@sha256:1" {
		t.Error(got)
	}
}

// Whatever the file holds, nothing gets out of its line.
func FuzzOf(f *testing.F) {
	for _, name := range []string{"full.yaml", "mistakes.yaml"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add("compose", string(b))
	}
	for _, name := range []string{"full-kube.yaml", "mistakes-kube.yaml"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add("kube", string(b))
	}
	f.Fuzz(func(t *testing.T, kind, text string) {
		u, err := Of(board(provision.ComponentKind(kind)), "f", text)
		if err != nil {
			return
		}
		for _, file := range u.Files {
			if file.Mode == 0o600 {
				continue
			}
			for line := range strings.Lines(file.Text) {
				key, _, ok := strings.Cut(line, "=")
				plain := line == "\n" || line == "# Written by Platter.\n" || strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]\n")
				if !plain && (!ok || strings.Trim(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") != "" || strings.HasSuffix(line, "\\\n")) {
					t.Errorf("%s has the line %q", file.Name, line)
				}
			}
		}
	})
}
