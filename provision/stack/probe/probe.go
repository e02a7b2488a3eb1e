package probe

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"mellium.im/sasl"
	"mellium.im/xmlstream"
	"mellium.im/xmpp"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/stanza"

	"platter/provision"
)

// Options say who sends to whom, and where each of the two is logged in.
type Options struct {
	Domain string // XMPP domain; also the name that the certificates must carry
	CA     string // PEM; the only root that is trusted
	From   Endpoint
	To     Endpoint
}

// Endpoint is one user at one node.
type Endpoint struct {
	Node    string         // name of the node, for messages to people
	Addr    netip.AddrPort // XMPP client port (STARTTLS) of the node; no name is ever looked up
	Account provision.Account
}

// Message logs both users in, sends a message that nobody could guess from
// From to To and returns how long it took to arrive. TLS is required before
// any credential is used, with a certificate of CA for Domain; passwords are
// proven with SCRAM and never sent. The message is not archived and leaves
// nothing behind for a user who is away.
//
// The error names the node and the step at fault. ctx bounds the whole.
func Message(ctx context.Context, o Options) (time.Duration, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(o.CA)) {
		return 0, errors.New("probe: the CA is not a certificate in PEM form: check the site's state directory")
	}
	conf := &tls.Config{ServerName: o.Domain, RootCAs: roots, MinVersion: tls.VersionTLS12}

	arrived, bounced := make(chan string, 16), make(chan error, 1)
	to, err := dial(ctx, o.Domain, o.To, conf, func(m message) {
		select {
		case arrived <- m.Body:
		default: // not ours: more than 16 of ours are never under way
		}
	})
	if err != nil {
		return 0, err
	}
	defer to.close()
	from, err := dial(ctx, o.Domain, o.From, conf, func(m message) {
		if m.Type != stanza.ErrorMessage {
			return
		}
		select {
		case bounced <- m.Error:
		default:
		}
	})
	if err != nil {
		return 0, err
	}
	defer from.close()

	var secret [16]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return 0, fmt.Errorf("probe: %w", err)
	}
	// The node of the sender learns of the receiver's login asynchronously, so
	// the first message may find nobody: it is repeated, each with a number.
	sent, last := map[string]time.Time{}, error(nil)
	again := time.NewTicker(500 * time.Millisecond)
	defer again.Stop()
	for n := 0; ; {
		if n < 16 || len(sent) == 0 {
			text := fmt.Sprintf("platter-probe-%s-%d", hex.EncodeToString(secret[:]), n)
			sent[text] = time.Now()
			if err := from.send(ctx, to.address(), text); err != nil {
				return 0, fmt.Errorf("probe: sending as %s at node %s: %w", o.From.Account.User, o.From.Node, err)
			}
			n++
		}
		for waiting := true; waiting; {
			select {
			case text := <-arrived:
				if at, ok := sent[text]; ok {
					return time.Since(at), nil
				}
			case last = <-bounced:
			case <-again.C:
				waiting = false
			case err := <-from.broken:
				return 0, fmt.Errorf("probe: node %s (%s) ended the session of %s: %w", o.From.Node, o.From.Addr, o.From.Account.User, err)
			case err := <-to.broken:
				return 0, fmt.Errorf("probe: node %s (%s) ended the session of %s: %w", o.To.Node, o.To.Addr, o.To.Account.User, err)
			case <-ctx.Done():
				err := fmt.Errorf("probe: of %d messages from %s at node %s to %s at node %s none arrived: look at 'ejabberdctl list_cluster' on both nodes: %w",
					n, o.From.Account.User, o.From.Node, o.To.Account.User, o.To.Node, ctx.Err())
				if last != nil {
					err = fmt.Errorf("%w; the last one was returned: %w", err, last)
				}
				return 0, err
			}
		}
	}
}

// message is what the handlers look at of a message stanza.
type message struct {
	stanza.Message
	Body  string       `xml:"body"`
	Error stanza.Error `xml:"error"`
}

// outgoing asks servers neither to keep nor to copy the message (XEP-0334).
type outgoing struct {
	stanza.Message
	Body    string   `xml:"body"`
	NoStore struct{} `xml:"urn:xmpp:hints no-store"`
	NoCopy  struct{} `xml:"urn:xmpp:hints no-copy"`
}

// user is one logged-in session.
type user struct {
	conn    net.Conn
	session *xmpp.Session
	broken  chan error // the session ended by itself
	unwatch func() bool
	served  sync.WaitGroup
}

// dial logs e in and announces it. Every message it gets goes to receive.
func dial(ctx context.Context, domain string, e Endpoint, conf *tls.Config, receive func(message)) (*user, error) {
	step := "connecting"
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return fmt.Errorf("probe: user %s at node %s (%s): %s: %w", e.Account.User, e.Node, e.Addr, step, err)
	}
	me, err := jid.New(e.Account.User, domain, "")
	if err != nil {
		return nil, fail(err)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", e.Addr.String())
	if err != nil {
		return nil, fail(err)
	}
	u := &user{conn: conn, broken: make(chan error, 1)}
	u.unwatch = context.AfterFunc(ctx, func() { conn.Close() })

	step = "opening the stream"
	startTLS := xmpp.StartTLS(conf)
	negotiateTLS := startTLS.Negotiate
	startTLS.Negotiate = func(ctx context.Context, s *xmpp.Session, data any) (xmpp.SessionState, io.ReadWriter, error) {
		step = "TLS"
		state, rw, err := negotiateTLS(ctx, s, data)
		if t, ok := rw.(*tls.Conn); ok && err == nil {
			err = t.HandshakeContext(ctx) // now, so that its error is known as one of TLS
		}
		return state, rw, err
	}
	login := xmpp.SASL("", e.Account.Password, sasl.ScramSha256, sasl.ScramSha1)
	negotiateLogin := login.Negotiate
	login.Negotiate = func(ctx context.Context, s *xmpp.Session, data any) (xmpp.SessionState, io.ReadWriter, error) {
		step = "login"
		return negotiateLogin(ctx, s, data)
	}
	bind := xmpp.BindResource()
	negotiateBind := bind.Negotiate
	bind.Negotiate = func(ctx context.Context, s *xmpp.Session, data any) (xmpp.SessionState, io.ReadWriter, error) {
		step = "binding a resource"
		return negotiateBind(ctx, s, data)
	}
	u.session, err = xmpp.NewClientSession(ctx, me, conn, startTLS, login, bind)
	if err == nil && u.session.State()&(xmpp.Secure|xmpp.Authn) != xmpp.Secure|xmpp.Authn {
		err = errors.New("the node let the user in without TLS or without a password")
	}
	if err != nil {
		u.unwatch()
		conn.Close()
		return nil, fail(err)
	}

	u.served.Add(1)
	go func() {
		defer u.served.Done()
		err := u.session.Serve(xmpp.HandlerFunc(func(t xmlstream.TokenReadEncoder, start *xml.StartElement) error {
			if start.Name.Local != "message" {
				return nil
			}
			var m message
			d := xml.NewTokenDecoder(xmlstream.MultiReader(xmlstream.Token(*start), t))
			if err := d.Decode(&m); err != nil {
				return err
			}
			receive(m)
			return nil
		}))
		if err == nil {
			err = io.EOF
		}
		u.broken <- err
	}()
	step = "presence"
	if err := u.session.Send(ctx, stanza.Presence{Type: stanza.AvailablePresence}.Wrap(nil)); err != nil {
		u.close()
		return nil, fail(err)
	}
	return u, nil
}

// address is the user with this session's resource.
func (u *user) address() jid.JID { return u.session.LocalAddr() }

func (u *user) send(ctx context.Context, to jid.JID, text string) error {
	return u.session.Encode(ctx, outgoing{
		Message: stanza.Message{ID: strings.ReplaceAll(text, "platter-", ""), To: to, Type: stanza.ChatMessage},
		Body:    text,
	})
}

// close says good-bye and waits, for a second at most, for the node's answer.
func (u *user) close() {
	u.conn.SetDeadline(time.Now().Add(time.Second))
	u.session.Close()
	u.served.Wait()
	u.unwatch()
	u.conn.Close()
}
