// Package agent is the life of platter-node on an installed host. It is a
// systemd service of Type=notify. On every boot it checks and prepares the
// host, makes the node a member of the IM cluster, or verifies that it is one,
// and reports; then it keeps watching. Beside that it carries out what the
// disc host orders, one order at a time, each once. A node that is a member
// needs no disc host for any of it.
package agent
