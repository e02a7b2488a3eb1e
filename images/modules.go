package images

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// moduleTree is what depmod wrote about the modules of one kernel, see
// modules.dep(5).
type moduleTree struct {
	file     map[string]string   // name -> path below the tree, packed or not
	needs    map[string][]string // name -> names, direct and indirect
	soft     map[string][]string // name -> what is to be loaded before it
	aliases  []alias
	builtins map[string]bool
}

type alias struct{ pattern, module string }

// moduleName is how the kernel calls the module in that file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModules reads the tree at dir, which is /lib/modules/RELEASE of an image.
func readModules(dir string) (*moduleTree, error) {
	t := &moduleTree{file: map[string]string{}, needs: map[string][]string{}, soft: map[string][]string{}, builtins: map[string]bool{}}
	each := func(name string, do func(line string)) error {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("kernel modules are not complete: %w", err)
		}
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				do(line)
			}
		}
		return nil
	}
	if err := each("modules.dep", func(line string) {
		file, deps, _ := strings.Cut(line, ":")
		name := moduleName(file)
		t.file[name] = file
		for _, d := range strings.Fields(deps) {
			t.needs[name] = append(t.needs[name], moduleName(d))
		}
	}); err != nil {
		return nil, err
	}
	if err := each("modules.alias", func(line string) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" {
			t.aliases = append(t.aliases, alias{f[1], f[2]})
		}
	}); err != nil {
		return nil, err
	}
	if err := each("modules.softdep", func(line string) {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "softdep" {
			return
		}
		pre := false
		for _, w := range f[2:] {
			if strings.HasSuffix(w, ":") && (w == "pre:" || w == "post:") {
				pre = w == "pre:"
			} else if pre {
				t.soft[f[1]] = append(t.soft[f[1]], w)
			}
		}
	}); err != nil {
		return nil, err
	}
	if err := each("modules.builtin", func(line string) { t.builtins[moduleName(line)] = true }); err != nil {
		return nil, err
	}
	return t, nil
}

// resolve finds the module that a name or an exact alias stands for. Several
// may provide an algorithm: the generic one runs on every processor.
func (t *moduleTree) resolve(name string) (string, bool) {
	under := strings.ReplaceAll(name, "-", "_")
	if _, ok := t.file[under]; ok {
		return under, true
	}
	found := ""
	for _, a := range t.aliases {
		if a.pattern == name && (found == "" || strings.HasSuffix(a.module, "_generic")) {
			found = a.module
		}
	}
	return found, found != ""
}

// closure maps every module that wanted needs, wanted itself included, to all
// that has to be loaded before it, in order. Soft dependencies count like
// others, because no modprobe resolves them on a node: ext4 would miss its
// checksum. What is built into the kernel needs no module.
func (t *moduleTree) closure(wanted []string) (map[string][]string, error) {
	done := map[string][]string{}
	var visit func(name string, trail []string) error
	visit = func(name string, trail []string) error {
		if _, ok := done[name]; ok {
			return nil
		}
		if slices.Contains(trail, name) {
			return nil // a soft dependency may run in a circle
		}
		if _, ok := t.file[name]; !ok {
			return fmt.Errorf("module %s needs %s, which is missing", strings.Join(trail, " needs "), name)
		}
		var before []string
		add := func(names ...string) {
			for _, n := range names {
				if n != name && !slices.Contains(before, n) {
					before = append(before, n)
				}
			}
		}
		direct := slices.Clone(t.needs[name])
		slices.Reverse(direct) // depmod puts what is loaded first last
		for _, s := range t.soft[name] {
			if m, ok := t.resolve(s); ok {
				direct = append(direct, m)
			}
		}
		for _, d := range direct {
			if err := visit(d, append(trail, name)); err != nil {
				return err
			}
			add(done[d]...)
			add(d)
		}
		done[name] = before
		return nil
	}
	for _, w := range wanted {
		name, ok := t.resolve(w)
		if !ok {
			if t.builtins[strings.ReplaceAll(w, "-", "_")] {
				continue
			}
			return nil, fmt.Errorf("the kernel has no module %s", w)
		}
		if err := visit(name, nil); err != nil {
			return nil, err
		}
	}
	return done, nil
}

// plainFile is where a module lies once it is unpacked.
func (t *moduleTree) plainFile(name string) string {
	file := t.file[name]
	return file[:strings.Index(file, ".ko")+len(".ko")]
}

// index makes modules.dep and modules.alias for the modules of a closure.
func (t *moduleTree) index(closure map[string][]string) (dep, alias []byte) {
	var d, a bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(closure)) {
		fmt.Fprintf(&d, "%s:", t.plainFile(name))
		for _, n := range slices.Backward(closure[name]) {
			fmt.Fprintf(&d, " %s", t.plainFile(n))
		}
		fmt.Fprintln(&d)
	}
	for _, al := range t.aliases {
		if _, ok := closure[al.module]; ok {
			fmt.Fprintf(&a, "alias %s %s\n", al.pattern, al.module)
		}
	}
	return d.Bytes(), a.Bytes()
}

// unpackModule reads a module file, which may be compressed.
func unpackModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = f
	switch filepath.Ext(file) {
	case ".ko":
	case ".xz":
		if r, err = xz.NewReader(f); err != nil {
			return nil, fmt.Errorf("module %s: %w", file, err)
		}
	case ".zst":
		z, err := zstd.NewReader(f)
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", file, err)
		}
		defer z.Close()
		r = z
	default:
		return nil, fmt.Errorf("module %s is compressed in an unknown way", file)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", file, err)
	}
	return b, nil
}
