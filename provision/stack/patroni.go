package stack

import (
	"context"
	"errors"

	"platter/provision"
)

// patroniKey exists once the database cluster has been made.
const patroniKey = "/service/platter/initialize"

// bringPatroni makes this node's PostgreSQL the first of a cluster or one that
// follows.
func (n *node) bringPatroni(ctx context.Context, c provision.PlacedComponent) error {
	e, err := newEtcd(n.p, n.plan.Node, "etcd")
	if err != nil {
		return err
	}
	err = n.enter(ctx, c, func(ctx context.Context) (string, error) {
		there, err := e.has(ctx, patroniKey)
		if err != nil || there {
			return "# The database exists.\n", err
		}
		j, err := n.ask(ctx)
		if err != nil {
			return "", err
		}
		if j.Role != provision.RoleForm {
			return "", errors.New("the database has not been made yet")
		}
		return "# Makes the database.\n", nil
	})
	if err != nil {
		return err
	}
	return n.start(ctx, c)
}
