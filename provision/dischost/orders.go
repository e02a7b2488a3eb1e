package dischost

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
)

// orderWithin is how long a node has to ask for an order, unless it is said.
const orderWithin = 24 * time.Hour

// Order gives a node of the rack something to do and returns once that is
// journaled; Await tells how it ends. The node has to ask for it within that
// time, 0: a day. args are marshalled to JSON unless nil; they hold no secrets.
func (h *Host) Order(ctx context.Context, node string, kind provision.OrderKind, args any, within time.Duration) (id int64, err error) {
	req := client.OrderRequest{Node: node, Kind: kind}
	if args != nil {
		if req.Args, err = json.Marshal(args); err != nil {
			return 0, fmt.Errorf("order %s for %s: %w", kind, node, err)
		}
	}
	return h.give(ctx, req, within, "the disc host ordered it")
}

func (h *Host) give(ctx context.Context, req client.OrderRequest, within time.Duration, detail string) (int64, error) {
	if len(req.Args) > provision.MaxOrderArgs {
		return 0, &client.Error{Status: http.StatusRequestEntityTooLarge, Code: client.CodeTooLarge,
			Message: fmt.Sprintf("the arguments of the order %s have %d bytes, at most %d are taken", req.Kind, len(req.Args), provision.MaxOrderArgs)}
	}
	if string(req.Args) == "null" {
		req.Args = nil
	}
	if req.Kind == "" || text(string(req.Kind), 64) != string(req.Kind) {
		return 0, bad("%.80q is not the name of an order", req.Kind)
	}
	if within <= 0 {
		within = orderWithin
	}
	events := []provision.Event{{Kind: provision.EventOrder}}
	err := h.Store.Change(ctx, func() ([]provision.Event, error) {
		st, err := h.ofRack(req.Node)
		if err != nil {
			return nil, err
		}
		if err := h.takesOrders(st); err != nil {
			return nil, err
		}
		events[0].Node, events[0].Generation, events[0].Detail = st.Name, st.Installed, string(req.Kind)+": "+detail
		events[0].Order = &provision.Order{Node: st.Name, Generation: st.Installed, Kind: req.Kind, Args: req.Args,
			Deadline: h.Clock().Add(within).UTC().Round(0)}
		return events, nil
	})
	return events[0].ID, err
}

// takesOrders tells whether the node may be given one more order.
func (h *Host) takesOrders(st provision.State) error {
	refuse := func(next, format string, args ...any) error {
		return &client.Error{Status: http.StatusConflict, Code: client.CodeNoOrders, Message: fmt.Sprintf(format, args...), Next: next}
	}
	orders, _ := h.Store.Orders(st.Name)
	switch {
	case st.GrantOpen:
		return refuse(fmt.Sprintf("Boot it from the network, or run 'platter node withdraw %s' first.", st.Name),
			"%s is due for install %d and takes no orders until then", st.Name, st.Generation)
	case st.Installed == 0:
		return refuse(fmt.Sprintf("Run 'platter node show %s'.", st.Name), "%s is not installed", st.Name)
	case orders.Open() >= provision.MaxOpenOrders:
		return refuse(fmt.Sprintf("See 'platter node orders %s', and withdraw what waits there.", st.Name),
			"%s has %d orders to carry out already", st.Name, orders.Open())
	}
	return nil
}

// Await waits until the order is done, failed or withdrawn and returns it with
// its args and result. Its error is not the order's: that is its Failure.
func (h *Host) Await(ctx context.Context, id int64) (provision.OrderStatus, error) {
	for {
		o, found, changed := h.Store.FindOrder(id)
		switch {
		case !found:
			return o, unknownOrder(id)
		case o.State.Final():
			return h.withBody(ctx, o)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return o, ctx.Err()
		}
	}
}

func (h *Host) withBody(ctx context.Context, o provision.OrderStatus) (_ provision.OrderStatus, err error) {
	o.Args, o.Result, err = h.Store.OrderBody(ctx, o.ID)
	return o, err
}

func unknownOrder(id int64) error {
	return &client.Error{Status: http.StatusNotFound, Code: client.CodeUnknownOrder,
		Message: fmt.Sprintf("there is no order %d: of each node the last %d are kept", id, provision.KeptOrders), Next: "See 'platter node orders'."}
}

// withdrawOverdue withdraws the orders that no node asked for in time.
func (h *Host) withdrawOverdue(ctx context.Context) {
	overdue := func() (events []provision.Event) {
		for _, n := range h.Rack.Nodes {
			orders, _ := h.Store.Orders(n.Name)
			events = append(events, orders.Overdue(h.Clock())...)
		}
		return events
	}
	if len(overdue()) == 0 {
		return
	}
	if err := h.Store.Change(ctx, func() ([]provision.Event, error) { return overdue(), nil }); err != nil && ctx.Err() == nil {
		h.Log.Error("overdue orders were not withdrawn", "err", err)
	}
}

// nextOrder is the node's question for something to do: answered as soon as
// there is something, and after client.OrderPoll at the latest.
func (h *Host) nextOrder(_ http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	member, err := strconv.ParseBool(r.URL.Query().Get("member"))
	if err != nil {
		return nil, bad("member is %.40q, not true or false", r.URL.Query().Get("member"))
	}
	enough := time.NewTimer(h.poll)
	defer enough.Stop()
	for {
		orders, changed := h.Store.Orders(peer.Node)
		if _, ok := orders.Next(peer.Generation, member); ok {
			o, err := h.handOut(r.Context(), peer, member)
			if err != nil || o != nil {
				return client.NextOrder{Order: o}, err
			}
		}
		select {
		case <-changed:
			if _, err := h.current(peer); err != nil {
				return nil, err
			}
		case <-enough.C:
			return client.NextOrder{}, nil
		case <-r.Context().Done():
			return nil, &client.Error{Status: http.StatusServiceUnavailable, Code: client.CodeInternal, Message: "the disc host stops"}
		}
	}
}

// handOut journals that the node has its next order, before it has it.
func (h *Host) handOut(ctx context.Context, peer site.Peer, member bool) (*provision.Order, error) {
	var out *provision.Order
	err := h.Store.Change(ctx, func() ([]provision.Event, error) {
		if _, err := h.current(peer); err != nil {
			return nil, err
		}
		orders, _ := h.Store.Orders(peer.Node)
		events := orders.Overdue(h.Clock())
		for _, e := range events {
			orders, _ = orders.Apply(e)
		}
		next, ok := orders.Next(peer.Generation, member)
		if !ok {
			return events, nil
		}
		args, _, err := h.Store.OrderBody(ctx, next.ID)
		if err != nil {
			return nil, err
		}
		next.Args, out = args, &next.Order
		if next.State == provision.OrderWaiting {
			events = append(events, next.Accept())
		}
		return events, nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Operators.

func (h *Host) listOrders(_ http.ResponseWriter, r *http.Request) (any, error) {
	var names []string
	if name := r.URL.Query().Get("node"); name != "" {
		st, err := h.named(name)
		if err != nil {
			return nil, err
		}
		names = append(names, st.Name)
	} else {
		for _, n := range h.Rack.Nodes {
			names = append(names, n.Name)
		}
	}
	out := provision.Orders{}
	for _, name := range names {
		orders, _ := h.Store.Orders(name)
		out = append(out, orders...)
	}
	slices.SortFunc(out, func(a, b provision.OrderStatus) int { return int(a.ID - b.ID) })
	return out, nil
}

func (h *Host) giveOrder(w http.ResponseWriter, r *http.Request) (any, error) {
	var req client.OrderRequest
	if err := decode(w, r, provision.MaxOrderArgs+4<<10, &req); err != nil {
		return nil, err
	}
	if most := int64(365 * 24 * time.Hour / time.Second); req.Within < 0 || req.Within > most {
		return nil, bad("an order within %d seconds: it must be from 1 to %d, or 0 for a day", req.Within, most)
	}
	id, err := h.give(r.Context(), req, time.Duration(req.Within)*time.Second, "an operator ordered it")
	if err != nil {
		return nil, err
	}
	return h.order(id)
}

func (h *Host) withdrawOrder(_ http.ResponseWriter, r *http.Request) (any, error) {
	id, err := orderID(r)
	if err != nil {
		return nil, err
	}
	err = h.Store.Change(r.Context(), func() ([]provision.Event, error) {
		o, err := h.order(id)
		if err != nil {
			return nil, err
		}
		switch o.State {
		case provision.OrderWaiting:
			return []provision.Event{o.Withdraw("an operator withdrew it")}, nil
		case provision.OrderAccepted:
			err = &client.Error{Status: http.StatusConflict, Code: client.CodeOrderTaken,
				Message: fmt.Sprintf("%s has %s already", o.Node, o.Order), Next: "It ends by itself, done or failed: see 'platter node orders'."}
		default:
			err = &client.Error{Status: http.StatusConflict, Code: client.CodeOrderTaken, Message: fmt.Sprintf("%s is %s already", o.Order, o.State)}
		}
		return nil, err
	})
	if err != nil {
		return nil, err
	}
	return h.order(id)
}

// followOrder answers with a line of JSON whenever the order changes, and now
// and then as a sign of life; the last one is final and has args and result.
func (h *Host) followOrder(w http.ResponseWriter, r *http.Request) (any, error) {
	id, err := orderID(r)
	if err != nil {
		return nil, err
	}
	if _, err := h.order(id); err != nil {
		return nil, err
	}
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Cache-Control", "no-store")
	out, lines := http.NewResponseController(w), json.NewEncoder(w)
	defer out.SetWriteDeadline(time.Time{})
	alive := time.NewTicker(h.heartbeat)
	defer alive.Stop()
	for {
		o, found, changed := h.Store.FindOrder(id)
		if found && o.State.Final() {
			o, err = h.withBody(r.Context(), o)
		}
		out.SetWriteDeadline(time.Now().Add(slowReader))
		if !found || err != nil || lines.Encode(o) != nil || out.Flush() != nil {
			panic(http.ErrAbortHandler) // else it would look as if this were all
		}
		if o.State.Final() {
			return nil, nil
		}
		select {
		case <-changed:
		case <-alive.C:
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
}

func orderID(r *http.Request) (int64, error) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		return 0, bad("%.40q is not the number of an order", r.PathValue("id"))
	}
	return id, nil
}

func (h *Host) order(id int64) (provision.OrderStatus, error) {
	o, found, _ := h.Store.FindOrder(id)
	if !found {
		return o, unknownOrder(id)
	}
	return o, nil
}

// news makes what a node says of an order fit to be kept and shown. It is nil
// where there is nothing in it.
func (c cleaner) news(n *provision.OrderNews) *provision.OrderNews {
	if n == nil {
		return nil
	}
	out := provision.OrderNews{ID: n.ID, State: n.State}
	switch n.State {
	case "":
		out.Line = text(n.Line, provision.MaxOrderLine)
		if n.Total > 0 && n.Done >= 0 && n.Done <= n.Total {
			out.Done, out.Total = n.Done, n.Total
		}
	case provision.OrderDone:
		result, err := cleanJSON(n.Result)
		if err == nil && len(result) > provision.MaxOrderResult {
			err = fmt.Errorf("it has %d bytes, at most %d are kept", len(result), provision.MaxOrderResult)
		}
		out.Result = result
		if err != nil {
			out.State, out.Result = provision.OrderFailed, nil
			out.Failure = &provision.Failure{Code: "order-result", Message: "the order was carried out, but its result was not kept: " + err.Error(),
				Next: "Look at the node itself for what it found"}
		}
	case provision.OrderFailed:
		f := provision.Failure{Code: "order-failed", Message: "the node did not say why", Next: "Look at 'journalctl -u platter-agent' on the node"}
		if n.Failure != nil {
			f = c.failure(*n.Failure)
		}
		out.Failure = &f
	default:
		return nil
	}
	return &out
}

// cleanJSON takes control characters out of every string of a value: it ends
// in terminals. Lines and tabs stay.
func cleanJSON(b json.RawMessage) (json.RawMessage, error) {
	if len(b) == 0 {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	return json.Marshal(clean(v))
}

func clean(v any) any {
	switch v := v.(type) {
	case string:
		return printable(v)
	case []any:
		for i := range v {
			v[i] = clean(v[i])
		}
	case map[string]any:
		for _, k := range slices.Collect(maps.Keys(v)) {
			x := clean(v[k])
			delete(v, k)
			v[printable(k)] = x
		}
	}
	return v
}

func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c == '\n' || c == '\t' || unicode.IsPrint(c) {
			return c
		}
		return '?'
	}, s)
}
