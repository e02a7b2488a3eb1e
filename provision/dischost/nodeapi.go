package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
	"platter/provision/store"
)

// NodeAPI serves nodes. It belongs on listeners with site.ServerTLS: whoever
// shows no certificate of a node can do nothing but enrol.
func (h *Host) NodeAPI() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+client.PathEnrol, answer(h.enrol))
	mux.Handle("POST "+client.PathReports, h.machine(h.reports))
	mux.Handle("GET "+client.PathApproval, h.machine(h.approval))
	mux.Handle("GET "+client.PathPlan, h.node(h.plan))
	mux.Handle("GET "+client.PathSecrets, h.node(h.secrets))
	mux.Handle("GET "+client.PathJoin, h.node(h.join))
	mux.Handle("GET "+client.PathOrders, h.node(h.nextOrder))
	mux.Handle("PUT "+client.PathParts+"/{id}/{name}", h.node(h.partFromNode))
	mux.Handle("GET "+client.PathParts+"/{id}/{name}", h.node(h.partToNode))
	h.handleHandover(mux)
	mux.Handle("/", answer(notFound))
	return h.logged(mux)
}

// maxEnrol bounds what an unauthenticated client may send, maxFromUnknown a
// batch of a machine that is in no rack file; in bytes.
const (
	maxEnrol       = 32 << 10
	maxFromUnknown = 128 << 10
)

func (h *Host) enrol(w http.ResponseWriter, r *http.Request) (any, error) {
	var req client.EnrolRequest
	if err := decode(w, r, maxEnrol, &req); err != nil {
		return nil, err
	}
	by, err := site.RequestKey(req.CSR)
	if err != nil {
		return nil, bad("%v", err)
	}
	token, err := h.Store.SpendToken(r.Context(), req.Token, by)
	if err != nil {
		return nil, h.refuse(r, token, err)
	}
	peer := site.Peer{Node: token.Node, Generation: token.Generation, Inventory: token.Life == "inventory"}
	if _, err := h.current(peer); err != nil {
		return nil, err
	}
	cert, err := h.Site.SignNode(req.CSR, peer)
	if err != nil {
		return nil, err
	}
	return client.EnrolReply{Node: peer.Node, Generation: peer.Generation, Cert: cert, CA: h.Site.CA(), Plan: token.Plan, Time: h.Clock().UTC()}, nil
}

// refuse turns a token's error into an answer. A token that was good once says
// which node somebody tried to be.
func (h *Host) refuse(r *http.Request, token store.Token, err error) error {
	var code string
	switch {
	case errors.Is(err, store.ErrTokenUsed):
		code = client.CodeTokenUsed
	case errors.Is(err, store.ErrTokenExpired):
		code = client.CodeTokenExpired
	case errors.Is(err, store.ErrTokenUnknown):
		code = client.CodeTokenUnknown
	default:
		return err
	}
	h.Log.Warn("enrolment refused", "code", code, "node", token.Node, "remote", r.RemoteAddr)
	return &client.Error{Status: http.StatusForbidden, Code: code, Message: err.Error(), Next: "Boot the machine from the network again."}
}

// current returns the state of the node or machine that peer was enrolled as,
// as long as it still is that.
func (h *Host) current(peer site.Peer) (provision.State, error) {
	st, ok := h.Store.Node(peer.Node)
	switch {
	case peer.Inventory:
		return st, nil // may have become a node: see approval
	case !ok || !st.Known:
		return st, &client.Error{Status: http.StatusConflict, Code: client.CodeSuperseded,
			Message: peer.Node + " is not in the rack file any more", Next: "Put it back and start the disc host again, or switch the machine off."}
	case !st.Accepts(peer.Generation):
		return st, &client.Error{Status: http.StatusConflict, Code: client.CodeSuperseded,
			Message: fmt.Sprintf("%s is at generation %d, this is its install %d", peer.Node, st.Generation, peer.Generation),
			Next:    "Boot the machine from the network to bring it there, or run 'platter node withdraw " + peer.Node + "'."}
	}
	return st, nil
}

type peerHandler func(http.ResponseWriter, *http.Request, site.Peer, provision.State) (any, error)

// machine lets in whoever enrolled and still is who it was then.
func (h *Host) machine(next peerHandler) http.Handler {
	return answer(func(w http.ResponseWriter, r *http.Request) (any, error) {
		peer, ok := h.Site.NodeFromTLS(r.TLS)
		if !ok {
			return nil, &client.Error{Status: http.StatusUnauthorized, Code: client.CodeNoIdentity,
				Message: "this needs the certificate of a node of this site", Next: "Enrol first."}
		}
		st, err := h.current(peer)
		if err != nil {
			return nil, err
		}
		return next(w, r, peer, st)
	})
}

// node lets in nodes of the rack only.
func (h *Host) node(next peerHandler) http.Handler {
	return h.machine(func(w http.ResponseWriter, r *http.Request, peer site.Peer, st provision.State) (any, error) {
		if peer.Inventory {
			return nil, &client.Error{Status: http.StatusForbidden, Code: client.CodeNotApproved,
				Message: "this machine is no node of the rack", Next: fmt.Sprintf("Run 'platter node approve %s NAME' on the disc host, then boot it again.", peer.Node)}
		}
		return next(w, r, peer, st)
	})
}

func (h *Host) approval(_ http.ResponseWriter, _ *http.Request, peer site.Peer, _ provision.State) (any, error) {
	if !peer.Inventory {
		return client.Approval{Node: peer.Node}, nil
	}
	st, _ := h.Store.ByMAC(provision.MAC(peer.Node))
	return client.Approval{Node: st.Name}, nil
}

func (h *Host) plan(_ http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	return h.planOf(r.Context(), peer)
}

func (h *Host) planOf(ctx context.Context, peer site.Peer) (provision.Plan, error) {
	p, ok, err := h.Store.Plan(ctx, peer.Node, peer.Generation)
	if err == nil && !ok {
		err = fmt.Errorf("the plan of %s for generation %d is not in the journal: reinstall the node", peer.Node, peer.Generation)
	}
	return p, err
}

// secrets are those of the node's own plan: the rack and the stack file may
// have changed since.
func (h *Host) secrets(_ http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	p, err := h.planOf(r.Context(), peer)
	if err != nil {
		return nil, err
	}
	return h.Site.StackSecrets(p)
}

func (h *Host) join(_ http.ResponseWriter, _ *http.Request, peer site.Peer, _ provision.State) (any, error) {
	return provision.JoinDecision(peer.Node, h.rackStates()), nil
}

// rackStates returns the nodes of the rack in its order.
func (h *Host) rackStates() []provision.State {
	return h.Store.Nodes()[:len(h.Rack.Nodes)]
}

func (h *Host) reports(w http.ResponseWriter, r *http.Request, peer site.Peer, st provision.State) (any, error) {
	batch, err := parseBatch(r.Header.Get(client.BatchHeader))
	if err != nil {
		return nil, err
	}
	limit := int64(client.MaxBatchSize)
	if peer.Inventory {
		limit = maxFromUnknown
	}
	var reports []provision.Report
	if err := decode(w, r, limit, &reports); err != nil {
		return nil, err
	}
	if len(reports) > client.MaxBatch {
		return nil, &client.Error{Status: http.StatusRequestEntityTooLarge, Code: client.CodeTooLarge,
			Message: fmt.Sprintf("%d reports in one batch, at most %d are taken", len(reports), client.MaxBatch)}
	}
	if peer.Inventory {
		if _, isNode := h.Store.ByMAC(provision.MAC(peer.Node)); isNode {
			return nil, nil // approved meanwhile: its next boot makes it the node
		}
	}
	clean := newCleaner(st)
	events := make([]provision.Event, 0, len(reports))
	kept := 0
	for _, rep := range reports {
		if peer.Inventory {
			rep.Order = nil // it was given none
		}
		if err := stageOf(peer, rep.Stage); err != nil {
			return nil, err
		}
		rep = clean.report(rep)
		if !rep.IsProgress() {
			kept++
		}
		events = append(events, provision.Event{Kind: provision.EventReport, Node: peer.Node, MAC: st.MAC, Generation: peer.Generation, Report: &rep})
	}
	if peer.Inventory && kept > 0 && !h.spend(peer.Node, kept) {
		// It is alive, but has said enough for now.
		h.Store.Progress(provision.Event{Kind: provision.EventReport, Node: peer.Node, MAC: st.MAC, Report: &provision.Report{}})
		return nil, nil
	}
	_, err = h.Store.AppendBatch(r.Context(), peer.Node, batch, events)
	return nil, err
}

// stageOf checks that a node only says of itself what it can know. That it is
// ready is for a message to show; the other stages are the disc host's.
func stageOf(peer site.Peer, s provision.Stage) error {
	switch s {
	case "":
		return nil
	case provision.StageUnknown:
		if peer.Inventory {
			return nil
		}
	case provision.StageInstalling, provision.StageInstalled, provision.StagePreparing, provision.StageJoining, provision.StageProbing, provision.StageFailed:
		if !peer.Inventory {
			return nil
		}
	}
	return bad("%s may not report the stage %.40q", peer.Node, s)
}

func parseBatch(s string) (store.Batch, error) {
	if s == "" {
		return store.Batch{}, nil
	}
	stream, number, _ := strings.Cut(s, ":")
	seq, err := strconv.ParseInt(number, 10, 64)
	if err != nil || seq < 1 || stream == "" || len(stream) > 64 {
		return store.Batch{}, bad("the header %s is %.100q, not NAME:NUMBER", client.BatchHeader, s)
	}
	return store.Batch{Stream: stream, Seq: seq}, nil
}

// decode reads the JSON body of r into out.
func decode(w http.ResponseWriter, r *http.Request, limit int64, out any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
	err := d.Decode(out)
	if err == nil && d.More() {
		err = errors.New("there is more after the JSON value")
	}
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return &client.Error{Status: http.StatusRequestEntityTooLarge, Code: client.CodeTooLarge,
			Message: fmt.Sprintf("the request is larger than %d bytes", limit)}
	}
	if err != nil {
		return bad("the request cannot be read: %v", err)
	}
	return nil
}
