//go:build e2e || bench

package vmtest_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"platter/provision/accept"
)

// TestStackAccept: a rack is accepted, with a node that fails under load, and the
// report stands on its own; with a limit that nothing could keep it is not, and
// the report says why.
func TestStackAccept(t *testing.T) {
	r, boxes := boxRack(t, 3)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady)

	html, report := r.accept(0, "--users", "60", "--for", "20s", "--every", "2s", "--yes")
	if !report.Passed || len(report.Probes) != 18 || len(report.After) != 18 || report.Load.Delivered != 600 || report.Clocks.Message <= 0 || report.Clocks.OS <= 0 {
		t.Errorf("%+v", report)
	}
	t.Log(summary(report))
	o := report.Outage
	if o == nil || o.Node != "node3" || o.Load.Reconnects < 20 || o.Back < 0 || o.Whole <= 0 || o.Ledger.Accepted < 100 || o.Ledger.Lost != 0 {
		t.Errorf("%+v", o)
	}
	for _, n := range report.Nodes {
		if len(n.Limits) < 5 || n.Versions["ejabberd"] == "" || n.Versions["postgresql-17"] == "" || n.Versions["kernel"] == "" || n.Clocks.OS <= 0 {
			t.Errorf("%+v", n)
		}
	}
	if got := boxes[0].sh("ejabberdctl registered_users im.e2e.example | grep -c platter-load || true"); got != "0" {
		t.Errorf("%s accounts are left", got)
	}

	// Its signature, by the disc host's key and without the disc host.
	t.Log(r.stack("accept", "--verify", html))
	key := strings.TrimSpace(r.stack("key"))
	r.platter("stack", "accept", "--verify", html, "--key", key, "--socket", "/nowhere")
	text := r.read("accept/" + filepath.Base(html))
	if err := os.WriteFile(html, []byte(strings.Replace(text, "Passed", "PASSED", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(r.bin(), "stack", "accept", "--verify", html, "--key", key).CombinedOutput(); err == nil || !strings.Contains(string(out), "does not fit") {
		t.Errorf("a changed report: %v %s", err, out)
	}
	r.prints(html)

	html, report = r.accept(3, "--users", "10", "--for", "5s", "--every", "1s", "--no-failure", "--p99", "1us")
	if report.Passed || len(report.Wrong) != 1 || !strings.Contains(report.Wrong[0], "the limit is 1µs") || report.Outage != nil {
		t.Errorf("%+v", report)
	}
	if text := r.read("accept/" + filepath.Base(html)); !strings.Contains(text, "Not passed") || !strings.Contains(text, "the limit is 1µs") {
		t.Error("the report does not say why")
	}
}

// accept carries an acceptance out, which is to end with that code, and returns
// the report's file and what is in it.
func (r *rig) accept(code int, args ...string) (html string, report accept.Report) {
	r.t.Helper()
	dir := filepath.Join(r.dir, "accept")
	r.run("rm", "-rf", dir)
	r.run("mkdir", dir)
	cmd := exec.Command(r.bin(), append([]string{"stack", "accept", "--socket", r.dir + "/socket", "--dir", dir, "-o", "json"}, args...)...)
	var said strings.Builder
	cmd.Stderr = &said
	out, _ := cmd.Output()
	if cmd.ProcessState.ExitCode() != code {
		r.t.Fatalf("exit code %d, not %d\n%s\n%s", cmd.ProcessState.ExitCode(), code, said.String(), out)
	}
	r.t.Logf("accept %s:\n%s", strings.Join(args, " "), said.String())
	if err := json.Unmarshal(out, &report); err != nil {
		r.t.Fatal(err)
	}
	files, _ := filepath.Glob(dir + "/accept-e2e-*.html")
	if len(files) != 1 {
		r.t.Fatalf("%q", files)
	}
	return files[0], report
}

// summary are the figures of the load, and the limits that the service was under.
func summary(report accept.Report) string {
	l := report.Load
	limits := map[string]string{} // the same on every node
	for _, n := range report.Nodes {
		for _, e := range n.Limits {
			limits[e.What] = fmt.Sprintf("%s %s (wanted: %s)", e.What, e.Is, e.Want)
		}
	}
	rate := float64(l.LoggedIn) / report.Options.Every.Seconds()
	return fmt.Sprintf("%d of %d users on %d nodes, %.0f messages/s; delivery %s; %d sent, %d delivered, %d lost; in effect on each node: %s",
		l.LoggedIn, l.Users, len(report.Nodes), rate, l.Latency, l.Sent, l.Delivered, l.Lost, strings.Join(slices.Sorted(maps.Values(limits)), ", "))
}

// prints has a browser print the page, which is to be a few sheets of A4.
func (r *rig) prints(html string) {
	r.t.Helper()
	pdf := filepath.Join(r.dir, "report.pdf")
	r.run("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir="+r.dir+"/chromium", "--no-pdf-header-footer", "--print-to-pdf="+pdf, "file://"+html)
	b, err := os.ReadFile(pdf)
	if err != nil {
		r.t.Fatal(err)
	}
	pages := regexp.MustCompile(`/Type\s*/Page\b`).FindAll(b, -1)
	if !strings.HasPrefix(string(b), "%PDF") || len(pages) < 2 || len(pages) > 10 || !regexp.MustCompile(`/MediaBox \[0 0 59[45](\.\d+)? 84[12]`).Match(b) {
		r.t.Errorf("%d bytes, %d pages", len(b), len(pages))
	}
}
