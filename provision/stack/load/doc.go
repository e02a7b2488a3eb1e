// Package load measures what the IM service is like for many users at once: it
// logs them in, spread over the nodes, lets each send a message now and then to
// another one, on another node where there is one, and measures the time from
// sending until the other's session has it.
//
// A user whose connection breaks logs in again, on the next node. Nothing that
// a simulated user does is archived or waits for anybody (XEP-0334). The
// accounts have to be there: see LoadAccounts in packages provision and stack.
package load
