package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/stack"
)

// lifeKinds are the orders about the life of the stack around its members.
// service is held while one of them stops and starts it.
func lifeKinds(plan provision.Plan, node *client.Node, service *sync.Mutex) map[provision.OrderKind]orderKind {
	return map[provision.OrderKind]orderKind{
		provision.OrderBackup: {within: 24 * time.Hour, do: withArgs(func(ctx context.Context, t task, args provision.BackupArgs, sec provision.StackSecrets, say stack.Say) (any, error) {
			send := func(ctx context.Context, name string, r io.Reader) error { return node.SendPart(ctx, t.ID, name, r) }
			return stack.Backup(ctx, plan, sec, args, send, say)
		})},
		provision.OrderLoad: {within: 24 * time.Hour, do: withArgs(func(ctx context.Context, t task, args provision.RestoreArgs, sec provision.StackSecrets, say stack.Say) (any, error) {
			take := func(ctx context.Context, name string) (io.ReadCloser, error) { return node.TakePart(ctx, t.ID, name) }
			return nil, stack.Load(ctx, plan, sec, args, take, say)
		})},
		provision.OrderReplace: {within: time.Hour, do: withArgs(func(ctx context.Context, _ task, args provision.RestoreArgs, sec provision.StackSecrets, say stack.Say) (any, error) {
			service.Lock()
			defer service.Unlock()
			return stack.Replace(ctx, plan, sec, args, say)
		})},
		provision.OrderForget: {within: 10 * time.Minute, do: withArgs(func(ctx context.Context, _ task, args provision.ForgetArgs, sec provision.StackSecrets, say stack.Say) (any, error) {
			return stack.Forget(ctx, plan, sec, args.Node, say)
		})},
	}
}

// withArgs makes a kind of what needs its arguments and the node's secrets.
func withArgs[A any](do func(context.Context, task, A, provision.StackSecrets, stack.Say) (any, error)) func(context.Context, task, progress) (any, error) {
	return func(ctx context.Context, t task, say progress) (any, error) {
		var args A
		if err := json.Unmarshal(t.Args, &args); err != nil {
			return nil, fmt.Errorf("%s: its arguments cannot be read: %w", t.Order, err)
		}
		sec, err := stack.Secrets("/")
		if err != nil {
			return nil, err
		}
		v, err := do(ctx, t, args, sec, stack.Say(say))
		// What the disc host refuses says by itself what to do next.
		var refusal *client.Error
		if errors.As(err, &refusal) {
			err = &provision.Failure{Code: refusal.Code, Message: err.Error(), Next: "Look at 'journalctl -u platter-agent' on the node if that does not help"}
		}
		return v, err
	}
}
