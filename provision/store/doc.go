// Package store keeps the disc host's journal: every event that counts, in
// order, durable before it has effects. It is one SQLite file (WAL, an fsync
// at every commit) in the state directory, with one process and one writer.
// The process may be killed and the power cut at any time; the next Open goes
// on from the last event that was acknowledged.
//
// Where nodes are (provision.State) is not stored: it is what their events add
// up to, folded at Open and kept in memory. Beside the journal the file holds
// the one-time tokens of boots (hashed), the plans that go with them, and the
// number of the last batch of reports from each node.
package store
