package stack

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"platter/provision"
)

// loadBatch accounts are made or removed in one call: each password costs the
// node 25 ms (SCRAM's iterations), ten times as much on an emulated processor.
const loadBatch = 50

// LoadAccounts makes sure that the accounts of simulated users exist with these
// passwords, see provision.LoadAccounts; those that do are left alone. done,
// unless nil, hears how many of them are. Cut off at any point, it may be called
// again or be undone by RemoveLoadAccounts.
func LoadAccounts(ctx context.Context, plan provision.Plan, accounts []provision.Account, done func(n, of int)) error {
	m, err := local(plan)
	if err != nil {
		return err
	}
	return m.loadAccounts(ctx, accounts, done)
}

// RemoveLoadAccounts removes the accounts of all simulated users, also those of
// earlier runs, with everything that they left, and returns how many there
// were. Cut off at any point, it may be called again.
func RemoveLoadAccounts(ctx context.Context, plan provision.Plan) (int, error) {
	m, err := local(plan)
	if err != nil {
		return 0, err
	}
	return m.removeLoadAccounts(ctx)
}

func (m *member) loadAccounts(ctx context.Context, accounts []provision.Account, done func(n, of int)) error {
	for _, a := range accounts {
		if !strings.HasPrefix(a.User, provision.LoadPrefix) || !validName.MatchString(a.User) || a.Password == "" {
			return fmt.Errorf("%q is no simulated user: their names begin with %s, and they have passwords", a.User, provision.LoadPrefix)
		}
	}
	n := 0
	for batch := range slices.Chunk(accounts, loadBatch) {
		result, err := m.quick(ctx, loadExpr(m.plan.Stack.Domain, batch))
		if err != nil {
			return err
		}
		if result != "ok" {
			return &provision.Failure{Code: "stack-account",
				Message: fmt.Sprintf("ejabberd on node %s refuses an account of a simulated user: %s", m.plan.Node, result),
				Next:    "Look at /var/log/ejabberd/ejabberd.log on the node"}
		}
		n += len(batch)
		if done != nil {
			done(n, len(accounts))
		}
	}
	_, err := m.quick(ctx, syncExpr)
	return err
}

func (m *member) removeLoadAccounts(ctx context.Context) (int, error) {
	for n := 0; ; {
		result, err := m.quick(ctx, removeLoadExpr(m.plan.Stack.Domain, loadBatch))
		if err != nil {
			return n, err
		}
		gone, left, _ := strings.Cut(result, " of ")
		removed, err1 := strconv.Atoi(gone)
		found, err2 := strconv.Atoi(left)
		n += removed
		switch {
		case err1 != nil || err2 != nil || removed < min(found, loadBatch):
			return n, &provision.Failure{Code: "stack-account",
				Message: fmt.Sprintf("ejabberd on node %s does not remove the accounts of simulated users: %s", m.plan.Node, result),
				Next:    "Look at /var/log/ejabberd/ejabberd.log on the node"}
		case removed == found:
			_, err := m.quick(ctx, syncExpr)
			return n, err
		}
	}
}
