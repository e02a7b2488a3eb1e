//go:build bench

package vmtest_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"platter/provision"
	"platter/provision/stack"
	"platter/provision/stack/probe"
)

// TestBenchLoad: as many users as the rack file states write to each other on
// three nodes; the acceptance judges what became of their messages, and whether
// the limits that the service was to get are in effect.
func TestBenchLoad(t *testing.T) {
	r, boxes := loneRack(t, "../build/store", 3, ", users: 1000, undersized: true")
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady)
	_, report := r.accept(0, "--for", "60s", "--no-failure")
	fmt.Println(summary(report))
	if report.Load.Users != 1000 {
		t.Errorf("%d users", report.Load.Users)
	}
}

// TestBenchStack is the time from a running system to the first message, on
// one, two and three nodes, beside the same by hand: the same boxes with the same
// packages and configuration files, their agents taken away, and somebody who
// knows what he does starts one component after the other, on all nodes at
// once, and the next one as soon as that one serves.
func TestBenchStack(t *testing.T) {
	const aim = 1.5
	steps := []string{"etcd", "postgresql", "database", "ejabberd", "web", "message"}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nnodes\t\tall s\t%s\t\n", strings.Join(steps, " s\t")+" s")
	for n := 1; n <= 3; n++ {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			r, boxes := loneRack(t, "../build/store", n, "")
			for _, b := range boxes {
				r.run("cp", "-a", b.dir+"/up", b.dir+"/fresh")
			}
			ours := r.timeStack(boxes)
			for _, b := range boxes {
				b.withoutAgent()
			}
			hand := r.timeByHand(boxes)
			row := func(what string, took map[string]time.Duration) {
				fmt.Fprintf(w, "%d\t%s\t%.1f", n, what, took["all"].Seconds())
				for _, s := range steps {
					fmt.Fprintf(w, "\t%.1f", took[s].Seconds())
				}
				fmt.Fprintln(w, "\t")
			}
			row("platter", ours)
			row("by hand", hand)
			ratio := ours["all"].Seconds() / hand["all"].Seconds()
			fmt.Fprintf(w, "\tratio\t%.2f\t\n", ratio)
			t.Logf("%d nodes: %s, by hand %s, ratio %.2f", n, ours["all"].Round(100*time.Millisecond), hand["all"].Round(100*time.Millisecond), ratio)
			if ratio > aim {
				t.Errorf("%d nodes: %.2f times as long as by hand; the aim is at most %.1f", n, ratio, aim)
			}
		})
	}
	w.Flush()
	fmt.Println()
}

// timeStack powers the boxes on and returns how long it takes from the moment
// that people could log in on all of them: until messages have gone between all
// nodes, and where the slowest node spent it.
func (r *rig) timeStack(boxes []*box) map[string]time.Duration {
	r.t.Helper()
	for _, b := range boxes {
		b.on()
	}
	took := map[string]time.Duration{}
	for _, s := range r.await("all are ready", allReady) {
		for k, v := range s.Facts {
			if name, ok := strings.CutSuffix(k, "_ms"); ok {
				if n, err := strconv.Atoi(v); err == nil {
					took[name] = max(took[name], time.Duration(n)*time.Millisecond)
				}
			}
		}
	}
	var up, member, ready time.Time
	for _, b := range boxes {
		up = latest(up, b.loginTime())
		for _, e := range r.events(b.name) {
			switch {
			case e.Kind == provision.EventProbe:
				ready = latest(ready, e.Time)
			case e.Kind == provision.EventReport && e.Report != nil && e.Report.Stage == provision.StageProbing:
				member = latest(member, e.Time)
			}
		}
	}
	took["all"], took["message"] = ready.Sub(up), ready.Sub(member)
	return took
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// loginTime is when the box's ssh server had started.
func (b *box) loginTime() time.Time {
	b.r.t.Helper()
	at, err := time.Parse("Mon 2006-01-02 15:04:05.000000 MST", b.sh("TZ=UTC systemctl show --timestamp=us+utc -P ActiveEnterTimestamp ssh.service"))
	if err != nil {
		b.r.t.Fatal(err)
	}
	return at
}

// withoutAgent makes the box what it was after its install, and what Platter
// would do on it is left to others: its agent is gone, and nothing of the stack
// starts at boot or waits for the agent.
func (b *box) withoutAgent() {
	b.r.t.Helper()
	b.off()
	b.unmount()
	b.r.run("rm", "-rf", b.dir+"/up", b.dir+"/work")
	b.r.run("mv", b.dir+"/fresh", b.dir+"/up")
	b.r.run("mkdir", b.dir+"/work")
	b.r.run("sh", "-c", `cd "$1"/etc/systemd/system && rm -r multi-user.target.wants/platter-agent.service $(find . -name platter-order.conf)
for u in etcd.service patroni.service haproxy.service ejabberd.service epmd.socket nginx.service; do find . -path "*.wants/$u" -delete; done`, "sh", b.dir+"/up")
	b.r.run("mount", "-t", "overlay", "overlay", "-o", fmt.Sprintf("lowerdir=%s,upperdir=%s/up,workdir=%s/work", b.image, b.dir, b.dir), b.dir+"/root")
}

// timeByHand powers the boxes on and, when they have done with booting, starts
// the stack with what comes in the packages.
func (r *rig) timeByHand(boxes []*box) map[string]time.Duration {
	r.t.Helper()
	for _, b := range boxes {
		b.on()
	}
	for _, b := range boxes {
		for out := ""; out != "running" && out != "degraded"; out, _ = b.try("systemctl is-system-running --wait") {
			time.Sleep(100 * time.Millisecond) // there is nothing to ask yet
		}
	}
	var voters []string
	for i, b := range boxes {
		if i == 0 || len(boxes) == 3 { // two of them stand no failure more than one
			voters = append(voters, b.name+"=https://"+b.addr+":2380")
		}
	}
	sec, err := stack.Secrets(boxes[0].dir + "/root")
	if err != nil {
		r.t.Fatal(err)
	}
	all := func(boxes []*box, script string) {
		r.t.Helper()
		var wg sync.WaitGroup
		errs := make([]error, len(boxes))
		for i, b := range boxes {
			wg.Go(func() {
				if out, err := b.try("set -e\n" + script); err != nil {
					errs[i] = fmt.Errorf("by hand on %s: %w\n%s", b.name, err, out)
				}
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			r.t.Fatal(err)
		}
	}
	took := map[string]time.Duration{}
	began := time.Now()
	step := func(name string, do func()) {
		r.t.Helper()
		began := time.Now()
		do()
		took[name] = time.Since(began)
	}
	step("etcd", func() {
		all(boxes[:len(voters)], `mkdir -p /var/lib/platter/member
printf 'ETCD_INITIAL_CLUSTER=`+strings.Join(voters, ",")+`\nETCD_INITIAL_CLUSTER_STATE=new\nETCD_INITIAL_CLUSTER_TOKEN=hand\n' > /var/lib/platter/member/etcd
systemctl start etcd`)
	})
	step("postgresql", func() {
		all(boxes, `systemctl start patroni
until [ "$(setpriv --reuid postgres --clear-groups psql -h /run/postgresql -d postgres -tAc "select 1 from pg_database where datname = 'ejabberd'" 2>/dev/null)" = 1 ]; do sleep 0.1; done`)
	})
	step("database", func() {
		all(boxes, `systemctl start haproxy
until pg_isready -q -h 127.0.0.1 -p 5000; do sleep 0.1; done`)
	})
	step("ejabberd", func() {
		all(boxes[:1], `systemctl start epmd.socket ejabberd`) // its first start makes the tables
		var accounts string
		for _, a := range sec.Probes {
			accounts += fmt.Sprintf("ejabberdctl register %s im.e2e.example %s &\n", a.User, a.Password)
		}
		all(boxes, `if [ $(hostname) = node1 ]; then
`+accounts+`wait
else
systemctl start epmd.socket ejabberd
ejabberdctl join_cluster ejabberd@node1
fi`)
	})
	step("web", func() { all(boxes, `systemctl start nginx`) })
	step("message", func() {
		from, to := boxes[0], boxes[len(boxes)-1]
		self, err := os.Executable()
		if err != nil {
			r.t.Fatal(err)
		}
		r.inLab(self, firstMessage, boxes[0].dir+"/root", from.addr, to.addr)
	})
	took["all"] = time.Since(began)
	return took
}

// firstMessage is what the test binary does under this name, in the lab's
// network: it sends messages both ways until one has arrived each way.
const firstMessage = "first-message"

func init() {
	if len(os.Args) == 5 && os.Args[1] == firstMessage {
		if err := awaitMessage(context.Background(), os.Args[2], os.Args[3], os.Args[4]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func awaitMessage(ctx context.Context, root, from, to string) error {
	sec, err := stack.Secrets(root)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	at := func(addr string, a provision.Account) probe.Endpoint {
		return probe.Endpoint{Node: addr, Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), stack.ClientPort), Account: a}
	}
	ways := [][2]string{{from, to}}
	if from != to {
		ways = append(ways, [2]string{to, from})
	}
	for _, way := range ways {
		for {
			_, err := probe.Run(ctx, probe.Message, probe.Options{Domain: "im.e2e.example", CA: sec.CA, From: at(way[0], sec.Probes[0]), To: at(way[1], sec.Probes[1])})
			if err == nil {
				break
			}
			if provision.Sleep(ctx, 100*time.Millisecond) != nil {
				return err
			}
		}
	}
	return nil
}
