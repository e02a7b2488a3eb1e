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
// # Handing the rack over
//
// A node takes the disc host's place by an order of kind provision.OrderHandover, for
// which it asks the node API, in this order, and from any point again:
//
//	list, file    what a successor needs but the state; nothing changes here
//	state         the journal is frozen and copied; after frozenFor it goes on
//	commit        the node has the state with this digest: provision.EventHandover is
//	              journaled in the frozen journal, then the receipt is given
//	taken         the node has kept the receipt: EventHandoverTaken, the address is
//	              given up, the program ends
//
// The event is the switch. Killed before it is durable, this disc host starts again and
// serves (provision.StartDecision); the copy that the node has is stale, because
// commit names the frozen copy and no other. Killed after it, it starts again only
// to give the same receipt again, or, once that was taken, not at all. The node
// starts to serve only with a receipt of the site that names the copy it has, which
// is not given before the event is durable. So never both serve. That one of both
// does in the end follows from the node's order, which from the copy on ends by nothing
// but success, or by the word of the old disc host that it serves again. Nor does an
// address that both want keep them: the successor waits while another machine has it,
// and tells that one that it has the receipt; a disc host that gives out the receipt and
// finds its successor at the address takes that for the word. Two guards more are for an
// operator who overrides this: a disc host is not taken back while another machine has the
// address, and pxe refuses a network on which another DHCP server answers.
//
// The wire forms are those of provision/client.
package dischost
