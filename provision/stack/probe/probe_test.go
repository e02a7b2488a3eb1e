package probe

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// What a real node does is tested with real nodes in package stack; here is
// what no real node does.

func someCA(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// server takes one connection, answers its first bytes with reply and returns
// all that it was sent once the connection has ended.
func server(t *testing.T, reply string) (netip.AddrPort, <-chan string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	got := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		io.WriteString(c, reply)
		var rest bytes.Buffer
		io.Copy(&rest, c)
		got <- string(b[:n]) + rest.String()
	}()
	return netip.MustParseAddrPort(l.Addr().String()), got
}

func try(t *testing.T, ctx context.Context, addr netip.AddrPort) error {
	t.Helper()
	e := Endpoint{Node: "node7", Addr: addr, Account: provision.Account{User: "probe-a", Password: "do-not-tell"}}
	_, err := Run(ctx, Message, Options{Domain: "im.test", CA: someCA(t), From: e, To: e})
	if err == nil {
		t.Fatal("no error")
	}
	if !strings.Contains(err.Error(), "node7") || !strings.Contains(err.Error(), "probe-a") || strings.Contains(err.Error(), "do-not-tell") {
		t.Errorf("error: %v", err)
	}
	return err
}

// TestNoTLS: to a server that offers a login without TLS nothing is told.
func TestNoTLS(t *testing.T) {
	addr, got := server(t, `<?xml version='1.0'?><stream:stream id='1' version='1.0' xml:lang='en' xmlns:stream='http://etherx.jabber.org/streams' from='im.test' to='probe-a@im.test' xmlns='jabber:client'>`+
		`<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>SCRAM-SHA-1</mechanism><mechanism>PLAIN</mechanism></mechanisms></stream:features>`)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := try(t, ctx, addr)
	t.Log(err)
	if s := <-got; strings.Contains(s, "<auth") || !strings.Contains(s, "stream") {
		t.Errorf("sent %q", s)
	}
}

// TestSilent: a node that takes the connection and says nothing is given up
// when the context ends, at once.
func TestSilent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.Read(make([]byte, 1)) // the user has begun to speak
		cancel()
		io.Copy(io.Discard, c)
	}()
	if err := try(t, ctx, netip.MustParseAddrPort(l.Addr().String())); !strings.Contains(err.Error(), "opening the stream") || !strings.Contains(err.Error(), "context canceled") {
		t.Errorf("%v", err)
	}
}

func TestBadCA(t *testing.T) {
	if _, err := Run(context.Background(), Message, Options{Domain: "im.test", CA: "nonsense"}); err == nil || !strings.Contains(err.Error(), "CA") {
		t.Errorf("%v", err)
	}
}
