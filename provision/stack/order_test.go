package stack

import (
	"bufio"
	"io"
	"net"
	"net/netip"
	"testing"
)

// A server that listens and does not answer yet has not started.
func TestGreets(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort(l.Addr().String())
	if greets(t.Context(), addr, "im.example.org") {
		t.Error("nobody has accepted")
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			bufio.NewReader(conn).ReadString('>')
			io.WriteString(conn, "<?xml version='1.0'?>")
			conn.Close()
		}
	}()
	if !greets(t.Context(), addr, "im.example.org") {
		t.Error("it has answered")
	}
	l.Close()
	if greets(t.Context(), addr, "im.example.org") {
		t.Error("nobody listens")
	}
}
