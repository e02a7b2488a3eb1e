//go:build bench

package vmtest_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestBenchImport: bringing a set into a store, beside reading its volume and
// copying it to the same disk, which proves nothing of what was copied. Both begin
// with cold caches and end with everything on the disk.
func TestBenchImport(t *testing.T) {
	repo, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, repo: repo, dir: t.TempDir(), store: filepath.Join(repo, "build/store")}
	r.write("disc.yaml", "name: platter\nversion: \"1.0\"\ndate: 2026-11-22\nimages: [debian-13]\n")
	r.platter("disc", "build", "-f", filepath.Join(r.dir, "disc.yaml"), "-o", r.dir, "--store", r.store, "--key", filepath.Join(repo, "build/keys/image.key"))
	iso := filepath.Join(r.dir, "platter-1.0.iso")
	timed := func(prepare string, args ...string) time.Duration {
		t.Helper()
		r.run("sh", "-c", prepare+"; sync")
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return time.Since(began)
	}
	var imports, cats, copies []time.Duration
	store, copied := filepath.Join(r.dir, "store"), filepath.Join(r.dir, "copied")
	for range 3 {
		imports = append(imports, timed("rm -rf "+store, r.bin(), "disc", "import", iso, "--store", store, "--key", filepath.Join(repo, "build/keys/image.key.pub")))
		cats = append(cats, timed("true", "sh", "-c", "cat "+iso+" > /dev/null"))
		copies = append(copies, timed("rm -rf "+copied, "sh", "-c", "cp "+iso+" "+copied+" && sync"))
	}
	median := func(d []time.Duration) float64 { slices.Sort(d); return d[1].Seconds() }
	i, c, k := median(imports), median(cats), median(copies)
	ratio := (c + k) / i
	t.Logf("import %.1f s; cat %.1f s and cp %.1f s: rate %.2f of theirs", i, c, k, ratio)
	if ratio < 0.8 {
		t.Errorf("the import has %.2f of the rate, want 0.8", ratio)
	}
}
