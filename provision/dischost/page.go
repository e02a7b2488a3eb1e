package dischost

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"path"
	"time"
)

//go:embed page/index.html page/page.css page/page.js
var pageFiles embed.FS

// pagePolicy lets the page load its own style and script and talk to its own
// server, and nothing else. Text from nodes cannot become markup: the browser
// refuses to parse any.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// Page serves the web page that shows the rack live, at /, with its style and
// script. It reads GET /v1/nodes, /v1/nodes/NAME/log and /v1/events of the
// same server.
func Page() http.Handler {
	type asset struct {
		body []byte
		etag string
	}
	assets := map[string]asset{}
	for url, name := range map[string]string{"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"} {
		body, err := fs.ReadFile(pageFiles, path.Join("page", name))
		if err != nil {
			panic(err) // embedded above
		}
		sum := sha256.Sum256(body)
		assets[url] = asset{body, `"` + hex.EncodeToString(sum[:8]) + `"`}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		a, ok := assets[r.URL.Path]
		switch {
		case !ok:
			http.Error(w, fmt.Sprintf("there is no page %.80q: the rack is at /", r.URL.Path), http.StatusNotFound)
			return
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "the page is read-only", http.StatusMethodNotAllowed)
			return
		}
		h.Set("Content-Security-Policy", pagePolicy)
		h.Set("Cache-Control", "no-cache") // asked again each time, answered with 304
		h.Set("ETag", a.etag)
		name := r.URL.Path
		if name == "/" {
			name = "index.html"
		}
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(a.body))
	})
}
