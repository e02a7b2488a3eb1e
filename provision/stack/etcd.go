package stack

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"platter/provision"
)

// etcdMember is a member as etcd's API tells it (etcd 3.5, rpc.proto, Member).
type etcdMember struct {
	ID      string   `json:"ID"` // a number in decimal, as text
	Name    string   `json:"name"`
	Peers   []string `json:"peerURLs"`
	Learner bool     `json:"isLearner"`
}

// etcd speaks to the members of the rack's etcd over the JSON form of its API,
// with this node's certificate.
type etcd struct {
	p     *prober
	self  string
	hosts []provision.Host // all that have etcd, in rack order
}

func newEtcd(p *prober, node, component string) (*etcd, error) {
	hosts, err := p.view.Members(component)
	return &etcd{p, node, hosts}, err
}

func (e *etcd) peerURL(h provision.Host) string { return "https://" + h.Address.String() + ":2380" }

func (e *etcd) own() string {
	for _, h := range e.hosts {
		if h.Name == e.self {
			return e.peerURL(h)
		}
	}
	return ""
}

// call asks one member, or those that are not this node in turn until one
// answers. An answer that refuses is an *etcdRefusal.
func (e *etcd) call(ctx context.Context, path string, in, out any) error {
	err := errors.New("no other node has etcd")
	for _, h := range e.hosts {
		if h.Name == e.self {
			continue
		}
		if err = e.at(ctx, h, path, in, out); err == nil {
			return nil
		}
	}
	return err
}

type etcdRefusal struct{ host, text string }

func (r *etcdRefusal) Error() string { return "etcd on " + r.host + ": " + r.text }

func (e *etcd) at(ctx context.Context, h provision.Host, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+h.Address.String()+":2379/v3/"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.p.client.Do(req)
	if err != nil {
		return fmt.Errorf("etcd on %s: %w", h.Name, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("etcd on %s: %w", h.Name, err)
	}
	if resp.StatusCode != http.StatusOK {
		var refusal struct{ Message string }
		if json.Unmarshal(answer, &refusal) != nil || refusal.Message == "" {
			refusal.Message = resp.Status
		}
		return &etcdRefusal{h.Name, refusal.Message}
	}
	return json.Unmarshal(answer, out)
}

func (e *etcd) atSelf(ctx context.Context, path string, in, out any) error {
	i := slices.IndexFunc(e.hosts, func(h provision.Host) bool { return h.Name == e.self })
	return e.at(ctx, e.hosts[i], path, in, out)
}

func (e *etcd) members(ctx context.Context) ([]etcdMember, error) {
	var list struct{ Members []etcdMember }
	err := e.call(ctx, "cluster/member/list", struct{}{}, &list)
	return list.Members, err
}

// has tells whether the key is in etcd, as any member knows it.
func (e *etcd) has(ctx context.Context, key string) (bool, error) {
	var last error
	for _, h := range e.hosts {
		var found struct{ Kvs []any }
		in := map[string]any{"key": base64.StdEncoding.EncodeToString([]byte(key)), "keys_only": true}
		if last = e.at(ctx, h, "kv/range", in, &found); last == nil {
			return len(found.Kvs) > 0, nil
		}
	}
	return false, last
}

// admit makes the cluster expect this node as a member that learns, and returns
// the environment in which its etcd has to start. A former member of this
// name, whose data are gone, is removed.
func (e *etcd) admit(ctx context.Context) (env string, err error) {
	members, err := e.members(ctx)
	if err != nil {
		return "", err
	}
	own := e.own()
	i := slices.IndexFunc(members, func(m etcdMember) bool { return slices.Contains(m.Peers, own) })
	if j := slices.IndexFunc(members, func(m etcdMember) bool { return m.Name == "" && !slices.Contains(m.Peers, own) }); j >= 0 {
		// Its etcd has to start with the list of members as it is now.
		return "", fmt.Errorf("%s is about to join and has not started its etcd", strings.Join(members[j].Peers, " "))
	}
	if i >= 0 && members[i].Name != "" {
		if err := e.call(ctx, "cluster/member/remove", map[string]string{"ID": members[i].ID}, &struct{}{}); err != nil {
			return "", err
		}
		i = -1
	}
	if i < 0 {
		in := map[string]any{"peerURLs": []string{own}, "isLearner": true}
		if err := e.call(ctx, "cluster/member/add", in, &struct{}{}); err != nil {
			return "", err
		}
		if members, err = e.members(ctx); err != nil {
			return "", err
		}
	}
	return e.environment("existing", members)
}

// environment is what etcd has to know when it starts for the first time.
func (e *etcd) environment(state string, members []etcdMember) (string, error) {
	var all []string
	for _, m := range members {
		i := slices.IndexFunc(e.hosts, func(h provision.Host) bool { return slices.Contains(m.Peers, e.peerURL(h)) })
		if i < 0 {
			return "", fmt.Errorf("etcd has the member %s (%s), which is none of this rack: remove it with 'etcdctl member remove'", m.Name, strings.Join(m.Peers, " "))
		}
		all = append(all, e.hosts[i].Name+"="+e.peerURL(e.hosts[i]))
	}
	return fmt.Sprintf("ETCD_INITIAL_CLUSTER_STATE=%s\nETCD_INITIAL_CLUSTER=%s\n", state, strings.Join(all, ",")), nil
}

// vote gives this node's member its vote once it has learnt all. A member that
// voted from its first moment on, and then died, could take the majority away
// from those that have the data.
func (e *etcd) vote(ctx context.Context) error {
	if len(e.hosts) == 1 {
		return nil
	}
	// One that learns does not tell the members.
	members, err := e.members(ctx)
	if err != nil {
		var own struct{ Members []etcdMember }
		if e.atSelf(ctx, "cluster/member/list", map[string]bool{"linearizable": false}, &own) != nil {
			return err
		}
		members = own.Members // the others are away: it has its vote
	}
	i := slices.IndexFunc(members, func(m etcdMember) bool { return slices.Contains(m.Peers, e.own()) })
	if i < 0 || !members[i].Learner {
		return nil
	}
	return e.call(ctx, "cluster/member/promote", map[string]string{"ID": members[i].ID}, &struct{}{})
}

// bringEtcd makes this node's etcd a member.
func (n *node) bringEtcd(ctx context.Context, c provision.PlacedComponent) error {
	e, err := newEtcd(n.p, n.plan.Node, c.Name)
	if err != nil {
		return err
	}
	err = n.enter(ctx, c, func(ctx context.Context) (string, error) {
		if len(e.hosts) == 1 {
			return e.environment("new", []etcdMember{{Peers: []string{e.own()}}})
		}
		env, err := e.admit(ctx)
		if err == nil {
			return env, nil
		}
		// Where others can be asked, the cluster exists.
		if _, refused := errors.AsType[*etcdRefusal](err); refused {
			return "", err
		}
		j, err2 := n.ask(ctx)
		if err2 != nil {
			return "", errors.Join(err, err2)
		}
		if j.Role == provision.RoleForm {
			return e.environment("new", []etcdMember{{Peers: []string{e.own()}}})
		}
		return "", err
	})
	if err != nil {
		return err
	}
	if err := n.start(ctx, c); err != nil {
		return err
	}
	return n.patiently(ctx, "stack-etcd-vote", fmt.Sprintf("etcd of the rack does not give node %s a vote", n.plan.Node), "Look at 'journalctl -u etcd' on every node", e.vote)
}
