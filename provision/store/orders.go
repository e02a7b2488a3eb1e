package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"platter/provision"
)

// Orders returns the node's orders, and a channel that is closed when the
// orders of any node have changed.
func (s *Store) Orders(node string) (orders provision.Orders, changed <-chan struct{}) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.orders[node], s.ordered
}

// FindOrder is Orders for a single one, of whichever node.
func (s *Store) FindOrder(id int64) (order provision.OrderStatus, found bool, changed <-chan struct{}) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, orders := range s.orders {
		if o, ok := orders.Find(id); ok {
			return o, true, s.ordered
		}
	}
	return provision.OrderStatus{}, false, s.ordered
}

// OrderBody returns what the events of an order leave out; both are nil for an
// order that was forgotten.
func (s *Store) OrderBody(ctx context.Context, id int64) (args, result json.RawMessage, err error) {
	err = s.read.QueryRowContext(ctx, `SELECT args, result FROM orders WHERE id = ?`, id).Scan((*[]byte)(&args), (*[]byte)(&result))
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return nil, nil, fmt.Errorf("order %d: the journal cannot be read: %w", id, err)
	}
	if len(args) == 0 {
		args = nil
	}
	if len(result) == 0 {
		result = nil
	}
	return args, result, nil
}

// withoutBody returns e as the journal has it: short, and shown to anyone.
func withoutBody(e provision.Event) provision.Event {
	if e.Order != nil && e.Order.Args != nil {
		o := *e.Order
		o.Args = nil
		e.Order = &o
	}
	if e.Report != nil && e.Report.Order != nil && e.Report.Order.Result != nil {
		r, n := *e.Report, *e.Report.Order
		n.Result = nil
		r.Order, e.Report = &n, &r
	}
	return e
}

// writeBody keeps what withoutBody took off, for as long as the fold remembers
// the order.
func writeBody(tx *sql.Tx, e provision.Event) error {
	switch {
	case e.Kind == provision.EventOrder && e.Order != nil:
		if _, err := tx.Exec(`INSERT INTO orders (id, node, args) VALUES (?, ?, ?)`, e.ID, e.Node, string(e.Order.Args)); err != nil {
			return err
		}
		_, err := tx.Exec(`DELETE FROM orders WHERE node = ?1 AND id NOT IN (SELECT id FROM orders WHERE node = ?1 ORDER BY id DESC LIMIT ?2)`,
			e.Node, provision.KeptOrders)
		return err
	case e.Report != nil && e.Report.Order != nil && e.Report.Order.Result != nil:
		n := e.Report.Order // the first result counts, as in the fold
		_, err := tx.Exec(`UPDATE orders SET result = ? WHERE id = ? AND node = ? AND result = ''`, string(n.Result), n.ID, e.Node)
		return err
	}
	return nil
}
