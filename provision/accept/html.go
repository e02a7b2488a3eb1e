package accept

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"maps"
	"slices"
	"time"

	"aead.dev/minisign"
)

// Name is the name of the report's file.
func (r *Report) Name() string {
	return fmt.Sprintf("accept-%s-%s.html", r.Rack, r.Began.Local().Format("2006-01-02-1504"))
}

// Sign makes the detached signature of a report's file: of name.minisig.
func Sign(key minisign.PrivateKey, html []byte, name string) []byte {
	return minisign.SignWithComments(key, html, "platter:"+name, "signature from a Platter disc host")
}

// Verify says why signature is not one that the owner of key has made for html.
func Verify(key minisign.PublicKey, html, signature []byte) error {
	var s minisign.Signature
	if err := s.UnmarshalText(signature); err != nil {
		return fmt.Errorf("the signature cannot be read: %w", err)
	}
	if s.KeyID != key.ID() {
		return fmt.Errorf("the signature is of the key %016X, not of %016X", s.KeyID, key.ID())
	}
	if !minisign.Verify(key, html, signature) {
		return errors.New("the signature does not fit: the report is not as the disc host has written it")
	}
	return nil
}

//go:embed report.html
var page string

var tmpl = template.Must(template.New("report").Funcs(template.FuncMap{
	"short":  Short,
	"where":  Where,
	"micros": func(n int64) string { return Short(time.Duration(n) * time.Microsecond) },
	"time":   func(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 MST") },
	"clock": func(d time.Duration) string {
		if d == 0 {
			return "not known"
		}
		return Short(d)
	},
	"gib":  func(n int64) string { return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30)) },
	"mib":  func(n int64) string { return fmt.Sprintf("%d MiB", (n+1<<20-1)>>20) },
	"keys": versionNames,
	"at": func(m map[string]string, k string) string {
		if m[k] == "" {
			return "–"
		}
		return m[k]
	},
}).Parse(page))

// versionNames are all names of packages that any node tells.
func versionNames(nodes []Node) []string {
	all := map[string]bool{}
	for _, n := range nodes {
		for k := range n.Versions {
			all[k] = true
		}
	}
	delete(all, "kernel") // comes first
	return append([]string{"kernel"}, slices.Sorted(maps.Keys(all))...)
}

// HTML is the report for people: one file that prints well on A4. key is shown
// as the one that the file's signature is of.
func (r *Report) HTML(key minisign.PublicKey) ([]byte, error) {
	var b bytes.Buffer
	err := tmpl.Execute(&b, struct {
		*Report
		Key  string
		File string
	}{r, key.String(), r.Name()})
	return b.Bytes(), err
}
