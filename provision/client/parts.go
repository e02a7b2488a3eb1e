package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// partIdle is for how long nothing may move of a part: a database that builds
// its indexes takes nothing meanwhile.
const partIdle = time.Hour

// SendPart streams r to the operator's command that takes the part of the
// order, which this node is carrying out. r is not read before somebody takes
// it; the error's code is CodeNobody where nobody does. It is read once.
func (n *Node) SendPart(ctx context.Context, order int64, name string, r io.Reader) error {
	return sendPart(ctx, n.parts, n.id.URL+nodePart(order, name), r)
}

// TakePart opens the part of the order, which this node is carrying out, that an
// operator's command sends; the error's code is CodeNobody where none does. A
// stream that broke off ends with an error, not with io.EOF.
func (n *Node) TakePart(ctx context.Context, order int64, name string) (io.ReadCloser, error) {
	return takePart(ctx, n.parts, n.id.URL+nodePart(order, name))
}

func nodePart(order int64, name string) string {
	return fmt.Sprintf("%s/%d/%s", PathParts, order, url.PathEscape(name))
}

// SendPart is the other side of Node.TakePart.
func (o *Operator) SendPart(ctx context.Context, order int64, name string, r io.Reader) error {
	return o.explain(sendPart(ctx, o.parts, operatorPart(order, name), r))
}

// TakePart is the other side of Node.SendPart.
func (o *Operator) TakePart(ctx context.Context, order int64, name string) (io.ReadCloser, error) {
	r, err := takePart(ctx, o.parts, operatorPart(order, name))
	return r, o.explain(err)
}

func operatorPart(order int64, name string) string {
	return fmt.Sprintf("http://platter/v1/orders/%d/parts/%s", order, url.PathEscape(name))
}

func sendPart(ctx context.Context, hc *http.Client, url string, r io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, url, io.NopCloser(r))
	if err != nil {
		return err
	}
	req.Header.Set("Expect", "100-continue")
	resp, err := hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return readError(resp)
	}
	return nil
}

func takePart(ctx context.Context, hc *http.Client, url string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := hc.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, readError(resp)
	}
	return resp.Body, nil
}
