package stack

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"testing"
	"time"

	"platter/provision"
)

// testSite is a site that has just been made.
type testSite struct {
	t     *testing.T
	ca    *x509.Certificate
	caPEM string
	key   *ecdsa.PrivateKey
}

func newTestSite(t *testing.T) testSite {
	t.Helper()
	s := testSite{t: t}
	var err error
	s.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	s.ca = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, s.ca, s.ca, s.key.Public(), s.key)
	s.must(err)
	s.caPEM = toPEM("CERTIFICATE", der)
	return s
}

func (s testSite) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// issue makes a certificate for the service at the addresses, and its key.
func (s testSite) issue(addresses ...string) (cert, key string) {
	s.t.Helper()
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "im.test"}, DNSNames: []string{"im.test", "*.im.test"},
		NotBefore: s.ca.NotBefore, NotAfter: s.ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, a := range addresses {
		leaf.IPAddresses = append(leaf.IPAddresses, net.ParseIP(a))
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, s.ca, leafKey.Public(), s.key)
	s.must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(leafKey)
	s.must(err)
	return toPEM("CERTIFICATE", der), toPEM("PRIVATE KEY", keyDER)
}

// secrets are what the nodes of the tests get.
func (s testSite) secrets() provision.StackSecrets {
	cert, key := s.issue("10.99.0.1", "10.99.0.2")
	return provision.StackSecrets{Cookie: rand.Text(), CA: s.caPEM, Cert: cert, Key: key,
		Probes: []provision.Account{{User: "probe-a", Password: rand.Text()}, {User: "probe-b", Password: `needs 'quoting' " \ ` + rand.Text()}}}
}

func testSecrets(t *testing.T) provision.StackSecrets {
	t.Helper()
	return newTestSite(t).secrets()
}

func toPEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
