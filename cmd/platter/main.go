package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run carries out one command line and returns its exit code: 0 done, 1 the
// command failed and said why on stderr. The commands host, stack status,
// stack accept and node diagnose have codes of their own.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:   "platter",
		Short: "One disc, one rack, no network: provision powered-off servers to a working IM cluster",
		Long: `Platter takes a rack of powered-off servers to a working instant-messaging
cluster, offline. It runs on the disc host, answers the nodes' network boots,
installs them, and calls a node ready when a chat message has passed.`,
		Version:       version(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(serveCmd(), rackCmd(), nodeCmd(), stackCmd(), watchCmd(), imageCmd(), discCmd(), hostCmd(), labCmd())
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var code said
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(stderr, "platter: interrupted")
	default:
		fmt.Fprintln(stderr, "platter:", err)
	}
	return 1
}

// version is the module's version or the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return info.Main.Version
}
