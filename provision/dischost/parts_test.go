package dischost

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"platter/provision"
	"platter/provision/client"
)

// Parts of an order go through the disc host, over real TLS, both ways, and
// only for the node that is carrying the order out.
func TestParts(t *testing.T) {
	l := newLab(t, 2)
	n1, n2 := l.installed(1), l.installed(2)
	ctx := t.Context()
	big := make([]byte, 5<<20)
	rand.Read(big)

	given := l.order("node1", provision.OrderBackup, nil)
	if err := n1.SendPart(ctx, given.ID, "database", bytes.NewReader(big)); codeOf(err) != client.CodeUnknownOrder {
		t.Errorf("of an order that nobody has asked for: %v", err)
	}
	if o := l.next(n1, true); o.ID != given.ID {
		t.Fatalf("%+v", o)
	}
	if err := n2.SendPart(ctx, given.ID, "database", bytes.NewReader(big)); codeOf(err) != client.CodeUnknownOrder {
		t.Errorf("from another node: %v", err)
	}
	if _, err := n2.TakePart(ctx, given.ID, "database"); codeOf(err) != client.CodeUnknownOrder {
		t.Errorf("to another node: %v", err)
	}
	if err := n1.SendPart(ctx, given.ID, "../x", bytes.NewReader(big)); codeOf(err) != client.CodeBadRequest {
		t.Errorf("with a wrong name: %v", err)
	}

	done := make(chan error, 1)
	go func() { done <- n1.SendPart(ctx, given.ID, "database", bytes.NewReader(big)) }()
	r, err := l.op.TakePart(ctx, given.ID, "database")
	l.check(err)
	got, err := io.ReadAll(r)
	r.Close()
	if err != nil || !bytes.Equal(got, big) || <-done != nil {
		t.Errorf("from the node: %d bytes, %v", len(got), err)
	}

	go func() { done <- l.op.SendPart(ctx, given.ID, "database", bytes.NewReader(big)) }()
	r, err = n1.TakePart(ctx, given.ID, "database")
	l.check(err)
	got, err = io.ReadAll(r)
	r.Close()
	if err != nil || !bytes.Equal(got, big) || <-done != nil {
		t.Errorf("to the node: %d bytes, %v", len(got), err)
	}

	// What breaks off on one side never looks whole on the other.
	broken := errors.New("pg_dump has failed")
	go func() {
		done <- n1.SendPart(ctx, given.ID, "database", io.MultiReader(bytes.NewReader(big[:1<<20]), iotest.ErrReader(broken)))
	}()
	r, err = l.op.TakePart(ctx, given.ID, "database")
	l.check(err)
	if n, err := io.Copy(io.Discard, r); err == nil {
		t.Errorf("%d bytes of a part that broke off are taken for all", n)
	}
	r.Close()
	if err := <-done; err == nil {
		t.Error("the sender of a part that broke off thinks it was sent")
	}
	go func() { done <- n1.SendPart(ctx, given.ID, "database", bytes.NewReader(big)) }()
	r, err = l.op.TakePart(ctx, given.ID, "database")
	l.check(err)
	if _, err := io.CopyN(io.Discard, r, 1000); err != nil {
		t.Error(err)
	}
	r.Close()
	if err := <-done; err == nil {
		t.Error("nobody took all, and the sender does not know")
	}

	// Nobody waits for ever, and nothing is read before somebody takes it.
	l.host.poll = 50 * time.Millisecond
	unread := strings.NewReader("secret")
	if err := n1.SendPart(ctx, given.ID, "uploads", unread); codeOf(err) != client.CodeNobody || unread.Len() != 6 {
		t.Errorf("with nobody there: %v, %d bytes left", err, unread.Len())
	}
	if _, err := l.op.TakePart(ctx, given.ID, "uploads"); codeOf(err) != client.CodeNobody {
		t.Errorf("with nobody there: %v", err)
	}
	if len(l.host.parts.open) != 0 {
		t.Errorf("passages are left: %v", l.host.parts.open)
	}
}
