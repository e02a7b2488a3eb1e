// Package images makes, keeps and serves what nodes boot and install.
//
// A Store is a folder of immutable objects named by their SHA-256, signed
// manifests among them, and of refs: names that point to one manifest and move
// in one atomic step.
//
//	objects/<sha256>           kernel, initramfs, pack, manifest
//	objects/<sha256>.minisig   signature of a manifest
//	refs/<name>                which manifest <name> now is
//	keys/<name>.pub            minisign public keys whose signatures count
//
// BuildOS makes an operating system image: a Debian tree, turned into the parts
// of a disk (see provision.Image), cut by content into frames that are compressed
// and hashed each on its own and lie one after the other in one pack. Runs of zeros
// are left out. An image with a few other packages has most frames of the one before,
// and the same recipe, lock file and key give the same image, bit for bit. BuildInitramfs makes what a node boots
// over the network: u-root, platter-node and the drivers of servers.
// BuildRelease puts together what a stack needs beyond an image: Debian packages,
// with an index for apt, and container archives (see provision.Release). The refs
// stack@VERSION name releases, stack the newest.
//
// Import makes such an image of a system that somebody else built, and says what
// that lacks. What it reads is never trusted: links and names of its tree do not
// lead out of the scratch folder, and qemu-img gets no image that names other files.
//
// Signatures are minisign's (https://jedisct1.github.io/minisign/), so that
// anybody can check an image without Platter.
package images
