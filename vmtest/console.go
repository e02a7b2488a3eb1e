package vmtest

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Console is the file that holds all a machine has written to its serial
// console since the lab was made, over power cycles. It need not exist yet.
func (l *Lab) Console(machine string) string {
	return filepath.Join(l.dir, "console", machine+".log")
}

// Follow reads a machine's console from offset on, in bytes, and waits for
// more at its end, until ctx ends: then Read returns ctx's error.
func (l *Lab) Follow(ctx context.Context, machine string, offset int64) io.ReadCloser {
	return &follower{ctx: ctx, path: l.Console(machine), offset: offset}
}

// follower looks at the file at intervals: inotify(7) says nothing on some
// network and overlay file systems.
type follower struct {
	ctx    context.Context
	path   string
	offset int64
	file   *os.File
}

const followInterval = 50 * time.Millisecond

func (f *follower) Read(p []byte) (int, error) {
	for {
		n, err := f.try(p)
		if n > 0 || err != nil {
			return n, err
		}
		select {
		case <-f.ctx.Done():
			return 0, f.ctx.Err()
		case <-time.After(followInterval):
		}
	}
}

// try returns 0 and no error where there is nothing yet.
func (f *follower) try(p []byte) (int, error) {
	if f.file == nil {
		file, err := os.Open(f.path)
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		f.file = file
	}
	n, err := f.file.ReadAt(p, f.offset)
	f.offset += int64(n)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

func (f *follower) Close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}

// Attach connects to a machine's serial console, both ways. The machine must
// be on, and the connection ends with its power. One caller at a time is
// served, others wait. What the machine writes goes to the console file as well.
func (l *Lab) Attach(ctx context.Context, machine string) (net.Conn, error) {
	if _, err := l.machine(machine); err != nil {
		return nil, err
	}
	path := filepath.Join(l.dir, "run", strings.TrimPrefix(serialFolder, "/run"), machine)
	conn, err := dialUnix(ctx, path)
	if err != nil {
		return nil, errors.Join(errors.New("the console of "+machine+" cannot be attached, is the machine on?"), err)
	}
	return conn, nil
}
