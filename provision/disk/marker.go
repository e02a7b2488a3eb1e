package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"platter/provision"
)

// State of an install, as its marker says.
type State string

const (
	Writing  State = "writing"  // the disk must not boot
	Complete State = "complete" // everything is on the disk
)

// Marker is the record on the disk of whose install it holds and how far that
// has come.
type Marker struct {
	Seq        uint64 `json:"seq"` // counts writes of the marker
	Rack       string `json:"rack"`
	Node       string `json:"node"`
	Generation int    `json:"generation"`
	Plan       string `json:"plan"`  // digest
	Image      string `json:"image"` // digest
	State      State  `json:"state"`
	Disk       GUID   `json:"disk"`       // of the partition table
	Partitions []GUID `json:"partitions"` // in order of the plan's layout
	// Zeroed: all that no frame covers is zero on stable storage.
	Zeroed bool `json:"zeroed"`
	// Frames has bit i%8 of byte i/8 set when frame i, counted over the parts
	// of the image in order, is on stable storage.
	Frames []byte `json:"frames"`
}

const (
	markerA    = 128 << 10
	markerB    = 512 << 10
	markerSlot = 256 << 10
	markerHead = 8 + 4 + sha256.Size
	markerID   = "PLATTER1"
)

// encode returns the marker in whole blocks of 4 KiB.
func (m Marker) encode() ([]byte, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode the marker: %w", err)
	}
	n := (markerHead + len(body) + 4095) &^ 4095
	if n > markerSlot {
		return nil, fmt.Errorf("the marker of an image with %d frames does not fit its %d KiB", 8*len(m.Frames), markerSlot>>10)
	}
	b := aligned(n)
	copy(b, markerID)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	sum := sha256.Sum256(body)
	copy(b[12:], sum[:])
	copy(b[markerHead:], body)
	return b, nil
}

// decodeMarker returns the marker in one slot, if it is whole.
func decodeMarker(b []byte) (Marker, bool) {
	var m Marker
	if len(b) < markerHead || string(b[:8]) != markerID {
		return m, false
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if uint64(n) > uint64(len(b)-markerHead) {
		return m, false
	}
	body := b[markerHead : markerHead+int(n)]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], b[12:markerHead]) {
		return m, false
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return Marker{}, false
	}
	return m, true
}

// readMarker returns the newer of the two copies.
func readMarker(v Volume) (m Marker, ok bool, err error) {
	b := aligned(markerSlot)
	for _, at := range []int64{markerA, markerB} {
		if _, err := v.ReadAt(b, at); err != nil {
			return Marker{}, false, fmt.Errorf("read the install marker: %w", err)
		}
		if c, good := decodeMarker(b); good && (!ok || c.Seq > m.Seq) {
			m, ok = c, true
		}
	}
	return m, ok, nil
}

// writeMarker puts m over the older copy. The caller has synced since the
// newer copy was written, so one of the two is always whole on the disk.
func writeMarker(v Volume, m *Marker) error {
	m.Seq++
	b, err := m.encode()
	if err != nil {
		return err
	}
	at := int64(markerA)
	if m.Seq%2 == 0 {
		at = markerB
	}
	if _, err := v.WriteAt(b, at); err != nil {
		return fmt.Errorf("write the install marker: %w", err)
	}
	return nil
}

func (m *Marker) has(i int) bool { return m.Frames[i/8]&(1<<(i%8)) != 0 }
func (m *Marker) set(i int)      { m.Frames[i/8] |= 1 << (i % 8) }

// same tells whether the marker is of this very install.
func (m *Marker) same(plan *provision.Plan) bool {
	return m.Rack == plan.Rack && m.Node == plan.Node && m.Generation == plan.Generation && m.Plan == plan.Digest()
}
