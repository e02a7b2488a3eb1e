package probe

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"

	"mellium.im/xmlstream"
	"mellium.im/xmpp"
	"mellium.im/xmpp/disco"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/stanza"

	"platter/provision"
	"platter/provision/stack/session"
)

// user is one logged-in session.
type user struct {
	Endpoint
	open    *session.Session
	session *xmpp.Session
	got     chan incoming // messages and presences; more than it holds are dropped
	unwatch func() bool
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

// dial logs e in and announces it with that priority.
func (r run) dial(ctx context.Context, e Endpoint, priority int) (*user, error) {
	u := &user{Endpoint: e, got: make(chan incoming, 256)}
	s, err := session.Open(ctx, session.Options{Domain: r.Domain, Roots: r.roots, Addr: e.Addr, Account: e.Account, Priority: priority, Heard: u.receive})
	if err == nil {
		u.open, u.session = s, s.XMPP
		u.unwatch = context.AfterFunc(ctx, s.Abort)
		return u, nil
	}
	f := &provision.Failure{Code: "probe-session", Next: logsOf(e.Node),
		Message: fmt.Sprintf("user %s at node %s (%s): %v", e.Account.User, e.Node, e.Addr, err)}
	if at := new(session.Error); errors.As(err, &at) {
		switch at.Step {
		case session.Connect:
			f.Code = "probe-connect"
			f.Next = fmt.Sprintf("See that node %s is on, and that 'systemctl status ejabberd' says there that it runs", e.Node)
		case session.TLS:
			f.Code = "probe-tls"
			f.Next = fmt.Sprintf("Compare the clocks of node %s and of the disc host; if they agree, 'platter node reinstall %s' gives it a new certificate", e.Node, e.Node)
		case session.Login:
			f.Code = "probe-login"
			f.Next = fmt.Sprintf("Run 'systemctl restart platter-agent' on node %s: it sets the passwords of the probes' accounts", e.Node)
		}
	}
	return nil, f
}

func (u *user) receive(t xmlstream.TokenReadEncoder, start *xml.StartElement) error {
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
		case err := <-u.open.Ended:
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

func (u *user) send(ctx context.Context, kind stanza.MessageType, to jid.JID, text string, hints ...session.Hint) error {
	err := u.session.Encode(ctx, session.Message{
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

// close says good-bye.
func (u *user) close() {
	u.open.Close()
	u.unwatch()
}
