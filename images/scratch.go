package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// scratch is a folder for one build. Only one build of a name runs at a time.
type scratch struct {
	dir  string
	lock *os.File
}

// newScratch makes an empty folder WORKDIR/NAME. What a build that was killed
// left there goes.
func newScratch(workDir, name string) (*scratch, error) {
	workDir, err := filepath.Abs(workDir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(workDir, 0o755); err != nil {
		return nil, fmt.Errorf("work folder cannot be made: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(workDir, name+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("work folder cannot be used: %w", err)
	}
	// The last program of a build that is over may still be on its way out.
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("another build of %s is running in %s: wait for it or name another work folder", name, workDir)
	}
	s := &scratch{dir: filepath.Join(workDir, name), lock: lock}
	if err := errors.Join(os.RemoveAll(s.dir), os.Mkdir(s.dir, 0o755)); err != nil {
		lock.Close()
		return nil, fmt.Errorf("work folder cannot be emptied: %w", err)
	}
	return s, nil
}

func (s *scratch) remove() {
	os.RemoveAll(s.dir)
	s.lock.Close()
}

// run runs cmd so that it cannot leave anything behind: its mounts live in a
// mount namespace that ends with it, an interrupt reaches its whole process
// group, and while a descendant lives the lock is held.
func (s *scratch) run(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Unshareflags: syscall.CLONE_NEWNS}
	cmd.ExtraFiles = append(cmd.ExtraFiles, s.lock)
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	err := cmd.Run()
	if err != nil && cmd.Process != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	return err
}

// lineWriter cuts what is written into lines and keeps the last of them.
type lineWriter struct {
	each func(string)
	part []byte
	last []string
}

const keptLines = 15

func (w *lineWriter) Write(p []byte) (int, error) {
	w.part = append(w.part, p...)
	for {
		i := bytes.IndexByte(w.part, '\n')
		if i < 0 {
			return len(p), nil
		}
		line := string(w.part[:i])
		w.part = w.part[i+1:]
		if w.last = append(w.last, line); len(w.last) > keptLines {
			w.last = w.last[1:]
		}
		w.each(line)
	}
}

// progress returns a function that tells out about bytes done, with their rate,
// at most every two seconds and at the end.
func progress(out io.Writer, what string) func(done, total int64) {
	var mu sync.Mutex
	start := time.Now()
	told := start
	return func(done, total int64) {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if now.Sub(told) < 2*time.Second && done < total {
			return
		}
		told = now
		rate := float64(done) / max(now.Sub(start).Seconds(), 0.001)
		fmt.Fprintf(out, "  %s: %s of %s, %s/s, %s\n", what, mb(done), mb(total), mb(int64(rate)), now.Sub(start).Round(time.Second))
	}
}

func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
