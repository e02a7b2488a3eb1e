//go:build slow

package quadlet

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// podman's own generator takes every file of testdata/units and finds nothing to
// say about it. Needs root and the image's root file system.
func TestQuadletGenerator(t *testing.T) {
	image := os.Getenv("PLATTER_TEST_ROOT")
	if image == "" {
		t.Fatal("PLATTER_TEST_ROOT names no root file system: run 'make slow'")
	}
	dir := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	run("mount", "-o", "ro,loop,noload", image, dir)
	t.Cleanup(func() { run("umount", "--recursive", dir) })
	for kind, services := range map[string][]string{
		"compose": {"board-network", "board_cache", "board_db", "board_web", "board_lone"},
		"kube":    {"board-network", "board_pod"},
	} {
		units, err := filepath.Abs(filepath.Join("testdata/units", kind))
		if err != nil {
			t.Fatal(err)
		}
		run("mount", "--bind", units, dir+"/mnt")
		out := run("chroot", dir, "env", "QUADLET_UNIT_DIRS=/mnt", "/usr/lib/systemd/system-generators/podman-system-generator", "--dryrun")
		run("umount", dir+"/mnt")
		for _, s := range services {
			if !strings.Contains(out, "---"+s+".service---") {
				t.Errorf("%s: there is no %s.service", kind, s)
			}
		}
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "quadlet-generator") && !strings.Contains(line, "Loading source unit file") {
				t.Errorf("%s: %s", kind, line)
			}
		}
	}
}
