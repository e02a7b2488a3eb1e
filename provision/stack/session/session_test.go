package session

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"platter/provision"
)

// Failures of two connections for the same reason count as one.
func TestReason(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(l.Addr().String())
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	open := func() string {
		t.Helper()
		_, err := Open(t.Context(), Options{Domain: "im.test", Addr: at, Account: provision.Account{User: "alice", Password: "x"}})
		var failed *Error
		if !errors.As(err, &failed) {
			t.Fatalf("%v is no *Error", err)
		}
		return Reason(err)
	}
	switch got := open(); got { // either end may be first
	case "opening the stream: the node ended the connection", "opening the stream: read: connection reset by peer", "opening the stream: write: broken pipe":
	default:
		t.Errorf("a node that hangs up: %q", got)
	}
	l.Close()
	for range 2 {
		if got := open(); got != "connecting: connect: connection refused" {
			t.Errorf("a node that is off: %q", got)
		}
	}
	if got := Reason(&Error{Login, context.DeadlineExceeded}); got != "login: context deadline exceeded" {
		t.Errorf("%q", got)
	}
}
