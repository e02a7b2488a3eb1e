package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"platter/images"
)

// The image of a container is refused with everything that it lacks, as a
// table and for programs.
func TestImageImportCheck(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("an image can only be imported as root: run the tests as root")
	}
	tree := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tree, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "etc/os-release"), []byte("ID=ubuntu\nVERSION_ID=24.04\nPRETTY_NAME=\"Ubuntu 24.04 LTS\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	file, work := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if out, err := exec.Command("tar", "-czf", file, "-C", tree, ".").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	command := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := run(context.Background(), append([]string{"image", "import", file, "--work", work}, args...), nil, &out, &errs)
		return code, out.String(), errs.String()
	}
	code, out, errs := command("--check")
	for _, want := range []string{"(tar gzip)", "Ubuntu 24.04 LTS", "FINDING", "refused kernel", "refused initramfs", "refused systemd", "refused network service", "lacks Open vSwitch"} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if code != 1 || !strings.Contains(errs, "refused for ") {
		t.Errorf("exit %d, %s", code, errs)
	}
	code, out, _ = command("--check", "-o", "json")
	var f images.Foreign
	if err := json.Unmarshal([]byte(out), &f); err != nil || code != 1 || f.Family != "debian" || f.Name != "ubuntu-24.04" || len(f.Of(images.Refused)) < 4 {
		t.Errorf("exit %d, %v, %s", code, err, out)
	}
	if code, _, errs := command(); code != 1 || !strings.Contains(errs, "--key") || !strings.Contains(errs, "--check") {
		t.Errorf("without a key: exit %d, %s", code, errs)
	}
}
