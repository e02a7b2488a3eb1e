package provision

import (
	"fmt"
	"slices"
)

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
	Family  string `json:"family"` // FamilyDebian, FamilyRHEL, or what another system calls itself
	Kernel  string `json:"kernel"` // release as uname -r prints it
	// Pack is the object that holds all frames, one after the other.
	Pack Object `json:"pack"`
	// Parts are what goes on a disk: PartBoot, PartBIOS, PartESP, PartRoot.
	Parts []Part `json:"parts"`
	// Packages maps a package to its exact version.
	Packages map[string]string `json:"packages"`
	// Origin is the file that the image was imported from; empty where Platter
	// built it.
	Origin string `json:"origin,omitempty"`
	// Extras are the files that Platter's own build puts into an image and that
	// an imported one has too, ExtraEjabberd among them.
	Extras []string `json:"extras,omitempty"`
}

// ExtraEjabberd is the part of ejabberd that is Platter's and of no package.
const ExtraEjabberd = "usr/lib/platter/erlang/mod_platter_archive.beam"

// Families of systems: what their packages are.
const (
	FamilyDebian = "debian" // .deb
	FamilyRHEL   = "rhel"   // .rpm; CentOS, Rocky, openEuler, Kylin and others
)

// Misfits says why nodes with this image cannot run these components; nil
// where they can, as far as its list of packages tells. Images that Platter
// built are not judged: they are built for the stack.
func (im *Image) Misfits(components []PlacedComponent) (wrong []string) {
	if im.Origin == "" && (im.Family == "" || im.Family == FamilyDebian) {
		return nil
	}
	for _, c := range components {
		if len(c.Members) == 0 {
			continue
		}
		if c.Kind != KindPackages {
			if im.Packages["podman"] == "" && len(im.Packages) > 0 {
				wrong = append(wrong, fmt.Sprintf("component %s is run by podman, which the image %s does not have", c.Name, im.Name))
			}
			continue
		}
		if im.Family != FamilyDebian {
			wrong = append(wrong, fmt.Sprintf("component %s comes as Debian packages, and the image %s is of the family %s", c.Name, im.Name, im.Family))
			continue
		}
		if c.Member == MemberEjabberd && !slices.Contains(im.Extras, ExtraEjabberd) {
			wrong = append(wrong, fmt.Sprintf("component %s needs /%s, which the image %s does not have: only 'platter image build' puts it there", c.Name, ExtraEjabberd, im.Name))
		}
		for _, p := range c.Packages {
			if im.Packages[p.Name] == "" {
				wrong = append(wrong, fmt.Sprintf("component %s needs the package %s, which the image %s does not have", c.Name, p.Name, im.Name))
			}
		}
	}
	return wrong
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
