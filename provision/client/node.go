package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"platter/provision"
)

// Identity is what a node needs to speak as itself. On the installed host it
// is kept as JSON in a file of mode 0600: it holds the private key.
type Identity struct {
	Node       string `json:"node"` // name, or the MAC of an unknown machine
	Generation int    `json:"generation"`
	URL        string `json:"url"`  // base of the node API, https
	CA         string `json:"ca"`   // PEM
	Cert       string `json:"cert"` // PEM
	Key        string `json:"key"`  // PKCS #8, PEM
}

// Node speaks to the disc host as one node. Its methods may be used at once
// from several goroutines. They do not retry: see Retryable.
type Node struct {
	id    Identity
	http  *http.Client
	parts *http.Client // more patient
	clock func() time.Time
	ahead *atomic.Pointer[time.Duration] // of the disc host's clock, at the last reply
}

// Option changes how a Node is made.
type Option func(*options)

type options struct {
	clock func() time.Time
	// patience is how long Enrol keeps trying.
	patience time.Duration
	idle     time.Duration
}

// WithClock sets the node's clock; without it, it is time.Now.
func WithClock(now func() time.Time) Option { return func(o *options) { o.clock = now } }

// WithPatience sets for how long Enrol asks again while the disc host cannot
// be reached; without it, one minute.
func WithPatience(d time.Duration) Option { return func(o *options) { o.patience = d } }

func apply(opts []Option) options {
	o := options{clock: time.Now, patience: time.Minute, idle: idleLimit}
	for _, f := range opts {
		f(&o)
	}
	return o
}

// Enrol trades token for an identity at the node API with base address base.
// pin is the pin of the site's CA, see Pin. The plan is nil for a machine that
// is in no rack file.
//
// The node's clock is not trusted: validity times are ignored here and the
// clock of the reply is used from then on, see Node.Time. While the server
// cannot be reached Enrol asks again with the same key, for which the server
// honours the token again, so a lost reply does not cost a boot.
func Enrol(ctx context.Context, base, pin, token string, opts ...Option) (*Node, *provision.Plan, error) {
	o := apply(opts)
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, nil, fmt.Errorf("enrol: %q is not an https address: boot again to get a new one", base)
	}
	if b, err := hex.DecodeString(pin); err != nil || len(b) != 32 {
		return nil, nil, fmt.Errorf("enrol: the pin %q is not 64 hex digits: boot again to get a new one", pin)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("enrol: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("enrol: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("enrol: %w", err)
	}
	tr := transport("", "", o.idle)
	defer tr.CloseIdleConnections()
	tr.TLSClientConfig = &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The usual check would trust the clock. verifyPin does all of it but
		// that, and is called for every connection.
		InsecureSkipVerify: true,
		VerifyConnection:   func(cs tls.ConnectionState) error { return verifyPin(cs, pin, u.Hostname()) },
	}
	req := EnrolRequest{Token: token, CSR: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))}
	var reply EnrolReply
	giveUp := time.Now().Add(o.patience)
	for n := 0; ; n++ {
		err = call(ctx, &http.Client{Transport: tr}, http.MethodPost, strings.TrimSuffix(base, "/")+PathEnrol, nil, req, &reply)
		if err == nil {
			break
		}
		if !Retryable(err) || !time.Now().Before(giveUp) {
			return nil, nil, fmt.Errorf("enrol at %s: %w", base, err)
		}
		if e := provision.Sleep(ctx, backoff(n)); e != nil {
			return nil, nil, fmt.Errorf("enrol at %s: %w", base, errors.Join(err, e))
		}
	}
	ca, err := parseCert(reply.CA)
	if err != nil || Pin(ca) != pin {
		return nil, nil, fmt.Errorf("enrol at %s: %w", base, &Error{Code: CodeWrongServer,
			Message: "the CA in the reply is not the one that the boot named", Next: "Boot again."})
	}
	// From here on the server's clock counts, run on by ours.
	ahead := reply.Time.Sub(o.clock())
	clock := func() time.Time { return o.clock().Add(ahead) }
	n, err := NewNode(Identity{
		Node: reply.Node, Generation: reply.Generation, URL: strings.TrimSuffix(base, "/"),
		CA: reply.CA, Cert: reply.Cert,
		Key: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	}, slices.Concat(opts, []Option{WithClock(clock)})...)
	if err != nil {
		return nil, nil, fmt.Errorf("enrol at %s: %w", base, err)
	}
	return n, reply.Plan, nil
}

// NewNode speaks with an identity that Enrol once gave.
func NewNode(id Identity, opts ...Option) (*Node, error) {
	o := apply(opts)
	pair, err := tls.X509KeyPair([]byte(id.Cert), []byte(id.Key))
	if err != nil {
		return nil, fmt.Errorf("identity of node %s: certificate and key: %w: reinstall the node", id.Node, err)
	}
	ca, err := parseCert(id.CA)
	if err != nil {
		return nil, fmt.Errorf("identity of node %s: CA: %w: reinstall the node", id.Node, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	config := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		RootCAs:      roots,
		Certificates: []tls.Certificate{pair},
		// A clock by which our own certificate is not valid is surely wrong, for it
		// lasts as long as the site: the node must still be able to say so.
		Time: func() time.Time {
			switch now := o.clock(); {
			case now.Before(pair.Leaf.NotBefore):
				return pair.Leaf.NotBefore
			case now.After(pair.Leaf.NotAfter):
				return pair.Leaf.NotAfter
			default:
				return now
			}
		},
	}
	tr, slow := transport("", "", o.idle), transport("", "", partIdle)
	tr.TLSClientConfig, slow.TLSClientConfig = config, config.Clone()
	slow.ExpectContinueTimeout = partIdle
	ahead := new(atomic.Pointer[time.Duration])
	return &Node{id: id, http: &http.Client{Transport: dated{tr, o.clock, ahead}}, parts: &http.Client{Transport: slow}, clock: o.clock, ahead: ahead}, nil
}

// Identity returns what NewNode needs to speak as this node again.
func (n *Node) Identity() Identity { return n.id }

// Time returns the time of the disc host as told at enrolment, or the node's
// own clock for a Node that NewNode made.
func (n *Node) Time() time.Time { return n.clock() }

// Ahead tells how far Time was ahead of the disc host's clock at its last reply,
// to the second; false where none has come yet.
func (n *Node) Ahead() (time.Duration, bool) {
	if d := n.ahead.Load(); d != nil {
		return *d, true
	}
	return 0, false
}

// dated compares the clock with the date of every reply (RFC 9110, 6.6.1).
type dated struct {
	*http.Transport
	clock func() time.Time
	ahead *atomic.Pointer[time.Duration]
}

func (d dated) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := d.Transport.RoundTrip(req)
	if err == nil {
		if there, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			ahead := d.clock().Sub(there).Truncate(time.Second)
			d.ahead.Store(&ahead)
		}
	}
	return resp, err
}

// Close closes idle connections.
func (n *Node) Close() { n.http.CloseIdleConnections(); n.parts.CloseIdleConnections() }

// Plan fetches the plan that this node and generation were enrolled with.
func (n *Node) Plan(ctx context.Context) (provision.Plan, error) {
	var p provision.Plan
	err := n.call(ctx, http.MethodGet, PathPlan, nil, nil, &p)
	return p, err
}

// Secrets fetches what the node needs to take part in the cluster.
func (n *Node) Secrets(ctx context.Context) (provision.StackSecrets, error) {
	var s provision.StackSecrets
	err := n.call(ctx, http.MethodGet, PathSecrets, nil, nil, &s)
	return s, err
}

// Join asks what the node does with the cluster now.
func (n *Node) Join(ctx context.Context) (provision.Join, error) {
	var j provision.Join
	err := n.call(ctx, http.MethodGet, PathJoin, nil, nil, &j)
	return j, err
}

// Approval asks whether an operator has made this unknown machine a node; if
// so, its next boot installs it.
func (n *Node) Approval(ctx context.Context) (Approval, error) {
	var a Approval
	err := n.call(ctx, http.MethodGet, PathApproval, nil, nil, &a)
	return a, err
}

// NextOrder asks what the node is to do next and waits for it up to OrderPoll;
// the order is nil when there was none. An order counts as handed out once it
// was in a reply: it comes again until the node has reported its end. member
// tells whether the node is past provision.StageJoining.
func (n *Node) NextOrder(ctx context.Context, member bool) (*provision.Order, error) {
	var next NextOrder
	err := n.call(ctx, http.MethodGet, PathOrders+"?member="+strconv.FormatBool(member), nil, nil, &next)
	return next.Order, err
}

// Report sends reports, at most MaxBatch, in order and all or none. A caller
// that repeats it after an error may have them kept twice; Reporter does not.
func (n *Node) Report(ctx context.Context, reports []provision.Report) error {
	return n.report(ctx, "", reports)
}

func (n *Node) report(ctx context.Context, batch string, reports []provision.Report) error {
	header := http.Header{}
	if batch != "" {
		header.Set(BatchHeader, batch)
	}
	return n.call(ctx, http.MethodPost, PathReports, header, reports, nil)
}

func (n *Node) call(ctx context.Context, method, path string, header http.Header, in, out any) error {
	return n.callWith(ctx, n.http, method, path, header, in, out)
}

func (n *Node) callWith(ctx context.Context, hc *http.Client, method, path string, header http.Header, in, out any) error {
	err := call(ctx, hc, method, n.id.URL+path, header, in, out)
	var bad *tls.CertificateVerificationError
	if errors.As(err, &bad) {
		return &Error{Code: CodeWrongServer, cause: err,
			Message: fmt.Sprintf("what answers at %s is not this site's disc host (%v)", n.id.URL, bad.Err),
			Next:    "Look for a second server with that address."}
	}
	return err
}

// verifyPin checks that the chain of cs is for host and ends in the pinned CA.
// Of validity times only their consistency is checked: the chain must have
// been valid together at some moment.
func verifyPin(cs tls.ConnectionState, pin, host string) error {
	wrong := func(why string) error {
		return &Error{Code: CodeWrongServer,
			Message: fmt.Sprintf("what answers at %s is not the disc host that this machine booted from: %s", host, why),
			Next:    "Look for a second server with that address, then boot again."}
	}
	roots, others, latest, found := x509.NewCertPool(), x509.NewCertPool(), time.Time{}, false
	for _, c := range cs.PeerCertificates {
		if c.IsCA && Pin(c) == pin {
			roots.AddCert(c)
			found = true
		} else {
			others.AddCert(c)
		}
		if c.NotBefore.After(latest) {
			latest = c.NotBefore
		}
	}
	if !found {
		return wrong("its certificates do not end in the CA whose pin the boot carried")
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: others, CurrentTime: latest, DNSName: host,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return wrong(err.Error())
	}
	return nil
}

func parseCert(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no certificate in PEM form")
	}
	return x509.ParseCertificate(block.Bytes)
}
