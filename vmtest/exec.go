package vmtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// firstListener is the descriptor at which sd_listen_fds(3) passes sockets.
const firstListener = 3

// Exec replaces the calling process by argv in the lab's network namespace;
// it returns only with an error. Before it goes there it listens on the TCP
// addresses in listen, where the caller is, and passes the sockets to argv as
// systemd's socket activation does (LISTEN_FDS, LISTEN_PID): so a server in
// the lab can be reached from outside. report is told each address, with the
// port that the kernel chose where it was 0.
func (l *Lab) Exec(ctx context.Context, argv, listen []string, report func(net.Addr)) error {
	if len(argv) == 0 {
		return errors.New("no command given")
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	env := os.Environ()
	var sockets []int
	for _, addr := range listen {
		fd, err := listenTCP(ctx, addr, report)
		if err != nil {
			return err
		}
		sockets = append(sockets, fd)
	}
	ns, err := netns.GetFromPath(filepath.Join(netnsFolder, l.rec.NetNS))
	if err != nil {
		return fmt.Errorf("lab %s is not up: %w", l.rec.Config.Name, err)
	}
	// The thread that calls execve(2) becomes the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("cannot enter the lab's network namespace, it needs root: %w", err)
	}
	if len(sockets) > 0 {
		env = append(without(env, "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
			fmt.Sprintf("LISTEN_FDS=%d", len(sockets)), fmt.Sprintf("LISTEN_PID=%d", os.Getpid()))
	}
	for i, fd := range sockets {
		if err := unix.Dup3(fd, firstListener+i, 0); err != nil {
			return fmt.Errorf("cannot pass a socket: %w", err)
		}
	}
	return fmt.Errorf("cannot start %s: %w", path, syscall.Exec(path, argv, env))
}

// listenTCP returns a listening socket whose number is far above those where
// sockets are passed.
func listenTCP(ctx context.Context, addr string, report func(net.Addr)) (int, error) {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return 0, err
	}
	defer f.Close()
	report(ln.Addr())
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 100)
}

// without returns env without the variables of those names.
func without(env []string, names ...string) []string {
	var out []string
next:
	for _, e := range env {
		for _, n := range names {
			if strings.HasPrefix(e, n+"=") {
				continue next
			}
		}
		out = append(out, e)
	}
	return out
}
