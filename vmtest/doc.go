// Package vmtest is the lab: blank virtual machines that stand in for the
// servers of a rack, on a network of their own that leads nowhere.
//
// A lab is a state folder and what runs from it:
//
//   - a network namespace with lo and one bridge, which holds the disc host's
//     address and to which every machine's NIC is attached; there is no route
//     and no link to any other namespace;
//   - a libvirtd of its own, in that namespace and in a mount namespace where
//     /run, /var and /etc/libvirt are folders of the state folder, so that it
//     never meets a system libvirtd, another lab, D-Bus, machined or cgroups;
//   - one libvirt domain a machine, BIOS or UEFI, which boots from the network
//     first and then from its disks, and whose serial console is kept as a file.
//
// Nothing is remembered that could be wrong after a crash: a process belongs
// to a lab if it lives in the lab's network namespace or sees the lab's var
// folder as its /var, and both can be asked of the kernel. So Down finds
// everything however Up ended.
//
//	DIR/lab.json           what the lab was asked to be; the first thing Up writes
//	DIR/console/NAME.log   serial console of a machine, appended over power cycles
//	DIR/etc, run, var      /etc/libvirt, /run and /var of the lab's libvirtd
//	DIR/var/lib/libvirt/images/NAME-N.raw   disk N of a machine, sparse
//
// The lab needs root, libvirtd, QEMU and, for UEFI machines, OVMF.
package vmtest
