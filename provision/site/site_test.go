package site

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
)

var loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1")}

func request(t *testing.T, key any) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func ecKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestOpenMakesOneSiteForEver(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "site")
	// Two first starts at once end with the same site.
	pins := make([]string, 8)
	var wg sync.WaitGroup
	for i := range pins {
		wg.Go(func() {
			s, err := Open(dir)
			if err != nil {
				t.Error(err)
				return
			}
			pins[i] = s.Pin()
		})
	}
	wg.Wait()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pins {
		if p != s.Pin() || len(p) != 64 {
			t.Fatalf("pins %q, then %q", pins, s.Pin())
		}
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != FileName {
		t.Fatalf("left behind: %v", entries)
	}
	info, err := os.Stat(filepath.Join(dir, FileName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if s.CACert().NotAfter.Sub(s.CACert().NotBefore) < 19*365*24*time.Hour || !s.CACert().NotBefore.Before(time.Now().Add(-23*time.Hour)) {
		t.Fatalf("CA valid from %v to %v", s.CACert().NotBefore, s.CACert().NotAfter)
	}
	if p := s.Probes(); p[0].User == p[1].User || p[0].Password == p[1].Password || len(p[0].Password) < 20 || len(s.f.Cookie) < 20 {
		t.Fatal("the secrets are weak")
	}
}

func TestOpenDamaged(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, FileName)
	whole, _ := os.ReadFile(path)
	for _, bad := range []string{"", "{}", string(whole[:len(whole)/2]), strings.Replace(string(whole), `"format": 1`, `"format": 2`, 1),
		strings.Replace(string(whole), `"seed": "`, `"seed": "xy`, 1)} {
		os.WriteFile(path, []byte(bad), 0o600)
		_, err := Open(dir)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "restore") {
			t.Fatalf("%.20q: %v", bad, err)
		}
		if now, _ := os.ReadFile(path); string(now) != bad {
			t.Fatal("a damaged site file was overwritten")
		}
	}
}

func TestSignNode(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	old, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := request(t, ecKey(t))
	block, _ := pem.Decode([]byte(good))
	block.Bytes[len(block.Bytes)-3] ^= 1 // in the signature
	for name, c := range map[string]struct {
		csr string
		ok  bool
	}{
		"ecdsa":        {good, true},
		"ed25519":      {request(t, ed), true},
		"rsa":          {request(t, old), false},
		"not its own":  {string(pem.EncodeToMemory(block)), false},
		"not PEM":      {"hello", false},
		"a cert":       {s.CA(), false},
		"empty":        {"", false},
		"not a der":    {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")})), false},
		"only a begin": {"-----BEGIN CERTIFICATE REQUEST-----\n", false},
	} {
		if _, err := s.SignNode(c.csr, Peer{Node: "node1", Generation: 1}); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := RequestKey(c.csr); (err == nil) != c.ok {
			t.Errorf("%s: key: %v", name, err)
		}
	}
}

// Every kind of client on real TLS: who the server takes it for.
func TestNodeFromTLS(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	other, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := s.ServerTLS(loopback)
	if err != nil {
		t.Fatal(err)
	}
	pairOf := func(by *Site, p Peer) *tls.Certificate {
		key := ecKey(t)
		cert, err := by.SignNode(request(t, key), p)
		if err != nil {
			t.Fatal(err)
		}
		keyPEM, _ := encodeKey(key)
		pair, err := tls.X509KeyPair([]byte(cert), []byte(keyPEM))
		if err != nil {
			t.Fatal(err)
		}
		return &pair
	}
	// older is an identity as older versions made it.
	older := func(by *Site, org string) *tls.Certificate {
		key := ecKey(t)
		c := by.template("node1", x509.ExtKeyUsageClientAuth)
		c.Subject.Organization, c.Subject.OrganizationalUnit = []string{org}, []string{"7"}
		der, err := by.sign(c, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	xmpp, err := s.StackSecrets(plan("node1", "10.77.0.11"))
	if err != nil {
		t.Fatal(err)
	}
	xmppPair, err := tls.X509KeyPair([]byte(xmpp.Cert), []byte(xmpp.Key))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		pair   *tls.Certificate
		accept bool
		peer   Peer
		isNode bool
	}{
		"node":            {pairOf(s, Peer{Node: "node1", Generation: 7}), true, Peer{Node: "node1", Generation: 7}, true},
		"machine":         {pairOf(s, Peer{Node: "52:54:00:00:00:01", Inventory: true}), true, Peer{Node: "52:54:00:00:00:01", Inventory: true}, true},
		"an older node":   {older(s, "platter node"), true, Peer{Node: "node1", Generation: 7}, true},
		"a person":        {older(s, "people"), false, Peer{}, false},
		"nobody":          {nil, true, Peer{}, false},
		"of another site": {pairOf(other, Peer{Node: "node1", Generation: 7}), false, Peer{}, false},
		"the IM stack":    {&xmppPair, false, Peer{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				roots := x509.NewCertPool()
				roots.AddCert(s.CACert())
				c2 := &tls.Config{RootCAs: roots}
				if c.pair != nil {
					// As a hostile client would: shown whatever the server asks for.
					c2.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.pair, nil }
				}
				conn, err := tls.Dial("tcp", l.Addr().String(), c2)
				if err == nil {
					io.Copy(io.Discard, conn)
					conn.Close()
				}
			}()
			raw, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			conn := raw.(*tls.Conn)
			err = conn.Handshake()
			if (err == nil) != c.accept {
				t.Fatalf("handshake: %v", err)
			}
			if err != nil {
				return
			}
			cs := conn.ConnectionState()
			peer, ok := s.NodeFromTLS(&cs)
			if peer != c.peer || ok != c.isNode {
				t.Fatalf("%+v, %v", peer, ok)
			}
		})
	}
	if _, ok := s.NodeFromTLS(nil); ok {
		t.Fatal("a plain connection is a node")
	}
	// Also where a server would let it in.
	for _, leaf := range []*x509.Certificate{xmppPair.Leaf, s.CACert(), pairOf(other, Peer{Node: "node1", Generation: 7}).Leaf} {
		if peer, ok := s.NodeFromTLS(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}); ok {
			t.Errorf("the certificate of %s is the node %+v", leaf.Subject, peer)
		}
	}
}

// A disc host whose clock is far behind, or ahead, still serves its nodes.
func TestServerClock(t *testing.T) {
	for _, now := range []time.Time{time.Unix(0, 0), time.Now().AddDate(60, 0, 0)} {
		t.Run(now.Format("2006"), func(t *testing.T) { serverClock(t, now) })
	}
}

func serverClock(t *testing.T, now time.Time) {
	dir := t.TempDir()
	if _, err := Open(dir); err != nil {
		t.Fatal(err)
	}
	s, err := open(dir, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := s.ServerTLS(loopback)
	if err != nil {
		t.Fatal(err)
	}
	key := ecKey(t)
	cert, err := s.SignNode(request(t, key), Peer{Node: "node1", Generation: 1})
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, _ := encodeKey(key)
	pair, err := tls.X509KeyPair([]byte(cert), []byte(keyPEM))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.CACert())
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	server := tls.Server(a, cfg)
	client := tls.Client(b, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", Certificates: []tls.Certificate{pair}})
	go client.Handshake()
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
}

func TestStackSecrets(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	sec, err := s.StackSecrets(plan("node2", "10.77.0.11"))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair([]byte(sec.Cert), []byte(sec.Key))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(sec.CA)) {
		t.Fatal("the CA is no certificate")
	}
	for _, name := range []string{"im.example.org", "conference.im.example.org", "node2", "10.77.0.11", "localhost", "127.0.0.1", "stack.lab.internal"} {
		// Programs of the stack use one certificate as server and as client.
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
			if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	for _, name := range []string{"node1", "10.77.0.12"} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err == nil {
			t.Errorf("the certificate is good for another node: %s", name)
		}
	}
	again, _ := s.StackSecrets(plan("node1", "10.77.0.11"))
	if again.Cookie != sec.Cookie || again.Probes[1] != sec.Probes[1] {
		t.Error("the nodes of one site do not share cookie and probe accounts")
	}
}

// What a machine of no rack file gets opens nothing in the stack, whose
// programs trust the same CA: not where Go decides (etcd), nor where OpenSSL
// does (PostgreSQL, patroni).
func TestIdentityIsNoClientOfTheStack(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	ca := write("ca.pem", s.CA())
	p := plan("node1", "10.77.0.11")
	sec, err := s.StackSecrets(p)
	if err != nil {
		t.Fatal(err)
	}
	certs := map[string]string{"stack": sec.Cert}
	for name, peer := range map[string]Peer{"machine": {Node: "52:54:00:00:00:01", Inventory: true}, "node": {Node: "node1", Generation: 1}} {
		if certs[name], err = s.SignNode(request(t, ecKey(t)), peer); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range certs {
		block, _ := pem.Decode([]byte(text))
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		_, err = cert.Verify(x509.VerifyOptions{Roots: s.pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if good := err == nil; good != (name == "stack") {
			t.Errorf("%s: Go says %v", name, err)
		}
		if good := cert.VerifyHostname(p.ServiceName()) == nil; good != (name == "stack") {
			t.Errorf("%s: has the stack's name: %v", name, good)
		}
		out, err := exec.Command("openssl", "verify", "-purpose", "sslclient", "-CAfile", ca, write(name+".pem", text)).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Fatal("install openssl: ", err)
		}
		if good := err == nil; good != (name == "stack") {
			t.Errorf("%s: OpenSSL says %v: %s", name, err, out)
		}
	}
}

// plan is what of a node's plan its secrets depend on.
func plan(node, addr string, secrets ...provision.Secret) provision.Plan {
	return provision.Plan{Rack: "lab", Node: node, Net: provision.NodeNet{Address: netip.PrefixFrom(netip.MustParseAddr(addr), 24)},
		Stack: provision.StackPlan{Domain: "im.example.org", Components: []provision.PlacedComponent{
			{Component: provision.Component{Name: "a", Secrets: secrets}}, {Component: provision.Component{Name: "b", Secrets: secrets}}}}}
}

func TestNamedSecrets(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	named := func(s *Site, node string, secrets ...provision.Secret) map[string]string {
		sec, err := s.StackSecrets(plan(node, "10.77.0.11", secrets...))
		if err != nil {
			t.Fatal(err)
		}
		return sec.Named
	}
	one, two := provision.Secret{Name: "one", Length: 32}, provision.Secret{Name: "two", Length: 128}
	got := named(s, "node1", one, two)
	if len(got) != 2 || !regexp.MustCompile(`^[A-Za-z0-9]{32}$`).MatchString(got["one"]) || !regexp.MustCompile(`^[A-Za-z0-9]{128}$`).MatchString(got["two"]) || got["two"][:32] == got["one"] {
		t.Fatalf("%q", got)
	}
	if len(named(s, "node1")) != 0 || named(s, "node2", one)["one"] != got["one"] {
		t.Error("a node gets what its components list, the same as other nodes")
	}
	if s, err = Open(dir); err != nil || named(s, "node1", two)["two"] != got["two"] {
		t.Errorf("a restart changes a secret: %v", err)
	}
	other, err := Open(t.TempDir())
	if err != nil || named(other, "node1", one)["one"] == got["one"] {
		t.Errorf("two sites share a secret: %v", err)
	}
	// Reckoned apart from this code, with Python's hmac: what is in use on
	// nodes must never change.
	s.f.Seed = strings.Repeat("0f", 32)
	if got := named(s, "node1", provision.Secret{Name: "patroni-replication", Length: 40})["patroni-replication"]; got != "SE9dVQqzqSeJEhG4oLd5Fg2Igv4VH2VN9LLEJMF2" {
		t.Errorf("the derivation has changed: %s", got)
	}
	// Every letter is as likely as any other: over 62,000 letters a count is
	// off by more than 200 of 1000 once in 10^9 runs.
	counts := map[rune]int{}
	for i := range 500 {
		for _, r := range s.named(provision.Secret{Name: strconv.Itoa(i), Length: 124}) {
			counts[r]++
		}
	}
	if len(counts) != 62 {
		t.Errorf("%d letters", len(counts))
	}
	for r, n := range counts {
		if n < 800 || n > 1200 {
			t.Errorf("%c: %d of 62000", r, n)
		}
	}
}

// A site file of an older version gets its seed and keeps everything else; of
// many openers at once all see the same.
func TestOldFileGetsASeed(t *testing.T) {
	dir := t.TempDir()
	first, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, FileName)
	whole, _ := os.ReadFile(path)
	var fields map[string]any
	if err := json.Unmarshal(whole, &fields); err != nil {
		t.Fatal(err)
	}
	delete(fields, "seed")
	fields["later"] = "kept"
	for name, marshal := range map[string]func(any) ([]byte, error){
		"compact": json.Marshal, "indented": func(v any) ([]byte, error) { return json.MarshalIndent(v, "", "\t") },
		"by hand": func(v any) ([]byte, error) {
			b, err := json.MarshalIndent(v, " ", "  ")
			return append(b, "\n\n"...), err
		},
	} {
		old, err := marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		os.WriteFile(path, old, 0o644)
		seeds := make([]string, 8)
		var wg sync.WaitGroup
		for i := range seeds {
			wg.Go(func() {
				s, err := Open(dir)
				if err != nil {
					t.Error(err)
					return
				}
				seeds[i] = s.f.Seed
				if s.Pin() != first.Pin() {
					t.Errorf("%s: another site", name)
				}
			})
		}
		wg.Wait()
		for _, seed := range seeds {
			if seed != seeds[0] || len(seed) != 64 {
				t.Fatalf("%s: %q", name, seeds)
			}
		}
		now, _ := os.ReadFile(path)
		if rest := strings.Replace(string(now), ",\n\t\"seed\": \""+seeds[0]+"\"", "", 1); rest != string(old) {
			t.Errorf("%s: the file was\n%s\nis\n%s", name, old, now)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 1 {
			t.Errorf("%s: left behind: %v", name, entries)
		}
	}
}
