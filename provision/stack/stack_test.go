package stack

import (
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"

	"platter/provision"
)

func testPlan(t *testing.T) provision.Plan {
	t.Helper()
	return planOf(t, "node2", provision.Host{Name: "node1", Address: netip.MustParseAddr("10.1.2.2")},
		provision.Host{Name: "node2", Address: netip.MustParseAddr("10.1.2.3")})
}

// testRoot is a root whose services have users of their own.
func testRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	if err := os.MkdirAll(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		"passwd": "root:x:0:0::/root:/bin/sh\nejabberd:x:4102:4105::/var/lib/ejabberd:/bin/sh\npostgres:x:4103:4106::/:/bin/sh\n",
		"group":  "root:x:0:\nejabberd:x:4105:\npostgres:x:4106:\netcd:x:4107:\n",
	} {
		if err := os.WriteFile(root+"/etc/"+file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestPrepare needs root: files are given to ejabberd.
func TestPrepare(t *testing.T) {
	root, sec := testRoot(t), testSecrets(t)
	if err := Prepare(root, testPlan(t), sec); err != nil {
		t.Fatal(err)
	}
	// Who may read what: the point of the modes is the secrets.
	for path, want := range map[string]struct {
		mode     fs.FileMode
		uid, gid uint32
	}{
		"var/lib/ejabberd/.erlang.cookie": {0o400, 4102, 4105},
		"etc/ejabberd/platter.pem":        {0o640, 0, 4105},
		"etc/ejabberd/ejabberd.yml":       {0o640, 0, 4105},
		"etc/platter/stack.json":          {0o600, 0, 0},
		"etc/default/ejabberd":            {0o644, 0, 0},
		"etc/patroni/platter.key":         {0o600, 4103, 4106},
		"etc/patroni/config.yml":          {0o640, 0, 4106},
	} {
		st, err := os.Stat(filepath.Join(root, path))
		if err != nil {
			t.Error(err)
			continue
		}
		sys := st.Sys().(*syscall.Stat_t)
		if st.Mode() != want.mode || sys.Uid != want.uid || sys.Gid != want.gid {
			t.Errorf("%s is %v %d:%d, want %v %d:%d", path, st.Mode(), sys.Uid, sys.Gid, want.mode, want.uid, want.gid)
		}
	}
	// Secrets are in no file that others may read.
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil || st.Mode()&0o007 == 0 {
			return err
		}
		b, err := os.ReadFile(path)
		for _, s := range append(slices.Collect(maps.Values(sec.Named)), sec.Cookie, sec.Key, sec.Probes[0].Password) {
			if strings.Contains(string(b), s) {
				t.Errorf("everybody may read a secret in %s", path)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(root + "/etc/systemd/system/multi-user.target.wants/ejabberd.service"); err != nil || to != "/usr/lib/systemd/system/ejabberd.service" {
		t.Errorf("ejabberd is not enabled: %q, %v", to, err)
	}

	got, err := Secrets(root)
	if err != nil || cmp.Diff(sec, got) != "" {
		t.Errorf("secrets read back differ: %v", err)
	}
	if changed, err := prepare(root, testPlan(t), sec); err != nil || len(changed) > 0 {
		t.Errorf("a second time: changed %v, %v", changed, err)
	}
	if err := os.Chmod(root+"/var/lib/ejabberd/.erlang.cookie", 0o444); err != nil {
		t.Fatal(err)
	}
	if changed, err := prepare(root, testPlan(t), sec); err != nil || !changed["ejabberd"] || len(changed) != 1 {
		t.Errorf("a cookie that everybody may read: changed %v, %v", changed, err)
	}
}

func TestConfiguration(t *testing.T) {
	list, err := files(testRoot(t), testPlan(t), testSecrets(t))
	if err != nil {
		t.Fatal(err)
	}
	text := map[string]string{}
	for _, f := range list {
		text[f.path] = f.text
	}
	var conf struct {
		Hosts  []string
		Listen []struct {
			Port             int
			Module           string
			TLS              bool `yaml:"tls"`
			StartTLSRequired bool `yaml:"starttls_required"`
			Backlog          int
			Handlers         map[string]string `yaml:"request_handlers"`
		}
		S2S     string `yaml:"s2s_access"`
		ACL     map[string]struct{ User []string }
		Modules struct {
			Upload struct {
				URL string `yaml:"put_url"`
			} `yaml:"mod_http_upload"`
		}
	}
	if err := yaml.Unmarshal([]byte(text["etc/ejabberd/ejabberd.yml"]), &conf); err != nil {
		t.Fatal(err)
	}
	if len(conf.Hosts) != 1 || conf.Hosts[0] != "im.test" || conf.S2S != "none" || len(conf.Listen) != 3 {
		t.Errorf("configuration %+v", conf)
	}
	for _, l := range conf.Listen {
		if !l.TLS && !l.StartTLSRequired {
			t.Errorf("port %d lets users in without TLS", l.Port)
		}
		if l.Backlog < 1024 {
			t.Errorf("port %d has a backlog of %d", l.Port, l.Backlog)
		}
		for path, module := range l.Handlers {
			if module != "ejabberd_http_ws" && module != "mod_http_upload" {
				t.Errorf("port %d serves %s by %s", l.Port, path, module)
			}
		}
	}
	if url := conf.Modules.Upload.URL; url != "https://10.1.2.3/upload" || len(conf.ACL["probe"].User) != 2 {
		t.Errorf("files have the address %s; probes are %v", url, conf.ACL["probe"])
	}
	if want := "inet_dist_use_interface {10,1,2,3}"; !strings.Contains(text["etc/ejabberd/vm.args"], want) {
		t.Errorf("no %s in %s", want, text["etc/ejabberd/vm.args"])
	}
	if want := "ERLANG_NODE=ejabberd@node2\nERL_DIST_PORT=5210\n"; !strings.Contains(text["etc/default/ejabberd"], want) {
		t.Errorf("no %s in %s", want, text["etc/default/ejabberd"])
	}
}

// TestRefused: every mistake is named, and nothing is written.
func TestRefused(t *testing.T) {
	root, plan, sec := testRoot(t), testPlan(t), testSecrets(t)
	plan.Stack.Domain, plan.Node = "im.test\nhosts: []", "a b"
	sec.Cookie = "short"
	sec.Probes[0].User = "x>>"
	err := Prepare(root, plan, sec)
	for _, want := range []string{"XMPP domain", "node name", "cookie", "certificate does not serve", "probe account"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %s in: %v", want, err)
		}
	}
	if _, err := os.Stat(root + "/etc/ejabberd"); err == nil {
		t.Error("files were written")
	}
	other := testSecrets(t)
	sec = testSecrets(t)
	sec.CA = other.CA
	if err := Prepare(root, testPlan(t), sec); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("a certificate of another CA: %v", err)
	}
}

func TestMembership(t *testing.T) {
	formed := &marker{Node: "a", Role: provision.RoleForm}
	joined := &marker{Node: "a", Role: provision.RoleJoin, Target: "b"}
	for _, c := range []struct {
		name string
		kept *marker
		st   status
		want *marker
	}{
		{"fresh", nil, status{known: []string{"a"}}, nil},
		{"founder that is alone", formed, status{known: []string{"a"}}, formed},
		{"founder with others", formed, status{known: []string{"a", "b"}}, formed},
		{"member, the others are down", joined, status{known: []string{"a", "b"}, running: []string{"a"}}, joined},
		{"killed after the join, before the marker", nil, status{known: []string{"a", "b"}}, &marker{Node: "a", Role: provision.RoleJoin, Target: "b"}},
		{"killed in the middle of the join", nil, status{known: []string{"a", "b"}, incomplete: true}, nil},
		{"member whose modules are starting", joined, status{known: []string{"a", "b"}, incomplete: true}, joined},
		{"member whose database was lost", joined, status{known: []string{"a"}}, nil},
		{"database not running", joined, status{}, nil},
	} {
		got, ok := membership("a", c.kept, c.st)
		if ok != (c.want != nil) || (ok && got != *c.want) {
			t.Errorf("%s: %+v %v", c.name, got, ok)
		}
	}
}

func TestReplies(t *testing.T) {
	st, err := parseStatus("up=true joining=false incomplete=true known=a,b running=")
	if want := (status{up: true, incomplete: true, known: []string{"a", "b"}}); err != nil || cmp.Diff(want, st, cmp.AllowUnexported(status{})) != "" {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := parseStatus("up=true gone=3"); err == nil {
		t.Error("an unknown field was taken")
	}
	if s, err := parseReply("{ok, \"a \\\"b\\\"\"}\n"); err != nil || s != `a "b"` {
		t.Errorf("%q, %v", s, err)
	}
	for _, bad := range []string{"", "{ok, ok}", `{error, "*** eval: boom"}`, `{ok, "x`} {
		if s, err := parseReply(bad); err == nil {
			t.Errorf("%q gave %q", bad, s)
		}
	}
	if got := binary("a\"'.\n"); got != "<<97,34,39,46,10>>" {
		t.Errorf("binary: %s", got)
	}
}

func FuzzParseReply(f *testing.F) {
	f.Add(`{ok, "up=true joining=false incomplete=false known=a running=a"}`)
	f.Add(`{error, "x"}`)
	f.Add(`{ok, }`)
	f.Fuzz(func(t *testing.T, out string) {
		if s, err := parseReply(out); err == nil {
			parseStatus(s)
		}
	})
}
