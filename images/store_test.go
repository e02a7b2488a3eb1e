package images

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"platter/provision"
)

// testStore is a new store that trusts the key it comes with.
func testStore(t testing.TB) (*Store, secretKey) {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	return s, trustedKey(t, s)
}

func trustedKey(t testing.TB, s *Store) secretKey {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	if err := GenerateKey(file); err != nil {
		t.Fatal(err)
	}
	if err := s.Trust(file + ".pub"); err != nil {
		t.Fatal(err)
	}
	k, err := s.readSecretKey(file)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sampleParts are two parts: one that does not compress, one with a hole of a
// frame.
func sampleParts() map[string][]byte {
	random := make([]byte, 4711)
	rand.Read(random)
	holed := make([]byte, 2*provision.FrameSize+5)
	copy(holed, "first")
	copy(holed[2*provision.FrameSize:], "third")
	return map[string][]byte{"a": random, "b": holed}
}

func packParts(t testing.TB, s *Store, parts map[string][]byte) (provision.Object, []provision.Part) {
	t.Helper()
	dir, err := os.MkdirTemp("", "parts")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var sources []source
	for _, name := range []string{"a", "b"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, parts[name], 0o644); err != nil {
			t.Fatal(err)
		}
		sources = append(sources, source{name, path})
	}
	o, out, err := s.pack(context.Background(), sources, func(int64, int64) {})
	if err != nil {
		t.Fatal(err)
	}
	return o, out
}

func publishSample(t testing.TB, s *Store, key secretKey, name string) *provision.Image {
	t.Helper()
	im := &provision.Image{Format: provision.ImageFormat, Name: name, Version: "1"}
	im.Pack, im.Parts = packParts(t, s, sampleParts())
	if _, err := s.publish(name, im, "inputs", key); err != nil {
		t.Fatal(err)
	}
	return im
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one about %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not mention %q", err, p)
		}
	}
}

func TestImage(t *testing.T) {
	s, key := testStore(t)
	want := publishSample(t, s, key, "debian-13")
	ref, im, err := s.Image("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	if im.Pack != want.Pack || ref.Name != "debian-13" {
		t.Errorf("Image = %+v %+v", ref, im)
	}
	raw, err := os.ReadFile(s.objectPath(ref.Digest))
	if err != nil || hexSum(raw) != ref.Digest {
		t.Errorf("the manifest is not an object of its digest: %v", err)
	}
	var last, all int64
	if err := s.Verify(context.Background(), "debian-13", func(done, total int64) { last, all = max(last, done), total }); err != nil {
		t.Fatal(err)
	}
	if last != im.Pack.Size || all != im.Pack.Size {
		t.Errorf("progress ended at %d of %d, the pack has %d", last, all, im.Pack.Size)
	}
	if names, err := s.Refs(); err != nil || len(names) != 1 || names[0] != "debian-13" {
		t.Errorf("Refs = %v, %v", names, err)
	}
}

func damage(t *testing.T, path string, at int64) {
	t.Helper()
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func TestOneFlippedBit(t *testing.T) {
	s, key := testStore(t)
	im := publishSample(t, s, key, "debian-13")
	for _, part := range im.Parts {
		for _, fr := range part.Frames {
			for _, at := range []int64{fr.At, fr.At + int64(fr.Packed) - 1} {
				damage(t, s.objectPath(im.Pack.Hash), at)
				wantError(t, s.Verify(context.Background(), "debian-13", nil),
					im.Pack.Hash, fmt.Sprintf("offset %d ", fr.At), "part "+part.Name)
				damage(t, s.objectPath(im.Pack.Hash), at) // and back
			}
		}
	}
	if err := s.Verify(context.Background(), "debian-13", nil); err != nil {
		t.Fatal(err)
	}
}

func TestBrokenStore(t *testing.T) {
	cases := map[string]struct {
		breakIt func(t *testing.T, s *Store, digest string, im *provision.Image)
		want    []string
	}{
		"pack truncated": {func(t *testing.T, s *Store, _ string, im *provision.Image) {
			if err := os.Truncate(s.objectPath(im.Pack.Hash), im.Pack.Size-1); err != nil {
				t.Fatal(err)
			}
		}, []string{"pack of image debian-13", "bytes instead of"}},
		"pack missing": {func(t *testing.T, s *Store, _ string, im *provision.Image) {
			os.Remove(s.objectPath(im.Pack.Hash))
		}, []string{"pack of image debian-13", "missing"}},
		"manifest flipped": {func(t *testing.T, s *Store, digest string, _ *provision.Image) {
			damage(t, s.objectPath(digest), 5)
		}, []string{"manifest", "debian-13", "damaged"}},
		"signature missing": {func(t *testing.T, s *Store, digest string, _ *provision.Image) {
			os.Remove(s.objectPath(digest) + sigSuffix)
		}, []string{"no signature"}},
		"signature flipped": {func(t *testing.T, s *Store, digest string, _ *provision.Image) {
			damage(t, s.objectPath(digest)+sigSuffix, 90)
		}, []string{"refused"}},
		"signature of something else": {func(t *testing.T, s *Store, digest string, _ *provision.Image) {
			other := publishSample(t, s, trustedKey(t, s), "other")
			r, err := s.readRef("other")
			if err != nil || other == nil {
				t.Fatal(err)
			}
			sig, err := os.ReadFile(s.objectPath(r.Digest) + sigSuffix)
			if err != nil {
				t.Fatal(err)
			}
			if err := writeFile(s.objectPath(digest)+sigSuffix, sig); err != nil {
				t.Fatal(err)
			}
		}, []string{"does not fit"}},
		"key not trusted": {func(t *testing.T, s *Store, _ string, _ *provision.Image) {
			removeKeys(t, s)
			trustedKey(t, s)
		}, []string{"unknown key"}},
		"no key trusted": {func(t *testing.T, s *Store, _ string, _ *provision.Image) { removeKeys(t, s) },
			[]string{"no trusted key", "platter image trust"}},
		"key damaged": {func(t *testing.T, s *Store, _ string, _ *provision.Image) {
			if err := os.WriteFile(filepath.Join(s.dir, "keys", "bad.pub"), []byte("no key"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, []string{"bad.pub", "no minisign public key"}},
		"ref damaged": {func(t *testing.T, s *Store, _ string, _ *provision.Image) {
			if err := os.WriteFile(filepath.Join(s.dir, "refs", "debian-13"), []byte(`{"digest":"../../etc/passwd"}`), 0o644); err != nil {
				t.Fatal(err)
			}
		}, []string{"ref debian-13", "damaged"}},
		"ref of another image": {func(t *testing.T, s *Store, _ string, _ *provision.Image) {
			publishSample(t, s, trustedKey(t, s), "other")
			b, err := os.ReadFile(filepath.Join(s.dir, "refs", "other"))
			if err != nil {
				t.Fatal(err)
			}
			if err := writeFile(filepath.Join(s.dir, "refs", "debian-13"), b); err != nil {
				t.Fatal(err)
			}
		}, []string{`is of image "other"`}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s, key := testStore(t)
			im := publishSample(t, s, key, "debian-13")
			ref, _, err := s.Image("debian-13")
			if err != nil {
				t.Fatal(err)
			}
			c.breakIt(t, s, ref.Digest, im)
			_, _, err = s.Image("debian-13")
			wantError(t, err, c.want...)
		})
	}
}

func removeKeys(t *testing.T, s *Store) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "keys", "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		os.Remove(f)
	}
}

func TestSignedButWrong(t *testing.T) {
	s, key := testStore(t)
	good := publishSample(t, s, key, "debian-13")
	newer := *good
	newer.Format++
	if _, err := s.publish("debian-13", newer, "", key); err != nil {
		t.Fatal(err)
	}
	_, _, err := s.Image("debian-13")
	wantError(t, err, "format 2", "reads format 1")

	overlap := *good
	overlap.Parts = append([]provision.Part(nil), good.Parts...)
	overlap.Parts[1].Frames = overlap.Parts[1].Frames[1:]
	if _, err := s.publish("debian-13", overlap, "", key); err != nil {
		t.Fatal(err)
	}
	wantError(t, s.Verify(context.Background(), "debian-13", nil), "manifest of image debian-13 is wrong at part b")

	for _, name := range []string{"", "..", "../x", "a/b/c", "/etc", "A", "a//b", "a/.."} {
		if _, _, err := s.Image(name); err == nil || !strings.Contains(err.Error(), "no image name") {
			t.Errorf("Image(%q): %v", name, err)
		}
	}
	_, _, err = s.Image("debian-14")
	wantError(t, err, "debian-14 is not in the image store", "it has: debian-13")
}

func TestBoot(t *testing.T) {
	s, key := testStore(t)
	kernel, err := s.put(strings.NewReader("kernel"))
	if err != nil {
		t.Fatal(err)
	}
	initramfs, err := s.put(strings.NewReader("initramfs"))
	if err != nil {
		t.Fatal(err)
	}
	local, err := s.put(strings.NewReader("local"))
	if err != nil {
		t.Fatal(err)
	}
	want := BootSet{Kernel: kernel, Initramfs: initramfs, Local: local, Release: "6.12"}
	if _, err := s.publish("boot/amd64", bootManifest{bootFormat, "amd64", want}, "", key); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Boot("amd64"); err != nil || got != want {
		t.Errorf("Boot = %+v, %v", got, err)
	}
	if err := s.Verify(context.Background(), "boot/amd64", nil); err != nil {
		t.Error(err)
	}
	damage(t, s.objectPath(initramfs.Hash), 3)
	wantError(t, s.Verify(context.Background(), "boot/amd64", nil), initramfs.Hash, "initramfs of boot/amd64")
	if _, err := s.publish("boot/arm64", bootManifest{bootFormat, "amd64", want}, "", key); err != nil {
		t.Fatal(err)
	}
	_, err = s.Boot("arm64")
	wantError(t, err, "boot/arm64", `"amd64"`)
}

func TestKeys(t *testing.T) {
	s, _ := testStore(t)
	file := filepath.Join(t.TempDir(), "key")
	if err := GenerateKey(file); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the secret key is %v, %v", st.Mode(), err)
	}
	wantError(t, GenerateKey(file), "exists and is kept")
	if after, _ := os.ReadFile(file); !bytes.Equal(before, after) {
		t.Error("the secret key has changed")
	}
	_, err = s.readSecretKey(file)
	wantError(t, err, "does not trust", "platter image trust")
	_, err = s.readSecretKey(file + ".pub")
	wantError(t, err, "no minisign secret key")
	wantError(t, s.Trust(file), "no minisign public key")
}

// Whatever the parts are, unpacking gives them back, frames of zeros take no
// room, and a second build gives the same bytes.
func TestPackRoundTrip(t *testing.T) {
	const frame = provision.FrameSize
	text := func(n int) []byte { return bytes.Repeat([]byte("platter "), n/8+1)[:n] }
	one := func(n, at int) []byte {
		b := make([]byte, n)
		b[at] = 1
		return b
	}
	cases := map[string]struct {
		part   []byte
		frames int
	}{
		"empty":                   {nil, 0},
		"one byte":                {[]byte{1}, 1},
		"a zero byte":             {[]byte{0}, 0},
		"boot code":               {text(440), 1},
		"one frame":               {text(frame), 1},
		"one byte less":           {text(frame - 1), 1},
		"one byte more":           {text(frame + 1), 2},
		"only zeros":              {make([]byte, 2*frame+5), 0},
		"zeros but for the last":  {one(2*frame, 2*frame-1), 1},
		"zeros but for the first": {one(2*frame, 0), 1},
		"a hole":                  {append(append(text(frame), make([]byte, 2*frame)...), text(100)...), 2},
		"a zero tail":             {append(text(frame), make([]byte, 77)...), 1},
		"the smallest hole":       {slices.Concat(text(4096), make([]byte, 64<<10), text(4096)), 2},
		"no hole yet":             {slices.Concat(text(4096), make([]byte, 60<<10), text(4096)), 1},
		"a hole between blocks":   {slices.Concat(text(4097), make([]byte, 64<<10), text(4096)), 1},
		"zeros over the limit":    {slices.Concat(text(frame-8192), make([]byte, 16384), text(4096)), 2},
	}
	s, _ := testStore(t)
	again, _ := testStore(t)
	nothing := func(int64, int64) {}
	for name, c := range cases {
		dir := t.TempDir()
		path := filepath.Join(dir, "a")
		if err := os.WriteFile(path, c.part, 0o644); err != nil {
			t.Fatal(err)
		}
		o, parts, err := s.pack(context.Background(), []source{{"a", path}, {"b", path}}, nothing)
		if err != nil {
			t.Fatal(err)
		}
		if o2, _, err := again.pack(context.Background(), []source{{"a", path}, {"b", path}}, nothing); err != nil || o2 != o {
			t.Errorf("%s: a second build gave %v, %v instead of %v", name, o2, err, o)
		}
		im := &provision.Image{Name: "x", Pack: o, Parts: parts}
		if err := s.verifyPack(context.Background(), im, nothing); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, p := range parts {
			out := filepath.Join(dir, "out")
			if err := s.unpack(context.Background(), im, p, out); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, c.part) {
				t.Errorf("%s: part %s came back different, %v", name, p.Name, err)
			}
			end := int64(0)
			for _, f := range p.Frames {
				if f.Offset < end || f.Offset%4096 != 0 || f.Size > frame {
					t.Errorf("%s: frame of %d bytes at %d, the last one ended at %d", name, f.Size, f.Offset, end)
				}
				end = f.Offset + int64(f.Size)
			}
			if len(p.Frames) != c.frames || p.Size != int64(len(c.part)) {
				t.Errorf("%s: %d frames of %d bytes, want %d of %d", name, len(p.Frames), p.Size, c.frames, len(c.part))
			}
		}
	}
}

// What is put in moves all that lies behind it, and still all frames but those around
// it are the same. Where frames are cut is fixed for ever: a site has frames of images
// that were built long ago.
func TestCutsFollowContent(t *testing.T) {
	part := make([]byte, 32<<20)
	mathrand.NewChaCha8([32]byte{}).Read(part)
	at := func(b []byte) (frames map[string]int64, sizes []int) {
		frames = map[string]int64{}
		if n, err := cut(bytes.NewReader(b), func(offset int64, raw []byte) error {
			frames[hexSum(raw)] = offset
			sizes = append(sizes, len(raw))
			return nil
		}); err != nil || n != int64(len(b)) {
			t.Fatalf("%d bytes, %v", n, err)
		}
		return frames, sizes
	}
	before, sizes := at(part)
	if mean := len(part) / len(sizes); mean < 750<<10 || mean > 1250<<10 || slices.Max(sizes) > provision.FrameSize || slices.Min(sizes[:len(sizes)-1]) < minFrame {
		t.Errorf("%d frames of %d bytes on average, up to %d", len(sizes), mean, slices.Max(sizes))
	}
	if want := []int{516096, 331776, 278528, 3190784}; !slices.Equal(sizes[:4], want) {
		t.Errorf("the first frames have %v bytes, in all images so far it is %v", sizes[:4], want)
	}
	const where = 20<<20 + 4096
	after, _ := at(slices.Concat(part[:where], bytes.Repeat([]byte{7}, 4096), part[where:]))
	var lacks []int64
	for hash, offset := range after {
		if _, ok := before[hash]; !ok {
			lacks = append(lacks, offset)
		}
	}
	slices.Sort(lacks)
	if len(lacks) == 0 || len(lacks) > 2 || lacks[0] > where || lacks[0] < where-provision.FrameSize {
		t.Errorf("with a block more at %d the frames at %v are new", where, lacks)
	}
}

// Every frame is one zstd frame by itself: the C implementation's reader takes
// the pack apart without a manifest.
func TestPackIsPlainZstd(t *testing.T) {
	s, _ := testStore(t)
	parts := sampleParts()
	o, _ := packParts(t, s, parts)
	f, err := os.Open(s.objectPath(o.Hash))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	got, err := io.ReadAll(z)
	want := append(append([]byte(nil), parts["a"]...), append(append([]byte(nil), parts["b"][:4096]...), parts["b"][2*provision.FrameSize:]...)...)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("stream of %d bytes, want %d: %v", len(got), len(want), err)
	}
}

func TestPackCancelled(t *testing.T) {
	s, _ := testStore(t)
	path := filepath.Join(t.TempDir(), "a")
	if err := os.WriteFile(path, sampleParts()["a"], 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := s.pack(ctx, []source{{"a", path}}, func(int64, int64) {}); err == nil {
		t.Error("no error")
	}
	if left, err := os.ReadDir(filepath.Join(s.dir, "objects")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Readers see the old image or the new one, never a mixture, and writers of the
// same object do not disturb each other.
func TestSwapUnderReaders(t *testing.T) {
	s, key := testStore(t)
	two := publishSample(t, s, key, "debian-13")
	two.Version = "2"
	one := publishSample(t, s, key, "debian-13")
	stop := make(chan struct{})
	var writers, readers sync.WaitGroup
	for _, im := range []*provision.Image{one, two} {
		writers.Add(1)
		go func() {
			defer writers.Done()
			for range 30 {
				if _, err := s.publish("debian-13", im, "", key); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	for range 3 {
		readers.Add(1)
		go func() {
			defer readers.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, im, err := s.Image("debian-13")
				if err != nil {
					t.Error(err)
					return
				}
				if want := map[string]string{"1": one.Pack.Hash, "2": two.Pack.Hash}[im.Version]; im.Pack.Hash != want {
					t.Errorf("version %s has pack %s", im.Version, im.Pack.Hash)
				}
			}
		}()
	}
	writers.Wait()
	close(stop)
	readers.Wait()
}

func TestHandler(t *testing.T) {
	s, key := testStore(t)
	im := publishSample(t, s, key, "debian-13")
	ref, _, err := s.Image("debian-13")
	if err != nil {
		t.Fatal(err)
	}
	pack, err := os.ReadFile(s.objectPath(im.Pack.Hash))
	if err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(s.dir, "objects", ".new-half")
	if err := os.WriteFile(secret, []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(s.Handler(slog.New(slog.DiscardHandler)))
	defer srv.Close()

	do := func(method, path, span string) (*http.Response, []byte) {
		t.Helper()
		req, err := http.NewRequest(method, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if span != "" {
			req.Header.Set("Range", span)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, body
	}
	path := "/objects/" + im.Pack.Hash
	if res, body := do("GET", path, ""); res.StatusCode != 200 || !bytes.Equal(body, pack) {
		t.Errorf("GET: %s, %d bytes", res.Status, len(body))
	}
	if res, body := do("HEAD", path, ""); res.StatusCode != 200 || res.ContentLength != im.Pack.Size || len(body) != 0 {
		t.Errorf("HEAD: %s, length %d", res.Status, res.ContentLength)
	}
	if res, body := do("GET", path, "bytes=100-199"); res.StatusCode != 206 || !bytes.Equal(body, pack[100:200]) {
		t.Errorf("range: %s, %d bytes", res.Status, len(body))
	}
	if res, body := do("GET", path, fmt.Sprintf("bytes=%d-", len(pack)-10)); res.StatusCode != 206 || !bytes.Equal(body, pack[len(pack)-10:]) {
		t.Errorf("range to the end: %s, %d bytes", res.Status, len(body))
	}
	if res, _ := do("GET", path, fmt.Sprintf("bytes=%d-", len(pack)+10)); res.StatusCode != 416 {
		t.Errorf("range behind the end: %s", res.Status)
	}
	if res, body := do("GET", "/objects/"+ref.Digest, ""); res.StatusCode != 200 || hexSum(body) != ref.Digest {
		t.Errorf("manifest: %s", res.Status)
	}
	sig, err := os.ReadFile(s.objectPath(ref.Digest) + sigSuffix)
	if err != nil {
		t.Fatal(err)
	}
	if res, body := do("GET", "/objects/"+ref.Digest+".minisig", ""); res.StatusCode != 200 || !bytes.Equal(body, sig) {
		t.Errorf("signature: %s", res.Status)
	}
	for _, method := range []string{"POST", "PUT", "DELETE"} {
		if res, _ := do(method, path, ""); res.StatusCode != 405 || res.Header.Get("Allow") == "" {
			t.Errorf("%s: %s", method, res.Status)
		}
	}

	// Paths as an attacker writes them: a client would tidy them up.
	for _, path := range []string{
		"/", "/objects", "/objects/", "/objects/.new-half", "/objects/../keys/", "/objects/../refs/debian-13",
		"/objects/%2e%2e/refs/debian-13", "/objects/..%2frefs%2fdebian-13", "/objects//" + ref.Digest,
		"/objects/" + strings.ToUpper(im.Pack.Hash), "/objects/" + ref.Digest[:63], "/objects/" + ref.Digest + ".pub",
		"/objects/" + ref.Digest + "/", "/objects/" + ref.Digest + "%00", "/objects/" + ref.Digest + "\\..\\x",
		"/objects/" + strings.Repeat("0", 64), "/refs/debian-13", "/../../etc/passwd",
	} {
		conn, err := net.Dial("tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		body, _ := io.ReadAll(res.Body)
		conn.Close()
		if res.StatusCode != 404 || bytes.Count(body, []byte("\n")) != 1 {
			t.Errorf("GET %s: %s %q, want a 404 of one line", path, res.Status, body)
		}
	}
}

// sendfileProbe is a ResponseWriter that sees what it is given to read from.
type sendfileProbe struct {
	*httptest.ResponseRecorder
	file bool
}

func (p *sendfileProbe) ReadFrom(r io.Reader) (int64, error) {
	if l, ok := r.(*io.LimitedReader); ok {
		_, p.file = l.R.(*os.File)
	}
	return io.Copy(p.ResponseRecorder, r)
}

// The server must be able to see that it sends a file: hiding it costs three
// times the CPU.
func TestHandlerLetsTheKernelSend(t *testing.T) {
	s, key := testStore(t)
	im := publishSample(t, s, key, "debian-13")
	w := &sendfileProbe{ResponseRecorder: httptest.NewRecorder()}
	s.Handler(slog.New(slog.DiscardHandler)).ServeHTTP(w, httptest.NewRequest("GET", "/objects/"+im.Pack.Hash, nil))
	if !w.file {
		t.Error("the response was not read from an *os.File")
	}
}

func FuzzHandler(f *testing.F) {
	s, key := testStore(f)
	im := publishSample(f, s, key, "debian-13")
	for _, seed := range []string{"/objects/" + im.Pack.Hash, "/objects/../refs/debian-13", "/objects/", "/objects/" + im.Pack.Hash + ".minisig", "/\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		req := httptest.NewRequest("HEAD", "/", nil)
		req.URL.Path = path
		w := httptest.NewRecorder()
		s.Handler(slog.New(slog.DiscardHandler)).ServeHTTP(w, req)
		if w.Code != 404 && path != "/objects/"+im.Pack.Hash && !isManifest(s, path) {
			t.Errorf("%q gave %d", path, w.Code)
		}
	})
}

func isManifest(s *Store, path string) bool {
	r, err := s.readRef("debian-13")
	return err == nil && (path == "/objects/"+r.Digest || path == "/objects/"+r.Digest+sigSuffix)
}
