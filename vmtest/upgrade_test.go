//go:build e2e

package vmtest_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/stackfile"
)

// releases makes releases of the built-in stack from the packages that the image
// has installed.
type releases struct {
	t     *testing.T
	image string // the image's root file system
	dir   string // one folder for each release, named by its digest
	debs  map[string]provision.ReleaseFile
}

// packages that the releases have, with the component that each is of.
var repacked = map[string]string{"haproxy": "database", "ejabberd": "ejabberd"}

func newReleases(r *rig) *releases {
	rs := &releases{t: r.t, image: filepath.Join(r.dir, "image"), dir: filepath.Join(r.dir, "releases"), debs: map[string]provision.ReleaseFile{}}
	r.run("mkdir", "-p", rs.dir+"/debs")
	return rs
}

func (rs *releases) dpkg(args ...string) string {
	rs.t.Helper()
	out, err := exec.Command("dpkg-query", append([]string{"--admindir=" + rs.image + "/var/lib/dpkg"}, args...)...).Output()
	if err != nil {
		rs.t.Fatalf("dpkg-query %v: %v", args, err)
	}
	return strings.TrimSpace(string(out))
}

func (rs *releases) version(pkg string) string { return rs.dpkg("-W", "-f=${Version}", pkg) }

// repack makes the .deb that the package was installed from, under another version.
func (rs *releases) repack(pkg, version string) provision.ReleaseFile {
	rs.t.Helper()
	name := pkg + "_" + strings.ReplaceAll(version, ":", "%3a") + ".deb"
	if f, there := rs.debs[name]; there {
		return f
	}
	tree, info := filepath.Join(rs.t.TempDir(), pkg), rs.image+"/var/lib/dpkg/info/"
	must := func(name string, args ...string) {
		rs.t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			rs.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	must("mkdir", "-p", tree+"/DEBIAN")
	// What the image left out of the package, as its documentation, is not there.
	must("sh", "-c", `cd "$1" && while read -r f; do [ -e ".$f" ] || [ -h ".$f" ] && echo ".$f"; done < "$2" | tar -c --no-recursion -T - | tar -x -C "$3"`,
		"sh", rs.image, info+pkg+".list", tree)
	var control []string
	skip := false
	for line := range strings.Lines(rs.dpkg("-s", pkg)) {
		if !strings.HasPrefix(line, " ") {
			skip = strings.HasPrefix(line, "Status:") || strings.HasPrefix(line, "Conffiles:")
		}
		if strings.HasPrefix(line, "Version:") {
			line = "Version: " + version + "\n"
		}
		if !skip {
			control = append(control, line)
		}
	}
	if err := os.WriteFile(tree+"/DEBIAN/control", []byte(strings.Join(control, "")+"\n"), 0o644); err != nil {
		rs.t.Fatal(err)
	}
	for _, part := range []string{"conffiles", "preinst", "postinst", "prerm", "postrm", "triggers", "templates", "config", "md5sums"} {
		if _, err := os.Stat(info + pkg + "." + part); err == nil {
			must("cp", "-p", info+pkg+"."+part, tree+"/DEBIAN/"+part)
		}
	}
	must("dpkg-deb", "-Znone", "--build", tree, rs.dir+"/debs/"+name)
	b, err := os.ReadFile(rs.dir + "/debs/" + name)
	if err != nil {
		rs.t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	rs.debs[name] = provision.ReleaseFile{Name: name, Component: repacked[pkg], Kind: provision.FilePackage, Package: pkg, Version: version,
		Size: int64(len(b)), Digest: hex.EncodeToString(sum[:])}
	return rs.debs[name]
}

// build makes a release and returns its digest. suffix goes to the packages'
// versions; change to the stack.
func (rs *releases) build(version, suffix string, change func(*provision.Stack)) string {
	rs.t.Helper()
	s, err := stackfile.Default()
	if err != nil {
		rs.t.Fatal(err)
	}
	s.Version = version
	if change != nil {
		change(s)
	}
	rel := provision.Release{Format: provision.ReleaseFormat, Name: s.Name, Version: version, Stack: *s}
	for pkg := range repacked {
		rel.Files = append(rel.Files, rs.repack(pkg, rs.version(pkg)+suffix))
	}
	slices.SortFunc(rel.Files, func(a, b provision.ReleaseFile) int { return strings.Compare(a.Name, b.Name) })
	manifest, digest, err := rel.Manifest()
	if err != nil {
		rs.t.Fatal(err)
	}
	dir := filepath.Join(rs.dir, digest)
	if err := os.MkdirAll(dir+"/files", 0o755); err != nil {
		rs.t.Fatal(err)
	}
	for _, f := range rel.Files {
		if err := os.Link(rs.dir+"/debs/"+f.Name, dir+"/files/"+f.Name); err != nil {
			rs.t.Fatal(err)
		}
	}
	for name, text := range map[string][]byte{"manifest.json": manifest, "complete": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			rs.t.Fatal(err)
		}
	}
	return digest
}

// stage puts every release on the boxes' disks.
func (rs *releases) stage(boxes []*box) {
	rs.t.Helper()
	for _, b := range boxes {
		b.r.run("sh", "-c", `mkdir -p "$2" && cp -a "$1"/????????????????????????????????????????????????????????????* "$2"`, "sh", rs.dir, b.dir+"/root/var/lib/platter/stack")
	}
}

// template changes the text of one of the component's files.
func template(component, path string, change func(string) string) func(*provision.Stack) {
	return func(s *provision.Stack) {
		for i, c := range s.Components {
			for j, f := range c.Files {
				if c.Name == component && f.Path == path {
					s.Components[i].Files[j].Template = change(f.Template)
				}
			}
		}
	}
}

// order gives a box an order and waits for its end.
func (b *box) order(kind provision.OrderKind, args any) provision.OrderStatus {
	b.r.t.Helper()
	o, err := b.r.op.Order(b.r.t.Context(), b.name, kind, args, time.Minute)
	if err != nil {
		b.r.t.Fatal(err)
	}
	for o, err = range b.r.op.FollowOrder(b.r.t.Context(), o.ID) {
		if err != nil {
			b.r.t.Fatal(err)
		}
	}
	return o
}

// runs is what the box's disk says of what it runs: versions, plan and files.
func (b *box) runs() string {
	b.r.t.Helper()
	out, err := exec.Command("dpkg-query", "--admindir="+b.dir+"/root/var/lib/dpkg", "-W", "-f=${Package} ${Version} ${Status}\n", "haproxy", "ejabberd").Output()
	if err != nil {
		b.r.t.Fatal(err)
	}
	var plan provision.Plan
	text, err := os.ReadFile(b.dir + "/root/etc/platter/plan.json")
	if err == nil {
		err = json.Unmarshal(text, &plan)
	}
	if err != nil {
		b.r.t.Fatal(err)
	}
	files := sha256.New()
	for _, c := range plan.Stack.Components {
		for _, f := range c.Files {
			text, err := os.ReadFile(b.dir + "/root" + f.Path)
			if err != nil {
				b.r.t.Fatal(err)
			}
			fmt.Fprintf(files, "%s %s\n", f.Path, text)
		}
	}
	plan.Generation = 0
	return fmt.Sprintf("%splan %.12s files %.12x", out, plan.Digest(), files.Sum(nil))
}

// TestStackSwitch: one node goes to another release and back, and stays where it
// is when that does not work.
func TestStackSwitch(t *testing.T) {
	r, boxes := boxRack(t, 1)
	b := boxes[0]
	rs := newReleases(r)
	rs.build("1", "", nil)
	two := rs.build("2", "+platter2", template("database", "/etc/haproxy/haproxy.cfg", func(s string) string { return "# Release 2.\n" + s }))
	bad := rs.build("3", "+platter3", template("ejabberd", "/etc/ejabberd/ejabberd.yml", func(s string) string { return s + "\nno-such-option: [\n" }))
	rs.stage(boxes)
	b.on()
	r.await("it is ready", allReady)
	members := map[string][]string{"etcd": {"node1"}, "postgresql": {"node1"}, "database": {"node1"}, "ejabberd": {"node1"}}
	want := func(what string, state provision.OrderState, args provision.SwitchArgs, says ...string) string {
		t.Helper()
		began := time.Now()
		if args.To != provision.Installed {
			args.Members = members
		}
		o := b.order(provision.OrderSwitch, args)
		said := fmt.Sprintf("%s: %s %v %s", what, o.State, o.Failure, o.Result)
		if o.State != state || !containsAll(said, says...) {
			t.Fatalf("%s, want %s and %q", said, state, says)
		}
		r.await(what+": it is ready", allReady)
		t.Logf("%s after %s: %s\n%s", what, time.Since(began).Round(time.Second), o.State, b.runs())
		return b.runs()
	}
	installed := b.runs()
	is := func(now, then string) {
		t.Helper()
		if now != then {
			t.Errorf("it runs\n%s\ninstead of\n%s", now, then)
		}
	}
	is(want("a dry run", provision.OrderDone, provision.SwitchArgs{To: two, DryRun: true}, "+platter2"), installed)
	is(want("a release that is not there", provision.OrderFailed, provision.SwitchArgs{To: strings.Repeat("ab", 32)}, "node1", "platter stack stage", "nothing was changed"), installed)
	upgraded := want("release 2", provision.OrderDone, provision.SwitchArgs{To: two})
	if !containsAll(upgraded, "haproxy "+rs.version("haproxy")+"+platter2 install ok installed", "ejabberd "+rs.version("ejabberd")+"+platter2 install ok installed") {
		t.Errorf("after the switch it runs\n%s", upgraded)
	}
	if cfg := b.sh("cat /etc/haproxy/haproxy.cfg"); !strings.HasPrefix(cfg, "# Release 2.") {
		t.Errorf("haproxy.cfg is\n%s", cfg)
	}
	is(want("a broken release", provision.OrderFailed, provision.SwitchArgs{To: bad, Patience: 30}, "node1", "component ejabberd", "went back"), upgraded)
	is(want("back", provision.OrderDone, provision.SwitchArgs{To: provision.Installed, Rollback: true}), installed)
	if left := b.sh("ls -A /usr/sbin/policy-rc.d /var/lib/platter/stack/hold /var/lib/platter/stack/current 2>/dev/null || :"); left != "/var/lib/platter/stack/hold:" {
		t.Errorf("it left behind\n%s", left)
	}
}

func containsAll(s string, parts ...string) bool {
	return !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(s, p) })
}
