package images

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// A lock file pins a build to exact package versions: one "package version" a
// line, sorted, with '#' comments.

// Change is a package whose version differs from the lock. An empty version
// means that the package was not there, or is not any more.
type Change struct {
	Package, Locked, Built string
}

func (c Change) String() string {
	switch {
	case c.Locked == "":
		return fmt.Sprintf("%s: new, %s", c.Package, c.Built)
	case c.Built == "":
		return fmt.Sprintf("%s: gone, was %s", c.Package, c.Locked)
	default:
		return fmt.Sprintf("%s: %s -> %s", c.Package, c.Locked, c.Built)
	}
}

// parseLock reads a lock file, or the list of packages of a build.
func parseLock(text []byte) (map[string]string, error) {
	lock := map[string]string{}
	for i, line := range strings.Split(string(text), "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
			continue
		case len(f) != 2:
			return nil, fmt.Errorf("line %d: want 'package version', have %q", i+1, line)
		case lock[f[0]] != "":
			return nil, fmt.Errorf("line %d: package %s is listed twice", i+1, f[0])
		}
		lock[f[0]] = f[1]
	}
	return lock, nil
}

func formatLock(name string, lock map[string]string) []byte {
	return lockText("the image "+name, "platter image build", lock)
}

// lockText is the lock file of what, which command builds.
func lockText(what, command string, lock map[string]string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Exact package versions of %s. '%s' keeps to them;\n# '%s --update' moves to the newest and rewrites this file.\n", what, command, command)
	for _, p := range slices.Sorted(maps.Keys(lock)) {
		fmt.Fprintf(&b, "%s %s\n", p, lock[p])
	}
	return b.Bytes()
}

// pins are apt preferences that hold every locked package at its version, also
// against a newer one. A version that the archive no longer has does not match
// and apt takes the current one.
func pins(lock map[string]string) []byte {
	var b bytes.Buffer
	for _, p := range slices.Sorted(maps.Keys(lock)) {
		fmt.Fprintf(&b, "Package: %s\nPin: version %s\nPin-Priority: 1001\n\n", p, lock[p])
	}
	return b.Bytes()
}

// compareLock lists what a build changed against the lock, sorted by package.
func compareLock(lock, built map[string]string) []Change {
	var changes []Change
	for p, v := range built {
		if lock[p] != v {
			changes = append(changes, Change{p, lock[p], v})
		}
	}
	for p, v := range lock {
		if _, ok := built[p]; !ok {
			changes = append(changes, Change{p, v, ""})
		}
	}
	slices.SortFunc(changes, func(a, b Change) int { return strings.Compare(a.Package, b.Package) })
	return changes
}
