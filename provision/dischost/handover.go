package dischost

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"aead.dev/minisign"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
	"platter/provision/store"
)

// frozenFor is how long the disc host waits for a successor that has its state:
// it answers nobody else meanwhile.
const frozenFor = 2 * time.Minute

// Succession says where the files lie that a successor needs.
type Succession struct {
	Program   string // this program
	IPXE      string // folder of the loaders
	Rack      string // the rack file
	RackFiles []string
	Stack     string // folder of the stack file; empty: the one in the program
	Images    *images.Store
	State     string // folder of the journal, the site and the leases
	// Self is the node that this disc host runs on; empty: on none.
	Self string
}

// Names in the state's folder, on the old disc host and on the new one.
const (
	JournalFile = "journal.db"
	SiteFolder  = "site"
	LeasesFile  = "leases"
	CopyFolder  = "handover" // a copy of the state, while it is handed over
)

// opener opens a file that is handed over.
type opener func() (images.File, error)

// inFolder opens a file of this machine.
func inFolder(name string) opener { return func() (images.File, error) { return os.Open(name) } }

// handover is what a Host knows of the handover under way.
type handover struct {
	mu     sync.Mutex
	order  int64
	files  map[string]opener // of the list, by path
	frozen *store.Frozen
	state  provision.HandoverList // of what is frozen
	thaw   *time.Timer

	closed bool // the program ends
	unsure bool // only the journal knows, when it is opened anew, whether the rack was handed over

	marked, taken chan struct{}
	fatal         chan error
}

func newHandover() *handover {
	return &handover{marked: make(chan struct{}), taken: make(chan struct{}), fatal: make(chan error, 1)}
}

// HandedOver is closed when the rack was handed over: this Host must do nothing
// any more but serve HandedOverAPI and HandedOverToNodes.
func (h *Host) HandedOver() <-chan struct{} { return h.handover.marked }

// Taken is closed when the successor has the receipt.
func (h *Host) Taken() <-chan struct{} { return h.handover.taken }

// Lost yields an error after which only the journal knows, when it is opened
// anew, whether the rack was handed over.
func (h *Host) Lost() <-chan error { return h.handover.fatal }

// Close ends a handover that is under way: the journal can be closed.
func (h *Host) Close() {
	h.handover.mu.Lock()
	defer h.handover.mu.Unlock()
	h.handover.closed = true
	h.release()
}

// HandedOverToNodes serves nodes when the rack has been handed over: the
// successor gets its receipt, all others are told to ask again.
func (h *Host) HandedOverToNodes() http.Handler {
	mux := http.NewServeMux()
	h.handleReceipt(mux)
	mux.Handle("/", answer(h.refuseHandedOver))
	return h.logged(mux)
}

// HandedOverAPI serves operators when the rack has been handed over.
func (h *Host) HandedOverAPI() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/handover", answer(h.handedOver))
	mux.Handle("/", answer(h.refuseHandedOver))
	return h.logged(mux)
}

func (h *Host) refuseHandedOver(http.ResponseWriter, *http.Request) (any, error) {
	e := &client.Error{Status: http.StatusServiceUnavailable, Code: client.CodeHandedOver, Message: "this disc host has been handed over"}
	if m := h.Store.HandedOver(); m != nil {
		e.Message, e.Next = "this disc host has been handed over to "+m.Node, "Ask there: 'platter node ls' on "+m.Node+"."
	}
	return nil, e
}

func (h *Host) handleReceipt(mux *http.ServeMux) {
	mux.Handle("POST "+client.PathHandover+"/{id}/commit", h.node(h.commitHandover))
	mux.Handle("POST "+client.PathHandover+"/{id}/taken", h.node(h.handoverTaken))
}

func (h *Host) handleHandover(mux *http.ServeMux) {
	mux.Handle("GET "+client.PathHandover+"/{id}", h.node(h.handoverList))
	mux.Handle("GET "+client.PathHandover+"/{id}/file", h.node(h.handoverFile))
	mux.Handle("POST "+client.PathHandover+"/{id}/state", h.node(h.handoverState))
	h.handleReceipt(mux)
}

// Operators.

func (h *Host) handedOver(http.ResponseWriter, *http.Request) (any, error) {
	if m := h.Store.HandedOver(); m != nil {
		return m, nil
	}
	return provision.HandoverMark{}, nil
}

func (h *Host) startHandover(w http.ResponseWriter, r *http.Request) (any, error) {
	var req provision.HandoverRequest
	if err := decode(w, r, 4<<10, &req); err != nil {
		return nil, err
	}
	st, err := h.ofRack(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	if h.Succession == nil {
		return nil, &client.Error{Status: http.StatusConflict, Code: client.CodeHandover, Message: "this disc host cannot be handed over: it does not know where its own files lie"}
	}
	roll, _ := h.Store.Roll()
	states, orders := h.rackStates(), map[string]provision.Orders{}
	for _, s := range states {
		orders[s.Name], _ = h.Store.Orders(s.Name)
	}
	if why := provision.CheckHandover(st.Name, h.Succession.Self, len(h.Rack.Networks), states, orders, roll, req); len(why) > 0 {
		return nil, &client.Error{Status: http.StatusConflict, Code: client.CodeHandover,
			Message: fmt.Sprintf("the rack is not handed over to %s: %s", st.Name, strings.Join(why, "; "))}
	}
	id, err := h.give(r.Context(), client.OrderRequest{Node: st.Name, Kind: provision.OrderHandover}, 10*time.Minute, "an operator hands the rack over")
	if err != nil {
		return nil, err
	}
	return h.order(id)
}

// The successor.

// successor lets in the node that is carrying the handover out.
func (h *Host) successor(r *http.Request, peer site.Peer) (provision.OrderStatus, error) {
	id, err := orderID(r)
	if err != nil {
		return provision.OrderStatus{}, err
	}
	o, found, _ := h.Store.FindOrder(id)
	if !found || o.Node != peer.Node || o.Generation != peer.Generation || o.Kind != provision.OrderHandover || o.State != provision.OrderAccepted {
		return o, &client.Error{Status: http.StatusForbidden, Code: client.CodeUnknownOrder,
			Message: fmt.Sprintf("%s is not carrying out a handover %d", peer.Node, id)}
	}
	return o, nil
}

func (h *Host) handoverList(_ http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	o, err := h.successor(r, peer)
	if err != nil {
		return nil, err
	}
	h.handover.mu.Lock()
	defer h.handover.mu.Unlock()
	list, err := h.emptyList(peer.Node)
	if err != nil {
		return nil, err
	}
	if err := h.listFiles(o.ID); err != nil {
		return nil, err
	}
	if list.Files, err = handoverFiles(h.handover.files); err != nil {
		return nil, err
	}
	return list, nil
}

// listFiles finds what the successor of this order gets; h.handover.mu is held.
func (h *Host) listFiles(order int64) error {
	files, err := h.Succession.sources()
	if err == nil {
		h.handover.order, h.handover.files = order, files
	}
	return err
}

func (h *Host) emptyList(name string) (provision.HandoverList, error) {
	l := provision.HandoverList{Node: name, Files: []provision.HandoverFile{}}
	n, ok := h.Rack.NodeByName(name)
	nw, inside := h.Rack.NetworkOf(n.Address)
	if !ok || !inside || h.Succession == nil {
		return l, fmt.Errorf("%s is in none of the rack's networks", name)
	}
	key, err := h.Site.SigningKey()
	if err != nil {
		return l, err
	}
	text, err := key.Public().(minisign.PublicKey).MarshalText()
	l.Own, l.Address, l.Key = n.Address, netip.PrefixFrom(nw.DiscHost, nw.Subnet.Bits()), string(text)
	return l, err
}

// handoverFile serves a file of one of the lists. What has been copied must still
// be as it was listed: the successor compares.
func (h *Host) handoverFile(w http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	o, err := h.successor(r, peer)
	if err != nil {
		return nil, err
	}
	h.handover.mu.Lock()
	if h.handover.order != o.ID && h.handover.frozen == nil { // this program was started since
		if err := h.listFiles(o.ID); err != nil {
			h.handover.mu.Unlock()
			return nil, err
		}
	}
	open, ok := h.handover.files[r.URL.Query().Get("path")]
	h.handover.mu.Unlock()
	if !ok {
		return nil, &client.Error{Status: http.StatusNotFound, Code: client.CodeStale, Message: fmt.Sprintf("%.200q is no file that is handed over", r.URL.Query().Get("path"))}
	}
	f, err := open()
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Cache-Control", "no-store")
	http.ServeContent(w, r, "", time.Time{}, f)
	return nil, nil
}

// handoverState stops the work and copies the state, which lasts until the
// successor commits or for frozenFor.
func (h *Host) handoverState(_ http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	o, err := h.successor(r, peer)
	if err != nil {
		return nil, err
	}
	h.handover.mu.Lock()
	defer h.handover.mu.Unlock()
	if h.handover.closed || h.handover.unsure {
		return nil, stops()
	}
	h.release()
	list, err := h.emptyList(peer.Node)
	if err != nil {
		return nil, err
	}
	if h.handover.order != o.ID {
		if err := h.listFiles(o.ID); err != nil {
			return nil, err
		}
	}
	frozen := h.Store.Freeze()
	if m := h.Store.HandedOver(); m != nil {
		frozen.Release()
		return h.refuseHandedOver(nil, nil)
	}
	files, err := h.Succession.copyState(frozen)
	if err == nil {
		list.Files, err = handoverFiles(files)
	}
	if err != nil {
		frozen.Release()
		os.RemoveAll(filepath.Join(h.Succession.State, CopyFolder))
		return nil, err
	}
	maps.Copy(h.handover.files, files)
	h.handover.frozen, h.handover.state = frozen, list
	h.handover.thaw = time.AfterFunc(frozenFor, func() {
		h.handover.mu.Lock()
		defer h.handover.mu.Unlock()
		if h.handover.frozen == frozen {
			h.Log.Warn("the successor did not take the rack: this disc host goes on", "node", peer.Node)
			h.release()
		}
	})
	h.Log.Info("the state is copied, and nothing else is answered until it has been taken", "node", peer.Node)
	return list, nil
}

// release goes on with the work; h.handover.mu is held.
func (h *Host) release() {
	if h.handover.frozen == nil {
		return
	}
	h.handover.thaw.Stop()
	h.handover.frozen.Release()
	h.handover.frozen, h.handover.state = nil, provision.HandoverList{}
	for p := range h.handover.files {
		if strings.HasPrefix(p, "state/") {
			delete(h.handover.files, p)
		}
	}
	os.RemoveAll(filepath.Join(h.Succession.State, CopyFolder))
}

// commitHandover is the switch: the event is durable before the receipt leaves.
func (h *Host) commitHandover(w http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	o, err := h.successor(r, peer)
	if err != nil {
		return nil, err
	}
	var req client.HandoverCommit
	if err := decode(w, r, 4<<10, &req); err != nil {
		return nil, err
	}
	h.handover.mu.Lock()
	defer h.handover.mu.Unlock()
	if m := h.Store.HandedOver(); m == nil {
		if h.handover.unsure {
			return nil, stops()
		}
		if h.handover.frozen == nil || h.handover.order != o.ID || req.State != h.handover.state.Digest() {
			return nil, stale(peer)
		}
		err := h.handover.frozen.HandOver(provision.Event{Node: peer.Node, Generation: peer.Generation, Order: &provision.Order{ID: o.ID, Node: o.Node, Kind: o.Kind, Generation: o.Generation}, Detail: req.State})
		h.release()
		if err != nil {
			h.handover.unsure = true
			h.handover.fatal <- err
			return nil, err
		}
		h.Log.Info("the rack is handed over", "node", peer.Node)
		close(h.handover.marked)
	} else if m.Node != peer.Node || m.Order != o.ID || m.State != req.State {
		return nil, stale(peer)
	}
	return h.receipt()
}

func stale(peer site.Peer) error {
	return &client.Error{Status: http.StatusConflict, Code: client.CodeStale, Message: "this is not the state that was copied last for " + peer.Node, Next: "Fetch the state again."}
}

// stops has the successor ask again, and keep what it has until then.
func stops() error {
	return &client.Error{Status: http.StatusServiceUnavailable, Code: client.CodeInternal, Message: "the disc host stops", Next: "Ask it again when it was started again."}
}

// receipt signs what the journal says.
func (h *Host) receipt() (provision.SignedReceipt, error) {
	m := h.Store.HandedOver()
	text, err := json.Marshal(provision.HandoverReceipt{Rack: h.Rack.Name, Node: m.Node, Order: m.Order, State: m.State, Time: m.Time})
	if err != nil {
		return provision.SignedReceipt{}, err
	}
	key, err := h.Site.SigningKey()
	if err != nil {
		return provision.SignedReceipt{}, err
	}
	return provision.SignedReceipt{Receipt: text, Signature: minisign.SignWithComments(key, text, "platter:handover", "receipt of a Platter disc host")}, nil
}

func (h *Host) handoverTaken(w http.ResponseWriter, r *http.Request, peer site.Peer, _ provision.State) (any, error) {
	o, err := h.successor(r, peer)
	if err != nil {
		return nil, err
	}
	var req client.HandoverCommit
	if err := decode(w, r, 4<<10, &req); err != nil {
		return nil, err
	}
	m := h.Store.HandedOver()
	if m == nil || m.Node != peer.Node || m.Order != o.ID || m.State != req.State {
		return nil, stale(peer)
	}
	h.handover.mu.Lock()
	defer h.handover.mu.Unlock()
	if !m.Taken {
		if err := h.Store.Append(r.Context(), provision.Event{Kind: provision.EventHandoverTaken, Node: peer.Node, Generation: peer.Generation}); err != nil {
			return nil, err
		}
	}
	// The answer leaves before the address does.
	fmt.Fprintln(w, "{}")
	http.NewResponseController(w).Flush()
	select {
	case <-h.handover.taken:
	default:
		close(h.handover.taken)
	}
	return nil, nil
}

// Files.

// loaders are those that network boots may ask for.
var loaders = []string{"undionly.kpxe", "snponly.efi", "ipxe.efi"}

// sources are all files but those of the state, by their path at the successor.
func (s *Succession) sources() (map[string]opener, error) {
	out := map[string]opener{"platter": inFolder(s.Program), "rack/rack.yaml": inFolder(s.Rack)}
	for _, name := range loaders {
		if _, err := os.Stat(filepath.Join(s.IPXE, name)); err == nil {
			out["ipxe/"+name] = inFolder(filepath.Join(s.IPXE, name))
		}
	}
	for _, name := range s.RackFiles {
		out["rack/"+filepath.ToSlash(name)] = inFolder(filepath.Join(filepath.Dir(s.Rack), name))
	}
	if s.Stack != "" {
		err := filepath.WalkDir(s.Stack, func(file string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") { // those are being written
				return err
			}
			rel, err := filepath.Rel(s.Stack, file)
			out[path.Join("stack", filepath.ToSlash(rel))] = inFolder(file)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("handover: the stack's files: %w", err)
		}
	}
	store, err := s.Images.Files()
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	for p, open := range store {
		out["store/"+p] = open
	}
	return out, nil
}

// copyState copies the state of a frozen journal and returns how to open the copies,
// by their path at the successor.
func (s *Succession) copyState(frozen *store.Frozen) (map[string]opener, error) {
	dir := filepath.Join(s.State, CopyFolder)
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir, SiteFolder), 0o700)); err != nil {
		return nil, fmt.Errorf("the state cannot be copied: %w", err)
	}
	out := map[string]opener{"state/" + JournalFile: inFolder(filepath.Join(dir, JournalFile))}
	if err := frozen.Snapshot(filepath.Join(dir, JournalFile)); err != nil {
		return nil, err
	}
	for _, name := range []string{SiteFolder + "/" + site.FileName, LeasesFile} {
		b, err := os.ReadFile(filepath.Join(s.State, name))
		if errors.Is(err, fs.ErrNotExist) && name == LeasesFile {
			continue
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			return nil, fmt.Errorf("the state cannot be copied: %w", err)
		}
		out["state/"+name] = inFolder(filepath.Join(dir, name))
	}
	return out, nil
}

// handoverFiles lists files, sorted by path. Objects of the store are named by
// their hashes, all others are read.
func handoverFiles(files map[string]opener) ([]provision.HandoverFile, error) {
	var out []provision.HandoverFile
	for p, open := range files {
		f, err := handoverFile(p, open)
		if err != nil {
			return nil, fmt.Errorf("handover: %s: %w", p, err)
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b provision.HandoverFile) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

func handoverFile(path string, open opener) (provision.HandoverFile, error) {
	f := provision.HandoverFile{Path: path, Mode: 0o644}
	if !provision.ValidHandoverPath(path) {
		return f, errors.New("the name cannot be handed over: rename it")
	}
	switch folder, _, _ := strings.Cut(path, "/"); folder {
	case "platter":
		f.Mode = 0o755
	case "state":
		f.Mode = 0o600
	}
	r, err := open()
	if err != nil {
		return f, err
	}
	defer r.Close()
	if name, ok := strings.CutPrefix(path, "store/objects/"); ok && provision.ValidDigest(name) {
		st, err := r.Stat()
		if err != nil {
			return f, err
		}
		f.Digest, f.Size = name, st.Size()
		return f, nil
	}
	h := sha256.New()
	f.Size, err = io.Copy(h, r)
	f.Digest = hex.EncodeToString(h.Sum(nil))
	return f, err
}
