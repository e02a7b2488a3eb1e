package stack

import (
	"net/netip"
	"strings"
	"testing"

	"platter/provision"
	"platter/provision/stackfile"
)

// planOf is a plan for one of a rack's nodes, with the default stack.
func planOf(t *testing.T, node string, hosts ...provision.Host) provision.Plan {
	t.Helper()
	s, err := stackfile.Default()
	if err != nil {
		t.Fatal(err)
	}
	plan := provision.Plan{Format: provision.PlanFormat, Rack: "test", Node: node, Generation: 1, Hosts: hosts,
		Stack: provision.StackPlan{Domain: "im.test"}}
	var nodes []provision.Node
	for _, h := range hosts {
		nodes = append(nodes, provision.Node{Name: h.Name, Address: h.Address})
		plan.Stack.Members = append(plan.Stack.Members, h.Name)
		if h.Name == node {
			plan.Net.Address = netip.PrefixFrom(h.Address, 24)
		}
	}
	placed, err := s.Place(nodes, nil)
	if err != nil {
		t.Fatal(err)
	}
	plan.Stack.Components = provision.ComponentsFor(node, placed)
	return plan
}

// alone leaves ejabberd with a database of its own: its membership is tested
// without those that it needs.
func alone(t *testing.T, plan provision.Plan) provision.Plan {
	t.Helper()
	for _, c := range plan.Stack.Components {
		if c.Name != "ejabberd" {
			continue
		}
		c.Needs = nil
		files := append([]provision.StackFile(nil), c.Files...)
		for i, f := range files {
			if f.Path != "/etc/ejabberd/ejabberd.yml" {
				continue
			}
			var keep []string
			for line := range strings.Lines(f.Template) {
				switch {
				case strings.HasPrefix(line, "sql_"):
				case strings.HasPrefix(line, "  mod_platter_archive:"): // looks into the SQL database
				case strings.HasPrefix(line, "auth_method:"), strings.HasPrefix(line, "default_db:"):
					key, _, _ := strings.Cut(line, ":")
					keep = append(keep, key+": mnesia\n")
				default:
					keep = append(keep, line)
				}
			}
			files[i].Template = strings.Join(keep, "")
		}
		c.Files = files
		plan.Stack.Components = []provision.PlacedComponent{c}
		return plan
	}
	t.Fatal("the default stack has no ejabberd")
	return plan
}
