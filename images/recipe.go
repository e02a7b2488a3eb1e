package images

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

//go:embed recipe
var recipes embed.FS

// A recipe is everything about an operating system image that is data:
//
//	packages          names, each with its reason
//	exclude           paths that are not unpacked
//	overlay/          files that lie in the root before any package does
//	finish            a script that runs in the finished root
//	web/              what web browsers get from nodes, from npm; may be missing
//	epoch             the date of all that the build makes, see recipe.epoch
type recipe struct {
	files fs.FS
	// epoch is the date of everything that has none of its own before it: what a
	// build makes, and packages from later. It is the environment's
	// SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch/),
	// else the recipe's. It does not follow the packages: a date that changes with
	// them changes files that would be those of the image before, the largest is
	// the initramfs.
	epoch time.Time
}

// shared files of all recipes
const (
	storageModules = "recipe/storage-modules" // drivers that a root disk can hang on
	nodeModules    = "recipe/node-modules"    // what the installer needs beside them
)

func openRecipe(name string) (recipe, error) {
	sub, err := fs.Sub(recipes, path.Join("recipe", name))
	if err == nil {
		_, err = fs.Stat(sub, "packages")
	}
	if err != nil {
		return recipe{}, fmt.Errorf("there is no recipe for an image called %s: %w", name, err)
	}
	seconds, ok := os.LookupEnv("SOURCE_DATE_EPOCH")
	if !ok {
		l, err := lines(sub, "epoch")
		if err != nil {
			return recipe{}, fmt.Errorf("recipe %s: %w", name, err)
		}
		seconds = strings.Join(l, " ")
	}
	n, err := strconv.ParseUint(seconds, 10, 32)
	if err != nil {
		return recipe{}, fmt.Errorf("SOURCE_DATE_EPOCH is %q: it has to be a number of seconds since 1970: %w", seconds, err)
	}
	return recipe{sub, time.Unix(int64(n), 0)}, nil
}

// lines are the lines of a file without comments.
func lines(fsys fs.FS, name string) ([]string, error) {
	b, err := fs.ReadFile(fsys, name)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, line := range strings.Split(string(b), "\n") {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line != "" {
			out = append(out, line)
		}
	}
	return out, nil
}

// words are all words of a file without comments.
func words(fsys fs.FS, name string) ([]string, error) {
	ls, err := lines(fsys, name)
	return strings.Fields(strings.Join(ls, " ")), err
}

// digest is a hash over every file of the recipe and over more.
func (r recipe) digest(more ...[]byte) (string, error) {
	var b bytes.Buffer
	err := fs.WalkDir(r.files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := fs.ReadFile(r.files, name)
		fmt.Fprintf(&b, "%s %s\n", name, hexSum(content))
		return err
	})
	if err != nil {
		return "", err
	}
	for _, m := range more {
		fmt.Fprintf(&b, "%s\n", hexSum(m))
	}
	return hexSum(b.Bytes()), nil
}

// copyTree writes a folder of the recipe below dir. Scripts become executable.
func copyTree(fsys fs.FS, root, dir string) error {
	return fs.WalkDir(fsys, root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, rel)
		if d.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		b, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if bytes.HasPrefix(b, []byte("#!")) {
			mode = 0o755
		}
		return os.WriteFile(to, b, mode)
	})
}
