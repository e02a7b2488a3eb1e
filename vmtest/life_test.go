//go:build e2e

package vmtest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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
	b.r.t.Setenv("PASSWORD", b.sh("sed -n 's/^default_pass = //p' /etc/rabbitmq/rabbitmq.conf"))
	return strings.TrimSpace(b.r.run("nsenter", "--net=/run/netns/"+b.ns, self, amqpClient, b.addr,
		filepath.Join(b.dir, "root/etc/rabbitmq/platter-ca.pem"), queue, text))
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
	r.await("all are ready", allReady)
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
	r.await("all are ready again", readyAgain("node1", "node2", "node3"))
	if got := boxes[2].amqp("tasks", ""); got != "kept" {
		t.Errorf("after the power cut the queue holds %q", got)
	}

	t.Log("node2 is installed anew")
	r.node("reinstall", "node2")
	boxes[1].off()
	boxes[1].install()
	boxes[1].on()
	r.await("node2 is ready again", readyAgain("node2"))
	boxes[1].sh(whole)
	if got := boxes[1].amqp("tasks", ""); got != "kept" {
		t.Errorf("after a reinstall of a member the queue holds %q", got)
	}
	boxes[1].until("a copy of the queue on node2", "rabbitmq-queues -q quorum_status tasks | grep -q rabbit@node2")
}
