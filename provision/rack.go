package provision

import (
	"net/netip"
	"time"
)

// Rack is a checked rack file: what the operator wants. It is made by
// provision/rack, which guarantees what the comments here state.
type Rack struct {
	Name     string    // short name of the site or rack, [a-z0-9-]
	Image    string    // reference in the image store, for example "debian-13"
	Networks []Network // at least one; subnets do not overlap
	Nodes    []Node    // unique names, MACs, addresses and slots
	Users    []User    // people who may log in on nodes; never empty keys
	Host     HostSpec  // how every node is prepared
	Stack    StackSpec // the IM service
	Page     string    // host:port of the read-only web page; empty for none
}

// Network is one L2 segment that the disc host serves, through one interface.
type Network struct {
	Interface string       // name of the disc host's interface
	Subnet    netip.Prefix // IPv4
	DiscHost  netip.Addr   // the disc host's own address in Subnet
	Gateway   netip.Addr   // zero value: none
	DNS       []netip.Addr // may be empty
	PoolFirst netip.Addr   // addresses for machines that are not in the rack file
	PoolLast  netip.Addr
	Lease     time.Duration // lease time for every address handed out
}

// Node is one target server and its place in the rack.
type Node struct {
	Name    string     // host name, [a-z0-9-], at most 63 characters
	Slot    string     // place in the rack, for people; free text
	MAC     MAC        // empty: waits for `platter node approve MAC NAME`
	Address netip.Addr // static address, inside one of the rack's networks
	Disk    DiskRule   // which disk to install on
	Finish  Finish     // how the installer enters the installed system
	Cmdline []string   // further kernel arguments of the installed system
	Roles   []string   // what the stack file's placement asks for, [a-z0-9-]
}

// MAC is an Ethernet address in lower case with colons: 52:54:00:12:34:56.
type MAC string

// Finish says how the installer hands over to the installed system.
type Finish string

const (
	FinishKexec  Finish = "kexec"  // start the installed kernel directly
	FinishReboot Finish = "reboot" // go through the firmware once more
)

// DiskRule selects exactly one disk. Every field that is set must match; a
// rule without fields matches every fixed, writable disk. None or several
// matches stop the install: there is no first disk.
type DiskRule struct {
	Serial  string `json:"serial,omitempty"`
	WWN     string `json:"wwn,omitempty"`
	Path    string `json:"path,omitempty"`     // glob on /dev/NAME or a link in /dev/disk/by-path, for example pci-0000:00:1f.2-*
	Model   string `json:"model,omitempty"`    // glob
	MinSize int64  `json:"min_size,omitempty"` // bytes, inclusive
	MaxSize int64  `json:"max_size,omitempty"` // bytes, inclusive
	// Wipe allows the install to erase a disk that holds data Platter did not
	// write. Without it such a disk is refused.
	Wipe bool `json:"wipe,omitempty"`
}

// User is a person who may log in on nodes over ssh, by key only.
type User struct {
	Name string   `json:"name"` // "root" or a new account with sudo rights
	Keys []string `json:"keys"` // authorized_keys lines
}

// HostSpec says how every node is prepared, on its first boot and on every
// later one. provision/rack resolves it: it needs no catalogue to be carried
// out.
type HostSpec struct {
	Profile  string    `json:"profile,omitempty"`  // name of the kernel profile that Settings came from
	Settings []Setting `json:"settings,omitempty"` // of the profile, with the rack file's own values in place
	Bridges  []Bridge  `json:"bridges,omitempty"`
	Guests   GuestSpec `json:"guests,omitzero"`
}

// Of returns the settings of one kind, in order.
func (h HostSpec) Of(kind SettingKind) []Setting {
	var out []Setting
	for _, s := range h.Settings {
		if s.Kind == kind {
			out = append(out, s)
		}
	}
	return out
}

// Arg is a setting of kind Cmdline as the kernel reads it.
func (s Setting) Arg() string {
	if s.Value == "" {
		return s.Key
	}
	return s.Key + "=" + s.Value
}

// Setting is one value of the kernel or of its surroundings.
type Setting struct {
	Kind   SettingKind `json:"kind"`
	Key    string      `json:"key"`
	Value  string      `json:"value"`
	Why    string      `json:"why,omitempty"`    // for people
	Source string      `json:"source,omitempty"` // where the reason is written down
}

// SettingKind says where a setting lives.
type SettingKind string

const (
	Cmdline SettingKind = "cmdline" // kernel argument: Key=Value, or Key alone where Value is empty
	Sysctl  SettingKind = "sysctl"  // Key with dots, as in sysctl.conf(5)
	Sysfs   SettingKind = "sysfs"   // Key is a path below /sys
	Disk    SettingKind = "disk"    // Key is KIND/ATTRIBUTE below /sys/block/*/queue; KIND: ssd, nvme, rotational, virtual
	CPU     SettingKind = "cpu"     // Key is an attribute below /sys/devices/system/cpu/cpu*/cpufreq
	Module  SettingKind = "module"  // Key is MODULE to load it at boot, or MODULE.PARAMETER
	Limit   SettingKind = "limit"   // Key is one of limits.conf(5)'s items, for services and log-ins: nofile, nproc, memlock
	Alarm   SettingKind = "alarm"   // not set, watched: Key names the alarm, Value its threshold
)

// Bridge is an Open vSwitch bridge that domains attach to.
type Bridge struct {
	Name   string `json:"name"` // at most 15 characters
	MTU    int    `json:"mtu,omitempty"`
	Uplink Uplink `json:"uplink,omitzero"`
	VLANs  []int  `json:"vlans,omitempty"` // tags that the uplink carries; none: all
	// Management moves the node's own address from the uplink onto the bridge.
	Management bool `json:"management,omitempty"`
}

// Uplink connects a bridge to the rack's wires. Without interfaces the bridge
// ends at the host.
type Uplink struct {
	Interfaces []string `json:"interfaces,omitempty"` // several make a bond
	Bond       BondMode `json:"bond,omitempty"`       // empty with one interface
}

// BondMode is how several interfaces act as one.
type BondMode string

const (
	BondActiveBackup BondMode = "active-backup" // needs nothing from the rack's switch
	BondLACP         BondMode = "lacp"          // IEEE 802.1AX, the switch must speak it
)

// GuestSpec says how the domains of a host start and stop. Zero values mean
// the defaults named here.
type GuestSpec struct {
	Parallel   int           `json:"parallel,omitempty"`    // starts at a time; 2
	Delay      time.Duration `json:"delay,omitempty"`       // between two starts; none
	StopWithin time.Duration `json:"stop_within,omitempty"` // for all domains together, then they are ended; 2 min
	// MemoryPercent of the host's memory that running domains may be promised
	// together; 100. More than 120 has been seen to kill hosts.
	MemoryPercent int `json:"memory_percent,omitempty"`
}

// DefaultUsers is what the IM service is made for where the rack file does not
// say; MaxUsers is the most that it may say.
const (
	DefaultUsers = 100
	MaxUsers     = 100_000
)

// StackSpec is the IM service: one cluster over all nodes.
type StackSpec struct {
	Domain     string            // the XMPP domain, for example im.example.org
	Users      int               // how many it is made for, 1 to MaxUsers
	Undersized bool              // machines that are too small for them are taken all the same
	Optional   []string          // optional components of the stack file that are wanted
	Components []PlacedComponent // of the stack file, placed on the nodes, in the order in which they start
}

// NodeByName returns the node and whether the rack has it.
func (r *Rack) NodeByName(name string) (Node, bool) {
	for _, n := range r.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

// NodeByMAC returns the node with that MAC in the rack file.
func (r *Rack) NodeByMAC(mac MAC) (Node, bool) {
	for _, n := range r.Nodes {
		if mac != "" && n.MAC == mac {
			return n, true
		}
	}
	return Node{}, false
}

// NetworkOf returns the network that contains addr.
func (r *Rack) NetworkOf(addr netip.Addr) (Network, bool) {
	for _, n := range r.Networks {
		if n.Subnet.Contains(addr) {
			return n, true
		}
	}
	return Network{}, false
}
