package hostcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/hostprep"
	"platter/provision"
)

// fileStep wants one file below the host's root.
func fileStep(h *hostprep.Host, path string, boot bool) hostprep.Step {
	return hostprep.Step{Name: "file " + path, Next: "Look at the disk",
		Check: func(context.Context) ([]hostprep.Finding, error) {
			f := hostprep.Finding{What: path, Is: "missing", Want: "right", Why: "VMs need it", Source: "the manual"}
			if b, err := os.ReadFile(filepath.Join(h.Root, path)); err == nil {
				f.Is, f.OK, f.Boot = string(b), string(b) == "right" && !boot, boot
			}
			return []hostprep.Finding{f}, nil
		},
		Apply: func(_ context.Context, j *hostprep.Journal) error { return j.WriteFile(path, "right", 0o644) },
	}
}

func broken(why string) hostprep.Step {
	return hostprep.Step{Name: "broken", Next: "Mend it",
		Check: func(context.Context) ([]hostprep.Finding, error) { return nil, errors.New(why) }}
}

func noBridges(context.Context, *hostprep.Host, func(string)) error { return nil }

// host runs one command line on the host at root.
func host(t *testing.T, root string, steps func(*hostprep.Host) []hostprep.Step, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Run(t.Context(), args, Env{Root: root, Stdout: &out, Stderr: &errs, steps: steps, undoBridges: noBridges})
	return code, out.String(), errs.String()
}

func TestLifeOfAHost(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	root := t.TempDir()
	if err := os.Mkdir(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/b", []byte("former"), 0o644); err != nil {
		t.Fatal(err)
	}
	boot := true
	steps := func(h *hostprep.Host) []hostprep.Step {
		return []hostprep.Step{fileStep(h, "/etc/a", false), fileStep(h, "/etc/default/grub.d/b", boot)}
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		says []string
	}{
		{"untouched", []string{"check"}, 3, []string{"STEP", "file /etc/a", "missing", "right", "VMs need it", "the manual", "2 of 2 things deviate"}},
		{"dry run", []string{"apply", "--dry-run"}, 3, []string{"2 of 2 things deviate"}},
		{"nothing was changed", []string{"undo"}, 0, []string{"nothing to undo"}},
		{"apply", []string{"apply"}, 3, []string{"WAS", "missing", "changed", "in effect after a reboot", "1 changed, 1 more after a reboot"}},
		{"waits", []string{"check"}, 3, []string{"right (after a reboot)", "1 of 2 things wait for a reboot"}},
	} {
		if code, out, errs := host(t, root, steps, c.args...); code != c.code || !containsAll(out, c.says) {
			t.Errorf("%s: exit %d, want %d\n%s%s", c.name, code, c.code, out, errs)
		}
	}
	boot = false
	for _, c := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"check"}, 0, []string{"as it should be: 2 steps, 2 things"}},
		{[]string{"apply"}, 0, []string{"Nothing had to be changed"}},
		{[]string{"undo"}, 3, []string{"/etc/a\n", "/etc/default/grub.d/b  (in effect after a reboot)", "Reboot the host"}},
		{[]string{"undo"}, 0, []string{"nothing to undo"}},
	} {
		if code, out, errs := host(t, root, steps, c.args...); code != c.code || !containsAll(out, c.says) {
			t.Errorf("%v after the reboot: exit %d, want %d\n%s%s", c.args, code, c.code, out, errs)
		}
	}
	if _, err := os.Stat(root + "/etc/a"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after undo: %v", err)
	}
}

func TestFailures(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	steps := func(*hostprep.Host) []hostprep.Step { return []hostprep.Step{broken("no\nspace")} }
	for _, verb := range []string{"check", "apply"} {
		code, out, _ := host(t, t.TempDir(), steps, verb)
		if code != 1 || !strings.Contains(out, "broken failed: no; space. Mend it.\n") {
			t.Errorf("%s: exit %d, %q", verb, code, out)
		}
	}
}

func TestJSON(t *testing.T) {
	steps := func(h *hostprep.Host) []hostprep.Step {
		return []hostprep.Step{fileStep(h, "/etc/a", false), broken("no space")}
	}
	code, out, _ := host(t, t.TempDir(), steps, "check", "-o", "json")
	var got []struct {
		Step, Outcome, Reason, Next string
		Findings                    []map[string]any
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 1 || len(got) != 2 {
		t.Fatalf("exit %d, %v:\n%s", code, err, out)
	}
	if f := got[0].Findings[0]; got[0].Outcome != "drift" || f["what"] != "/etc/a" || f["ok"] != false || f["should_be"] != "right" || f["source"] != "the manual" {
		t.Errorf("%+v", got[0])
	}
	if got[1].Outcome != "failed" || got[1].Reason != "no space" || got[1].Next != "Mend it" || got[1].Findings == nil {
		t.Errorf("%+v", got[1])
	}
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "missing"},
		{[]string{"chek"}, 2, `"chek"`},
		{[]string{"check", "-o", "xml"}, 2, "table or json"},
		{[]string{"check", "--nonsense"}, 2, "nonsense"},
		{[]string{"check", "now"}, 2, `"now"`},
		{[]string{"apply", "--node", "n"}, 2, "-c FILE"},
		{[]string{"check", "-c", "rack.yaml"}, 1, "reads no rack files"},
	} {
		if code, _, errs := host(t, t.TempDir(), nil, c.args...); code != c.code || !strings.Contains(errs, c.says) {
			t.Errorf("%v: exit %d, %q", c.args, code, errs)
		}
	}
	for _, args := range [][]string{{"--help"}, {"check", "-h"}} {
		if code, out, _ := host(t, t.TempDir(), nil, args...); code != 0 || !strings.Contains(out, "Exit codes") {
			t.Errorf("%v: exit %d, %q", args, code, out)
		}
	}
}

// TestPlan: on a node its plan says what should be, and nothing else may.
func TestPlan(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(root+"/etc/platter", 0o755); err != nil {
		t.Fatal(err)
	}
	plan, err := json.Marshal(provision.Plan{Format: provision.PlanFormat, DiscHost: "https://10.0.0.1:8443",
		Host: provision.HostSpec{Bridges: []provision.Bridge{{Name: "br-plan"}}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+planPath, plan, 0o644); err != nil {
		t.Fatal(err)
	}
	var seen *hostprep.Host
	steps := func(h *hostprep.Host) []hostprep.Step { seen = h; return nil }
	if code, _, errs := host(t, root, steps, "check"); code != 0 || errs != "" {
		t.Fatalf("exit %d, %s", code, errs)
	}
	if seen.Spec.Bridges[0].Name != "br-plan" || seen.Reach[0].String() != "10.0.0.1:8443" || seen.Self[0] != hostprep.NodeSelf[0] {
		t.Errorf("%+v", seen)
	}
	if code, _, errs := host(t, root, steps, "check", "-c", "other.yaml"); code != 1 || !strings.Contains(errs, "plan of its own") {
		t.Errorf("another rack file on a node: exit %d, %s", code, errs)
	}
	if err := os.WriteFile(root+planPath, []byte(`{"format":99}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := host(t, root, steps, "check"); code != 1 || !strings.Contains(errs, "format 99") {
		t.Errorf("a plan of the future: exit %d, %s", code, errs)
	}
}

// TestTold: what an apply was told counts for every later command, and goes
// with undo.
func TestTold(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	root := t.TempDir()
	var seen *hostprep.Host
	e := Env{Root: root, Stdout: io.Discard, Stderr: io.Discard,
		Rack: func(file, node string) (Target, error) {
			return Target{Spec: provision.HostSpec{Profile: file + node}, Reach: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:8443")}}, nil
		},
		steps:       func(h *hostprep.Host) []hostprep.Step { seen = h; return nil },
		undoBridges: noBridges,
	}
	for _, c := range []struct{ line, want string }{
		{"check", "mixed"},
		{"apply --dry-run -c rack --node 1", "rack1"},
		{"check", "mixed"},
		{"apply -c rack --node 1", "rack1"},
		{"check", "rack1"},
		{"check --profile messaging", "messaging"},
		{"check", "rack1"},
		{"undo", ""},
		{"check", "mixed"},
	} {
		seen = &hostprep.Host{}
		if code := Run(t.Context(), strings.Fields(c.line), e); code != 0 || seen.Spec.Profile != c.want {
			t.Errorf("%s: exit %d, %q", c.line, code, seen.Spec.Profile)
		}
		if c.want == "rack1" && len(seen.Reach) != 1 {
			t.Errorf("%s: reach is %v", c.line, seen.Reach)
		}
	}
}

// TestOneAtATime: whoever comes second is told who is first.
func TestOneAtATime(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	root := t.TempDir()
	h := &hostprep.Host{Root: root}
	release, err := h.Lock(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	steps := func(*hostprep.Host) []hostprep.Step { return nil }
	for _, verb := range []string{"apply", "repair", "undo"} {
		if code, _, errs := host(t, root, steps, verb); code != 1 || !strings.Contains(errs, "is changing this host right now") {
			t.Errorf("%s: exit %d, %q", verb, code, errs)
		}
	}
	if code, _, _ := host(t, root, steps, "check"); code != 0 {
		t.Errorf("check while locked: exit %d", code)
	}
	// One that waits gets the lock when it is free, and gives up with ctx.
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := h.Lock(ctx, func(string) error { cancel(); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	again, err := h.Lock(t.Context(), func(string) error { release(); return nil })
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func containsAll(s string, parts []string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}
