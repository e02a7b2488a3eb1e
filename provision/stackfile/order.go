package stackfile

import (
	"slices"
	"strings"

	"platter/provision"
	"platter/provision/yamlfile"
)

// checkNeeds reports needs that cannot be met.
func (p *parser) checkNeeds(cs []provision.Component) {
	byName := map[string]provision.Component{}
	var names []string
	for _, c := range cs {
		byName[c.Name] = c
		names = append(names, c.Name)
	}
	for i, n := range p.needs {
		c, ok := byName[n.needs]
		switch {
		case !ok:
			n.at.Failf("%s needs %s, which the stack does not have%s", n.component, n.needs, yamlfile.Suggest(n.needs, names))
		case c.Optional && !byName[n.component].Optional:
			n.at.Failf("%s needs %s, which is optional, but is not optional itself", n.component, n.needs)
		case slices.ContainsFunc(p.needs[:i], func(o need) bool { return o.component == n.component && o.needs == n.needs }):
			n.at.Failf("%s needs %s twice", n.component, n.needs)
		}
	}
	for _, cycle := range cycles(cs) {
		last := len(cycle) - 2
		for _, n := range p.needs {
			if n.component == cycle[last] && n.needs == cycle[last+1] {
				n.at.Failf("no component can be the first to start: %s", strings.Join(cycle, " needs "))
				break
			}
		}
	}
}

// cycles finds components that need themselves in the end: each as the names
// from one back to itself. Where cycles share components, it finds one at least.
func cycles(cs []provision.Component) [][]string {
	needs := map[string][]string{}
	for _, c := range cs {
		needs[c.Name] = c.Needs
	}
	var found [][]string
	done := map[string]bool{}
	var walk func(path []string)
	walk = func(path []string) {
		name := path[len(path)-1]
		for _, n := range needs[name] {
			if i := slices.Index(path, n); i >= 0 {
				found = append(found, append(slices.Clone(path[i:]), n))
			} else if !done[n] {
				walk(append(path, n))
			}
		}
		done[name] = true
	}
	for _, c := range cs {
		if !done[c.Name] {
			walk([]string{c.Name})
		}
	}
	return found
}

// order sorts components so that each comes after those that it needs, and
// otherwise as in the file. What is part of a cycle comes last.
func order(cs []provision.Component) []provision.Component {
	var sorted []provision.Component
	left := slices.Clone(cs)
	waits := func(c provision.Component) bool {
		return slices.ContainsFunc(left, func(o provision.Component) bool { return slices.Contains(c.Needs, o.Name) })
	}
	for len(left) > 0 {
		i := slices.IndexFunc(left, func(c provision.Component) bool { return !waits(c) })
		if i < 0 {
			return append(sorted, left...)
		}
		sorted = append(sorted, left[i])
		left = slices.Delete(left, i, i+1)
	}
	return sorted
}
