//go:build slow

package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/stack/load"
)

// TestLoad: simulated users on a real cluster of two. Nothing is lost; when a
// node is killed its users go on at the other one, and the report says so;
// nothing of them is left behind.
func TestLoad(t *testing.T) {
	l := newLab(t, "node1", "node2")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for i, n := range l.nodes {
		if err := n.bring(ctx, l.sec, []asker{form, joins("node1")}[i], quiet{t}); err != nil {
			t.Fatalf("%s: %v\n%s", n.name, err, n.proc.out.String())
		}
	}
	one, two := l.nodes[0], l.nodes[1]
	const users = 100
	accounts := provision.LoadAccounts(users, []byte("secret of the test"))
	l.loadAccounts(ctx, accounts)

	o := load.Options{Domain: testDomain, CA: l.sec.CA, Accounts: accounts, Every: 2 * time.Second, For: 20 * time.Second}
	for _, n := range l.nodes {
		o.Nodes = append(o.Nodes, load.Node{Name: n.name, Addr: netip.AddrPortFrom(n.addr, ClientPort)})
	}
	t.Log("all is well")
	r := l.load(ctx, o, nil)
	if wrong := r.Judge(load.Limits{P99: 5 * time.Second}); len(wrong) != 0 {
		t.Errorf("%q", wrong)
	}
	if r.Sent != users*10 || r.Nodes[0].End != users/2 || r.Nodes[1].End != users/2 || r.Latency.Count != r.Sent || r.Latency.P50 <= 0 {
		t.Errorf("%+v", r)
	}
	if r.MemoryPerUser > 200<<10 {
		t.Errorf("a user takes %d KiB", r.MemoryPerUser>>10)
	}
	for _, n := range l.nodes {
		if got := l.left(ctx, n); got != "users 100 sessions 0 archived 0 waiting 0" {
			t.Errorf("%s after the run: %s", n.name, got)
		}
	}

	t.Log("node2 is killed in the middle")
	killed := false
	r = l.load(ctx, o, func(p load.Progress, _ *os.Process) {
		if p.Phase == load.Sending && p.Sent > 3*users && !killed {
			killed = true
			two.proc.kill()
		}
	})
	if !killed || r.LoggedIn != users || r.Reconnects < users/2 || r.Nodes[0].End != users || r.Nodes[1].End != 0 {
		t.Errorf("killed: %v; %+v", killed, r)
	}
	if len(r.Broken) == 0 || r.Broken[0].Node != "node2" {
		t.Errorf("broken: %+v", r.Broken)
	}
	if wrong := fmt.Sprint(r.Judge(load.Limits{})); !strings.Contains(wrong, "node2: ") || !strings.Contains(wrong, "sessions broke") {
		t.Errorf("%s", wrong)
	}
	if r.Delivered < 6*users {
		t.Errorf("only %d messages were delivered", r.Delivered)
	}
	if err := two.bring(ctx, l.sec, nobody(t), quiet{t}); err != nil {
		t.Fatal(err)
	}

	t.Log("a wrong password, and Ctrl-C")
	o.Accounts = slices.Clone(accounts)
	o.Accounts[0].Password = "wrong"
	r = l.load(ctx, o, func(p load.Progress, run *os.Process) {
		if p.Phase == load.Sending && p.Delivered > 0 {
			run.Signal(os.Interrupt)
		}
	})
	if !r.Interrupted || r.LoggedIn != users-1 || r.Delivered == 0 || r.Nodes[0].End+r.Nodes[1].End != users-1 ||
		len(r.Refused) != 2 || !strings.HasPrefix(r.Refused[0].Reason, "login: ") {
		t.Errorf("%+v", r)
	}
	for _, n := range l.nodes {
		if got := l.left(ctx, n); got != "users 100 sessions 0 archived 0 waiting 0" {
			t.Errorf("%s after the run: %s", n.name, got)
		}
	}

	t.Log("accounts")
	if got, err := one.quick(ctx, accountExpr("platter-load-x1", testDomain, "a person's")); err != nil || got != "ok" {
		t.Fatal(got, err)
	}
	l.loadAccounts(ctx, provision.LoadAccounts(users+1, []byte("another secret"))) // others' passwords
	cut, stop := context.WithCancel(ctx)
	if err := two.loadAccounts(cut, accounts, func(n, of int) { stop() }); !errors.Is(err, context.Canceled) {
		t.Errorf("an end in the middle: %v", err)
	}
	if n, err := two.removeLoadAccounts(ctx); err != nil || n != users+1 {
		t.Errorf("%d accounts removed, %v", n, err)
	}
	for _, n := range l.nodes {
		if got := l.left(ctx, n); got != "users 1 sessions 0 archived 0 waiting 0" {
			t.Errorf("%s in the end: %s", n.name, got)
		}
	}
	for _, n := range l.nodes { // in any table of the database, but for what is the person's
		got, err := n.quick(ctx, fmt.Sprintf(`
			Of = fun(R, Name) -> binary:match(term_to_binary(R), Name) =/= nomatch end,
			lists:flatten(io_lib:format("~0p", [[T || T <- mnesia:system_info(tables) -- [schema],
				R <- mnesia:dirty_match_object(T, mnesia:table_info(T, wild_pattern)), Of(R, %s), not Of(R, <<"platter-load-x1">>)]])).`,
			binary(provision.LoadPrefix)))
		if err != nil || got != "[]" {
			t.Errorf("left on %s: %s, %v", n.name, got, err)
		}
	}
	if n, err := one.removeLoadAccounts(ctx); err != nil || n != 0 {
		t.Errorf("%d accounts removed once more, %v", n, err)
	}
	if err := one.loadAccounts(ctx, []provision.Account{{User: "alice", Password: "x"}}, nil); err == nil {
		t.Error("a person's password may be set")
	}
}

// loadAccounts makes the accounts and once more looks that they are there.
func (l *lab) loadAccounts(ctx context.Context, accounts []provision.Account) {
	l.t.Helper()
	for _, n := range l.nodes {
		began, last := time.Now(), 0
		if err := n.loadAccounts(ctx, accounts, func(n, of int) { last = n }); err != nil || last != len(accounts) {
			l.t.Fatalf("%d of %d accounts: %v", last, len(accounts), err)
		}
		l.t.Logf("%d accounts on %s after %s", last, n.name, time.Since(began).Round(time.Millisecond))
	}
}

// left tells what is there of simulated users.
func (l *lab) left(ctx context.Context, n *testNode) string {
	l.t.Helper()
	got, err := n.quick(ctx, fmt.Sprintf(`
		Mine = fun(U) -> binary:match(U, %s) =/= nomatch end,
		lists:flatten(io_lib:format("users ~b sessions ~b archived ~b waiting ~b", [
			length([U || {U, _} <- ejabberd_auth:get_users(<<"%s">>), Mine(U)]),
			length([U || {U, _, _} <- ejabberd_sm:dirty_get_sessions_list(), Mine(U)]),
			length([K || {U, _} = K <- mnesia:dirty_all_keys(archive_msg), Mine(U)]),
			mnesia:table_info(offline_msg, size)])).`, binary(provision.LoadPrefix), testDomain))
	if err != nil {
		l.t.Fatal(err)
	}
	return got
}

// load carries out a run where the disc host would be: this program again, in
// the namespace of the bridge.
func (l *lab) load(ctx context.Context, o load.Options, progress func(load.Progress, *os.Process)) load.Report {
	l.t.Helper()
	in, err := json.Marshal(o)
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, "nsenter", "--net=/run/netns/"+l.bed, os.Args[0])
	cmd.Env = append(os.Environ(), "PLATTER_TEST_LOAD=1")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	var r load.Report
	for d := json.NewDecoder(out); ; {
		var said loadSaid
		if err := d.Decode(&said); err != nil {
			break
		}
		if said.Report != nil {
			r = *said.Report
		} else if progress != nil {
			progress(said.Progress, cmd.Process)
		}
	}
	if err := cmd.Wait(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Logf("\n%s", r)
	return r
}

// loadSaid is what runLoad writes.
type loadSaid struct {
	Progress load.Progress
	Report   *load.Report
}

// runLoad is what the program that load starts does.
func runLoad() {
	var o load.Options
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	out := json.NewEncoder(os.Stdout)
	r, err := load.Run(ctx, o, func(p load.Progress) { out.Encode(loadSaid{Progress: p}) })
	if err != nil && ctx.Err() == nil {
		panic(err)
	}
	out.Encode(loadSaid{Report: &r})
}
