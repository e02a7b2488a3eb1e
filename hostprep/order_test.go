package hostprep

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// stock are the lines of the distributions' own units that bear on the order.
var stock = map[string]string{
	"ovsdb-server.service":       "[Unit]\nDefaultDependencies=no\nBefore=network.target\nPartOf=openvswitch-switch.service\n[Service]\nExecStart=/bin/true\n",
	"ovs-vswitchd.service":       "[Unit]\nDefaultDependencies=no\nAfter=ovsdb-server.service\nRequires=ovsdb-server.service\nBefore=network.target\n[Service]\nExecStart=/bin/true\n",
	"openvswitch-switch.service": "[Unit]\nBefore=network.target\nAfter=network-pre.target ovsdb-server.service ovs-vswitchd.service\nPartOf=network.target\nRequires=ovsdb-server.service ovs-vswitchd.service\n[Service]\nType=oneshot\nExecStart=/bin/true\nRemainAfterExit=yes\n",
	"libvirtd.service":           "[Unit]\nRequires=libvirtd.socket\nAfter=network.target dbus.service remote-fs.target\n[Service]\nType=notify\nExecStart=/bin/true\nKillMode=process\n",
	"libvirtd.socket":            "[Unit]\nBefore=libvirtd.service\n[Socket]\nListenStream=/run/libvirt/libvirt-sock\nService=libvirtd.service\n",
	"virt-guest-shutdown.target": "[Unit]\nDescription=virt guest shutdown\n",
	"machine-qemu.scope":         "[Unit]\nAfter=libvirtd.service virtqemud.service\nBefore=virt-guest-shutdown.target\n",
	"libvirt-guests.service":     "[Service]\nExecStart=/bin/true\n",
	"virtqemud.service":          "[Unit]\nAfter=network.target\n[Service]\nExecStart=/bin/true\n",
	"openvswitch.service":        "[Unit]\nAfter=ovsdb-server.service ovs-vswitchd.service\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
}

// TestOrder walks the order that the units give, as systemd would.
func TestOrder(t *testing.T) {
	after := map[string][]string{}
	read := func(unit, text string) {
		for line := range strings.Lines(text) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			for _, other := range strings.Fields(value) {
				switch key {
				case "After":
					after[unit] = append(after[unit], other)
				case "Before":
					after[other] = append(after[other], unit)
				}
			}
		}
	}
	for unit, text := range stock {
		read(unit, text)
	}
	h := Host{Root: t.TempDir(), Self: []string{"/bin/true"}}
	for _, f := range h.Files() {
		if unit, ok := strings.CutPrefix(f.Path, units); ok && f.Link == "" {
			read(strings.TrimSuffix(unit, ".d/platter.conf"), f.Content)
		}
	}
	var reaches func(from, to string, seen map[string]bool) bool
	reaches = func(from, to string, seen map[string]bool) bool {
		if seen[from] {
			return false
		}
		seen[from] = true
		return slices.ContainsFunc(after[from], func(next string) bool { return next == to || reaches(next, to, seen) })
	}
	for _, c := range []struct{ later, earlier string }{
		{purgeUnit, "ovsdb-server.service"}, {"ovs-vswitchd.service", purgeUnit},
		{"libvirtd.service", "ovsdb-server.service"}, {"libvirtd.service", "ovs-vswitchd.service"}, {"libvirtd.service", "openvswitch-switch.service"},
		{"virtqemud.service", "ovs-vswitchd.service"}, {"virtqemud.service", "openvswitch.service"},
		{guestsUnit, "libvirtd.service"}, {guestsUnit, "libvirtd.socket"}, {guestsUnit, "virtqemud.service"}, {guestsUnit, "ovs-vswitchd.service"},
		{guestsUnit, "machine-qemu.scope"}, {"machine-qemu.scope", "libvirtd.service"}, {"machine-qemu.scope", "ovsdb-server.service"},
	} {
		if !reaches(c.later, c.earlier, map[string]bool{}) {
			t.Errorf("%s is not after %s", c.later, c.earlier)
		}
	}
	for unit := range after {
		if reaches(unit, unit, map[string]bool{}) {
			t.Errorf("%s is after itself", unit)
		}
	}
}

// TestUnitsVerify has systemd read the units, which also finds cycles.
func TestUnitsVerify(t *testing.T) {
	tool, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Fatal("no systemd-analyze")
	}
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for unit, text := range stock {
		if !strings.HasSuffix(unit, ".scope") { // made by libvirt as it runs
			write(filepath.Join(root, "usr/lib/systemd/system", unit), text)
		}
	}
	h := Host{Root: root, Self: []string{"/bin/true"}, Spec: provision.HostSpec{
		Guests:  provision.GuestSpec{StopWithin: 5 * time.Minute},
		Bridges: []provision.Bridge{{Name: "br0", Management: true, Uplink: provision.Uplink{Interfaces: []string{"eth0"}}}},
	}}
	j, err := OpenJournal(root)
	if err == nil {
		err = h.Prepare(j)
	}
	if err != nil {
		t.Fatal(err)
	}
	system := filepath.Join(root, units)
	cmd := exec.Command(tool, "verify", "--man=no", "--recursive-errors=no", guestsUnit, purgeUnit, guardUnit, "libvirtd.service", "virtqemud.service", "ovs-vswitchd.service")
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+system+":"+filepath.Join(root, "usr/lib/systemd/system")+":/lib/systemd/system")
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(system, guestsUnit))
	if err != nil || !strings.Contains(string(b), "\nTimeoutStopSec=600\n") {
		t.Errorf("%s, %v", b, err)
	}
}

func TestKeyed(t *testing.T) {
	h := Host{Root: t.TempDir()}
	if _, ok := h.keyed("/none.conf", "k", "v"); ok {
		t.Error("a file that is not there")
	}
	for text, want := range map[string]string{
		"":                         "k = 60\n",
		"# k = 5\nother = 1":       "# k = 5\nother = 1\nk = 60\n",
		"a\n k=5 # five\nb\nk = 6": "a\nk = 60\nb\n",
		"kk = 5\nk = 60\n":         "kk = 5\nk = 60\n",
	} {
		if err := os.WriteFile(filepath.Join(h.Root, "x.conf"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if f, ok := h.keyed("/x.conf", "k", "60"); !ok || f.Content != want || f.Mode != 0o600 {
			t.Errorf("%q: %q, %v", text, f.Content, f.Mode)
		}
	}
}

func TestIOPressure(t *testing.T) {
	root := t.TempDir()
	if _, ok := ioPressure(root); ok {
		t.Error("a kernel that does not tell")
	}
	if err := os.MkdirAll(filepath.Join(root, "proc/pressure"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/pressure/io"), []byte("some avg10=41.50 avg60=0.26 avg300=0.45 total=22\nfull avg10=1.00 avg60=0.02 avg300=0.12 total=8\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if p, ok := ioPressure(root); !ok || p != 41.5 {
		t.Errorf("%v, %v", p, ok)
	}
}
