package images

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/provision"
)

// An object that was cut short while it was committed goes on, also for a user who
// is not root.
func TestArriveAfterCutCommit(t *testing.T) {
	s, _ := testStore(t)
	b := []byte("content")
	o := provision.Object{Hash: hexSum(b), Size: int64(len(b))}
	part := filepath.Join(s.dir, "objects", partPrefix+o.Hash)
	if err := os.WriteFile(part, b, 0o444); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	for _, f := range []string{part, filepath.Dir(part)} {
		if err := os.Chown(f, nobody, nobody); err != nil {
			t.Fatalf("this test needs root: %v", err)
		}
	}
	for dir := s.dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread() // and end it with this test
	if err := unix.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	defer unix.Setfsuid(0)
	a, err := s.Arrive(o)
	if err != nil {
		t.Fatal(err)
	}
	if a.New {
		t.Error("what came before is said to be new")
	}
	if err := a.Commit(); err != nil || !s.Has(o) {
		t.Errorf("got %v", err)
	}
}

func TestArriveIsNewOnce(t *testing.T) {
	s, _ := testStore(t)
	o := provision.Object{Hash: strings.Repeat("a", 64), Size: 5}
	for _, want := range []bool{true, false} {
		a, err := s.Arrive(o)
		if err != nil || a.New != want {
			t.Errorf("new %v, want %v, %v", a.New, want, err)
		}
		a.Close()
	}
}

// A name that is set again mends what has rotted around it, and says what it cannot
// mend.
func TestSetRefMends(t *testing.T) {
	s, key := testStore(t)
	raw := []byte(`{"format":1}`)
	o, err := s.put(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	set := func(k secretKey) error { return s.SetRef("debian-13", o.Hash, k.sign(raw, "debian-13")) }
	if err := set(key); err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func(string) error{
		"rotted":  func(f string) error { return os.WriteFile(f, []byte("x"), 0o644) },
		"missing": os.Remove,
	} {
		if err := spoil(s.objectPath(o.Hash) + sigSuffix); err != nil {
			t.Fatal(err)
		}
		if err := set(key); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.signed("debian-13"); err != nil {
			t.Errorf("the signature was %s: %v", what, err)
		}
	}
	// Another key, after which the first one does not count any more.
	other := trustedKey(t, s)
	if err := set(other); err != nil {
		t.Fatal(err)
	}
	keys, _ := s.trusted()
	for _, k := range keys {
		if k.key.ID() == key.ID() {
			os.Remove(filepath.Join(s.dir, "keys", k.name))
		}
	}
	if _, _, err := s.signed("debian-13"); err != nil {
		t.Errorf("after the key was changed: %v", err)
	}
	raw[0] = '['
	os.Chmod(s.objectPath(o.Hash), 0o644)
	if err := os.WriteFile(s.objectPath(o.Hash), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	raw[0] = '{'
	if err := set(other); err == nil || !strings.Contains(err.Error(), "--repair") {
		t.Errorf("a manifest that has rotted: %v", err)
	}
}
