package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"platter/provision"
)

// PathHandover is the path of handovers in the node API: /ORDER and what is
// below it.
const PathHandover = "/node/v1/handover"

const (
	CodeHandover   = "handover"       // the rack cannot be handed over now
	CodeStale      = "handover-stale" // the state was copied too long ago: copy it again
	CodeHandedOver = "handed-over"    // another machine is the disc host now
)

// Handover lists what this node needs to be the disc host, but for the state. It
// is for the order, which this node is carrying out, as all that follow.
func (n *Node) Handover(ctx context.Context, order int64) (provision.HandoverList, error) {
	var l provision.HandoverList
	err := n.callWith(ctx, n.parts, http.MethodGet, handoverPath(order, ""), nil, nil, &l)
	return l, err
}

// HandoverState has the disc host stop its work and copy its state, and lists the
// copy. However long a slow disk takes for that, it is waited for; then the disc host
// waits for minutes at most, and works on: see CodeStale.
func (n *Node) HandoverState(ctx context.Context, order int64) (provision.HandoverList, error) {
	var l provision.HandoverList
	err := n.callWith(ctx, n.parts, http.MethodPost, handoverPath(order, "/state"), nil, struct{}{}, &l)
	return l, err
}

// HandoverFile opens a file of one of both lists, from that byte on. A stream that
// broke off ends with an error, not with io.EOF.
func (n *Node) HandoverFile(ctx context.Context, order int64, path string, from int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.id.URL+handoverPath(order, "/file")+"?path="+url.QueryEscape(path), nil)
	if err != nil {
		return nil, err
	}
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	resp, err := n.http.Do(req)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusOK && from == 0:
	case resp.StatusCode == http.StatusPartialContent && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", from)):
	default:
		defer resp.Body.Close()
		return nil, readError(resp)
	}
	return resp.Body, nil
}

// CommitHandover makes this node the disc host: it says that this node has the
// state with that digest. The disc host journals it and gives a receipt; it gives
// the same one again. Code CodeStale: the state has to be fetched again.
func (n *Node) CommitHandover(ctx context.Context, order int64, state string) (provision.SignedReceipt, error) {
	var r provision.SignedReceipt
	err := n.call(ctx, http.MethodPost, handoverPath(order, "/commit"), nil, HandoverCommit{state}, &r)
	return r, err
}

// HandoverTaken says that this node has the receipt: the old disc host gives up
// its address and ends.
func (n *Node) HandoverTaken(ctx context.Context, order int64, state string) error {
	return n.call(ctx, http.MethodPost, handoverPath(order, "/taken"), nil, HandoverCommit{state}, nil)
}

// HandoverCommit names the state that a node has.
type HandoverCommit struct {
	State string `json:"state"` // digest of its list
}

func handoverPath(order int64, rest string) string {
	return fmt.Sprintf("%s/%d%s", PathHandover, order, rest)
}

// Handover has the disc host hand the rack over to a node, and returns the order
// that the node has got for it.
func (o *Operator) Handover(ctx context.Context, node string, req provision.HandoverRequest) (provision.OrderStatus, error) {
	var out provision.OrderStatus
	err := o.call(ctx, http.MethodPost, nodePath(node, "/handover"), req, &out)
	return out, err
}

// HandedOver returns to whom the disc host was handed over, nil: to nobody.
func (o *Operator) HandedOver(ctx context.Context) (*provision.HandoverMark, error) {
	var out provision.HandoverMark
	err := o.call(ctx, http.MethodGet, "/v1/handover", nil, &out)
	if err != nil || out.Node == "" {
		return nil, err
	}
	return &out, nil
}

// Refused tells whether an answer has that code.
func Refused(err error, code string) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}
