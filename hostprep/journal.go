package hostprep

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"

	"github.com/google/renameio/v2"
)

// Journal keeps what was there before the preparation changed it. Each line is
// on stable storage before the change that it tells of, and only the first
// state of a place is kept: Undo brings back the host as it was before any
// preparation. It holds for one root; the zero value is of no use.
type Journal struct {
	root string
	mu   sync.Mutex
	seen map[string]bool
	rows []entry
}

// entry is the former state of one place.
type entry struct {
	Path    string      `json:"path"`            // below the root, with a leading /
	Value   bool        `json:"value,omitempty"` // a file of /proc or /sys: written in place
	Former  []byte      `json:"former,omitempty"`
	Link    string      `json:"link,omitempty"` // it was a symbolic link to this
	Mode    fs.FileMode `json:"mode,omitempty"`
	UID     int         `json:"uid,omitempty"`
	GID     int         `json:"gid,omitempty"`
	Missing bool        `json:"missing,omitempty"` // it was not there
	Folder  bool        `json:"folder,omitempty"`  // a folder that we made
}

const journalFile = "/var/lib/platter/host/journal"

// OpenJournal opens the journal of the host at root, "/" for the running one.
// A line that a power cut left half-written is dropped: what it would have
// told of was not begun.
func OpenJournal(root string) (*Journal, error) {
	j := &Journal{root: root, seen: map[string]bool{}}
	b, err := os.ReadFile(j.at(journalFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("host journal: %w", err)
	}
	whole := b[:bytes.LastIndexByte(b, '\n')+1]
	if len(whole) < len(b) {
		if err := os.Truncate(j.at(journalFile), int64(len(whole))); err != nil {
			return nil, fmt.Errorf("host journal: %w", err)
		}
	}
	n := 0
	for line := range bytes.Lines(whole) {
		n++
		var e entry
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("host journal %s, line %d is damaged: %w: set the file aside; what it tells of can then only be undone by hand", journalFile, n, err)
		}
		j.rows, j.seen[e.Path] = append(j.rows, e), true
	}
	return j, nil
}

// at is the place of a path of the host.
func (j *Journal) at(path string) string { return filepath.Join(j.root, path) }

// WriteFile replaces the file at path as a whole, durably. Folders that are
// missing are made. A file that is right already is not touched.
func (j *Journal) WriteFile(path, content string, mode fs.FileMode) error {
	if ok, err := j.has(path, content, mode); ok || err != nil {
		return err
	}
	if err := j.keep(path); err != nil {
		return err
	}
	if err := j.put(path, []byte(content), mode); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// Link makes path a symbolic link to target.
func (j *Journal) Link(path, target string) error {
	if t, err := os.Readlink(j.at(path)); err == nil && t == target {
		return nil
	}
	if err := j.keep(path); err != nil {
		return err
	}
	if err := renameio.Symlink(target, j.at(path)); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	return syncDir(filepath.Dir(j.at(path)))
}

// Remove takes the file or link at path away.
func (j *Journal) Remove(path string) error {
	if _, err := os.Lstat(j.at(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := j.keep(path); err != nil {
		return err
	}
	if err := os.Remove(j.at(path)); err != nil {
		return fmt.Errorf("removing: %w", err)
	}
	return syncDir(filepath.Dir(j.at(path)))
}

// chosen matches the word that is chosen in a file of /sys that lists all:
// "always [madvise] never".
var chosen = regexp.MustCompile(`(?:^|\s)\[(\S+)\](?:\s|$)`)

// value reads a file of /proc or /sys as SetValue would write it, with single
// spaces between its words.
func (j *Journal) value(path string) (string, error) {
	b, err := os.ReadFile(j.at(path))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("the running kernel has no %s", path)
		}
		return "", fmt.Errorf("the running kernel does not tell: %w", err)
	}
	if m := chosen.FindSubmatch(b); m != nil {
		return string(m[1]), nil
	}
	return strings.Join(strings.Fields(string(b)), " "), nil
}

// SetValue writes a value into a file of /proc or /sys. The error of a value
// that the kernel refuses names it.
func (j *Journal) SetValue(path, value string) error {
	former, err := os.ReadFile(j.at(path))
	if err != nil {
		return fmt.Errorf("the running kernel has no %s: %w", path, err)
	}
	if m := chosen.FindSubmatch(former); m != nil {
		former = m[1] // the kernel would not take the list back
	}
	if err := j.append(entry{Path: path, Value: true, Former: former}); err != nil {
		return err
	}
	if err := os.WriteFile(j.at(path), []byte(value), 0); err != nil {
		return fmt.Errorf("the running kernel refuses %q for %s: %w", value, path, err)
	}
	return nil
}

// Undo brings every place back to what it was, newest change first, and tells
// each. On success the journal is empty; cut off or failing it can be called
// again. Values that cannot be written back are named in the error; the rest is
// undone.
func (j *Journal) Undo(told func(path string)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var failed []error
	for i := len(j.rows) - 1; i >= 0; i-- {
		e := j.rows[i]
		if err := j.restore(e); err != nil {
			failed = append(failed, fmt.Errorf("undoing %s: %w", e.Path, err))
			continue
		}
		told(e.Path)
	}
	if err := errors.Join(failed...); err != nil {
		return err
	}
	j.rows, j.seen = nil, map[string]bool{}
	if err := os.Remove(j.at(journalFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("host journal: %w", err)
	}
	return nil
}

// Empty tells whether there is nothing to undo.
func (j *Journal) Empty() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.rows) == 0
}

func (j *Journal) restore(e entry) error {
	path := j.at(e.Path)
	gone := func(err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	switch {
	case e.Value:
		return gone(os.WriteFile(path, e.Former, 0))
	case e.Folder:
		err := os.Remove(path)
		if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) {
			return nil // somebody else uses it by now
		}
		return gone(err)
	case e.Missing:
		return gone(os.Remove(path))
	case e.Link != "":
		return renameio.Symlink(e.Link, path)
	}
	if err := j.put(e.Path, e.Former, e.Mode); err != nil {
		return err
	}
	return os.Chown(path, e.UID, e.GID)
}

// has tells whether the file is right already.
func (j *Journal) has(path, content string, mode fs.FileMode) (bool, error) {
	info, err := os.Lstat(j.at(path))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm() != mode {
		return false, nil
	}
	b, err := os.ReadFile(j.at(path))
	return err == nil && string(b) == content, err
}

// keep writes the state of path down, and makes the folders it needs.
func (j *Journal) keep(path string) error {
	if err := j.folders(filepath.Dir(path)); err != nil {
		return err
	}
	info, err := os.Lstat(j.at(path))
	e := entry{Path: path}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Missing = true
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		if e.Link, err = os.Readlink(j.at(path)); err != nil {
			return err
		}
	case info.Mode().IsRegular():
		if e.Former, err = os.ReadFile(j.at(path)); err != nil {
			return err
		}
		e.Mode = info.Mode().Perm()
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			e.UID, e.GID = int(st.Uid), int(st.Gid)
		}
	default:
		return fmt.Errorf("%s is neither a file nor a link: take it away by hand", path)
	}
	return j.append(e)
}

func (j *Journal) folders(dir string) error {
	if _, err := os.Stat(j.at(dir)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := j.folders(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := j.append(entry{Path: dir, Folder: true}); err != nil {
		return err
	}
	if err := os.Mkdir(j.at(dir), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// append writes a line, unless the place has one.
func (j *Journal) append(e entry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.seen[e.Path] {
		return nil
	}
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	name := j.at(journalFile)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("host journal: %w", err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("host journal: %w", err)
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		if _, err = f.Write(append(b, '\n')); err != nil {
			// A disk without room takes half a line, which no other shall follow.
			err = errors.Join(err, f.Truncate(end))
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil && len(j.rows) == 0 {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		return fmt.Errorf("host journal: %w: nothing was changed", err)
	}
	j.rows, j.seen[e.Path] = append(j.rows, e), true
	return nil
}

// put replaces a file as a whole, durably.
func (j *Journal) put(path string, content []byte, mode fs.FileMode) error {
	name := j.at(path)
	dir := filepath.Dir(name)
	if err := renameio.WriteFile(name, content, mode, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode)); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
