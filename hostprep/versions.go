package hostprep

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"platter/hostprep/versions"
)

// versions compares kernel, QEMU, libvirt and Open vSwitch with what the image
// was built with, and with the combinations that are known not to work. Only a
// person can put other versions there.
func (h *Host) versions() Step {
	return Step{
		Name:  "versions",
		Next:  "Reinstall the node from its image, or build an image with the versions that are wanted",
		Check: h.checkVersions,
	}
}

func (h *Host) checkVersions(ctx context.Context) ([]Finding, error) {
	have, installedKernel, err := h.installedVersions(ctx)
	if err != nil {
		return nil, err
	}
	var locked versions.Locked
	switch text, err := os.ReadFile(filepath.Join(h.Root, versions.File)); {
	case err == nil:
		if locked, err = versions.Parse(string(text)); err != nil {
			return nil, fmt.Errorf("%s: %w: reinstall the node", versions.File, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("versions: %w", err)
	}
	var found []Finding
	for _, c := range versions.Components {
		want, is := locked.Versions[c], have[c]
		if want == "" {
			continue
		}
		f := Finding{What: "version of " + c, OK: is == want, Is: is, Want: want,
			Why: "these versions were tested together", Source: versions.File}
		if is == "" {
			f.Is = "not installed"
		}
		f.Boot = !f.OK && c == "kernel" && installedKernel == want
		found = append(found, f)
	}
	bad, err := versions.KnownBad(have)
	for _, b := range bad {
		f := Finding{What: "combination " + b.Name, Is: strings.TrimSpace(b.Component + " " + b.Version), Want: "another version", Why: b.Reason, Source: b.Source}
		if b.With != "" {
			f.Is += " with " + b.With
		}
		// What is only a warning, and what the image's builder took, is told
		// but holds nothing up.
		if !b.Refuse || slices.Contains(locked.Allowed, b.Name) {
			f.OK = true
			f.Is += " (known, accepted)"
		}
		found = append(found, f)
	}
	return found, err
}

// installedVersions are the components' versions, of the kernel the one that
// runs; installedKernel is the newest that is on the disk.
func (h *Host) installedVersions(ctx context.Context) (have versions.Set, installedKernel string, err error) {
	packages, err := h.packages(ctx)
	if err != nil {
		return nil, "", err
	}
	have = versions.FromPackages(packages)
	installedKernel = have["kernel"]
	b, err := os.ReadFile(filepath.Join(h.Root, "/proc/version"))
	if err != nil {
		return nil, "", fmt.Errorf("the running kernel's version: %w", err)
	}
	if v := kernelVersion(string(b)); v != "" {
		have["kernel"] = v
	}
	return have, installedKernel, nil
}

var (
	debianKernel = regexp.MustCompile(` Debian (\S+) \(`)
	otherKernel  = regexp.MustCompile(`^Linux version (\S+)`)
)

// kernelVersion finds the version of the running kernel's package in
// /proc/version. Debian's release (uname -r) may lack the last number; the RHEL
// family's is version, release and architecture.
func kernelVersion(procVersion string) string {
	if m := debianKernel.FindStringSubmatch(procVersion); m != nil {
		return m[1]
	}
	if m := otherKernel.FindStringSubmatch(procVersion); m != nil {
		return strings.TrimSuffix(m[1], ".x86_64")
	}
	return ""
}

// packages are the installed packages and their versions.
func (h *Host) packages(ctx context.Context) (map[string]string, error) {
	f, err := os.Open(filepath.Join(h.Root, "/var/lib/dpkg/status"))
	if errors.Is(err, fs.ErrNotExist) {
		out, err := h.command(ctx, "rpm", "--query", "--all", "--queryformat", `%{NAME} %{VERSION}-%{RELEASE}\n`)
		if err != nil {
			return nil, fmt.Errorf("installed packages: neither dpkg's list nor rpm's can be read: %w", err)
		}
		all := map[string]string{}
		for line := range strings.Lines(out) {
			name, version, _ := strings.Cut(strings.TrimSpace(line), " ")
			all[name] = version
		}
		return all, nil
	}
	if err != nil {
		return nil, fmt.Errorf("installed packages: %w", err)
	}
	defer f.Close()
	all := map[string]string{}
	var name string
	var installed bool
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ": ")
		switch key {
		case "Package":
			name, installed = value, false
		case "Status":
			installed = strings.HasSuffix(value, " installed")
		case "Version":
			if installed {
				all[name] = value
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("installed packages: %w", err)
	}
	return all, nil
}
