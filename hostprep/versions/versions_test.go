package versions

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"6.12.9-1", "6.12.11-1", -1},
		{"6.12.79-1", "6.12.80", -1}, {"6.12.80-1", "6.12.80", 1},
		{"11.3.0-3+deb13u2", "11.3.0-3+deb13u3", -1},
		{"1:10.0.13+ds-0+deb13u1", "10.0", 1}, {"2:1", "1:2", -1}, // epochs count packages' histories
		{"3.5.0~rc1-1", "3.5.0", -1},
		{"5.14.0-427.13.1.el9_4", "5.14.0-503.el9", -1},
		{"9.0.0-4+deb12u2", "10", -1},
	} {
		got, err := Compare(c.a, c.b)
		if err != nil || got != c.want {
			t.Errorf("%s and %s: %d, %v, want %d", c.a, c.b, got, err, c.want)
		}
	}
	if _, err := Compare("", "1"); err == nil {
		t.Error("no version compares")
	}
}

func TestKnownBad(t *testing.T) {
	good := Set{"kernel": "6.12.117-1", "qemu": "1:10.0.13+ds-0+deb13u1", "libvirt": "11.3.0-3+deb13u3", "ovs": "3.5.3-1"}
	for _, c := range []struct {
		component, version string
		want               string // names; a * refuses
	}{
		{"", "", ""},
		{"kernel", "6.12.63-1", "ovs-flow-dump-lockup*"},
		{"kernel", "6.12.64-1", "ovs-port-use-after-free* ovs-flow-dump-lockup*"},
		{"kernel", "6.12.79-1", "ovs-port-use-after-free* ovs-flow-dump-lockup*"},
		{"kernel", "6.12.80-1", "ovs-flow-dump-lockup*"},
		{"kernel", "6.12.113-1", ""},
		{"kernel", "6.12.10-1", "send-to-unregistering-device* ovs-flow-dump-lockup*"},
		{"kernel", "6.1.24-1", ""}, {"kernel", "6.1.25-1", "send-to-unregistering-device*"},
		{"kernel", "6.1.126-1", "send-to-unregistering-device*"}, {"kernel", "6.1.127-1", ""},
		{"kernel", "6.1.160-1", "ovs-port-use-after-free*"}, {"kernel", "6.1.168-1", ""},
		{"libvirt", "11.3.0-3+deb13u2", "libvirt-migrate-detach*"},
		{"libvirt", "9.0.0-4+deb12u2", "libvirt-ports-not-transient"},
		{"ovs", "3.5.0-1+b1", "ovs-seq-deadlock"}, {"ovs", "3.4.9-1", ""},
		{"ovs", "", ""}, {"kernel", "", ""},
	} {
		set := maps.Clone(good)
		if c.component != "" {
			set[c.component] = c.version
		}
		bad, err := KnownBad(set)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, b := range bad {
			name := b.Name
			if b.Refuse {
				name += "*"
			}
			got = append(got, name)
			if !strings.Contains(b.String(), c.version) || b.Reason == "" || b.Source == "" {
				t.Errorf("%q says too little", b)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s %s: %q, want %q", c.component, c.version, got, c.want)
		}
	}
	// An old QEMU or a host without a switch is not hit.
	set := maps.Clone(good)
	set["libvirt"], set["qemu"] = "11.3.0-3+deb13u2", "1:9.2.0-1"
	if bad, _ := KnownBad(set); len(bad) != 0 {
		t.Errorf("libvirt with an older QEMU: %v", bad)
	}
	if bad, _ := KnownBad(Set{"kernel": "6.12.64-1"}); len(bad) != 0 {
		t.Errorf("a host without a switch: %v", bad)
	}
	if _, err := KnownBad(Set{"ovs": "no version"}); err == nil {
		t.Error("what is no version passes")
	}
}

// What the image is locked to may be built.
func TestTheLockFilePasses(t *testing.T) {
	text, err := os.ReadFile("../../images/debian-13.lock")
	if err != nil {
		t.Fatal(err)
	}
	installed := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] != "#" {
			installed[f[0]] = f[1]
		}
	}
	set := FromPackages(installed)
	if len(set) != len(Components) {
		t.Fatalf("components of the lock file: %v", set)
	}
	bad, err := KnownBad(set)
	if err != nil || slices.ContainsFunc(bad, func(b Bad) bool { return b.Refuse }) {
		t.Errorf("%v, %v", bad, err)
	}
}

func TestFromPackages(t *testing.T) {
	got := FromPackages(map[string]string{"linux-image-amd64": "6.12.117-1", "linux-image-6.12.9+deb13-amd64": "6.12.9-1",
		"linux-image-6.12.117+deb13-amd64": "6.12.117-1", "openvswitch-common": "3.9", "openvswitch-switch": "3.5.0-1"})
	if fmt.Sprint(got) != "map[kernel:6.12.117-1 ovs:3.5.0-1]" {
		t.Errorf("Debian: %v", got)
	}
	got = FromPackages(map[string]string{"kernel-core": "5.14.0-503.el9", "qemu-kvm-core": "9.0.0-10.el9", "libvirt-daemon": "10.5.0-7.el9",
		"openvswitch3.5": "3.5.0-1.el9", "openvswitch-selinux-extra-policy": "1.0"})
	if fmt.Sprint(got) != "map[kernel:5.14.0-503.el9 libvirt:10.5.0-7.el9 ovs:3.5.0-1.el9 qemu:9.0.0-10.el9]" {
		t.Errorf("RHEL family: %v", got)
	}
}

func TestFile(t *testing.T) {
	l := Locked{Versions: Set{"kernel": "6.12.117-1", "ovs": "3.5.0-1"}, Allowed: []string{"ovs-seq-deadlock"}}
	got, err := Parse(l.String())
	if err != nil || got.String() != l.String() || got.Versions["ovs"] != "3.5.0-1" {
		t.Errorf("%q came back as %q, %v", l, got, err)
	}
	for _, text := range []string{"kernel\n", "xen 4.1\n", "kernel 1 2\n"} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestOrder(t *testing.T) {
	got := []string{"2", "10", "x y", "1.0~rc1", "1.0", ""}
	slices.SortFunc(got, Order)
	if want := []string{"", "x y", "1.0~rc1", "1.0", "2", "10"}; !slices.Equal(got, want) {
		t.Errorf("sorted: %q, want %q", got, want)
	}
}
