// Package stack runs the IM service on one node: an ejabberd that is one
// member of a cluster over all nodes of the rack.
//
//   - Prepare writes every file that ejabberd needs, on the mounted target
//     during the install, so that systemd starts it in parallel with the rest
//     of the first boot.
//   - Bring waits for it, forms the cluster or joins it, and makes the probe
//     accounts. Killed at any point, Bring run again ends well.
//   - Look tells which members run; Watcher also heals a cluster that was split.
//
// The service is steered over the Erlang distribution protocol with erl_call,
// a C program of Debian's erlang-base that proves the cluster's cookie:
// nothing unauthenticated can change anything, and one call takes milliseconds
// where ejabberdctl starts a whole Erlang machine, which takes 10 s on an
// emulated processor.
package stack
