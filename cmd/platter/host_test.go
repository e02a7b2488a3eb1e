package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
)

// The command host has exit codes of its own, and a rack file that is wrong is
// said to be before anything is looked at.
func TestHost(t *testing.T) {
	const rack = "../../provision/rack/testdata/"
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--help"}, 0, "Exit codes"},
		{[]string{"chek"}, 2, `unknown command "chek"`},
		{[]string{"check", "-o", "xml"}, 2, "table or json"},
		{[]string{"check", "-c", rack + "mistakes.yaml"}, 1, "mistakes"},
		{[]string{"check", "--profile", "virtualization"}, 1, `did you mean "virtualisation"?`},
		{[]string{"check", "--profile", "mixed", "-c", rack + "full.yaml"}, 2, "exclude each other"},
		{[]string{"check", "-c", rack + "full.yaml", "--node", "node9"}, 1, "has no node node9"},
	} {
		var out bytes.Buffer
		if code := run(context.Background(), append([]string{"host"}, c.args...), nil, &out, &out); code != c.code || !strings.Contains(out.String(), c.says) {
			t.Errorf("host %v: exit %d, %q", c.args, code, out.String())
		}
	}
	target, err := hostOfRack(rack+"full.yaml", "node1")
	if err != nil || len(target.Reach) != 2 || target.Reach[0].String() != "10.77.0.1:8443" || target.Reach[1].String() != "10.77.0.254:0" || target.Spec.Bridges[0].Name != "br-vm" {
		t.Errorf("%+v, %v", target, err)
	}
}
