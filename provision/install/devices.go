package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

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
}

// WatchDevices listens for devices from now on and loads drivers for those
// that are there already. root is where sys is.
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
	go d.listen()
	d.walk()
	return d, nil
}

// Close stops listening.
func (d *Devices) Close() error { return d.socket.Close() }

// walk loads drivers for the devices that are there. A driver may make new
// ones, whose events listen hears.
func (d *Devices) walk() {
	filepath.WalkDir(filepath.Join(d.root, "sys/devices"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "modalias" {
			if b, err := os.ReadFile(path); err == nil {
				d.load(string(bytes.TrimSpace(b)))
			}
		}
		return nil
	})
	d.tell()
}

func (d *Devices) load(modalias string) {
	if d.modules == nil || modalias == "" {
		return
	}
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
			if modalias, added := parseUevent(b[:n]); added {
				d.load(modalias)
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

// Settle returns once no device has appeared for quiet.
func (d *Devices) Settle(ctx context.Context, quiet time.Duration) error {
	for {
		d.mu.Lock()
		left := quiet - time.Since(d.last)
		d.mu.Unlock()
		if left <= 0 {
			return nil
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
