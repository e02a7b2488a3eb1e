package ovs

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/ovn-kubernetes/libovsdb/ovsdb"
)

// Change is one change of the configuration. Several go into one transaction.
type Change struct{ add func(*edit) error }

// edit is a transaction that is being written.
type edit struct {
	view
	ops  []ovsdb.Operation
	made map[string]string // name of each bridge of this transaction, to its row
}

// AddBridge makes a bridge with b's ports. The host's side of it, an internal
// port of the bridge's name, need not be among them. Where the bridge is there
// already it only gets the ports that it lacks.
func AddBridge(b Bridge) Change {
	return Change{func(e *edit) error {
		ports := b.Ports
		if e.bridge(b.Name) == nil && e.made[b.Name] == "" {
			row := ovsdb.Row{"name": b.Name, "datapath_type": b.Datapath, "fail_mode": optional(b.FailMode),
				"external_ids": mapping(b.ExternalIDs), "other_config": mapping(b.OtherConfig)}
			e.made[b.Name] = e.insert("Bridge", row)
			e.link("Open_vSwitch", e.root, "bridges", e.made[b.Name])
			if !slices.ContainsFunc(ports, func(p Port) bool { return p.Name == b.Name }) {
				ports = append([]Port{{Name: b.Name, Interfaces: []Interface{{Name: b.Name, Type: "internal"}}}}, ports...)
			}
		}
		for _, p := range ports {
			if on, _ := e.port(p.Name); on != nil && on.Name == b.Name {
				continue
			}
			if err := AddPort(b.Name, p).add(e); err != nil {
				return err
			}
		}
		return nil
	}}
}

// DeleteBridge takes a bridge away with its ports. That there is none is no
// error.
func DeleteBridge(name string) Change {
	return Change{func(e *edit) error {
		if b := e.bridge(name); b != nil {
			e.unlink("Open_vSwitch", e.root, "bridges", b.id)
		}
		return nil
	}}
}

// AddPort adds a port to a bridge. It is refused while a port of that name is
// there, unless the same transaction deletes it first: so a port moves from one
// bridge to another without its device being touched.
func AddPort(bridge string, p Port) Change {
	return Change{func(e *edit) error {
		id, err := e.target(p.Name, bridge)
		if err != nil {
			return err
		}
		if len(p.Interfaces) == 0 {
			p.Interfaces = []Interface{{Name: p.Name}}
		}
		var interfaces []any
		for _, i := range p.Interfaces {
			row := ovsdb.Row{"name": i.Name, "type": i.Type, "mtu_request": count(i.MTURequest),
				"external_ids": mapping(i.ExternalIDs), "options": mapping(i.Options)}
			interfaces = append(interfaces, ovsdb.UUID{GoUUID: e.insert("Interface", row)})
		}
		row := vlanRow(p.VLAN)
		row["name"], row["fake_bridge"] = p.Name, p.FakeBridge
		row["bond_mode"], row["lacp"] = optional(p.Bond.Mode), optional(p.Bond.LACP)
		row["interfaces"] = ovsdb.OvsSet{GoSet: interfaces}
		row["external_ids"], row["other_config"] = mapping(p.ExternalIDs), mapping(p.OtherConfig)
		e.link("Bridge", id, "ports", e.insert("Port", row))
		return nil
	}}
}

// DeletePort takes a port off its bridge. That there is none is no error.
func DeletePort(name string) Change {
	return Change{func(e *edit) error {
		if b, p := e.port(name); p != nil {
			e.unlink("Bridge", b.id, "ports", p.id)
		}
		return nil
	}}
}

// MovePort puts a port that is there onto another bridge, with everything that
// it has; its device is not touched.
func MovePort(port, bridge string) Change {
	return Change{func(e *edit) error {
		from, p := e.port(port)
		if p == nil {
			return fmt.Errorf("there is no port %s", port)
		}
		to, err := e.target(port, bridge)
		if err != nil {
			return err
		}
		e.unlink("Bridge", from.id, "ports", p.id)
		e.link("Bridge", to, "ports", p.id)
		return nil
	}}
}

// SetVLAN changes the VLANs of a port that is there.
func SetVLAN(port string, v VLAN) Change {
	return Change{func(e *edit) error {
		_, p := e.port(port)
		if p == nil {
			return fmt.Errorf("there is no port %s", port)
		}
		e.update("Port", p.id, vlanRow(v))
		return nil
	}}
}

// SetMTU asks for an MTU of an interface that is there; 0 takes the wish back.
func SetMTU(name string, mtu int) Change {
	return setInterface(name, func(Interface) ovsdb.Row { return ovsdb.Row{"mtu_request": count(mtu)} })
}

// SetIDs adds to the external_ids of an interface that is there, or changes
// those.
func SetIDs(name string, ids map[string]string) Change {
	return setInterface(name, func(i Interface) ovsdb.Row {
		all := maps.Clone(i.ExternalIDs)
		maps.Copy(all, ids)
		return ovsdb.Row{"external_ids": mapping(all)}
	})
}

func setInterface(name string, row func(Interface) ovsdb.Row) Change {
	return Change{func(e *edit) error {
		for _, b := range e.bridges {
			for _, p := range b.Ports {
				for _, i := range p.Interfaces {
					if i.Name == name {
						e.update("Interface", i.id, row(i))
						return nil
					}
				}
			}
		}
		return fmt.Errorf("there is no interface %s", name)
	}}
}

// SetHardwareAddr gives the host's side of a bridge an Ethernet address; empty
// leaves the choice to the switch.
func SetHardwareAddr(bridge, mac string) Change {
	return Change{func(e *edit) error {
		on, id := e.bridge(bridge), e.made[bridge]
		if on != nil {
			id = on.id
		}
		if id == "" {
			return fmt.Errorf("there is no bridge %s", bridge)
		}
		const key = "hwaddr"
		where := is(id)
		e.ops = append(e.ops, ovsdb.Operation{Op: ovsdb.OperationMutate, Table: "Bridge", Where: where,
			Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("other_config", ovsdb.MutateOperationDelete, ovsdb.OvsSet{GoSet: []any{key}})}})
		if mac != "" {
			e.ops = append(e.ops, ovsdb.Operation{Op: ovsdb.OperationMutate, Table: "Bridge", Where: where,
				Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("other_config", ovsdb.MutateOperationInsert, mapping(map[string]string{key: mac}))}})
		}
		return nil
	}}
}

// Apply carries the changes out, all or none, and returns when the switch has
// acted on them: devices that it makes are there, ports have their number. What
// the switch could not do is in the Error of an Interface, not here; every
// Apply, also one of no change, has the switch try that again.
func (s *Switch) Apply(ctx context.Context, changes ...Change) error {
	e, err := s.write(ctx, changes)
	if err != nil {
		return err
	}
	where := is(e.root)
	res, err := s.transact(ctx, append(e.ops,
		ovsdb.Operation{Op: ovsdb.OperationMutate, Table: "Open_vSwitch", Where: where, Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("next_cfg", ovsdb.MutateOperationAdd, 1)}},
		ovsdb.Operation{Op: ovsdb.OperationSelect, Table: "Open_vSwitch", Where: where, Columns: []string{"next_cfg"}})...)
	if err != nil {
		return err
	}
	// The switch writes the number of the configuration that it has carried
	// out into cur_cfg. The database answers once there is such a row.
	mine := number(res[len(res)-1].Rows[0], "next_cfg")
	_, err = s.transact(ctx, ovsdb.Operation{Op: ovsdb.OperationWait, Table: "Open_vSwitch", Until: string(ovsdb.WaitConditionEqual),
		Where:   []ovsdb.Condition{{Column: "cur_cfg", Function: ovsdb.ConditionGreaterThanOrEqual, Value: mine}},
		Columns: []string{"_uuid"}, Rows: []ovsdb.Row{{"_uuid": ovsdb.UUID{GoUUID: e.root}}}})
	if err != nil {
		return fmt.Errorf("the switch has not acted on a change of its configuration, which stands: %w: look at 'systemctl status ovs-vswitchd'", err)
	}
	return nil
}

// Commit is Apply without waiting for the switch, which need not run.
func (s *Switch) Commit(ctx context.Context, changes ...Change) error {
	e, err := s.write(ctx, changes)
	if err != nil || len(e.ops) == 0 {
		return err
	}
	_, err = s.transact(ctx, e.ops...)
	return err
}

// target is the row of a bridge that gets a port.
func (e *edit) target(port, bridge string) (string, error) {
	if id := e.made[bridge]; id != "" {
		return id, nil
	}
	b := e.bridge(bridge)
	if b == nil {
		return "", fmt.Errorf("port %s: there is no bridge %s", port, bridge)
	}
	// Somebody may take the bridge away meanwhile: then all of this shall fail.
	e.ops = append(e.ops, ovsdb.Operation{Op: ovsdb.OperationWait, Table: "Bridge", Until: string(ovsdb.WaitConditionEqual), Timeout: new(0),
		Where: is(b.id), Columns: []string{"name"}, Rows: []ovsdb.Row{{"name": bridge}}})
	return b.id, nil
}

func (s *Switch) write(ctx context.Context, changes []Change) (*edit, error) {
	v, err := s.look(ctx)
	if err != nil {
		return nil, err
	}
	e := &edit{view: v, made: map[string]string{}}
	for _, c := range changes {
		if err := c.add(e); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// insert adds a row and returns the name by which the transaction knows it.
func (e *edit) insert(table string, row ovsdb.Row) string {
	name := fmt.Sprintf("row%d", len(e.ops))
	e.ops = append(e.ops, ovsdb.Operation{Op: ovsdb.OperationInsert, Table: table, Row: row, UUIDName: name})
	return name
}

func (e *edit) link(table, id, column, row string) {
	e.mutate(table, id, column, ovsdb.MutateOperationInsert, row)
}

// unlink lets go of a row; the database forgets what nothing refers to.
func (e *edit) unlink(table, id, column, row string) {
	e.mutate(table, id, column, ovsdb.MutateOperationDelete, row)
}

func (e *edit) mutate(table, id, column string, how ovsdb.Mutator, row string) {
	e.ops = append(e.ops, ovsdb.Operation{Op: ovsdb.OperationMutate, Table: table, Where: is(id),
		Mutations: []ovsdb.Mutation{*ovsdb.NewMutation(column, how, ovsdb.OvsSet{GoSet: []any{ovsdb.UUID{GoUUID: row}}})}})
}

func (e *edit) update(table, id string, row ovsdb.Row) {
	e.ops = append(e.ops, ovsdb.Operation{Op: ovsdb.OperationUpdate, Table: table, Where: is(id), Row: row})
}

func is(id string) []ovsdb.Condition {
	return []ovsdb.Condition{{Column: "_uuid", Function: ovsdb.ConditionEqual, Value: ovsdb.UUID{GoUUID: id}}}
}

func vlanRow(v VLAN) ovsdb.Row {
	row := ovsdb.Row{"tag": ovsdb.OvsSet{}, "vlan_mode": optional(v.Mode)}
	if v.Tag != nil {
		row["tag"] = *v.Tag
	}
	var trunks []any
	for _, t := range v.Trunks {
		trunks = append(trunks, t)
	}
	row["trunks"] = ovsdb.OvsSet{GoSet: trunks}
	return row
}

// optional and count write a column that may be empty.
func optional(s string) any {
	if s == "" {
		return ovsdb.OvsSet{}
	}
	return s
}

func count(n int) any {
	if n == 0 {
		return ovsdb.OvsSet{}
	}
	return n
}

func mapping(m map[string]string) ovsdb.OvsMap {
	out := ovsdb.OvsMap{GoMap: map[any]any{}}
	for k, v := range m {
		out.GoMap[k] = v
	}
	return out
}
