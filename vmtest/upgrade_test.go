//go:build e2e

package vmtest_test

import (
	"crypto/sha256"
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

// releases makes releases of a stack from the packages that the image has
// installed.
type releases struct {
	t     *testing.T
	kinds *kinds
	image string                           // the image's root file system
	dir   string                           // one folder for each release, named by its digest
	files map[string]provision.ReleaseFile // by their names below dir/files
}

// packages that the releases have, with the component that each is of.
var repacked = map[string]string{"haproxy": "database", "ejabberd": "ejabberd"}

func newReleases(r *rig, k *kinds) *releases {
	rs := &releases{t: r.t, kinds: k, image: filepath.Join(r.dir, "image"), dir: filepath.Join(r.dir, "releases"), files: map[string]provision.ReleaseFile{}}
	r.run("mkdir", "-p", rs.dir+"/files")
	return rs
}

// add completes what is known of a file in dir/files.
func (rs *releases) add(name string, f provision.ReleaseFile) provision.ReleaseFile {
	rs.t.Helper()
	b, err := os.ReadFile(rs.dir + "/files/" + name)
	if err != nil {
		rs.t.Fatal(err)
	}
	f.Size, f.Digest = int64(len(b)), hash(b)
	rs.files[name] = f
	return f
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
	if f, there := rs.files[name]; there {
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
	must("dpkg-deb", "-Znone", "--build", tree, rs.dir+"/files/"+name)
	return rs.add(name, provision.ReleaseFile{Name: name, Component: repacked[pkg], Kind: provision.FilePackage, Package: pkg, Version: version})
}

// build makes a release and returns its digest. suffix goes to the packages'
// versions; changes are made to the stack.
func (rs *releases) build(version, suffix string, changes ...func(*provision.Stack)) string {
	rs.t.Helper()
	s, err := stackfile.Load(rs.kinds.dir)
	if err != nil {
		rs.t.Fatal(err)
	}
	s.Version = version
	for _, c := range changes {
		c(s)
	}
	rel := provision.Release{Format: provision.ReleaseFormat, Name: s.Name, Version: version, Stack: *s}
	from := map[string]string{} // where in dir/files they are
	for pkg := range repacked {
		f := rs.repack(pkg, rs.version(pkg)+suffix)
		rel.Files, from[f.Name] = append(rel.Files, f), f.Name
	}
	for _, c := range s.Components {
		for _, i := range c.Images {
			name := i.ReleaseName()
			from[name] = i.Digest + ".tar"
			if err := os.WriteFile(rs.dir+"/files/"+from[name], rs.kinds.images[i.Digest], 0o644); err != nil {
				rs.t.Fatal(err)
			}
			rel.Files = append(rel.Files, rs.add(from[name], provision.ReleaseFile{Name: name, Component: c.Name, Kind: provision.FileImage}))
		}
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
	for name, text := range map[string][]byte{"manifest.json": manifest, "complete": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			rs.t.Fatal(err)
		}
	}
	for name, file := range from {
		if err := os.Link(rs.dir+"/files/"+file, dir+"/files/"+name); err != nil {
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

// component changes one of the stack's components.
func component(name string, change func(*provision.Component)) func(*provision.Stack) {
	return func(s *provision.Stack) {
		for i := range s.Components {
			if s.Components[i].Name == name {
				change(&s.Components[i])
			}
		}
	}
}

// haproxy2 changes a file of the database.
func haproxy2(c *provision.Component) {
	for i, f := range c.Files {
		if f.Path == "/etc/haproxy/haproxy.cfg" {
			c.Files[i].Template = "# Release 2.\n" + f.Template
		}
	}
}

// boards are board and pinboard in other versions.
func (k *kinds) boards(one, two string) func(*provision.Stack) {
	other := func(was, now string) func(*provision.Component) {
		image := k.image("OF=" + now)
		return func(c *provision.Component) {
			c.Images = slices.Clone(c.Images)
			c.Images[0].Digest = image
			c.Manifest = strings.Replace(c.Manifest, was+" of {{.Node}}", now+" of {{.Node}}", 1)
		}
	}
	board, pinboard := component("board", other("1", one)), component("pinboard", other("2", two))
	return func(s *provision.Stack) { board(s); pinboard(s) }
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

// A node that loses its power at any step of an upgrade or a rollback ends
// wholly where it was or wholly where it goes. Both take turns; so that each is
// cut at every step, a second rack begins with an upgrade that is over.
func TestStackSwitchPowerCut(t *testing.T)      { powerCuts(t) }
func TestStackSwitchPowerCutShift(t *testing.T) { powerCuts(t, "done") }

func powerCuts(t *testing.T, first ...string) {
	k := newKinds(t)
	r, boxes := k.serve(1)
	b := boxes[0]
	rs := newReleases(r, k)
	rs.build("1", "")
	mark := func(name string, after bool) provision.Command {
		return provision.Command{Args: []string{"/bin/sh", "-c", "echo {{.Node}} >> /var/lib/platter/" + name}, After: after}
	}
	two := rs.build("2", "+platter2", component("database", haproxy2), k.boards("3", "4"), component("ejabberd", func(c *provision.Component) {
		c.Upgrade = []provision.Command{mark("before", false), mark("after", true)}
		c.Rollback = []provision.Command{mark("rollback", false)}
	}))
	rs.stage(boxes)
	b.on()
	r.await("it is ready", allReady, "node1")
	r.post(boxes, "kept")
	members := map[string][]string{}
	for _, c := range []string{"etcd", "postgresql", "database", "ejabberd", "board", "pinboard"} {
		members[c] = []string{"node1"}
	}
	to := []provision.SwitchArgs{{To: two, Members: members}, {To: provision.Installed, Rollback: true}}
	is := []string{"", b.runs()} // what it runs after each of these
	next := 0
	for i, step := range append(first, "save", "before", "stop", "packages", "packages", "plan", "start", "after") {
		began := time.Now()
		o, err := r.op.Order(t.Context(), b.name, provision.OrderSwitch, to[next], time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		at := b.awaitStep(fmt.Sprint(o.ID, " "), step)
		if i -= len(first); i == 4 || i == 6 { // when dpkg and podman are at work
			time.Sleep(700 * time.Millisecond)
		}
		b.off()
		if step == "plan" { // podman was just writing: it truncates first
			if err := os.Truncate(b.dir+"/root/var/lib/containers/storage/secrets/secrets.json", 0); err != nil {
				t.Fatal(err)
			}
		}
		b.on()
		for o, err = range r.op.FollowOrder(t.Context(), o.ID) {
			if err != nil {
				t.Fatal(err)
			}
		}
		now := b.runs()
		t.Logf("power cut at the step %s: %s %v after %s: %s", at, o.State, o.Failure, time.Since(began).Round(time.Second), now)
		switch {
		case o.State != provision.OrderDone:
			t.Fatalf("it ended %s: %v", o.State, o.Failure)
		case is[next] == "":
			is[next] = now
		case now != is[next]:
			t.Fatalf("it runs\n%s\ninstead of\n%s", now, is[next])
		}
		if left := b.sh("dpkg --audit; ls -A /usr/sbin/policy-rc.d /var/lib/platter/stack/hold 2>/dev/null || :"); left != "" {
			t.Errorf("it left behind\n%s", left)
		}
		r.await("it is ready", allReady, "node1")
		r.shows("after the power cut", boxes, []string{"3", "1"}[next], []string{"4", "2"}[next], "kept")
		next = 1 - next
	}
	for _, name := range []string{"before", "after", "rollback"} {
		if n := strings.Count(b.sh("cat /var/lib/platter/"+name), "node1"); n < 1 {
			t.Errorf("the command %s was carried out %d times", name, n)
		}
	}
}

// awaitStep returns when the box's switch, whose attempt begins so, is at the
// step, or past it, and says where it is.
func (b *box) awaitStep(attempt, step string) string {
	b.r.t.Helper()
	all := []string{"save", "before", "stop", "packages", "plan", "start", "after", "done"}
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(200 * time.Microsecond) {
		var j struct{ Attempt, Step string }
		text, err := os.ReadFile(b.dir + "/root/var/lib/platter/stack/switch.json")
		if err != nil || json.Unmarshal(text, &j) != nil || !strings.HasPrefix(j.Attempt, attempt) {
			continue
		}
		if slices.Index(all, j.Step) >= slices.Index(all, step) {
			return j.Step
		}
	}
	b.r.t.Fatalf("the switch does not come to the step %s", step)
	return ""
}

// TestStackUpgrade: a rack of three with components of all kinds goes to
// another release, over one in between, and back while users write to each
// other; a node loses its power meanwhile. It stays where it is when a release
// does not work.
func TestStackUpgrade(t *testing.T) {
	k := newKinds(t)
	r, boxes := k.serve(3)
	rs := newReleases(r, k)
	rs.build("1", "")
	// What release 2 does to the database, release 3 does for those who come from 1.
	var two, three []provision.Command
	for _, sql := range []string{"create table if not exists upgraded (two int)", "alter table upgraded add column if not exists three int"} {
		three = append(three, provision.Command{Once: true, Args: []string{"/bin/sh", "-c",
			`PGPASSWORD=$(sed -n 's/^sql_password: "\(.*\)"$/\1/p' /etc/ejabberd/ejabberd.yml) psql -h 127.0.0.1 -p 5000 -U ejabberd -d ejabberd -v ON_ERROR_STOP=1 -c "$0"`, sql}})
		two = three[:1]
	}
	upgrade := func(list []provision.Command) func(*provision.Stack) {
		return component("ejabberd", func(c *provision.Component) { c.Upgrade = list })
	}
	changed := k.boards("3", "4")
	rs.build("2", "+platter2", upgrade(two))
	rs.build("3", "+platter2", upgrade(three), component("database", haproxy2), changed)
	rs.build("4", "+platter2", upgrade(three), component("database", haproxy2), changed, component("pinboard", func(c *provision.Component) {
		c.Manifest = strings.Replace(c.Manifest, `value: "8080"`, `value: "nowhere"`, 1)
	}))
	rs.stage(boxes)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady, "node1", "node2", "node3")
	all := func() (out []string) {
		for _, b := range boxes {
			out = append(out, b.runs())
		}
		return out
	}
	installed := all()
	r.post(boxes, "before")
	first := primary(t, boxes)
	f := r.flow(boxes, first, 4)
	t.Log(r.stack("upgrade", "3", "--dry-run"))
	for i, now := range all() {
		if now != installed[i] {
			t.Fatalf("a dry run made it\n%s\nof\n%s", now, installed[i])
		}
	}

	began := time.Now()
	rolled := make(chan error, 1)
	var said []byte
	go func() {
		var err error
		said, err = exec.Command(r.bin(), "stack", "--socket", r.dir+"/socket", "upgrade", "3").CombinedOutput()
		rolled <- err
	}()
	cut := without(boxes, first)[0] // its turn is first
	cut.awaitStep("", "packages")
	cut.off()
	cut.on()
	err := <-rolled
	t.Logf("%s\nupgrade with a power cut of %s after %s", said, cut.name, time.Since(began).Round(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	upgraded := all()
	for i, b := range boxes {
		if !containsAll(upgraded[i], "haproxy "+rs.version("haproxy")+"+platter2 install ok installed", "ejabberd "+rs.version("ejabberd")+"+platter2 install ok installed") {
			t.Errorf("after the upgrade %s runs\n%s", b.name, upgraded[i])
		}
	}
	r.shows("after the upgrade", boxes, "3", "4", "before")
	r.post(boxes, "since")
	boxes[0].sql("select two, three from upgraded")

	// One node finds out; the others never get it.
	began = time.Now()
	out, err := exec.Command(r.bin(), "stack", "--socket", r.dir+"/socket", "upgrade", "4", "--patience", "20s").CombinedOutput()
	t.Logf("%s\na broken release after %s", out, time.Since(began).Round(time.Second))
	if err == nil || !containsAll(string(out), "kept", "component pinboard") {
		t.Errorf("a broken release: %v", err)
	}
	r.await("all are ready", allReady, "node1", "node2", "node3")
	for i, now := range all() {
		if now != upgraded[i] {
			t.Errorf("a broken release made it\n%s\nof\n%s", now, upgraded[i])
		}
	}

	written := boxes[0].sql("select max(id), count(*) from archive")
	began = time.Now()
	t.Log(r.stack("rollback"))
	t.Logf("rollback after %s", time.Since(began).Round(time.Second))
	for i, now := range all() {
		if now != installed[i] {
			t.Errorf("rollback made it\n%s\nof\n%s", now, installed[i])
		}
	}
	r.shows("after the rollback", boxes, "1", "2", "before", "since")
	last, n, _ := strings.Cut(written, "|")
	if now := boxes[0].sql("select count(*) from archive where id <= " + last); now != n {
		t.Errorf("of %s messages in the archive before the rollback %s are left", n, now)
	}
	res := f.end()
	if len(res.Lost) > 0 || res.Acked < 50 || res.Delivered < res.Acked/2 {
		t.Errorf("%+v\n%s", res, r.read("flow.log"))
	}
	t.Log(r.stack("probe"))
}

func containsAll(s string, parts ...string) bool {
	return !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(s, p) })
}
