package yamlfile

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Problem is one mistake in a file.
type Problem struct {
	File    string
	Line    int // from 1
	Column  int // from 1; 0: unknown
	Message string
}

func (p Problem) String() string {
	if p.Column > 0 {
		return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	}
	return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Message)
}

// Problems are all mistakes of a file, in file order, and then those of the
// files that it names.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// File is a document that is being read.
type File struct {
	name     string
	root     *yaml.Node
	problems Problems
}

var yamlLine = regexp.MustCompile(`line (\d+)`)

// Parse reads data, the content of the file called name. A document that is
// not YAML at all has its mistake in Err; walking it is harmless.
func Parse(name string, data []byte) *File {
	f := &File{name: name}
	docs := f.documents(data)
	if len(docs) > 0 {
		f.root = docs[0]
	}
	if len(docs) > 1 {
		f.fail(docs[1].Line, docs[1].Column, "a second document begins here: one file holds one document")
	}
	return f
}

// ParseAll reads data as Parse does, but takes any number of documents but
// none; empty ones are left out.
func ParseAll(name string, data []byte) (*File, []Value) {
	f := &File{name: name}
	var out []Value
	for _, n := range f.documents(data) {
		if v := (Value{f: f, node: n, where: "the document"}); v.Exists() {
			out = append(out, v)
		}
	}
	return f, out
}

// documents are the tops of all documents in data.
func (f *File) documents(data []byte) []*yaml.Node {
	var out []*yaml.Node
	for dec := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var doc yaml.Node
		err := dec.Decode(&doc)
		switch {
		case errors.Is(err, io.EOF) && len(out) == 0:
			f.fail(1, 0, "the file is empty")
			return nil
		case errors.Is(err, io.EOF):
			return out
		case err != nil:
			f.failYAML(err)
			return out
		case len(doc.Content) > 0:
			out = append(out, doc.Content[0])
		}
	}
}

func (f *File) failYAML(err error) {
	line := 1
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
	}
	f.fail(line, 0, "not valid YAML: "+text)
}

func (f *File) fail(line, col int, msg string) {
	f.problems = append(f.problems, Problem{f.name, max(line, 1), col, msg})
}

// Add reports a mistake in another file that this one names.
func (f *File) Add(p Problem) { f.problems = append(f.problems, p) }

// Err returns every mistake so far as Problems in file order, or nil.
func (f *File) Err() error {
	if len(f.problems) == 0 {
		return nil
	}
	other := func(p Problem) string { // sorts the file itself first
		if p.File == f.name {
			return ""
		}
		return p.File
	}
	slices.SortStableFunc(f.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(other(a), other(b)), a.Line-b.Line, a.Column-b.Column)
	})
	return slices.Compact(f.problems)
}

// Root is the document's top.
func (f *File) Root() Value { return Value{f: f, node: f.root, where: "the file"} }

// Value is a place in the document; it may be absent.
type Value struct {
	f      *File
	node   *yaml.Node // nil: absent
	parent *yaml.Node // where to report what is absent
	where  string     // the key, for messages
}

// Exists tells whether the value is in the file. An empty value (`key:`) does
// not exist.
func (v Value) Exists() bool {
	return v.node != nil && !(v.node.Kind == yaml.ScalarNode && v.node.Tag == "!!null")
}

// IsList tells whether the value is a sequence.
func (v Value) IsList() bool { return v.node != nil && v.node.Kind == yaml.SequenceNode }

// IsMapping tells whether the value is a mapping.
func (v Value) IsMapping() bool { return v.node != nil && v.node.Kind == yaml.MappingNode }

// Line is the value's line, or its parent's where it is absent.
func (v Value) Line() int {
	if v.node != nil {
		return v.node.Line
	}
	if v.parent != nil {
		return v.parent.Line
	}
	return 1
}

// Failf reports a mistake at the value.
func (v Value) Failf(format string, args ...any) {
	n := v.node
	if n == nil {
		n = v.parent
	}
	if n == nil {
		v.f.fail(1, 0, fmt.Sprintf(format, args...))
		return
	}
	v.f.fail(n.Line, n.Column, fmt.Sprintf(format, args...))
}

// Required reports an absent value and returns v. Nothing is reported below a
// part of the file that could not be read.
func (v Value) Required() Value {
	if !v.Exists() && v.parent != nil {
		v.Failf("%s is missing", v.where)
	}
	return v
}

// Fields reads a mapping with no other keys than known. Absent keys give
// values that do not exist.
func (v Value) Fields(known ...string) map[string]Value {
	out := make(map[string]Value, len(known))
	parent := v.node
	if v.Exists() && v.node.Kind != yaml.MappingNode {
		v.Failf("%s must be a mapping (key: value lines), not %s", v.where, kind(v.node))
		parent = nil
	}
	for _, k := range known {
		out[k] = Value{f: v.f, parent: parent, where: k}
	}
	if parent == nil || v.node.Kind != yaml.MappingNode {
		return out
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(v.node.Content); i += 2 {
		key, val := v.node.Content[i], v.node.Content[i+1]
		at := Value{f: v.f, node: key}
		if line, dup := seen[key.Value]; dup {
			at.Failf("%s is given twice, first on line %d", key.Value, line)
			continue
		}
		seen[key.Value] = key.Line
		if !slices.Contains(known, key.Value) {
			at.Failf("unknown key %q%s", key.Value, Suggest(key.Value, known))
			continue
		}
		if val.Kind == yaml.AliasNode {
			at.Failf("%s: YAML aliases are not supported, write the value out", key.Value)
			continue
		}
		out[key.Value] = Value{f: v.f, node: val, parent: key, where: key.Value}
	}
	return out
}

// Head reads some keys of a mapping that Fields reads whole elsewhere: it says
// nothing about the others, nor about what is no mapping.
func (v Value) Head(keys ...string) map[string]Value {
	out := make(map[string]Value, len(keys))
	for _, k := range keys {
		out[k] = Value{f: v.f, where: k}
		if !v.IsMapping() {
			continue
		}
		out[k] = Value{f: v.f, parent: v.node, where: k}
		for i := 0; i+1 < len(v.node.Content); i += 2 {
			if key, val := v.node.Content[i], v.node.Content[i+1]; key.Value == k && val.Kind != yaml.AliasNode {
				out[k] = Value{f: v.f, node: val, parent: key, where: k}
				break
			}
		}
	}
	return out
}

// Pair is one line of a mapping whose keys are data.
type Pair struct {
	Key   Value // exists always; Get it as any scalar
	Value Value
}

// Pairs reads a mapping whose keys are data, in file order; an absent one is
// empty. A key that is given twice is reported.
func (v Value) Pairs() []Pair {
	if !v.Exists() {
		return nil
	}
	var keys []string
	if v.node.Kind == yaml.MappingNode {
		for i := 0; i < len(v.node.Content); i += 2 {
			keys = append(keys, v.node.Content[i].Value)
		}
	}
	fields := v.Fields(keys...)
	var out []Pair
	for i, k := range keys {
		if slices.Contains(keys[:i], k) {
			continue
		}
		key := Value{f: v.f, node: v.node.Content[2*i], parent: v.node, where: v.where}
		out = append(out, Pair{key, fields[k]})
	}
	return out
}

// List reads a sequence; an absent one is empty.
func (v Value) List() []Value {
	if !v.Exists() {
		return nil
	}
	if v.node.Kind != yaml.SequenceNode {
		v.Failf("%s must be a list, not %s", v.where, kind(v.node))
		return nil
	}
	out := make([]Value, len(v.node.Content))
	for i, n := range v.node.Content {
		out[i] = Value{f: v.f, node: n, parent: v.node, where: fmt.Sprintf("%s[%d]", v.where, i)}
	}
	return out
}

// Get reads a scalar with parse; an absent one gives the zero value. The error
// of parse should complete the sentence "KEY VALUE: ...".
func Get[T any](v Value, parse func(string) (T, error)) T {
	var zero T
	if !v.Exists() {
		return zero
	}
	if v.node.Kind != yaml.ScalarNode {
		v.Failf("%s must be a single value, not %s", v.where, kind(v.node))
		return zero
	}
	t, err := parse(v.node.Value)
	if err != nil {
		v.Failf("%s %q: %v", v.where, v.node.Value, err)
		return zero
	}
	return t
}

// Text is a parser for Get that takes any text but the empty one.
func Text(s string) (string, error) {
	if strings.TrimSpace(s) == "" {
		return "", errors.New("must not be empty")
	}
	return s, nil
}

// Bool is a parser for Get that takes true and false and nothing else.
func Bool(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, errors.New("must be true or false")
}

// Int returns a parser for Get that takes whole numbers from lo to hi.
func Int(lo, hi int) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < lo || n > hi {
			return 0, fmt.Errorf("must be a whole number from %d to %d", lo, hi)
		}
		return n, nil
	}
}

// Match returns a parser for Get that takes text of the form re, which is
// described by what.
func Match(re *regexp.Regexp, what string) func(string) (string, error) {
	return func(s string) (string, error) {
		if !re.MatchString(s) {
			return "", fmt.Errorf("must be %s", what)
		}
		return s, nil
	}
}

var sizeForm = regexp.MustCompile(`^(\d+(?:\.\d+)?)\s*([kKMGTP]?)(i?)B?$`)

// Size is a parser for Get that takes a number of bytes: 500GB, 12GiB, 4096.
// Decimal and binary units differ as in the standards.
func Size(s string) (int64, error) {
	m := sizeForm.FindStringSubmatch(strings.TrimSpace(s))
	if m == nil || (m[2] == "" && m[3] != "") {
		return 0, errors.New("must be a size such as 500GB or 12GiB")
	}
	num, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return 0, errors.New("must be a size such as 500GB or 12GiB")
	}
	base := 1000.0
	if m[3] != "" {
		base = 1024
	}
	for range strings.Index(" KMGTP", strings.ToUpper(m[2] + " ")[:1]) {
		num *= base
	}
	if num > 1<<62 {
		return 0, errors.New("is too large")
	}
	return int64(num), nil
}

func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	return "a single value"
}

// Suggest completes a message about a word that is not known: it names the
// known one that is closest, or all of them.
func Suggest(got string, known []string) string {
	best, bestD := "", 3
	for _, k := range known {
		if d := distance(got, k); d < bestD {
			best, bestD = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf(", did you mean %q?", best)
	}
	return ", known here: " + strings.Join(known, ", ")
}

// distance is the Levenshtein distance.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		prev := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			prev, row[j] = row[j], min(row[j]+1, row[j-1]+1, prev+cost)
		}
	}
	return row[len(b)]
}
