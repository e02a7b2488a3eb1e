package provision

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A handover makes an installed node the disc host of its rack. Which of the two
// machines serves is decided by one event in the journal of the old one,
// EventHandover: before it is durable the old one serves, afterwards it does
// nothing but give out the receipt for it, without which the successor does not
// start.

// Where a node that is the disc host keeps what it needs for that.
const (
	SuccessorDir = "/var/lib/platter/dischost"
	NoteFile     = "handover.json" // a HandoverNote
	ReceiptFile  = "receipt.json"  // a SignedReceipt; without it nothing is served
)

// IdentityPath is where an installed node keeps what it speaks to the disc host with,
// JSON of client.Identity.
const IdentityPath = "/etc/platter/identity.json"

// HandoverNote is what a successor notes when the state is complete.
type HandoverNote struct {
	HandoverList           // of the state
	Order        int64     `json:"order"`
	Created      time.Time `json:"created"` // the order
}

// HandoverRequest says how a handover is to be begun.
type HandoverRequest struct {
	// Busy: also while installs or orders of other nodes are under way.
	Busy bool `json:"busy,omitempty"`
}

// HandoverFile is a file that a successor needs.
type HandoverFile struct {
	Path   string `json:"path"` // below the successor's folder, see ValidHandoverPath
	Size   int64  `json:"size"` // bytes
	Digest string `json:"sha256"`
	Mode   uint32 `json:"mode"` // permission bits
}

// HandoverList are the files that a successor needs, sorted by path, and what it
// has to know about its place.
type HandoverList struct {
	Node string `json:"node"` // the successor
	// Address is the disc host's, which the successor takes over as a second one of
	// the interface that has Own.
	Address netip.Prefix   `json:"address"`
	Own     netip.Addr     `json:"own"`
	Key     string         `json:"key"` // the site's, minisign: receipts are signed with it
	Files   []HandoverFile `json:"files"`
}

// Digest is the SHA-256, hex, of the list.
func (l HandoverList) Digest() string {
	b, err := json.Marshal(l)
	if err != nil {
		panic(err) // a list always marshals
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Size is how many bytes all files have together.
func (l HandoverList) Size() (bytes int64) {
	for _, f := range l.Files {
		bytes += f.Size
	}
	return bytes
}

// HandoverReceipt states that a disc host has given up its rack. It is signed
// with the site's key.
type HandoverReceipt struct {
	Rack  string    `json:"rack"`
	Node  string    `json:"node"`  // the successor
	Order int64     `json:"order"` // that the successor carried out
	State string    `json:"state"` // digest of the list of the state that was handed over
	Time  time.Time `json:"time"`
}

// SignedReceipt is a HandoverReceipt as JSON with its signature (minisign).
type SignedReceipt struct {
	Receipt   []byte `json:"receipt"`
	Signature []byte `json:"signature"`
}

// HandoverMark is what the journal of a disc host says about having been handed
// over.
type HandoverMark struct {
	Node  string    `json:"node"` // to whom
	Order int64     `json:"order"`
	State string    `json:"state"` // see HandoverReceipt
	Time  time.Time `json:"time"`
	Taken bool      `json:"taken"` // the successor has the receipt
}

// StartKind is what a disc host does when it is started.
type StartKind string

const (
	StartServe    StartKind = "serve"
	StartHandOut  StartKind = "hand-out"  // gives out the receipt and does nothing else
	StartTakeBack StartKind = "take-back" // notes that it is the disc host again, then serves
	StartRefuse   StartKind = "refuse"
)

// StartDecision says what a disc host does whose journal has that mark, nil for
// none; takeBack: an operator says that it is to serve again.
func StartDecision(mark *HandoverMark, takeBack bool) StartKind {
	switch {
	case mark == nil:
		return StartServe
	case takeBack:
		return StartTakeBack
	case mark.Taken:
		return StartRefuse
	default:
		return StartHandOut
	}
}

// handoverFolders are what a successor's folder consists of, beside the program.
var handoverFolders = []string{"ipxe", "rack", "stack", "state", "store"}

// ValidHandoverPath tells whether p may be the path of a HandoverFile: the program
// platter, or a file below ipxe, rack, stack, state or store.
func ValidHandoverPath(p string) bool {
	folder, rest, deeper := strings.Cut(p, "/")
	return p == "platter" || deeper && rest != "" && fs.ValidPath(p) && slices.Contains(handoverFolders, folder)
}

// CheckHandover returns why the rack's disc host cannot be handed over to the
// node now, a sentence each. self is the node that the disc host itself runs on,
// if any; orders are those of each node.
func CheckHandover(node, self string, networks int, states []State, orders map[string]Orders, roll *Roll, req HandoverRequest) (why []string) {
	hinder := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }
	if node == self {
		hinder("%s is the disc host", node)
	}
	if networks != 1 {
		hinder("the rack has %d networks, and a node reaches only one of them", networks)
	}
	i := slices.IndexFunc(states, func(s State) bool { return s.Name == node })
	switch {
	case i < 0:
		hinder("%s is no node of the rack", node)
	case states[i].Stage != StageReady:
		hinder("%s is %s, not ready", node, states[i].Stage)
	case states[i].GrantOpen:
		hinder("%s is to be reinstalled", node)
	}
	if roll != nil && !roll.Ended {
		hinder("the rack is being taken to another release: 'platter stack upgrade --watch'")
	}
	for _, s := range states {
		for _, o := range orders[s.Name] {
			switch {
			case o.State.Final():
			case o.Kind == OrderHandover:
				hinder("%s is a handover to %s that has not ended: 'platter node orders %s'", o.Order, s.Name, s.Name)
			case !req.Busy:
				hinder("%s has not ended %s: 'platter node orders %s'", s.Name, o.Order, s.Name)
			}
		}
		if s.GrantOpen && s.Name != node && !req.Busy {
			hinder("the install of %s is due or under way", s.Name)
		}
	}
	return why
}
