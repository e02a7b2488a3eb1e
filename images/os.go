package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"platter/hostprep/versions"
	"platter/provision"
)

// BuildOptions say which operating system image to build, and where.
type BuildOptions struct {
	Store *Store
	// Name of the image and of its recipe: debian-13.
	Name string
	// LockFile holds the package versions to keep to. It is written after a
	// build that came to others; one that is missing locks nothing.
	LockFile string
	// Frozen makes a build fail that would have to leave a locked version.
	Frozen bool
	// Update moves to the newest versions, whatever is locked.
	Update bool
	// Allow names known-bad combinations of versions to build all the same.
	Allow []string
	// SecretKey is the file of a minisign key that the store trusts.
	SecretKey string
	// WorkDir is for scratch; it takes about 3 GB while a build runs.
	WorkDir string
	// Suite is the Debian suite; its updates and its security suite come with
	// it.
	Suite string
	// Mirrors are handed to mmdebstrap: addresses or lines of a sources.list.
	// None: mmdebstrap's own default.
	Mirrors []string
	// Out gets lines for people.
	Out io.Writer
}

// Built is what came of a build.
type Built struct {
	Ref   provision.ImageRef
	Image *provision.Image
	// Reused: nothing had changed since the last build.
	Reused bool
	// Changes against the lock file; empty where there was none.
	Changes []Change
}

// BuildOS builds an operating system image and publishes it under its name. It
// needs root, mmdebstrap, mkfs.ext4, mkfs.vfat, mcopy and, for a recipe with a web
// part, npm. An image whose inputs have not changed is not built again. When it is
// cut short the store is as it was.
func BuildOS(ctx context.Context, o BuildOptions) (*Built, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("an operating system image can only be built as root: its files belong to many users")
	}
	r, err := openRecipe(o.Name)
	if err != nil {
		return nil, err
	}
	key, err := o.Store.readSecretKey(o.SecretKey)
	if err != nil {
		return nil, err
	}
	lockText, err := os.ReadFile(o.LockFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lock file cannot be read: %w", err)
	}
	lock, err := parseLock(lockText)
	if err != nil {
		return nil, fmt.Errorf("lock file %s is not valid: %w", o.LockFile, err)
	}
	if o.Frozen && len(lock) == 0 {
		return nil, fmt.Errorf("lock file %s holds nothing to be frozen to: build once without --frozen", o.LockFile)
	}

	for _, name := range o.Allow {
		if !slices.Contains(versions.Names(), name) {
			return nil, fmt.Errorf("--allow %s: no such combination, known are: %s", name, strings.Join(versions.Names(), ", "))
		}
	}
	if !o.Update {
		// Minutes sooner than after the build.
		if _, err := o.combination(lock, io.Discard); err != nil {
			return nil, err
		}
	}

	inputs, err := o.inputs(r, key, lock)
	if err != nil {
		return nil, err
	}
	if old, err := o.Store.readRef(o.Name); err == nil && old.Inputs == inputs && !o.Update {
		if ref, im, err := o.Store.Image(o.Name); err == nil {
			fmt.Fprintf(o.Out, "image %s %s reused: nothing it is made of has changed\n", o.Name, im.Version)
			return &Built{Ref: ref, Image: im, Reused: true}, nil
		}
	}

	work, err := newScratch(o.WorkDir, o.Name)
	if err != nil {
		return nil, err
	}
	defer work.remove()
	start := time.Now()

	use := lock
	if o.Update {
		use = nil
	}
	logFile := filepath.Join(o.WorkDir, o.Name+".log")
	log, err := os.Create(logFile)
	if err != nil {
		return nil, fmt.Errorf("build log cannot be written: %w", err)
	}
	defer log.Close()
	web, err := o.web(ctx, work, r, log)
	if err != nil {
		return nil, err
	}
	if err := o.debootstrap(ctx, work, r, use, web, log); err != nil {
		return nil, err
	}
	found, err := os.ReadFile(filepath.Join(work.dir, "root", "platter", "packages"))
	if err != nil {
		return nil, err
	}
	built, err := parseLock(found)
	if err != nil {
		return nil, fmt.Errorf("list of packages of the new image: %w", err)
	}
	changes, err := o.checkLock(lock, built)
	if err != nil {
		return nil, err
	}
	if inputs, err = o.inputs(r, key, built); err != nil {
		return nil, err
	}
	combination, err := o.combination(built, o.Out)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(work.dir, "root", versions.File)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(combination.String()), 0o644)); err != nil {
		return nil, fmt.Errorf("the new image's %s: %w", versions.File, err)
	}

	sources, im, err := makeParts(ctx, work.dir, r.epoch, o.Out)
	if err != nil {
		return nil, err
	}
	im.Name = o.Name
	im.Version += "-" + inputs[:8]
	show := progress(o.Out, "packing")
	im.Pack, im.Parts, err = o.Store.pack(ctx, sources, show)
	if err != nil {
		return nil, err
	}
	if len(changes) > 0 || len(lock) == 0 {
		if err := writeFile(o.LockFile, formatLock(o.Name, built)); err != nil {
			return nil, err
		}
	}
	digest, err := o.Store.publish(o.Name, im, inputs, key)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(o.Out, "image %s %s, kernel %s: %s packed, built in %s\n", im.Name, im.Version, im.Kernel, mb(im.Pack.Size), time.Since(start).Round(time.Second))
	return &Built{Ref: provision.ImageRef{Name: o.Name, Digest: digest}, Image: im, Changes: changes}, nil
}

// recipeVersion changes when the code that turns a recipe into parts does.
const recipeVersion = "4"

// inputs is a hash over everything that decides how the image comes out.
func (o BuildOptions) inputs(r recipe, key secretKey, lock map[string]string) (string, error) {
	storage, err := fs.ReadFile(recipes, storageModules)
	if err != nil {
		return "", err
	}
	rest, err := json.Marshal([]any{recipeVersion, o.Suite, o.Mirrors, key.ID(), o.Allow, r.epoch.Unix()})
	if err != nil {
		return "", err
	}
	return r.digest(storage, rest, formatLock(o.Name, lock))
}

// checkLock reports every package that left its locked version.
func (o BuildOptions) checkLock(lock, built map[string]string) ([]Change, error) {
	if len(lock) == 0 {
		return nil, nil
	}
	changes := compareLock(lock, built)
	if len(changes) == 0 {
		return nil, nil
	}
	fmt.Fprintf(o.Out, "WARNING: %d packages differ from %s:\n", len(changes), o.LockFile)
	for _, c := range changes {
		fmt.Fprintf(o.Out, "  %s\n", c)
	}
	if o.Frozen {
		return nil, fmt.Errorf("image %s was not built: %d packages are not to be had in their locked versions; build without --frozen to accept the versions above", o.Name, len(changes))
	}
	fmt.Fprintf(o.Out, "The lock file is rewritten.\n")
	return changes, nil
}

// combination is what the packages make of kernel, QEMU, libvirt and Open
// vSwitch. One that is known not to work is refused unless it is allowed by
// name; what is known and bearable is told on out.
func (o BuildOptions) combination(packages map[string]string, out io.Writer) (versions.Locked, error) {
	l := versions.Locked{Versions: versions.FromPackages(packages)}
	bad, err := versions.KnownBad(l.Versions)
	if err != nil {
		return l, fmt.Errorf("image %s was not built: %w", o.Name, err)
	}
	var refused, names []string
	for _, b := range bad {
		switch {
		case slices.Contains(o.Allow, b.Name):
			l.Allowed = append(l.Allowed, b.Name)
			fmt.Fprintf(out, "WARNING: allowed by name: %s\n", b)
		case b.Refuse:
			refused, names = append(refused, b.String()), append(names, "--allow "+b.Name)
		default:
			fmt.Fprintf(out, "WARNING: %s\n", b)
		}
	}
	if len(refused) > 0 {
		return l, fmt.Errorf("image %s was not built, its packages are known not to work together:\n  %s\nmove to newer versions with --update, or accept it with %s", o.Name, strings.Join(refused, "\n  "), strings.Join(names, " "))
	}
	return l, nil
}

// debootstrap makes the tree work/root, with the files of the folder web in it.
func (o BuildOptions) debootstrap(ctx context.Context, work *scratch, r recipe, lock map[string]string, web string, log *os.File) error {
	setup := filepath.Join(work.dir, "setup")
	if err := copyTree(r.files, "overlay", setup); err != nil {
		return err
	}
	if web != "" {
		if err := copyTree(os.DirFS(web), ".", filepath.Join(setup, webRoot)); err != nil {
			return err
		}
	}
	storage, err := words(recipes, storageModules)
	if err != nil {
		return err
	}
	packages, err := lines(r.files, "packages")
	if err != nil {
		return err
	}
	excludes, err := lines(r.files, "exclude")
	if err != nil {
		return err
	}
	finish, err := fs.ReadFile(r.files, "finish")
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"setup/usr/share/platter/storage-modules": []byte(strings.Join(storage, "\n") + "\n"),
		"setup/etc/apt/preferences.d/platter":     pins(lock),
		"finish":                                  finish,
	} {
		path := filepath.Join(work.dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}

	args := []string{
		"--mode=root", "--variant=minbase", "--format=directory", "--architectures=amd64", "--verbose",
		"--include=" + strings.Join(packages, ","),
		`--aptopt=Acquire::Languages "none"`, `--aptopt=Acquire::Retries "3"`,
		"--setup-hook=cp -a " + shellQuote(setup) + `/. "$1"/`,
		// The pins belong to this build, not to the machine that is installed.
		"--customize-hook=rm \"$1\"/etc/apt/preferences.d/platter",
		"--customize-hook=cp " + shellQuote(filepath.Join(work.dir, "finish")) + ` "$1"/finish && chroot "$1" sh /finish && rm "$1"/finish`,
	}
	for _, e := range excludes {
		if keep, ok := strings.CutPrefix(e, "!"); ok {
			args = append(args, "--dpkgopt=path-include="+keep)
		} else {
			args = append(args, "--dpkgopt=path-exclude="+e)
		}
	}
	args = append(args, o.Suite, filepath.Join(work.dir, "root"))
	args = append(args, o.Mirrors...)

	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", r.epoch.Unix()))
	cmd.Stdout = log
	// mmdebstrap tells its steps in lines that start with "I: ".
	steps := &lineWriter{each: func(line string) {
		fmt.Fprintln(log, line)
		if step, ok := strings.CutPrefix(line, "I: "); ok {
			fmt.Fprintf(o.Out, "  %s\n", step)
		}
	}}
	cmd.Stderr = steps
	fmt.Fprintf(o.Out, "building Debian %s with %d named packages, %d of them locked (log: %s)\n", o.Suite, len(packages), len(lock), log.Name())
	if err := work.run(cmd); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("the build of image %s was interrupted, the store is as it was: %w", o.Name, ctx.Err())
		}
		return fmt.Errorf("mmdebstrap failed, %s says why, its last lines are:\n%s\n%w", log.Name(), strings.Join(steps.last, "\n"), err)
	}
	return nil
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
