package hostprep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const lockFile = "/run/platter-host.lock"

// Lock keeps everyone else from changing the host until release is called.
// Where somebody does already, busy is told who and Lock waits for its end; a
// busy that returns an error ends the waiting. A process that is killed lets
// go.
func (h *Host) Lock(ctx context.Context, busy func(pid string) error) (release func(), err error) {
	name := filepath.Join(h.Root, lockFile)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, fmt.Errorf("host lock: %w", err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, fmt.Errorf("host lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, _ := os.ReadFile(name)
		if err := busy(strings.TrimSpace(string(pid))); err != nil {
			f.Close()
			return nil, err
		}
		got := make(chan error, 1)
		go func() {
			for {
				if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
					got <- err
					return
				}
			}
		}()
		select {
		case err = <-got:
		case <-ctx.Done():
			go func() { <-got; f.Close() }() // gives back what comes too late
			return nil, ctx.Err()
		}
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("host lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}
