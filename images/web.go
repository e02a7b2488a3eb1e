package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// A recipe's folder web/ says what web browsers get from nodes. It is written in
// JavaScript and comes from npm, not from Debian:
//
//	package.json         the packages, with their exact versions
//	package-lock.json    and of everything that they need, each with its hash
//	files                what of them goes into the image: from, to
//
// The lock file names no registry, npm asks the one it is configured for.
const (
	webFiles = "web/files"
	// webRoot is where the files lie in the image.
	webRoot = "usr/share/platter/web"
)

// webNever is of use only to those who change the programs.
var webNever = regexp.MustCompile(`\.(map|ts)$`)

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|copyright|notice)`)

// web returns a folder with the files of the recipe's web part and the licences
// of all its packages, or "" where the recipe has none. What an earlier build of
// the same part left is used again. npm's output goes to log.
func (o BuildOptions) web(ctx context.Context, work *scratch, r recipe, log io.Writer) (string, error) {
	part, err := fs.Sub(r.files, "web")
	if err != nil {
		return "", err
	}
	want, err := lines(r.files, webFiles)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	hash, err := recipe{files: part}.digest([]byte(recipeVersion))
	if err != nil {
		return "", err
	}
	kept, err := filepath.Abs(filepath.Join(o.WorkDir, "web-"+hash[:16]))
	if err != nil {
		return "", err
	}
	if size, err := treeSize(kept); err == nil {
		fmt.Fprintf(o.Out, "  web client reused, %s\n", mb(size))
		return kept, nil
	}
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", fmt.Errorf("image %s was not built: npm, which fetches its web client, is not installed: install Node.js with npm (on Debian: apt install npm) and build again: %w", o.Name, err)
	}

	fetched, fresh := filepath.Join(work.dir, "npm"), filepath.Join(work.dir, "web")
	if err := copyTree(part, ".", fetched); err != nil {
		return "", err
	}
	said := &lineWriter{each: func(line string) { fmt.Fprintln(log, line) }}
	// Without --no-install-links npm 9.2, which is Debian's, looks for a folder
	// inside a package before it has fetched the package.
	cmd := exec.CommandContext(ctx, npm, "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--no-install-links")
	cmd.Dir, cmd.Stdout, cmd.Stderr = fetched, said, said
	fmt.Fprintf(o.Out, "  fetching the web client with npm\n")
	if err := work.run(cmd); err != nil {
		if ctx.Err() != nil {
			return "", fmt.Errorf("the build of image %s was interrupted, the store is as it was: %w", o.Name, ctx.Err())
		}
		return "", fmt.Errorf("image %s was not built: npm could not fetch its web client, see that it reaches its registry (npm ping); its last lines are:\n%s\n%w", o.Name, strings.Join(said.last, "\n"), err)
	}
	modules := filepath.Join(fetched, "node_modules")
	if err := pickWeb(modules, want, fresh); err != nil {
		return "", fmt.Errorf("image %s was not built: its web client cannot be put together: %w", o.Name, err)
	}
	unix.Sync() // what is kept is whole, also after a power cut
	if err := os.Rename(fresh, kept); err != nil {
		return "", fmt.Errorf("web client cannot be kept in the work folder: %w", err)
	}
	size, err := treeSize(kept)
	fmt.Fprintf(o.Out, "  web client: %s\n", mb(size))
	return kept, err
}

// pickWeb copies from node_modules to the folder to what the lines of want name,
// and the licences.
func pickWeb(modules string, want []string, to string) error {
	for _, line := range want {
		f := strings.Fields(line)
		if len(f) != 2 || !filepath.IsLocal(f[0]) || !filepath.IsLocal(f[1]) {
			return fmt.Errorf("%s: want 'from to', have %q", webFiles, line)
		}
		if err := copyFiles(filepath.Join(modules, f[0]), filepath.Join(to, f[1]), func(name string) bool { return !webNever.MatchString(name) }); err != nil {
			return fmt.Errorf("%s names what the packages do not have, or no more: %w", webFiles, err)
		}
	}
	return copyFiles(modules, filepath.Join(to, "licences"), licenceFile.MatchString)
}

// copyFiles copies a file, or those of a folder whose names are wanted. Links are
// not followed, folders without wanted files are left out.
func copyFiles(from, to string, wanted func(name string) bool) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !wanted(d.Name()) {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		file := filepath.Join(to, rel)
		return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, 0o644))
	})
}

// WebLock is npm's lock file of the web client that images built by the recipe
// called name hold; nil where it has none, or where there is no such recipe.
func WebLock(name string) []byte {
	b, _ := recipes.ReadFile(path.Join("recipe", name, "web/package-lock.json"))
	return b
}
