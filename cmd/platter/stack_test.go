package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// discHost answers a socket with nodes and probe results.
func discHost(t *testing.T, nodes []provision.State, results []provision.ProbeResult) (socket string, asked *[]string) {
	t.Helper()
	socket, asked = t.TempDir()+"/op.sock", new([]string)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/nodes", func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(nodes) })
	mux.HandleFunc("POST /v1/stack/probe", func(w http.ResponseWriter, r *http.Request) {
		*asked = r.URL.Query()["node"]
		for _, res := range results {
			json.NewEncoder(w).Encode(res)
		}
	})
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket, asked
}

func TestStackStatus(t *testing.T) {
	member := func(name, sees, misses string) provision.State {
		return provision.State{Name: name, Known: true, Stage: provision.StageReady, LastSeen: time.Now(),
			Facts:     map[string]string{provision.FactRunning: sees, provision.FactDown: misses},
			DownSince: map[string]time.Time{"b": time.Now().Add(-3 * time.Minute)}}
	}
	for name, c := range map[string]struct {
		nodes []provision.State
		code  int
		says  []string
	}{
		"whole":     {[]provision.State{member("a", "a,b", ""), member("b", "a,b", "")}, 0, []string{"NODE", "The cluster is whole: 2 members."}},
		"not whole": {[]provision.State{member("a", "a", "b"), {Name: "b", Known: true, Stage: provision.StageOff}}, 3, []string{"not whole:\n- b has never been seen", "- b does not run since", "(3m0s ago), as a sees it", "never"}},
	} {
		socket, _ := discHost(t, c.nodes, nil)
		var out, errs bytes.Buffer
		code := run(context.Background(), []string{"stack", "status", "--socket", socket}, nil, &out, &errs)
		for _, want := range c.says {
			if code != c.code || !strings.Contains(out.String(), want) || errs.Len() > 0 {
				t.Errorf("%s: exit %d, %q not in:\n%s%s", name, code, want, &out, &errs)
			}
		}
		out.Reset()
		code = run(context.Background(), []string{"stack", "status", "-o", "json", "--socket", socket}, nil, &out, &errs)
		var got provision.Cluster
		if err := json.Unmarshal(out.Bytes(), &got); err != nil || code != c.code || got.Whole != (c.code == 0) || len(got.Members) != 2 {
			t.Errorf("%s: exit %d, %v, %s", name, code, err, &out)
		}
	}
}

func TestStackProbe(t *testing.T) {
	good := provision.ProbeResult{Probe: "message", From: "a", To: "b", Micros: 1234}
	bad := provision.ProbeResult{Probe: "upload", From: "a", Failure: &provision.Failure{Code: "probe-upload", Message: "node a is full", Next: "Make room"}}
	for _, c := range []struct {
		args    []string
		results []provision.ProbeResult
		code    int
		out     string
		errs    string
	}{
		{nil, []provision.ProbeResult{good}, 0, "message     a -> b                ok      1.2 ms\n", ""},
		{[]string{"a", "b"}, []provision.ProbeResult{good, bad}, 1, "FAILED  probe-upload: node a is full. Make room", "1 of 2 probes failed"},
		{[]string{"-o", "json"}, []provision.ProbeResult{good, bad}, 1, `"code": "probe-upload"`, "1 of 2 probes failed"},
		{[]string{"a"}, nil, 1, "", "name two nodes, or none"},
		{nil, nil, 1, "", "no probe"},
	} {
		socket, asked := discHost(t, nil, c.results)
		var out, errs bytes.Buffer
		code := run(context.Background(), append([]string{"stack", "probe", "--socket", socket}, c.args...), nil, &out, &errs)
		if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errs.String(), c.errs) {
			t.Errorf("%v: exit %d, %q, %q", c.args, code, out.String(), errs.String())
		}
		if len(c.args) == 2 && c.args[0] == "a" && strings.Join(*asked, " ") != "a b" {
			t.Errorf("asked for %v", *asked)
		}
	}
}
