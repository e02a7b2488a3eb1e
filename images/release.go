package images

import (
	"bytes"
	"context"
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

// stackRef is the ref of the newest release of the stack; every release also
// has stackRef@VERSION.
const stackRef = "stack"

// PackagesFolder is the folder beside a stack file that holds packages of the
// site's own.
const PackagesFolder = "packages"

// ReleaseOptions say which release of a stack to build, and where.
type ReleaseOptions struct {
	Store *Store
	// Stack is what Dir holds: container archives are there and, in
	// PackagesFolder, packages that are taken rather than those of any mirror.
	// Dir is empty for the stack that comes with the program.
	Stack *provision.Stack
	Dir   string
	// Image is that of the nodes: what it has need not be in the release.
	Image string
	// Complete puts packages that the stack names into the release even if the
	// image has them in the same version: else no node can go back to it after a
	// later release.
	Complete bool
	// Offline asks no mirror.
	Offline bool
	// Replace takes the place of a release with the same version and other
	// content.
	Replace bool
	// LockFile, Frozen, Update, SecretKey, WorkDir, Suite, Mirrors and Out are as
	// in BuildOptions. The lock file has the packages that came from mirrors.
	LockFile       string
	Frozen, Update bool
	SecretKey      string
	WorkDir        string
	Suite          string
	Mirrors        []string
	Out            io.Writer
}

// BuiltRelease is what came of a build.
type BuiltRelease struct {
	Ref     provision.ReleaseRef
	Release *provision.Release
	Changes []Change // against the lock file; empty where there was none
}

// BuildRelease puts everything that the stack needs beyond the image together,
// and publishes it. It needs root, mmdebstrap, apt-get, dpkg-deb and debugfs.
// Equal inputs make an equal release. When it is cut short the store is as it
// was.
func BuildRelease(ctx context.Context, o ReleaseOptions) (*BuiltRelease, error) {
	key, err := o.Store.readSecretKey(o.SecretKey)
	if err != nil {
		return nil, err
	}
	ref, im, err := o.Store.Image(o.Image)
	if err != nil {
		return nil, err
	}
	lockFile, err := os.ReadFile(o.LockFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lock file cannot be read: %w", err)
	}
	lock, err := parseLock(lockFile)
	if err != nil {
		return nil, fmt.Errorf("lock file %s is not valid: %w", o.LockFile, err)
	}
	if o.Frozen && len(lock) == 0 {
		return nil, fmt.Errorf("lock file %s holds nothing to be frozen to: build once without --frozen", o.LockFile)
	}
	local, err := o.localPackages(ctx)
	if err != nil {
		return nil, err
	}
	archives, err := o.archives()
	if err != nil {
		return nil, err
	}
	work, err := newScratch(o.WorkDir, "stack")
	if err != nil {
		return nil, err
	}
	defer work.remove()

	b := &releaseBuild{ReleaseOptions: o, work: work, im: im, lock: lock, local: local}
	b.resolve()
	if err := b.gather(ctx); err != nil {
		return nil, err
	}
	changes, built, err := b.compare()
	if err != nil {
		return nil, err
	}
	r := &provision.Release{Format: provision.ReleaseFormat, Name: o.Stack.Name, Version: o.Stack.Version, Image: ref, Stack: b.exactStack()}
	for _, a := range archives {
		object, err := o.Store.putFile(a.path)
		if err != nil {
			return nil, fmt.Errorf("%s cannot be stored: %w", a.path, err)
		}
		a.Size, a.Digest = object.Size, object.Hash
		r.Files = append(r.Files, a.ReleaseFile)
	}
	files, err := b.store()
	if err != nil {
		return nil, err
	}
	r.Files = append(r.Files, files...)
	slices.SortFunc(r.Files, func(a, b provision.ReleaseFile) int { return strings.Compare(a.Name, b.Name) })
	raw, digest, err := r.Manifest()
	if err != nil {
		return nil, err
	}
	if _, err := provision.ReadRelease(raw); err != nil {
		return nil, err // names that two files have, or that none may have
	}
	if len(changes) > 0 || len(lock) == 0 && len(built) > 0 {
		if err := writeFile(o.LockFile, lockText("the stack "+o.Stack.Name+" beyond the image "+o.Image, "platter stack build", built)); err != nil {
			return nil, err
		}
	}
	if err := o.Store.publishRelease(r, digest, key, o.Replace); err != nil {
		return nil, err
	}
	return &BuiltRelease{Ref: provision.ReleaseRef{Version: r.Version, Digest: digest}, Release: r, Changes: changes}, nil
}

// localPackages reads the packages beside the stack file.
func (o ReleaseOptions) localPackages(ctx context.Context) ([]deb, error) {
	if o.Dir == "" {
		return nil, nil
	}
	dir := filepath.Join(o.Dir, PackagesFolder)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the stack's own packages cannot be read: %w", err)
	}
	var out []deb
	var wrong []error
	names := map[string]string{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if filepath.Ext(path) != ".deb" {
			wrong = append(wrong, fmt.Errorf("%s is no .deb: only packages belong into %s", path, dir))
			continue
		}
		d, err := readDeb(ctx, path)
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		if other, dup := names[d.name()]; dup {
			wrong = append(wrong, fmt.Errorf("%s and %s are both %s %s: remove one", other, path, d.pkg, d.version))
		}
		names[d.name()] = path
		out = append(out, d)
	}
	return out, errors.Join(wrong...)
}

// ociArchive is a container archive of the stack.
type ociArchive struct {
	provision.ReleaseFile
	path string
}

func (o ReleaseOptions) archives() (out []ociArchive, err error) {
	seen := map[string]string{}
	for _, c := range o.Stack.Components {
		for _, i := range c.Images {
			name := i.ReleaseName()
			switch before := seen[name]; before {
			case i.File:
				continue
			case "":
			default:
				return nil, fmt.Errorf("the archives %s and %s would both be %s in the release: rename one", before, i.File, name)
			}
			seen[name] = i.File
			out = append(out, ociArchive{provision.ReleaseFile{Name: name, Component: c.Name, Kind: provision.FileImage}, filepath.Join(o.Dir, i.File)})
		}
	}
	return out, nil
}

// releaseBuild is a release while its packages are put together.
type releaseBuild struct {
	ReleaseOptions
	work  *scratch
	im    *provision.Image
	lock  map[string]string
	local []deb

	wants []want
	debs  []deb // of the release
}

// want is a package that the stack names.
type want struct {
	component, name string
	version         string // empty: what apt takes
}

// resolve decides which version of every named package it is to be: the one
// that the stack file insists on, else the site's own, else the image's, else the
// locked or newest one.
func (b *releaseBuild) resolve() {
	for _, c := range b.Stack.Components {
		for _, p := range c.Packages {
			if slices.ContainsFunc(b.wants, func(w want) bool { return w.name == p.Name }) {
				continue
			}
			w := want{c.Name, p.Name, p.Version}
			// The version may stand at another component that names the package.
			for _, other := range b.Stack.Components {
				for _, q := range other.Packages {
					if q.Name == p.Name && q.Version != "" {
						w.version = q.Version
					}
				}
			}
			if w.version == "" {
				for _, d := range b.local {
					if d.pkg == p.Name && (w.version == "" || versions.Order(d.version, w.version) > 0) {
						w.version = d.version
					}
				}
			}
			if w.version == "" {
				w.version = b.im.Packages[p.Name]
			}
			b.wants = append(b.wants, w)
		}
	}
}

// localDeb finds a package of the site's own.
func (b *releaseBuild) localDeb(name, version string) (deb, bool) {
	i := slices.IndexFunc(b.local, func(d deb) bool { return d.pkg == name && d.version == version })
	if i < 0 {
		return deb{}, false
	}
	return b.local[i], true
}

// gather finds every package of the release.
func (b *releaseBuild) gather(ctx context.Context) error {
	var fetch []want // named and in the image, to be had all the same
	install := false
	for _, w := range b.wants {
		switch inImage := w.version != "" && b.im.Packages[w.name] == w.version; {
		case !inImage:
			install = true
		case b.Complete:
			if d, ok := b.localDeb(w.name, w.version); ok {
				b.debs = append(b.debs, d)
			} else {
				fetch = append(fetch, w)
			}
		}
	}
	if install || len(fetch) > 0 {
		apt, err := b.newApt(ctx)
		if err != nil {
			return err
		}
		if err := apt.available(ctx, b.wants, fetch); err != nil {
			return err
		}
		found, err := apt.download(ctx, b.wants, fetch)
		if err != nil {
			return err
		}
		for _, d := range found {
			// The site's own goes before one of the same version from elsewhere.
			if own, ok := b.localDeb(d.pkg, d.version); ok {
				d = own
			}
			b.debs = append(b.debs, d)
		}
	}
	var unused []error
	for _, d := range b.local {
		if !slices.ContainsFunc(b.debs, func(have deb) bool { return have.path == d.path }) {
			unused = append(unused, fmt.Errorf("%s is needed by no component in this version (%s): name it in the stack file, or remove it", d.path, d.version))
		}
	}
	slices.SortFunc(b.debs, func(x, y deb) int { return strings.Compare(x.name(), y.name()) })
	b.debs = slices.CompactFunc(b.debs, func(x, y deb) bool { return x.name() == y.name() })
	return errors.Join(unused...)
}

// compare tells what the packages from mirrors changed against the lock.
func (b *releaseBuild) compare() (changes []Change, built map[string]string, err error) {
	built = map[string]string{}
	for _, d := range b.debs {
		if _, own := b.localDeb(d.pkg, d.version); !own {
			built[d.pkg] = d.version
		}
	}
	if len(b.lock) == 0 {
		return nil, built, nil
	}
	changes = compareLock(b.lock, built)
	if len(changes) == 0 {
		return nil, built, nil
	}
	fmt.Fprintf(b.Out, "WARNING: %d packages differ from %s:\n", len(changes), b.LockFile)
	for _, c := range changes {
		fmt.Fprintf(b.Out, "  %s\n", c)
	}
	if b.Frozen {
		return nil, nil, fmt.Errorf("release %s of the stack %s was not built: its packages are not those of %s; build without --frozen to accept the versions above", b.Stack.Version, b.Stack.Name, b.LockFile)
	}
	return changes, built, nil
}

// exactStack is the stack with the version of every package.
func (b *releaseBuild) exactStack() provision.Stack {
	exact := map[string]string{}
	for _, w := range b.wants {
		exact[w.name] = w.version
	}
	for _, d := range b.debs {
		if exact[d.pkg] == "" {
			exact[d.pkg] = d.version
		}
	}
	s := *b.Stack
	s.Components = slices.Clone(s.Components)
	for i := range s.Components {
		c := &s.Components[i]
		c.Packages = slices.Clone(c.Packages)
		for k := range c.Packages {
			c.Packages[k].Version = exact[c.Packages[k].Name]
		}
	}
	return s
}

// store makes objects of the packages and of what makes an archive of them.
func (b *releaseBuild) store() (out []provision.ReleaseFile, err error) {
	component := b.components()
	for _, d := range b.debs {
		object, err := b.Store.putFile(d.path)
		if err != nil {
			return nil, fmt.Errorf("%s cannot be stored: %w", d.path, err)
		}
		out = append(out, provision.ReleaseFile{Name: d.name(), Component: component[d.pkg], Kind: provision.FilePackage,
			Package: d.pkg, Version: d.version, Size: object.Size, Digest: object.Hash})
	}
	packages, release := aptIndex(b.debs)
	for name, text := range map[string][]byte{"Packages": packages, "Release": release} {
		object, err := b.Store.put(bytes.NewReader(text))
		if err != nil {
			return nil, err
		}
		out = append(out, provision.ReleaseFile{Name: name, Kind: provision.FileIndex, Size: object.Size, Digest: object.Hash})
	}
	return out, nil
}

// components says for which component each package is there, the first of
// several.
func (b *releaseBuild) components() map[string]string {
	owner := map[string]string{}
	for _, w := range b.wants {
		owner[w.name] = w.component
	}
	for _, w := range b.wants {
		for todo := []string{w.name}; len(todo) > 0; todo = todo[1:] {
			for _, d := range b.debs {
				if d.pkg != todo[0] {
					continue
				}
				for _, need := range d.needs() {
					if owner[need] == "" {
						owner[need] = w.component
						todo = append(todo, need)
					}
				}
			}
		}
	}
	return owner
}

// apt is apt with the image's packages for installed ones.
type apt struct {
	*releaseBuild
	root, conf, log string
}

// newApt sets apt up as mmdebstrap does for an image, and lets it know what the
// image has.
func (b *releaseBuild) newApt(ctx context.Context) (*apt, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a release can only be built as root, as the image is: mmdebstrap sets apt up for it")
	}
	fmt.Fprintf(b.Out, "reading what the image %s has\n", b.Image)
	a := &apt{b, filepath.Join(b.work.dir, "root"), filepath.Join(b.work.dir, "apt.conf"), filepath.Join(b.WorkDir, "stack.log")}
	status := filepath.Join(b.work.dir, "status")
	if err := b.imageStatus(ctx, status); err != nil {
		return nil, err
	}
	own := filepath.Join(b.work.dir, "own")
	if err := writeArchive(own, b.local); err != nil {
		return nil, err
	}
	pinned := b.lock
	if b.Update {
		pinned = nil
	}
	source := "deb [trusted=yes] copy:" + own + " ./\n"
	for name, text := range map[string]string{
		"setup/etc/apt/sources.list.d/own.list": source,
		// The site's own packages have no origin, and go before any other.
		"setup/etc/apt/preferences.d/platter": string(pins(pinned)) + "Package: *\nPin: origin \"\"\nPin-Priority: 1002\n",
	} {
		path := filepath.Join(b.work.dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			return nil, err
		}
	}
	args := []string{"--mode=root", "--variant=custom", "--format=directory", "--architectures=amd64", "--skip=cleanup",
		`--aptopt=Acquire::Languages "none"`, `--aptopt=Acquire::Retries "3"`, `--aptopt=APT::Sandbox::User "root"`,
		"--setup-hook=cp -a " + shellQuote(filepath.Join(b.work.dir, "setup")) + `/. "$1"/`,
		`--customize-hook=cp "$MMDEBSTRAP_APT_CONFIG" ` + shellQuote(a.conf),
		b.Suite, a.root}
	mirrors := b.Mirrors
	if b.Offline {
		mirrors = []string{strings.TrimSpace(source)}
		if err := os.Remove(filepath.Join(b.work.dir, "setup/etc/apt/sources.list.d/own.list")); err != nil {
			return nil, err
		}
	} else {
		fmt.Fprintf(b.Out, "asking for the packages of Debian %s\n", b.Suite)
	}
	if out, err := a.run(exec.CommandContext(ctx, "mmdebstrap", append(args, mirrors...)...)); err != nil {
		return nil, fmt.Errorf("mmdebstrap failed, %s has all it said:\n%s\n%w", a.log, lastLines(out), err)
	}
	return a, os.Rename(status, filepath.Join(a.root, "var/lib/dpkg/status"))
}

// imageStatus writes dpkg's list of what the image has to file.
func (b *releaseBuild) imageStatus(ctx context.Context, file string) error {
	root := filepath.Join(b.work.dir, "root.ext4")
	if err := b.Store.Export(ctx, b.Image, provision.PartRoot, root); err != nil {
		return err
	}
	defer os.Remove(root)
	if err := tool(ctx, "debugfs", "-R", "dump /var/lib/dpkg/status "+file, root); err != nil {
		return err
	}
	// debugfs does not fail where there is no such file.
	if st, err := os.Stat(file); err != nil || st.Size() == 0 {
		return fmt.Errorf("the image %s has no list of its packages in /var/lib/dpkg/status: build it again", b.Image)
	}
	return nil
}

// run runs a program in the scratch folder, with its output in the log too.
func (a *apt) run(cmd *exec.Cmd) ([]byte, error) {
	log, err := os.OpenFile(a.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("build log cannot be written: %w", err)
	}
	defer log.Close()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, log), io.MultiWriter(&out, log)
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	err = a.work.run(cmd)
	return out.Bytes(), err
}

// tool runs one of apt's programs.
func (a *apt) tool(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "APT_CONFIG="+a.conf, "DEBIAN_FRONTEND=noninteractive")
	out, err := a.run(cmd)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return out, err
}

// available checks that every named package is to be had, and says what is
// where one is not.
func (a *apt) available(ctx context.Context, wants, fetch []want) error {
	args := []string{"apt-cache", "madison"}
	for _, w := range wants {
		args = append(args, w.name)
	}
	out, err := a.tool(ctx, a.work.dir, args...)
	if err != nil {
		return fmt.Errorf("apt-cache failed:\n%s\n%w", lastLines(out), err)
	}
	have := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		if f := strings.Split(line, "|"); len(f) == 3 {
			name, version := strings.TrimSpace(f[0]), strings.TrimSpace(f[1])
			if !slices.Contains(have[name], version) {
				have[name] = append(have[name], version)
			}
		}
	}
	var wrong []string
	next := fmt.Sprintf("name a version that is there, or put the package into the folder %s beside the stack file", PackagesFolder)
	for _, w := range wants {
		inImage := w.version != "" && a.im.Packages[w.name] == w.version
		if inImage && !slices.Contains(fetch, w) || w.version == "" && len(have[w.name]) > 0 || slices.Contains(have[w.name], w.version) {
			continue
		}
		there := "there is none"
		if len(have[w.name]) > 0 {
			there = "there are: " + strings.Join(have[w.name], ", ")
		}
		if inImage {
			there += fmt.Sprintf("; the image %s has it", a.Image)
			next = fmt.Sprintf("build the image anew with --update, leave what it has out of the release with --complete=false, or put packages into the folder %s beside the stack file", PackagesFolder)
		}
		wrong = append(wrong, fmt.Sprintf("component %s: the package %s is not to be had, %s", w.component, strings.TrimSuffix(w.name+"="+w.version, "="), there))
	}
	if len(wrong) == 0 {
		return nil
	}
	return fmt.Errorf("the release was not built:\n  %s\n%s", strings.Join(wrong, "\n  "), next)
}

// download fetches what the wanted packages need beyond the image, and besides
// the packages of fetch.
func (a *apt) download(ctx context.Context, wants, fetch []want) ([]deb, error) {
	exact := func(w want) string { return strings.TrimSuffix(w.name+"="+w.version, "=") }
	args := []string{"apt-get", "install", "-y", "-q", "--download-only", "--no-install-recommends", "--allow-downgrades", "--no-remove"}
	for _, w := range wants {
		args = append(args, exact(w))
	}
	fmt.Fprintf(a.Out, "fetching packages\n")
	if out, err := a.tool(ctx, a.work.dir, args...); err != nil {
		return nil, fmt.Errorf("apt finds no way to install the stack's packages beside those of the image %s, %s has all it said:\n%s\n%w", a.Image, a.log, lastLines(out), err)
	}
	dirs := []string{filepath.Join(a.root, "var/cache/apt/archives")}
	if len(fetch) > 0 {
		dir := filepath.Join(a.work.dir, "fetched")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		args := []string{"apt-get", "download", "-q"}
		for _, w := range fetch {
			args = append(args, exact(w))
		}
		if out, err := a.tool(ctx, dir, args...); err != nil {
			return nil, fmt.Errorf("packages of the stack could not be fetched, %s has all that apt said:\n%s\n%w", a.log, lastLines(out), err)
		}
		dirs = append(dirs, dir)
	}
	var debs []deb
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			d, err := readDeb(ctx, f)
			if err != nil {
				return nil, err
			}
			debs = append(debs, d)
		}
	}
	return debs, nil
}

func lastLines(out []byte) string {
	all := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(all[max(0, len(all)-keptLines):], "\n")
}

// publishRelease signs the release and makes it that of its version, and of the
// stack if no newer one is there. Unless replace says so, a version does not
// change its content.
func (s *Store) publishRelease(r *provision.Release, digest string, key secretKey, replace bool) error {
	name := stackRef + "@" + r.Version
	if old, err := s.readRef(name); err == nil && old.Digest != digest && !replace {
		return fmt.Errorf("the store has a release %s of the stack already, with other content (%.12s, this one is %.12s): raise the version in the stack file, or run it with --replace", r.Version, old.Digest, digest)
	}
	newest := r.Version
	if _, have, err := s.Release(""); err == nil && versions.Order(have.Version, newest) > 0 {
		newest = have.Version
	}
	if _, err := s.publish(name, r, "", key); err != nil {
		return err
	}
	if newest != r.Version {
		return nil
	}
	return s.writeRef(stackRef, ref{Digest: digest})
}

// Release returns the release of the stack of that version, or the newest where
// it is empty. Its manifest carries the signature of a trusted key and names
// files that are there in full length; Verify also reads them.
func (s *Store) Release(version string) (provision.ReleaseRef, *provision.Release, error) {
	name := stackRef
	if version != "" {
		name += "@" + version
	}
	if _, err := s.readRef(name); errors.Is(err, fs.ErrNotExist) {
		return provision.ReleaseRef{}, nil, s.noRelease(version)
	}
	r, raw, err := s.signed(name)
	if err != nil {
		return provision.ReleaseRef{}, nil, err
	}
	release, err := provision.ReadRelease(raw)
	if err != nil {
		return provision.ReleaseRef{}, nil, fmt.Errorf("manifest %s of %s: %w", r.Digest, name, err)
	}
	if version != "" && release.Version != version {
		return provision.ReleaseRef{}, nil, fmt.Errorf("ref %s points to manifest %s, which is of release %q: build it again", name, r.Digest, release.Version)
	}
	for _, f := range release.Files {
		if err := s.complete(provision.Object{Hash: f.Digest, Size: f.Size}, fmt.Sprintf("file %s of release %s", f.Name, release.Version)); err != nil {
			return provision.ReleaseRef{}, nil, err
		}
	}
	return provision.ReleaseRef{Version: release.Version, Digest: r.Digest}, release, nil
}

// ReleaseOf tells whether a ref is that of a release of the stack: of this
// version, or of the newest where it is empty.
func ReleaseOf(name string) (version string, ok bool) {
	if name == stackRef {
		return "", true
	}
	return strings.CutPrefix(name, stackRef+"@")
}

func (s *Store) noRelease(version string) error {
	var have []string
	names, _ := s.Refs()
	for _, n := range names {
		if v, ok := strings.CutPrefix(n, stackRef+"@"); ok {
			have = append(have, v)
		}
	}
	what := "no release of the stack"
	if version != "" {
		what = fmt.Sprintf("no release %q of the stack", version)
	}
	there := "it has none"
	if len(have) > 0 {
		there = "it has " + strings.Join(have, ", ")
	}
	return fmt.Errorf("the store %s has %s, %s: 'platter stack build' makes one: %w", s.dir, what, there, fs.ErrNotExist)
}

// Releases lists the releases of the stack, the newest first, without the nodes
// that have them. The error names those that are damaged; the others are
// listed all the same.
func (s *Store) Releases() ([]provision.StoredRelease, error) {
	names, err := s.Refs()
	if err != nil {
		return nil, err
	}
	var wrong []error
	out := []provision.StoredRelease{}
	for _, name := range names {
		version, ok := strings.CutPrefix(name, stackRef+"@")
		if !ok {
			continue
		}
		ref, r, err := s.Release(version)
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		sr := provision.StoredRelease{ReleaseRef: ref, Name: r.Name, Components: []string{}, Image: r.Image.Name, Files: len(r.Files), Size: r.Size(), Nodes: []string{}}
		for _, c := range r.Stack.Components {
			sr.Components = append(sr.Components, c.Name)
		}
		if st, err := os.Stat(filepath.Join(s.dir, "refs", name)); err == nil {
			sr.Built = st.ModTime().UTC().Truncate(time.Second)
		}
		out = append(out, sr)
	}
	slices.SortFunc(out, func(a, b provision.StoredRelease) int { return versions.Order(b.Version, a.Version) })
	return out, errors.Join(wrong...)
}
