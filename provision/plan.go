package provision

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Plan is everything one install does to one node. The installer carries it
// out, the agent on the installed host reads the same plan from its own disk.
// It holds no secrets.
type Plan struct {
	Format     int         `json:"format"` // PlanFormat
	Rack       string      `json:"rack"`
	Node       string      `json:"node"`
	Slot       string      `json:"slot,omitempty"`
	Generation int         `json:"generation"`
	Image      ImageRef    `json:"image"`
	Disk       DiskRule    `json:"disk"`
	Reinstall  bool        `json:"reinstall"` // may replace an older install of the same node
	Layout     []Partition `json:"layout"`
	Net        NodeNet     `json:"net"`
	Hosts      []Host      `json:"hosts"` // every node of the rack, for /etc/hosts
	Users      []User      `json:"users"`
	Cmdline    []string    `json:"cmdline"`
	Finish     Finish      `json:"finish"`
	Host       HostSpec    `json:"host"`
	Stack      StackPlan   `json:"stack"`
	// DiscHost is the base URL of the node API, https, by address.
	DiscHost string `json:"disc_host"`
	// Files is the base URL of the objects, plain HTTP: hashes protect them.
	Files string `json:"files"`
}

const PlanFormat = 1

// ImageRef names a manifest by content.
type ImageRef struct {
	Name   string `json:"name"`
	Digest string `json:"digest"` // SHA-256 of the manifest file, hex
}

// Partition is one GPT entry. The order is the order on the disk.
type Partition struct {
	Name string `json:"name"`
	Type string `json:"type"`           // GPT type GUID
	Size int64  `json:"size,omitempty"` // bytes, a multiple of 1 MiB; 0: the rest of the disk, last entry only
	Part string `json:"part,omitempty"` // image part that fills it
	Grow bool   `json:"grow,omitempty"` // grow the file system to the partition
}

// GPT partition types that Platter uses (UEFI specification 2.10, 5.3.3, and
// the Discoverable Partitions Specification).
const (
	TypeBIOSBoot = "21686148-6449-6E6F-744E-656564454649"
	TypeESP      = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
	TypeRootX64  = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
)

// NodeNet is the node's own static network.
type NodeNet struct {
	MAC     MAC          `json:"mac"`
	Address netip.Prefix `json:"address"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
	DNS     []netip.Addr `json:"dns,omitempty"`
}

// Host is one line of /etc/hosts.
type Host struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
}

// StackPlan is the IM service as one node has to know it.
type StackPlan struct {
	Domain string `json:"domain"`
	Users  int    `json:"users,omitempty"` // how many the service is made for, on all members together; absent in plans of older disc hosts
	// Undersized: the machine is taken also where it is too small for them.
	Undersized bool     `json:"undersized,omitempty"`
	Members    []string `json:"members"` // node names in rack order; the first forms a new cluster
	// Components in the order in which they start; those of other nodes only by
	// name, ports and members.
	Components []PlacedComponent `json:"components,omitempty"`
}

// PlanFor makes the plan that brings node to generation with image. mac is the
// node's address as the rack file or an approval gives it.
func PlanFor(r *Rack, node Node, mac MAC, generation int, image ImageRef) (Plan, error) {
	nw, ok := r.NetworkOf(node.Address)
	if !ok {
		return Plan{}, fmt.Errorf("node %s: address %s is in none of the rack's networks", node.Name, node.Address)
	}
	p := Plan{
		Format: PlanFormat, Rack: r.Name, Node: node.Name, Slot: node.Slot, Generation: generation,
		Image: image, Disk: node.Disk, Reinstall: generation > 1, Layout: DefaultLayout(),
		Net: NodeNet{MAC: mac, Address: netip.PrefixFrom(node.Address, nw.Subnet.Bits()), Gateway: nw.Gateway, DNS: nw.DNS},
		// The console is serial and screen: the last one named is /dev/console.
		Users: r.Users, Cmdline: []string{"console=tty0", "console=ttyS0,115200"},
		Finish: node.Finish, Host: r.Host.of(node), Stack: StackPlan{Domain: r.Stack.Domain, Users: r.Stack.Users, Undersized: r.Stack.Undersized, Components: ComponentsFor(node.Name, r.Stack.Components)},
		DiscHost: "https://" + netip.AddrPortFrom(nw.DiscHost, NodeAPIPort).String(),
		Files:    "http://" + nw.DiscHost.String(),
	}
	for _, s := range p.Host.Of(Cmdline) {
		p.Cmdline = append(p.Cmdline, s.Arg())
	}
	// The kernel follows the last of two that contradict each other.
	p.Cmdline = append(p.Cmdline, node.Cmdline...)
	for _, n := range r.Nodes {
		p.Hosts = append(p.Hosts, Host{n.Name, n.Address})
		p.Stack.Members = append(p.Stack.Members, n.Name)
	}
	return p, nil
}

// Size is how the plan's node is dimensioned for the users of the service.
func (p Plan) Size() Sizing { return SizingFor(p.Stack.Users, len(p.Stack.Members)) }

// ServiceName is a DNS name in the certificates that the IM stack's programs
// use among themselves, and in no other certificate of the site's CA: for
// programs that ask a client for a name.
func (p Plan) ServiceName() string { return "stack." + p.Rack + ".internal" }

// NamedSecrets are the named secrets of the components that the plan's node has.
func (p Plan) NamedSecrets() []Secret {
	var out []Secret
	for _, c := range p.Stack.Components {
		for _, s := range c.Secrets {
			if !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
	}
	return out
}

// of is the host as one node has it: kernel arguments of its own take the place
// of the rack's.
func (h HostSpec) of(node Node) HostSpec {
	own := map[string]bool{}
	for _, arg := range node.Cmdline {
		key, _, _ := strings.Cut(arg, "=")
		own[key] = true
	}
	h.Settings = slices.DeleteFunc(slices.Clone(h.Settings), func(s Setting) bool { return s.Kind == Cmdline && own[s.Key] })
	return h
}

// Ports that nodes use on the disc host.
const (
	HTTPPort    = 80   // boot scripts, kernel, initramfs, objects
	NodeAPIPort = 8443 // TLS: enrolment, plans, reports, secrets
)

// DefaultLayout boots under BIOS and UEFI from the same disk.
func DefaultLayout() []Partition {
	return []Partition{
		{Name: "platter-bios", Type: TypeBIOSBoot, Size: 1 << 20, Part: PartBIOS},
		{Name: "platter-esp", Type: TypeESP, Size: 64 << 20, Part: PartESP},
		{Name: "platter-root", Type: TypeRootX64, Part: PartRoot, Grow: true},
	}
}

// Digest identifies the plan: SHA-256, hex, of its JSON form, whose field
// order is fixed.
func (p Plan) Digest() string {
	b, err := json.Marshal(p)
	if err != nil {
		panic(err) // no field of a Plan can fail to marshal
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
