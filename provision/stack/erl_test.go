package stack

import (
	"context"
	"errors"
	"net/netip"
	"os/exec"
	"testing"
)

// A connection that does not come about is tried again, an expression that was
// evaluated is not.
func TestErlCallTriesAgain(t *testing.T) {
	for what, c := range map[string]struct {
		scripts []string
		want    string
		err     error
	}{
		"second try":   {[]string{"echo 'erl_call: failed to connect to node' >&2; exit 1", `echo '{ok, "yes"}'`}, "yes", nil},
		"never":        {[]string{"echo 'erl_call: failed to connect to node' >&2; exit 1"}, "", errUnreachable},
		"other errors": {[]string{"echo 'no cookie' >&2; exit 1", `echo '{ok, "yes"}'`}, "", errUnreachable},
	} {
		calls := 0
		command := func(ctx context.Context, _ string, _ ...string) *exec.Cmd {
			script := c.scripts[min(calls, len(c.scripts)-1)]
			calls++
			return exec.CommandContext(ctx, "/bin/sh", "-c", script)
		}
		got, err := erlCall("ejabberd", "node1", netip.MustParseAddrPort("127.0.0.1:5210"), command)(t.Context(), "ok.")
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
}
