// Package site holds what one site is trusted by: its certificate authority,
// the cluster's cookie, the seed that the named secrets of its stack are derived
// from, and the passwords of the two probe accounts. They are made at the disc
// host's first start and live in one file that only root may read. Whoever has
// that file can speak as any node and as the disc host.
//
// Certificates (RFC 5280) are ECDSA P-256 and valid for as long as the CA:
// clocks in a rack are often wrong, and what ends a node's rights is its
// generation, not a date. A node's certificate has the node's name as common
// name, its generation as organizational unit, and as organization whether it
// belongs to a node or to a machine that is in no rack file. It is good for the
// node API and nothing else, and the certificates of the IM stack are good for
// everything but the node API.
package site
