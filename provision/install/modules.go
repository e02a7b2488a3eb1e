package install

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Modules loads kernel modules by name or by what a device says of itself. It
// reads modules.dep and modules.alias (modules.dep(5)), whose dependencies are
// complete in the initramfs.
type Modules struct {
	dir  string
	load func(file string) error // finit_module

	file    map[string]string   // name -> file
	needs   map[string][]string // name -> files, the first to load last
	aliases map[string][]alias  // by bus, what is before the colon

	mu   sync.Mutex
	done map[string]func() error // by file; waits for a load under way
}

type alias struct{ pattern, module string }

// OpenModules reads the index at dir, /lib/modules/RELEASE.
func OpenModules(dir string) (*Modules, error) {
	m := &Modules{dir: dir, load: finitModule, file: map[string]string{}, needs: map[string][]string{}, aliases: map[string][]alias{}, done: map[string]func() error{}}
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("index of the drivers: %w", err)
	}
	for line := range strings.Lines(string(dep)) {
		file, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			name := moduleName(file)
			m.file[name], m.needs[name] = file, strings.Fields(deps)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "modules.alias"))
	if err != nil {
		return nil, fmt.Errorf("index of the drivers: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" {
			bus := busOf(f[1])
			m.aliases[bus] = append(m.aliases[bus], alias{f[1], f[2]})
		}
	}
	return m, nil
}

func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func busOf(modalias string) string {
	bus, _, _ := strings.Cut(modalias, ":")
	return bus
}

// LoadFor loads every driver that claims the device with that modalias.
// Drivers that do not load are an error together; the others are loaded.
func (m *Modules) LoadFor(modalias string) error {
	var errs []error
	for _, a := range m.aliases[busOf(modalias)] {
		if ok, err := path.Match(a.pattern, modalias); err == nil && ok {
			errs = append(errs, m.Load(a.module))
		}
	}
	return errors.Join(errs...)
}

// Load loads a module after all that it needs. What is loaded already, or
// unknown because it is built in, is no error. Different modules may be loaded
// at once.
func (m *Modules) Load(name string) error {
	name = strings.ReplaceAll(name, "-", "_")
	file, ok := m.file[name]
	if !ok {
		return nil
	}
	needs := m.needs[name]
	for i := len(needs) - 1; i >= 0; i-- {
		if err := m.once(needs[i]); err != nil {
			return fmt.Errorf("driver %s needs %s: %w", name, moduleName(needs[i]), err)
		}
	}
	if err := m.once(file); err != nil {
		return fmt.Errorf("driver %s: %w", name, err)
	}
	return nil
}

func (m *Modules) once(file string) error {
	m.mu.Lock()
	load, ok := m.done[file]
	if !ok {
		load = sync.OnceValue(func() error {
			if err := m.load(filepath.Join(m.dir, file)); !errors.Is(err, unix.EEXIST) {
				return err
			}
			return nil
		})
		m.done[file] = load
	}
	m.mu.Unlock()
	return load()
}

// moduleInitCompressed is MODULE_INIT_COMPRESSED_FILE of the kernel's
// include/uapi/linux/module.h.
const moduleInitCompressed = 4

func finitModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if path.Ext(file) != ".ko" {
		flags = moduleInitCompressed
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}
