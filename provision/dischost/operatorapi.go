package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/store"
)

// OperatorAPI serves those who may change things. It belongs on a Unix socket
// that only root can open: it asks nobody who they are.
func (h *Host) OperatorAPI() http.Handler {
	mux := h.gets()
	mux.Handle("POST /v1/nodes/{name}/reinstall", answer(h.reinstall))
	mux.Handle("POST /v1/nodes/{name}/withdraw", answer(h.withdraw))
	mux.Handle("POST /v1/nodes/{name}/approve", answer(h.approve))
	mux.Handle("POST /v1/nodes/{name}/handover", answer(h.startHandover))
	mux.Handle("GET /v1/handover", answer(h.handedOver))
	mux.Handle("POST /v1/stack/probe", answer(h.probeStack))
	mux.Handle("GET /v1/stack/releases", answer(h.releases))
	mux.Handle("POST /v1/stack/accept", answer(h.acceptStack))
	mux.Handle("GET /v1/site/key", answer(h.siteKey))
	mux.Handle("GET /v1/stack/roll", answer(h.followRoll))
	mux.Handle("POST /v1/stack/roll", answer(h.startRoll))
	mux.Handle("POST /v1/stack/roll/plan", answer(h.planRoll))
	mux.Handle("GET /v1/orders", answer(h.listOrders))
	mux.Handle("POST /v1/orders", answer(h.giveOrder))
	mux.Handle("GET /v1/orders/{id}", answer(h.followOrder))
	mux.Handle("POST /v1/orders/{id}/withdraw", answer(h.withdrawOrder))
	mux.Handle("GET /v1/orders/{id}/parts/{name}", answer(h.partToOperator))
	mux.Handle("PUT /v1/orders/{id}/parts/{name}", answer(h.partFromOperator))
	mux.Handle("/", answer(notFound))
	return h.logged(mux)
}

// ReadOnly serves the page and what it shows, to anyone. Nothing it serves
// changes anything or is secret.
func (h *Host) ReadOnly() http.Handler {
	mux := h.gets()
	mux.Handle("GET /v1/", answer(notFound))
	mux.Handle("GET /", Page())
	return h.logged(mux)
}

func (h *Host) gets() *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/nodes", answer(func(http.ResponseWriter, *http.Request) (any, error) { return h.Store.Nodes(), nil }))
	mux.Handle("GET /v1/nodes/{name}", answer(func(_ http.ResponseWriter, r *http.Request) (any, error) { return h.named(r.PathValue("name")) }))
	mux.Handle("GET /v1/nodes/{name}/log", answer(h.nodeLog))
	mux.Handle("GET /v1/events", answer(h.events))
	return mux
}

// named returns a listed node or machine; the error lists those there are.
func (h *Host) named(name string) (provision.State, error) {
	st, ok := h.Store.Node(name)
	if ok {
		return st, nil
	}
	var names []string
	for _, s := range h.Store.Nodes() {
		names = append(names, s.Name)
	}
	return st, &client.Error{Status: http.StatusNotFound, Code: client.CodeUnknownNode,
		Message: fmt.Sprintf("there is no node %.80q", name), Next: "There are: " + strings.Join(names, ", ") + "."}
}

// ofRack is named for nodes of the rack only.
func (h *Host) ofRack(name string) (provision.State, error) {
	st, err := h.named(name)
	if err == nil && !st.Known {
		err = &client.Error{Status: http.StatusNotFound, Code: client.CodeUnknownNode,
			Message: fmt.Sprintf("%s is a machine that is in no rack file", name), Next: fmt.Sprintf("Run 'platter node approve %s NAME' to make it a node.", name)}
	}
	return st, err
}

func (h *Host) nodeLog(_ http.ResponseWriter, r *http.Request) (any, error) {
	st, err := h.named(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	after, err := afterOf(r)
	if err != nil {
		return nil, err
	}
	return h.Store.Events(r.Context(), st.Name, after, 1000)
}

func afterOf(r *http.Request) (int64, error) {
	s := r.URL.Query().Get("after")
	if id := r.Header.Get("Last-Event-ID"); id != "" {
		s = id // an EventSource that reconnects
	}
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, bad("after is %.40q, not the id of an event", s)
	}
	return n, nil
}

// change journals what decide makes of the node's state, and answers with the
// state after it.
func (h *Host) change(ctx context.Context, name string, decide func(provision.State) (provision.Event, error)) (any, error) {
	err := h.Store.Change(ctx, func() ([]provision.Event, error) {
		st, err := h.ofRack(name)
		if err != nil {
			return nil, err
		}
		e, err := decide(st)
		e.Node = st.Name
		return []provision.Event{e}, err
	})
	if err != nil {
		return nil, err
	}
	return h.named(name)
}

func (h *Host) reinstall(_ http.ResponseWriter, r *http.Request) (any, error) {
	return h.change(r.Context(), r.PathValue("name"), func(st provision.State) (provision.Event, error) {
		if h.Succession != nil && st.Name == h.Succession.Self {
			return provision.Event{}, &client.Error{Status: http.StatusConflict, Code: client.CodeConflict,
				Message: st.Name + " is the disc host, an install would erase it", Next: "Hand the rack over to another node first: 'platter host handover NODE'."}
		}
		if st.GrantOpen {
			return provision.Event{}, &client.Error{Status: http.StatusConflict, Code: client.CodeGrantOpen,
				Message: fmt.Sprintf("%s is due for install %d already", st.Name, st.Generation), Next: "Boot it from the network."}
		}
		return provision.Event{Kind: provision.EventGrant, Generation: st.Generation + 1, Detail: "an operator asked for a reinstall"}, nil
	})
}

func (h *Host) withdraw(_ http.ResponseWriter, r *http.Request) (any, error) {
	return h.change(r.Context(), r.PathValue("name"), func(st provision.State) (provision.Event, error) {
		if !st.GrantOpen {
			return provision.Event{}, &client.Error{Status: http.StatusConflict, Code: client.CodeGrantClosed,
				Message: fmt.Sprintf("no install of %s is due", st.Name)}
		}
		return provision.Event{Kind: provision.EventWithdraw, Generation: st.Generation, Detail: "an operator withdrew it"}, nil
	})
}

func (h *Host) approve(w http.ResponseWriter, r *http.Request) (any, error) {
	var req client.ApproveRequest
	if err := decode(w, r, 4<<10, &req); err != nil {
		return nil, err
	}
	hw, err := net.ParseMAC(string(req.MAC))
	if err != nil || len(hw) != 6 || hw[0]&1 == 1 {
		return nil, bad("%.40q is not the MAC address of a machine", req.MAC)
	}
	mac := provision.MAC(hw.String())
	return h.change(r.Context(), r.PathValue("name"), func(st provision.State) (provision.Event, error) {
		conflict := func(format string, args ...any) (provision.Event, error) {
			return provision.Event{}, &client.Error{Status: http.StatusConflict, Code: client.CodeConflict,
				Message: fmt.Sprintf(format, args...), Next: "To change it, write the MAC into the rack file and start the disc host again."}
		}
		if st.MAC != "" {
			return conflict("%s is the machine %s already", st.Name, st.MAC)
		}
		if other, taken := h.Store.ByMAC(mac); taken {
			return conflict("the machine %s is %s already", mac, other.Name)
		}
		return provision.Event{Kind: provision.EventApprove, MAC: mac, Detail: "an operator approved " + string(mac)}, nil
	})
}

// slowReader ends a stream whose reader takes nothing for so long; it may come
// back for what it missed.
const slowReader = 30 * time.Second

// events streams the journal as text/event-stream (HTML standard, 9.2).
func (h *Host) events(w http.ResponseWriter, r *http.Request) (any, error) {
	after, err := afterOf(r)
	if err != nil {
		return nil, err
	}
	sub := h.Store.Subscribe(after)
	defer sub.Close()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	out := http.NewResponseController(w)
	defer out.SetWriteDeadline(time.Time{})
	out.SetWriteDeadline(time.Now().Add(slowReader))
	if _, err := fmt.Fprint(w, "retry: 1000\n\n"); err != nil || out.Flush() != nil {
		return nil, nil
	}
	for {
		news, err := nextWithin(r.Context(), sub, h.heartbeat)
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			if r.Context().Err() == nil && !errors.Is(err, store.ErrClosed) {
				h.Log.Error("event stream ended", "err", err)
			}
			return nil, nil // the stream has begun: its end says it all
		}
		var b []byte
		for _, e := range news.Events {
			b = appendMessage(b, e.ID, "", e)
		}
		for _, s := range news.States {
			b = appendMessage(b, news.After, "state", s)
		}
		if len(b) == 0 {
			b = []byte(": alive\n\n")
		}
		out.SetWriteDeadline(time.Now().Add(slowReader))
		if _, err := w.Write(b); err != nil || out.Flush() != nil {
			return nil, nil
		}
	}
}

func nextWithin(ctx context.Context, sub *store.Subscription, d time.Duration) (store.News, error) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return sub.Next(ctx)
}

func appendMessage(b []byte, id int64, event string, v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // events and states always marshal
	}
	b = fmt.Appendf(b, "id: %d\n", id)
	if event != "" {
		b = fmt.Appendf(b, "event: %s\n", event)
	}
	return fmt.Appendf(b, "data: %s\n\n", data)
}
