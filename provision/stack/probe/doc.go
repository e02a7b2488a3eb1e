// Package probe proves that the IM service works the way its users need it: a
// user on one node sends a message and a user on another node gets it, over
// XMPP with TLS (RFC 6120, RFC 6121). It runs on the disc host and uses nothing
// of a node but the port that every chat client uses.
package probe
