//go:build e2e

package vmtest_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"platter/provision"
)

// amqpClient is what the test binary does under this name, in the lab's network.
const amqpClient = "amqp-client"

func init() {
	if len(os.Args) > 2 && os.Args[1] == amqpClient {
		if err := amqpDo(os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// amqpDo says a message to a queue and waits until the broker has it, or, where
// text is empty, prints all that wait.
func amqpDo(addr, ca, queue, text string) error {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conn, err := amqp.DialTLS("amqps://admin:"+os.Getenv("PASSWORD")+"@"+addr+":5671/", &tls.Config{RootCAs: roots})
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if _, err := ch.QueueDeclare(queue, true, false, false, false, nil); err != nil {
		return err
	}
	if text != "" {
		if err := ch.Confirm(false); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		c, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", queue, true, false, amqp.Publishing{DeliveryMode: amqp.Persistent, Body: []byte(text)})
		if err != nil {
			return err
		}
		if ok, err := c.WaitContext(ctx); err != nil || !ok {
			return errors.Join(err, errors.New("the broker does not confirm the message"))
		}
		return nil
	}
	for {
		m, ok, err := ch.Get(queue, false)
		if err != nil || !ok {
			return err
		}
		fmt.Println(string(m.Body))
	}
}

// amqp speaks to b's broker from b's own network.
func (b *box) amqp(queue, text string) string {
	b.r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		b.r.t.Fatal(err)
	}
	cmd := exec.Command("nsenter", "--net=/run/netns/"+b.ns, self, amqpClient, b.addr,
		filepath.Join(b.dir, "root/etc/rabbitmq/platter-ca.pem"), queue, text)
	cmd.Env = append(os.Environ(), "PASSWORD="+b.sh("sed -n 's/^default_pass = //p' /etc/rabbitmq/rabbitmq.conf"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		b.r.t.Fatalf("queue %s at %s: %v\n%s", queue, b.name, err, out)
	}
	return strings.TrimSpace(string(out))
}

// readyAgain tells whether these nodes were seen not to be ready, and then are.
func readyAgain(nodes ...string) func(map[string]provision.State) bool {
	down := map[string]bool{}
	return func(states map[string]provision.State) bool {
		all := true
		for _, n := range nodes {
			down[n] = down[n] || states[n].Stage != provision.StageReady
			all = all && down[n] && states[n].Stage == provision.StageReady
		}
		return all
	}
}

// until runs a script in the box until it succeeds.
func (b *box) until(what, script string) string {
	b.r.t.Helper()
	for began := time.Now(); ; {
		out, err := b.try(script)
		if err == nil {
			return out
		}
		if time.Since(began) > 2*time.Minute {
			b.r.t.Fatalf("on %s: %s does not happen: %v\n%s", b.name, what, err, out)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// TestStackLifeRabbitMQ: the message queue keeps what it has confirmed, and
// its cluster, whatever happens to the nodes.
func TestStackLifeRabbitMQ(t *testing.T) {
	r, boxes := boxRack(t, 3, "rabbitmq")
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady, "node1", "node2", "node3") // a start that fails is tried again
	whole := "rabbitmqctl eval 'lists:sort(rabbit_nodes:list_running()).' | grep -Fx '[rabbit@node1,rabbit@node2,rabbit@node3]'"
	boxes[0].sh(whole)

	// Issue 3: a firewall forgets connections on which nothing moves.
	timer := boxes[1].sh(`sleep 6 | openssl s_client -quiet -no_ign_eof -connect $(hostname):5671 -CAfile /etc/rabbitmq/platter-ca.pem >/dev/null 2>&1 &
		for i in $(seq 50); do ss -Htno state established sport = :5671 | grep . && exit; sleep 0.1; done; exit 1`)
	if !strings.Contains(timer, "timer:(keepalive,") {
		t.Errorf("a connection to the message queue has no keepalive: %s", timer)
	}
	if out, _ := boxes[1].try("ss -Hltn | grep -E ':(5672|15672) '"); out != "" {
		t.Errorf("RabbitMQ listens without TLS: %s", out)
	}
	if out := boxes[1].sh("rabbitmqctl -q list_users --no-table-headers"); out != "admin\t[administrator]" {
		t.Errorf("users: %q", out)
	}

	boxes[0].amqp("tasks", "kept")
	if out := boxes[0].sh("rabbitmqctl -q list_queues --local --no-table-headers name type"); !strings.Contains(out, "tasks\tquorum") {
		t.Errorf("queues: %q", out)
	}

	t.Log("power cut of the whole rack; they come back in another order")
	for _, b := range boxes {
		b.off()
	}
	for _, i := range []int{1, 2, 0} {
		boxes[i].on()
	}
	r.await("all are ready again", readyAgain("node1", "node2", "node3"), "node1", "node2", "node3")
	if got := boxes[2].amqp("tasks", ""); got != "kept" {
		t.Errorf("after the power cut the queue holds %q", got)
	}

	t.Log("node2 is installed anew")
	r.node("reinstall", "node2")
	boxes[1].off()
	boxes[1].install()
	boxes[1].on()
	r.await("node2 is ready again", readyAgain("node2"), "node2")
	boxes[1].sh(whole)
	if got := boxes[1].amqp("tasks", ""); got != "kept" {
		t.Errorf("after a reinstall of a member the queue holds %q", got)
	}
	boxes[1].until("a copy of the queue on node2", "rabbitmq-queues -q quorum_status tasks | grep -q rabbit@node2")
}

// sql asks the database by the way that ejabberd takes.
func (b *box) sql(query string) string {
	b.r.t.Helper()
	return b.sh(`PGPASSWORD=$(sed -n 's/^sql_password: "\(.*\)"/\1/p' /etc/ejabberd/ejabberd.yml) psql -h 127.0.0.1 -p 5000 -U ejabberd -d ejabberd -Atc "` + query + `"`)
}

// TestStackLife: a backup brings everything back, also when the power fails
// meanwhile, and a dead node is removed.
func TestStackLife(t *testing.T) {
	r, boxes := boxRack(t, 3)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady, "node1", "node2", "node3") // a start that fails is tried again

	const folder = "/var/lib/ejabberd/upload/1234/5678"
	erl := func(expr string) string {
		return boxes[0].sh(`su ejabberd -s /bin/sh -c 'HOME=/var/lib/ejabberd erl_call -h test$$ -address ` + boxes[0].addr + `:5210 -e' <<'EOF'
` + expr + `
EOF`)
	}
	erl(`ok = ejabberd_auth:try_register(<<"alice">>, <<"im.e2e.example">>, <<"secret">>),
		ejabberd_router:route(xmpp:decode(fxml_stream:parse_element(<<"<message xmlns='jabber:client' from='bob@im.e2e.example/x' to='alice@im.e2e.example' type='chat'><body>kept</body></message>">>))).`)
	boxes[1].sh("install -d -o ejabberd -g ejabberd " + folder + " && head -c 3000000 /dev/urandom > " + folder + "/picture.png && chown ejabberd: " + folder + "/picture.png")
	hash := boxes[1].sh("sha256sum < " + folder + "/picture.png")
	there := func() string {
		return boxes[0].sql("SELECT (SELECT count(*) FROM users WHERE username = 'alice'), (SELECT count(*) FROM spool WHERE username = 'alice')")
	}
	if got := there(); got != "1|1" {
		t.Fatalf("before the backup the database has %s", got)
	}
	lose := func() {
		t.Helper()
		erl(`ejabberd_auth:remove_user(<<"alice">>, <<"im.e2e.example">>).`)
		boxes[1].sh("rm -rf " + folder)
		if got := there(); got != "0|0" {
			t.Fatalf("after everything was removed the database has %s", got)
		}
	}
	back := func() {
		t.Helper()
		if got := there(); got != "1|1" {
			t.Errorf("after the restore the database has %s", got)
		}
		if got, err := boxes[1].try("sha256sum < " + folder + "/picture.png"); got != hash {
			t.Errorf("after the restore the file is %s instead of %s (%v)", got, hash, err)
		}
		if got := erl(`lists:flatten(io_lib:format("~p", [ejabberd_auth:check_password(<<"alice">>, <<>>, <<"im.e2e.example">>, <<"secret">>)])).`); !strings.Contains(got, "true") {
			t.Errorf("after the restore ejabberd says of alice: %s", got)
		}
	}

	file := filepath.Join(r.dir, "backup")
	t.Log(r.stack("backup", file))
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o600 {
		t.Errorf("the backup: %v, %v", st.Mode(), err)
	}
	restore := func(file string, args ...string) (string, error) {
		out, err := exec.Command(r.bin(), append([]string{"stack", "--socket", r.dir + "/socket", "restore", file}, args...)...).CombinedOutput()
		return string(out), err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-len(b)/3] ^= 1
	if err := os.WriteFile(file+"-damaged", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := restore(file+"-damaged", "--yes"); err == nil || !strings.Contains(out, "node2/uploads is damaged") {
		t.Errorf("a damaged backup: %v\n%s", err, out)
	}
	if out, err := restore(file); err == nil || !strings.Contains(out, "--yes") {
		t.Errorf("without --yes: %v\n%s", err, out)
	}

	lose()
	out, err := restore(file, "--yes")
	if err != nil {
		t.Fatalf("restore: %v\n%s", err, out)
	}
	t.Log(out)
	back()

	t.Log("the power of the primary fails during a restore")
	lose()
	first := boxes[0]
	for _, b := range boxes {
		if b.sh("su postgres -c \"psql -Atc 'SELECT pg_is_in_recovery()'\"") == "f" {
			first = b
		}
	}
	cmd := exec.Command(r.bin(), "stack", "--socket", r.dir+"/socket", "restore", file, "--yes")
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cut := false
	for lines := bufio.NewScanner(said); lines.Scan(); {
		t.Log(lines.Text())
		if !cut && strings.Contains(lines.Text(), "waiting for the new data") {
			cut = true
			first.off()
			first.on()
		}
	}
	restored := cmd.Wait()
	if !cut {
		t.Fatal("the restore never waited for the new data")
	}
	r.await("all orders have ended", func(map[string]provision.State) bool {
		orders, err := r.op.Orders(context.Background(), "")
		return err == nil && !slices.ContainsFunc(orders, func(o provision.OrderStatus) bool { return !o.State.Final() })
	}, "node1", "node2", "node3")
	r.wellAgain("node1,node2,node3")
	if restored != nil {
		// The old data or the new; and the same command again ends it.
		_, err := boxes[1].try("test -e " + folder)
		if got := there(); got != "1|1" && got != "0|0" || (got == "1|1") != (err == nil) {
			t.Errorf("after %v the database has %s, and of the file: %v", restored, got, err)
		}
		if out, err := restore(file, "--yes"); err != nil {
			t.Fatalf("restore, again: %v\n%s", err, out)
		}
	}
	back()
	r.stack("probe")

	t.Log("node3 dies for good")
	remove := func() (string, error) {
		out, err := exec.Command(r.bin(), "stack", "--socket", r.dir+"/socket", "remove", "node3").CombinedOutput()
		return string(out), err
	}
	if out, err := remove(); err == nil || !strings.Contains(out, "node3 is not gone") {
		t.Errorf("a living node was removed: %v\n%s", err, out)
	}
	boxes[2].off()
	boxes[2].cable("down") // of a box the network outlives the power
	r.write("rack.yaml", strings.Replace(r.read("rack.yaml"), "  - {name: node3,", "  #- {name: node3,", 1))
	r.stopServe(syscall.SIGTERM)
	r.startServe()
	// Since its start the disc host has to hear from both that are left.
	heard := time.Now()
	r.await("the others have been heard", func(s map[string]provision.State) bool {
		return s["node1"].LastSeen.After(heard) && s["node2"].LastSeen.After(heard)
	})
	if out, err := remove(); err != nil || !strings.Contains(out, "removed from the clusters of ejabberd, etcd") {
		t.Errorf("remove: %v\n%s", err, out)
	}
	for began := time.Now(); ; time.Sleep(time.Second) {
		out, err := exec.Command(r.bin(), "stack", "--socket", r.dir+"/socket", "status").CombinedOutput()
		if err == nil {
			break
		}
		if time.Since(began) > 90*time.Second {
			t.Fatalf("the cluster is not whole without node3:\n%s", out)
		}
	}
	r.stack("probe")
}
