package disk

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"platter/provision"
)

// packServer serves the pack over real HTTP and can be made to misbehave.
type packServer struct {
	im      testImage
	addr    string
	srv     *http.Server
	cutAt   atomic.Int64 // bytes a response may send before its connection is cut; 0: no limit
	sent    atomic.Int64
	spoil   atomic.Int64 // offset in the pack whose byte is flipped; negative: none
	spoiled atomic.Int64 // how often it was sent flipped
	times   int64        // how often it may be; 0: for ever
	started chan struct{}
	once    sync.Once
}

func serve(t *testing.T, im testImage) *packServer {
	t.Helper()
	s := &packServer{im: im, addr: "127.0.0.1:0", started: make(chan struct{})}
	s.spoil.Store(-1)
	s.start(t)
	t.Cleanup(func() { s.srv.Close() })
	return s
}

func (s *packServer) start(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	s.srv = &http.Server{Handler: s}
	go s.srv.Serve(ln)
}

func (s *packServer) source() HTTPSource {
	return HTTPSource{Client: &http.Client{Transport: &http.Transport{}}, Base: "http://" + s.addr}
}

func (s *packServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/objects/"+s.im.manifest.Pack.Hash {
		http.NotFound(w, r)
		return
	}
	pack := s.im.pack
	if at := s.spoil.Load(); at >= 0 && (s.times == 0 || s.spoiled.Load() < s.times) {
		pack = bytes.Clone(pack)
		pack[at] ^= 0x10
		s.spoiled.Add(1)
	}
	http.ServeContent(&limitedWriter{ResponseWriter: w, s: s, left: s.cutAt.Load()}, r, "", time.Time{}, bytes.NewReader(pack))
}

type limitedWriter struct {
	http.ResponseWriter
	s    *packServer
	left int64
}

func (w *limitedWriter) Write(b []byte) (int, error) {
	if limit := w.s.cutAt.Load(); limit > 0 {
		if w.left <= 0 {
			w.ResponseWriter.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		b = b[:min(int64(len(b)), w.left)]
		w.left -= int64(len(b))
	}
	n, err := w.ResponseWriter.Write(b)
	if w.s.sent.Add(int64(n)) > int64(len(w.s.im.pack))/3 {
		w.s.once.Do(func() { close(w.s.started) })
	}
	if err == nil && w.left <= 0 && w.s.cutAt.Load() > 0 {
		w.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func TestFetchOverHTTP(t *testing.T) {
	im := smallImage(t, 1)
	for _, c := range []struct {
		name  string
		setup func(*packServer)
		check func(*testing.T, *packServer)
	}{
		{"straight", func(*packServer) {}, func(t *testing.T, s *packServer) {
			if n := s.sent.Load(); n != im.manifest.Pack.Size {
				t.Errorf("%d bytes sent for a pack of %d", n, im.manifest.Pack.Size)
			}
		}},
		{"every connection breaks", func(s *packServer) { s.cutAt.Store(200_000) }, func(t *testing.T, s *packServer) {
			if n := s.sent.Load(); n > 2*im.manifest.Pack.Size {
				t.Errorf("%d bytes sent for a pack of %d: the transfer starts over", n, im.manifest.Pack.Size)
			}
		}},
		{"one bit flips on the wire", func(s *packServer) { s.spoil.Store(500_000); s.times = 2 }, func(t *testing.T, s *packServer) {
			if s.spoiled.Load() != 2 {
				t.Errorf("the flipped byte was sent %d times", s.spoiled.Load())
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, im)
			c.setup(s)
			d := newFlakyDisk(6 * mib)
			if err := install(context.Background(), d, smallPlan("n", 1, "x"), im, s.source()); err != nil {
				t.Fatal(err)
			}
			if err := checkContent(d, im); err != nil {
				t.Error(err)
			}
			c.check(t, s)
		})
	}
}

// The server dies in the middle and comes back on the same address.
func TestServerRestart(t *testing.T) {
	im := smallImage(t, 1)
	s := serve(t, im)
	s.cutAt.Store(int64(len(im.pack)) / 2)
	d := newFlakyDisk(6 * mib)
	done := make(chan error, 1)
	go func() { done <- install(context.Background(), d, smallPlan("n", 1, "x"), im, s.source()) }()
	select {
	case <-s.started:
	case err := <-done:
		t.Fatalf("ended before the server died: %v", err)
	}
	s.srv.Close()
	s.cutAt.Store(0)
	s.start(t)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := checkContent(d, im); err != nil {
		t.Error(err)
	}
	if n := s.sent.Load(); n > 2*im.manifest.Pack.Size {
		t.Errorf("%d bytes sent for a pack of %d: the install started over", n, im.manifest.Pack.Size)
	}
}

// A frame that stays damaged stops the install by name; the disk does not boot.
func TestFlippedBit(t *testing.T) {
	im := smallImage(t, 1)
	for _, f := range []provision.Frame{im.manifest.Parts[0].Frames[0], im.manifest.Parts[3].Frames[4]} {
		s := serve(t, im)
		s.spoil.Store(f.At + 5)
		d := newFlakyDisk(6 * mib)
		err := install(context.Background(), d, smallPlan("n", 1, "x"), im, s.source())
		if !isCode(err, "chunk-corrupt") {
			t.Fatal(err)
		}
		for _, want := range []string{im.manifest.Pack.Hash, fmt.Sprintf("at byte %d", f.At), fmt.Sprintf("offset %d", f.Offset)} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not name %q", err, want)
			}
		}
		if bootable(d) {
			t.Error("the disk boots")
		}
		// With the object repaired the same install ends well.
		s.spoil.Store(-1)
		if err := install(context.Background(), d, smallPlan("n", 1, "x"), im, s.source()); err != nil {
			t.Fatal(err)
		}
		if err := checkContent(d, im); err != nil {
			t.Error(err)
		}
	}
}

func TestFetchEndsByName(t *testing.T) {
	im := smallImage(t, 1)
	s := serve(t, im)
	begin := func(src Source) error {
		in, err := Begin(newFlakyDisk(6*mib), smallPlan("n", 1, "x"), im.manifest)
		if err != nil {
			t.Fatal(err)
		}
		in.boot = provision.Part{}
		in.Stall = time.Millisecond
		return in.Write(context.Background(), src, quiet)
	}
	missing := *im.manifest
	missing.Pack.Hash = strings.Repeat("0", 64)
	in, err := Begin(newFlakyDisk(6*mib), smallPlan("n", 1, "x"), &missing)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Write(context.Background(), s.source(), quiet); !isCode(err, "object-missing") {
		t.Errorf("missing pack: %v", err)
	}
	s.srv.Close()
	if err := begin(s.source()); !isCode(err, "fetch-stalled") {
		t.Errorf("no server: %v", err)
	}
	if err := begin(silent{}); !isCode(err, "fetch-stalled") {
		t.Errorf("a server that answers and breaks off: %v", err)
	}
}

// silent answers every request and sends nothing.
type silent struct{}

func (silent) Open(context.Context, string, int64, int64) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader("")), nil
}

// A server that ignores ranges must not be taken for the right bytes.
func TestServerWithoutRanges(t *testing.T) {
	for _, reply := range []func(http.ResponseWriter){
		func(w http.ResponseWriter) { fmt.Fprint(w, "all of it") },
		func(w http.ResponseWriter) { w.Header().Set("Content-Range", "bytes 0-9/10"); w.WriteHeader(206) },
		func(w http.ResponseWriter) { w.WriteHeader(503) },
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { reply(w) })}
		go srv.Serve(ln)
		b, err := HTTPSource{Client: &http.Client{Transport: &http.Transport{}}, Base: "http://" + ln.Addr().String()}.Open(context.Background(), "x", 5, 5)
		if err == nil {
			b.Close()
			t.Error("bytes from elsewhere in the object were accepted")
		}
		srv.Close()
	}
}
