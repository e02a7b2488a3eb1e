package vmtest

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// Lab is a lab that Up has recorded in its state folder. Its methods may be
// called from several goroutines and processes.
type Lab struct {
	dir string // absolute
	rec record
}

// record is the content of lab.json.
type record struct {
	Config Config      `json:"config"`
	NetNS  string      `json:"netns"`
	Accel  accelRecord `json:"accel"`
}

// Up brings the lab of stateDir to what cfg says: network, libvirtd and one
// domain a machine. New machines are off and blank; machines that run go on,
// and a change of their hardware holds from their next power-on; machines and
// disks that cfg no longer has are removed. Up may be repeated and may be cut
// off at any point.
func Up(ctx context.Context, cfg Config, stateDir string) (*Lab, error) {
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the lab's state folder: %w", err)
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer unlock()

	l, err := Open(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l = &Lab{dir: dir, rec: record{NetNS: netnsName(dir)}}
	case err != nil:
		return nil, err
	case l.rec.Config.Name != cfg.Name:
		return nil, fmt.Errorf("%s is the state folder of lab %s: take that one down, or give lab %s a folder of its own with --state", dir, l.rec.Config.Name, cfg.Name)
	case l.rec.Config.Network.Bridge != cfg.Network.Bridge:
		return nil, fmt.Errorf("lab %s runs on bridge %s: take it down before you rename the bridge", cfg.Name, l.rec.Config.Network.Bridge)
	}
	l.rec.Config = cfg
	if err := l.up(ctx); err != nil {
		return nil, fmt.Errorf("lab %s is not up (repeat it, or clear it away with platter lab down --state %s): %w", cfg.Name, dir, err)
	}
	return l, nil
}

func (l *Lab) up(ctx context.Context) error {
	// The record comes before the first effect: Down needs no more.
	if err := l.save(); err != nil {
		return err
	}
	for _, d := range []string{"console", "etc", "run", "var"} {
		if err := os.MkdirAll(filepath.Join(l.dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := ensureNetNS(l.rec.NetNS); err != nil {
		return err
	}
	if err := ensureNetwork(l.rec.NetNS, l.rec.Config.Network); err != nil {
		return fmt.Errorf("network namespace %s: %w", l.rec.NetNS, err)
	}
	accel, err := chooseAccel(ctx, os.Getenv(AccelVariable), l.rec.Accel, l.dir, func(c *exec.Cmd) error { return startIn(c, l.rec.NetNS, nil) })
	if err != nil {
		return err
	}
	l.rec.Accel = accel
	if err := l.save(); err != nil {
		return err
	}
	if err := l.ensureDaemon(ctx); err != nil {
		return err
	}
	if err := l.ensureDisks(); err != nil {
		return err
	}
	return l.defineDomains(ctx)
}

// Open returns the lab that was set up in stateDir, running or not. Without
// one the error is fs.ErrNotExist.
func Open(stateDir string) (*Lab, error) {
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(dir, "lab.json"))
	if err != nil {
		return nil, fmt.Errorf("there is no lab in %s: %w", dir, err)
	}
	l := &Lab{dir: dir}
	if err := json.Unmarshal(data, &l.rec); err != nil {
		return nil, fmt.Errorf("%s is damaged, take the lab down: %w", filepath.Join(dir, "lab.json"), err)
	}
	return l, nil
}

// Down ends everything that runs for the lab of stateDir and removes what it
// made, but for the consoles. It needs no intact lab, only the folder's name,
// and finds nothing to do where there was none. With purge the consoles go as
// well, and the folder unless others have put files there.
func Down(ctx context.Context, stateDir string, purge bool) error {
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := lock(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	// Without a readable record the name is what Up would have given.
	sp := space{netnsName(dir), filepath.Join(dir, "var")}
	if l, err := Open(dir); err == nil {
		sp = l.space()
	}
	if err := sp.end(ctx, func(Process) bool { return true }); err != nil {
		return fmt.Errorf("lab in %s is still up: %w", dir, err)
	}
	if err := deleteNetNS(sp.netns); err != nil {
		return err
	}
	if err := unmountBelow(dir); err != nil {
		return err
	}
	// The record goes last: until then Down can be repeated as it was.
	leftovers := []string{"run", "var", "etc", "probe.img", ".lab.json*", "lab.json"}
	if purge {
		leftovers = append(leftovers, "console")
	}
	for _, pattern := range leftovers {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if match, _ := filepath.Match(pattern, e.Name()); !match {
				continue
			}
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if purge {
		if err := os.Remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}

// Down ends the lab and keeps its consoles, see the function Down.
func (l *Lab) Down(ctx context.Context) error { return Down(ctx, l.dir, false) }

// Config is what the lab was last asked to be.
func (l *Lab) Config() Config { return l.rec.Config }

// Dir is the lab's state folder, absolute.
func (l *Lab) Dir() string { return l.dir }

// Command returns a command that runs in the lab's network namespace, as the
// disc host does. No process stands between it and the caller.
func (l *Lab) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + filepath.Join(netnsFolder, l.rec.NetNS), "--", name}, args...)...)
}

// Status is what a lab is at one moment.
type Status struct {
	Lab       string          `json:"lab"`
	Dir       string          `json:"dir"`
	Running   bool            `json:"running"` // the lab's libvirtd answers
	NetNS     string          `json:"netns"`
	Network   Network         `json:"network"`
	Accel     Accel           `json:"accel"`
	AccelWhy  string          `json:"accel_why"`
	Libvirt   string          `json:"libvirt"` // for virsh -c
	Processes []Process       `json:"processes"`
	Machines  []MachineStatus `json:"machines"`
}

// MachineStatus is a machine at one moment.
type MachineStatus struct {
	Machine
	Power   Power    `json:"power"`
	Console string   `json:"console"` // file
	Images  []string `json:"images"`  // files of the disks
}

// Status looks at the lab. A lab that is down has no error, it is not running.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	s := Status{
		Lab: l.rec.Config.Name, Dir: l.dir, NetNS: l.rec.NetNS, Network: l.rec.Config.Network,
		Accel: l.rec.Accel.Kind, AccelWhy: l.rec.Accel.Why,
		Libvirt: "qemu+unix:///system?socket=" + l.socket(),
	}
	var err error
	if s.Processes, err = l.space().processes(); err != nil {
		return s, err
	}
	power := map[string]Power{}
	err = l.virt(ctx, func(v *virt) error {
		s.Running = true
		power, err = v.powers()
		return err
	})
	if s.Running && err != nil {
		return s, err
	}
	for _, m := range l.rec.Config.Machines {
		ms := MachineStatus{Machine: m, Power: power[m.Name], Console: l.Console(m.Name)}
		if ms.Power == "" {
			ms.Power = Off
		}
		for i := range m.Disks {
			ms.Images = append(ms.Images, l.image(m.Name, i))
		}
		s.Machines = append(s.Machines, ms)
	}
	return s, nil
}

func (l *Lab) space() space { return space{l.rec.NetNS, filepath.Join(l.dir, "var")} }

func (l *Lab) socket() string { return filepath.Join(l.dir, "run/libvirt/libvirt-sock") }

func (l *Lab) image(machine string, disk int) string {
	return filepath.Join(l.dir, "var", strings.TrimPrefix(imageFolder, "/var"), imageName(machine, disk))
}

// machine returns the machine of that name.
func (l *Lab) machine(name string) (Machine, error) {
	i := slices.IndexFunc(l.rec.Config.Machines, func(m Machine) bool { return m.Name == name })
	if i < 0 {
		var names []string
		for _, m := range l.rec.Config.Machines {
			names = append(names, m.Name)
		}
		return Machine{}, fmt.Errorf("lab %s has no machine %q, it has %s", l.rec.Config.Name, name, strings.Join(names, ", "))
	}
	return l.rec.Config.Machines[i], nil
}

func (l *Lab) save() error {
	data, err := json.MarshalIndent(l.rec, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(l.dir, "lab.json"), data, 0o644, renameio.WithTempDir(l.dir))
}

// ensureDisks makes the images of the machines' disks, blank and sparse, and
// removes those of disks that the lab no longer has.
func (l *Lab) ensureDisks() error {
	folder := filepath.Dir(l.image("", 0))
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	stale, err := filepath.Glob(filepath.Join(folder, "*"))
	if err != nil {
		return err
	}
	for _, m := range l.rec.Config.Machines {
		for i, d := range m.Disks {
			path := l.image(m.Name, i)
			stale = slices.DeleteFunc(stale, func(s string) bool { return s == path })
			if err := ensureImage(path, d.Size); err != nil {
				return fmt.Errorf("disk %d of %s: %w", i, m.Name, err)
			}
		}
	}
	for _, s := range stale {
		if err := os.Remove(s); err != nil {
			return err
		}
	}
	return nil
}

func ensureImage(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() > size {
		return fmt.Errorf("a disk of %d bytes cannot shrink to %d: take the lab down first", st.Size(), size)
	}
	return f.Truncate(size)
}

// netnsName is the name of the network namespace of the lab in dir: readable,
// and unlike that of a lab in any other folder.
func netnsName(dir string) string {
	readable := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, filepath.Base(dir))
	sum := sha256.Sum256([]byte(dir))
	return fmt.Sprintf("lab-%.32s-%x", readable, sum[:4])
}

// lock waits until no other Up or Down works on dir. The kernel releases the
// lock with the process.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	for {
		f, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return func() { f.Close() }, nil
		}
		f.Close()
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("another process works on the lab in %s: %w", dir, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// unmountBelow unmounts what was left mounted in dir.
func unmountBelow(dir string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, p := range slices.Backward(points) {
		if p != dir && within(dir, p) {
			if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
				return fmt.Errorf("cannot unmount %s: %w", p, err)
			}
		}
	}
	return nil
}
