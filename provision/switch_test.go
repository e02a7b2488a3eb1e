package provision_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"platter/provision"
)

func TestPackageChanges(t *testing.T) {
	ours := func(name string) bool { return name != "bash" }
	kept := func(name string) bool { return name == "haproxy" }
	for name, c := range map[string]struct {
		installed, want map[string]string
		changes         []provision.PackageChange
	}{
		"nothing":                    {map[string]string{"haproxy": "3", "bash": "5"}, map[string]string{"haproxy": "3"}, []provision.PackageChange{}},
		"newer, older and missing":   {map[string]string{"haproxy": "3", "etcd": "4"}, map[string]string{"haproxy": "4", "etcd": "3", "board": "1"}, []provision.PackageChange{{"board", "", "1"}, {"etcd", "4", "3"}, {"haproxy", "3", "4"}}},
		"an older release's goes":    {map[string]string{"board": "1"}, map[string]string{}, []provision.PackageChange{{"board", "1", ""}}},
		"the install's stays":        {map[string]string{"haproxy": "3"}, map[string]string{}, []provision.PackageChange{}},
		"what is not ours is not":    {map[string]string{"bash": "5"}, map[string]string{}, []provision.PackageChange{}},
		"wanted wins over not kept":  {map[string]string{"board": "1"}, map[string]string{"board": "1"}, []provision.PackageChange{}},
		"wanted in another, not own": {map[string]string{"bash": "5"}, map[string]string{"bash": "6"}, []provision.PackageChange{{"bash", "5", "6"}}},
	} {
		if got := provision.PackageChanges(c.installed, c.want, ours, kept); !reflect.DeepEqual(got, c.changes) {
			t.Errorf("%s: %v, want %v", name, got, c.changes)
		}
	}
}

func TestPackagesFor(t *testing.T) {
	file := func(component, pkg string) provision.ReleaseFile {
		return provision.ReleaseFile{Name: pkg + ".deb", Component: component, Kind: provision.FilePackage, Package: pkg, Version: "2"}
	}
	r := provision.Release{Files: []provision.ReleaseFile{{Name: "Packages", Kind: provision.FileIndex},
		file("etcd", "etcd-server"), file("etcd", "libshared"), file("board", "board"), file("board", "libboard"), file("database", "haproxy")}}
	depends := func(name string) []string {
		return map[string][]string{"haproxy": {"libshared", "libc6"}, "libshared": {"haproxy"}}[name]
	}
	for name, c := range map[string]struct {
		here      []string
		installed map[string]string
		want      string
	}{
		"a component, and what it depends on": {[]string{"database"}, nil, "haproxy libshared"},
		"what is there already":               {nil, map[string]string{"libboard": "1"}, "libboard"},
		"nothing":                             {nil, nil, ""},
	} {
		var got []string
		for p := range r.PackagesFor(c.here, c.installed, depends) {
			got = append(got, p)
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %q, want %q", name, s, c.want)
		}
	}
}

func TestRestarted(t *testing.T) {
	list := func(names ...string) (out []provision.PlacedComponent) {
		for _, n := range names {
			name, needs, _ := strings.Cut(n, "<")
			c := provision.PlacedComponent{Component: provision.Component{Name: name}}
			if needs != "" {
				c.Needs = []string{needs}
			}
			out = append(out, c)
		}
		return out
	}
	rack := list("etcd", "postgresql", "database", "ejabberd<database", "board<ejabberd")
	for name, c := range map[string]struct {
		was, now []provision.PlacedComponent
		changed  string
		want     string
	}{
		"nothing":                     {rack, rack, "", ""},
		"one, and all that needs it":  {rack, rack, "database", "database ejabberd board"},
		"one that nobody needs":       {rack, rack, "board", "board"},
		"one that is new":             {rack[:3], rack[:4], "", "ejabberd"},
		"one that goes":               {rack, rack[:4], "", "board"},
		"one that goes, and is first": {rack, list("postgresql", "database"), "database", "etcd ejabberd board database"},
		"all at first":                {nil, rack[:2], "", "etcd postgresql"},
	} {
		got := provision.Restarted(c.was, c.now, func(n string) bool { return n == c.changed })
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %q, want %q", name, s, c.want)
		}
	}
}
