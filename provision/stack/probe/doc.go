// Package probe proves that the IM service works the way its users need it:
// they log in on any node, messages reach users on other nodes, wait for those
// who are away and are found again in the archive, rooms span nodes, and files
// are passed on. It runs on the disc host, over XMPP with TLS (RFC 6120, RFC
// 6121), and uses nothing of a node but the ports that every chat client uses.
//
// Probes do not disturb anybody: they use two accounts of their own and log in
// with a negative priority (RFC 6121, 4.7.2.3), so that several may run at
// once; only of Offline one at a time makes sense. A probe takes away what it
// made, but for what the service gives users no way to take away: one archived
// message a probe, and on each node two files of 400 KiB, which those of the
// next probes replace. The nodes empty the two accounts when their agents start.
package probe
