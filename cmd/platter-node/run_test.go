package main

import (
	"bytes"
	"context"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// What runs on nodes holds no server code and nothing that builds images.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{.ImportPath}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, "platter/provision/install") {
		t.Fatalf("go list does not list what it should: %v", deps)
	}
	for _, d := range deps {
		for _, server := range []string{"modernc.org/", "platter/pxe", "platter/images", "platter/provision/store", "platter/provision/site", "platter/provision/dischost",
			"platter/provision/rack", "platter/provision/stack/probe", "platter/vmtest", "github.com/u-root/mkuimage", "github.com/insomniacslk/dhcp", "github.com/pin/tftp", "github.com/spf13/cobra"} {
			if strings.HasPrefix(d, server) {
				t.Errorf("platter-node depends on %s", d)
			}
		}
	}
}

func TestRun(t *testing.T) {
	for _, c := range []struct {
		args []string
		out  string
		err  string
	}{
		{[]string{"platter-node", "version"}, "platter-node ", ""},
		{[]string{"platter-node", "help"}, "usage:", ""},
		{[]string{"platter-node"}, "usage:", "unknown command"},
		{[]string{"platter-node", "host", "--help"}, "Exit codes", ""},
		{[]string{"platter-node", "host", "chek"}, "unknown command", "exit code 2"},
		{[]string{"platter-node", "reap"}, "usage:", "reap"},
		{[]string{"platter-node", "install", "--plan", "x"}, "", "--target"},
		{[]string{"platter-node", "install", "--plan", "/nowhere", "--secrets", "x", "--keys", "x", "--target", "x"}, "", "/nowhere"},
		{[]string{"platter-node", "install", "--nonsense"}, "-nonsense", "nonsense"},
	} {
		var out bytes.Buffer
		err := run(context.Background(), c.args, &out, &out)
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) || !strings.Contains(out.String(), c.out) {
			t.Errorf("%v: %v\n%s", c.args, err, out.String())
		}
	}
}
