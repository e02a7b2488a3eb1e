package profile

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"platter/provision"
	"platter/provision/yamlfile"
)

// Names are the profiles, sorted.
func Names() []string { return slices.Sorted(maps.Keys(known().profiles)) }

// Name is a parser for yamlfile.Get that takes the name of a profile.
func Name(s string) (string, error) {
	if _, ok := known().profiles[s]; !ok {
		return "", fmt.Errorf("is not a profile%s", yamlfile.Suggest(s, Names()))
	}
	return s, nil
}

// Kinds are the kinds of settings, in the order in which they are listed.
func Kinds() []provision.SettingKind { return slices.Clone(kinds) }

// Unset is the value of an override that leaves a setting of the profile as
// the kernel has it.
const Unset = "default"

// Key is a parser for yamlfile.Get that takes a key of that kind.
func Key(kind provision.SettingKind) func(string) (string, error) {
	return func(key string) (string, error) {
		if known().find(kind, key) != nil {
			return key, nil
		}
		var keys []string
		for _, l := range known().lines {
			if l.kind == kind {
				keys = append(keys, l.key)
			}
		}
		return "", fmt.Errorf("is not in the catalogue%s", yamlfile.Suggest(key, keys))
	}
}

// Value is a parser for yamlfile.Get that takes a value of the known key.
func Value(kind provision.SettingKind, key string) func(string) (string, error) {
	return func(value string) (string, error) {
		l := known().find(kind, key)
		if l == nil {
			_, err := Key(kind)(key)
			return "", err
		}
		if value == Unset {
			return value, nil
		}
		return l.check(value)
	}
}

// Wish is what a rack file asks for beyond a profile's name.
type Wish struct {
	Profile   string              // empty: Default
	Overrides []provision.Setting // Kind, Key and Value; Value may be Unset
	Hugepages Hugepages
	Isolate   string // CPUs that the scheduler leaves alone, as in "2-7,10"
}

// Hugepages are set aside at the start, for guests that ask for them.
type Hugepages struct {
	Size  string // 2M or 1G; empty: none
	Count int
}

// Resolve returns the settings of the host. All mistakes come at once.
func Resolve(w Wish) ([]provision.Setting, []error) {
	var errs []error
	name := w.Profile
	if name == "" {
		name = Default
	}
	if _, err := Name(name); err != nil {
		errs = append(errs, fmt.Errorf("profile %q: %w", name, err))
		name = Default // to find what else is wrong
	}
	out := slices.Clone(known().profiles[name])
	for _, o := range w.Overrides {
		value, err := Value(o.Kind, o.Key)(o.Value)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s %q: %w", o.Kind, o.Key, o.Value, err))
			continue
		}
		if value == Unset {
			out = slices.DeleteFunc(out, func(s provision.Setting) bool { return s.Kind == o.Kind && s.Key == o.Key })
			continue
		}
		l := known().find(o.Kind, o.Key)
		out = put(out, provision.Setting{Kind: o.Kind, Key: o.Key, Value: value, Why: l.why, Source: "the rack file; " + l.source})
	}
	if w.Hugepages != (Hugepages{}) {
		more, err := hugepages(w)
		errs = append(errs, err...)
		for _, s := range more {
			out = put(out, s)
		}
	}
	if w.Isolate != "" {
		more, err := isolate(w.Isolate)
		if err != nil {
			errs = append(errs, fmt.Errorf("isolate %q: %w", w.Isolate, err))
		}
		out = append(out, more...)
	}
	for _, s := range out {
		if l := known().find(s.Kind, s.Key); l != nil && l.needs != "" && !slices.ContainsFunc(out, func(o provision.Setting) bool {
			return o.Kind == provision.Module && o.Key == l.needs
		}) {
			errs = append(errs, fmt.Errorf("%s %s needs the module %s: add 'module: {%s: load}'", s.Kind, s.Key, l.needs, l.needs))
		}
	}
	slices.SortStableFunc(out, func(a, b provision.Setting) int { return slices.Index(kinds, a.Kind) - slices.Index(kinds, b.Kind) })
	return out, errs
}

// PageSize is a parser for yamlfile.Get that takes the size of huge pages.
func PageSize(s string) (string, error) {
	if s != "2M" && s != "1G" {
		return "", errors.New("must be 2M or 1G")
	}
	return s, nil
}

// PageCount returns a parser for yamlfile.Get that takes a number of huge pages
// of that size, 16 TiB at most.
func PageCount(size string) func(string) (int, error) {
	if size == "1G" {
		return yamlfile.Int(1, 16<<10)
	}
	return yamlfile.Int(1, 8<<20)
}

func hugepages(w Wish) ([]provision.Setting, []error) {
	var errs []error
	if _, err := PageSize(w.Hugepages.Size); err != nil {
		errs = append(errs, fmt.Errorf("hugepages: size %q: %w", w.Hugepages.Size, err))
	} else if _, err := PageCount(w.Hugepages.Size)(strconv.Itoa(w.Hugepages.Count)); err != nil {
		errs = append(errs, fmt.Errorf("hugepages: count %d: %w", w.Hugepages.Count, err))
	}
	ksm := provision.Setting{Kind: provision.Sysfs, Key: "kernel/mm/ksm/run", Value: "0",
		Why: "huge pages are never merged: looking for like ones would be for nothing", Source: "kernel.org admin-guide/mm/ksm"}
	for _, o := range w.Overrides {
		if o.Kind == ksm.Kind && o.Key == ksm.Key && o.Value == "1" {
			errs = append(errs, errors.New("hugepages and KSM exclude each other: huge pages are never merged"))
		}
	}
	arg := func(key, value string) provision.Setting {
		return provision.Setting{Kind: provision.Cmdline, Key: key, Value: value, Source: "kernel.org admin-guide/mm/hugetlbpage",
			Why: "set aside at the start, before memory is in pieces; guests then cannot be swapped nor overcommitted"}
	}
	// The size has to stand before the count.
	return []provision.Setting{ksm, arg("default_hugepagesz", w.Hugepages.Size), arg("hugepagesz", w.Hugepages.Size),
		arg("hugepages", strconv.Itoa(w.Hugepages.Count))}, errs
}

// isolate keeps CPUs free for pinned guests.
func isolate(cpus string) ([]provision.Setting, error) {
	if _, err := CPUs(cpus); err != nil {
		return nil, err
	}
	arg := func(key, value, why string) provision.Setting {
		return provision.Setting{Kind: provision.Cmdline, Key: key, Value: value, Why: why, Source: "kernel.org admin-guide/kernel-parameters"}
	}
	return []provision.Setting{
		arg("isolcpus", "domain,managed_irq,"+cpus, "only what is pinned to these CPUs runs on them"),
		arg("nohz_full", cpus, "a task that is alone on its CPU is not interrupted by the clock"),
		arg("rcu_nocbs", cpus, "the kernel's own clearing up happens on other CPUs"),
	}, nil
}

// CPUs is a parser for yamlfile.Get that takes a list of CPUs to isolate.
func CPUs(s string) (string, error) {
	bad := errors.New(`must be a rising list of CPUs such as 2-7,10`)
	last := -1
	for _, part := range strings.Split(s, ",") {
		from, to, span := strings.Cut(part, "-")
		if !span {
			to = from
		}
		a, err1 := strconv.Atoi(from)
		b, err2 := strconv.Atoi(to)
		if err1 != nil || err2 != nil || !whole.MatchString(from) || !whole.MatchString(to) || a <= last || b < a || b > 8191 {
			return "", bad
		}
		if a == 0 {
			return "", errors.New("must leave CPU 0 to the host: somebody has to run its services")
		}
		last = b
	}
	return s, nil
}
