package images

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestLockRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lock := rapid.MapOf(rapid.StringMatching(`[a-z0-9][a-z0-9+.-]{0,20}`), rapid.StringMatching(`[0-9]:?[0-9a-z.+~-]{1,20}`)).Draw(t, "lock")
		got, err := parseLock(formatLock("debian-13", lock))
		if err != nil || len(got) != len(lock) || (len(lock) > 0 && !reflect.DeepEqual(got, lock)) {
			t.Fatalf("%v came back as %v, %v", lock, got, err)
		}
		if len(compareLock(lock, got)) != 0 {
			t.Fatal("a lock differs from itself")
		}
	})
}

func TestParseLock(t *testing.T) {
	for text, want := range map[string]string{
		"a 1\nb\n":       "line 2: want 'package version'",
		"a 1 2\n":        "line 1: want 'package version'",
		"a 1\n\n a 2\n":  "line 3: package a is listed twice",
		"a 1 # comment":  "",
		"# only comment": "",
	} {
		_, err := parseLock([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("parseLock(%q): %v, want %q", text, err, want)
		}
	}
}

func FuzzParseLock(f *testing.F) {
	f.Add([]byte("a 1\n# x\nb 2\n"))
	f.Add([]byte("a\x001\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		lock, err := parseLock(text)
		if err != nil {
			return
		}
		if again, err := parseLock(formatLock("x", lock)); err != nil || len(again) != len(lock) {
			t.Errorf("%v came back as %v, %v", lock, again, err)
		}
	})
}

func TestCompareLock(t *testing.T) {
	got := compareLock(map[string]string{"same": "1", "moved": "1", "gone": "1"}, map[string]string{"same": "1", "moved": "2", "new": "3"})
	want := []Change{{"gone", "1", ""}, {"moved", "1", "2"}, {"new", "", "3"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("changes %v, want %v", got, want)
	}
	if s := fmt.Sprint(got); s != "[gone: gone, was 1 moved: 1 -> 2 new: new, 3]" {
		t.Errorf("said as %s", s)
	}
}

func TestFrozen(t *testing.T) {
	var out strings.Builder
	o := BuildOptions{Name: "debian-13", LockFile: "x.lock", Frozen: true, Out: &out}
	_, err := o.checkLock(map[string]string{"a": "1"}, map[string]string{"a": "2"})
	wantError(t, err, "1 packages are not to be had", "--frozen")
	if !strings.Contains(out.String(), "a: 1 -> 2") {
		t.Errorf("the change is not listed: %s", out.String())
	}
	if _, err := o.checkLock(map[string]string{"a": "1"}, map[string]string{"a": "1"}); err != nil {
		t.Error(err)
	}
	o.Frozen = false
	if changes, err := o.checkLock(map[string]string{"a": "1"}, map[string]string{"a": "2"}); err != nil || len(changes) != 1 {
		t.Errorf("%v, %v", changes, err)
	}
}

// apt itself judges the pins: it stays at a locked version although a newer one
// is there, and takes the current one where the locked version is gone.
func TestPinsInApt(t *testing.T) {
	dir := t.TempDir()
	repo := filepath.Join(dir, "repo")
	for _, d := range []string{"repo", "state/lists/partial", "cache/archives/partial", "etc/preferences.d", "dpkg"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var index strings.Builder
	for _, p := range []string{"kept 1.0", "kept 2.0", "gone 3.0", "free 1.0", "free 2.0"} {
		name, version, _ := strings.Cut(p, " ")
		fmt.Fprintf(&index, "Package: %s\nVersion: %s\nArchitecture: all\nFilename: ./%s_%s.deb\nSize: 1\nDescription: x\n\n", name, version, name, version)
	}
	files := map[string]string{
		"repo/Packages":             index.String(),
		"etc/sources.list":          "deb [trusted=yes] file:" + repo + " ./\n",
		"etc/preferences.d/platter": string(pins(map[string]string{"kept": "1.0", "gone": "2.5"})),
		"dpkg/status":               "",
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	apt := func(tool string, args ...string) string {
		t.Helper()
		opts := []string{"-o", "Dir::State=" + dir + "/state", "-o", "Dir::State::status=" + dir + "/dpkg/status", "-o", "Dir::Cache=" + dir + "/cache",
			"-o", "Dir::Etc=" + dir + "/etc", "-o", "APT::Sandbox::User=root", "-o", "Dir::Log=" + dir}
		out, err := exec.Command(tool, append(opts, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", tool, args, err, out)
		}
		return string(out)
	}
	apt("apt-get", "update")
	for name, want := range map[string]string{"kept": "1.0", "gone": "3.0", "free": "2.0"} {
		if out := apt("apt-cache", "policy", name); !strings.Contains(out, "Candidate: "+want+"\n") {
			t.Errorf("apt would not take %s %s:\n%s", name, want, out)
		}
	}
}

func TestCombination(t *testing.T) {
	packages := map[string]string{"linux-image-6.12.64+deb13-amd64": "6.12.64-1", "qemu-system-x86": "1:10.0.13+ds-0+deb13u1",
		"libvirt-daemon": "11.3.0-3+deb13u3", "openvswitch-switch": "3.5.0-1+b1"}
	var said strings.Builder
	_, err := BuildOptions{Name: "debian-13"}.combination(packages, &said)
	if err == nil || !strings.Contains(err.Error(), "CVE-2026-31508") || !strings.Contains(err.Error(), "--allow ovs-port-use-after-free --allow ovs-flow-dump-lockup") {
		t.Errorf("a kernel that is known to crash: %v", err)
	}
	if !strings.Contains(said.String(), "WARNING: ovs-seq-deadlock: ovs 3.5.0-1+b1") {
		t.Errorf("said %q", &said)
	}
	l, err := BuildOptions{Allow: []string{"ovs-port-use-after-free", "ovs-flow-dump-lockup"}}.combination(packages, &said)
	if err != nil {
		t.Fatal(err)
	}
	const want = "kernel 6.12.64-1\nqemu 1:10.0.13+ds-0+deb13u1\nlibvirt 11.3.0-3+deb13u3\novs 3.5.0-1+b1\nallow ovs-port-use-after-free\nallow ovs-flow-dump-lockup\n"
	if _, file, _ := strings.Cut(l.String(), "\n"); file != want {
		t.Errorf("the image says\n%swant\n%s", file, want)
	}
}
