// Package disk lays an image on one disk so that the disk boots when, and only
// when, every byte of the install is on it.
//
//   - List sees the machine's disks, Select picks the one the plan asks for.
//   - Open locks the disk (or a file that stands in for one) as a Volume.
//   - Inspect tells what is on it, Permit whether the plan may replace that.
//   - Begin makes the disk unbootable and writes the marker, or takes up an
//     install that was cut off. Install.Write fetches, verifies, decompresses
//     and writes the frames. Device.Mount reaches the root file system while
//     there is no partition table yet. Install.Commit writes the table and, as
//     the very last sector, the boot code.
//
// The order is what makes a cut at any point safe: boot code and tables go
// first and come back last, and the marker counts a frame as written only
// after the disk has confirmed it.
//
// The marker lies between the GPT entries and the first partition:
//
//	0        protective MBR and BIOS boot code
//	1 sector primary GPT header, then its entries
//	128 KiB  marker, copy A
//	512 KiB  marker, copy B
//	1 MiB    first partition
//	...
//	end      backup GPT
package disk
