package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/stack"
)

// releases carries out provision.OrderReleases.
func releases(ctx context.Context, _ task, _ progress) (any, error) { return stack.Releases(ctx) }

// switching makes the function of provision.OrderSwitch. Once the node runs
// another release the agent begins anew, with that plan: the order's end is said
// by that one, when the node is a member again.
func switching(plan provision.Plan, node *client.Node, rep *client.Reporter, service *sync.Mutex, anew func()) func(context.Context, task, progress) (any, error) {
	return func(ctx context.Context, t task, say progress) (any, error) {
		var args provision.SwitchArgs
		if err := json.Unmarshal(t.Args, &args); err != nil {
			return nil, fmt.Errorf("what to switch to cannot be read: %w", err)
		}
		service.Lock()
		defer service.Unlock()
		attempt := fmt.Sprintf("%d of %s", t.ID, t.Created.UTC().Format("2006-01-02T15:04:05.999999999"))
		result, acted, err := stack.Switch(ctx, args, attempt, asking(node), rep, say)
		if acted && ctx.Err() == nil {
			anew()
			<-ctx.Done()
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return result, err
	}
}

// undisturbed has tend wait, with what it saw last, while the mutex is held.
func undisturbed(service *sync.Mutex, tend func(context.Context, Reporter) (stack.Cluster, error)) func(context.Context, Reporter) (stack.Cluster, error) {
	var last stack.Cluster
	err := errors.New("the service is being changed")
	return func(ctx context.Context, rep Reporter) (stack.Cluster, error) {
		if service.TryLock() {
			defer service.Unlock()
			last, err = tend(ctx, rep)
		}
		return last, err
	}
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
