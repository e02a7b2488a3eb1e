package rack

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"platter/provision"
	"platter/provision/yamlfile"
)

func TestEveryKeyIsRead(t *testing.T) {
	r, err := Load("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n1, n2 := r.Nodes[0], r.Nodes[1]
	if n1.MAC != "52:54:00:aa:00:01" || n2.MAC != "" {
		t.Errorf("MACs are %q and %q", n1.MAC, n2.MAC)
	}
	if d := cmp.Diff(provision.DiskRule{MinSize: 100e9, MaxSize: 4e12}, n1.Disk); d != "" {
		t.Error("the defaults' disk rule did not reach node1:", d)
	}
	if d := cmp.Diff(provision.DiskRule{Serial: "WD-1234", Wipe: true}, n2.Disk); d != "" {
		t.Error("a node's disk rule must replace the default as a whole:", d)
	}
	if n1.Finish != provision.FinishKexec || n2.Finish != provision.FinishReboot {
		t.Errorf("finish is %s and %s", n1.Finish, n2.Finish)
	}
	if len(n1.Cmdline) != 1 || len(n2.Cmdline) != 0 {
		t.Errorf("cmdline is %q and %q", n1.Cmdline, n2.Cmdline)
	}
	if nw := r.Networks[0]; nw.Lease != 2*time.Minute || nw.PoolLast.String() != "10.77.0.250" || nw.Gateway.String() != "10.77.0.254" || len(nw.DNS) != 1 {
		t.Errorf("network is %+v", nw)
	}
	if len(r.Users) != 2 || len(r.Users[1].Keys) != 1 || !strings.HasSuffix(r.Users[1].Keys[0], "ops@example") {
		t.Errorf("users are %+v", r.Users)
	}
	has := map[string]string{}
	for _, s := range r.Host.Settings {
		has[string(s.Kind)+" "+s.Key] = s.Value
		if s.Why == "" || s.Source == "" {
			t.Errorf("%s %s has no reason", s.Kind, s.Key)
		}
	}
	for key, want := range map[string]string{
		"cmdline mitigations": "auto,nosmt", "sysctl net.core.somaxconn": "8192", "sysctl net.ipv4.tcp_rmem": "4096 131072 16777216",
		"sysfs kernel/mm/transparent_hugepage/enabled": "always", "disk nvme/scheduler": "mq-deadline", "cpu scaling_governor": "",
		"module kvm_intel.nested": "0", "limit nofile": "65536:524288", "alarm memory-available": "3",
		"cmdline hugepagesz": "1G", "cmdline hugepages": "16", "sysfs kernel/mm/ksm/run": "0", "cmdline isolcpus": "domain,managed_irq,2-7,10",
		"sysctl vm.swappiness": "10", // of the profile
	} {
		if has[key] != want {
			t.Errorf("%s is %q, want %q", key, has[key], want)
		}
	}
	if r.Host.Profile != "virtualisation" {
		t.Errorf("profile is %q", r.Host.Profile)
	}
	if want := (provision.GuestSpec{Parallel: 4, Delay: 2 * time.Second, StopWithin: 90 * time.Second, MemoryPercent: 120}); r.Host.Guests != want {
		t.Errorf("guests are %+v", r.Host.Guests)
	}
	if d := cmp.Diff([]string{"broker", "storage"}, n1.Roles); d != "" {
		t.Error("the defaults' roles did not reach node1:", d)
	}
	if d := cmp.Diff([]string{"storage"}, n2.Roles); d != "" {
		t.Error("a node's roles must replace the defaults':", d)
	}
	if d := cmp.Diff([]string{"rabbitmq"}, r.Stack.Optional); d != "" {
		t.Error(d)
	}
	if r.Page != "127.0.0.1:8080" || r.Stack.Domain != "im.example.org" || r.Stack.Users != 1000 || !r.Stack.Undersized || r.Host.Bridges[0].Name != "br-vm" {
		t.Errorf("rack is %+v", r)
	}
}

// All mistakes come at once, each on its own line of the file.
func TestEveryMistakeIsNamedWithItsLine(t *testing.T) {
	_, err := Load("testdata/mistakes.yaml")
	var got yamlfile.Problems
	if !errors.As(err, &got) {
		t.Fatalf("want problems, got %v", err)
	}
	want := []struct {
		line int
		text string
	}{
		{1, `image is missing`}, {1, "lower-case letters"},
		{2, `unknown key "images", did you mean "image"?`},
		{5, "has host bits set, meant is 10.77.0.0/24"},
		{8, "must be a time from 1m"},
		{9, "interface eno1 is already used on line 4"},
		{12, "the pool contains disc-host 10.99.0.1"},
		{15, "must be one public key line"},
		{16, "nobody could log in"},
		{19, "multicast"},
		{20, "is in the pool for unknown machines"},
		{21, "must be kexec or reboot"},
		{22, "min is larger than max"}, {22, "must be true or false"},
		{23, "node node1 is already used on line 18"},
		{26, "one kernel argument"},
		{28, "mac 52:54:00:00:00:01 is already used on line 24"},
		{29, "not a host address of 10.99.0.0/24"},
		{30, `unknown key "slots", did you mean "slot"?`},
		{32, `profile "virtualization": is not a profile, did you mean "virtualisation"?`},
		{35, `sysctl "net.core.somaxcon": is not in the catalogue, did you mean "net.core.somaxconn"?`},
		{36, `vm.swappiness "900": must be a whole number from 0 to 200`},
		{37, "must not fall from left to right"},
		{39, `unknown key "modules", did you mean "module"?`},
		{40, "must be a whole number, or two as SOFT:HARD from 1024 to 1048576"},
		{41, "must be 2M or 1G"}, {41, "must be a whole number from 1 to"},
		{42, "must leave CPU 0 to the host"},
		{43, "must be a whole number from 1 to 64"}, {43, "must be a time from 5s to 1h"}, {43, "must be a whole number from 10 to 120"},
		{44, "must be a whole number from 1 to 100000"}, {44, "a domain name in lower case"}, {44, `unknown key "user", did you mean "users"?`}, {44, "a is listed twice"},
		{45, `roles[0] "Storage": must be lower-case letters`}, {45, `unknown key "role", did you mean "roles"?`},
	}
	text := err.Error()
	for _, w := range want {
		found := false
		for _, p := range got {
			found = found || p.Line == w.line && strings.Contains(p.Message, w.text)
		}
		if !found {
			t.Errorf("no problem on line %d that says %q", w.line, w.text)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d problems, want %d", len(got), len(want))
	}
	if t.Failed() {
		t.Log("\n" + text)
	}
	if !strings.HasPrefix(strings.Split(text, "\n")[0], "testdata/mistakes.yaml:"+strconv.Itoa(1)) {
		t.Errorf("problems are not in file order:\n%s", text)
	}
}

func TestAFileThatIsNoRackFile(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"empty":         {"", "r.yaml:1: the file is empty"},
		"comment only":  {"# nothing\n", "the file is empty"},
		"not YAML":      {"rack: [a\nnodes: }", "not valid YAML"},
		"a list":        {"- a\n", "must be a mapping"},
		"two documents": {"rack: a\n---\nrack: b\n", "a second document begins here"},
		"alias":         {"rack: &x a\nimage: *x\n", "aliases are not supported"},
		"twice":         {"rack: a\nrack: b\n", "given twice"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("r.yaml", []byte(c.in))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one that says %q", err, c.want)
			}
		})
	}
	if _, err := Load("testdata/absent.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent file gives %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"testdata/full.yaml", "testdata/mistakes.yaml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Parse("testdata/fuzz.yaml", data)
		if err != nil {
			return
		}
		// What is accepted can be planned for.
		for _, n := range r.Nodes {
			if _, err := provision.PlanFor(r, n, n.MAC, 1, provision.ImageRef{}); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestUsers(t *testing.T) {
	full, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]int{"": provision.DefaultUsers, "  users: 1\n": 1, "  users: 100000\n": provision.MaxUsers} {
		text := strings.Replace(string(full), "  users: 1000 # how many the service is made for; 100\n", line, 1)
		r, err := Parse("testdata/full.yaml", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if p, err := provision.PlanFor(r, r.Nodes[0], "", 1, provision.ImageRef{}); err != nil || r.Stack.Users != want || p.Stack.Users != want {
			t.Errorf("%q: %d users, in the plan %d, want %d; %v", line, r.Stack.Users, p.Stack.Users, want, err)
		}
	}
}

// Each key-file once, as the rack file names it.
func TestKeyFiles(t *testing.T) {
	got, err := KeyFiles("testdata/full.yaml")
	if err != nil || !slices.Equal(got, []string{"ops.pub"}) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := KeyFiles("testdata/mistakes.yaml"); err == nil {
		t.Error("a rack file with mistakes has key-files")
	}
}
