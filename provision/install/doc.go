// Package install is what runs on a node before the installed system does: the
// early boot of the initramfs and the phases that bring the plan's image onto
// the plan's disk.
//
//	Boot        mounts, drivers, network, clock; then one of the lives:
//	  installer   Enrol ▸ Run
//	  inventory   reports the hardware and waits for approval
//	Run         manifest ▸ disk ▸ partition ▸ write ▸ grow ▸ files ▸ seal ▸
//	            boot-entry ▸ finish
//
// Every phase may be carried out again: what was done before a power cut is
// found and kept. Network trouble is waited out; everything else that stops an
// install is a *provision.Failure on the console, in the log and at the disc
// host. The disk boots only from phase seal on (see package disk).
package install
