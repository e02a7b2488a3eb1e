package session

import (
	"context"
	"encoding/xml"
	"errors"
	"strconv"
	"sync"

	"mellium.im/xmlstream"
	"mellium.im/xmpp"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/stanza"
)

// Managed is a logged-in user who knows which messages the server has
// acknowledged (XEP-0198, 3 and 4, without resumption). The body of each message
// is its ID.
type Managed struct {
	Heard  <-chan struct{} // something has come, at least since it was last read
	Broken <-chan struct{} // closed once the session is over

	s    *xmpp.Session
	mu   sync.Mutex
	sent []string // stanzas in order: IDs of messages, "" for presence
}

// Incoming is a message that came for the user.
type Incoming struct {
	From jid.JID `xml:"from,attr"`
	Type string  `xml:"type,attr"`
	Body string  `xml:"body"`
}

// Manage makes s such a session and shows the user as present. acked is
// called with the IDs of messages that the server has taken over, message with
// what comes. It serves s, which nobody else may, until Close.
func Manage(ctx context.Context, s *xmpp.Session, acked func(ids ...string), message func(Incoming)) (*Managed, error) {
	heard, broken, enabled := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	st := &Managed{Heard: heard, Broken: broken, s: s, sent: []string{""}}
	received, done, on := 0, 0, false
	go func() {
		defer close(broken)
		s.Serve(xmpp.HandlerFunc(func(rw xmlstream.TokenReadEncoder, start *xml.StartElement) error {
			select {
			case heard <- struct{}{}:
			default:
			}
			switch start.Name.Local {
			case "enabled":
				on = true
				close(enabled)
			case "r":
				_, err := xmlstream.Copy(rw, smElement("a", xml.Attr{Name: xml.Name{Local: "h"}, Value: strconv.Itoa(received)}))
				return err
			case "a":
				for _, a := range start.Attr {
					if h, err := strconv.Atoi(a.Value); a.Name.Local == "h" && err == nil {
						st.mu.Lock()
						ids := st.sent[done:max(done, min(h, len(st.sent)))]
						st.mu.Unlock()
						done += len(ids)
						acked(ids...)
					}
				}
			case "message", "presence", "iq":
				if on {
					received++
				}
				if start.Name.Local != "message" {
					return nil
				}
				var in Incoming
				if err := xml.NewTokenDecoder(xmlstream.MultiReader(xmlstream.Token(*start), rw)).Decode(&in); err != nil {
					return err
				}
				message(in)
			}
			return nil
		}))
	}()
	err := s.Send(ctx, smElement("enable"))
	if err == nil {
		select {
		case <-enabled:
			err = s.Send(ctx, stanza.Presence{}.Wrap(nil))
		case <-broken:
			err = errors.New("the session broke")
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		st.Close()
		return nil, err
	}
	return st, nil
}

// Send sends the message with that ID.
func (st *Managed) Send(ctx context.Context, to jid.JID, id string) error {
	st.mu.Lock()
	st.sent = append(st.sent, id)
	st.mu.Unlock()
	return st.s.Encode(ctx, struct {
		stanza.Message
		Body string `xml:"body"`
	}{stanza.Message{ID: id, To: to, Type: stanza.ChatMessage}, id})
}

// Ask has the server say what it has taken over.
func (st *Managed) Ask(ctx context.Context) error { return st.s.Send(ctx, smElement("r")) }

// Close ends the connection, and returns when nothing is called any more.
func (st *Managed) Close() {
	st.s.Conn().Close()
	<-st.Broken
}

func smElement(name string, attrs ...xml.Attr) xml.TokenReader {
	return xmlstream.Wrap(nil, xml.StartElement{Name: xml.Name{Space: "urn:xmpp:sm:3", Local: name}, Attr: attrs})
}
