package provision

import (
	"slices"
	"strings"
)

// Orders of the stack's releases.
const (
	// OrderReleases asks which releases a node has and changes nothing: no args,
	// a NodeReleases.
	OrderReleases OrderKind = "releases"
	// OrderSwitch takes a node from the release that it runs to another one:
	// SwitchArgs, a SwitchResult. It ends wholly there, or wholly where it was.
	OrderSwitch OrderKind = "switch"
)

// Installed stands, in the place of a release's digest, for what the install
// brought: the image's packages and the plan of that time.
const Installed = "installed"

// SwitchArgs are the args of OrderSwitch.
type SwitchArgs struct {
	To string `json:"to"` // a release's digest, or Installed
	// Members are the nodes of each component; what is not in it runs nowhere.
	// It is not asked for with Installed.
	Members map[string][]string `json:"members,omitempty"`
	// Once are the components whose commands marked once this node carries out.
	Once []string `json:"once,omitempty"`
	// Rollback: the commands are those with which the release that is left goes
	// back, not those with which the other one comes.
	Rollback bool `json:"rollback,omitempty"`
	// NoWayBack allows a switch whose way back is not on the node's disk.
	NoWayBack bool `json:"no_way_back,omitempty"`
	// DryRun only tells what would change.
	DryRun bool `json:"dry_run,omitempty"`
	// Patience is how many seconds a component may take to serve again; 0: 300.
	// On the way back it may take 300 at least.
	Patience int `json:"patience,omitempty"`
}

// SwitchResult is what an order of kind OrderSwitch did, or would do.
type SwitchResult struct {
	From    string        `json:"from"` // as SwitchArgs.To
	To      string        `json:"to"`
	Changes SwitchChanges `json:"changes"`
}

// SwitchChanges is what a switch changes on one node.
type SwitchChanges struct {
	Packages   []PackageChange `json:"packages"`   // by name
	Components []string        `json:"components"` // those that stop and start again, in the order in which they start
}

// None tells whether nothing is changed.
func (c SwitchChanges) None() bool { return len(c.Packages) == 0 && len(c.Components) == 0 }

// PackageChange is one package in another version.
type PackageChange struct {
	Name string `json:"name"`
	From string `json:"from,omitempty"` // empty: it was not installed
	To   string `json:"to,omitempty"`   // empty: it is removed
}

// PackageChanges are what has to be changed of the installed packages (name to
// version) so that all that is wanted is there in the version wanted, and of
// those that are ours nothing remains that is neither wanted nor kept.
func PackageChanges(installed, want map[string]string, ours, kept func(name string) bool) []PackageChange {
	out := []PackageChange{}
	for name, version := range want {
		if installed[name] != version {
			out = append(out, PackageChange{name, installed[name], version})
		}
	}
	for name, version := range installed {
		if _, wanted := want[name]; !wanted && ours(name) && !kept(name) {
			out = append(out, PackageChange{Name: name, From: version})
		}
	}
	slices.SortFunc(out, func(a, b PackageChange) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// PackagesFor are the packages of a release that a node with these components
// gets, by name: those of the components, those that the node has already, and
// what they depend on. depends names, for a package, all that it may depend on.
func (r *Release) PackagesFor(here []string, installed map[string]string, depends func(name string) []string) map[string]ReleaseFile {
	all, out := map[string]ReleaseFile{}, map[string]ReleaseFile{}
	var todo []string
	for _, f := range r.Files {
		if f.Kind != FilePackage {
			continue
		}
		all[f.Package] = f
		if _, there := installed[f.Package]; there || slices.Contains(here, f.Component) {
			todo = append(todo, f.Package)
		}
	}
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		f, listed := all[name]
		if _, known := out[name]; known || !listed {
			continue
		}
		out[name] = f
		todo = append(todo, depends(name)...)
	}
	return out
}

// Restarted are the components that a switch stops and starts again on a node,
// in the order of now: those that change, and all that need them. was and now
// are the node's components before and after; what is only in was comes first.
func Restarted(was, now []PlacedComponent, changed func(name string) bool) []string {
	in := func(list []PlacedComponent) func(PlacedComponent) bool {
		return func(c PlacedComponent) bool {
			return slices.ContainsFunc(list, func(o PlacedComponent) bool { return o.Name == c.Name })
		}
	}
	out := []string{}
	for _, c := range slices.Concat(slices.DeleteFunc(slices.Clone(was), in(now)), now) {
		needs := slices.ContainsFunc(c.Needs, func(n string) bool { return slices.Contains(out, n) })
		if needs || in(was)(c) != in(now)(c) || changed(c.Name) {
			out = append(out, c.Name)
		}
	}
	return out
}

// NodeReleases is what an order of kind OrderReleases finds.
type NodeReleases struct {
	Current  string        `json:"current"`  // a digest, or Installed
	Previous string        `json:"previous"` // where it came from; empty: it was never switched
	Staged   []NodeRelease `json:"staged"`   // complete ones
	// Primary: the node's database is the one that takes writes.
	Primary bool `json:"primary,omitempty"`
}

// NodeRelease is a release that a node has on its disk. Of its stack there is
// only what placing the components takes.
type NodeRelease struct {
	ReleaseRef
	Stack Stack `json:"stack"`
}
