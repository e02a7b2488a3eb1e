//go:build e2e

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
	lab, rack := fmt.Sprintf(labHead, "boxes"), rackHead
	if len(components) > 0 {
		rack = strings.Replace(rack, "im.e2e.example}", "im.e2e.example, components: ["+strings.Join(components, ", ")+"]}", 1)
	}
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
			if out, _ := b.try("curl -sk -o /dev/null -w '%{http_code}' https://" + b.addr + ":8008/primary"); strings.HasSuffix(out, "200") {
				return b
			}
		}
		time.Sleep(time.Second)
	}
	t.Fatal("no PostgreSQL takes writes")
	return nil
}

// TestStack: what the service stands, on boxes.
func TestStack(t *testing.T) {
	r, boxes := boxRack(t, 3)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady)
	t.Log(r.stack("probe"))
	for _, b := range boxes {
		t.Log(b.name, b.sh("ETCDCTL_CACERT=/etc/etcd/platter-ca.pem ETCDCTL_CERT=/etc/etcd/platter.pem ETCDCTL_KEY=/etc/etcd/platter.key etcdctl --endpoints https://"+b.addr+":2379 member list; patronictl -c /etc/patroni/config.yml list"))
	}
}
