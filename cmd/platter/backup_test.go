package main

import (
	"archive/zip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

func writeTestBackup(t *testing.T, change func(*provision.BackupManifest)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backup")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	m := provision.BackupManifest{Format: provision.BackupFormat, ID: "1234", Rack: "muc-7", Domain: "im.example.org", Begun: time.Now()}
	for _, p := range []provision.BackupPart{{Node: "node1", Name: provision.PartDatabase}, {Node: "node1", Name: provision.PartUploads}} {
		text := strings.Repeat(p.Name, 1000)
		w, err := z.CreateHeader(&zip.FileHeader{Name: p.File(), Method: zip.Store})
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, text)
		sum := sha256.Sum256([]byte(text))
		p.Size, p.SHA256 = int64(len(text)), hex.EncodeToString(sum[:])
		m.Parts = append(m.Parts, p)
	}
	if change != nil {
		change(&m)
	}
	w, err := z.Create(manifestFile)
	if err != nil {
		t.Fatal(err)
	}
	json.NewEncoder(w).Encode(m)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// A restore looks at the whole file before it asks anybody anything.
func TestRestoreRefuses(t *testing.T) {
	good := writeTestBackup(t, nil)
	text, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	file := func(b []byte) string {
		path := filepath.Join(t.TempDir(), "backup")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	flipped := append([]byte{}, text...)
	flipped[3000] ^= 1
	for what, c := range map[string]struct {
		path, says string
	}{
		"without --yes":   {good, "say --yes"},
		"one bit wrong":   {file(flipped), "node1/database is damaged"},
		"cut off":         {file(text[:len(text)-100]), "is no whole backup"},
		"no backup":       {file([]byte("hello")), "is no whole backup"},
		"another hash":    {writeTestBackup(t, func(m *provision.BackupManifest) { m.Parts[1].SHA256 = m.Parts[0].SHA256 }), "node1/uploads is damaged"},
		"a part missing":  {writeTestBackup(t, func(m *provision.BackupManifest) { m.Parts[1].Node = "node2" }), "node2/uploads is damaged"},
		"no database":     {writeTestBackup(t, func(m *provision.BackupManifest) { m.Parts = m.Parts[1:] }), "0 databases"},
		"of a newer form": {writeTestBackup(t, func(m *provision.BackupManifest) { m.Format = 99 }), "has format 99"},
	} {
		args := []string{"stack", "restore", c.path, "--socket", t.TempDir() + "/none"}
		if what != "without --yes" {
			args = append(args, "--yes")
		}
		if code, out := platter(args...); code != 1 || !strings.Contains(out, c.says) {
			t.Errorf("%s: exit %d, %q is not in:\n%s", what, code, c.says, out)
		}
	}
	if _, out := platter("stack", "restore", good, "--yes", "--socket", t.TempDir()+"/none"); !strings.Contains(out, "no disc host answers") {
		t.Errorf("a good one: %s", out)
	}
}

func TestBytesOf(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 12_300_000: "12.3 MB", 5_000_000_000_000_000: "5000.0 TB"} {
		if got := bytesOf(n); got != want {
			t.Errorf("%d: %s, not %s", n, got, want)
		}
	}
}
