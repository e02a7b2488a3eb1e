package dischost

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
)

// passages lead parts of orders from nodes to operators' commands and back. The
// disc host keeps nothing of them: what passes are people's messages.
type passages struct {
	mu   sync.Mutex
	open map[passage]*meeting
}

type passage struct {
	order  int64
	name   string
	toNode bool
}

// meeting is where the two sides of a passage find each other.
type meeting struct {
	sides int
	pipe  chan *io.PipeReader
}

// enter returns the meeting of a passage and what has to be called in the end.
func (p *passages) enter(at passage) (*meeting, func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open == nil {
		p.open = map[passage]*meeting{}
	}
	m := p.open[at]
	if m == nil {
		m = &meeting{pipe: make(chan *io.PipeReader)}
		p.open[at] = m
	}
	m.sides++
	return m, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if m.sides--; m.sides == 0 {
			delete(p.open, at)
		}
	}
}

func nobody(at passage, does string) error {
	return &client.Error{Status: http.StatusConflict, Code: client.CodeNobody,
		Message: fmt.Sprintf("nobody %s the part %s of order %d", does, at.name, at.order), Next: "Run the command that needs it again."}
}

var errGone = errors.New("the other side has gone")

// pass leads the request's body to whoever takes it.
func (h *Host) pass(w http.ResponseWriter, r *http.Request, at passage) (any, error) {
	m, leave := h.parts.enter(at)
	defer leave()
	in, out := io.Pipe()
	select {
	case m.pipe <- in:
	case <-time.After(h.poll):
		return nil, nobody(at, "takes")
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	_, err := io.Copy(out, http.MaxBytesReader(w, r.Body, provision.MaxPart))
	out.CloseWithError(err) // nil: the end
	if err != nil {
		return nil, &client.Error{Status: http.StatusBadGateway, Code: client.CodeNobody,
			Message: fmt.Sprintf("the part %s of order %d broke off: %v", at.name, at.order, err), Next: "Run the command that needs it again."}
	}
	return nil, nil
}

// take answers with what somebody gives.
func (h *Host) take(w http.ResponseWriter, r *http.Request, at passage) (any, error) {
	m, leave := h.parts.enter(at)
	defer leave()
	select {
	case in := <-m.pipe:
		defer in.CloseWithError(errGone)
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Cache-Control", "no-store")
		if _, err := io.Copy(w, in); err != nil {
			panic(http.ErrAbortHandler) // else it would look as if this were all
		}
		return nil, nil
	case <-time.After(h.poll):
		return nil, nobody(at, "sends")
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// ofNode is the passage that a node asks for: of an order that it is carrying
// out.
func (h *Host) ofNode(r *http.Request, peer site.Peer, toNode bool) (passage, error) {
	at, err := passageOf(r, toNode)
	if err != nil {
		return at, err
	}
	o, found, _ := h.Store.FindOrder(at.order)
	if !found || o.Node != peer.Node || o.Generation != peer.Generation || o.State != provision.OrderAccepted {
		return at, &client.Error{Status: http.StatusForbidden, Code: client.CodeUnknownOrder,
			Message: fmt.Sprintf("%s is not carrying out an order %d", peer.Node, at.order)}
	}
	return at, nil
}

func passageOf(r *http.Request, toNode bool) (passage, error) {
	id, err := orderID(r)
	at := passage{id, r.PathValue("name"), toNode}
	if err == nil && !provision.ValidPartName(at.name) {
		err = bad("%.80q is not the name of a part", at.name)
	}
	return at, err
}

func (h *Host) partFromNode(w http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	at, err := h.ofNode(r, peer, false)
	if err != nil {
		return nil, err
	}
	return h.pass(w, r, at)
}

func (h *Host) partToNode(w http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	at, err := h.ofNode(r, peer, true)
	if err != nil {
		return nil, err
	}
	return h.take(w, r, at)
}

// ofOperator is the passage that an operator's command asks for: of an order
// that has not ended.
func (h *Host) ofOperator(r *http.Request, toNode bool) (passage, error) {
	at, err := passageOf(r, toNode)
	if err != nil {
		return at, err
	}
	o, err := h.order(at.order)
	if err == nil && o.State.Final() {
		err = &client.Error{Status: http.StatusConflict, Code: client.CodeOrderTaken, Message: fmt.Sprintf("%s is %s already", o.Order, o.State)}
	}
	return at, err
}

func (h *Host) partToOperator(w http.ResponseWriter, r *http.Request) (any, error) {
	at, err := h.ofOperator(r, false)
	if err != nil {
		return nil, err
	}
	return h.take(w, r, at)
}

func (h *Host) partFromOperator(w http.ResponseWriter, r *http.Request) (any, error) {
	at, err := h.ofOperator(r, true)
	if err != nil {
		return nil, err
	}
	return h.pass(w, r, at)
}
