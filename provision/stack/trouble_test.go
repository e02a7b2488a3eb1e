package stack

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// TestUntimely: a clock or a certificate that is wrong is named with what to do,
// and the clock first where both seem to be.
func TestUntimely(t *testing.T) {
	now := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	cert := &x509.Certificate{NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(19, 0, 0)}
	expired := &x509.Certificate{NotBefore: now.AddDate(-2, 0, 0), NotAfter: now.AddDate(-1, 0, 0)}
	const day = 24 * time.Hour
	for name, c := range map[string]struct {
		cert  *x509.Certificate
		ahead time.Duration // of the node, which says now
		known bool
		says  []string // none: nothing is wrong
		not   string
	}{
		"right":                  {cert, 0, true, nil, ""},
		"a few seconds":          {cert, 40 * time.Second, true, nil, ""},
		"right as far as known":  {cert, 0, false, nil, ""},
		"years ahead":            {cert, 3 * 365 * day, true, []string{"the clock of node node2 is 1095 days ahead of the disc host's", "timedatectl set-time \"2023-05-07 07:08:09\""}, "reinstall"},
		"minutes behind":         {cert, -5 * time.Minute, true, []string{"5m0s behind the disc host's", "2026-05-06 07:08:09 UTC instead of 2026-05-06 07:13:09 UTC"}, "reinstall"},
		"expired":                {expired, 0, true, []string{"the certificate of node node2 expired on 2025-05-06 07:08:09 UTC", "platter node reinstall node2"}, "timedatectl"},
		"expired or wrong":       {expired, 0, false, []string{"expired on", "timedatectl", "platter node reinstall node2"}, ""},
		"expired by wrong clock": {expired, 2 * 365 * day, true, []string{"730 days ahead", "its certificate is not valid", "timedatectl"}, "reinstall"},
		"not yet":                {&x509.Certificate{NotBefore: now.Add(day), NotAfter: now.AddDate(1, 0, 0)}, 0, true, []string{"valid from 2026-05-07 07:08:09 UTC on only"}, "timedatectl"},
	} {
		got := untimely("node2", c.cert, now, c.ahead, c.known)
		if (got == "") != (c.says == nil) || c.not != "" && strings.Contains(got, c.not) {
			t.Errorf("%s: %q", name, got)
		}
		for _, want := range c.says {
			if !strings.Contains(got, want) {
				t.Errorf("%s: %q does not say %q", name, got, want)
			}
		}
	}
}

func TestParseListeners(t *testing.T) {
	got := parseListeners(`LISTEN 0      4096   127.0.0.1:2381       0.0.0.0:*    users:(("etcd",pid=123,fd=9))
LISTEN 0      511            *:443              *:*    users:(("nginx",pid=8,fd=6),("nginx",pid=7,fd=6))
LISTEN 0      4096   127.0.0.53%lo:53        0.0.0.0:*    users:(("systemd-resolve",pid=4,fd=1))
LISTEN 0      128         [::]:22            [::]:*    users:(("sshd: root@a b",pid=5,fd=4))
LISTEN 0      128      0.0.0.0:80         0.0.0.0:*
garbage
`)
	want := []listener{{"127.0.0.1", 2381, "etcd", 123}, {"*", 443, "nginx", 8}, {"*", 443, "nginx", 7}, {"127.0.0.53", 53, "systemd-resolve", 4}, {"*", 22, "sshd: root@a b", 5}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestPortTaken: a program of this machine has the port of a component.
func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	plan := testPlan(t)
	c := provision.PlacedComponent{Component: provision.Component{Name: "web", Units: []string{"nginx.service"},
		Ports: []provision.Port{{Name: "http", Number: port}}}, Members: []string{"node2"}}
	plan.Stack.Components = []provision.PlacedComponent{c}
	d := NewDoctor(plan, nil)
	text := d.taken(c, listening(t.Context()))
	for _, want := range []string{"web cannot work on node node2", fmt.Sprintf("port %d is taken by", port), fmt.Sprintf("process %d: %.20s", os.Getpid(), os.Args[0]), "starts by itself"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not say %q", text, want)
		}
	}
	// Who listens elsewhere disturbs nobody, nor does who shares the port.
	for name, all := range map[string][]listener{
		"another address":    {{"10.9.9.9", port, "x", os.Getpid()}},
		"another port":       {{"*", port + 1, "x", os.Getpid()}},
		"systemd has it too": {{"*", port, "x", os.Getpid()}, {"10.1.2.3", port, "systemd", 1}},
		"it has just ended":  {{"*", port, "x", 1 << 30}},
	} {
		if text := d.taken(c, all); text != "" {
			t.Errorf("%s: %s", name, text)
		}
	}
	if d.taken(c, []listener{{"10.1.2.3", port, "x", os.Getpid()}}) == "" {
		t.Error("a stranger at the node's address is not named")
	}
	// The same program, where it is the component's own.
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for part := range strings.SplitSeq(strings.TrimSpace(string(cgroup)), "/") {
		if unit, ok := strings.CutSuffix(part, ".service"); ok {
			d.plan.Stack.Components[0].Units = []string{unit + ".socket"}
			if !d.ours(os.Getpid()) {
				t.Errorf("%s is not taken for a process of %s", part, unit)
			}
		}
	}
}

// TestSilent: who does not serve is named with what it said last and what to do.
func TestSilent(t *testing.T) {
	d := NewDoctor(testPlan(t), nil)
	c := provision.PlacedComponent{Component: provision.Component{Name: "web", Units: []string{"platter-no-such.service"}, Data: []string{"/x"}}, Members: []string{"node2"}}
	d.since["web"] = time.Now()
	text := d.silent(context.Background(), c, fmt.Errorf("connection refused"))
	for _, want := range []string{"web on node node2 does not work since", "connection refused", "journalctl -u platter-no-such.service", "platter stack restore"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not say %q", text, want)
		}
	}
	c.Members = []string{"node1", "node2"}
	if text := d.silent(context.Background(), c, fmt.Errorf("x")); !strings.Contains(text, "'platter node reinstall node2' gives it those of the other nodes") {
		t.Error(text)
	}
	c.Member = provision.MemberEtcd
	c.Name = "no-such-member"
	if text := d.silent(context.Background(), c, fmt.Errorf("x")); !strings.Contains(text, "has not found its part") {
		t.Error(text)
	}
}

func TestComplaint(t *testing.T) {
	for journal, want := range map[string]string{
		"":                    "",
		"starting\nserving\n": "serving",
		"LOG:  starting\nFATAL:  could not open file \"global/pg_control\"\n\nLOG: shut down\n": "FATAL:  could not open file \"global/pg_control\"",
		"bind() to 0.0.0.0:443 failed (98: Address already in use)\nstill\n":                    "bind() to 0.0.0.0:443 failed (98: Address already in use)",
		"terror\nquiet\n":                    "quiet",
		"error: " + strings.Repeat("ä", 300): "error: " + strings.Repeat("ä", 146),
	} {
		if got := complaint(journal); got != want {
			t.Errorf("%q: %q", journal, got)
		}
	}
}
