//go:build slow

package stack

import (
	"context"
	"testing"
	"time"

	"platter/provision/stack/probe"
)

// TestProbes: every probe passes on a real cluster of two.
func TestProbes(t *testing.T) {
	l := newLab(t, "node1", "node2")
	one, two := l.nodes[0], l.nodes[1]
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for _, c := range []struct {
		n    *testNode
		part asker
	}{{one, form}, {two, joins("node1")}} {
		if err := c.n.bring(ctx, l.sec, c.part, quiet{t}); err != nil {
			t.Fatalf("%s: %v\n%s", c.n.name, err, c.n.proc.out.String())
		}
	}
	good := probe.Options{Domain: testDomain, CA: l.sec.CA, From: l.endpoint(0, 0), To: l.endpoint(1, 1)}
	for _, way := range [][2]int{{0, 1}, {1, 0}, {0, 0}} {
		o := good
		o.From, o.To = l.endpoint(way[0], 0), l.endpoint(way[1], 1)
		for _, kind := range probe.Kinds {
			took, err := l.probe(ctx, kind, o)
			if err != nil {
				t.Errorf("%s from %s to %s: %v", kind, o.From.Node, o.To.Node, err)
				continue
			}
			t.Logf("%s from %s to %s: %s", kind, o.From.Node, o.To.Node, took)
		}
	}
}
