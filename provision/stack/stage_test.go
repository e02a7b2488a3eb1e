package stack

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/disk"
)

// discHost serves objects, and does what is wrong with them.
type discHost struct {
	*httptest.Server
	pub minisign.PublicKey
	sec minisign.PrivateKey

	mu      sync.Mutex
	objects map[string][]byte
	gone    bool               // the disc was removed
	asked   map[string][]int64 // object -> first byte of every request
	half    chan struct{}      // non-nil: an object breaks off half-way and this is closed
	hang    bool               // ... the connection stays open then
}

func newDiscHost(t *testing.T) *discHost {
	t.Helper()
	d := &discHost{objects: map[string][]byte{}, asked: map[string][]int64{}}
	var err error
	if d.pub, d.sec, err = minisign.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	d.Server = httptest.NewServer(http.HandlerFunc(d.serve))
	t.Cleanup(func() { d.CloseClientConnections(); d.Close() })
	return d
}

func (d *discHost) serve(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/objects/")
	from := int64(0)
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
	d.mu.Lock()
	b, ok := d.objects[name]
	gone, half, hang := d.gone, d.half, d.hang
	d.asked[name] = append(d.asked[name], from)
	if half != nil && len(b) > 1<<20 {
		d.half = nil
	}
	d.mu.Unlock()
	switch {
	case gone:
		http.Error(w, "the disc is not there", http.StatusInternalServerError)
	case !ok:
		http.NotFound(w, r)
	case half != nil && len(b) > 1<<20:
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		w.Write(b[:len(b)/2])
		w.(http.Flusher).Flush()
		close(half)
		if hang {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	default:
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}
}

func (d *discHost) put(b []byte) string {
	sum := sha256.Sum256(b)
	name := hex.EncodeToString(sum[:])
	d.mu.Lock()
	defer d.mu.Unlock()
	d.objects[name] = b
	return name
}

func (d *discHost) set(f func()) { d.mu.Lock(); defer d.mu.Unlock(); f() }

// requests counts what was asked of an object since the last forget.
func (d *discHost) requests(object string) []int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.asked[object])
}

// publish makes a release of files of these contents.
func (d *discHost) publish(t *testing.T, version string, files map[string][]byte) (provision.ReleaseRef, *provision.Release) {
	t.Helper()
	r := provision.Release{Format: provision.ReleaseFormat, Name: "im", Version: version}
	for name, b := range files {
		r.Files = append(r.Files, provision.ReleaseFile{Name: name, Kind: provision.FilePackage, Size: int64(len(b)), Digest: d.put(b)})
	}
	slices.SortFunc(r.Files, func(a, b provision.ReleaseFile) int { return strings.Compare(a.Name, b.Name) })
	raw, digest, err := r.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	d.put(raw)
	d.set(func() { d.objects[digest+".minisig"] = minisign.Sign(d.sec, raw) })
	return provision.ReleaseRef{Version: version, Digest: digest}, &r
}

func (d *discHost) staging(dir string) Staging {
	return Staging{Dir: dir, Keys: []minisign.PublicKey{d.pub}, From: disk.HTTPSource{Client: http.DefaultClient, Base: d.URL}, Patience: 20 * time.Second}
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func isFailure(t *testing.T, err error, code string, parts ...string) {
	t.Helper()
	var f *provision.Failure
	if !errors.As(err, &f) || f.Code != code || f.Next == "" {
		t.Fatalf("error %v, want the failure %s", err, code)
	}
	for _, p := range parts {
		if !strings.Contains(f.Message, p) {
			t.Errorf("%q does not say %q", f.Message, p)
		}
	}
}

// staged checks that a release is on the disk, byte by byte.
func staged(t *testing.T, dir string, ref provision.ReleaseRef, files map[string][]byte) {
	t.Helper()
	r, err := Release(dir, ref.Digest)
	if err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(filepath.Join(dir, ref.Digest, "files"))
	if len(entries) != len(files) || len(r.Files) != len(files) {
		t.Errorf("%d files on the disk, %d in the manifest, want %d", len(entries), len(r.Files), len(files))
	}
	for name, want := range files {
		if got, err := os.ReadFile(ReleaseFile(dir, ref.Digest, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what was published: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, ref.Digest, "part")); err == nil {
		t.Error("the folder of parts is left")
	}
}

func TestStageRepairsOnlyWhatIsWrong(t *testing.T) {
	d, dir := newDiscHost(t), t.TempDir()
	files := map[string][]byte{"a.deb": random(300_000), "b.deb": random(2 << 20), "c.deb": random(70_000), "empty": nil}
	ref, r := d.publish(t, "1", files)
	got, err := d.staging(dir).Stage(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Releases) != 1 || got.Releases[0] != ref {
		t.Errorf("staged: %+v", got)
	}
	staged(t, dir, ref, files)

	// Bits flip, files vanish, grow and are put there by somebody.
	b := slices.Clone(files["b.deb"])
	b[1<<20] ^= 4
	for name, content := range map[string][]byte{"b.deb": b, "stranger.deb": []byte("x"), "c.deb": append(slices.Clone(files["c.deb"]), 0)} {
		if err := os.WriteFile(ReleaseFile(dir, ref.Digest, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d.set(func() { clear(d.asked) })
	if _, err := d.staging(dir).Stage(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	staged(t, dir, ref, files)
	for _, f := range r.Files {
		want := 0
		if f.Name == "b.deb" || f.Name == "c.deb" {
			want = 1
		}
		if n := len(d.requests(f.Digest)); n != want {
			t.Errorf("%s was asked for %d times, want %d", f.Name, n, want)
		}
	}
	if n := len(d.requests(ref.Digest)); n != 0 {
		t.Errorf("the manifest, which was right, was asked for %d times", n)
	}

	// The manifest itself, on the disk.
	if err := os.WriteFile(filepath.Join(dir, ref.Digest, "manifest.json"), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Release(dir, ref.Digest); !errors.Is(err, ErrNotStaged) {
		t.Errorf("a damaged manifest is read: %v", err)
	}
	if _, err := d.staging(dir).Stage(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	staged(t, dir, ref, files)
}

func TestStageTrustsNothing(t *testing.T) {
	d := newDiscHost(t)
	files := map[string][]byte{"a.deb": random(100_000)}
	ref, r := d.publish(t, "1", files)
	object := r.Files[0].Digest
	for _, c := range []struct {
		name string
		do   func()
		code string
		says []string
	}{
		{"a corrupt byte", func() {
			d.objects[object] = bytes.Replace(d.objects[object], d.objects[object][500:510], []byte("0123456789"), 1)
		},
			"release-damaged", []string{"a.deb", "3 times"}},
		{"a short file", func() { d.objects[object] = d.objects[object][:60_000] }, "disc-host-lost", []string{"0.1 MB of it are here", object[:12]}},
		{"a manifest of somebody else", func() {
			d.objects[ref.Digest] = bytes.Replace(d.objects[ref.Digest], []byte(`"im"`), []byte(`"mi"`), 1)
		}, "release-untrusted", []string{"SHA-256"}},
		{"a signature of somebody else", func() {
			_, other, _ := minisign.GenerateKey(rand.Reader)
			d.objects[ref.Digest+".minisig"] = minisign.Sign(other, d.objects[ref.Digest])
		}, "release-untrusted", []string{"no key that this node trusts"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			before := map[string][]byte{}
			d.set(func() {
				for k, v := range d.objects {
					before[k] = v
				}
				c.do()
			})
			s := d.staging(dir)
			s.Patience = time.Second
			_, err := s.Stage(t.Context(), ref)
			isFailure(t, err, c.code, c.says...)
			if _, err := Release(dir, ref.Digest); !errors.Is(err, ErrNotStaged) {
				t.Errorf("it counts as staged: %v", err)
			}
			if _, err := os.Stat(ReleaseFile(dir, ref.Digest, "a.deb")); err == nil {
				t.Error("a file that was not verified lies among the others")
			}
			// The right bytes after that are taken.
			d.set(func() { d.objects = before })
			if _, err := d.staging(dir).Stage(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
			staged(t, dir, ref, files)
		})
	}
	s := d.staging(t.TempDir())
	s.Keys = nil
	_, err := s.Stage(t.Context(), ref)
	isFailure(t, err, "release-untrusted")
	if _, err := s.Stage(t.Context(), provision.ReleaseRef{Digest: "../" + ref.Digest[3:]}); err == nil {
		t.Error("a digest that leads elsewhere is taken")
	}
}

// TestStageDiscRemoved: the disc goes away half-way through a file and comes
// back.
func TestStageDiscRemoved(t *testing.T) {
	d, dir := newDiscHost(t), t.TempDir()
	files := map[string][]byte{"a.deb": random(1000), "b.deb": random(4 << 20)}
	ref, r := d.publish(t, "1", files)
	half := make(chan struct{})
	d.set(func() { d.half = half })
	waits := make(chan string, 1)
	s := d.staging(dir)
	s.Say = func(line string, done, total int64) {
		if done > total {
			t.Errorf("%s: %d of %d", line, done, total)
		}
		if strings.HasPrefix(line, "waits for the disc host: ") && strings.Contains(line, "500") {
			select {
			case waits <- line:
			default:
			}
		}
	}
	go func() {
		<-half
		d.set(func() { d.gone = true })
	}()
	end := make(chan error)
	go func() { _, err := s.Stage(t.Context(), ref); end <- err }()
	select {
	case line := <-waits:
		t.Log(line)
	case err := <-end:
		t.Fatalf("it ended without the disc: %v", err)
	}
	d.set(func() { d.gone = false })
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	staged(t, dir, ref, files)
	if at := d.requests(r.Files[1].Digest); at[len(at)-1] == 0 {
		t.Errorf("b.deb was asked for from %v: it began anew", at)
	}
}

// TestStageKilled: kill -9 in the middle of a file.
func TestStageKilled(t *testing.T) {
	d, dir := newDiscHost(t), t.TempDir()
	files := map[string][]byte{"a.deb": random(1000), "b.deb": random(8 << 20)}
	ref, r := d.publish(t, "1", files)
	half := make(chan struct{})
	d.set(func() { d.half, d.hang = half, true })
	key, err := d.pub.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "PLATTER_STAGE="+strings.Join([]string{dir, d.URL, ref.Digest, hex.EncodeToString(key)}, " "))
	var out bytes.Buffer
	child.Stdout, child.Stderr = &out, &out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	<-half
	part := filepath.Join(dir, ref.Digest, "part", r.Files[1].Digest)
	for deadline := time.Now().Add(20 * time.Second); ; {
		if st, err := os.Stat(part); err == nil && st.Size() >= 4<<20 {
			break
		}
		if time.Now().After(deadline) {
			child.Process.Kill()
			t.Fatalf("nothing came: %s", out.Bytes())
		}
		time.Sleep(10 * time.Millisecond)
	}
	child.Process.Kill()
	child.Wait()
	if _, err := Release(dir, ref.Digest); !errors.Is(err, ErrNotStaged) {
		t.Fatalf("half of it counts as staged: %v", err)
	}
	if _, err := d.staging(dir).Stage(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	staged(t, dir, ref, files)
	if at := d.requests(r.Files[1].Digest); len(at) != 2 || at[1] != 4<<20 {
		t.Errorf("b.deb was asked for from %v, want 0 and %d", at, 4<<20)
	}
	if n := len(d.requests(r.Files[0].Digest)); n != 1 {
		t.Errorf("a.deb was asked for %d times", n)
	}
}

// init is the process that TestStageKilled kills.
func init() {
	args := strings.Fields(os.Getenv("PLATTER_STAGE"))
	if len(args) != 4 {
		return
	}
	key, err := hex.DecodeString(args[3])
	var pub minisign.PublicKey
	if err := errors.Join(err, pub.UnmarshalText(key)); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	s := Staging{Dir: args[0], Keys: []minisign.PublicKey{pub}, From: disk.HTTPSource{Client: http.DefaultClient, Base: args[1]}}
	_, err = s.Stage(context.Background(), provision.ReleaseRef{Version: "1", Digest: args[2]})
	fmt.Println("ended:", err)
	os.Exit(1)
}

func TestStageDiskTooSmall(t *testing.T) {
	d, dir := newDiscHost(t), t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m"); err != nil {
		t.Fatalf("a small tmpfs cannot be mounted, run the tests as root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	files := map[string][]byte{"a.deb": random(2_900_000), "b.deb": random(1000)}
	ref, r := d.publish(t, "1", files)
	_, err := d.staging(dir).Stage(t.Context(), ref)
	isFailure(t, err, "disk-too-small", "2.9 MB", "3.5 MB", "are free in "+dir)
	if n := len(d.requests(r.Files[0].Digest)); n != 0 {
		t.Error("it fetches what does not fit")
	}
	small := map[string][]byte{"a.deb": random(1_000_000)}
	ref, _ = d.publish(t, "2", small)
	if _, err := d.staging(dir).Stage(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	staged(t, dir, ref, small)
}

// TestStageKeeps: what is in use, what was before, what is asked for, and
// nothing else; a file that two releases share comes once.
func TestStageKeeps(t *testing.T) {
	d, dir := newDiscHost(t), t.TempDir()
	shared := random(50_000)
	var refs []provision.ReleaseRef
	for i := range 4 {
		files := map[string][]byte{"shared.deb": shared, "own.deb": random(1000 + i)}
		ref, _ := d.publish(t, fmt.Sprint(i+1), files)
		refs = append(refs, ref)
		got, err := d.staging(dir).Stage(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		staged(t, dir, ref, files)
		var want []provision.ReleaseRef
		switch i {
		case 0:
			want = refs[:1]
			// A switch to it, and from it.
			os.WriteFile(filepath.Join(dir, "previous"), []byte(refs[0].Digest+"\n"), 0o644)
		case 1:
			want = refs[:2]
			os.WriteFile(filepath.Join(dir, "current"), []byte(refs[1].Digest+"\n"), 0o644)
		case 2:
			want = refs[:3]
		case 3:
			want = []provision.ReleaseRef{refs[0], refs[1], refs[3]}
			if got.Current != refs[1].Digest {
				t.Errorf("current is %q", got.Current)
			}
		}
		if !slices.Equal(got.Releases, want) {
			t.Errorf("after release %d there are %v, want %v", i+1, got.Releases, want)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, refs[2].Digest)); err == nil {
		t.Error("release 3, which nobody goes back to, is still there")
	}
	sum := sha256.Sum256(shared)
	if n := len(d.requests(hex.EncodeToString(sum[:]))); n != 1 {
		t.Errorf("the shared file was asked for %d times", n)
	}
}
