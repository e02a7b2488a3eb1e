package provision

// FrameSize is the raw size, in bytes, of the largest frame.
const FrameSize = 4 << 20

// Image is the signed manifest of one operating system image. Every byte of
// it that reaches a disk or a processor is named here by hash: the manifest is
// what is signed, the rest follows.
type Image struct {
	Format  int    `json:"format"` // ImageFormat
	Name    string `json:"name"`   // for example debian-13
	Version string `json:"version"`
	Arch    string `json:"arch"`   // amd64
	Family  string `json:"family"` // debian
	Kernel  string `json:"kernel"` // release as uname -r prints it
	// Pack is the object that holds all frames, one after the other.
	Pack Object `json:"pack"`
	// Parts are what goes on a disk: PartBoot, PartBIOS, PartESP, PartRoot.
	Parts []Part `json:"parts"`
	// Packages maps a package to its exact version.
	Packages map[string]string `json:"packages"`
}

const (
	ImageFormat = 1

	PartBoot = "boot" // 440 bytes of BIOS boot code for the first sector
	PartBIOS = "bios" // GRUB's core image for the BIOS boot partition
	PartESP  = "esp"  // FAT file system with the UEFI loader
	PartRoot = "root" // ext4 file system, shrunk; grown on the node
)

// Object is an immutable file in the store, named by its content.
type Object struct {
	Hash string `json:"hash"` // SHA-256, hex
	Size int64  `json:"size"` // bytes
}

// Part is one stretch of a disk: its frames in order of Offset. What no frame
// covers is zeros.
type Part struct {
	Name   string  `json:"name"`
	Size   int64   `json:"size"` // bytes, raw
	Frames []Frame `json:"frames"`
}

// Frame is the unit that is hashed, compressed and fetched: one zstd frame in
// the pack that holds at most FrameSize raw bytes. Where a part is cut into frames its
// content decides (images.Store), so that images which have much in common have
// frames in common; Hash tells.
type Frame struct {
	Offset int64  `json:"o"` // in the part, raw; a multiple of 4096
	Size   int    `json:"n"` // raw bytes
	At     int64  `json:"p"` // in the pack
	Packed int    `json:"z"` // bytes in the pack
	Hash   string `json:"h"` // SHA-256 of the packed bytes, hex: checked before they are decompressed
	Raw    string `json:"r"` // SHA-256 of the raw bytes, hex: tells what is already right on a disk
}

// Part returns the part of that name.
func (im *Image) Part(name string) (Part, bool) {
	for _, p := range im.Parts {
		if p.Name == name {
			return p, true
		}
	}
	return Part{}, false
}
