// Package stack runs the components of the service on one node, as the stack
// file says, and makes each a member of its cluster over all nodes.
//
//   - Prepare writes every file that they need, on the mounted target during the
//     install, so that systemd starts them in parallel with the rest of the
//     first boot. Order and waiting for each other are systemd's, at every boot:
//     Wait is what it runs before a unit that needs another component.
//   - Bring finds this node's part in every component's cluster, forms or joins
//     it, and sees all of them healthy. Killed at any point, Bring run again ends
//     well.
//   - Staging brings a release of the stack onto the node's disk, verified;
//     Release reads it there.
//   - Switch takes the node from one release of the stack to another one, wholly
//     or not at all; ResumeSwitch ends, at a boot, one that was cut off.
//   - Look tells which members of ejabberd's cluster run; Watcher also heals one
//     that was split.
//   - Doctor names what keeps the node's part of the service from working, and
//     what to do.
//   - Backup sends what users would miss; Load and Replace put it in the place of
//     what is there. Forget removes a dead node from every cluster.
//
// ejabberd is steered over the Erlang distribution protocol with erl_call,
// a C program of Debian's erlang-base that proves the cluster's cookie:
// nothing unauthenticated can change anything, and one call takes milliseconds
// where ejabberdctl starts a whole Erlang machine, which takes 10 s on an
// emulated processor.
package stack
