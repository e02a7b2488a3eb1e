// Package session logs one user in at one node, over XMPP with TLS (RFC 6120),
// as every chat client does. It is what provision/stack/probe and
// provision/stack/load have in common.
package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"mellium.im/sasl"
	"mellium.im/xmlstream"
	"mellium.im/xmpp"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/stanza"

	"platter/provision"
)

// Priorities of a session (RFC 6121, 4.7.2.3).
const (
	Aside   = -1 // gets what is sent to this very session
	Present = 0  // also what is sent to the user, and what waited
)

// Options say who logs in where.
type Options struct {
	Domain   string // XMPP domain; also the name that the certificate must carry
	Roots    *x509.CertPool
	Addr     netip.AddrPort // XMPP client port (STARTTLS) of the node; no name is ever looked up
	Account  provision.Account
	Priority int
	// Heard gets every message and presence, one after the other. It must not
	// use the session.
	Heard xmpp.HandlerFunc
}

// Step is a part of a log-in.
type Step string

const (
	Connect  Step = "connecting"
	Stream   Step = "opening the stream"
	TLS      Step = "TLS"
	Login    Step = "login"
	Bind     Step = "binding a resource"
	Presence Step = "presence"
)

// Error is a log-in that failed.
type Error struct {
	Step Step
	Err  error
}

func (e *Error) Error() string { return string(e.Step) + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Session is a user who is logged in.
type Session struct {
	XMPP *xmpp.Session
	// Ended gets one error when the session is over, whoever ended it.
	Ended <-chan error

	conn   net.Conn
	served chan struct{}
}

// unanswered is how long the kernel lets sent data go without an answer before
// it gives the connection up (TCP_USER_TIMEOUT, tcp(7)): a node that has lost
// its power says nothing.
const unanswered = 20 * time.Second

var dialer = net.Dialer{
	KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 2},
	Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unanswered.Milliseconds()))
		}), err)
	},
}

// Open logs a user in and announces the session. TLS is required before any
// credential is used; the password is proven with SCRAM (RFC 5802) and never
// sent. ctx bounds the log-in, not the session. The error is an *Error.
func Open(ctx context.Context, o Options) (*Session, error) {
	step := Connect
	fail := func(err error) (*Session, error) {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // the error is only that of a closed connection
		}
		return nil, &Error{step, err}
	}
	me, err := jid.New(o.Account.User, o.Domain, "")
	if err != nil {
		return fail(err)
	}
	conn, err := dialer.DialContext(ctx, "tcp", o.Addr.String())
	if err != nil {
		return fail(err)
	}
	unwatch := context.AfterFunc(ctx, func() { conn.Close() })
	defer unwatch()
	step = Stream
	// during makes the step known while the feature is negotiated.
	during := func(s Step, f xmpp.StreamFeature) xmpp.StreamFeature {
		negotiate := f.Negotiate
		f.Negotiate = func(ctx context.Context, session *xmpp.Session, data any) (xmpp.SessionState, io.ReadWriter, error) {
			step = s
			state, rw, err := negotiate(ctx, session, data)
			if t, ok := rw.(*tls.Conn); ok && err == nil {
				err = t.HandshakeContext(ctx) // now, so that its error is known as one of TLS
			}
			return state, rw, err
		}
		return f
	}
	session, err := xmpp.NewClientSession(ctx, me, conn,
		during(TLS, xmpp.StartTLS(TLSConfig(o.Roots, o.Domain))),
		during(Login, xmpp.SASL("", o.Account.Password, sasl.ScramSha256, sasl.ScramSha1)),
		during(Bind, xmpp.BindResource()))
	if err == nil && session.State()&(xmpp.Secure|xmpp.Authn) != xmpp.Secure|xmpp.Authn {
		err = errors.New("the node let the user in without TLS or without a password")
	}
	if err != nil {
		conn.Close()
		return fail(err)
	}
	ended := make(chan error, 1)
	s := &Session{XMPP: session, Ended: ended, conn: conn, served: make(chan struct{})}
	heard := func(t xmlstream.TokenReadEncoder, start *xml.StartElement) error {
		if start.Name.Local == "iq" || o.Heard == nil {
			return nil // answers find their way by themselves
		}
		return o.Heard(t, start)
	}
	go func() {
		defer close(s.served)
		err := session.Serve(xmpp.HandlerFunc(heard))
		if err == nil {
			err = io.EOF
		}
		ended <- err
	}()
	step = Presence
	level := xmlstream.Wrap(xmlstream.Token(xml.CharData(strconv.Itoa(o.Priority))), xml.StartElement{Name: xml.Name{Local: "priority"}})
	err = session.Send(ctx, stanza.Presence{}.Wrap(level))
	if err == nil && !unwatch() {
		err = context.Cause(ctx)
	}
	if err != nil {
		s.Close()
		return fail(err)
	}
	return s, nil
}

// Close says good-bye and waits, for a second at most, for the node's answer.
func (s *Session) Close() {
	s.conn.SetDeadline(time.Now().Add(time.Second))
	s.XMPP.Close()
	<-s.served
	s.conn.Close()
}

// Abort ends the connection without a word.
func (s *Session) Abort() { s.conn.Close() }

// TLSConfig trusts roots and nothing else, for a server of that name.
func TLSConfig(roots *x509.CertPool, name string) *tls.Config {
	return &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12}
}

// Roots are the certificates in pem.
func Roots(pem string) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(pem)) {
		return nil, &provision.Failure{Code: "probe-ca", Message: "the CA is not a certificate in PEM form",
			Next: "Check the site's file in the disc host's state directory"}
	}
	return roots, nil
}

// Message is a message with hints to servers on what to do with it.
type Message struct {
	stanza.Message
	Body  string `xml:"body"`
	Hints []Hint
}

// Hint is a message processing hint (XEP-0334).
type Hint struct{ XMLName xml.Name }

// Hints makes hints of their names: no-store, no-copy, store and so on.
func Hints(names ...string) []Hint {
	var out []Hint
	for _, n := range names {
		out = append(out, Hint{xml.Name{Space: "urn:xmpp:hints", Local: n}})
	}
	return out
}

// Reason is err without what differs from one connection to the next, so that
// equal reasons can be counted.
func Reason(err error) string {
	prefix := ""
	if e := new(Error); errors.As(err, &e) {
		prefix, err = string(e.Step)+": ", e.Err
	}
	if e := new(os.SyscallError); errors.As(err, &e) {
		err = e // without addresses
	} else if e := new(net.OpError); errors.As(err, &e) {
		err = fmt.Errorf("%s: %w", e.Op, e.Err)
	}
	if e := new(xml.SyntaxError); errors.Is(err, io.EOF) || errors.As(err, &e) && e.Msg == "unexpected EOF" {
		return prefix + "the node ended the connection"
	}
	return prefix + err.Error()
}
