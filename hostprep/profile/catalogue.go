package profile

import (
	"embed"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"platter/provision"
	"platter/provision/yamlfile"
)

//go:embed *.yaml
var files embed.FS

// Default is the profile of a rack file that names none.
const Default = "mixed"

// kinds in the order in which settings are listed.
var kinds = []provision.SettingKind{provision.Cmdline, provision.Module, provision.Sysctl, provision.Sysfs,
	provision.Disk, provision.CPU, provision.Limit, provision.Alarm}

// line is one setting that the catalogue knows.
type line struct {
	kind     provision.SettingKind
	key      string
	min, max float64  // of every number in a value, where oneOf is empty
	numbers  int      // how many numbers a value has
	oneOf    []string // or these words
	needs    string   // the module that has to be loaded
	why      string
	source   string
}

// catalogue is everything that the files say.
type catalogue struct {
	lines    []*line // known keys, in file order
	profiles map[string][]provision.Setting
}

func (c *catalogue) find(kind provision.SettingKind, key string) *line {
	for _, l := range c.lines {
		if l.kind == kind && l.key == key {
			return l
		}
	}
	return nil
}

// known is read when it is first asked for. The files are part of the program:
// a mistake in them shows in any test.
var known = sync.OnceValue(func() *catalogue {
	c, err := load()
	if err != nil {
		panic(err)
	}
	return c
})

func load() (*catalogue, error) {
	c := &catalogue{profiles: map[string][]provision.Setting{}}
	// A profile's ranges may stand in any file that it uses, so these are read
	// first; each is laid over what it uses, once.
	var errs []error
	own := map[string][]provision.Setting{}
	uses := map[string][]string{}
	for _, name := range []string{"base", "virtualisation", "messaging", "mixed"} {
		data, err := files.ReadFile(name + ".yaml")
		if err != nil {
			return nil, err
		}
		f := yamlfile.Parse(name+".yaml", data)
		own[name], uses[name] = c.read(f.Root())
		errs = append(errs, f.Err())
		var all []provision.Setting
		seen := map[string]bool{}
		var add func(string)
		add = func(name string) {
			if seen[name] {
				return
			}
			seen[name] = true
			for _, u := range uses[name] {
				add(u)
			}
			for _, s := range own[name] {
				all = put(all, s)
			}
		}
		add(name)
		if name != "base" {
			c.profiles[name] = all
		}
	}
	return c, errors.Join(errs...)
}

// read takes one file's lines into the catalogue and returns those that have
// values.
func (c *catalogue) read(v yamlfile.Value) (set []provision.Setting, uses []string) {
	names := []string{"use"}
	for _, k := range kinds {
		names = append(names, string(k))
	}
	top := v.Fields(names...)
	for _, u := range top["use"].List() {
		uses = append(uses, yamlfile.Get(u, yamlfile.Text))
	}
	for _, kind := range kinds {
		for _, v := range top[string(kind)].List() {
			m := v.Fields("key", "value", "min", "max", "numbers", "one-of", "needs", "why", "source")
			key := yamlfile.Get(m["key"].Required(), yamlfile.Text)
			l := c.find(kind, key)
			if l == nil {
				l = &line{kind: kind, key: key, numbers: 1, min: yamlfile.Get(m["min"], number), max: yamlfile.Get(m["max"], number),
					needs: yamlfile.Get(m["needs"], yamlfile.Text),
					why:   yamlfile.Get(m["why"].Required(), yamlfile.Text), source: yamlfile.Get(m["source"].Required(), yamlfile.Text)}
				if m["numbers"].Exists() {
					l.numbers = yamlfile.Get(m["numbers"], yamlfile.Int(1, 9))
				}
				for _, w := range m["one-of"].List() {
					l.oneOf = append(l.oneOf, yamlfile.Get(w, yamlfile.Text))
				}
				if len(l.oneOf) == 0 {
					m["min"].Required()
					m["max"].Required()
				}
				c.lines = append(c.lines, l)
			}
			if !m["value"].Exists() {
				continue
			}
			s := provision.Setting{Kind: kind, Key: key, Value: yamlfile.Get(m["value"], l.check), Why: l.why, Source: l.source}
			if m["why"].Exists() {
				s.Why = yamlfile.Get(m["why"], yamlfile.Text)
				s.Source = yamlfile.Get(m["source"].Required(), yamlfile.Text)
			}
			set = append(set, s)
		}
	}
	return set, uses
}

func number(s string) (float64, error) {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0, errors.New("must be a number")
	}
	return f, nil
}

var whole = regexp.MustCompile(`^[0-9]{1,18}$`)

// check returns the value in its plain form. Its error completes the sentence
// "KEY VALUE: ...".
func (l *line) check(value string) (string, error) {
	if len(l.oneOf) > 0 {
		if !slices.Contains(l.oneOf, value) {
			return "", fmt.Errorf("must be one of: %s", strings.Join(l.oneOf, ", "))
		}
		return value, nil
	}
	parts, between, what := strings.Fields(value), " ", ""
	switch {
	case l.kind == provision.Limit:
		parts, between, what = strings.Split(value, ":"), ":", ", or two as SOFT:HARD"
	case l.numbers > 1:
		what = "s"
	}
	many := fmt.Sprintf("%d whole number%s", l.numbers, what)
	if l.numbers == 1 {
		many = "a whole number" + what
	}
	if l.kind == provision.Alarm {
		many = "a number"
	}
	bad := fmt.Errorf("must be %s from %s to %s", many, plain(l.min), plain(l.max))
	if len(parts) != l.numbers && !(l.kind == provision.Limit && len(parts) == 2) {
		return "", bad
	}
	last := 0.0
	for _, p := range parts {
		f, err := number(p)
		if err != nil || l.kind != provision.Alarm && !whole.MatchString(p) || f < l.min || f > l.max {
			return "", bad
		}
		if f < last {
			return "", errors.New("must not fall from left to right")
		}
		last = f
	}
	return strings.Join(parts, between), nil
}

func plain(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// put sets s in place of the setting of the same kind and key, or at the end.
func put(all []provision.Setting, s provision.Setting) []provision.Setting {
	for i := range all {
		if all[i].Kind == s.Kind && all[i].Key == s.Key {
			all[i] = s
			return all
		}
	}
	return append(all, s)
}
