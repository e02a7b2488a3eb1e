// Package dischost is the disc host's mind: it ties the rack, the journal, the
// site's secrets and the images together and answers everyone who asks.
//
//   - Machines that boot: Host is the pxe.Backend. What a machine gets is
//     provision.BootDecision of what the journal says, journaled before it is
//     handed out, with a one-time token where something starts.
//   - Nodes: NodeAPI, over TLS with certificates of the site.
//   - Operators: OperatorAPI, on a socket that only root can reach. ReadOnly
//     serves the same answers and the page to anyone, and changes nothing.
//   - Run declares nodes ready, when a message has really passed.
//   - Order has a node do something, Await tells how it ended.
//
// The wire forms are those of provision/client.
package dischost
