// Package pxe starts machines over the network: it gives them an address
// (DHCP), a boot loader (iPXE, over TFTP or HTTP) and the boot script that the
// Backend decides on. One file per stage, in the order a machine meets them:
//
//   - rogue.go: before we serve a network, who else answers DHCP there
//   - dhcp.go, lease.go: the answer to a DHCP message, and the addresses given
//   - arch.go: what the machine is, by what its firmware says, and its loader
//   - ra.go: spares iPXE its wait for an IPv6 router
//   - tftp.go, http.go: the loader, the boot script, kernel and objects
//   - ipxe.go: the boot scripts, as pure functions
//   - serve.go: opens every socket, then serves
//
// A machine that has no business here loses nothing: it gets an address, and
// every boot script ends in its own disk, in another try or in a sentence on
// its screen, never in a firmware menu.
package pxe
