package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// deb is a Debian package as a file (deb(5)).
type deb struct {
	path    string
	control string // its control file, as deb-control(5) has it
	size    int64
	hash    string // SHA-256, hex

	pkg, version, arch string
}

// readDeb reads what is in the package at path. One for another machine is an
// error.
func readDeb(ctx context.Context, path string) (deb, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--field", path)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var said bytes.Buffer
	cmd.Stderr = &said
	control, err := cmd.Output()
	if err != nil {
		return deb{}, fmt.Errorf("%s is no sound Debian package: %w: %s", path, err, bytes.TrimSpace(said.Bytes()))
	}
	f, err := os.Open(path)
	if err != nil {
		return deb{}, err
	}
	defer f.Close()
	sum := sha256.New()
	d := deb{path: path, control: strings.TrimRight(string(control), "\n") + "\n"}
	if d.size, err = io.Copy(sum, f); err != nil {
		return deb{}, fmt.Errorf("%s: %w", path, err)
	}
	d.hash = hex.EncodeToString(sum.Sum(nil))
	d.pkg, d.version, d.arch = d.field("Package"), d.field("Version"), d.field("Architecture")
	if d.arch != "all" && d.arch != "amd64" {
		return deb{}, fmt.Errorf("%s is for %s, nodes are amd64", path, d.arch)
	}
	return d, nil
}

// field is the first line of a field.
func (d deb) field(name string) string {
	for line := range strings.Lines(d.control) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// needs are the names of all packages that it depends on, alternatives too.
func (d deb) needs() (names []string) {
	for _, field := range []string{"Pre-Depends", "Depends"} {
		for _, group := range strings.FieldsFunc(d.field(field), func(c rune) bool { return c == ',' || c == '|' }) {
			name, _, _ := strings.Cut(strings.TrimSpace(group), " ")
			name, _, _ = strings.Cut(name, ":")
			names = append(names, name)
		}
	}
	return names
}

// name is what archives call the file.
func (d deb) name() string {
	version := d.version
	if _, rest, ok := strings.Cut(version, ":"); ok {
		version = rest
	}
	return d.pkg + "_" + version + "_" + d.arch + ".deb"
}

// aptIndex makes a folder that holds the packages, by their names, an archive
// for apt: its files Packages and Release (Debian Repository Format). Their date
// means nothing, so that equal packages make equal files.
func aptIndex(debs []deb) (packages, release []byte) {
	debs = slices.Clone(debs)
	slices.SortFunc(debs, func(a, b deb) int { return strings.Compare(a.name(), b.name()) })
	var p bytes.Buffer
	for _, d := range debs {
		fmt.Fprintf(&p, "%sFilename: %s\nSize: %d\nSHA256: %s\n\n", d.control, d.name(), d.size, d.hash)
	}
	return p.Bytes(), fmt.Appendf(nil, "Origin: Platter\nDate: Thu, 01 Jan 1970 00:00:00 UTC\nArchitectures: amd64\nSHA256:\n %s %d Packages\n", hexSum(p.Bytes()), p.Len())
}

// writeArchive makes dir an archive of the packages.
func writeArchive(dir string, debs []deb) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, d := range debs {
		path, err := filepath.Abs(d.path)
		if err != nil {
			return err
		}
		if err := os.Symlink(path, filepath.Join(dir, d.name())); err != nil {
			return err
		}
	}
	packages, release := aptIndex(debs)
	if err := os.WriteFile(filepath.Join(dir, "Packages"), packages, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "Release"), release, 0o644)
}
