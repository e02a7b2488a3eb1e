package dischost

import (
	"strings"
	"testing"

	"platter/provision"
	"platter/provision/client"
)

// What an operator is told who would hand the rack over at a bad time.
func TestHandoverRefusals(t *testing.T) {
	l := newLab(t, 2)
	refused := func(node, want string) {
		t.Helper()
		_, err := l.op.Handover(t.Context(), node, provision.HandoverRequest{})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", node, err, want)
		}
	}
	refused("node1", "does not know where its own files lie")
	l.host.Succession = &Succession{Self: "node2"}
	refused("node9", "there is no node")
	refused("node1", "node1 is off, not ready; the install of node2 is due")
	refused("node2", "node2 is the disc host")
	if m, err := l.op.HandedOver(t.Context()); m != nil || err != nil {
		t.Errorf("handed over: %+v, %v", m, err)
	}
	// The disc host does not erase itself.
	if _, err := l.op.Reinstall(t.Context(), "node2"); !client.Refused(err, client.CodeConflict) || !strings.Contains(err.Error(), "is the disc host") {
		t.Errorf("a reinstall of the disc host: %v", err)
	}
	if got := l.orders(""); got != "" {
		t.Errorf("orders were given: %s", got)
	}
}
