// Package rack reads rack.yaml, the one file in which an operator says what a
// rack is to become, and turns it into a provision.Rack.
//
// Reading is strict: unknown keys, doubled names, addresses outside their
// network and everything else that cannot work is refused, all at once, each
// mistake with its line.
package rack
