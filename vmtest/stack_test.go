//go:build e2e || bench

package vmtest_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// boxRack is a rack of boxes named node1, node2 ... with those optional
// components.
func boxRack(t *testing.T, n int, components ...string) (*rig, []*box) {
	t.Helper()
	return boxRackOn(t, "../build/store", n, components...)
}

// boxRackOn is boxRack with a store of its own.
func boxRackOn(t *testing.T, store string, n int, components ...string) (*rig, []*box) {
	t.Helper()
	return servedRack(t, store, n, components)
}

// servedRack is boxRackOn with further arguments for serve.
func servedRack(t *testing.T, store string, n int, components []string, serve ...string) (*rig, []*box) {
	t.Helper()
	t.Parallel() // boxes wait for each other more than they work
	stack := ""
	if len(components) > 0 {
		stack = ", components: [" + strings.Join(components, ", ") + "]"
	}
	return loneRack(t, store, n, stack, serve...)
}

// loneRack is a rack of boxes that has the machine to itself. stack is what the
// rack file says of it beside the domain.
func loneRack(t *testing.T, store string, n int, stack string, serve ...string) (*rig, []*box) {
	t.Helper()
	lab, rack := fmt.Sprintf(labHead, "boxes"), strings.Replace(rackHead, "im.e2e.example}", "im.e2e.example"+stack+"}", 1)
	for i := 1; i <= n; i++ {
		lab += fmt.Sprintf("  - {name: node%d, mac: \"52:54:00:77:09:%02x\", cpus: 1, memory: 1GiB, disks: [{size: 8GiB}]}\n", i, i)
		rack += fmt.Sprintf("  - {name: node%d, mac: \"52:54:00:77:09:%02x\", address: 10.77.0.%d}\n", i, i, 10+i)
	}
	r := newRigOn(t, store, lab, rack, serve...)
	image := r.boxImage()
	var boxes []*box
	for i := 1; i <= n; i++ {
		b := r.newBox(image, fmt.Sprintf("node%d", i), fmt.Sprintf("52:54:00:77:09:%02x", i), fmt.Sprintf("10.77.0.%d", 10+i))
		b.install()
		boxes = append(boxes, b)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, b := range boxes {
			if b.process == nil {
				continue
			}
			if out, err := b.try("journalctl -b --no-pager -u platter-agent -u etcd -u patroni -u rabbitmq-server | cut -c1-300 | tail -60; tail -20 /var/log/ejabberd/error.log"); err == nil {
				t.Logf("%s:\n%s", b.name, out)
			}
		}
	})
	return r, boxes
}

func (r *rig) stack(args ...string) string {
	r.t.Helper()
	return r.platter(append([]string{"stack", "--socket", r.dir + "/socket"}, args...)...)
}

func allReady(states map[string]provision.State) bool {
	for _, s := range states {
		if s.Known && s.Stage != provision.StageReady {
			return false
		}
	}
	return len(states) > 0
}

// primary is the box whose PostgreSQL takes writes.
func primary(t *testing.T, boxes []*box) *box {
	t.Helper()
	for range 60 {
		for _, b := range boxes {
			if b.process == nil {
				continue
			}
			if out, _ := b.try("setpriv --reuid postgres --clear-groups psql -h /run/postgresql -d postgres -tAc 'select not pg_is_in_recovery()'"); out == "t" {
				return b
			}
		}
		time.Sleep(time.Second)
	}
	t.Fatal("no PostgreSQL takes writes")
	return nil
}

// TestStack: what the service stands, on boxes. No message that a server has
// acknowledged is lost.
func TestStack(t *testing.T) {
	r, boxes := boxRack(t, 3)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady)
	r.stack("probe")
	judge := func(what string, res flowResult) {
		t.Helper()
		if len(res.Lost) > 0 {
			t.Errorf("%s: acknowledged and lost: %v", what, res.Lost)
			t.Log(r.read("flow.log"))
		}
		if res.Delivered < res.Acked/2 || res.Acked < 50 {
			t.Errorf("%s: too little was delivered to tell anything: %+v", what, res)
		}
	}

	first := primary(t, boxes)
	f := r.flow(boxes, first, 6)
	began := time.Now()
	first.off()
	second := primary(t, boxes)
	t.Logf("the node of the primary, %s, lost power; %s took over after %s", first.name, second.name, time.Since(began).Round(100*time.Millisecond))
	first.on()
	r.whole("whole again with the node that had died")
	judge("power of a node cut", f.end())

	f = r.flow(boxes, second, 6)
	began = time.Now()
	second.cable("down")
	third := primary(t, without(boxes, second))
	t.Logf("the node of the primary, %s, was cut off; %s took over after %s", second.name, third.name, time.Since(began).Round(100*time.Millisecond))
	second.cable("up")
	r.whole("whole again with the node that was cut off")
	judge("node cut off", f.end())
	r.stack("probe")

	r.node("reinstall", "node2")
	boxes[1].install()
	boxes[1].on()
	r.whole("whole again with node2 installed anew")
	r.stack("probe")

	// The whole rack loses power, and the wrong node comes up first: the others
	// have to be waited for, and nobody has to help.
	for _, b := range boxes {
		b.off()
	}
	boxes[2].on()
	time.Sleep(5 * time.Second)
	boxes[0].on()
	boxes[1].on()
	r.whole("whole again after all had lost power")
	r.stack("probe")
}

// whole waits until every agent of three has looked again and sees all members.
func (r *rig) whole(what string) {
	r.t.Helper()
	began := time.Now()
	r.await(what, func(states map[string]provision.State) bool {
		for _, s := range states {
			if s.Known && (s.Stage != provision.StageReady || !s.LastSeen.After(began) || s.Facts[provision.FactRunning] != "node1,node2,node3") {
				return false
			}
		}
		return len(states) == 3
	})
}

func without(boxes []*box, one *box) (out []*box) {
	for _, b := range boxes {
		if b != one {
			out = append(out, b)
		}
	}
	return out
}
