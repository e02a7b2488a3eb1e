//go:build slow

package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/stack/probe"
)

type asker = func(context.Context) (provision.Join, error)

func form(context.Context) (provision.Join, error) {
	return provision.Join{Role: provision.RoleForm}, nil
}

func joins(target string) func(context.Context) (provision.Join, error) {
	return func(context.Context) (provision.Join, error) {
		return provision.Join{Role: provision.RoleJoin, Target: target}, nil
	}
}

// nobody fails the test when a node asks for its part.
func nobody(t *testing.T) func(context.Context) (provision.Join, error) {
	return func(context.Context) (provision.Join, error) {
		t.Error("a node that is a member asked for its part")
		return provision.Join{}, errors.New("nobody is asked")
	}
}

// TestCluster goes through the life of a cluster of two: form, wait, join,
// message, reboot, reinstall of either node, and cuts in the middle.
func TestCluster(t *testing.T) {
	l := newLab(t, "node1", "node2")
	one, two := l.nodes[0], l.nodes[1]
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	bring := func(n *testNode, ask func(context.Context) (provision.Join, error)) {
		t.Helper()
		began := time.Now()
		if err := n.bring(ctx, l.sec, ask, quiet{t}); err != nil {
			t.Fatalf("%s: %v\n%s", n.name, err, n.proc.out.String())
		}
		t.Logf("%s is a member after %s", n.name, time.Since(began).Round(time.Millisecond))
	}

	bring(one, form)
	asked := 0
	bring(two, func(ctx context.Context) (provision.Join, error) {
		switch asked++; asked {
		case 1:
			return provision.Join{}, errors.New("the disc host is away")
		case 2:
			return provision.Join{Role: provision.RoleWait, Target: "node1"}, nil
		}
		return joins("node1")(ctx)
	})
	l.whole(ctx)
	// systemd kills a service that says it stops and then does not.
	if said := two.proc.notifications(); strings.Contains(said, "STOPPING") {
		t.Errorf("the join told systemd that ejabberd stops: %s", said)
	}
	l.refuses(ctx)
	l.crowd(ctx)

	t.Log("reboot of a member: nobody is asked")
	two.proc.kill()
	bring(two, nobody(t))
	l.whole(ctx)

	t.Log("node2 is installed anew and joins under its name")
	two.install()
	bring(two, joins("node1"))
	l.whole(ctx)

	t.Log("node1, the founder, is installed anew and joins under its name")
	one.install()
	bring(one, joins("node2"))
	l.whole(ctx)

	t.Log("power cut of node2 in the middle of its join")
	for i, after := range []time.Duration{50 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond} {
		two.install()
		if err := two.proc.Start(ctx); err != nil {
			t.Fatal(err)
		}
		cut, stop := context.WithTimeout(ctx, after)
		_, err := two.eval(cut, joinExpr("node1"))
		stop()
		two.proc.kill()
		t.Logf("cut %d: %v", i, err)
		bring(two, joins("node1"))
		l.whole(ctx)
	}

	t.Log("the agent is killed in the middle of the join, ejabberd goes on")
	two.install()
	if err := two.proc.Start(ctx); err != nil {
		t.Fatal(err)
	}
	cut, stop := context.WithCancel(ctx)
	defer stop()
	err := two.bring(cut, l.sec, func(ctx context.Context) (provision.Join, error) {
		time.AfterFunc(150*time.Millisecond, stop)
		return joins("node1")(ctx)
	}, quiet{t})
	if err == nil {
		t.Fatal("the join was over before it could be cut")
	}
	if st, err := two.status(ctx); err != nil || !st.joining {
		t.Errorf("the join does not go on without the agent: %+v, %v", st, err)
	}
	bring(two, nobody(t))
	l.whole(ctx)
}

// TestStuck: what stands still ends in a named failure.
func TestStuck(t *testing.T) {
	l := newLab(t, "node1", "node2")
	two := l.nodes[1]
	two.patience = 2 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := two.proc.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var f *provision.Failure
	if err := two.bring(ctx, l.sec, joins("node1"), quiet{t}); !errors.As(err, &f) || f.Code != "stack-join" || !strings.Contains(f.Message, "node1 does not answer") {
		t.Errorf("joining a node that is off: %v", err)
	}
	if st, err := two.status(ctx); err != nil || !st.up {
		t.Errorf("a join that could not begin left %+v, %v", st, err)
	}
	wait := func(context.Context) (provision.Join, error) {
		return provision.Join{Role: provision.RoleWait, Target: "node1"}, nil
	}
	if err := two.bring(ctx, l.sec, wait, quiet{t}); !errors.As(err, &f) || f.Code != "stack-wait" {
		t.Errorf("waiting for a founder that is off: %v", err)
	}
	if err := os.WriteFile(two.root+"/etc/ejabberd/ejabberd.yml", []byte("hosts: nonsense: [\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	two.proc.kill()
	if err := two.bring(ctx, l.sec, wait, quiet{t}); !errors.As(err, &f) || f.Code != "stack-start" {
		t.Errorf("an ejabberd that does not start: %v", err)
	}
}

// whole fails unless both nodes see both and a message passes each way.
func (l *lab) whole(ctx context.Context) {
	l.t.Helper()
	for _, n := range l.nodes {
		st, err := n.status(ctx)
		if err != nil {
			l.t.Fatal(err)
		}
		want := []string{"node1", "node2"}
		if !st.up || st.incomplete || !slices.Equal(st.known, want) || !slices.Equal(st.running, want) {
			l.t.Fatalf("%s sees %+v", n.name, st)
		}
	}
	for _, way := range [][2]int{{0, 1}, {1, 0}} {
		o := probe.Options{Domain: testDomain, CA: l.sec.CA,
			From: l.endpoint(way[0], 0), To: l.endpoint(way[1], 1)}
		took, err := l.probe(ctx, probe.Message, o)
		if err != nil {
			l.t.Fatal(err)
		}
		l.t.Logf("message from %s to %s in %s", o.From.Node, o.To.Node, took)
	}
}

// refuses: what must not get in does not.
func (l *lab) refuses(ctx context.Context) {
	l.t.Helper()
	good := probe.Options{Domain: testDomain, CA: l.sec.CA, From: l.endpoint(0, 0), To: l.endpoint(1, 1)}
	for want, change := range map[string]func(*probe.Options){
		"user probe-b at node node2 (10.99.0.2:5222): login":       func(o *probe.Options) { o.To.Account.Password = "wrong" },
		"user probe-b at node node2 (10.99.0.2:5222): TLS":         func(o *probe.Options) { o.CA = testSecrets(l.t).CA },
		"user probe-a at node node1 (10.99.0.1:5210): opening the": func(o *probe.Options) { o.From.Addr = netip.AddrPortFrom(l.nodes[0].addr, DistPort) },
		"user probe-a at node node1 (10.99.0.1:9): connecting":     func(o *probe.Options) { o.From.Addr = netip.AddrPortFrom(l.nodes[0].addr, 9) },
	} {
		o := good
		change(&o)
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		if _, err := l.probe(ctx, probe.Message, o); err == nil || !strings.Contains(err.Error(), want) {
			l.t.Errorf("want an error with %q, got %v", want, err)
		}
		cancel()
	}
	// Commands without the cookie.
	n := l.nodes[0]
	cmd := n.inside(ctx, "/usr/bin/erl_call", "-r", "-c", "GUESSEDCOOKIE", "-address", n.addr.String()+":5210", "-e")
	cmd.Stdin = strings.NewReader("init:stop().\n")
	if out, err := cmd.CombinedOutput(); err == nil {
		l.t.Errorf("a command with a wrong cookie was taken: %s", out)
	}
}

// crowd has many ask one member at the same time, as the agent, the order of
// units and a diagnosis may.
func (l *lab) crowd(ctx context.Context) {
	l.t.Helper()
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 10 {
				if _, err := l.nodes[0].eval(ctx, `"here".`); err != nil {
					l.t.Errorf("one of many: %v", err)
				}
			}
		})
	}
	all.Wait()
}

func (l *lab) endpoint(node, account int) probe.Endpoint {
	n := l.nodes[node]
	return probe.Endpoint{Node: n.name, Addr: netip.AddrPortFrom(n.addr, ClientPort), Account: l.sec.Probes[account]}
}

// probing is a probe that this program carries out when it is run again.
type probing struct {
	Kind    probe.Kind
	Options probe.Options
	Took    time.Duration
	Failure *provision.Failure
}

// probe runs a probe where the disc host would be: this program again, in the
// namespace of the bridge.
func (l *lab) probe(ctx context.Context, kind probe.Kind, o probe.Options) (time.Duration, error) {
	in, err := json.Marshal(probing{Kind: kind, Options: o})
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, "nsenter", "--net=/run/netns/"+l.bed, os.Args[0])
	cmd.Env = append(os.Environ(), "PLATTER_TEST_PROBE=1")
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	var p probing
	if err = errors.Join(err, json.Unmarshal(out, &p)); err != nil {
		return 0, err
	}
	if p.Failure != nil {
		return 0, p.Failure
	}
	return p.Took, nil
}

func TestMain(m *testing.M) {
	if dir := os.Getenv("PLATTER_TEST_DISCHOST"); dir != "" {
		panic(serveDiscHost(dir, os.Stdin))
	}
	if os.Getenv("PLATTER_TEST_LOAD") != "" {
		runLoad()
		return
	}
	if os.Getenv("PLATTER_TEST_PROBE") == "" {
		os.Exit(m.Run())
	}
	var p probing
	if err := json.NewDecoder(os.Stdin).Decode(&p); err != nil {
		panic(err)
	}
	var err error
	if p.Took, err = probe.Run(context.Background(), p.Kind, p.Options); err != nil && !errors.As(err, &p.Failure) {
		panic(err)
	}
	json.NewEncoder(os.Stdout).Encode(p)
}
