package disc

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// flipped is r with one bit the other way round.
type flipped struct {
	io.ReaderAt
	at  int64
	bit byte
}

func (f flipped) ReadAt(b []byte, at int64) (int, error) {
	n, err := f.ReaderAt.ReadAt(b, at)
	if i := f.at - at; i >= 0 && i < int64(n) {
		b[i] ^= f.bit
	}
	return n, err
}

// No bit flipped in the folders of a volume keeps its reader busy, and each is named.
func TestEveryBitOfFolders(t *testing.T) {
	s, set, _ := shared(t)
	good := must[[]byte](t)(os.ReadFile(set.Volumes[0]))
	head := must[*volumeHead](t)(readVolumeHead(bytes.NewReader(good)))
	noted := &noting{ReaderAt: bytes.NewReader(good)}
	files := must[map[string]stretch](t)(readFolders(noted, head))
	if len(files) < 20 {
		t.Errorf("only %d files", len(files))
	}
	bad := filepath.Join(t.TempDir(), "bad.iso")
	if err := os.WriteFile(bad, good, 0o644); err != nil {
		t.Fatal(err)
	}
	f := must[*os.File](t)(os.OpenFile(bad, os.O_RDWR, 0))
	defer f.Close()
	check := s.site().CheckSignature
	r := rand.New(rand.NewPCG(1, 5))
	refused, named, slow := 0, 0, time.Now().Add(2*time.Minute)
	for _, e := range noted.read {
		for at := e.at; at < e.at+e.size; at++ {
			for bit := byte(1); bit != 0; bit <<= 1 {
				if _, err := readFolders(flipped{bytes.NewReader(good), at, bit}, head); err != nil {
					refused++
				}
				if time.Now().After(slow) {
					t.Fatalf("bit %d at %d: two minutes are not enough", bit, at)
				}
				if r.IntN(4000) != 0 {
					continue
				}
				named++
				must[int](t)(f.WriteAt([]byte{good[at] ^ bit}, at))
				d, err := Open(check, bad)
				if err == nil {
					err = d.Verify(t.Context(), func(int64, int64) {})
					d.Close()
				}
				if err == nil || !strings.Contains(err.Error(), "(the disc's own structure)") {
					t.Errorf("bit %d at %d: %v", bit, at, err)
				}
				must[int](t)(f.WriteAt(good[at:at+1], at))
			}
		}
	}
	if refused < 1000 || named < 10 {
		t.Errorf("%d were refused, %d looked at further", refused, named)
	}
}

// noting notes what is read.
type noting struct {
	io.ReaderAt
	read []stretch
}

func (n *noting) ReadAt(b []byte, at int64) (int, error) {
	n.read = append(n.read, stretch{at, int64(len(b))})
	return n.ReaderAt.ReadAt(b, at)
}

// folderImage is an ISO file with folders as its root, at sector 17.
func folderImage(folders []byte) (io.ReaderAt, *volumeHead) {
	b := make([]byte, 17*sector)
	h := (*volumeHead)(b[16*sector:])
	copy(h[:], "\x01CD001")
	binary.LittleEndian.PutUint32(h[156+2:], 17)
	binary.LittleEndian.PutUint32(h[156+10:], uint32(len(folders)))
	return bytes.NewReader(append(b, folders...)), h
}

// folderRecord is a directory record with a System Use area.
func folderRecord(id string, flags byte, e stretch, use ...byte) []byte {
	b := append(make([]byte, 33), id...)
	if len(id)%2 == 0 {
		b = append(b, 0)
	}
	b = append(b, use...)
	b[0], b[25], b[32] = byte(len(b)), flags, byte(len(id))
	binary.LittleEndian.PutUint32(b[2:], uint32(e.at/sector))
	binary.LittleEndian.PutUint32(b[10:], uint32(e.size))
	return b
}

// continued is the entry CE of a System Use area: it goes on at e.
func continued(e stretch) []byte {
	b := make([]byte, 28)
	copy(b, "CE\x1c\x01")
	binary.LittleEndian.PutUint32(b[4:], uint32(e.at/sector))
	binary.LittleEndian.PutUint32(b[12:], uint32(e.at%sector))
	binary.LittleEndian.PutUint32(b[20:], uint32(e.size))
	return b
}

func hostileFolders() map[string][]byte {
	root := stretch{17 * sector, sector}
	pad := func(b ...[]byte) []byte { return append(slices.Concat(b...), make([]byte, sector)...)[:sector] }
	return map[string][]byte{
		"which cannot be":          pad(folderRecord("A", 0, stretch{}, []byte("NM\x00\x01a")...)),
		"has no end":               pad(folderRecord("A", 0, stretch{}, continued(stretch{root.at + 34, 28})...)),
		"more than 8 deep":         pad(folderRecord("A", isFolder, root)),
		"has a record that cannot": pad([]byte{20}),
		"several extents":          pad(folderRecord("A", isContinued, stretch{})),
		"more than 16777216 bytes": pad(folderRecord("A", isFolder, stretch{root.at, 1 << 31})),
		"cannot be read at":        pad(folderRecord("A", isFolder, stretch{root.at, 2 * sector})),
	}
}

// Folders that are made to keep a reader busy are refused.
func TestHostileFolders(t *testing.T) {
	for want, b := range hostileFolders() {
		if _, err := readFolders(folderImage(b)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	// Two that hold each other twice would be read without end.
	twice := append(slices.Concat(folderRecord("A", isFolder, stretch{17 * sector, sector}), folderRecord("B", isFolder, stretch{17 * sector, sector})), make([]byte, sector)...)[:sector]
	if _, err := readFolders(folderImage(twice)); err == nil {
		t.Error("folders that hold themselves are taken")
	}
	// A name may go on elsewhere.
	long := strings.Repeat("n", 200)
	b := slices.Concat(folderRecord("A", 0, stretch{0, 5}, append([]byte("NM\x06\x01\x01b"), continued(stretch{18 * sector, 205})...)...), make([]byte, sector))[:sector]
	b = append(b, append([]byte{'N', 'M', 205, 1, 0}, long...)...)
	r, head := folderImage(b)
	binary.LittleEndian.PutUint32(head[156+10:], sector)
	if files, err := readFolders(r, head); err != nil || files["b"+long].size != 5 {
		t.Errorf("%v, %v", files, err)
	}
}

func FuzzFolders(f *testing.F) {
	for _, b := range hostileFolders() {
		f.Add(b)
	}
	f.Add(folderRecord("A", 0, stretch{0, 5}, []byte("NM\x06\x01\x00b")...))
	f.Fuzz(func(t *testing.T, b []byte) {
		files, err := readFolders(folderImage(b))
		if err != nil && len(files) > 0 {
			t.Errorf("%d files and %v", len(files), err)
		}
	})
}
