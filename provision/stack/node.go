package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"platter/hostprep"
	"platter/provision"
)

// Progress hears what happens; client.Reporter is one.
type Progress interface {
	Phase(name string, n, of int)
	Logf(format string, args ...any)
	Facts(facts map[string]string)
}

// unit is a system service.
type unit interface {
	// Start waits until the service has said that it is ready.
	Start(ctx context.Context) error
	Restart(ctx context.Context) error
	// Stop waits until nothing of the service runs any more.
	Stop(ctx context.Context) error
}

// node is this node while its components are brought up.
type node struct {
	plan     provision.Plan
	sec      provision.StackSecrets
	root     string
	p        *prober
	units    func(name string) unit
	ask      func(context.Context) (provision.Join, error)
	rep      Progress
	patience time.Duration // how long anything may stand still
	pause    func(n int) time.Duration

	podman   func(ctx context.Context, args ...string) (string, error)
	sound    bool // the store of container images was checked
	repaired bool // and something was removed from it
}

// Bring makes every component of the node run and a member of its cluster, in
// their order: it repairs the files that Prepare wrote, waits for the units that
// systemd starts, and finds the node's part where a component has one. A node
// that is a member already only verifies that; it needs nobody for it. Killed at
// any point and called again it goes on.
//
// ask tells the node's part, see provision.JoinDecision; its errors are
// retried. The error is a *provision.Failure when something stands still for
// too long.
func Bring(ctx context.Context, plan provision.Plan, sec provision.StackSecrets, ask func(context.Context) (provision.Join, error), rep Progress) error {
	sd, err := hostprep.DialSystemd(ctx)
	if err != nil {
		return err
	}
	defer sd.Close()
	// An install laid everything down: this finds nothing to do.
	changed, err := prepare("/", plan, sec)
	if err != nil {
		return err
	}
	if len(changed) > 0 {
		if err := sd.Reload(ctx); err != nil {
			return err
		}
	}
	p, err := newProber(plan, sec)
	if err != nil {
		return err
	}
	n := &node{plan: plan, sec: sec, root: "/", p: p, ask: ask, rep: rep, patience: 15 * time.Minute, pause: backoff, podman: podman,
		units: func(name string) unit { return sd.Unit(name) }}
	own := here(plan)
	for i, c := range own {
		rep.Phase(c.Name, i+1, len(own))
		began := time.Now()
		if err := n.bring(ctx, c, changed[c.Name]); err != nil {
			return err
		}
		rep.Facts(map[string]string{c.Name + "_ms": ms(began)})
	}
	return nil
}

func (n *node) bring(ctx context.Context, c provision.PlacedComponent, changed bool) error {
	if contained(c) {
		fresh, err := n.bringImages(ctx, c)
		if err != nil {
			return err
		}
		if changed || fresh {
			// They are started below, where a failure is not the last word.
			for _, u := range slices.Backward(c.Units) {
				if err := n.units(u).Stop(ctx); err != nil {
					return err
				}
			}
		}
	} else if changed {
		n.rep.Logf("the configuration of %s was written anew", c.Name)
		for _, u := range c.Units {
			if err := n.units(u).Restart(ctx); err != nil {
				return err
			}
		}
	}
	switch c.Member {
	case provision.MemberEtcd:
		return n.bringEtcd(ctx, c)
	case provision.MemberPatroni:
		return n.bringPatroni(ctx, c)
	case provision.MemberEjabberd:
		m, err := local(n.plan)
		if err != nil {
			return err
		}
		m.unit, m.patience = n.units("ejabberd.service"), n.patience
		return m.bring(ctx, n.sec, n.ask, n.rep)
	case provision.MemberRabbitMQ:
		return n.bringRabbitMQ(ctx, c)
	case "":
		return n.start(ctx, c)
	}
	return &provision.Failure{Code: "stack-program", Message: fmt.Sprintf("the program on node %s does not know members of kind %q, which the component %s is of", n.plan.Node, c.Member, c.Name),
		Next: fmt.Sprintf("Run 'platter node reinstall %s'", n.plan.Node)}
}

// start waits until the component's units run and it is healthy. systemd
// restarts a unit that fails, so a few failures may still end well.
func (n *node) start(ctx context.Context, c provision.PlacedComponent) error {
	last := c.Units[len(c.Units)-1]
	return n.patiently(ctx, "stack-"+c.Name, fmt.Sprintf("%s on node %s does not become healthy", c.Name, n.plan.Node),
		fmt.Sprintf("Look at 'journalctl -u %s' on the node; it is tried on and on", last), func(ctx context.Context) error {
			for _, u := range c.Units {
				if err := n.units(u).Start(ctx); err != nil {
					return err
				}
			}
			return n.p.check(ctx, c)
		})
}

// healthy waits until the component, which runs, serves.
func (n *node) healthy(ctx context.Context, c provision.PlacedComponent) error {
	return n.patiently(ctx, "stack-"+c.Name, fmt.Sprintf("%s on node %s does not become healthy", c.Name, n.plan.Node),
		fmt.Sprintf("Look at 'journalctl -u %s' on the node", c.Units[len(c.Units)-1]), func(ctx context.Context) error { return n.p.check(ctx, c) })
}

// patiently tries until it works or has not for the node's patience; then the
// failure says what stood still, and why.
func (n *node) patiently(ctx context.Context, code, message, next string, try func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, n.patience)
	defer cancel()
	said := ""
	for k := 0; ; k++ {
		err := try(limited)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if why := err.Error(); why != said && limited.Err() == nil {
			if k > 2 { // what passes at once is not worth a line
				n.rep.Logf("%v", err)
			}
			said = why
		}
		if limited.Err() != nil || provision.Sleep(limited, n.pause(k)) != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return &provision.Failure{Code: code, Message: fmt.Sprintf("%s within %s: %s", message, n.patience, said), Next: next}
		}
	}
}

func (n *node) exists(path string) (bool, error) {
	_, err := os.Stat(filepath.Join(n.root, path))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// enter keeps, once, what part says about how the component's instance on this
// node begins. Until then systemd does not start it.
func (n *node) enter(ctx context.Context, c provision.PlacedComponent, part func(context.Context) (string, error)) error {
	gate := file{path: memberDir + c.Name, mode: 0o644}
	kept, err := n.exists(gate.path)
	if err != nil || kept {
		return err
	}
	began := time.Now()
	err = n.patiently(ctx, "stack-join", fmt.Sprintf("node %s finds no part in the rack's %s", n.plan.Node, c.Name),
		"See that the other nodes are on and 'platter serve' runs; this node keeps trying", func(ctx context.Context) (err error) {
			gate.text, err = part(ctx)
			return err
		})
	if err != nil {
		return err
	}
	n.rep.Facts(map[string]string{strings.ReplaceAll(c.Name, "-", "_") + "_part_ms": ms(began)})
	if _, err := put(n.root, gate); err != nil {
		return fmt.Errorf("node %s: writing /%s: %w: look at the disk's free space and health", n.plan.Node, gate.path, err)
	}
	return nil
}
