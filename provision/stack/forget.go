package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"time"

	"platter/provision"
)

// Forget removes gone, a node that will not come back as it was, from the
// cluster of every component that this node is in. It refuses while gone
// answers: a member that runs must not be removed. Patroni forgets by itself.
func Forget(ctx context.Context, plan provision.Plan, sec provision.StackSecrets, gone string, say Say) (provision.ForgetResult, error) {
	result := provision.ForgetResult{Removed: []string{}, Unknown: []string{}}
	if gone == plan.Node {
		return result, fmt.Errorf("node %s cannot remove itself", gone)
	}
	i := slices.IndexFunc(plan.Hosts, func(h provision.Host) bool { return h.Name == gone })
	if i < 0 {
		return result, fmt.Errorf("node %s has never known a node %q", plan.Node, gone)
	}
	say("asking whether "+gone+" answers", 0, 0)
	if where := answers(ctx, plan.Hosts[i].Address, plan); where != "" {
		return result, &provision.Failure{Code: "node-alive", Message: fmt.Sprintf("%s is not gone: it answers node %s at %s. Nothing has changed", gone, plan.Node, where),
			Next: "Switch it off, then remove it"}
	}
	p, err := newProber(plan, sec)
	if err != nil {
		return result, err
	}
	var wrong []error
	for _, c := range here(plan) {
		var removed bool
		switch c.Member {
		case provision.MemberEtcd:
			removed, err = forgetEtcd(ctx, p, plan.Node, c.Name, gone)
		case provision.MemberEjabberd:
			removed, err = forgetEjabberd(ctx, plan, gone)
		case provision.MemberRabbitMQ:
			removed, err = forgetRabbitMQ(ctx, p, c.Name, gone)
		default:
			continue
		}
		switch {
		case err != nil:
			wrong = append(wrong, fmt.Errorf("%s: %w", c.Name, err))
		case removed:
			result.Removed = append(result.Removed, c.Name)
		default:
			result.Unknown = append(result.Unknown, c.Name)
		}
	}
	return result, errors.Join(wrong...)
}

// answers is a port at which a machine answers, be it with a refusal: that
// comes from a kernel that runs. Empty: at none.
func answers(ctx context.Context, addr netip.Addr, plan provision.Plan) string {
	ports := []int{22}
	for _, c := range plan.Stack.Components {
		for _, p := range c.Ports {
			if !p.Local && !p.UDP {
				ports = append(ports, p.Number)
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found := make(chan string, len(ports))
	for _, p := range ports {
		go func() {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(addr, uint16(p)).String())
			if err == nil {
				conn.Close()
			}
			if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
				found <- "port " + strconv.Itoa(p)
				return
			}
			found <- ""
		}()
	}
	for range ports {
		if where := <-found; where != "" {
			return where
		}
	}
	return ""
}

func forgetEtcd(ctx context.Context, p *prober, self, component, gone string) (bool, error) {
	e, err := newEtcd(p, self, component)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(e.hosts, func(h provision.Host) bool { return h.Name == gone })
	if i < 0 {
		return false, nil
	}
	var list struct{ Members []etcdMember }
	if err := e.atSelf(ctx, "cluster/member/list", struct{}{}, &list); err != nil {
		return false, err
	}
	for _, m := range list.Members {
		if slices.Contains(m.Peers, e.peerURL(e.hosts[i])) {
			return true, e.atSelf(ctx, "cluster/member/remove", map[string]string{"ID": m.ID}, &struct{}{})
		}
	}
	return false, nil
}

func forgetEjabberd(ctx context.Context, plan provision.Plan, gone string) (bool, error) {
	m, err := local(plan)
	if err != nil {
		return false, err
	}
	st, err := m.status(ctx)
	if err != nil || !slices.Contains(st.known, gone) {
		return false, err
	}
	answer, err := m.quick(ctx, forgetExpr(gone))
	if err == nil && answer != "{atomic,ok}" {
		err = errors.New(answer)
	}
	return true, err
}

// forgetExpr takes a node out of the database's schema. ejabberd's own
// leave_cluster would halt a node that answers after all.
func forgetExpr(gone string) string {
	return `
	N = ` + atom(erlangNode(gone)) + `,
	R = case lists:member(N, mnesia:system_info(running_db_nodes)) of
		true -> still_running;
		false -> mnesia:del_table_copy(schema, N)
	end,
	lists:flatten(io_lib:format("~0p", [R])).`
}

func forgetRabbitMQ(ctx context.Context, p *prober, component, gone string) (bool, error) {
	r, err := newRabbitMQ(p.view, component)
	if err != nil {
		return false, err
	}
	members, err := r.members(ctx, r.self)
	if err != nil || !slices.Contains(members, gone) {
		return false, err
	}
	return true, r.forget(ctx, r.self, gone)
}
