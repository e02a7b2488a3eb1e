package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"platter/hostprep"
	"platter/provision"
)

// Cluster is the cluster as the local member sees it: names of nodes, sorted.
type Cluster struct {
	Running []string
	Down    []string // members that do not run or cannot be reached
	// Apart are those of Down that run, answer, and have a database of their
	// own: the cluster is split.
	Apart []string
}

// Look asks the local member about the cluster; it asks no other, so nobody is
// found to be apart.
func Look(ctx context.Context, plan provision.Plan) (Cluster, error) {
	m, err := local(plan)
	if err != nil {
		return Cluster{}, err
	}
	st, err := m.status(ctx)
	if err != nil {
		return Cluster{}, err
	}
	return st.cluster(), nil
}

func (s status) cluster() Cluster {
	return Cluster{Running: s.running,
		Down: slices.DeleteFunc(slices.Clone(s.known), func(n string) bool { return slices.Contains(s.running, n) })}
}

// member is the local node of the cluster.
type member struct {
	plan     provision.Plan
	root     string
	unit     unit
	command  func(ctx context.Context, name string, args ...string) *exec.Cmd // as the user ejabberd
	eval     evaluator
	patience time.Duration // how long anything may stand still
	pause    func(n int) time.Duration
}

func local(plan provision.Plan) (*member, error) {
	command, err := commandAs("ejabberd", "/"+spool)
	if err != nil {
		return nil, err
	}
	return &member{plan: plan, root: "/", patience: 15 * time.Minute, pause: backoff, command: command,
		eval: erlCall("ejabberd", plan.Node, netip.AddrPortFrom(plan.Net.Address.Addr(), DistPort), command)}, nil
}

// commandAs makes processes of a user of this host.
func commandAs(user, home string) (func(ctx context.Context, name string, args ...string) *exec.Cmd, error) {
	uid, err1 := idOf("/", "passwd", user)
	gid, err2 := idOf("/", "group", user)
	return func(ctx context.Context, name string, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = "/"
		cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/bin"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		return cmd
	}, errors.Join(err1, err2)
}

// backoff is the pause after the n-th wait, from 0: half a second, doubling to
// eight, with jitter so that a rack does not ask in step.
func backoff(n int) time.Duration {
	d := 500 * time.Millisecond << min(n, 4)
	return d/2 + rand.N(d)
}

// marker is kept once the node is a member. What counts is the database; the
// marker tells a founder that is alone from a node that never joined.
type marker struct {
	Node   string             `json:"node"`
	Role   provision.JoinRole `json:"role"`
	Target string             `json:"target,omitempty"`
}

const markerFile = "var/lib/platter/stack.json"

func (m *member) bring(ctx context.Context, sec provision.StackSecrets, ask func(context.Context) (provision.Join, error), rep Progress) error {
	began := time.Now()
	if err := m.start(ctx, rep); err != nil {
		return err
	}
	rep.Facts(map[string]string{"ejabberd_wait_ms": ms(began), "ejabberd_up_ms": hostprep.SinceBoot()})

	began = time.Now()
	part, err := m.enter(ctx, ask, rep)
	if err != nil {
		return err
	}

	if err := m.accounts(ctx, sec); err != nil {
		return err
	}
	if err := m.keep(part); err != nil {
		return err
	}

	st, err := m.status(ctx)
	if err != nil {
		return err
	}
	c := st.cluster()
	if !st.up || !slices.Contains(c.Running, m.plan.Node) {
		return &provision.Failure{Code: "stack-stopped",
			Message: fmt.Sprintf("ejabberd on node %s stopped again right after it became a member", m.plan.Node),
			Next:    "Look at 'journalctl -u ejabberd' on the node"}
	}
	rep.Facts(map[string]string{"cluster_join_ms": ms(began), provision.FactRunning: strings.Join(c.Running, ","), provision.FactDown: strings.Join(c.Down, ",")})
	rep.Logf("member of the cluster; running: %s%s", strings.Join(c.Running, ", "), suffix("; not running: ", c.Down))
	return nil
}

// start waits until ejabberd is up. systemd restarts one that fails, so a few
// failures may still end well.
func (m *member) start(ctx context.Context, rep Progress) error {
	return m.within(ctx, "stack-start",
		fmt.Sprintf("ejabberd on node %s does not start", m.plan.Node),
		"Look at 'journalctl -u ejabberd' on the node; one that was a member waits for the member that stopped last, so start the others too",
		func(ctx context.Context) error {
			for n := 0; ; n++ {
				err := m.unit.Start(ctx)
				if err == nil || ctx.Err() != nil {
					return err
				}
				if n == 4 {
					return err
				}
				rep.Logf("ejabberd: %v; systemd tries again", err)
				if err := provision.Sleep(ctx, m.pause(n)); err != nil {
					return err
				}
			}
		})
}

// enter makes the node a member and returns its part; it changes nothing on a
// node that is one.
func (m *member) enter(ctx context.Context, ask func(context.Context) (provision.Join, error), rep Progress) (marker, error) {
	st, err := m.status(ctx)
	if err == nil && st.joining { // of a Bring that was killed
		err = m.within(ctx, "stack-join", fmt.Sprintf("a join of node %s that was under way does not end", m.plan.Node),
			"Run 'systemctl restart ejabberd' on the node", func(ctx context.Context) error {
				_, err := m.eval(ctx, waitJoinExpr)
				return err
			})
		if err == nil {
			st, err = m.status(ctx)
		}
	}
	if err != nil {
		return marker{}, err
	}
	if !st.up { // a join that failed leaves the machine without the application
		if err := m.unit.Restart(ctx); err != nil {
			return marker{}, err
		}
		if st, err = m.status(ctx); err != nil {
			return marker{}, err
		}
	}
	kept, err := m.kept()
	if err != nil {
		return marker{}, err
	}
	if part, ok := membership(m.plan.Node, kept, st); ok {
		return part, nil
	}

	var last provision.Join
	var why error
	since := time.Now()
	for n := 0; ; n++ {
		j, err := ask(ctx)
		switch {
		case ctx.Err() != nil:
			return marker{}, ctx.Err()
		case err != nil:
			if why == nil || why.Error() != err.Error() {
				rep.Logf("asking for the part in the cluster: %v", err)
			}
			why = err
		case j.Role == provision.RoleForm:
			rep.Logf("forms the cluster")
			return marker{Node: m.plan.Node, Role: j.Role}, nil
		case j.Role == provision.RoleJoin:
			if j != last {
				rep.Logf("joins %s", j.Target)
			}
			err := m.join(ctx, j.Target)
			if err == nil {
				return marker{Node: m.plan.Node, Role: j.Role, Target: j.Target}, nil
			}
			if ctx.Err() != nil {
				return marker{}, ctx.Err()
			}
			if why == nil || why.Error() != err.Error() {
				rep.Logf("joining %s: %v", j.Target, err)
			}
			why = err
		case j.Role == provision.RoleWait:
			why = fmt.Errorf("%s is not a running member yet", j.Target)
			if j != last {
				rep.Logf("waits for %s", j.Target)
			}
		default:
			why = fmt.Errorf("the disc host answers with the unknown role %q", j.Role)
		}
		if j != last {
			last, since, n = j, time.Now(), 0
		}
		if time.Since(since) > m.patience {
			return marker{}, m.stuck(last, why)
		}
		if err := provision.Sleep(ctx, m.pause(n)); err != nil {
			return marker{}, err
		}
	}
}

// membership decides, from what the database says and what was kept, whether
// the node is a member already, and as what.
func membership(node string, kept *marker, st status) (marker, bool) {
	others := st.others(node)
	switch {
	case len(others) > 0 && !st.incomplete:
		if kept == nil { // killed between the join and the marker
			return marker{Node: node, Role: provision.RoleJoin, Target: others[0]}, true
		}
		return *kept, true
	case len(others) > 0 && kept != nil:
		return *kept, true // ejabberd itself adds what is missing as it starts its modules
	case len(others) == 0 && kept != nil && kept.Role == provision.RoleForm:
		return *kept, true
	}
	return marker{}, false
}

// join makes the node a member of target's cluster.
func (m *member) join(ctx context.Context, target string) error {
	if target == m.plan.Node || !slices.ContainsFunc(m.plan.Hosts, func(h provision.Host) bool { return h.Name == target }) {
		return fmt.Errorf("%q is no other node of this rack", target)
	}
	limited, cancel := context.WithTimeout(ctx, m.patience)
	defer cancel()
	result, err := m.eval(limited, joinExpr(target))
	if err == nil && result == "busy" {
		_, err = m.eval(limited, waitJoinExpr)
		result = "ok"
	}
	if ctx.Err() != nil {
		return ctx.Err() // it goes on without us
	}
	if err == nil && strings.Contains(result, "no_ping") {
		return fmt.Errorf("%s does not answer at port %d", target, DistPort) // nothing has changed
	}
	if err == nil && result == "ok" {
		st, err := m.status(ctx)
		switch {
		case err != nil:
			return err
		case st.up && slices.Contains(st.running, target) && !st.incomplete:
			return nil
		}
		result = fmt.Sprintf("members afterwards: known %v, running %v", st.known, st.running)
	}
	if err == nil {
		err = errors.New(result)
	}
	// Half-way: a fresh start finds either a member or a node to join again.
	return errors.Join(err, m.unit.Restart(ctx))
}

// accounts makes the probe accounts; members share them.
func (m *member) accounts(ctx context.Context, sec provision.StackSecrets) error {
	changed := false
	for _, a := range sec.Probes {
		result, err := m.quick(ctx, accountExpr(a.User, m.plan.Stack.Domain, a.Password))
		if err != nil {
			return err
		}
		switch result {
		case "present":
		case "ok":
			changed = true
		default:
			return &provision.Failure{Code: "stack-account",
				Message: fmt.Sprintf("ejabberd on node %s refuses the probe account %s: %s", m.plan.Node, a.User, result),
				Next:    "Look at /var/log/ejabberd/ejabberd.log on the node"}
		}
	}
	if changed {
		_, err := m.quick(ctx, syncExpr)
		return err
	}
	return nil
}

func (m *member) status(ctx context.Context) (status, error) {
	text, err := m.quick(ctx, statusExpr)
	if err != nil {
		return status{}, err
	}
	return parseStatus(text)
}

// other asks another member for its status.
func (m *member) other(ctx context.Context, node string) (status, error) {
	for _, h := range m.plan.Hosts {
		if h.Name == node {
			text, err := erlCall("ejabberd", node, netip.AddrPortFrom(h.Address, DistPort), m.command)(ctx, statusExpr)
			if err != nil {
				return status{}, err
			}
			return parseStatus(text)
		}
	}
	return status{}, fmt.Errorf("node %s is not in the plan of node %s", node, m.plan.Node)
}

// quick evaluates what takes milliseconds unless the machine is in trouble.
func (m *member) quick(ctx context.Context, expr string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, &provision.Failure{Code: "stack-hangs",
		Message: fmt.Sprintf("ejabberd on node %s took a command and does not answer", m.plan.Node),
		Next:    "Run 'systemctl restart ejabberd' on the node"})
	defer cancel()
	return m.eval(ctx, expr)
}

// within gives f the patience; past it the failure says what stood still.
func (m *member) within(ctx context.Context, code, message, next string, f func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, m.patience)
	defer cancel()
	err := f(limited)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if limited.Err() != nil {
		message += fmt.Sprintf(" within %s", m.patience)
	} else {
		message += fmt.Sprintf(" (%v)", err)
	}
	return &provision.Failure{Code: code, Message: message, Next: next}
}

func (m *member) stuck(j provision.Join, why error) error {
	f := &provision.Failure{Code: "stack-join",
		Message: fmt.Sprintf("node %s has tried for %s to become a member of the cluster: %v", m.plan.Node, m.patience, why),
		Next:    fmt.Sprintf("See that %s is on and its ejabberd runs; this node keeps trying", j.Target)}
	switch j.Role {
	case "":
		f.Next = "See that the disc host runs 'platter serve' and is reached; this node keeps trying"
	case provision.RoleWait:
		f.Code = "stack-wait"
	}
	return f
}

// kept reads the marker; nil where there is none that holds for this node.
func (m *member) kept() (*marker, error) {
	b, err := os.ReadFile(filepath.Join(m.root, markerFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", m.plan.Node, err)
	}
	var k marker
	if json.Unmarshal(b, &k) != nil || k.Node != m.plan.Node {
		return nil, nil
	}
	return &k, nil
}

func (m *member) keep(k marker) error {
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if _, err := put(m.root, file{path: markerFile, mode: 0o644, text: string(b) + "\n"}); err != nil {
		return fmt.Errorf("node %s: writing /%s: %w: look at the disk's free space and health", m.plan.Node, markerFile, err)
	}
	return nil
}

func ms(since time.Time) string { return strconv.FormatInt(time.Since(since).Milliseconds(), 10) }

func suffix(intro string, names []string) string {
	if len(names) == 0 {
		return ""
	}
	return intro + strings.Join(names, ", ")
}
