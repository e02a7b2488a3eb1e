package provision

import (
	"errors"
	"fmt"
	"slices"
)

// Stack is a checked stack file: the components that make the service of a
// rack. It is made by provision/stackfile, which guarantees what the comments
// here state.
type Stack struct {
	Name       string      `json:"name"`    // [a-z0-9-]
	Version    string      `json:"version"` // grows from disc to disc, compared as Debian compares versions
	Components []Component `json:"components"`
}

// MaxStackText bounds all templates and manifests of a stack together, in
// bytes: they travel in every plan, and as JSON may take six times as much.
const MaxStackText = 1 << 20

// Component is one program, or a few that belong together, on some of the
// nodes. Components stand in the order in which they start: each after all that
// it needs.
type Component struct {
	Name  string        `json:"name"`            // [a-z0-9-]
	About string        `json:"about,omitempty"` // for people: what it is for
	Kind  ComponentKind `json:"kind"`
	Place Placement     `json:"place,omitzero"`
	// Needs are components that must be healthy before this one starts, at every
	// boot. One that has no instance on this node is not waited for.
	Needs []string `json:"needs,omitempty"`
	// Optional components run only where the rack file names them.
	Optional bool `json:"optional,omitempty"`

	Packages []Package  `json:"packages,omitempty"` // kind packages
	Images   []OCIImage `json:"images,omitempty"`   // kinds compose and kube
	Manifest string     `json:"manifest,omitempty"` // the compose file's or the Kubernetes manifest's text, a template as in Files
	// Units are systemd units, in the order in which they start. Those of kinds
	// compose and kube follow from the manifest.
	Units []string    `json:"units,omitempty"`
	Files []StackFile `json:"files,omitempty"`
	// Secrets are those that the files use: made by the site once, the same on
	// every node that has them.
	Secrets []Secret `json:"secrets,omitempty"`

	Ports []Port `json:"ports,omitempty"`
	// Health says whether the component serves, as seen on a node; the zero
	// value asks its units.
	Health Health `json:"health,omitzero"`
	// Data are folders that hold what users would miss: never removed by an
	// upgrade or a rollback.
	Data []string `json:"data,omitempty"`
	// Member names the code that makes the component's instance on this node a
	// member of one cluster over all nodes that have it; empty where instances
	// know nothing of each other.
	Member MemberKind `json:"member,omitempty"`

	// Upgrade and Rollback are commands beyond new packages and files.
	Upgrade  []Command `json:"upgrade,omitempty"`
	Rollback []Command `json:"rollback,omitempty"`
}

// ComponentKind is the form in which a component comes on the disc.
type ComponentKind string

const (
	KindPackages ComponentKind = "packages" // Debian packages, run by systemd
	KindCompose  ComponentKind = "compose"  // container images and a compose file, run by podman
	KindKube     ComponentKind = "kube"     // container images and a Kubernetes manifest, run by podman
)

// MemberKind is a way of becoming a member, see Component.Member.
type MemberKind string

const (
	MemberEtcd     MemberKind = "etcd"
	MemberPatroni  MemberKind = "patroni"
	MemberEjabberd MemberKind = "ejabberd"
	MemberRabbitMQ MemberKind = "rabbitmq"
)

// Placement says on which nodes a component runs. The zero value means all.
type Placement struct {
	// Role: only nodes that have it in the rack file.
	Role string `json:"role,omitempty"`
	// Count: on so many of these, the first in the rack file; 0: on all.
	Count int `json:"count,omitempty"`
	// Odd makes the number of nodes odd, by leaving out the last: for what
	// decides by majority.
	Odd bool `json:"odd,omitempty"`
}

// Package is a Debian package.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version,omitempty"` // empty: the one that the image has
}

// OCIImage is a container image as an OCI archive.
type OCIImage struct {
	Name   string `json:"name"`   // as the manifest names it, for example localhost/board:1
	File   string `json:"file"`   // OCI archive of this one image, beside the stack file
	Digest string `json:"digest"` // of the image's manifest, sha256:...
}

// StackFile is a file that is made on every node that has the component.
type StackFile struct {
	Path string `json:"path"` // absolute
	// Template is text/template; its dot is a View.
	Template string `json:"template"`
	Mode     uint32 `json:"mode"`            // permission bits
	Owner    string `json:"owner,omitempty"` // user; empty: root
	Group    string `json:"group,omitempty"` // empty: root
	// Reload: the units notice a change by themselves or on reload; without it
	// they are restarted.
	Reload bool `json:"reload,omitempty"`
}

// Secret is a password.
type Secret struct {
	Name   string `json:"name"`
	Length int    `json:"length"` // characters of [A-Za-z0-9]
}

// Port is a port that a component listens on.
type Port struct {
	Name   string `json:"name"`
	Number int    `json:"number"`
	UDP    bool   `json:"udp,omitempty"`
	// Local: on the loopback interface only.
	Local bool `json:"local,omitempty"`
}

// Health is how a component is asked whether it serves. At most one field is
// set.
type Health struct {
	TCP string `json:"tcp,omitempty"` // template of host:port that takes a connection
	URL string `json:"url,omitempty"` // template of an address that answers 2xx; https is verified against the site's CA
}

// Command is a command of an upgrade or a rollback.
type Command struct {
	// Args are the program and its arguments, without a shell; each is a template.
	Args []string `json:"args"`
	User string   `json:"user,omitempty"` // empty: root
	// Once: on one node only, the first that has the component.
	Once bool `json:"once,omitempty"`
	// After: when the new version runs; else before the old one stops.
	After bool `json:"after,omitempty"`
}

// PlacedComponent is a component and the nodes that have it. A node that does
// not knows its name, ports and members only.
type PlacedComponent struct {
	Component
	Members []string `json:"members"` // in rack order
}

// Place finds the nodes for every component: optional ones only where enabled
// names them. All mistakes are returned at once, joined, also a role that no
// component asks for: it is a misspelt one.
func (s *Stack) Place(nodes []Node, enabled []string) ([]PlacedComponent, error) {
	var out []PlacedComponent
	var wrong []error
	for _, n := range nodes {
		for _, role := range n.Roles {
			if !slices.ContainsFunc(s.Components, func(c Component) bool { return c.Place.Role == role }) {
				wrong = append(wrong, fmt.Errorf("node %s has the role %q, which no component of the stack %s asks for", n.Name, role, s.Name))
			}
		}
	}
	for _, name := range enabled {
		i := slices.IndexFunc(s.Components, func(c Component) bool { return c.Name == name })
		switch {
		case i < 0:
			wrong = append(wrong, fmt.Errorf("the stack %s has no component %q", s.Name, name))
		case !s.Components[i].Optional:
			wrong = append(wrong, fmt.Errorf("the component %q of the stack %s is not optional, leave it out", name, s.Name))
		}
	}
	for _, c := range s.Components {
		if c.Optional && !slices.Contains(enabled, c.Name) {
			continue
		}
		var members []string
		for _, n := range nodes {
			if c.Place.Role == "" || slices.Contains(n.Roles, c.Place.Role) {
				members = append(members, n.Name)
			}
		}
		if len(members) == 0 && c.Place.Role != "" {
			wrong = append(wrong, fmt.Errorf("no node has the role %q, which the component %s needs", c.Place.Role, c.Name))
		}
		if c.Place.Count > 0 {
			members = members[:min(c.Place.Count, len(members))]
		}
		if c.Place.Odd && len(members)%2 == 0 {
			members = members[:max(len(members)-1, 0)]
		}
		out = append(out, PlacedComponent{c, members})
	}
	for _, c := range out {
		for _, need := range c.Needs {
			if !slices.ContainsFunc(out, func(o PlacedComponent) bool { return o.Name == need }) {
				wrong = append(wrong, fmt.Errorf("the component %s needs %s, which is optional: name that in the rack file too", c.Name, need))
			}
		}
	}
	return out, errors.Join(wrong...)
}

// ComponentsFor is what node has to know of the components.
func ComponentsFor(node string, placed []PlacedComponent) []PlacedComponent {
	var out []PlacedComponent
	for _, c := range placed {
		if !slices.Contains(c.Members, node) {
			c.Component = Component{Name: c.Name, Kind: c.Kind, Ports: c.Ports, Member: c.Member}
		}
		out = append(out, c)
	}
	return out
}
