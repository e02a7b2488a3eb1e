// Package provision is the contract between the disc host and the nodes: the
// words both sides use (Rack, Node, Image, Plan, Stage, Report, Event, State)
// and the pure decisions made of them.
//
//   - PlanFor turns one node of a rack, its generation and an image into the
//     Plan that carries out everything one install does.
//   - BootDecision says what a machine that asks to boot gets. DHCP, TFTP,
//     iPXE scripts and UEFI HTTP boot all ask it and nobody else decides.
//   - State.Apply folds journal events into where a node is, Orders.Apply into
//     what became of the orders that it was given.
//   - JoinDecision says whether a node forms the cluster, joins it or waits.
//
// The package does no I/O, reads no clock and imports nothing of ours.
package provision
