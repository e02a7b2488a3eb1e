package stack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"platter/provision"
	"platter/provision/jsonfile"
)

// check finds out what the switch changes, and refuses what would only fail on
// the way. It changes nothing.
func (s *switcher) check(ctx context.Context) error {
	if err := jsonfile.Read(s.path(planFile), &s.j.From.Plan); err != nil {
		return fmt.Errorf("the plan of this node: %w: reinstall the node", err)
	}
	node := s.j.From.Plan.Node
	refuse := func(next, format string, args ...any) error {
		return &provision.Failure{Code: "switch-refused", Next: next,
			Message: fmt.Sprintf("node %s does not go to %s, and nothing was changed: %s", node, name(s.j.Args.To), fmt.Sprintf(format, args...))}
	}
	current, _, err := generations(s.path(ReleasesDir))
	if err != nil {
		return err
	}
	s.j.From.Release, s.j.To.Release = current, s.j.Args.To
	releases, err := releasesAt(s.path(ReleasesDir))
	if err != nil {
		return err
	}
	if said, err := exec.CommandContext(ctx, "dpkg", "--audit").Output(); err != nil || len(said) > 0 {
		return refuse("Put the node's packages right: 'dpkg --audit' says what is wrong", "dpkg is not content with them")
	}
	versions, err := installed(ctx)
	if err != nil {
		return err
	}
	var origin generation // what the install brought
	err = jsonfile.Read(s.path(installedFile), &origin)
	switch {
	case current == provision.Installed:
		origin = generation{Plan: s.j.From.Plan, Packages: versions}
	case err != nil:
		return refuse("Run 'platter node reinstall "+node+"'", "what the install brought is not known any more: %v", err)
	}

	ours := map[string][]string{} // components by package
	debs := map[string]stored{}   // by name=version
	for digest, r := range releases {
		for _, f := range r.Files {
			if f.Kind == provision.FilePackage {
				ours[f.Package] = append(ours[f.Package], f.Component)
				debs[f.Package+"="+f.Version] = stored{f, ReleaseFile(s.path(ReleasesDir), digest, f.Name)}
			}
		}
	}
	want := map[string]string{}
	s.j.To.Plan = s.j.From.Plan
	if s.j.Args.To == provision.Installed {
		s.j.To.Plan = origin.Plan
		for p := range ours {
			if v, there := origin.Packages[p]; there {
				want[p] = v
			}
		}
	} else {
		release, err := Release(s.path(ReleasesDir), s.j.Args.To)
		if err != nil {
			return refuse("Run 'platter stack stage'", "%v", err)
		}
		var placed []provision.PlacedComponent
		for _, c := range release.Stack.Components {
			if members, runs := s.j.Args.Members[c.Name]; runs {
				placed = append(placed, provision.PlacedComponent{Component: c, Members: members})
			}
		}
		s.j.To.Plan.Stack.Components = provision.ComponentsFor(node, placed)
		var wrong error
		for p, f := range release.PackagesFor(names(here(s.j.To.Plan)), versions, func(p string) []string {
			for _, f := range release.Files {
				if f.Package == p {
					c, err := control(ctx, ReleaseFile(s.path(ReleasesDir), s.j.Args.To, f.Name))
					wrong = errors.Join(wrong, err)
					return c.depends
				}
			}
			return nil
		}) {
			want[p] = f.Version
		}
		if wrong != nil {
			return refuse("Run 'platter stack stage'", "%v", wrong)
		}
	}
	s.j.Changes.Packages = provision.PackageChanges(versions, want,
		func(p string) bool { return ours[p] != nil }, func(p string) bool { return origin.Packages[p] != "" })

	for _, want := range s.j.To.Plan.NamedSecrets() {
		if _, there := s.sec.Named[want.Name]; !there {
			return refuse("Serve the release's stack file and reinstall the node", "it needs the secret %q, which the node was not given", want.Name)
		}
	}
	was, err := rendered(s.j.From.Plan, s.sec)
	if err != nil {
		return err
	}
	now, err := rendered(s.j.To.Plan, s.sec)
	if err != nil {
		return refuse("Correct the stack file and build the release again", "%v", err)
	}
	touched := map[string]bool{}
	for _, c := range s.j.Changes.Packages {
		for _, component := range ours[c.Name] {
			touched[component] = true
		}
	}
	s.j.Changes.Components = provision.Restarted(here(s.j.From.Plan), here(s.j.To.Plan), func(c string) bool { return touched[c] || was[c] != now[c] })

	// Everything that it takes to get there, and back.
	s.j.From.Packages, s.j.To.Packages = map[string]string{}, map[string]string{}
	space := int64(spareSpace)
	var missing []string
	for _, c := range s.j.Changes.Packages {
		if c.To != "" {
			s.j.To.Packages[c.Name] = c.To
			d, there := debs[c.Name+"="+c.To]
			if !there {
				return refuse("Run 'platter stack stage'", "the package %s in version %s is in no release that the node has", c.Name, c.To)
			}
			if err := d.verify(); err != nil {
				return refuse("Run 'platter stack stage'", "%v", err)
			}
			f, err := control(ctx, d.path)
			if err != nil {
				return refuse("Run 'platter stack stage'", "%v", err)
			}
			space += f.size
		}
		if c.From != "" {
			s.j.From.Packages[c.Name] = c.From
			d, there := debs[c.Name+"="+c.From]
			if !there || d.verify() != nil {
				missing = append(missing, c.Name+" "+c.From)
			}
		}
	}
	for _, g := range []generation{s.j.From, s.j.To} {
		for _, c := range here(g.Plan) {
			if !slices.Contains(s.j.Changes.Components, c.Name) {
				continue
			}
			for _, i := range c.Images {
				switch err := archived(s.root, releases, i); {
				case err == nil:
				case g.Release == s.j.To.Release:
					return refuse("Run 'platter stack stage'", "the image %s of the component %s: %v", i.Name, c.Name, err)
				default:
					missing = append(missing, "the image "+i.Name)
				}
			}
		}
	}
	if len(missing) > 0 && !s.j.Args.NoWayBack {
		return refuse("Stage the release that has them too, or allow it with --no-way-back", "there would be no way back, because no release on the node has %s", strings.Join(missing, ", "))
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.root, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; free < space {
		return refuse("Make room on the node", "it takes %d MiB of disk space, and %d MiB are free", space>>20, free>>20)
	}
	return nil
}

func names(list []provision.PlacedComponent) []string {
	var out []string
	for _, c := range list {
		out = append(out, c.Name)
	}
	return out
}

// rendered is everything of each of the node's components that it has to be
// restarted for.
func rendered(plan provision.Plan, sec provision.StackSecrets) (map[string]string, error) {
	view := provision.ViewOf(plan, sec)
	out := map[string]string{}
	var wrong []error
	for _, c := range here(plan) {
		bare := c
		bare.About, bare.Files, bare.Place, bare.Packages = "", nil, provision.Placement{}, nil
		var texts []string
		for _, f := range c.Files {
			text, err := view.Render(f.Path, f.Template)
			if err != nil {
				wrong = append(wrong, fmt.Errorf("component %s: %s: %w", c.Name, f.Path, err))
			}
			f.Template = text
			if !f.Reload {
				bare.Files = append(bare.Files, f)
			}
		}
		for _, u := range c.Units {
			texts = append(texts, order(plan, c, u))
		}
		b, err := json.Marshal(bare)
		wrong = append(wrong, err)
		out[c.Name] = string(b) + strings.Join(texts, "")
	}
	return out, errors.Join(wrong...)
}

// stored is a file of a release on this node.
type stored struct {
	provision.ReleaseFile
	path string
}

// verify reads the whole file: it was right when it was staged.
func (d stored) verify() error {
	f, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	if hex.EncodeToString(h.Sum(nil)) != d.Digest {
		return fmt.Errorf("%s is damaged", d.path)
	}
	return nil
}

// controlFields are those of a package file that matter here.
type controlFields struct {
	depends []string // names of all that it may depend on
	size    int64    // installed, bytes
}

func control(ctx context.Context, path string) (controlFields, error) {
	out, err := exec.CommandContext(ctx, "dpkg-deb", "--field", path, "Depends", "Pre-Depends", "Installed-Size").Output()
	if err != nil {
		return controlFields{}, fmt.Errorf("%s is no package: %w", path, err)
	}
	return parseControl(string(out)), nil
}

// parseControl reads the fields as deb-control(5) has them.
func parseControl(text string) (c controlFields) {
	for line := range strings.Lines(text) {
		field, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch field {
		case "Depends", "Pre-Depends":
			for _, d := range strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == '|' }) {
				name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
				name, _, _ = strings.Cut(name, ":") // name:any
				name, _, _ = strings.Cut(name, "(")
				c.depends = append(c.depends, name)
			}
		case "Installed-Size":
			kib, _ := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			c.size = kib << 10
		}
	}
	return c
}

// installed are the versions of the packages that are there as they should be.
func installed(ctx context.Context) (map[string]string, error) {
	out, err := exec.CommandContext(ctx, "dpkg-query", "--show", "--showformat=${Package} ${Version} ${db:Status-Status}\n").Output()
	if err != nil {
		return nil, fmt.Errorf("dpkg-query: %w: look at /var/lib/dpkg on the node", err)
	}
	return parseInstalled(string(out)), nil
}

func parseInstalled(text string) map[string]string {
	all := map[string]string{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "installed" {
			all[f[0]] = f[1]
		}
	}
	return all
}

// packages installs the target's versions and removes what it does not have.
// dpkg run again on the same files ends well, whatever it was cut off at.
func (s *switcher) packages(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, packagesLimit)
	defer cancel()
	target := s.j.target().Packages
	deny := s.path(denyFile)
	kept := deny + ".platter" // somebody's own
	if b, err := os.ReadFile(deny); err == nil && !bytes.Equal(b, []byte(denyText)) {
		if err := os.Rename(deny, kept); err != nil {
			return err
		}
	}
	if err := s.put(denyFile, denyText, 0o755); err != nil {
		return err
	}
	defer func() {
		os.Remove(deny)
		os.Rename(kept, deny) // where there is one
	}()

	releases, err := releasesAt(s.path(ReleasesDir))
	if err != nil {
		return err
	}
	var last error
	for try := range 3 { // an order among packages that dpkg met too early comes right
		versions, err := installed(ctx)
		if err != nil {
			return err
		}
		var files, remove []string
		for _, c := range s.j.Changes.Packages {
			version, wanted := target[c.Name]
			switch {
			case !wanted && versions[c.Name] != "":
				remove = append(remove, c.Name)
			case wanted && versions[c.Name] != version:
				path, err := find(s.path(ReleasesDir), releases, c.Name, version)
				if err != nil {
					return err
				}
				files = append(files, path)
			}
		}
		if len(files) == 0 && len(remove) == 0 {
			return output(exec.CommandContext(ctx, "dpkg", "--configure", "-a"))
		}
		if try > 0 {
			s.rep.Logf("switch: %v: once more", last)
		}
		last = nil
		if len(files) > 0 {
			// Files that Platter writes win over those of packages.
			last = output(exec.CommandContext(ctx, "dpkg", append([]string{"--force-confold", "--force-confdef", "--auto-deconfigure", "--install"}, files...)...))
		}
		if len(remove) > 0 { // never purged: that may take data with it
			last = errors.Join(last, output(exec.CommandContext(ctx, "dpkg", append([]string{"--remove"}, remove...)...)))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if last == nil {
		last = errors.New("dpkg says that all is well, but the packages are not those that were to be installed")
	}
	return last
}

const denyText = "#!/bin/sh\n# Written by Platter while it changes packages: they start nothing.\nexit 101\n"

func find(dir string, releases map[string]*provision.Release, name, version string) (string, error) {
	for digest, r := range releases {
		i := slices.IndexFunc(r.Files, func(f provision.ReleaseFile) bool {
			return f.Kind == provision.FilePackage && f.Package == name && f.Version == version
		})
		if i >= 0 {
			d := stored{r.Files[i], ReleaseFile(dir, digest, r.Files[i].Name)}
			if err := d.verify(); err != nil {
				return "", err
			}
			return d.path, nil
		}
	}
	return "", fmt.Errorf("no release on the node has the package %s in version %s: run 'platter stack stage'", name, version)
}
