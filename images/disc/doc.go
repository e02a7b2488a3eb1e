// Package disc makes sets of discs from an image store, and reads them.
//
// A set is one or more volumes, ISO 9660 images, that together hold what names of
// a store stand for. Every volume has
//
//	platter/set.json            the manifest of the whole set (Set)
//	platter/set.json.minisig    its signature
//	platter/set.sums            hashes of 4 KiB pieces of both, to find what is damaged
//	platter/volume-N            a line for people; its name says which volume this is
//	platter/pack-N-K            payload: chunks, one after the other
//	SHA256SUMS                  for sha256sum -c
//	sbom.cdx.json, index.html, guide/
//
// and the first one what it boots from besides: boot/, bin/, ipxe/.
//
// Objects of the store are cut into chunks that are named by their SHA-256: the
// packs of operating system images into their frames, everything else where its
// content says so. The manifest lists the chunks of every object and those of every
// file of every volume, so a chunk is wherever some file has it, once, and every
// byte of a file is covered. A patch is a set that lacks the chunks which a site
// has already; it does not boot, and has the program packed, bin/platter.gz.
//
// Build makes a set, Open reads volumes that are mounted, ISO files or drives,
// Verify compares every byte, Import brings a set into a store, volume by volume,
// and Discs serves it where it lies. Sources are only ever read.
package disc
