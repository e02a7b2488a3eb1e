package disc

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// medium is where a volume's files lie: a folder that it is mounted on, an ISO
// file, or a drive.
type medium interface {
	// open opens a file for reading. An error that is fs.ErrNotExist: there is none.
	open(path string) (mediumFile, error)
	// files are the paths of all files, sorted.
	files() ([]string, error)
	// device is the whole volume with all that is in no file; nil where only its
	// files are at hand.
	device() *os.File
	io.Closer
}

type mediumFile struct {
	io.ReaderAt
	size  int64
	from  *os.File // what the bytes are read from, the first of them at begin
	begin int64
	close func() error
}

// forget has a stretch of the file read from the medium next time, not from the
// memory of this machine, which works by pages.
func (m mediumFile) forget(at, size int64) {
	const page = 4096
	from := (m.begin + at) / page * page
	unix.Fadvise(int(m.from.Fd()), from, (m.begin+at+size-from+page-1)/page*page, unix.FADV_DONTNEED) // it is only a wish
}

// openMedium looks at what path is. For an ISO file or a drive that ends too
// early the error says by how much.
func openMedium(path string, check func(manifest, signature []byte) error) (medium, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("the disc at %s cannot be read: %w", path, err)
	}
	if st.IsDir() {
		return openFolder(path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the disc at %s cannot be read, is one in the drive? %w", path, err)
	}
	i, err := openISO(f)
	if err != nil {
		found, _ := (&Discs{check: check}).structureDamage(&volume{source: path}, f)
		err = errors.Join(append([]error{fmt.Errorf("%s: %w", path, err)}, found...)...)
		f.Close()
		return nil, err
	}
	return i, nil
}

const sector = 2048

// iso is an ISO 9660 image (ECMA-119) with Rock Ridge names.
type iso struct {
	f   *os.File
	all map[string]stretch
}

func openISO(f *os.File) (*iso, error) {
	head, err := readVolumeHead(f)
	if err != nil {
		return nil, err
	}
	if err := longEnough(f, head); err != nil {
		return nil, err
	}
	all, err := readFolders(f, head)
	if err != nil {
		return nil, err
	}
	return &iso{f, all}, nil
}

// longEnough says by how much an ISO file or a drive ends too early.
func longEnough(f *os.File, head *volumeHead) error {
	have, err := f.Seek(0, io.SeekEnd)
	if err == nil && have < head.size() {
		err = fmt.Errorf("the volume is short by %d bytes: it has %d of %d. Copy or burn it again", head.size()-have, have, head.size())
	}
	return err
}

func (i *iso) open(path string) (mediumFile, error) {
	e, ok := i.all[path]
	if !ok {
		return mediumFile{}, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
	}
	return mediumFile{io.NewSectionReader(i.f, e.at, e.size), e.size, i.f, e.at, func() error { return nil }}, nil
}

func (i *iso) files() ([]string, error) { return slices.Sorted(maps.Keys(i.all)), nil }

func (i *iso) device() *os.File { return i.f }

func (i *iso) Close() error { return i.f.Close() }

// readAll reads a small file.
func readAll(m medium, path string, limit int64) ([]byte, error) {
	f, err := m.open(path)
	if err != nil {
		return nil, err
	}
	defer f.close()
	if f.size > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, f.size, limit)
	}
	b := make([]byte, f.size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("%s cannot be read at offset %d: %w", path, n, err)
	}
	return b, nil
}

// readChunk reads a chunk and compares it, once more from the medium if it is
// damaged: a drive may do better the second time.
func readChunk(r io.ReaderAt, at int64, c Chunk, buf []byte) ([]byte, error) {
	b := buf[:c.Size]
	var err error
	for again := range 2 {
		if f, ok := r.(mediumFile); ok && again > 0 {
			f.forget(at, c.Size)
		}
		var n int
		if n, err = r.ReadAt(b, at); n < len(b) {
			continue
		}
		if err = nil; hashIs(b, c.Hash) {
			return b, nil
		}
	}
	if err == nil {
		return nil, errDiffers
	}
	return nil, err
}

var errDiffers = errors.New("it hashes to something else")
