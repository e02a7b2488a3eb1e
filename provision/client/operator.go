package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"platter/provision"
)

// Operator speaks to the disc host on this machine.
type Operator struct {
	socket string
	http   *http.Client
	parts  *http.Client // more patient
}

// NewOperator speaks over the Unix socket at path socket; it does not connect yet.
func NewOperator(socket string) *Operator {
	slow := transport("unix", socket, partIdle)
	slow.ExpectContinueTimeout = partIdle
	return &Operator{socket, &http.Client{Transport: transport("unix", socket, idleLimit)}, &http.Client{Transport: slow}}
}

// Close closes idle connections.
func (o *Operator) Close() { o.http.CloseIdleConnections(); o.parts.CloseIdleConnections() }

// Nodes returns all nodes in rack order, then machines that are in no rack file.
func (o *Operator) Nodes(ctx context.Context) ([]provision.State, error) {
	var out []provision.State
	err := o.call(ctx, http.MethodGet, "/v1/nodes", nil, &out)
	return out, err
}

// Node returns one node.
func (o *Operator) Node(ctx context.Context, name string) (provision.State, error) {
	var out provision.State
	err := o.call(ctx, http.MethodGet, nodePath(name, ""), nil, &out)
	return out, err
}

// Log returns the node's journal events with an id above after, oldest first.
// A long journal comes in parts: ask again after the last id until none comes.
func (o *Operator) Log(ctx context.Context, name string, after int64) ([]provision.Event, error) {
	var out []provision.Event
	err := o.call(ctx, http.MethodGet, nodePath(name, "/log")+"?after="+strconv.FormatInt(after, 10), nil, &out)
	return out, err
}

// Reinstall raises the node's generation: its next network boot installs it.
func (o *Operator) Reinstall(ctx context.Context, name string) (provision.State, error) {
	return o.change(ctx, name, "/reinstall", nil)
}

// Withdraw closes the node's open grant without an install.
func (o *Operator) Withdraw(ctx context.Context, name string) (provision.State, error) {
	return o.change(ctx, name, "/withdraw", nil)
}

// Approve makes the machine with that MAC the node, which has none yet.
func (o *Operator) Approve(ctx context.Context, name string, mac provision.MAC) (provision.State, error) {
	return o.change(ctx, name, "/approve", ApproveRequest{MAC: mac})
}

// ProbeStack has the disc host probe the IM service on nodes, or on every node
// of the rack where none is named, and yields each result as it comes.
func (o *Operator) ProbeStack(ctx context.Context, nodes ...string) iter.Seq2[provision.ProbeResult, error] {
	return stream[provision.ProbeResult](ctx, o, http.MethodPost, "/v1/stack/probe?"+url.Values{"node": nodes}.Encode(), nil, "all probes were done")
}

// Accept has the disc host carry an acceptance out and yields what it says; the
// last line has the report or says why there is none. options are
// accept.Options. Whoever stops ranging ends it; the disc host then takes back
// what it made for it.
func (o *Operator) Accept(ctx context.Context, options any) iter.Seq2[AcceptNews, error] {
	return stream[AcceptNews](ctx, o, http.MethodPost, "/v1/stack/accept", options, "the acceptance was done")
}

// SiteKey returns the key that the disc host's reports are signed with.
func (o *Operator) SiteKey(ctx context.Context) (SiteKey, error) {
	var out SiteKey
	err := o.call(ctx, http.MethodGet, "/v1/site/key", nil, &out)
	return out, err
}

// stream yields the lines of JSON that the disc host answers with, and an error
// where it breaks off before what end names.
func stream[T any](ctx context.Context, o *Operator, method, path string, in any, end string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		var body io.Reader
		if in != nil {
			b, err := json.Marshal(in)
			if err != nil {
				yield(none, err)
				return
			}
			body = bytes.NewReader(b)
		}
		req, err := http.NewRequestWithContext(ctx, method, "http://platter"+path, body)
		if err != nil {
			yield(none, err)
			return
		}
		resp, err := o.http.Do(req)
		if err != nil {
			yield(none, o.explain(err))
			return
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			yield(none, readError(resp))
			return
		}
		for in := json.NewDecoder(resp.Body); ; {
			var v T
			switch err := in.Decode(&v); {
			case err == io.EOF:
				return
			case err != nil:
				yield(none, fmt.Errorf("the disc host broke off before %s: %w", end, err))
				return
			case !yield(v, nil):
				return
			}
		}
	}
}

// Releases returns the releases of the stack that the disc host has, the newest
// first, and the nodes that have them.
func (o *Operator) Releases(ctx context.Context) ([]provision.StoredRelease, error) {
	var out []provision.StoredRelease
	err := o.call(ctx, http.MethodGet, "/v1/stack/releases", nil, &out)
	return out, err
}

// Orders returns the orders of the node, or of every node of the rack where
// name is empty, oldest first, without their args and results.
func (o *Operator) Orders(ctx context.Context, name string) ([]provision.OrderStatus, error) {
	var out []provision.OrderStatus
	err := o.call(ctx, http.MethodGet, "/v1/orders?"+url.Values{"node": {name}}.Encode(), nil, &out)
	return out, err
}

// Order gives a node an order, which the node has to ask for within that time;
// 0: a day. args are marshalled to JSON unless nil.
func (o *Operator) Order(ctx context.Context, node string, kind provision.OrderKind, args any, within time.Duration) (provision.OrderStatus, error) {
	var out provision.OrderStatus
	req := OrderRequest{Node: node, Kind: kind, Within: int64((within + time.Second - 1) / time.Second)}
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return out, fmt.Errorf("order %s for %s: %w", kind, node, err)
		}
		req.Args = b
	}
	err := o.call(ctx, http.MethodPost, "/v1/orders", req, &out)
	return out, err
}

// WithdrawOrder takes an order back that no node has asked for yet.
func (o *Operator) WithdrawOrder(ctx context.Context, id int64) (provision.OrderStatus, error) {
	var out provision.OrderStatus
	err := o.call(ctx, http.MethodPost, fmt.Sprintf("/v1/orders/%d/withdraw", id), nil, &out)
	return out, err
}

// FollowOrder yields the order as it is and then whenever it changes. The last
// one is final and has args and result. An error ends it; the order goes on.
func (o *Operator) FollowOrder(ctx context.Context, id int64) iter.Seq2[provision.OrderStatus, error] {
	return stream[provision.OrderStatus](ctx, o, http.MethodGet, fmt.Sprintf("/v1/orders/%d", id), nil, "the order had ended")
}

// Roll begins to take the rack's nodes to another release.
func (o *Operator) Roll(ctx context.Context, ask provision.RollRequest) (provision.Roll, error) {
	var out provision.Roll
	err := o.call(ctx, http.MethodPost, "/v1/stack/roll", ask, &out)
	return out, err
}

// PlanRoll tells what Roll would change on each node, and changes nothing.
func (o *Operator) PlanRoll(ctx context.Context, ask provision.RollRequest) ([]provision.RollPlan, error) {
	var out []provision.RollPlan
	err := o.call(ctx, http.MethodPost, "/v1/stack/roll/plan", ask, &out)
	return out, err
}

// FollowRoll yields the last roll as it is and then whenever it changes, until
// it has ended. An error ends that; the roll goes on.
func (o *Operator) FollowRoll(ctx context.Context) iter.Seq2[provision.Roll, error] {
	return stream[provision.Roll](ctx, o, http.MethodGet, "/v1/stack/roll", nil, "the roll had ended")
}

func (o *Operator) change(ctx context.Context, name, what string, in any) (provision.State, error) {
	var out provision.State
	err := o.call(ctx, http.MethodPost, nodePath(name, what), in, &out)
	return out, err
}

func nodePath(name, rest string) string { return "/v1/nodes/" + url.PathEscape(name) + rest }

func (o *Operator) call(ctx context.Context, method, path string, in, out any) error {
	return o.explain(call(ctx, o.http, method, "http://platter"+path, nil, in, out))
}

// explain turns a socket nobody serves into a sentence.
func (o *Operator) explain(err error) error {
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return &Error{Code: CodeNotRunning, cause: err,
			Message: "no disc host answers at " + o.socket, Next: "Start it with 'platter serve -c rack.yaml'."}
	case errors.Is(err, os.ErrPermission):
		return &Error{Code: CodeNotRunning, cause: err,
			Message: "this user may not use " + o.socket, Next: "Run the command as root."}
	}
	return err
}

// Update is one thing that the event stream says: exactly one field is set.
type Update struct {
	Event *provision.Event // of the journal
	State *provision.State // replaces what was known of that node
}

// Events yields the journal's events with an id above after (below 0: only
// those to come), then every node's state, then whatever happens, until ctx
// ends. When the connection is lost it yields the error and goes on from the
// last event seen, without a gap; a caller that would not wait stops ranging.
func (o *Operator) Events(ctx context.Context, after int64) iter.Seq2[Update, error] {
	return func(yield func(Update, error) bool) {
		for failures := 0; ctx.Err() == nil; {
			last, heard, stopped, err := o.follow(ctx, after, yield)
			after = last
			if stopped || ctx.Err() != nil {
				return
			}
			if heard {
				failures = 0
			}
			if err != nil && !yield(Update{}, o.explain(err)) {
				return
			}
			if provision.Sleep(ctx, backoff(min(failures, 3))) != nil {
				return
			}
			failures++
		}
	}
}

// follow reads one connection's events and returns the last id seen, whether
// anything came, whether the caller had enough, and why it ended.
func (o *Operator) follow(ctx context.Context, after int64, yield func(Update, error) bool) (last int64, heard, stopped bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://platter/v1/events?after="+strconv.FormatInt(after, 10), nil)
	if err != nil {
		return after, false, false, err
	}
	resp, err := o.http.Do(req)
	if err != nil {
		return after, false, false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return after, false, false, readError(resp)
	}
	var kind, id string
	var data strings.Builder
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, maxReply)
	for in.Scan() {
		field, value, _ := strings.Cut(in.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case in.Text() == "" && data.Len() > 0:
			var u Update
			var target any
			if kind == "state" {
				u.State = new(provision.State)
				target = u.State
			} else {
				u.Event = new(provision.Event)
				target = u.Event
			}
			if err := json.Unmarshal([]byte(data.String()), target); err != nil {
				return after, heard, false, fmt.Errorf("an event cannot be read: %w", err)
			}
			heard = true
			if n, err := strconv.ParseInt(id, 10, 64); err == nil {
				after = n // of a state: what is journaled up to here has been sent
			}
			if !yield(u, nil) {
				return after, heard, true, nil
			}
			kind, id = "", ""
			data.Reset()
		case field == "event":
			kind = value
		case field == "id":
			id = value
		case field == "data":
			data.WriteString(value)
		}
	}
	if in.Err() != nil {
		return after, heard, false, fmt.Errorf("the event stream broke off: %w", in.Err())
	}
	return after, heard, false, fmt.Errorf("the disc host ended the event stream: %w", io.ErrUnexpectedEOF)
}
