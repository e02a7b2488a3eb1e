package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Devices loads drivers for every device that is there or appears, and tells
// those who wait for one.
type Devices struct {
	root    string
	modules *Modules // nil: no driver is loaded
	log     func(format string, args ...any)
	socket  *os.File

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every event
	last    time.Time     // of the last event
	loading int           // devices whose drivers are being loaded
}

// WatchDevices listens for devices from now on and begins to load drivers for
// those that are there already. root is where sys is.
func WatchDevices(root string, modules *Modules, log func(string, ...any)) (*Devices, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	// Group 1 is the kernel itself; a storm of devices must not overflow.
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	d := &Devices{root: root, modules: modules, log: log, socket: os.NewFile(uintptr(fd), "uevent"), changed: make(chan struct{}), last: time.Now()}
	done := d.busy()
	go d.listen()
	go func() {
		defer done()
		d.walk()
	}()
	return d, nil
}

// Close stops listening.
func (d *Devices) Close() error { return d.socket.Close() }

// busy says that devices are about to appear, until the function it returns
// is called.
func (d *Devices) busy() (done func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.loading++
	return func() {
		d.mu.Lock()
		d.loading--
		d.mu.Unlock()
		d.tell()
	}
}

// walk loads drivers for the devices that are there, on all processors: most
// drivers spend their time waiting for their hardware. A driver may make new
// devices, whose events listen hears.
func (d *Devices) walk() {
	var g errgroup.Group
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	filepath.WalkDir(filepath.Join(d.root, "sys/devices"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "modalias" {
			if b, err := os.ReadFile(path); err == nil {
				g.Go(func() error { d.load(string(bytes.TrimSpace(b))); return nil })
			}
		}
		return nil
	})
	g.Wait()
}

// opticalDrive is what SCSI devices of type 5 begin with. An install reads
// nothing from discs: their drivers would only cost time. A disc host asks for
// them by name.
const opticalDrive = "scsi:t-0x05"

func (d *Devices) load(modalias string) {
	if d.modules == nil || modalias == "" || strings.HasPrefix(modalias, opticalDrive) {
		return
	}
	done := d.busy()
	defer done()
	if err := d.modules.LoadFor(modalias); err != nil {
		d.log("a driver does not load: %v", err)
	}
}

func (d *Devices) listen() {
	b := make([]byte, 64<<10)
	for {
		n, err := d.socket.Read(b)
		switch {
		case errors.Is(err, unix.ENOBUFS): // events were lost: look at everything
			d.walk()
		case err != nil:
			return
		default:
			if modalias, added := parseUevent(b[:n]); added && modalias != "" {
				go d.load(modalias)
			}
			d.tell()
		}
	}
}

// parseUevent reads one message of the kernel: ACTION@PATH and then KEY=VALUE,
// each ended by a zero byte.
func parseUevent(b []byte) (modalias string, added bool) {
	for field := range bytes.SplitSeq(b, []byte{0}) {
		if v, ok := bytes.CutPrefix(field, []byte("MODALIAS=")); ok {
			modalias = string(v)
		}
		if string(field) == "ACTION=add" {
			added = true
		}
	}
	return modalias, added
}

func (d *Devices) tell() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = time.Now()
	close(d.changed)
	d.changed = make(chan struct{})
}

// Wait calls done now and after every change of devices until it is true.
func (d *Devices) Wait(ctx context.Context, done func() bool) error {
	for {
		d.mu.Lock()
		changed := d.changed
		d.mu.Unlock()
		if done() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Settle returns once no driver is being loaded and no device has appeared for
// quiet.
func (d *Devices) Settle(ctx context.Context, quiet time.Duration) error {
	for {
		d.mu.Lock()
		left, busy := quiet-time.Since(d.last), d.loading > 0
		d.mu.Unlock()
		if left <= 0 && !busy {
			return nil
		}
		if busy {
			left = quiet
		}
		t := time.NewTimer(left)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}
