package install

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A system whose network is NetworkManager's gets a connection for the node's
// own card, which nobody else may read; one that starts systemd-networkd gets
// none, nor does one that has no NetworkManager.
func TestNetworkManager(t *testing.T) {
	plan := newPlan()
	f := Files{Plan: plan, Executable: "/bin/sh"}
	for _, c := range []struct {
		has  []string
		want bool
	}{{nil, false}, {[]string{"usr/sbin/NetworkManager"}, true}, {[]string{"usr/sbin/NetworkManager", "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"}, false}} {
		dir := t.TempDir()
		skeleton(t, dir)
		for _, name := range c.has {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Write(dir); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "etc/NetworkManager/system-connections/platter.nmconnection")
		st, err := os.Stat(file)
		if (err == nil) != c.want {
			t.Errorf("%v: %v", c.has, err)
		}
		if !c.want {
			continue
		}
		if st.Mode() != 0o600 {
			t.Errorf("mode %v", st.Mode())
		}
		text := string(read(t, file))
		for _, want := range []string{"mac-address=52:54:00:00:00:01\n", "method=manual\naddress1=10.0.0.11/24\ngateway=10.0.0.254\ndns=10.0.0.1;\n", "[ipv6]\nmethod=disabled\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("%q is not in\n%s", want, text)
			}
		}
	}
	f.Plan.Net.Gateway, f.Plan.Net.DNS = netip.Addr{}, nil
	dir := t.TempDir()
	skeleton(t, dir)
	if err := os.MkdirAll(filepath.Join(dir, "usr/sbin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "usr/sbin/NetworkManager"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := f.Write(dir); err != nil {
		t.Fatal(err)
	}
	if text := string(read(t, filepath.Join(dir, "etc/NetworkManager/system-connections/platter.nmconnection"))); strings.Contains(text, "gateway") || strings.Contains(text, "dns") {
		t.Errorf("%s", text)
	}
}
