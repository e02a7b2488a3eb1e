// Package ovs reads and changes the configuration of Open vSwitch through its
// database, in plain Go values. Nothing is run and no output is parsed.
//
// A change is a transaction: all of it happens or none. Apply then waits until
// the switch itself has acted on it.
package ovs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	// Its wire types alone: its client keeps a copy of the database, which
	// costs megabytes of program for what are a few questions here.
	"github.com/ovn-kubernetes/libovsdb/ovsdb"
)

// DefaultSocket is where the database listens on every distribution.
const DefaultSocket = "/run/openvswitch/db.sock"

// Switch is the Open vSwitch of a host. It may be used by several goroutines
// and there is nothing to close: every call makes a connection of its own, so a
// restart of the database is of no consequence.
type Switch struct{ socket string }

// Dial asks the database at socket, empty for DefaultSocket, whether it is one
// of Open vSwitch.
func Dial(ctx context.Context, socket string) (*Switch, error) {
	if socket == "" {
		socket = DefaultSocket
	}
	s := &Switch{socket}
	_, err := s.transact(ctx, ovsdb.Operation{Op: ovsdb.OperationSelect, Table: "Open_vSwitch", Columns: []string{"cur_cfg"}})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Bridge is a bridge of the switch. It has a port with its own name, the
// host's side of it.
type Bridge struct {
	Name        string
	Datapath    string // "netdev" for the one in user space; empty: the kernel's
	FailMode    string // "standalone", "secure" or empty
	ExternalIDs map[string]string
	OtherConfig map[string]string
	Ports       []Port

	id string
}

// Port is what frames go through: one interface, or several that are bonded.
type Port struct {
	Name        string
	VLAN        VLAN
	Bond        Bond
	FakeBridge  bool // it stands for a VLAN of its bridge as if it were a bridge
	ExternalIDs map[string]string
	OtherConfig map[string]string
	Interfaces  []Interface // none: one, with the name of the port

	id string
}

// Bond is how several interfaces act as one. The zero value is the switch's
// own choice.
type Bond struct {
	Mode string // active-backup, balance-slb, balance-tcp
	LACP string // active, passive, off
}

// Interface is a network device of a port.
type Interface struct {
	Name        string
	Type        string // empty: a device that exists already; "internal": the switch makes it
	OFPort      int    // 0: the switch has not looked yet; below: it could not use the device
	Error       string // why it could not
	MTURequest  int    // 0: none
	ExternalIDs map[string]string
	Options     map[string]string

	id string
}

// VLAN says which VLANs a port carries. The zero value carries them all, and
// frames without a tag.
type VLAN struct {
	Tag    *int   // the one VLAN of the port, or its native one
	Trunks []int  // the tagged ones; none: all
	Mode   string // access, trunk, native-tagged, native-untagged, dot1q-tunnel; empty: what Tag implies
}

// Equal tells whether a port behaves the same with both.
func (v VLAN) Equal(o VLAN) bool { return v.String() == o.String() }

// String says what the port carries, the way the switch understands the
// settings: "VLAN 77", "trunk of VLANs 10,20".
func (v VLAN) String() string {
	mode, tag := v.Mode, 0
	if v.Tag != nil {
		tag = *v.Tag
	}
	if mode == "" {
		if mode = "trunk"; v.Tag != nil {
			mode = "access"
		}
	}
	trunk := "trunk of all VLANs"
	if len(v.Trunks) > 0 {
		var tags []string
		for _, t := range slices.Sorted(slices.Values(v.Trunks)) {
			tags = append(tags, strconv.Itoa(t))
		}
		trunk = "trunk of VLANs " + strings.Join(tags, ",")
	}
	switch mode {
	case "access":
		return fmt.Sprintf("VLAN %d", tag)
	case "trunk":
		return trunk
	}
	return fmt.Sprintf("%s VLAN %d, %s", mode, tag, trunk)
}

// Bridges returns every bridge with its ports, all from one moment and in the
// order of their names.
func (s *Switch) Bridges(ctx context.Context) ([]Bridge, error) {
	v, err := s.look(ctx)
	return v.bridges, err
}

// view is the configuration at one moment.
type view struct {
	root    string // the row that everything hangs from
	bridges []Bridge
}

func (s *Switch) look(ctx context.Context) (view, error) {
	res, err := s.transact(ctx,
		ovsdb.Operation{Op: ovsdb.OperationSelect, Table: "Open_vSwitch", Columns: []string{"_uuid"}},
		ovsdb.Operation{Op: ovsdb.OperationSelect, Table: "Bridge", Columns: []string{"_uuid", "name", "datapath_type", "fail_mode", "external_ids", "other_config", "ports"}},
		ovsdb.Operation{Op: ovsdb.OperationSelect, Table: "Port", Columns: []string{"_uuid", "name", "tag", "trunks", "vlan_mode", "bond_mode", "lacp", "fake_bridge", "external_ids", "other_config", "interfaces"}},
		ovsdb.Operation{Op: ovsdb.OperationSelect, Table: "Interface", Columns: []string{"_uuid", "name", "type", "ofport", "error", "mtu_request", "external_ids", "options"}},
	)
	if err != nil {
		return view{}, err
	}
	if len(res[0].Rows) != 1 {
		return view{}, errors.New("the database of Open vSwitch is empty: start the switch once, its start script fills it")
	}
	v := view{root: text(res[0].Rows[0], "_uuid")}
	interfaces, ports := map[string]Interface{}, map[string]Port{}
	for _, r := range res[3].Rows {
		i := Interface{
			id: text(r, "_uuid"), Name: text(r, "name"), Type: text(r, "type"), Error: text(r, "error"),
			OFPort: number(r, "ofport"), MTURequest: number(r, "mtu_request"),
			ExternalIDs: dictionary(r, "external_ids"), Options: dictionary(r, "options"),
		}
		interfaces[i.id] = i
	}
	for _, r := range res[2].Rows {
		p := Port{
			id: text(r, "_uuid"), Name: text(r, "name"),
			VLAN: VLAN{Mode: text(r, "vlan_mode")}, Bond: Bond{Mode: text(r, "bond_mode"), LACP: text(r, "lacp")},
			ExternalIDs: dictionary(r, "external_ids"), OtherConfig: dictionary(r, "other_config"),
		}
		p.FakeBridge, _ = r["fake_bridge"].(bool)
		for _, t := range set(r, "tag") {
			p.VLAN.Tag = new(integer(t))
		}
		for _, t := range set(r, "trunks") {
			p.VLAN.Trunks = append(p.VLAN.Trunks, integer(t))
		}
		slices.Sort(p.VLAN.Trunks)
		for _, id := range set(r, "interfaces") {
			p.Interfaces = append(p.Interfaces, interfaces[word(id)])
		}
		slices.SortFunc(p.Interfaces, func(a, b Interface) int { return strings.Compare(a.Name, b.Name) })
		ports[p.id] = p
	}
	for _, r := range res[1].Rows {
		b := Bridge{
			id: text(r, "_uuid"), Name: text(r, "name"), Datapath: text(r, "datapath_type"), FailMode: text(r, "fail_mode"),
			ExternalIDs: dictionary(r, "external_ids"), OtherConfig: dictionary(r, "other_config"),
		}
		for _, id := range set(r, "ports") {
			b.Ports = append(b.Ports, ports[word(id)])
		}
		slices.SortFunc(b.Ports, func(a, b Port) int { return strings.Compare(a.Name, b.Name) })
		v.bridges = append(v.bridges, b)
	}
	slices.SortFunc(v.bridges, func(a, b Bridge) int { return strings.Compare(a.Name, b.Name) })
	return v, nil
}

// bridge and port find by name; nil: there is none.
func (v view) bridge(name string) *Bridge {
	for i, b := range v.bridges {
		if b.Name == name {
			return &v.bridges[i]
		}
	}
	return nil
}

func (v view) port(name string) (*Bridge, *Port) {
	for i := range v.bridges {
		for j, p := range v.bridges[i].Ports {
			if p.Name == name {
				return &v.bridges[i], &v.bridges[i].Ports[j]
			}
		}
	}
	return nil, nil
}

// transact has the database carry out the operations, all or none.
func (s *Switch) transact(ctx context.Context, ops ...ovsdb.Operation) ([]ovsdb.OperationResult, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", s.socket)
	if err != nil {
		return nil, fmt.Errorf("the database of Open vSwitch does not answer: %w: look at 'systemctl status ovsdb-server'", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	res, err := exchange(conn, ops)
	if err != nil {
		return nil, fmt.Errorf("the database of Open vSwitch: %w", errors.Join(context.Cause(ctx), err))
	}
	return res, nil
}

// exchange is one call of JSON-RPC (RFC 7047, section 4).
func exchange(conn net.Conn, ops []ovsdb.Operation) ([]ovsdb.OperationResult, error) {
	enc, dec := json.NewEncoder(conn), json.NewDecoder(conn)
	if err := enc.Encode(map[string]any{"id": 1, "method": "transact", "params": ovsdb.NewTransactArgs("Open_vSwitch", ops...)}); err != nil {
		return nil, err
	}
	for {
		var m struct {
			ID     any
			Method string
			Params any
			Result []ovsdb.OperationResult
			Error  any
		}
		if err := dec.Decode(&m); err != nil {
			return nil, err
		}
		if m.Method == "echo" { // it wants to know whether we are still there
			if err := enc.Encode(map[string]any{"id": m.ID, "result": m.Params, "error": nil}); err != nil {
				return nil, err
			}
		}
		if m.Method != "" {
			continue
		}
		if m.Error != nil {
			return nil, fmt.Errorf("%v", m.Error)
		}
		// One more than was asked means that the end as a whole failed.
		for _, r := range m.Result {
			if r.Error != "" {
				return nil, fmt.Errorf("%s: %s", r.Error, r.Details)
			}
		}
		if len(m.Result) != len(ops) {
			return nil, fmt.Errorf("%d answers to %d questions", len(m.Result), len(ops))
		}
		return m.Result, nil
	}
}

// The columns of a row, in Go's terms. An optional column is a set of none or
// one, and a set of one is written as its element.

func set(r ovsdb.Row, column string) []any {
	switch v := r[column].(type) {
	case nil:
		return nil
	case ovsdb.OvsSet:
		return v.GoSet
	default:
		return []any{v}
	}
}

func word(v any) string {
	if id, ok := v.(ovsdb.UUID); ok {
		return id.GoUUID
	}
	s, _ := v.(string)
	return s
}

func integer(v any) int {
	f, _ := v.(float64)
	return int(f)
}

func text(r ovsdb.Row, column string) string {
	for _, v := range set(r, column) {
		return word(v)
	}
	return ""
}

func number(r ovsdb.Row, column string) int {
	for _, v := range set(r, column) {
		return integer(v)
	}
	return 0
}

func dictionary(r ovsdb.Row, column string) map[string]string {
	m, _ := r[column].(ovsdb.OvsMap)
	out := map[string]string{}
	for k, v := range m.GoMap {
		out[word(k)] = word(v)
	}
	return out
}
