package stack

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestPackFiles(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "new")
	for name, text := range map[string]string{"a/b/picture.png": "pixels", "a/c/x": "", "y": "z"} {
		path := filepath.Join(from, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	// What is no file of a user stays where it is.
	if err := os.Symlink("/etc/shadow", filepath.Join(from, "a/link")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := packFiles(from, &b); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(to, "left/over"), 0o755); err != nil { // by one that was cut off
		t.Fatal(err)
	}
	if err := unpackFiles(&b, to, os.Getuid(), os.Getgid()); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	err := filepath.Walk(to, func(path string, st os.FileInfo, err error) error {
		if err != nil || st.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		name, _ := filepath.Rel(to, path)
		got[name] = string(text) + " " + st.Mode().String()
		return err
	})
	if err != nil || len(got) != 3 || got["a/b/picture.png"] != "pixels -rw-r-----" || got["a/c/x"] != " -rw-r-----" || got["y"] != "z -rw-r-----" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(to, "left")); err == nil {
		t.Error("what a broken attempt left is still there")
	}

	b.Reset()
	if err := packFiles(filepath.Join(from, "absent"), &b); err != nil {
		t.Errorf("without any upload: %v", err)
	}
	if err := unpackFiles(&b, to, os.Getuid(), os.Getgid()); err != nil {
		t.Errorf("without any upload: %v", err)
	}
}

// An archive cannot write anywhere else.
func TestUnpackHostile(t *testing.T) {
	for _, h := range []tar.Header{
		{Name: "../evil", Typeflag: tar.TypeReg},
		{Name: "/evil", Typeflag: tar.TypeReg},
		{Name: "link", Linkname: "/etc", Typeflag: tar.TypeSymlink},
		{Name: "dev", Typeflag: tar.TypeChar},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		h.Mode = 0o644
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		w.Close()
		dir := t.TempDir()
		if err := unpackFiles(&b, filepath.Join(dir, "new"), os.Getuid(), os.Getgid()); err == nil {
			t.Errorf("%s is taken", h.Name)
		}
		if _, err := os.Lstat(filepath.Join(dir, "evil")); err == nil {
			t.Errorf("%s got out", h.Name)
		}
	}
}
