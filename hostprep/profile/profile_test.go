package profile

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"platter/provision"
)

func value(all []provision.Setting, kind provision.SettingKind, key string) string {
	for _, s := range all {
		if s.Kind == kind && s.Key == key {
			return s.Value
		}
	}
	return "unset"
}

func TestProfiles(t *testing.T) {
	if got := Names(); !slices.Equal(got, []string{"messaging", "mixed", "virtualisation"}) {
		t.Errorf("profiles %q", got)
	}
	for _, name := range append(Names(), "") {
		all, errs := Resolve(Wish{Profile: name})
		if len(errs) > 0 || len(all) < 20 {
			t.Fatalf("%s: %d settings, %v", name, len(all), errs)
		}
		seen := map[string]bool{}
		for _, s := range all {
			if id := string(s.Kind) + " " + s.Key; seen[id] || s.Why == "" || s.Source == "" || s.Value == "" {
				t.Errorf("%s: %+v is there twice, or without a value, a reason or a source", name, s)
			} else {
				seen[id] = true
			}
		}
		// What holds for every host.
		for key, want := range map[string]string{"net.ipv4.tcp_keepalive_time": "30", "net.ipv4.tcp_keepalive_intvl": "10", "net.ipv4.tcp_keepalive_probes": "4", "kernel.panic": "10"} {
			if got := value(all, provision.Sysctl, key); got != want {
				t.Errorf("%s: %s is %s, want %s", name, key, got, want)
			}
		}
		if got := value(all, provision.Cmdline, "panic"); got != "10" {
			t.Errorf("%s: panic=%s", name, got)
		}
	}
	type want struct{ ksm, scan, backlog, ratio, iommu string }
	for name, w := range map[string]want{
		"virtualisation": {"1", "500", "4096", "1.2", "pt"},
		"messaging":      {"0", "unset", "8192", "unset", "unset"},
		"mixed":          {"1", "200", "8192", "1.2", "pt"},
	} {
		all, _ := Resolve(Wish{Profile: name})
		got := want{value(all, provision.Sysfs, "kernel/mm/ksm/run"), value(all, provision.Sysfs, "kernel/mm/ksm/pages_to_scan"),
			value(all, provision.Sysctl, "net.core.somaxconn"), value(all, provision.Alarm, "ksm-ratio"), value(all, provision.Cmdline, "iommu")}
		if got != w {
			t.Errorf("%s: %+v, want %+v", name, got, w)
		}
	}
}

// A catalogue's own value could be given in a rack file as well.
func TestEveryLineTakesItsValue(t *testing.T) {
	for name, all := range known().profiles {
		for _, s := range all {
			if got, err := Value(s.Kind, s.Key)(s.Value); err != nil || got != s.Value {
				t.Errorf("%s: %s %s: %q, %v", name, s.Kind, s.Key, got, err)
			}
		}
	}
}

func TestOverrides(t *testing.T) {
	all, errs := Resolve(Wish{Profile: "messaging", Hugepages: Hugepages{"2M", 512}, Isolate: "2-3", Overrides: []provision.Setting{
		{Kind: provision.Sysctl, Key: "net.ipv4.tcp_rmem", Value: " 4096  131072 16777216 "},
		{Kind: provision.Sysctl, Key: "vm.swappiness", Value: Unset},
		{Kind: provision.Limit, Key: "nofile", Value: "200000"},
	}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	if value(all, provision.Sysctl, "net.ipv4.tcp_rmem") != "4096 131072 16777216" || value(all, provision.Sysctl, "vm.swappiness") != "unset" ||
		value(all, provision.Limit, "nofile") != "200000" {
		t.Errorf("%+v", all)
	}
	var args []string
	for _, s := range all {
		if s.Kind == provision.Cmdline {
			args = append(args, s.Arg())
		}
	}
	const want = "panic=10 mitigations=auto default_hugepagesz=2M hugepagesz=2M hugepages=512 isolcpus=domain,managed_irq,2-3 nohz_full=2-3 rcu_nocbs=2-3"
	if got := strings.Join(args, " "); got != want {
		t.Errorf("arguments\n%s\nwant\n%s", got, want)
	}
	if base, _ := Resolve(Wish{}); value(base, provision.Sysctl, "vm.swappiness") != "10" {
		t.Error("an override changed the catalogue")
	}
}

func TestAllMistakesAtOnce(t *testing.T) {
	set := func(kind provision.SettingKind, key, value string) provision.Setting {
		return provision.Setting{Kind: kind, Key: key, Value: value}
	}
	_, errs := Resolve(Wish{Profile: "virtualized", Isolate: "4-2", Hugepages: Hugepages{"1G", 99999}, Overrides: []provision.Setting{
		set(provision.Sysctl, "net.ipv4.tcp_keepalive_tme", "30"),
		set(provision.Sysctl, "vm.dirty_ratio", "101"),
		set(provision.Sysctl, "vm.dirty_background_ratio", "5.5"),
		set(provision.Sysctl, "net.ipv4.tcp_wmem", "4096 16384"),
		set(provision.Sysctl, "kernel.panic", "1e1"),
		set(provision.Sysfs, "../../etc/passwd", "x"),
		set(provision.Sysfs, "kernel/mm/ksm/run", "1"),
		set(provision.CPU, "scaling_governor", "turbo"),
		set(provision.Limit, "nofile", "4096:2048"),
		set(provision.Alarm, "ksm-ratio", "NaN"),
		set("sysctrl", "vm.swappiness", "1"),
	}})
	text := fmt.Sprint(errs)
	for _, want := range []string{
		`profile "virtualized": is not a profile`, `did you mean "net.ipv4.tcp_keepalive_time"`, "must be a whole number from 1 to 80",
		"must be a whole number from 0 to 50", "must be 3 whole numbers from 4096", "must be a whole number from 1 to 3600",
		"sysfs ../../etc/passwd", "exclude each other", "must be one of: performance", "must not fall", "must be a number from 1 to 2",
		`sysctrl vm.swappiness "1": is not in the catalogue`, "hugepages: count 99999: must be a whole number from 1 to 16384", `isolate "4-2"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q", want)
		}
	}
	if len(errs) != 14 {
		t.Errorf("%d mistakes, want 14", len(errs))
	}
	if t.Failed() {
		t.Log(text)
	}
	_, errs = Resolve(Wish{Profile: "messaging", Overrides: []provision.Setting{set(provision.Sysctl, "net.netfilter.nf_conntrack_max", "131072")}})
	if len(errs) != 1 || !strings.Contains(errs[0].Error(), "needs the module nf_conntrack") {
		t.Errorf("a sysctl of a module that is not loaded: %v", errs)
	}
}
