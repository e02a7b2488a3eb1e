// Command platter-node is what runs on nodes: in the initramfs, where u-root's
// init starts it as /bin/uinit, and on the installed host as the agent.
//
// It is copied onto every node and fetched by every network boot: it holds
// nothing of the disc host.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, os.Args, os.Stdout, os.Stderr)
	stop()
	var code said
	if errors.As(err, &code) {
		os.Exit(int(code))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "platter-node:", err)
		os.Exit(1)
	}
}
