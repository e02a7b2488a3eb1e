package stack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"platter/provision"
)

const rabbitHome = "var/lib/rabbitmq"

// rabbitmq speaks to the members of the rack's RabbitMQ over the Erlang
// distribution, with its cookie.
type rabbitmq struct {
	self    string
	hosts   []provision.Host // all that have it, in rack order
	port    int
	command func(ctx context.Context, name string, args ...string) *exec.Cmd
}

func newRabbitMQ(view provision.View, component string) (*rabbitmq, error) {
	hosts, err1 := view.Members(component)
	port, err2 := view.Port(component, "distribution")
	command, err3 := commandAs("rabbitmq", "/"+rabbitHome)
	return &rabbitmq{view.Node, hosts, port, command}, errors.Join(err1, err2, err3)
}

func rabbitNode(node string) string { return "rabbit@" + node }

func (r *rabbitmq) eval(ctx context.Context, node, expr string) (string, error) {
	i := slices.IndexFunc(r.hosts, func(h provision.Host) bool { return h.Name == node })
	if i < 0 {
		return "", fmt.Errorf("node %s has no RabbitMQ", node)
	}
	return erlCall("RabbitMQ", node, netip.AddrPortFrom(r.hosts[i].Address, uint16(r.port)), r.command)(ctx, expr)
}

const rabbitMembersExpr = `
	case rabbit:is_running() of
		true -> lists:flatten(lists:join(",", [lists:nthtail(length("rabbit@"), atom_to_list(N)) || N <- lists:sort(rabbit_nodes:list_members())]));
		_ -> ""
	end.`

// members are those of the cluster that node is in, with itself; the error says
// why it does not tell, also where its RabbitMQ is about to start.
func (r *rabbitmq) members(ctx context.Context, node string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	text, err := r.eval(ctx, node, rabbitMembersExpr)
	if err == nil && text == "" {
		err = fmt.Errorf("RabbitMQ on node %s has not started yet", node)
	}
	return strings.Split(text, ","), err
}

// running is the first other node whose RabbitMQ runs, with its members.
func (r *rabbitmq) running(ctx context.Context) (node string, members []string, err error) {
	err = errors.New("no other node has RabbitMQ")
	for _, h := range r.hosts {
		if h.Name == r.self {
			continue
		}
		if members, err = r.members(ctx, h.Name); err == nil {
			return h.Name, members, nil
		}
	}
	return "", nil, err
}

// forget makes the cluster that at is in know nothing of gone any more, which
// does not run.
func (r *rabbitmq) forget(ctx context.Context, at, gone string) error {
	answer, err := r.eval(ctx, at, `
	N = `+atom(rabbitNode(gone))+`,
	R = case rabbit_db_cluster:forget_member(N, false) of
		ok -> catch rabbit_quorum_queue:shrink_all(N), ok;
		Other -> Other
	end,
	lists:flatten(io_lib:format("~0p", [R])).`)
	if err == nil && answer != "ok" {
		err = fmt.Errorf("RabbitMQ on node %s does not forget %s: %s", at, gone, answer)
	}
	return err
}

// part finds how this node's RabbitMQ, which has no data, begins. One that the
// others remember would not start again, and neither would they.
func (r *rabbitmq) part(ctx context.Context, ask func(context.Context) (provision.Join, error)) (string, error) {
	if len(r.hosts) == 1 {
		return rabbitForms, nil
	}
	at, members, err := r.running(ctx)
	if err == nil {
		if slices.Contains(members, r.self) {
			if err := r.forget(ctx, at, r.self); err != nil {
				return "", err
			}
		}
		return "# Joins the cluster.\n", nil
	}
	j, err2 := ask(ctx)
	if err2 != nil {
		return "", errors.Join(err, err2)
	}
	if j.Role == provision.RoleForm {
		return rabbitForms, nil
	}
	return "", err
}

const rabbitForms = "# Makes the cluster.\n"

// errHalfway: the cluster has this node as a member, and the node does not know.
var errHalfway = errors.New("a join was cut off half-way")

// join makes this node, which holds nothing worth keeping unless it is one
// already, a member of the cluster of those that run.
func (r *rabbitmq) join(ctx context.Context) error {
	own, err := r.members(ctx, r.self)
	if err != nil || len(own) > 1 {
		return err
	}
	at, members, err := r.running(ctx)
	if err != nil {
		return err
	}
	if slices.Contains(members, r.self) {
		return errHalfway
	}
	answer, err := r.eval(ctx, r.self, `lists:flatten(io_lib:format("~0p", [catch rabbit_db_cluster:join(`+atom(rabbitNode(at))+`, disc)])).`)
	if err == nil && answer != "ok" && answer != "{ok,already_member}" {
		err = fmt.Errorf("RabbitMQ of node %s does not join that of %s: %s", r.self, at, answer)
	}
	return err
}

// bringRabbitMQ makes this node's RabbitMQ a member.
func (n *node) bringRabbitMQ(ctx context.Context, c provision.PlacedComponent) error {
	r, err := newRabbitMQ(n.p.view, c.Name)
	if err != nil {
		return err
	}
	gate := filepath.Join(n.root, memberDir, c.Name)
	for {
		if err := n.enter(ctx, c, func(ctx context.Context) (string, error) { return r.part(ctx, n.ask) }); err != nil {
			return err
		}
		if err := n.start(ctx, c); err != nil {
			return err
		}
		part, err := os.ReadFile(gate)
		if err != nil || string(part) == rabbitForms {
			return err
		}
		halfway := false
		err = n.patiently(ctx, "stack-rabbitmq-join", fmt.Sprintf("RabbitMQ of node %s does not become a member", n.plan.Node),
			"Look at 'journalctl -u rabbitmq-server' on every node", func(ctx context.Context) error {
				err := r.join(ctx)
				if halfway = errors.Is(err, errHalfway); halfway {
					return nil
				}
				return err
			})
		if err != nil || !halfway {
			return err
		}
		n.rep.Logf("RabbitMQ: %v: it begins anew", errHalfway)
		for _, u := range c.Units {
			if err := n.units(u).Stop(ctx); err != nil {
				return err
			}
		}
		// The gate last: what is cut off here finds an empty node that joins.
		if err := errors.Join(os.RemoveAll(filepath.Join(n.root, rabbitHome, "mnesia")), os.Remove(gate)); err != nil {
			return err
		}
	}
}
