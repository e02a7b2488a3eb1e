package probe

import (
	"context"
	"crypto/tls"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"mellium.im/sasl"
	"mellium.im/xmlstream"
	"mellium.im/xmpp"
	"mellium.im/xmpp/disco"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/stanza"

	"platter/provision"
)

// Priorities of a session (RFC 6121, 4.7.2.3).
const (
	aside   = -1 // gets what is sent to this very session
	present = 0  // also what is sent to the user, and what waited
)

// user is one logged-in session.
type user struct {
	Endpoint
	conn    net.Conn
	session *xmpp.Session
	got     chan incoming // messages and presences; more than it holds are dropped
	broken  chan error    // the session ended by itself
	unwatch func() bool
	served  sync.WaitGroup
}

// incoming is what a probe looks at of a message or presence.
type incoming struct {
	XMLName xml.Name
	From    jid.JID      `xml:"from,attr"`
	Type    string       `xml:"type,attr"`
	Body    string       `xml:"body"`
	Error   stanza.Error `xml:"error"`
	// Statuses are those of a room (XEP-0045, 15.6.1).
	Statuses []struct {
		Code int `xml:"code,attr"`
	} `xml:"http://jabber.org/protocol/muc#user x>status"`
	Result struct {
		Query string `xml:"queryid,attr"`
		Body  string `xml:"forwarded>message>body"`
	} `xml:"urn:xmpp:mam:2 result"`
}

func (in incoming) status(code int) bool {
	for _, s := range in.Statuses {
		if s.Code == code {
			return true
		}
	}
	return false
}

// outgoing is a message with hints to servers on what to do with it (XEP-0334).
type outgoing struct {
	stanza.Message
	Body  string `xml:"body"`
	Hints []hint
}

type hint struct{ XMLName xml.Name }

func hints(names ...string) []hint {
	var out []hint
	for _, n := range names {
		out = append(out, hint{xml.Name{Space: "urn:xmpp:hints", Local: n}})
	}
	return out
}

// dial logs e in and announces it with that priority.
func (r run) dial(ctx context.Context, e Endpoint, priority int) (*user, error) {
	step := "connecting"
	fail := func(err error) error {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // the error is only that of a closed connection
		}
		f := &provision.Failure{Code: "probe-session", Next: logsOf(e.Node),
			Message: fmt.Sprintf("user %s at node %s (%s): %s: %v", e.Account.User, e.Node, e.Addr, step, err)}
		switch step {
		case "connecting":
			f.Code = "probe-connect"
			f.Next = fmt.Sprintf("See that node %s is on, and that 'systemctl status ejabberd' says there that it runs", e.Node)
		case "TLS":
			f.Code = "probe-tls"
			f.Next = fmt.Sprintf("Compare the clocks of node %s and of the disc host; if they agree, 'platter node reinstall %s' gives it a new certificate", e.Node, e.Node)
		case "login":
			f.Code = "probe-login"
			f.Next = fmt.Sprintf("Run 'systemctl restart platter-agent' on node %s: it sets the passwords of the probes' accounts", e.Node)
		}
		return f
	}
	me, err := jid.New(e.Account.User, r.Domain, "")
	if err != nil {
		return nil, fail(err)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", e.Addr.String())
	if err != nil {
		return nil, fail(err)
	}
	u := &user{Endpoint: e, conn: conn, got: make(chan incoming, 256), broken: make(chan error, 1)}
	u.unwatch = context.AfterFunc(ctx, func() { conn.Close() })

	step = "opening the stream"
	// during makes the step's name known while the feature is negotiated.
	during := func(name string, f xmpp.StreamFeature) xmpp.StreamFeature {
		negotiate := f.Negotiate
		f.Negotiate = func(ctx context.Context, s *xmpp.Session, data any) (xmpp.SessionState, io.ReadWriter, error) {
			step = name
			state, rw, err := negotiate(ctx, s, data)
			if t, ok := rw.(*tls.Conn); ok && err == nil {
				err = t.HandshakeContext(ctx) // now, so that its error is known as one of TLS
			}
			return state, rw, err
		}
		return f
	}
	u.session, err = xmpp.NewClientSession(ctx, me, conn,
		during("TLS", xmpp.StartTLS(r.tls(r.Domain))),
		during("login", xmpp.SASL("", e.Account.Password, sasl.ScramSha256, sasl.ScramSha1)),
		during("binding a resource", xmpp.BindResource()))
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
		err := u.session.Serve(xmpp.HandlerFunc(u.receive))
		if err == nil {
			err = io.EOF
		}
		u.broken <- err
	}()
	step = "presence"
	level := xmlstream.Wrap(xmlstream.Token(xml.CharData(strconv.Itoa(priority))), xml.StartElement{Name: xml.Name{Local: "priority"}})
	if err := u.session.Send(ctx, stanza.Presence{}.Wrap(level)); err != nil {
		u.close()
		return nil, fail(err)
	}
	return u, nil
}

func (u *user) receive(t xmlstream.TokenReadEncoder, start *xml.StartElement) error {
	if start.Name.Local == "iq" {
		return nil // answers find their way by themselves
	}
	var in incoming
	d := xml.NewTokenDecoder(xmlstream.MultiReader(xmlstream.Token(*start), t))
	if err := d.Decode(&in); err != nil {
		return err
	}
	select {
	case u.got <- in:
	default:
	}
	return nil
}

// await returns the first stanza that is wanted. what says in a failure what
// did not happen.
func (u *user) await(ctx context.Context, what string, want func(incoming) bool) (incoming, error) {
	var last error
	for {
		select {
		case in := <-u.got:
			if want(in) {
				return in, nil
			}
			if in.Type == "error" {
				last = in.Error
			}
		case err := <-u.broken:
			return incoming{}, u.ended(err)
		case <-ctx.Done():
			if last != nil {
				return incoming{}, fmt.Errorf("%s: %w; the last error that %s got was: %w", what, context.Cause(ctx), u.Account.User, last)
			}
			return incoming{}, fmt.Errorf("%s: %w", what, context.Cause(ctx))
		}
	}
}

// drain returns what has come so far.
func (u *user) drain() []incoming {
	var all []incoming
	for {
		select {
		case in := <-u.got:
			all = append(all, in)
		default:
			return all
		}
	}
}

func (u *user) ended(err error) error {
	return &provision.Failure{Code: "probe-session", Next: logsOf(u.Node),
		Message: fmt.Sprintf("node %s (%s) ended the session of %s: %v", u.Node, u.Addr, u.Account.User, err)}
}

// failed says what u could not do.
func (u *user) failed(what string, err error) error {
	return fmt.Errorf("user %s at node %s: %s: %w", u.Account.User, u.Node, what, err)
}

// address is the user with this session's resource.
func (u *user) address() jid.JID { return u.session.LocalAddr() }

func (u *user) send(ctx context.Context, kind stanza.MessageType, to jid.JID, text string, hints ...hint) error {
	err := u.session.Encode(ctx, outgoing{
		Message: stanza.Message{ID: strings.TrimPrefix(text, "platter-"), To: to, Type: kind},
		Body:    text, Hints: hints,
	})
	if err != nil {
		return u.failed(fmt.Sprintf("sending to %s", to), err)
	}
	return nil
}

// ask sends an IQ and decodes the answer's payload into out unless that is nil.
func (u *user) ask(ctx context.Context, kind stanza.IQType, to jid.JID, payload xml.TokenReader, out any) error {
	return u.session.UnmarshalIQElement(ctx, payload, stanza.IQ{Type: kind, To: to}, out)
}

// service finds, as every client does, which component offers feature
// (XEP-0030).
func (u *user) service(ctx context.Context, feature string) (jid.JID, error) {
	var list struct {
		Items []struct {
			JID jid.JID `xml:"jid,attr"`
		} `xml:"item"`
	}
	if err := u.ask(ctx, stanza.GetIQ, u.address().Domain(), disco.ItemsQuery{}.TokenReader(), &list); err != nil {
		return jid.JID{}, u.failed("asking for the cluster's services", err)
	}
	for _, item := range list.Items {
		info, err := disco.GetInfo(ctx, "", item.JID, u.session)
		if err != nil {
			continue // another service's trouble
		}
		for _, f := range info.Features {
			if f.Var == feature {
				return item.JID, nil
			}
		}
	}
	return jid.JID{}, &provision.Failure{Next: logsOf(u.Node) + "; 'systemctl restart platter-agent' writes its configuration anew",
		Message: fmt.Sprintf("node %s offers no service %s", u.Node, feature)}
}

// close says good-bye and waits, for a second at most, for the node's answer.
func (u *user) close() {
	u.conn.SetDeadline(time.Now().Add(time.Second))
	u.session.Close()
	u.served.Wait()
	u.unwatch()
	u.conn.Close()
}
