package disc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// What the folders of an ISO may have; those of a set have far less. They are read
// before anything is known to be right, so that a damaged or hostile disc must
// find an end here.
const (
	maxFolders     = 16 << 20 // bytes, all of them together
	maxFolderDepth = 8
	maxName        = 255 // bytes
	maxNameParts   = 8   // areas that one name is spread over
)

// volumeHead is the primary volume descriptor of an ISO (ECMA-119, 8.4).
type volumeHead [sector]byte

func readVolumeHead(r io.ReaderAt) (*volumeHead, error) {
	var h volumeHead
	if n, _ := r.ReadAt(h[:], 16*sector); n < len(h) || !bytes.Equal(h[:6], []byte("\x01CD001")) {
		return nil, errors.New("there is no ISO 9660 file system on it: name a volume of a set, where it is mounted, or its drive")
	}
	return &h, nil
}

// size is how many bytes the volume says that it has.
func (h *volumeHead) size() int64 { return int64(binary.LittleEndian.Uint32(h[80:])) * sector }

// folders finds the files of an ISO.
type folders struct {
	r     io.ReaderAt
	left  int64 // bytes that may still be read
	files map[string]stretch
}

// readFolders finds where each file of an ISO lies. Names are those of Rock Ridge.
func readFolders(r io.ReaderAt, h *volumeHead) (map[string]stretch, error) {
	f := &folders{r: r, left: maxFolders, files: map[string]stretch{}}
	root := extentOf(h[156:190])
	if err := f.walk(root, "", 0); err != nil {
		return nil, fmt.Errorf("its folders are damaged: %w", err)
	}
	return f.files, nil
}

// extentOf is where the file or folder of a directory record lies.
func extentOf(record []byte) stretch {
	return stretch{int64(binary.LittleEndian.Uint32(record[2:])) * sector, int64(binary.LittleEndian.Uint32(record[10:]))}
}

// read returns a stretch of folders.
func (f *folders) read(s stretch) ([]byte, error) {
	if f.left -= s.size; f.left < 0 {
		return nil, fmt.Errorf("they have more than %d bytes", maxFolders)
	}
	b := make([]byte, s.size)
	if n, err := f.r.ReadAt(b, s.at); n < len(b) {
		return nil, fmt.Errorf("they cannot be read at %d: %w", s.at, err)
	}
	return b, nil
}

// walk reads a folder and those in it. No record crosses a sector.
func (f *folders) walk(folder stretch, at string, depth int) error {
	if depth > maxFolderDepth {
		return fmt.Errorf("they are in each other more than %d deep", maxFolderDepth)
	}
	b, err := f.read(folder)
	if err != nil {
		return err
	}
	for len(b) > 0 {
		rest := b[:min(sector, len(b))]
		b = b[len(rest):]
		for len(rest) > 0 && rest[0] > 0 {
			n := int(rest[0])
			if n < 34 || n > len(rest) || 33+int(rest[32]) > n {
				return fmt.Errorf("one at %d has a record that cannot be", folder.at)
			}
			if err := f.record(rest[:n], at, depth); err != nil {
				return err
			}
			rest = rest[n:]
		}
	}
	return nil
}

// The flags of a directory record.
const (
	isFolder    = 1 << 1
	isContinued = 1 << 7
)

// record takes in one file or folder.
func (f *folders) record(r []byte, at string, depth int) error {
	id := r[33 : 33+int(r[32])]
	if bytes.Equal(id, []byte{0}) || bytes.Equal(id, []byte{1}) { // the folder itself, and the one that it is in
		return nil
	}
	use := 33 + len(id) + (len(id)+1)%2 // where the System Use area begins
	name, err := f.name(r[min(use, len(r)):])
	if err != nil {
		return err
	}
	if name == "" {
		name = strings.TrimSuffix(string(id), ";1")
	}
	path := strings.TrimPrefix(at+"/"+name, "/")
	switch flags := r[25]; {
	case flags&isFolder != 0:
		return f.walk(extentOf(r), path, depth+1)
	case flags&isContinued != 0:
		return fmt.Errorf("%.200q is in several extents, which no file of a set is", path)
	}
	f.files[path] = extentOf(r)
	return nil
}

// name is the name in a System Use area (SUSP, RRIP): that of the entries NM,
// which go on where an entry CE says. It is empty where there is none.
func (f *folders) name(area []byte) (string, error) {
	var name []byte
	for range maxNameParts {
		var next *stretch
		for len(area) >= 4 {
			n := int(area[2])
			if n < 5 && string(area[:2]) == "NM" || n < 28 && string(area[:2]) == "CE" || n < 4 || n > len(area) {
				return "", fmt.Errorf("the entry %q of one has %d bytes, which cannot be", area[:2], n)
			}
			switch e := area[:n]; string(e[:2]) {
			case "NM":
				name = append(name, e[5:]...)
			case "CE":
				next = &stretch{int64(binary.LittleEndian.Uint32(e[4:]))*sector + int64(binary.LittleEndian.Uint32(e[12:])), int64(binary.LittleEndian.Uint32(e[20:]))}
			}
			area = area[n:]
		}
		if len(name) > maxName {
			return "", fmt.Errorf("a name in them has more than %d bytes", maxName)
		}
		if next == nil {
			return string(name), nil
		}
		var err error
		if area, err = f.read(*next); err != nil {
			return "", err
		}
	}
	return "", errors.New("a name in them has no end")
}
