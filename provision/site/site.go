package site

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/client"
)

// FileName is the site's file inside its directory.
const FileName = "site.json"

const (
	lifetime = 20 * 365 * 24 * time.Hour
	// backdate keeps a node whose clock is behind from refusing a young CA.
	backdate = 24 * time.Hour

	orgNode      = "platter node"
	orgInventory = "platter machine" // in no rack file
)

// identity is the extended key usage (RFC 5280, 4.2.1.12) of a node's
// certificate, and no other. The programs of the IM stack trust the same CA:
// they must not take the certificate of a machine that anybody booted for that
// of a client.
var identity = asn1.ObjectIdentifier{2, 25, 1886151028} // ITU-T X.667, the number is ours alone

// file is the JSON form of the site's file.
type file struct {
	Format int                 `json:"format"` // 1
	CA     string              `json:"ca"`     // PEM
	Key    string              `json:"key"`    // of the CA, PEM
	Cookie string              `json:"cookie"`
	Seed   string              `json:"seed"` // of all secrets that are derived; 64 hex digits
	Probes []provision.Account `json:"probes"`
}

// Site is the opened file. It is immutable and may be shared.
type Site struct {
	f   file
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
	now func() time.Time
}

// Open reads the site's file in the directory dir, or makes both at the first
// start.
func Open(dir string) (*Site, error) { return open(dir, time.Now) }

func open(dir string, now func() time.Time) (*Site, error) {
	path := filepath.Join(dir, FileName)
	s, err := read(path, now)
	if errors.Is(err, fs.ErrNotExist) {
		if err := create(dir, path, now()); err != nil {
			return nil, fmt.Errorf("site file %s cannot be made: %w", path, err)
		}
		s, err = read(path, now)
	}
	if err == nil && s.f.Seed == "" {
		if err := addSeed(dir, path, now); err != nil {
			return nil, fmt.Errorf("site file %s cannot be given the seed of the stack's secrets: %w", path, err)
		}
		s, err = read(path, now)
	}
	return s, err
}

// read opens the file at path. One of an older version has no seed.
func read(path string, now func() time.Time) (*Site, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("site file: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("site file: %w", err)
	}
	s := &Site{now: now}
	if err := s.parse(b); err != nil {
		return nil, fmt.Errorf("site file %s is damaged (%w): restore it from a copy; without it every node has to be installed anew", path, err)
	}
	return s, nil
}

// create makes the file at path, complete and durable, unless another process
// was faster: then that one's stays, for it may already have been shown to a
// node.
func create(dir, path string, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "Platter site CA"},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(file{
		Format: 1, CA: encodeCert(der), Key: keyPEM, Cookie: rand.Text(), Seed: newSeed(),
		Probes: []provision.Account{{User: "probe-a", Password: rand.Text()}, {User: "probe-b", Password: rand.Text()}},
	}, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return write(dir, b, func(tmp string) error {
		// Also on FAT, which has no links: a disc host may keep its state on a stick.
		err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		if errors.Is(err, fs.ErrExist) {
			return nil // somebody was quicker
		}
		return err
	})
}

// write makes a file of b in dir, which put gives its name, all of it durable.
func write(dir string, b []byte, put func(tmp string) error) error {
	tmp, err := os.CreateTemp(dir, ".site-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := put(tmp.Name()); err != nil {
		return err
	}
	// The name must outlive a power cut too: nodes will trust this CA.
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func newSeed() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// addSeed gives the file of an older version its seed and leaves every other
// byte as it is. Of several processes the first decides.
func addSeed(dir, path string, now func() time.Time) error {
	lock, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	if s, err := read(path, now); err != nil || s.f.Seed != "" {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	end := bytes.LastIndexByte(b, '}')
	last := len(bytes.TrimRight(b[:end], " \t\r\n"))
	seed := fmt.Sprintf(",\n\t\"seed\": %q", newSeed())
	return write(dir, slices.Concat(b[:last], []byte(seed), b[last:]), func(tmp string) error { return os.Rename(tmp, path) })
}

func (s *Site) parse(b []byte) error {
	if err := json.Unmarshal(b, &s.f); err != nil {
		return err
	}
	if s.f.Format != 1 {
		return fmt.Errorf("its format is %d, this program knows 1", s.f.Format)
	}
	if s.f.Cookie == "" || len(s.f.Probes) != 2 {
		return errors.New("it is incomplete")
	}
	if seed, err := hex.DecodeString(s.f.Seed); err != nil || len(seed) != 32 && len(seed) != 0 {
		return errors.New("its seed is not 64 hex digits")
	}
	pair, err := tls.X509KeyPair([]byte(s.f.CA), []byte(s.f.Key))
	if err != nil {
		return err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return errors.New("it holds no ECDSA certificate authority")
	}
	s.ca, s.key = pair.Leaf, key
	return nil
}

// CA returns the CA's certificate, PEM.
func (s *Site) CA() string { return s.f.CA }

// CACert returns the CA's certificate.
func (s *Site) CACert() *x509.Certificate { return s.ca }

// Pin returns the pin of the CA as boot scripts carry it, see client.Pin.
func (s *Site) Pin() string { return client.Pin(s.ca) }

// Probes returns the two accounts of the readiness probe.
func (s *Site) Probes() [2]provision.Account { return [2]provision.Account(s.f.Probes) }

// ServerTLS returns the configuration of a node API server at addresses, with
// a key and certificate made for it now. A client may show a certificate of
// this site; NodeFromTLS reads it.
func (s *Site) ServerTLS(addresses []netip.Addr) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	t := s.template("Platter disc host", x509.ExtKeyUsageServerAuth)
	for _, a := range addresses {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	der, err := s.sign(t, key.Public())
	if err != nil {
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The CA goes along: an enrolling node knows only its pin.
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, s.ca.Raw}, PrivateKey: key}},
		// A client that shows a certificate has its key; whose it is, NodeFromTLS
		// finds out.
		ClientAuth: tls.RequestClientCert,
		ClientCAs:  s.pool(),
		VerifyConnection: func(cs tls.ConnectionState) error {
			if _, ok := s.NodeFromTLS(&cs); !ok && len(cs.PeerCertificates) > 0 {
				return errors.New("the client's certificate is not the identity of a node of this site")
			}
			return nil
		},
		SessionTicketsDisabled: true, // a ticket would outlive the check of a certificate
	}, nil
}

// Peer is who a client certificate says speaks.
type Peer struct {
	Node       string // name, or the MAC of an unknown machine
	Generation int
	Inventory  bool // a machine that is in no rack file
}

// SignNode signs the PKCS #10 request csr (PEM) as peer and returns the
// certificate, PEM. Only the request's key is used; that it is the asker's own
// is proven by the request's signature.
func (s *Site) SignNode(csr string, peer Peer) (string, error) {
	req, err := parseRequest(csr)
	if err != nil {
		return "", err
	}
	t := s.template(peer.Node)
	t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{identity}
	t.Subject.Organization = []string{orgNode}
	if peer.Inventory {
		t.Subject.Organization = []string{orgInventory}
	}
	t.Subject.OrganizationalUnit = []string{strconv.Itoa(peer.Generation)}
	der, err := s.sign(t, req.PublicKey)
	if err != nil {
		return "", fmt.Errorf("certificate of node %s: %w", peer.Node, err)
	}
	return encodeCert(der), nil
}

// RequestKey checks the PKCS #10 request csr (PEM) and returns the SHA-256,
// hex, of its key, which tells one asker from another.
func RequestKey(csr string) (string, error) {
	req, err := parseRequest(csr)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(req.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:]), nil
}

func parseRequest(text string) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("the certificate request is not in PEM form")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the certificate request cannot be read: %w", err)
	}
	switch req.PublicKeyAlgorithm {
	case x509.ECDSA, x509.Ed25519:
	default:
		return nil, fmt.Errorf("the certificate request has a key of kind %s, not ECDSA or Ed25519", req.PublicKeyAlgorithm)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the certificate request is not signed by its own key: %w", err)
	}
	return req, nil
}

// NodeFromTLS returns who speaks on a connection; false when no certificate was
// shown that SignNode has made.
func (s *Site) NodeFromTLS(cs *tls.ConnectionState) (Peer, bool) {
	if cs == nil || len(cs.PeerCertificates) == 0 {
		return Peer{}, false
	}
	cert := cs.PeerCertificates[0]
	// A disc host by whose clock its own CA is not valid still knows its nodes.
	now := s.now()
	if now.Before(s.ca.NotBefore) {
		now = s.ca.NotBefore
	} else if now.After(s.ca.NotAfter) {
		now = s.ca.NotAfter
	}
	_, err := cert.Verify(x509.VerifyOptions{Roots: s.pool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	// Identities of older versions were those of any client.
	older := slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth})
	if err != nil || !older && !slices.ContainsFunc(cert.UnknownExtKeyUsage, identity.Equal) {
		return Peer{}, false
	}
	subject := cert.Subject
	if len(subject.Organization) != 1 || len(subject.OrganizationalUnit) != 1 {
		return Peer{}, false
	}
	org := subject.Organization[0]
	generation, err := strconv.Atoi(subject.OrganizationalUnit[0])
	if err != nil || org != orgNode && org != orgInventory {
		return Peer{}, false
	}
	return Peer{Node: subject.CommonName, Generation: generation, Inventory: org == orgInventory}, true
}

func (s *Site) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(s.ca)
	return p
}

// StackSecrets returns what the plan's node needs in the cluster: the cookie,
// the probe accounts, the named secrets of its components, and a key and
// certificate made for it now. The certificate serves and, among the stack's
// programs, identifies a client; it is no node's identity, see NodeFromTLS.
func (s *Site) StackSecrets(p provision.Plan) (provision.StackSecrets, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return provision.StackSecrets{}, fmt.Errorf("stack certificate of node %s: %w", p.Node, err)
	}
	t := s.template(p.Node, x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)
	// The service's own name, those of its usual components (RFC 6120, 13.7.1:
	// each is a domain of its own), and the node's. In a rack without a name
	// server, files that users share are fetched from its address.
	domain := p.Stack.Domain
	t.DNSNames = []string{domain, "conference." + domain, "pubsub." + domain, "upload." + domain, "proxy." + domain, p.Node, "localhost", p.ServiceName()}
	t.IPAddresses = []net.IP{p.Net.Address.Addr().AsSlice(), net.IPv4(127, 0, 0, 1)}
	der, err := s.sign(t, key.Public())
	if err != nil {
		return provision.StackSecrets{}, fmt.Errorf("stack certificate of node %s: %w", p.Node, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return provision.StackSecrets{}, fmt.Errorf("stack certificate of node %s: %w", p.Node, err)
	}
	var named map[string]string // nil without any, as it is when read back
	for _, sec := range p.NamedSecrets() {
		if named == nil {
			named = map[string]string{}
		}
		named[sec.Name] = s.named(sec)
	}
	return provision.StackSecrets{
		Cookie: s.f.Cookie, CA: s.f.CA, Cert: encodeCert(der), Key: keyPEM, Named: named,
		Probes: append([]provision.Account(nil), s.f.Probes...),
		Load:   s.LoadSecret(),
	}, nil
}

// LoadSecret is what the passwords of simulated users are made from, see
// provision.LoadAccounts.
func (s *Site) LoadSecret() string { return hex.EncodeToString(s.derive("load-accounts")) }

// SigningKey signs what this disc host states about its rack, such as reports.
// It stays the same as long as the site's file does.
func (s *Site) SigningKey() (minisign.PrivateKey, error) {
	_, key, err := minisign.GenerateKey(bytes.NewReader(s.derive("signing-key"))) // takes 32 bytes and no others
	if err != nil {
		return key, fmt.Errorf("signing key of the site: %w", err)
	}
	return key, nil
}

// derive makes a secret of the site for one purpose: 32 bytes.
func (s *Site) derive(purpose string) []byte {
	seed, _ := hex.DecodeString(s.f.Seed) // parse has checked it
	return mac(seed, []byte("site/"+purpose))
}

// named derives a secret of the stack from the seed. A longer one of the same
// name begins with the shorter.
func (s *Site) named(sec provision.Secret) string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	seed, _ := hex.DecodeString(s.f.Seed) // parse has checked it
	key := mac(seed, []byte("stack-secret/"+sec.Name))
	var out []byte
	for block := uint32(0); len(out) < sec.Length; block++ {
		for _, b := range mac(key, binary.BigEndian.AppendUint32(nil, block)) {
			// Bytes beyond the last whole multiple would favour the first letters.
			if int(b) < 256/len(letters)*len(letters) && len(out) < sec.Length {
				out = append(out, letters[int(b)%len(letters)])
			}
		}
	}
	return string(out)
}

func mac(key, text []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(text)
	return h.Sum(nil)
}

// template is an end entity's certificate, valid as long as the CA is.
func (s *Site) template(name string, usage ...x509.ExtKeyUsage) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: s.ca.NotBefore, NotAfter: s.ca.NotAfter, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usage,
	}
}

func (s *Site) sign(t *x509.Certificate, public any) ([]byte, error) {
	return x509.CreateCertificate(rand.Reader, t, s.ca, public, s.key)
}

// serial returns a random 127-bit serial number (RFC 5280, 4.1.2.2).
func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

func encodeCert(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// encodeKey writes SEC 1 form, which every XMPP server reads.
func encodeKey(key *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})), nil
}
