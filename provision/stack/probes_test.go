//go:build slow

package stack

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/stack/probe"
)

// TestProbes: on a real cluster of two every probe passes, leaves nothing
// behind, and says what is wrong where something is.
func TestProbes(t *testing.T) {
	l := newLab(t, "node1", "node2")
	one, two := l.nodes[0], l.nodes[1]
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	bring := func(n *testNode, part asker) {
		t.Helper()
		if err := n.bring(ctx, l.sec, part, quiet{t}); err != nil {
			t.Fatalf("%s: %v\n%s", n.name, err, n.proc.out.String())
		}
	}
	bring(one, form)
	bring(two, joins("node1"))
	between := func(from, to int) probe.Options {
		return probe.Options{Domain: testDomain, CA: l.sec.CA, From: l.endpoint(from, 0), To: l.endpoint(to, 1)}
	}
	all := func(from, to int) {
		t.Helper()
		for _, kind := range probe.Kinds {
			took, err := l.probe(ctx, kind, between(from, to))
			if err != nil {
				t.Errorf("%s from node%d to node%d: %v", kind, from+1, to+1, err)
				continue
			}
			t.Logf("%s from node%d to node%d: %s", kind, from+1, to+1, took)
		}
	}
	for range 2 {
		all(0, 1)
		all(1, 0)
	}
	all(0, 0) // a rack of one
	l.clean(ctx)
	l.foreignClient(ctx)

	fails := func(kind probe.Kind, o probe.Options, code, says string) {
		t.Helper()
		var f *provision.Failure
		began := time.Now()
		_, err := l.probe(ctx, kind, o)
		if !errors.As(err, &f) || f.Code != code || !strings.Contains(f.Message, says) || f.Next == "" {
			t.Errorf("%s: want %s with %q, got %v", kind, code, says, err)
			return
		}
		t.Logf("%s fails after %s: %s: %v", kind, time.Since(began).Round(time.Millisecond), f.Code, f)
		for _, a := range l.sec.Probes {
			if strings.Contains(f.Error(), a.Password) {
				t.Errorf("the failure tells a password: %v", f)
			}
		}
	}
	for _, c := range []struct {
		module string
		kind   probe.Kind
		says   string
	}{
		{"mod_offline", probe.Offline, "node node1 does not keep a message for probe-b"},
		{"mod_muc", probe.GroupChat, "node node1 offers no service http://jabber.org/protocol/muc"},
		{"mod_mam", probe.Archive, "user probe-a at node node2: asking the archive"},
		{"mod_http_upload", probe.Upload, "node node1 offers no service urn:xmpp:http:upload:0"},
	} {
		t.Logf("a cluster without %s", c.module)
		l.everywhere(ctx, fmt.Sprintf(`gen_mod:stop_module(<<"%s">>, %s), "ok".`, testDomain, c.module))
		fails(c.kind, between(0, 1), "probe-"+string(c.kind), c.says)
		l.everywhere(ctx, fmt.Sprintf(`gen_mod:start_module(<<"%s">>, %s), "ok".`, testDomain, c.module))
	}

	certificate := func(sec provision.StackSecrets) {
		t.Helper()
		if err := os.WriteFile(two.root+"/etc/ejabberd/platter.pem", []byte(sec.Cert+sec.Key), 0o640); err != nil {
			t.Fatal(err)
		}
		if err := two.proc.Restart(ctx); err != nil {
			t.Fatal(err)
		}
	}
	t.Log("node2 with a certificate that does not name its address")
	certificate(secretsOf(t, l.site, l.nodes[0].plan))
	if _, err := l.probe(ctx, probe.Login, between(1, 0)); err != nil {
		t.Error(err)
	}
	fails(probe.Upload, between(1, 0), "probe-upload", "node node2: PUT of a file over HTTPS: tls: failed to verify certificate")
	t.Log("node2 with a certificate of another site")
	certificate(secretsOf(t, openSite(t), l.nodes[1].plan))
	for _, kind := range probe.Kinds {
		fails(kind, between(1, 0), "probe-tls", "at node node2 (10.99.0.2:5222): TLS: tls: failed to verify certificate")
	}
	t.Log("node2 without ejabberd")
	two.proc.kill()
	for _, kind := range probe.Kinds[1:5] {
		fails(kind, between(0, 1), "probe-connect", "at node node2 (10.99.0.2:5222): connecting")
	}
	fails(probe.Login, between(1, 0), "probe-connect", "at node node2")
}

// everywhere evaluates expr on every node.
func (l *lab) everywhere(ctx context.Context, expr string) {
	l.t.Helper()
	for _, n := range l.nodes {
		if got, err := n.quick(ctx, expr); err != nil || got != "ok" {
			l.t.Fatalf("%s: %q, %v", n.name, got, err)
		}
	}
}

// clean fails unless probes have left nothing but what the nodes take away.
func (l *lab) clean(ctx context.Context) {
	l.t.Helper()
	count := func(want string) {
		l.t.Helper()
		expr := fmt.Sprintf(`
		Count = fun(U) -> length(mnesia:dirty_read(archive_msg, {U, <<"%[1]s">>})) end,
		lists:flatten(io_lib:format("rooms ~b waiting ~b archived ~b ~b", [
			length(mod_muc:get_online_rooms(<<"conference.%[1]s">>)),
			mnesia:table_info(offline_msg, size), Count(<<"probe-a">>), Count(<<"probe-b">>)])).`, testDomain)
		for _, n := range l.nodes {
			if got, err := n.quick(ctx, expr); err != nil || got != want {
				l.t.Errorf("left on %s: %q, want %q; %v", n.name, got, want, err)
			}
		}
	}
	files := func(want int) {
		l.t.Helper()
		for _, n := range l.nodes {
			found, err := filepath.Glob(n.root + "/" + spool + "/upload/*/*/*")
			if err != nil || len(found) != want {
				l.t.Errorf("files on %s: %v, want %d; %v", n.name, found, want, err)
			}
		}
	}
	count("rooms 0 waiting 0 archived 5 5")
	files(2) // the next probe's replaces the older one
	for _, n := range l.nodes {
		if err := n.accounts(ctx, l.sec); err != nil {
			l.t.Error(err)
		}
	}
	count("rooms 0 waiting 0 archived 0 0")
	files(0)
}

// foreignClient: users of a client that nobody here wrote reach each other
// across nodes, with the site's CA as the only one that it trusts.
func (l *lab) foreignClient(ctx context.Context) {
	l.t.Helper()
	users := []provision.Account{{User: "alice", Password: rand.Text()}, {User: "bob", Password: rand.Text()}}
	ca := filepath.Join(l.dir, "ca.pem")
	if err := os.WriteFile(ca, []byte(l.sec.CA), 0o644); err != nil {
		l.t.Fatal(err)
	}
	client := func(ctx context.Context, user int, args ...string) *exec.Cmd {
		u, n := users[user], l.nodes[user]
		conf := filepath.Join(l.dir, u.User+".conf")
		text := fmt.Sprintf("username: %s@%s\njserver: %s:%d\npassword: %s\n", u.User, testDomain, n.addr, ClientPort, u.Password)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			l.t.Fatal(err)
		}
		cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + l.bed, "go-sendxmpp", "-f", conf}, args...)...)
		cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+ca, "SSL_CERT_DIR=/nonexistent", "HOME="+l.dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd
	}
	for _, u := range users {
		if got, err := l.nodes[0].quick(ctx, accountExpr(u.User, testDomain, u.Password)); err != nil || got != "ok" {
			l.t.Fatalf("account %s: %q, %v", u.User, got, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	listen := client(ctx, 1, "-l")
	heard, err := listen.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	var complaints strings.Builder
	listen.Stderr = &complaints
	if err := listen.Start(); err != nil {
		l.t.Fatal(err)
	}
	defer listen.Wait()
	defer cancel()
	// Should it not have logged in yet, the message waits for it.
	text, began := rand.Text(), time.Now()
	send := client(ctx, 0, "bob@"+testDomain)
	send.Stdin = strings.NewReader(text)
	if out, err := send.CombinedOutput(); err != nil {
		l.t.Fatalf("go-sendxmpp on node1: %v\n%s", err, out)
	}
	for in := bufio.NewScanner(heard); in.Scan(); {
		if strings.Contains(in.Text(), text) {
			l.t.Logf("go-sendxmpp on node2 heard %q after %s", in.Text(), time.Since(began).Round(time.Millisecond))
			return
		}
	}
	l.t.Errorf("go-sendxmpp on node2 did not hear from the one on node1: %v\n%s", ctx.Err(), complaints.String())
}
