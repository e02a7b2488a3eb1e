// Package hostprep brings a host into the state that the rack file asks for:
// services, Open vSwitch bridges, libvirt, and their order at start and stop.
//
// Every part is a Step: Check tells what is and what should be, Apply makes it
// so. Run checks, applies what deviates and checks again, so that nothing is
// said to be done that was not seen to be. The agent runs all steps on every
// boot; on a host that is right they only look.
package hostprep
