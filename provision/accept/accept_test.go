package accept

import (
	"bytes"
	"crypto/rand"
	"encoding/xml"
	"errors"
	escaped "html"
	"io"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/stack/load"
)

var began = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

// good is a report of a rack that passes.
func good() *Report {
	r := &Report{Rack: "muc-7", Domain: "im.example.org", Image: "debian-13", Program: "v1", Began: began, Ended: began.Add(5 * time.Minute),
		Options:    Options{Users: 100, Node: "node2", Every: 10 * time.Second, For: time.Minute, Outage: 30 * time.Second, P99: time.Second, Back: time.Minute, Whole: 5 * time.Minute},
		Components: []Component{{Name: "etcd", About: "decides", Nodes: []string{"node1", "node2"}}},
		Clocks:     Clocks{OS: 90 * time.Second, Message: 30 * time.Second},
		Load:       load.Report{Users: 100, LoggedIn: 100, Sent: 600, Delivered: 600, Latency: load.Spread{Count: 600, P50: 3000, P95: 9000, P99: 12345, Max: 20000}},
		Outage: &Outage{Node: "node2", Began: began, Load: load.Report{Users: 100, LoggedIn: 100, Sent: 600, Delivered: 590, Lost: 10, Reconnects: 50, Broken: []load.Trouble{{Node: "node2", Reason: "reset", Count: 50}}},
			Back: 4 * time.Second, Whole: 20 * time.Second, Ledger: load.Ledger{Pairs: 2, Accepted: 100, Arrived: 99, Archived: 1}},
	}
	r.Size.Sizing = provision.SizingFor(100, 2)
	for _, name := range []string{"node1", "node2"} {
		r.Nodes = append(r.Nodes, Node{Name: name, Address: "10.0.0.1", Facts: map[string]string{"cpus": "2"}, Versions: map[string]string{"kernel": "6.12.1", "ejabberd": "24.12"},
			Limits: []provision.InEffect{{What: "open files of ejabberd", OK: true, Is: "65536", Want: "at least 65536"}}})
		r.Size.Machines = append(r.Size.Machines, provision.Machine{Node: name, CPUs: 2, Memory: 8 << 30, Disk: 100 << 30})
		p := provision.ProbeResult{Probe: "login", From: name, Micros: 5000}
		r.Probes, r.After = append(r.Probes, p), append(r.After, p)
	}
	return r
}

// What makes a rack pass or not, and that the reason names it.
func TestJudge(t *testing.T) {
	r := good()
	if r.Judge(); !r.Passed || len(r.Wrong) != 0 {
		t.Fatalf("%q", r.Wrong)
	}
	failed := []provision.ProbeResult{{Probe: "archive", From: "node1", To: "node2", Failure: &provision.Failure{Code: "x", Message: "it is empty", Next: "Look"}}}
	for want, change := range map[string]func(*Report){
		"node2: open files are few": func(r *Report) { r.Nodes[1].Wrong = []string{"open files are few"} },
		"node1 has 1.0 GiB":         func(r *Report) { r.Size.Misfits = []string{"node1 has 1.0 GiB"} },
		"the probe archive from node1 to node2 failed: it is empty":                 func(r *Report) { r.Probes = failed },
		"the probe archive from node1 to node2 failed after the failure of node2: ": func(r *Report) { r.After = failed },
		"no probe ran": func(r *Report) { r.Probes = nil },
		"load: 99% of the messages arrived within":   func(r *Report) { r.Options.P99 = time.Millisecond },
		"load: 1 of 600 messages did not arrive":     func(r *Report) { r.Load.Lost = 1 },
		"not all users were logged in again":         func(r *Report) { r.Outage.Back = -1 },
		"logged in again after 4s, the limit is 1s":  func(r *Report) { r.Options.Back = time.Second },
		"the cluster was not whole again within 5m":  func(r *Report) { r.Outage.Whole = -1 },
		"whole again after 20s, the limit is 1s":     func(r *Report) { r.Options.Whole = time.Second },
		"2 of 100 messages that a node had accepted": func(r *Report) { r.Outage.Ledger.Lost = 2 },
		"no node accepted a message":                 func(r *Report) { r.Outage.Ledger = load.Ledger{} },
		"only 99 of 100 users were logged in before": func(r *Report) { r.Outage.Load.LoggedIn = 99 },
		"failure of node2: it is off":                func(r *Report) { r.Outage.Failed = "it is off" },
		"the failure of a node was not tried":        func(r *Report) { r.Outage = nil },
	} {
		r := good()
		change(r)
		if r.Judge(); r.Passed || len(r.Wrong) != 1 || !strings.Contains(r.Wrong[0], want) {
			t.Errorf("want one reason with %q, got %q", want, r.Wrong)
		}
	}
	for what, change := range map[string]func(*Report){
		"too small, but allowed":  func(r *Report) { r.Size.Misfits, r.Size.Undersized = []string{"x"}, true },
		"the failure is left out": func(r *Report) { r.Outage, r.After, r.Options.NoFailure = nil, nil, true },
	} {
		r := good()
		change(r)
		if r.Judge(); !r.Passed {
			t.Errorf("%s: %q", what, r.Wrong)
		}
	}
}

// What a node finds of itself is taken over: deviations, limits, alarms.
func TestTake(t *testing.T) {
	host, err := hostcmd.Marshal([]hostprep.Result{
		{Step: "kernel", Outcome: hostprep.Drift, Findings: []hostprep.Finding{{What: "vm.swappiness", Is: "60", Want: "10"}, {What: "fine", OK: true}}},
		{Step: "ovs", Outcome: hostprep.Failed, Reason: errors.New("no answer")}})
	if err != nil {
		t.Fatal(err)
	}
	var n Node
	n.Take(provision.Diagnosis{Host: host, Down: []string{"node9"}, Stack: "refused", Alarms: []string{"low"},
		Limits: []provision.InEffect{{What: "backlog", Is: "128", Want: "at least 4096"}, {What: "ok", OK: true}}, Versions: map[string]string{"kernel": "6"}})
	want := []string{"kernel: vm.swappiness is 60, should be 10", "the check of ovs failed: no answer", "backlog is 128, should be at least 4096",
		"alarm: low", "the messaging service does not answer: refused", "it misses node9 in the cluster"}
	if strings.Join(n.Wrong, "|") != strings.Join(want, "|") || n.Versions["kernel"] != "6" {
		t.Errorf("%q", n.Wrong)
	}
	n = Node{}
	if n.Take(provision.Diagnosis{Host: []byte("[]")}); len(n.Wrong) != 1 || !strings.Contains(n.Wrong[0], "older") {
		t.Errorf("%q", n.Wrong)
	}
}

func TestClocks(t *testing.T) {
	at := func(s int, e provision.Event) provision.Event {
		e.Time, e.Generation = began.Add(time.Duration(s)*time.Second), 2
		return e
	}
	stage := func(s int, st provision.Stage) provision.Event {
		return at(s, provision.Event{Kind: provision.EventReport, Report: &provision.Report{Stage: st}})
	}
	node := func(shift int) []provision.Event {
		old := at(0, provision.Event{Kind: provision.EventBoot, Action: provision.ActionInstall})
		old.Generation = 1
		return []provision.Event{old,
			at(shift+100, provision.Event{Kind: provision.EventBoot, Action: provision.ActionInstall}), at(shift+150, provision.Event{Kind: provision.EventBoot, Action: provision.ActionInstall}),
			stage(shift+200, provision.StagePreparing), stage(shift+210, provision.StageJoining), at(shift+240, provision.Event{Kind: provision.EventProbe}),
			stage(shift+900, provision.StagePreparing), stage(shift+901, provision.StageJoining)} // a later boot
	}
	if got := ClocksOf([]int{2}, node(0)); got != (Clocks{100 * time.Second, 30 * time.Second}) {
		t.Errorf("%+v", got)
	}
	if got := ClocksOf([]int{2, 2}, node(0), node(7)); got != (Clocks{107 * time.Second, 37 * time.Second}) {
		t.Errorf("%+v", got)
	}
	if got := ClocksOf([]int{2, 2}, node(0), nil); got != (Clocks{}) {
		t.Errorf("one node is unknown: %+v", got)
	}
}

func TestOptions(t *testing.T) {
	rack := &provision.Rack{Nodes: []provision.Node{{Name: "a"}, {Name: "b"}}, Stack: provision.StackSpec{Users: 1000}}
	o := Options{}.WithDefaults(rack)
	if wrong := o.Check(rack); len(wrong) != 0 || o.Users != 1000 || o.Node != "b" || o.For != time.Minute || o.P99 != time.Second {
		t.Errorf("%q %+v", wrong, o)
	}
	if wrong := (Options{Users: 1, For: -1, Node: "c", Outage: time.Hour, Lost: -1}).WithDefaults(rack).Check(rack); len(wrong) != 5 {
		t.Errorf("%q", wrong)
	}
	rack.Nodes = rack.Nodes[:1]
	if o := (Options{}).WithDefaults(rack); !o.NoFailure || len(o.Check(rack)) != 0 {
		t.Errorf("one node: %+v", o)
	}
}

func newKey(t *testing.T) (minisign.PublicKey, minisign.PrivateKey) {
	t.Helper()
	pub, sec, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return pub, sec
}

// The report is well-formed, has every section, tells what was found, refers to
// nothing outside, and cannot be made to carry somebody's markup.
func TestHTML(t *testing.T) {
	pub, _ := newKey(t)
	for _, passed := range []bool{true, false} {
		r := good()
		if !passed {
			r.Nodes[0].Wrong = []string{"<script>alert(1)</script>"}
		}
		r.Judge()
		html, err := r.HTML(pub)
		if err != nil {
			t.Fatal(err)
		}
		ids := map[string]bool{}
		d := xml.NewDecoder(bytes.NewReader(html))
		d.Strict, d.AutoClose, d.Entity = false, []string{"meta"}, xml.HTMLEntity
		depth := 0
		for {
			tok, err := d.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			switch tok := tok.(type) {
			case xml.StartElement:
				depth++
				for _, a := range tok.Attr {
					switch a.Name.Local {
					case "id":
						ids[a.Value] = true
					case "src", "href":
						t.Errorf("<%s> refers to %s", tok.Name.Local, a.Value)
					}
				}
				if tok.Name.Local == "script" || tok.Name.Local == "link" {
					t.Errorf("<%s>", tok.Name.Local)
				}
			case xml.EndElement:
				depth--
			}
		}
		if depth != 0 {
			t.Errorf("%d elements are left open", depth)
		}
		for _, id := range []string{"result", "rack", "versions", "clocks", "size", "probes", "load", "limits", "failure", "not-tested", "signature"} {
			if !ids[id] {
				t.Errorf("there is no section %s", id)
			}
		}
		text := escaped.UnescapeString(string(html))
		for _, want := range []string{"muc-7", "6.12.1", "24.12", "12.3ms", "1m30s", "open files of ejabberd", "10 / 0", "99 / 1 / 0", "验收报告", pub.String(), r.Name() + ".minisig"} {
			if !strings.Contains(text, want) {
				t.Errorf("the report does not say %q", want)
			}
		}
		if strings.Contains(text, "Not passed") == passed || strings.Contains(text, "http://") || strings.Contains(text, "https://") || strings.Contains(text, "url(") {
			t.Errorf("passed: %v\n%s", passed, text)
		}
	}
}

func TestSignature(t *testing.T) {
	pub, sec := newKey(t)
	other, _ := newKey(t)
	html := []byte("<!DOCTYPE html>a report")
	sig := Sign(sec, html, "accept-x.html")
	if err := Verify(pub, html, sig); err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(html)
	changed[20] ^= 1
	for want, err := range map[string]error{
		"does not fit":   Verify(pub, changed, sig),
		"of the key":     Verify(other, html, sig),
		"cannot be read": Verify(pub, html, []byte("nonsense")),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
	// The comment says which file it is, and is signed too.
	if err := Verify(pub, html, bytes.Replace(sig, []byte("accept-x"), []byte("accept-y"), 1)); err == nil {
		t.Error("another file's name passes")
	}
}
