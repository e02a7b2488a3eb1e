// Package hostprep brings a host into the state that the rack file asks for:
// kernel settings, services, Open vSwitch bridges, libvirt, and their order at
// start and stop.
//
// Every part is a Step: Check tells what is, what should be and why, Apply
// makes it so. Apply (the function) checks, applies what deviates and checks
// again, so that nothing is said to be done that was not seen to be. What was
// there before is in the Journal first, and Undo brings it back. The agent
// runs all steps on every boot; on a host that is right they only look.
//
// Files are laid down by the installer already (Host.Prepare), so the first
// boot of a node is a prepared one.
package hostprep
