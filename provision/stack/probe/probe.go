package probe

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"platter/provision"
	"platter/provision/stack/session"
)

// Kind is one thing that users need of the service.
type Kind string

const (
	Login     Kind = "login"      // From logs in (RFC 6120, 6)
	Message   Kind = "message"    // a message of From reaches To (RFC 6121, 5)
	Offline   Kind = "offline"    // a message of From waits until To logs in (XEP-0160)
	GroupChat Kind = "group-chat" // From opens a room, To joins, a message reaches both (XEP-0045)
	Archive   Kind = "archive"    // what From wrote is found by the same user on To's node (XEP-0313)
	Upload    Kind = "upload"     // From's node takes a file and gives it back (XEP-0363)
)

// Kinds are all probes; each needs something of those before it.
var Kinds = []Kind{Login, Message, Offline, GroupChat, Archive, Upload}

// limit bounds one probe.
const limit = 30 * time.Second

// Options say who sends to whom, and where each of the two is logged in.
type Options struct {
	Domain string // XMPP domain; also the name that the certificates must carry
	CA     string // PEM; the only root that is trusted
	From   Endpoint
	To     Endpoint // not used by Login and Upload
}

// Endpoint is one user at one node.
type Endpoint struct {
	Node    string         // name of the node, for messages to people
	Addr    netip.AddrPort // XMPP client port (STARTTLS) of the node; no name is ever looked up
	Account provision.Account
}

// Run carries out one probe and returns how long the thing itself took: for a
// message, from sending it until it arrived. TLS is required before any
// credential is used, with a certificate of CA for Domain; passwords are proven
// with SCRAM (RFC 5802) and never sent.
//
// The error is a *provision.Failure that names the node at fault. Run has a
// deadline of its own; ctx may end it earlier.
func Run(ctx context.Context, kind Kind, o Options) (time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("given up after %s", limit))
	defer cancel()
	try := map[Kind]func(run, context.Context) (time.Duration, error){
		Login: run.login, Message: run.message, Offline: run.offline, GroupChat: run.groupChat, Archive: run.archive, Upload: run.upload,
	}[kind]
	if try == nil {
		return 0, fmt.Errorf("there is no probe %q", kind)
	}
	roots, err := session.Roots(o.CA)
	if err != nil {
		return 0, err
	}
	took, err := try(run{o, roots}, ctx)
	if err == nil {
		return took, nil
	}
	f := new(provision.Failure)
	if !errors.As(err, &f) {
		f = &provision.Failure{Message: err.Error(), Next: logsOf(o.From.Node)}
		if kind != Login && kind != Upload && o.From.Node != o.To.Node {
			f.Next = fmt.Sprintf("Look at 'ejabberdctl list_cluster' and /var/log/ejabberd/ejabberd.log on nodes %s and %s", o.From.Node, o.To.Node)
		}
	}
	if f.Code == "" {
		f.Code = "probe-" + string(kind)
	}
	return 0, f
}

func logsOf(node string) string {
	return "Look at /var/log/ejabberd/ejabberd.log on node " + node
}

// run is one Run.
type run struct {
	Options
	roots *x509.CertPool
}
