package disc

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// folder is one that a volume is mounted on, or that its files were copied to.
type folder struct {
	path string
	dev  *os.File
}

// openFolder looks for what is mounted there as well: that a volume is too short
// its folders do not tell.
func openFolder(path string) (*folder, error) {
	d := &folder{path: path}
	name := mountedAt(path)
	if name == "" {
		return d, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return d, nil // not everybody may read drives
	}
	head, err := readVolumeHead(f)
	if err == nil {
		err = longEnough(f, head)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s, which is mounted on %s: %w", name, path, err)
	}
	d.dev = f
	return d, nil
}

// mountedAt is the drive whose ISO 9660 file system is mounted on path; empty
// where there is none.
func mountedAt(path string) string {
	path, err := filepath.Abs(path)
	if err != nil {
		return ""
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return ""
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	device := mountedFrom(string(mounts), path)
	if _, err := os.Stat(filepath.Join("/sys/class/block", filepath.Base(device), "partition")); err == nil {
		return "" // a partition of a stick, which ends before the boot areas
	}
	return device
}

// mountedFrom is the source of the ISO 9660 file system that is mounted on path by
// mounts, the text of /proc/self/mountinfo (proc_pid_mountinfo(5)).
func mountedFrom(mounts, path string) (device string) {
	plain := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(mounts) {
		mount, fs, ok := strings.Cut(line, " - ")
		m, f := strings.Fields(mount), strings.Fields(fs)
		if !ok || len(m) < 5 || len(f) < 2 || plain.Replace(m[4]) != path {
			continue
		}
		device = "" // what is mounted last lies on top
		if f[0] == "iso9660" && m[3] == "/" {
			device = plain.Replace(f[1])
		}
	}
	return device
}

func (d *folder) open(path string) (mediumFile, error) {
	f, err := os.Open(filepath.Join(d.path, filepath.FromSlash(path)))
	if err != nil {
		return mediumFile{}, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return mediumFile{}, err
	}
	return mediumFile{f, st.Size(), f, 0, f.Close}, nil
}

func (d *folder) files() ([]string, error) {
	var out []string
	err := filepath.WalkDir(d.path, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(d.path, path)
		out = append(out, filepath.ToSlash(rel))
		return err
	})
	return out, err
}

func (d *folder) device() *os.File { return d.dev }

func (d *folder) Close() error {
	if d.dev == nil {
		return nil
	}
	return d.dev.Close()
}
