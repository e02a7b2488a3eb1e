package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/stack"
)

// loadAccounts makes the function of provision.OrderLoadAccounts. The secret
// that passwords are made from comes from the disc host and stays in memory.
func loadAccounts(plan provision.Plan, node *client.Node) func(context.Context, task, progress) (any, error) {
	return func(ctx context.Context, t task, say progress) (any, error) {
		var args provision.LoadAccountsArgs
		if err := json.Unmarshal(t.Args, &args); err != nil {
			return nil, fmt.Errorf("arguments of %s: %w", t.Order, err)
		}
		if args.Users < 0 || args.Users > 2*provision.MaxUsers {
			return nil, fmt.Errorf("%d simulated users: must be from 0 to %d", args.Users, 2*provision.MaxUsers)
		}
		if args.Users == 0 {
			say("removing the accounts of simulated users", 0, 0)
			n, err := stack.RemoveLoadAccounts(ctx, plan)
			return provision.LoadAccountsResult{Removed: n}, err
		}
		sec, err := node.Secrets(ctx)
		if err != nil {
			return nil, fmt.Errorf("fetching the secret of simulated users: %w", err)
		}
		if sec.Load == "" {
			return nil, errors.New("the disc host has no secret of simulated users: it is older than this node's program")
		}
		err = stack.LoadAccounts(ctx, plan, provision.LoadAccounts(args.Users, []byte(sec.Load)), func(n, of int) {
			say("making accounts of simulated users", int64(n), int64(of))
		})
		return provision.LoadAccountsResult{Made: args.Users}, err
	}
}

// outage makes the function of provision.OrderOutage. One that was cut off is
// not repeated: the service has been away.
func outage(plan provision.Plan, service *sync.Mutex) func(context.Context, task, progress) (any, error) {
	return func(ctx context.Context, t task, say progress) (any, error) {
		service.Lock() // nobody heals it meanwhile
		defer service.Unlock()
		if t.Try > 1 {
			return nil, stack.Start(ctx, plan)
		}
		var args provision.OutageArgs
		if err := json.Unmarshal(t.Args, &args); err != nil {
			return nil, fmt.Errorf("arguments of %s: %w", t.Order, err)
		}
		if args.Seconds < 1 || args.Seconds > provision.MaxOutage {
			return nil, fmt.Errorf("an outage of %d seconds: must be from 1 to %d", args.Seconds, provision.MaxOutage)
		}
		return nil, stack.Outage(ctx, plan, time.Duration(args.Seconds)*time.Second, func(line string) { say(line, 0, 0) })
	}
}
