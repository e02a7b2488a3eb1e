package session

import (
	"context"
	"encoding/xml"

	"mellium.im/xmlstream"
	"mellium.im/xmpp"
	"mellium.im/xmpp/history"
	"mellium.im/xmpp/jid"
)

// Archived returns the bodies of all messages in the archive of the user that s
// logged in (XEP-0313). It serves s, which nobody else may.
func Archived(ctx context.Context, s *xmpp.Session) (map[string]bool, error) {
	found := map[string]bool{}
	go s.Serve(xmpp.HandlerFunc(func(rw xmlstream.TokenReadEncoder, start *xml.StartElement) error {
		if start.Name.Local != "message" {
			return nil
		}
		var in struct {
			Result struct {
				Body string `xml:"forwarded>message>body"`
			} `xml:"urn:xmpp:mam:2 result"`
		}
		err := xml.NewTokenDecoder(xmlstream.MultiReader(xmlstream.Token(*start), rw)).Decode(&in)
		found[in.Result.Body] = true
		return err
	}))
	q := history.Query{ID: "all", Limit: 200}
	for {
		// The answer comes after the messages, over the same goroutine.
		r, err := history.Fetch(ctx, q, jid.JID{}, s)
		if err != nil {
			return nil, err
		}
		if r.Complete || r.Set.Last == "" {
			return found, nil
		}
		q.PageID = r.Set.Last
	}
}
