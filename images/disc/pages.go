package disc

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// guide has a folder of Markdown for each language. Chapters are read in the order
// of their file names, which are the same in every language; a file begins with its
// title as a heading of the first level.
//
//go:embed guide
var guide embed.FS

//go:embed guide/page.html
var pageHTML string

var pageTemplate = template.Must(template.New("page").Parse(pageHTML))

// language is one in which there is a guide.
type language struct {
	Code     string // as in BCP 47, also the name of its folder
	Name     string // as its speakers write it
	Title    string // of the guide
	Contents string // heading of the list of chapters
}

var languages = []language{
	{"en", "English", "Platter: from the disc to a chat service", "Chapters"},
	{"zh", "简体中文", "Platter：从光盘到聊天服务", "目录"},
}

// chapter is one page of one language.
type chapter struct {
	Lang  language
	File  string // name of the page beside its siblings
	Title string
	Body  template.HTML
}

// Pages is the guide as static pages for any browser, by file name: index.html
// leads to LANGUAGE/index.html, which leads to LANGUAGE/CHAPTER.html. A page
// carries its own style, needs no script, and links only to other pages. The
// error names every language that there is not, and those that there are.
func Pages(codes []string) (map[string][]byte, error) {
	chosen, err := chooseLanguages(codes)
	if err != nil {
		return nil, err
	}
	pages := map[string][]byte{}
	for _, lang := range chosen {
		chapters, err := readChapters(lang)
		if err != nil {
			return nil, err
		}
		for i, c := range chapters {
			p := page{Lang: lang, Title: c.Title, Body: c.Body, Home: "index.html"}
			if i > 0 {
				p.Before = &chapters[i-1]
			}
			if i+1 < len(chapters) {
				p.After = &chapters[i+1]
			}
			if pages[lang.Code+"/"+c.File], err = p.render(); err != nil {
				return nil, err
			}
		}
		contents := page{Lang: lang, Title: lang.Title, Chapters: chapters, Home: "../index.html"}
		if pages[lang.Code+"/index.html"], err = contents.render(); err != nil {
			return nil, err
		}
	}
	index := page{Lang: chosen[0], Title: "Platter", Languages: chosen}
	if pages["index.html"], err = index.render(); err != nil {
		return nil, err
	}
	return pages, nil
}

// Languages are the codes of all languages in which there is a guide.
func Languages() []string {
	var codes []string
	for _, l := range languages {
		codes = append(codes, l.Code)
	}
	return codes
}

func chooseLanguages(codes []string) ([]language, error) {
	var chosen []language
	var wrong []error
	for _, code := range codes {
		i := slices.IndexFunc(languages, func(l language) bool { return l.Code == code })
		switch {
		case i < 0:
			wrong = append(wrong, fmt.Errorf("there is no guide in the language %q: there are %s", code, strings.Join(Languages(), ", ")))
		case !slices.Contains(chosen, languages[i]):
			chosen = append(chosen, languages[i])
		}
	}
	if len(codes) == 0 {
		wrong = append(wrong, fmt.Errorf("no language is named for the guide: there are %s", strings.Join(Languages(), ", ")))
	}
	return chosen, errors.Join(wrong...)
}

// page is what the template shows: a chapter, the chapters of a language, or the
// languages.
type page struct {
	Lang          language
	Title         string
	Body          template.HTML
	Chapters      []chapter
	Languages     []language
	Before, After *chapter
	Home          string
}

func (p page) render() ([]byte, error) {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, p); err != nil {
		return nil, fmt.Errorf("the page %q of the guide cannot be made: %w", p.Title, err)
	}
	return b.Bytes(), nil
}

func readChapters(lang language) ([]chapter, error) {
	files, err := fs.Glob(guide, path.Join("guide", lang.Code, "*.md"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	var chapters []chapter
	for _, file := range files {
		source, err := guide.ReadFile(file)
		if err != nil {
			return nil, err
		}
		c := chapter{Lang: lang, File: strings.TrimSuffix(path.Base(file), ".md") + ".html"}
		if c.Title, c.Body, err = markdown(source); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		chapters = append(chapters, c)
	}
	return chapters, nil
}

// markdown returns the first heading and all of source as HTML. Links to other
// chapters lead to their pages.
func markdown(source []byte) (title string, body template.HTML, err error) {
	md := goldmark.New(goldmark.WithExtensions(extension.Table))
	doc := md.Parser().Parse(text.NewReader(source))
	h, ok := doc.FirstChild().(*ast.Heading)
	if !ok || h.Level != 1 {
		return "", "", errors.New("a chapter begins with its title: a line '# TITLE'")
	}
	for n := h.FirstChild(); n != nil; n = n.NextSibling() {
		if t, ok := n.(*ast.Text); ok {
			title += string(t.Segment.Value(source))
		}
	}
	err = ast.Walk(doc, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if link, ok := n.(*ast.Link); ok && entering {
			if name, ok := strings.CutSuffix(string(link.Destination), ".md"); ok {
				link.Destination = []byte(name + ".html")
			}
		}
		return ast.WalkContinue, nil
	})
	if err != nil {
		return "", "", err
	}
	var b bytes.Buffer
	if err := md.Renderer().Render(&b, source, doc); err != nil {
		return "", "", err
	}
	return title, template.HTML(b.String()), nil
}
