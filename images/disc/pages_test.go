package disc

import (
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/html"
)

// TestPages follows every link of every page, in every choice of languages: each
// leads to a page that there is, and nothing is asked of anybody else.
func TestPages(t *testing.T) {
	for _, codes := range [][]string{{"en"}, {"zh"}, {"en", "zh"}, {"zh", "en", "zh"}} {
		pages, err := Pages(codes)
		if err != nil {
			t.Fatal(err)
		}
		reached := map[string]bool{}
		var visit func(name string)
		visit = func(name string) {
			if reached[name] {
				return
			}
			reached[name] = true
			content, ok := pages[name]
			if !ok {
				t.Errorf("%v: a link leads to %s, which is not there", codes, name)
				return
			}
			for _, link := range links(t, name, content) {
				visit(path.Join(path.Dir(name), link))
			}
		}
		visit("index.html")
		for name, content := range pages {
			if !reached[name] {
				t.Errorf("%v: no link leads to %s", codes, name)
			}
			if len(content) < 500 {
				t.Errorf("%v: %s is empty: %s", codes, name, content)
			}
		}
		distinct := slices.Compact(slices.Sorted(slices.Values(codes)))
		if want := 1 + len(distinct)*10; len(pages) != want {
			t.Errorf("%v: %d pages, want %d: an index, and for each language one and nine chapters", codes, len(pages), want)
		}
	}
}

// links are where a page leads to; whatever else would be loaded or run is an error.
func links(t *testing.T, name string, content []byte) (to []string) {
	t.Helper()
	doc, err := html.Parse(bytes.NewReader(content))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	for n := range doc.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		if slices.Contains([]string{"script", "link", "img", "iframe", "form", "object", "base"}, n.Data) {
			t.Errorf("%s has an element %s", name, n.Data)
		}
		for _, a := range n.Attr {
			switch {
			case a.Key == "href" && n.Data == "a" && strings.HasSuffix(a.Val, ".html") && !strings.Contains(a.Val, ":") && !path.IsAbs(a.Val):
				to = append(to, a.Val)
			case a.Key == "href", a.Key == "src", strings.HasPrefix(a.Key, "on"):
				t.Errorf("%s: <%s %s=%q> leads off the disc or runs something", name, n.Data, a.Key, a.Val)
			}
		}
	}
	if bytes.Contains(content, []byte("@import")) || bytes.Contains(content, []byte("url(")) {
		t.Errorf("%s: its style loads something", name)
	}
	if bytes.Contains(content, []byte("**")) {
		t.Errorf("%s: a mark for bold text is seen as such: there must be a space, or no punctuation before it", name)
	}
	return to
}

// TestPagesLanguages holds the chapters of all languages beside each other: the same
// files, the same commands, as many tables with as many rows.
func TestPagesLanguages(t *testing.T) {
	shape := func(code, file string) string {
		source, err := guide.ReadFile(path.Join("guide", code, file))
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		code, inside := "", false
		for line := range strings.Lines(string(source)) {
			line = strings.TrimRight(line, "\n")
			switch {
			case strings.HasPrefix(line, "```"):
				inside = !inside
			case inside:
				code, _, _ = strings.Cut(line, " #") // comments are translated
				out = append(out, strings.TrimSpace(code))
			case strings.HasPrefix(line, "|"):
				out = append(out, fmt.Sprintf("row of %d", strings.Count(line, "|")))
			case strings.HasPrefix(line, "#"):
				out = append(out, strings.Repeat("#", strings.Count(line, "#")))
			}
		}
		return strings.Join(out, "\n")
	}
	first, err := fs.Glob(guide, "guide/en/*.md")
	if err != nil || len(first) != 9 {
		t.Fatalf("chapters in English: %v, %v", first, err)
	}
	for _, file := range first {
		file = path.Base(file)
		for _, code := range Languages() {
			if got, want := shape(code, file), shape("en", file); got != want {
				t.Errorf("%s/%s has not the headings, rows and commands of en/%s:\n%s\n--- instead of\n%s", code, file, file, got, want)
			}
		}
	}
}

func TestPagesUnknownLanguage(t *testing.T) {
	_, err := Pages([]string{"en", "fr", "xx"})
	for _, want := range []string{`"fr"`, `"xx"`, "en, zh"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
	if _, err := Pages(nil); err == nil || !strings.Contains(err.Error(), "en, zh") {
		t.Errorf("no language at all: %v", err)
	}
}
