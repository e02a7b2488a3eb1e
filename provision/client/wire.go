package client

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"platter/provision"
)

// Paths of the node API.
const (
	PathEnrol    = "/node/v1/enrol"
	PathPlan     = "/node/v1/plan"
	PathReports  = "/node/v1/reports"
	PathSecrets  = "/node/v1/secrets"
	PathJoin     = "/node/v1/join"
	PathApproval = "/node/v1/approval"
	PathOrders   = "/node/v1/orders"
	PathParts    = "/node/v1/parts" // /ORDER/NAME
)

// Limits of one batch of reports, kept by the client and enforced by the server.
const (
	MaxBatch     = 256     // reports
	MaxBatchSize = 2 << 20 // bytes of JSON; one order's result fits with what else is said
	MaxLogLine   = 4 << 10 // bytes of one line; longer ones are cut
)

// BatchHeader names a batch of reports: a stream's random name, a colon, and
// a number that rises within the stream.
const BatchHeader = "Platter-Batch"

// EnrolRequest trades the token of a boot for an identity.
type EnrolRequest struct {
	Token string `json:"token"`
	CSR   string `json:"csr"` // PKCS #10, PEM; its subject is ignored
}

// EnrolReply is the node's identity and, for an installer, its plan.
type EnrolReply struct {
	Node       string          `json:"node"` // name, or the MAC of an unknown machine
	Generation int             `json:"generation"`
	Cert       string          `json:"cert"` // PEM
	CA         string          `json:"ca"`   // PEM
	Plan       *provision.Plan `json:"plan,omitempty"`
	Time       time.Time       `json:"time"` // the disc host's clock
}

// Approval tells a machine that is in no rack file which node it has become.
type Approval struct {
	Node string `json:"node,omitempty"` // empty: still waits
}

// ApproveRequest names the machine that is to be a node.
type ApproveRequest struct {
	MAC provision.MAC `json:"mac"`
}

// NextOrder answers a node that asked for what it is to do.
type NextOrder struct {
	Order *provision.Order `json:"order,omitempty"` // nil: nothing for now
}

// OrderPoll is for how long the disc host lets a node wait for an order; below
// the limit on silence.
const OrderPoll = 25 * time.Second

// OrderRequest gives a node an order.
type OrderRequest struct {
	Node string              `json:"node"`
	Kind provision.OrderKind `json:"kind"`
	Args json.RawMessage     `json:"args,omitempty"`
	// Within is how long the node has to ask for it, in seconds; 0: a day.
	Within int64 `json:"within,omitempty"`
}

// AcceptNews is a line of an acceptance: what is going on or, in the last one,
// the report.
type AcceptNews struct {
	Step  string `json:"step,omitempty"`
	Line  string `json:"line,omitempty"`
	Done  int64  `json:"done,omitempty"`
	Total int64  `json:"total,omitempty"`
	// Failed is why the acceptance could not be carried out; it is the last line.
	Failed string `json:"failed,omitempty"`

	Name      string          `json:"name,omitempty"` // of the report's file; set in the last line only
	Passed    bool            `json:"passed,omitempty"`
	Wrong     []string        `json:"wrong,omitempty"`  // why not, a sentence each
	Report    json.RawMessage `json:"report,omitempty"` // an accept.Report
	HTML      []byte          `json:"html,omitempty"`
	Signature []byte          `json:"signature,omitempty"` // of HTML, minisign
}

// SiteKey is the public key of what the disc host signs.
type SiteKey struct {
	Key string `json:"key"` // as minisign writes it
	ID  string `json:"id"`
}

// Codes of an Error that programs tell apart.
const (
	CodeTokenUsed    = "token-used"    // a second machine, or a second key, shows a spent token
	CodeTokenExpired = "token-expired" // the boot took too long
	CodeTokenUnknown = "token-unknown" // never issued, or voided by a newer boot
	CodeSuperseded   = "superseded"    // the identity is of an older generation
	CodeNoIdentity   = "no-identity"   // the request needs a node's certificate
	CodeNotApproved  = "not-approved"  // an unknown machine asked for what only nodes get
	CodeBadRequest   = "bad-request"   // sending it again does not help
	CodeTooLarge     = "too-large"     // so here
	CodeUnknownNode  = "unknown-node"  // no node has that name
	CodeGrantOpen    = "grant-open"    // an install is already due
	CodeGrantClosed  = "grant-closed"  // there is no install to withdraw
	CodeProbing      = "probing"       // another operator's probes or acceptance run
	CodeNotWhole     = "not-whole"     // the cluster misses members
	CodeConflict     = "conflict"      // the MAC or the node is taken
	CodeUnknownOrder = "unknown-order" // no order has that id, or it was forgotten
	CodeOrderTaken   = "order-taken"   // the node has it already, or it has ended
	CodeNoOrders     = "no-orders"     // the node takes none now
	CodeNoRoll       = "no-roll"       // the rack cannot go to another release now
	CodeNobody       = "nobody"        // the other side of a part is not there
	CodeInternal     = "internal"      // the disc host failed; its log says why
	CodeWrongServer  = "wrong-server"  // what answers is not this site's disc host
	CodeNotRunning   = "not-running"   // no disc host answers on the socket
)

// Error is an answer that says no: what happened and what to do next.
type Error struct {
	Status  int    `json:"-"` // HTTP status; 0 when the server was not asked
	Code    string `json:"code"`
	Message string `json:"message"` // one sentence without a full stop
	Next    string `json:"next,omitempty"`
	cause   error
}

func (e *Error) Error() string {
	if e.Next == "" {
		return e.Message
	}
	return e.Message + ". " + e.Next
}

func (e *Error) Unwrap() error { return e.cause }

// Retryable tells whether the same request may succeed later: the server could
// not be reached, broke off, or failed by itself.
func Retryable(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) {
		return false
	}
	// A connection that timed out calls itself context.DeadlineExceeded too,
	// though nobody's context ended: a server that is switched off answers so.
	var op *net.OpError
	if errors.Is(err, context.DeadlineExceeded) && !errors.As(err, &op) {
		return false
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code == CodeNotRunning || e.Status >= 500 || e.Status == http.StatusTooManyRequests
	}
	return true
}

// Pin returns the pin of a CA: SHA-256, hex, of its SubjectPublicKeyInfo (the
// digest of RFC 7469, 2.4).
func Pin(ca *x509.Certificate) string {
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// maxReply bounds what is read of one reply, in bytes.
const maxReply = 8 << 20

// call sends one request and decodes the reply into out, unless out is nil.
func call(ctx context.Context, hc *http.Client, method, url string, header http.Header, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, url, err)
		}
		body = strings.NewReader(string(b))
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, url, err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := hc.Do(req)
	if err != nil {
		return err // names method and URL by itself
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return readError(resp)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("%s %s: the reply broke off: %w", method, url, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s %s: the reply cannot be read: %w", method, url, err)
	}
	return nil
}

// readError makes an Error of any reply, also of one that is not ours.
func readError(resp *http.Response) error {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	e := &Error{}
	if json.Unmarshal(b, e) != nil || e.Code == "" {
		text, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
		e = &Error{Code: fmt.Sprintf("http-%d", resp.StatusCode),
			Message: fmt.Sprintf("%s answered %s %.200s", resp.Request.URL, resp.Status, text)}
	}
	e.Status = resp.StatusCode
	return e
}
