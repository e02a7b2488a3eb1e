package images

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"
)

var objectURL = regexp.MustCompile(`^/objects/([0-9a-f]{64}(?:\.minisig)?)$`)

// Handler serves GET and HEAD /objects/HASH and /objects/HASH.minisig, with
// ranges. There is nothing else to be had: every other path gets a 404. Damage that
// is met on a disc is logged; whoever asked only sees that the answer ends early.
func (s *Store) Handler(log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "objects can only be read", http.StatusMethodNotAllowed)
			return
		}
		m := objectURL.FindStringSubmatch(r.URL.Path)
		if m == nil {
			http.Error(w, "no such object: the path is /objects/ and a SHA-256 in lower-case hex", http.StatusNotFound)
			return
		}
		f, err := s.openServed(m[1])
		if errors.Is(err, fs.ErrNotExist) {
			http.Error(w, "no such object: "+m[1], http.StatusNotFound)
			return
		}
		if err != nil {
			http.Error(w, "object "+m[1]+" cannot be read on the disc host", http.StatusInternalServerError)
			return
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil || !st.Mode().IsRegular() {
			http.Error(w, "object "+m[1]+" cannot be read on the disc host", http.StatusInternalServerError)
			return
		}
		h := w.Header()
		h.Set("Content-Type", "application/octet-stream")
		h.Set("Etag", `"`+m[1]+`"`)
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
		// A file goes in as it is, so that the kernel can send it.
		if _, plain := f.(*os.File); !plain {
			f = &watched{File: f, failed: func(err error) {
				log.Warn("an object cannot be served whole", "object", m[1], "to", r.RemoteAddr, "err", err)
			}}
		}
		http.ServeContent(w, r, "", st.ModTime(), f)
	})
}

// watched is a File whose first failure to read is told.
type watched struct {
	File
	failed func(error) // nil once it was told
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.File.Read(b)
	if err != nil && !errors.Is(err, io.EOF) && w.failed != nil {
		w.failed(err)
		w.failed = nil
	}
	return n, err
}

// openServed opens an object, or the signature of a manifest.
func (s *Store) openServed(name string) (File, error) {
	hash, signature := strings.CutSuffix(name, sigSuffix)
	if !signature {
		return s.OpenObject(hash)
	}
	f, err := os.Open(s.objectPath(name))
	if err == nil {
		return f, nil
	}
	for _, src := range s.sources {
		for _, name := range src.Refs() {
			if digest, sig, err := src.Ref(name); err == nil && digest == hash {
				return memory{bytes.NewReader(sig)}, nil
			}
		}
	}
	return nil, err
}

// memory is a small object that is in memory.
type memory struct{ *bytes.Reader }

func (memory) Close() error                 { return nil }
func (m memory) Stat() (fs.FileInfo, error) { return m, nil }
func (memory) Name() string                 { return "" }
func (memory) Mode() fs.FileMode            { return 0o444 }
func (memory) ModTime() time.Time           { return time.Time{} }
func (memory) IsDir() bool                  { return false }
func (memory) Sys() any                     { return nil }
