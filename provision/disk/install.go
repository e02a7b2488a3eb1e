package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"platter/provision"
)

// Install is one image on its way onto one disk.
type Install struct {
	vol    Volume
	plan   *provision.Plan
	image  *provision.Image
	slots  []Slot
	boot   provision.Part // BIOS boot code for the first sector
	code   []byte         // its bytes, once fetched
	resume bool

	// CheckpointEvery is how often the marker is brought up to date, at the
	// price of one flush of the disk's cache each time.
	CheckpointEvery time.Duration
	// Stall is how long Write waits for a first byte to come before it gives up.
	Stall time.Duration

	mu     sync.Mutex // guards what the goroutines of Write share
	marker Marker     // what is on stable storage
}

// Begin makes the disk unbootable and marks it as the plan's, or, where the
// marker says that it holds this very install half-way, takes that up. What it
// may not replace stays untouched and is a *provision.Failure.
func Begin(v Volume, plan *provision.Plan, image *provision.Image) (*Install, error) {
	content, err := Inspect(v)
	if err != nil {
		return nil, err
	}
	resume, failure := Permit(content, plan)
	if failure != nil {
		return nil, failure
	}
	slots, failure := Place(plan.Layout, image, v.Size())
	if failure != nil {
		return nil, failure
	}
	in := &Install{vol: v, plan: plan, image: image, slots: slots, resume: resume,
		CheckpointEvery: 10 * time.Second, Stall: 10 * time.Minute}
	in.boot, _ = image.Part(provision.PartBoot)
	bitmap := (in.frames() + 7) / 8
	if resume && content.Marker.Image == plan.Image.Digest && len(content.Marker.Frames) == bitmap && len(content.Marker.Partitions) == len(slots) {
		in.marker = *content.Marker
	} else {
		in.resume = false
		in.marker = Marker{Rack: plan.Rack, Node: plan.Node, Generation: plan.Generation, Plan: plan.Digest(),
			Image: plan.Image.Digest, Disk: NewGUID(), Frames: make([]byte, bitmap)}
		for range slots {
			in.marker.Partitions = append(in.marker.Partitions, NewGUID())
		}
		if content.Marker != nil {
			in.marker.Seq = content.Marker.Seq
		}
	}
	for i := range in.slots {
		in.slots[i].ID = in.marker.Partitions[i]
	}
	if err := in.unboot(); err != nil {
		return nil, err
	}
	return in, nil
}

// unboot removes what a firmware could boot, then marks the disk.
func (in *Install) unboot() error {
	v := in.vol
	step := func(err error) error {
		if err != nil {
			return fmt.Errorf("clear the start and end of the disk: %w", err)
		}
		return nil
	}
	// The first sector alone decides for every firmware: it goes first.
	if err := step(errors.Join(v.Zero(0, 64<<10), v.Sync())); err != nil {
		return err
	}
	tail := v.Size()/4096*4096 - mib
	// A marker of ours stays until the new one has taken over: without it what
	// is left of the old tables would look like someone else's.
	rest := int64(mib)
	if in.marker.Seq > 0 {
		rest = markerA
	}
	if err := step(errors.Join(v.Zero(64<<10, rest-64<<10), v.Zero(tail, v.Size()-tail), v.Sync())); err != nil {
		return err
	}
	in.marker.State = Writing
	if err := errors.Join(writeMarker(v, &in.marker), v.Sync()); err != nil {
		return err
	}
	if d, ok := v.(*Device); ok {
		return d.dropPartitions()
	}
	return nil
}

// Resumed tells whether an install that was cut off is being finished.
func (in *Install) Resumed() bool { return in.resume }

// Slots are the partitions in their places.
func (in *Install) Slots() []Slot { return in.slots }

// Slot returns the partition that holds the image part of that name.
func (in *Install) Slot(part string) (Slot, bool) {
	for _, s := range in.slots {
		if part != "" && s.Part.Name == part {
			return s, true
		}
	}
	return Slot{}, false
}

// Forget makes the next Write of this install start from nothing: what is on
// the disk has turned out not to be what was written.
func (in *Install) Forget() error {
	clear(in.marker.Frames)
	in.marker.Zeroed = false
	return errors.Join(in.vol.Sync(), writeMarker(in.vol, &in.marker), in.vol.Sync())
}

// frames is the number of frames of the whole image.
func (in *Install) frames() int {
	n := 0
	for _, p := range in.image.Parts {
		n += len(p.Frames)
	}
	return n
}

// Commit makes the disk bootable: the BIOS loader learns where it lies, then
// come both copies of the partition table and last, in one sector, boot code
// and protective MBR. Write has ended without an error before.
func (in *Install) Commit(ctx context.Context) error {
	v := in.vol
	if !in.written() {
		return errors.New("the image is not completely on the disk: it must not boot")
	}
	if err := in.patchLoader(); err != nil {
		return err
	}
	mbr, primary, backup, backupAt := Table{Disk: in.marker.Disk, Slots: in.slots}.encode(v.Size(), v.SectorSize())
	if err := ctx.Err(); err != nil {
		return err
	}
	write := func(b []byte, at int64) error {
		w := aligned(len(b))
		copy(w, b)
		_, err := v.WriteAt(w, at)
		return err
	}
	if err := errors.Join(v.Sync(), write(backup, backupAt), write(primary, int64(v.SectorSize())), v.Sync()); err != nil {
		return fmt.Errorf("write the partition table: %w", err)
	}
	if bios, ok := in.Slot(provision.PartBIOS); ok && len(in.code) > 0 {
		copy(mbr[:440], in.code)
		binary.LittleEndian.PutUint64(mbr[bootKernelSector:], uint64(bios.Start/int64(v.SectorSize())))
	}
	if err := errors.Join(write(mbr, 0), v.Sync()); err != nil {
		return fmt.Errorf("write the first sector: %w", err)
	}
	in.marker.State = Complete
	return errors.Join(writeMarker(v, &in.marker), v.Sync())
}

// written tells whether every byte of the image is on stable storage.
func (in *Install) written() bool {
	if !in.marker.Zeroed || (in.boot.Size > 0 && len(in.code) == 0) {
		return false
	}
	i := 0
	for _, p := range in.image.Parts {
		for range p.Frames {
			if _, placed := in.Slot(p.Name); placed && !in.marker.has(i) {
				return false
			}
			i++
		}
	}
	return true
}

// Where GRUB's BIOS loader keeps the addresses of its parts (GRUB 2.12,
// include/grub/i386/pc/boot.h and kernel.h): boot.img holds the sector of
// core.img; the first sector of core.img ends in the block list of the rest.
const (
	bootKernelSector = 0x5c
	coreBlocklist    = 0x1f4
	coreSegment      = 0x820
)

// patchLoader writes into core.img's first sector where its others are.
func (in *Install) patchLoader() error {
	s, ok := in.Slot(provision.PartBIOS)
	if !ok || s.Part.Size <= 512 {
		return nil
	}
	b := aligned(directAlign)
	if _, err := in.vol.ReadAt(b, s.Start); err != nil {
		return fmt.Errorf("read the BIOS loader: %w", err)
	}
	le := binary.LittleEndian
	le.PutUint64(b[coreBlocklist:], uint64(s.Start/512+1))
	le.PutUint16(b[coreBlocklist+8:], uint16((s.Part.Size+511)/512-1))
	le.PutUint16(b[coreBlocklist+10:], coreSegment)
	if _, err := in.vol.WriteAt(b, s.Start); err != nil {
		return fmt.Errorf("write the BIOS loader: %w", err)
	}
	return nil
}
