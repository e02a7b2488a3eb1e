package provision

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPlace(t *testing.T) {
	rack := []Node{{Name: "n1", Roles: []string{"storage"}}, {Name: "n2"}, {Name: "n3", Roles: []string{"chat", "storage"}}, {Name: "n4", Roles: []string{"storage"}}}
	for name, c := range map[string]struct {
		nodes []Node // nil: rack
		place Placement
		want  string
		wrong string
	}{
		"everywhere":                {place: Placement{}, want: "n1 n2 n3 n4"},
		"a role":                    {place: Placement{Role: "storage"}, want: "n1 n3 n4"},
		"a role of one node":        {place: Placement{Role: "chat"}, want: "n3"},
		"the first of a role":       {place: Placement{Role: "storage", Count: 2}, want: "n1 n3"},
		"the first of all":          {place: Placement{Count: 1}, want: "n1"},
		"more than there are":       {place: Placement{Role: "storage", Count: 7}, want: "n1 n3 n4"},
		"odd of four":               {place: Placement{Odd: true}, want: "n1 n2 n3"},
		"odd of three":              {place: Placement{Role: "storage", Odd: true}, want: "n1 n3 n4"},
		"odd of one":                {place: Placement{Role: "chat", Odd: true}, want: "n3"},
		"odd of what a count gives": {place: Placement{Role: "storage", Count: 2, Odd: true}, want: "n1"},
		"a role that nobody has":    {nodes: []Node{{Name: "n1"}}, place: Placement{Role: "storage", Count: 3, Odd: true}, wrong: `no node has the role "storage", which the component c needs`},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := c.nodes
			if nodes == nil {
				nodes = rack
			}
			// Components that know the rack's roles, and are not wanted.
			s := Stack{Name: "im", Components: []Component{{Name: "c", Place: c.place},
				{Name: "x", Optional: true, Place: Placement{Role: "storage"}}, {Name: "y", Optional: true, Place: Placement{Role: "chat"}}}}
			placed, err := s.Place(nodes, nil)
			if c.wrong != "" {
				if err == nil || err.Error() != c.wrong {
					t.Fatalf("error is %v, want %s", err, c.wrong)
				}
				return
			}
			if err != nil || len(placed) != 1 || strings.Join(placed[0].Members, " ") != c.want {
				t.Fatalf("%+v, %v; want %s", placed, err, c.want)
			}
		})
	}
}

func TestPlaceOptional(t *testing.T) {
	s := Stack{Name: "im", Components: []Component{{Name: "a"}, {Name: "b", Optional: true}, {Name: "c", Optional: true, Needs: []string{"a", "b"}}}}
	nodes := []Node{{Name: "n1"}}
	for enabled, want := range map[string]string{"": "a", "b": "a b", "c b": "a b c"} {
		placed, err := s.Place(nodes, strings.Fields(enabled))
		var got []string
		for _, c := range placed {
			got = append(got, c.Name)
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %q, %v; want %s", enabled, got, err, want)
		}
	}
}

// All mistakes of a placement come at once.
func TestPlaceMistakes(t *testing.T) {
	s := Stack{Name: "im", Components: []Component{{Name: "db", Place: Placement{Role: "storage"}}, {Name: "a"},
		{Name: "b", Optional: true}, {Name: "c", Optional: true, Needs: []string{"b"}}, {Name: "d", Place: Placement{Role: "edge"}}}}
	_, err := s.Place([]Node{{Name: "n1", Roles: []string{"storge"}}, {Name: "n2"}}, []string{"a", "c", "bb"})
	want := []string{
		`node n1 has the role "storge", which no component of the stack im asks for`,
		`the component "a" of the stack im is not optional, leave it out`,
		`the stack im has no component "bb"`,
		`no node has the role "storage", which the component db needs`,
		`no node has the role "edge", which the component d needs`,
		`the component c needs b, which is optional: name that in the rack file too`,
	}
	if err == nil {
		t.Fatal("no mistake was found")
	}
	if d := cmp.Diff(want, strings.Split(err.Error(), "\n")); d != "" {
		t.Error(d)
	}
	if _, err := (&Stack{}).Place(nil, nil); err != nil {
		t.Error(err)
	}
}

// A node gets what it runs, and of the rest only what others need to reach it.
func TestComponentsFor(t *testing.T) {
	full := Component{Name: "db", Kind: KindPackages, Member: MemberPatroni, Ports: []Port{{Name: "sql", Number: 5432}}, About: "x",
		Packages: []Package{{Name: "p"}}, Files: []StackFile{{Path: "/etc/db", Template: "t"}}, Secrets: []Secret{{"s", 32}}, Units: []string{"db.service"}}
	placed := []PlacedComponent{{full, []string{"n1"}}}
	r := &Rack{Name: "lab", Networks: []Network{{Subnet: netip.MustParsePrefix("10.0.0.0/24"), DiscHost: netip.MustParseAddr("10.0.0.254")}},
		Nodes: []Node{{Name: "n1", Address: netip.MustParseAddr("10.0.0.1")}, {Name: "n2", Address: netip.MustParseAddr("10.0.0.2")}},
		Stack: StackSpec{Components: placed}}
	for name, want := range map[string]Component{"n1": full, "n2": {Name: "db", Kind: KindPackages, Member: MemberPatroni, Ports: full.Ports}} {
		node, _ := r.NodeByName(name)
		p, err := PlanFor(r, node, "", 1, ImageRef{})
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]PlacedComponent{{want, []string{"n1"}}}, p.Stack.Components); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if has := len(p.NamedSecrets()) == 1; has != (name == "n1") {
			t.Errorf("%s: secrets are %v", name, p.NamedSecrets())
		}
	}
}
