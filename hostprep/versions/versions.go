// Package versions knows which versions of kernel, QEMU, libvirt and Open
// vSwitch a host has, and which of them do not go together. It does no I/O.
package versions

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	deb "github.com/knqyf263/go-deb-version"

	"platter/provision/yamlfile"
)

// File is where an image says which versions it was built with.
const File = "/usr/lib/platter/versions"

// Components in the order in which they are listed.
var Components = []string{"kernel", "qemu", "libvirt", "ovs"}

// Set maps components to their versions, as the packages have them. What is
// not installed is not in it.
type Set map[string]string

// Locked is the content of File.
type Locked struct {
	Versions Set
	Allowed  []string // names of known-bad combinations that the build was told to accept
}

// String is the form that Parse reads.
func (l Locked) String() string {
	var b strings.Builder
	b.WriteString("# The combination that this image was built with.\n")
	for _, c := range Components {
		if v := l.Versions[c]; v != "" {
			fmt.Fprintf(&b, "%s %s\n", c, v)
		}
	}
	for _, name := range l.Allowed {
		fmt.Fprintf(&b, "allow %s\n", name)
	}
	return b.String()
}

// Parse reads what String wrote.
func Parse(text string) (Locked, error) {
	l := Locked{Versions: Set{}}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
		case len(f) == 2 && f[0] == "allow":
			l.Allowed = append(l.Allowed, f[1])
		case len(f) == 2 && slices.Contains(Components, f[0]):
			l.Versions[f[0]] = f[1]
		default:
			return l, fmt.Errorf("line %d: want 'component version' or 'allow name', have %q", n, strings.TrimSpace(line))
		}
	}
	return l, nil
}

// packages are the names that components have in Debian and in the RHEL
// family.
var packages = map[string][]string{
	"qemu":    {"qemu-system-x86", "qemu-kvm-core", "qemu-kvm"},
	"libvirt": {"libvirt-daemon"},
	"ovs":     {"openvswitch-switch", "openvswitch"},
}

// FromPackages picks the components out of a list of installed packages. Of
// several kernels it is the newest.
func FromPackages(installed map[string]string) Set {
	out := Set{}
	for component, names := range packages {
		for _, name := range names {
			if v := installed[name]; v != "" && out[component] == "" {
				out[component] = v
			}
		}
	}
	for name, v := range installed {
		switch {
		// openvswitch3.5 and kernel-core are the RHEL family's.
		case strings.HasPrefix(name, "openvswitch") && out["ovs"] == "" && strings.Trim(name[len("openvswitch"):], "0123456789.") == "":
			out["ovs"] = v
		case name == "kernel-core", strings.HasPrefix(name, "linux-image-") && isDigit(name[len("linux-image-"):]):
			if c, err := Compare(v, out["kernel"]); out["kernel"] == "" || err == nil && c > 0 {
				out["kernel"] = v
			}
		}
	}
	return out
}

func isDigit(s string) bool { return s != "" && s[0] >= '0' && s[0] <= '9' }

// Compare compares two versions as Debian does, without their epochs: -1 where
// a is older, 1 where b is.
func Compare(a, b string) (int, error) {
	va, err := plain(a)
	if err != nil {
		return 0, err
	}
	vb, err := plain(b)
	if err != nil {
		return 0, err
	}
	return cmp.Compare(va.Compare(vb), 0), nil
}

// Order is Compare for sorting: what is no version comes before those that are.
func Order(a, b string) int {
	n, err := Compare(a, b)
	if err == nil {
		return n
	}
	_, aerr := plain(a)
	_, berr := plain(b)
	switch {
	case aerr != nil && berr != nil:
		return cmp.Compare(a, b)
	case aerr != nil:
		return -1
	}
	return 1
}

func plain(s string) (deb.Version, error) {
	if _, rest, ok := strings.Cut(s, ":"); ok {
		s = rest
	}
	// rpm takes letters that dpkg does not, as in 5.14.0-427.el9_4.
	s = strings.NewReplacer("_", ".", "^", "+").Replace(s)
	v, err := deb.NewVersion(s)
	if err != nil {
		return v, fmt.Errorf("version %q: %w", s, err)
	}
	return v, nil
}

// Bad is a combination that is known not to work.
type Bad struct {
	Name      string
	Component string
	Version   string // that was found
	With      string // other component and its version; may be empty
	Refuse    bool   // else it is only said
	Reason    string
	Source    string
}

func (b Bad) String() string {
	with := ""
	if b.With != "" {
		with = " with " + b.With
	}
	return fmt.Sprintf("%s: %s %s%s: %s (%s)", b.Name, b.Component, b.Version, with, b.Reason, b.Source)
}

type span struct{ from, below string }

func (s span) holds(version string) (bool, error) {
	for _, end := range []struct {
		bound string
		wrong func(int) bool
	}{
		{s.from, func(c int) bool { return c < 0 }},
		{s.below, func(c int) bool { return c >= 0 }},
	} {
		if end.bound == "" {
			continue
		}
		c, err := Compare(version, end.bound)
		if err != nil || end.wrong(c) {
			return false, err
		}
	}
	return true, nil
}

type rule struct {
	bad   Bad
	spans []span
	with  span // of the component bad.With
}

//go:embed known-bad.yaml
var knownBad []byte

// rules are read when they are first asked for. The file is part of the
// program: a mistake in it shows in any test.
var rules = sync.OnceValue(func() []rule {
	f := yamlfile.Parse("known-bad.yaml", knownBad)
	out := readRules(f.Root())
	if err := f.Err(); err != nil {
		panic(err)
	}
	return out
})

func readRules(v yamlfile.Value) []rule {
	version := func(s string) (string, error) { _, err := plain(s); return s, err }
	component := func(s string) (string, error) {
		if !slices.Contains(Components, s) {
			return "", errors.New("is not a component" + yamlfile.Suggest(s, Components))
		}
		return s, nil
	}
	ends := func(m map[string]yamlfile.Value) span {
		return span{yamlfile.Get(m["from"], version), yamlfile.Get(m["below"], version)}
	}
	var out []rule
	for _, v := range v.List() {
		m := v.Fields("name", "component", "ranges", "with", "severity", "reason", "source")
		r := rule{bad: Bad{
			Name: yamlfile.Get(m["name"].Required(), yamlfile.Text), Component: yamlfile.Get(m["component"].Required(), component),
			Reason: yamlfile.Get(m["reason"].Required(), yamlfile.Text), Source: yamlfile.Get(m["source"].Required(), yamlfile.Text),
		}}
		switch yamlfile.Get(m["severity"].Required(), yamlfile.Text) {
		case "refuse":
			r.bad.Refuse = true
		case "warn":
		default:
			m["severity"].Failf("severity must be refuse or warn")
		}
		for _, s := range m["ranges"].Required().List() {
			r.spans = append(r.spans, ends(s.Fields("from", "below")))
		}
		if m["with"].Exists() {
			w := m["with"].Fields("component", "from", "below")
			r.bad.With, r.with = yamlfile.Get(w["component"].Required(), component), ends(w)
		}
		out = append(out, r)
	}
	return out
}

// KnownBad lists what is known not to work among the versions. A version that
// cannot be compared is an error.
func KnownBad(set Set) ([]Bad, error) {
	var out []Bad
	var errs []error
	for _, r := range rules() {
		version := set[r.bad.Component]
		if version == "" {
			continue
		}
		b := r.bad
		b.Version = version
		if b.With != "" {
			other := set[b.With]
			ok, err := r.with.holds(other)
			if other == "" {
				continue
			}
			if errs = append(errs, err); !ok {
				continue
			}
			b.With += " " + other
		}
		if slices.ContainsFunc(r.spans, func(s span) bool {
			ok, err := s.holds(version)
			errs = append(errs, err)
			return ok
		}) {
			out = append(out, b)
		}
	}
	return out, errors.Join(errs...)
}

// Names are the names of all known-bad combinations.
func Names() []string {
	var out []string
	for _, r := range rules() {
		out = append(out, r.bad.Name)
	}
	return out
}
