package probe

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"mellium.im/xmlstream"
	"mellium.im/xmpp/form"
	"mellium.im/xmpp/history"
	"mellium.im/xmpp/jid"
	"mellium.im/xmpp/muc"
	"mellium.im/xmpp/ping"
	"mellium.im/xmpp/stanza"
	"mellium.im/xmpp/upload"

	"platter/provision"
	"platter/provision/stack/session"
)

// nonce is a text that nobody could guess.
func nonce() string { return "platter-probe-" + rand.Text() }

func (r run) login(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	u, err := r.dial(ctx, r.From, session.Aside)
	if err != nil {
		return 0, err
	}
	u.close()
	return time.Since(began), nil
}

// both logs both users in.
func (r run) both(ctx context.Context) (from, to *user, err error) {
	if to, err = r.dial(ctx, r.To, session.Aside); err != nil {
		return nil, nil, err
	}
	if from, err = r.dial(ctx, r.From, session.Aside); err != nil {
		to.close()
		return nil, nil, err
	}
	return from, to, nil
}

// message is not archived and leaves nothing behind for a user who is away.
func (r run) message(ctx context.Context) (time.Duration, error) {
	from, to, err := r.both(ctx)
	if err != nil {
		return 0, err
	}
	defer to.close()
	defer from.close()
	return deliver(ctx, from, to, session.Hints("no-store", "no-copy"))
}

// deliver sends messages from from to to until one has arrived, and returns
// how long that one took. The node of the sender learns of the receiver's login
// asynchronously, so the first message may find nobody: it is repeated, each
// with a number.
func deliver(ctx context.Context, from, to *user, hints []session.Hint) (time.Duration, error) {
	secret := nonce()
	sent, last := map[string]time.Time{}, error(nil)
	again := time.NewTicker(500 * time.Millisecond)
	defer again.Stop()
	for n := 0; ; {
		if n < 16 {
			text := fmt.Sprintf("%s-%d", secret, n)
			sent[text] = time.Now()
			if err := from.send(ctx, stanza.ChatMessage, to.address(), text, hints...); err != nil {
				return 0, err
			}
			n++
		}
		for waiting := true; waiting; {
			select {
			case in := <-to.got:
				if at, ok := sent[in.Body]; ok && in.Type != "error" {
					return time.Since(at), nil
				}
			case in := <-from.got:
				if in.Type == "error" {
					last = in.Error
				}
			case <-again.C:
				waiting = false
			case err := <-from.open.Ended:
				return 0, from.ended(err)
			case err := <-to.open.Ended:
				return 0, to.ended(err)
			case <-ctx.Done():
				err := fmt.Errorf("of %d messages from %s at node %s to %s at node %s none arrived: %w",
					n, from.Account.User, from.Node, to.Account.User, to.Node, context.Cause(ctx))
				if last != nil {
					err = fmt.Errorf("%w; the last one was returned: %w", err, last)
				}
				return 0, err
			}
		}
	}
}

// offline takes whatever waits for To, also what a probe that was killed left.
func (r run) offline(ctx context.Context) (time.Duration, error) {
	from, err := r.dial(ctx, r.From, session.Aside)
	if err != nil {
		return 0, err
	}
	defer from.close()
	text := nonce()
	receiver, err := jid.New(r.To.Account.User, r.Domain, "")
	if err != nil {
		return 0, err
	}
	if err := from.send(ctx, stanza.ChatMessage, receiver, text, session.Hints("no-permanent-store")...); err != nil {
		return 0, err
	}
	// Stanzas are handled in order (RFC 6120, 10.1): after the answer the
	// message has been stored.
	if err := ping.Send(ctx, from.session, from.address().Domain()); err != nil {
		return 0, from.failed("waiting until the message is stored", err)
	}
	for _, in := range from.drain() {
		if in.Type == "error" {
			return 0, fmt.Errorf("node %s does not keep a message for %s, who is away: %w", r.From.Node, r.To.Account.User, in.Error)
		}
	}

	began := time.Now()
	to, err := r.dial(ctx, r.To, session.Present)
	if err != nil {
		return 0, err
	}
	_, err = to.await(ctx, fmt.Sprintf("the message that %s sent at node %s while %s was away does not come with the login at node %s", r.From.Account.User, r.From.Node, r.To.Account.User, r.To.Node),
		func(in incoming) bool { return in.Body == text && in.Type != "error" })
	took := time.Since(began)
	to.close()
	if err != nil {
		return 0, err
	}

	if to, err = r.dial(ctx, r.To, session.Present); err != nil {
		return 0, err
	}
	defer to.close()
	if err := ping.Send(ctx, to.session, to.address().Domain()); err != nil {
		return 0, to.failed("waiting for what is stored", err)
	}
	for _, in := range to.drain() {
		if in.Body == text {
			return 0, fmt.Errorf("the message that %s sent to %s while that one was away comes again with every login at node %s", r.From.Account.User, r.To.Account.User, r.To.Node)
		}
	}
	return took, nil
}

// groupChat's room is in no list and vanishes with its last occupant, should
// the probe be killed before it destroys it.
func (r run) groupChat(ctx context.Context) (time.Duration, error) {
	from, to, err := r.both(ctx)
	if err != nil {
		return 0, err
	}
	defer to.close()
	defer from.close()
	service, err := from.service(ctx, muc.NS)
	if err != nil {
		return 0, err
	}
	text := nonce()
	room, err := jid.New(text, service.Domain().String(), "")
	if err != nil {
		return 0, err
	}
	const created = 201
	if _, err := from.join(ctx, room); err != nil {
		return 0, err
	}
	defer func() {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
		defer cancel()
		from.ask(bounded, stanza.SetIQ, room, owner(xmlstream.Wrap(nil, xml.StartElement{Name: xml.Name{Local: "destroy"}})), nil)
	}()
	// Without a configuration the room stays locked (XEP-0045, 10.1.3).
	settings, _ := form.New(form.Hidden("FORM_TYPE", form.Value(muc.NS+"#roomconfig")), form.Boolean("muc#roomconfig_publicroom")).Submit()
	if err := from.ask(ctx, stanza.SetIQ, room, owner(settings), nil); err != nil {
		return 0, from.failed("setting up the room "+room.String(), err)
	}
	in, err := to.join(ctx, room)
	if err != nil {
		return 0, err
	}
	if in.status(created) {
		return 0, fmt.Errorf("the room that %s opened at node %s is unknown to node %s: each node has one of its own", from.Account.User, from.Node, to.Node)
	}
	began := time.Now()
	if err := from.send(ctx, stanza.GroupChatMessage, room, text); err != nil {
		return 0, err
	}
	for _, u := range []*user{to, from} {
		_, err := u.await(ctx, fmt.Sprintf("what %s said at node %s in the room %s does not reach %s at node %s", from.Account.User, from.Node, room, u.Account.User, u.Node),
			func(in incoming) bool { return in.Type == "groupchat" && in.Body == text })
		if err != nil {
			return 0, err
		}
	}
	return time.Since(began), nil
}

// owner wraps what only a room's owner may do.
func owner(payload xml.TokenReader) xml.TokenReader {
	return xmlstream.Wrap(payload, xml.StartElement{Name: xml.Name{Space: muc.NSOwner, Local: "query"}})
}

// join enters the room, or makes it, and returns the presence that says so.
func (u *user) join(ctx context.Context, room jid.JID) (incoming, error) {
	const myself = 110
	what := "entering the room " + room.String()
	me, err := room.WithResource(u.Account.User)
	if err != nil {
		return incoming{}, u.failed(what, err)
	}
	enter := stanza.Presence{To: me}.Wrap(xmlstream.Wrap(nil, xml.StartElement{Name: xml.Name{Space: muc.NS, Local: "x"}}))
	if err := u.session.Send(ctx, enter); err != nil {
		return incoming{}, u.failed(what, err)
	}
	in, err := u.await(ctx, fmt.Sprintf("user %s at node %s waits in vain for the room %s", u.Account.User, u.Node, room),
		func(in incoming) bool {
			return in.XMLName.Local == "presence" && in.From.Bare().Equal(room) && (in.status(myself) || in.Type == "error")
		})
	if err == nil && in.Type == "error" {
		err = u.failed(what, in.Error)
	}
	return in, err
}

func (r run) archive(ctx context.Context) (time.Duration, error) {
	from, to, err := r.both(ctx)
	if err != nil {
		return 0, err
	}
	defer to.close()
	defer from.close()
	// What finds nobody would wait for the user; after this it does not.
	if _, err := deliver(ctx, from, to, session.Hints("no-store", "no-copy")); err != nil {
		return 0, err
	}
	text := nonce()
	if err := from.send(ctx, stanza.ChatMessage, to.address(), text, session.Hints("store", "no-copy")...); err != nil {
		return 0, err
	}
	if err := ping.Send(ctx, from.session, from.address().Domain()); err != nil {
		return 0, from.failed("waiting until the message is archived", err)
	}
	elsewhere := r.To
	elsewhere.Account = r.From.Account
	reader, err := r.dial(ctx, elsewhere, session.Aside)
	if err != nil {
		return 0, err
	}
	defer reader.close()
	began := time.Now()
	// The last page; the newest messages are the ones in question.
	query := history.Query{ID: text, With: to.address().Bare(), Last: true, Limit: 20}
	if err := reader.ask(ctx, stanza.SetIQ, jid.JID{}, query.TokenReader(), nil); err != nil {
		return 0, reader.failed("asking the archive", err)
	}
	for _, in := range reader.drain() { // results come before the answer
		if in.Result.Query == text && in.Result.Body == text {
			return time.Since(began), nil
		}
	}
	return 0, fmt.Errorf("the message that %s sent at node %s is not in the archive as node %s has it", r.From.Account.User, r.From.Node, reader.Node)
}

// fileSize lets two files, not three, into what the probes' accounts may keep
// on a node, see package stack: a file makes the last but one go. Were it the
// last one, ejabberd would at times remove the emptied folder under the new file.
const fileSize = 400 << 10

func (r run) upload(ctx context.Context) (time.Duration, error) {
	u, err := r.dial(ctx, r.From, session.Aside)
	if err != nil {
		return 0, err
	}
	defer u.close()
	service, err := u.service(ctx, upload.NS)
	if err != nil {
		return 0, err
	}
	slot, err := upload.GetSlot(ctx, upload.File{Name: "platter-probe.bin", Size: fileSize, Type: "application/octet-stream"}, service, u.session)
	if err != nil {
		return 0, u.failed("asking for a place for a file", err)
	}
	node := r.From.Addr.Addr().String()
	for _, at := range []*url.URL{slot.PutURL, slot.GetURL} {
		// The file stays on the node that takes it, so its address has to name it.
		if at == nil || at.Scheme != "https" || at.Hostname() != node {
			return 0, &provision.Failure{Message: fmt.Sprintf("node %s gives a file an address that is not https://%s", r.From.Node, node),
				Next: fmt.Sprintf("Run 'systemctl restart platter-agent' on node %s: it writes ejabberd's configuration anew", r.From.Node)}
		}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: session.TLSConfig(r.roots, node)}, // no proxy
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	defer client.CloseIdleConnections()

	began := time.Now()
	file := make([]byte, fileSize)
	rand.Read(file)
	put, err := slot.Put(ctx, bytes.NewReader(file))
	if err != nil {
		return 0, err
	}
	if put.Header == nil {
		put.Header = http.Header{}
	}
	put.Header.Set("Content-Type", "application/octet-stream")
	get, err := http.NewRequestWithContext(ctx, http.MethodGet, slot.GetURL.String(), nil)
	if err != nil {
		return 0, err
	}
	var back []byte
	for _, req := range []*http.Request{put, get} {
		resp, err := client.Do(req)
		if err != nil {
			return 0, &provision.Failure{Message: fmt.Sprintf("node %s: %s of a file over HTTPS: %v", r.From.Node, req.Method, bare(err)),
				Next: fmt.Sprintf("See that https://%s of node %s is reached; a certificate that does not name %s is renewed by 'platter node reinstall %s'", req.URL.Host, r.From.Node, node, r.From.Node)}
		}
		back, err = io.ReadAll(io.LimitReader(resp.Body, fileSize+1))
		resp.Body.Close()
		if err != nil || resp.StatusCode/100 != 2 {
			return 0, &provision.Failure{Message: fmt.Sprintf("node %s answers a %s of a file with %s (%v)", r.From.Node, req.Method, resp.Status, err),
				Next: fmt.Sprintf("See that the disk of node %s has space and that ejabberd may write to /var/lib/ejabberd/upload there", r.From.Node)}
		}
	}
	if !bytes.Equal(back, file) {
		return 0, fmt.Errorf("node %s gives back another file than it took", r.From.Node)
	}
	return time.Since(began), nil
}

// bare is err without the address of the request: who knows a file's address
// may read it.
func bare(err error) error {
	if e, ok := err.(*url.Error); ok {
		return e.Err
	}
	return err
}
