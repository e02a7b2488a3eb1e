package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/provision"
)

const testStack = `name: lab
version: 7
components:
  - {name: front, kind: packages, packages: [nginx], needs: [db], about: "the page"}
  - {name: db, kind: packages, packages: [etcd-server=3.5, patroni], place: {role: storage, count: 3, odd: true},
     ports: [{name: sql, number: 5432}, {name: dns, number: 53, udp: true, local: true}]}
  - {name: rabbitmq, kind: packages, packages: [rabbitmq-server], place: {role: broker}, optional: true}
  - {name: other, kind: packages, packages: [x1], optional: true}
`

func platter(args ...string) (int, string) {
	var out bytes.Buffer
	code := run(context.Background(), args, nil, &out, &out)
	return code, out.String()
}

func TestStackFileCommands(t *testing.T) {
	const racks = "../../provision/rack/testdata/"
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "stack.yaml"), []byte(testStack), 0o644); err != nil {
		t.Fatal(err)
	}
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "stack.yaml"), []byte(strings.Replace(testStack, "needs: [db]", "neds: [db]", 1)+"extra: 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	exported := filepath.Join(t.TempDir(), "mine")
	for _, c := range []struct {
		args string
		code int
		says []string
	}{
		{"stack check", 0, []string{"is good", "ejabberd: all nodes"}},
		{"stack check " + dir, 0, []string{"  1. db: the first 3 with role storage, an odd number\n  2. front: all nodes\n  3. rabbitmq: all nodes with role broker (optional)\n  4. other: all nodes (optional)\n"}},
		{"stack check " + dir + " --rack " + racks + "full.yaml", 0, []string{"1. db: node1\n", "2. front: node1, node2\n", "3. rabbitmq: node1\n", "4. other: not in this rack (optional)\n"}},
		{"stack check " + broken, 1, []string{"stack.yaml has 2 mistakes", `:4:54: unknown key "neds", did you mean "needs"?`, ":9:1: unknown key"}},
		{"stack check " + broken + " --rack " + racks + "mistakes.yaml", 1, []string{`did you mean "needs"?`, `did you mean "image"?`}}, // of both files at once
		{"stack check --rack " + racks + "full.yaml", 1, []string{"does not fit the stack", `node node1 has the role "broker"`, `node node2 has the role "storage"`}},
		{"stack show " + dir, 0, []string{"stack lab 7\n", "COMPONENT", "etcd-server=3.5, patroni", "sql 5432, dns 53/udp (local)", "the page"}},
		{"stack show -o xml", 1, []string{"table or json"}},
		{"stack export " + exported, 0, []string{"is written"}},
		{"stack export " + exported, 1, []string{"is not empty"}},
		{"stack check " + exported, 0, []string{"is good"}},
		{"rack check " + racks + "full.yaml --stack " + dir, 0, []string{"full.yaml is good", "stack lab 7"}},
		{"rack check " + racks + "full.yaml", 1, []string{`node node1 has the role "broker"`}},
		{"serve -c " + racks + "full.yaml", 1, []string{"nothing was started", `the role "broker"`}},
		{"serve -c " + racks + "full.yaml --stack " + broken, 1, []string{"nothing was started", "neds"}},
		{"serve -c " + racks + "full.yaml --stack " + dir + "/absent", 1, []string{"cannot read the stack"}},
	} {
		code, out := platter(strings.Fields(c.args)...)
		for _, want := range c.says {
			if code != c.code || !strings.Contains(out, want) {
				t.Errorf("%s: exit %d, %q is not in:\n%s", c.args, code, want, out)
			}
		}
	}
	var shown struct {
		Name, Version string
		Components    []shown
	}
	code, out := platter("stack", "show", dir, "-o", "json", "--rack", racks+"full.yaml")
	if err := json.Unmarshal([]byte(out), &shown); err != nil || code != 0 {
		t.Fatalf("exit %d, %v, %s", code, err, out)
	}
	if c := shown.Components; shown.Version != "7" || len(c) != 4 || c[0].Name != "db" || strings.Join(c[0].Nodes, " ") != "node1" || c[0].Ports[0].Number != 5432 || len(c[3].Nodes) != 0 {
		t.Errorf("%s", out)
	}
	if strings.Contains(out, "null") {
		t.Errorf("null in %s", out)
	}
	// The plans of the rack carry what is placed.
	r, _, err := loadRackAndStack(racks+"full.yaml", dir)
	if err != nil {
		t.Fatal(err)
	}
	p, err := provision.PlanFor(r, r.Nodes[1], "", 1, provision.ImageRef{})
	if err != nil || len(p.Stack.Components) != 3 || strings.Join(p.Stack.Components[0].Members, " ") != "node1" {
		t.Errorf("%+v, %v", p.Stack, err)
	}
}
