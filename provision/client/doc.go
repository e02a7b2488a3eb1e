// Package client speaks the disc host's two APIs. It holds no server code: it
// is what nodes and the command line import.
//
// # Node API
//
// HTTPS with TLS 1.3 and JSON bodies, on provision.NodeAPIPort. A node trades
// the one-time token of its boot for an identity ([Enrol]): it checks that the
// server's chain ends in the CA whose pin the boot carried, makes a key of its
// own and has it signed. From then on ([NewNode]) both sides show
// certificates of the site's CA.
//
//	POST /node/v1/enrol    EnrolRequest -> EnrolReply
//	GET  /node/v1/plan     -> provision.Plan
//	POST /node/v1/reports  []provision.Report
//	GET  /node/v1/secrets  -> provision.StackSecrets
//	GET  /node/v1/join     -> provision.Join
//	GET  /node/v1/orders   -> NextOrder, waits for one up to OrderPoll
//	GET  /node/v1/approval -> Approval (machines that are in no rack file)
//	     /node/v1/handover/ORDER, see Node.Handover and what follows it
//
// A batch of reports carries the header [BatchHeader]; the server takes each
// batch once, however often a lost reply makes the node send it. [Reporter]
// does all this in the background.
//
// # Operator API
//
// HTTP over a Unix socket ([NewOperator]); the GETs are also served, read-only,
// where the web page is, but for those of orders. Events come as text/event-stream (HTML standard,
// 9.2): events of the journal have its id, "event: state" carries a
// provision.State that replaces what was known of that node.
//
// Every error of both APIs is an [Error] as JSON.
package client
