package stackfile

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"platter/provision"
	"platter/provision/stack/quadlet"
	"platter/provision/yamlfile"
)

// FileName is the stack file's name in its folder.
const FileName = "stack.yaml"

//go:embed default
var embedded embed.FS

func builtin() fs.FS {
	sub, err := fs.Sub(embedded, "default")
	if err != nil {
		panic(err) // the name is valid
	}
	return sub
}

// Load reads the stack file in the folder dir. Its error is yamlfile.Problems
// where the content is wrong.
func Load(dir string) (*provision.Stack, error) {
	root, err := os.OpenRoot(dir) // no symbolic link leads out of it
	if err != nil {
		return nil, fmt.Errorf("cannot read the stack: %w", err)
	}
	defer root.Close()
	return read(root.FS(), dir)
}

// Default is the stack that comes with the program.
func Default() (*provision.Stack, error) { return read(builtin(), "built-in") }

// Export writes the stack that comes with the program into the folder dir,
// which must be empty or absent.
func Export(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot export the stack: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty: name a new folder", dir)
	}
	if err := os.CopyFS(dir, builtin()); err != nil {
		return fmt.Errorf("cannot export the stack: %w", err)
	}
	return nil
}

func read(fsys fs.FS, dir string) (*provision.Stack, error) {
	data, err := fs.ReadFile(fsys, FileName)
	if err != nil {
		return nil, fmt.Errorf("cannot read the stack file in %s: %w", dir, err)
	}
	p := parser{fsys: fsys, dir: dir, file: yamlfile.Parse(filepath.Join(dir, FileName), data),
		secrets: map[string]*declared{}, lines: map[string]int{}, owners: map[string]string{"port 22": "the host's ssh server"}, versions: map[string]string{}, services: map[string][]string{}}
	s := p.stack(p.file.Root())
	if err := p.file.Err(); err != nil {
		return nil, err
	}
	return s, nil
}

var (
	parseName    = match(`[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`, "lower-case letters, digits and hyphens, at most 63")
	parseVersion = match(`[0-9][A-Za-z0-9.+~-]{0,62}`, "a version such as 1 or 2.0-1, which begins with a digit")
	parsePackage = match(`[a-z0-9][a-z0-9+.-]+(=([0-9]+:)?[0-9][A-Za-z0-9.+~-]*)?`, "a Debian package, NAME or NAME=VERSION")
	parseUnit    = match(`[A-Za-z0-9:_.\\@-]+\.(service|socket|timer|path|mount|target)`, "a systemd unit, such as etcd.service")
	parsePath    = match(`(/[A-Za-z0-9._@:+=,\\-]+)+`, "an absolute path of letters, digits and ._@:+=,-")
	parseLogin   = match(`[a-z_][a-z0-9_-]{0,30}`, "a name of a user or a group")
	parseImage   = match(`[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)+:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`, "an image with its registry and tag, such as localhost/board:1")
	parseDigest  = match(`sha256:[0-9a-f]{64}`, "sha256: and 64 hex digits")
	parseMode    = match(`0?[0-7]{3}`, `permissions in quotes, such as "0640"`)

	parseKind   = oneOf(provision.KindPackages, provision.KindCompose, provision.KindKube)
	parseMember = oneOf(provision.MemberEtcd, provision.MemberPatroni, provision.MemberEjabberd, provision.MemberRabbitMQ)
)

func match(form, what string) func(string) (string, error) {
	return yamlfile.Match(regexp.MustCompile("^("+form+")$"), what)
}

func oneOf[T ~string](known ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		if slices.Contains(known, T(s)) {
			return T(s), nil
		}
		var words []string
		for _, k := range known {
			words = append(words, string(k))
		}
		return "", fmt.Errorf("is not known%s", yamlfile.Suggest(s, words))
	}
}

type parser struct {
	fsys     fs.FS
	dir      string // for messages
	file     *yamlfile.File
	secrets  map[string]*declared
	lines    map[string]int    // what must be unique -> line
	owners   map[string]string // port or path -> component that has it
	versions map[string]string // package or image -> version or digest
	bytes    int               // of all templates and manifests
	texts    []text
	services map[string][]string // component -> systemd services that podman makes for it
	needs    []need
}

type declared struct {
	provision.Secret
	at   yamlfile.Value
	used bool
}

type need struct {
	component, needs string
	at               yamlfile.Value
}

func (p *parser) stack(v yamlfile.Value) *provision.Stack {
	top := v.Fields("name", "version", "secrets", "components")
	s := &provision.Stack{
		Name:    yamlfile.Get(top["name"].Required(), parseName),
		Version: yamlfile.Get(top["version"].Required(), parseVersion),
	}
	for _, line := range top["secrets"].Pairs() {
		name := yamlfile.Get(line.Key, parseName)
		m := line.Value.Fields("length")
		length := 32
		if m["length"].Exists() {
			length = yamlfile.Get(m["length"], yamlfile.Int(16, 128))
		}
		p.secrets[name] = &declared{provision.Secret{Name: name, Length: length}, line.Key, false}
	}
	for _, v := range top["components"].Required().List() {
		c := p.component(v)
		if !slices.ContainsFunc(s.Components, func(o provision.Component) bool { return o.Name == c.Name }) {
			s.Components = append(s.Components, c)
		}
	}
	if top["components"].Exists() && len(s.Components) == 0 {
		top["components"].Failf("components has no component")
	}
	for name, d := range p.secrets {
		if name != "" && !d.used {
			d.at.Failf("no component lists the secret %s", name)
		}
	}
	p.checkNeeds(s.Components)
	s.Components = order(s.Components)
	p.try(s)
	for i, c := range s.Components {
		s.Components[i].Units = append(c.Units, p.services[c.Name]...)
	}
	return s
}

func (p *parser) component(v yamlfile.Value) provision.Component {
	m := v.Fields("name", "about", "kind", "packages", "images", "manifest", "place", "needs", "optional", "units", "ports",
		"health", "data", "member", "secrets", "files", "upgrade", "rollback")
	c := provision.Component{
		Name:     yamlfile.Get(m["name"].Required(), parseName),
		About:    yamlfile.Get(m["about"], yamlfile.Text),
		Kind:     yamlfile.Get(m["kind"].Required(), parseKind),
		Optional: yamlfile.Get(m["optional"], yamlfile.Bool),
		Member:   yamlfile.Get(m["member"], parseMember),
	}
	p.unique(m["name"], "component", c.Name)
	p.forms(m, &c)

	place := m["place"].Fields("role", "count", "odd")
	c.Place = provision.Placement{
		Role:  yamlfile.Get(place["role"], parseName),
		Count: yamlfile.Get(place["count"], yamlfile.Int(1, 999)),
		Odd:   yamlfile.Get(place["odd"], yamlfile.Bool),
	}
	for _, n := range m["needs"].List() {
		if name := yamlfile.Get(n, parseName); name != "" {
			c.Needs = append(c.Needs, name)
			p.needs = append(p.needs, need{c.Name, name, n})
		}
	}
	for _, u := range m["units"].List() {
		unit := yamlfile.Get(u, parseUnit)
		if strings.HasPrefix(unit, "platter-") {
			u.Failf("%s is Platter's own", unit)
		}
		p.unique(u, "unit", unit)
		c.Units = append(c.Units, unit)
	}
	ports := map[string]bool{}
	for _, v := range m["ports"].List() {
		c.Ports = append(c.Ports, p.port(v, c.Name, ports))
	}
	for _, d := range m["data"].List() {
		c.Data = append(c.Data, p.path(d))
	}
	for _, s := range m["secrets"].List() {
		c.Secrets = append(c.Secrets, p.secret(s))
	}
	health := m["health"].Fields("tcp", "url")
	c.Health = provision.Health{TCP: yamlfile.Get(health["tcp"], yamlfile.Text), URL: yamlfile.Get(health["url"], yamlfile.Text)}
	if c.Health.TCP != "" && c.Health.URL != "" {
		m["health"].Failf("health has tcp and url: one of them decides")
	}
	p.inline(c, health["tcp"], c.Health.TCP, checkTCP)
	p.inline(c, health["url"], c.Health.URL, checkURL)
	for _, f := range m["files"].List() {
		c.Files = append(c.Files, p.stackFile(f, c))
	}
	for _, v := range m["upgrade"].List() {
		c.Upgrade = append(c.Upgrade, p.command(v, c))
	}
	for _, v := range m["rollback"].List() {
		c.Rollback = append(c.Rollback, p.command(v, c))
	}
	if c.Manifest != "" {
		p.containers(m["manifest"], c)
	}
	return c
}

// containers tries the compose file or Kubernetes manifest of c, which at names.
// What the systemd services are called follows from it.
func (p *parser) containers(at yamlfile.Value, c provision.Component) {
	from := filepath.Join(p.dir, yamlfile.Get(at, parseBeside))
	p.texts = append(p.texts, text{c.Name, c.Manifest, from, at, func(out string, secrets []string) error {
		u, err := quadlet.Of(c, from, out)
		if err != nil {
			return err
		}
		for _, f := range u.Files {
			if f.Mode&0o007 != 0 && holds(f.Text, secrets) {
				return errors.New("it holds a secret, which would be seen in the list of processes: put it into a file with mode \"0600\" and name that in env_file")
			}
		}
		if was, ok := p.services[c.Name]; ok && !slices.Equal(was, u.Services) {
			return fmt.Errorf("its services must be the same on all nodes, not %s here and %s there: choose with place, or with another component", strings.Join(was, ", "), strings.Join(u.Services, ", "))
		}
		p.services[c.Name] = u.Services
		return nil
	}})
}

// forms reads what the component's kind needs, and refuses what belongs to
// another kind.
func (p *parser) forms(m map[string]yamlfile.Value, c *provision.Component) {
	for _, key := range []string{"packages", "units", "images", "manifest"} {
		belongs := (key == "packages" || key == "units") == (c.Kind == provision.KindPackages)
		switch v := m[key]; {
		case c.Kind == "": // said already
		case v.Exists() && !belongs:
			v.Failf("a component of kind %s has no %s", c.Kind, key)
		case belongs && key != "units":
			v.Required()
		}
	}
	for _, v := range m["packages"].List() {
		name, version, _ := strings.Cut(yamlfile.Get(v, parsePackage), "=")
		p.same(v, "package", name, version)
		c.Packages = append(c.Packages, provision.Package{Name: name, Version: version})
	}
	for _, v := range m["images"].List() {
		f := v.Fields("name", "file", "digest")
		i := provision.OCIImage{
			Name:   yamlfile.Get(f["name"].Required(), parseImage),
			File:   yamlfile.Get(f["file"].Required(), parseBeside),
			Digest: yamlfile.Get(f["digest"].Required(), parseDigest),
		}
		p.same(f["name"], "image", i.Name, i.Digest)
		if i.File != "" && i.Digest != "" {
			if err := checkArchive(p.fsys, i.File, i.Digest); err != nil {
				f["file"].Failf("image %s of %s: %s %v", i.Name, c.Name, i.File, err)
			}
		}
		c.Images = append(c.Images, i)
	}
	if c.Kind == provision.KindPackages && m["packages"].Exists() && len(c.Packages) == 0 {
		m["packages"].Failf("packages is empty")
	}
	if c.Kind != provision.KindPackages && m["images"].Exists() && len(c.Images) == 0 {
		m["images"].Failf("images is empty")
	}
	if name := yamlfile.Get(m["manifest"], parseBeside); name != "" {
		c.Manifest = p.read(m["manifest"], name)
	}
}

func (p *parser) port(v yamlfile.Value, component string, names map[string]bool) provision.Port {
	m := v.Fields("name", "number", "udp", "local")
	port := provision.Port{
		Name:   yamlfile.Get(m["name"].Required(), parseName),
		Number: yamlfile.Get(m["number"].Required(), yamlfile.Int(1, 65535)),
		UDP:    yamlfile.Get(m["udp"], yamlfile.Bool),
		Local:  yamlfile.Get(m["local"], yamlfile.Bool),
	}
	if names[port.Name] && port.Name != "" {
		m["name"].Failf("%s has two ports with the name %s", component, port.Name)
	}
	names[port.Name] = true
	number := strconv.Itoa(port.Number)
	if port.UDP {
		number += "/udp"
	}
	if port.Number > 0 {
		p.owned(m["number"], "port "+number, component, "is taken by")
	}
	return port
}

func (p *parser) secret(v yamlfile.Value) provision.Secret {
	name := yamlfile.Get(v, parseName)
	d, ok := p.secrets[name]
	if name != "" && !ok {
		known := "there are none"
		if len(p.secrets) > 0 {
			var names []string
			for n := range p.secrets {
				names = append(names, n)
			}
			slices.Sort(names)
			known = strings.TrimPrefix(yamlfile.Suggest(name, names), ", ")
		}
		v.Failf("the secret %s is not declared in the file's secrets: %s", name, known)
	}
	if !ok {
		return provision.Secret{Name: name}
	}
	d.used = true
	return d.Secret
}

func (p *parser) stackFile(v yamlfile.Value, c provision.Component) provision.StackFile {
	m := v.Fields("path", "from", "mode", "owner", "group", "reload")
	f := provision.StackFile{
		Path:   p.path(m["path"].Required()),
		Mode:   0o644,
		Owner:  yamlfile.Get(m["owner"], parseLogin),
		Group:  yamlfile.Get(m["group"], parseLogin),
		Reload: yamlfile.Get(m["reload"], yamlfile.Bool),
	}
	if mode := yamlfile.Get(m["mode"], parseMode); mode != "" {
		n, _ := strconv.ParseUint(mode, 8, 32)
		f.Mode = uint32(n)
	}
	if f.Path != "" {
		p.owned(m["path"], f.Path, c.Name, "is written by")
	}
	if from := yamlfile.Get(m["from"].Required(), parseBeside); from != "" {
		f.Template = p.read(m["from"], from)
		check := func(out string, secrets []string) error {
			if f.Mode&0o007 != 0 && holds(out, secrets) {
				return fmt.Errorf("it holds a secret, but with mode %04o everyone may use it: give %s the mode \"0640\" or a tighter one", f.Mode, f.Path)
			}
			return nil
		}
		p.texts = append(p.texts, text{c.Name, f.Template, filepath.Join(p.dir, from), m["from"], check})
	}
	return f
}

func (p *parser) command(v yamlfile.Value, c provision.Component) provision.Command {
	m := v.Fields("args", "user", "once", "after")
	cmd := provision.Command{
		User:  yamlfile.Get(m["user"], parseLogin),
		Once:  yamlfile.Get(m["once"], yamlfile.Bool),
		After: yamlfile.Get(m["after"], yamlfile.Bool),
	}
	for _, a := range m["args"].Required().List() {
		arg := yamlfile.Get(a, func(s string) (string, error) { return s, nil })
		p.inline(c, a, arg, checkArg)
		cmd.Args = append(cmd.Args, arg)
	}
	if m["args"].Exists() && (len(cmd.Args) == 0 || cmd.Args[0] == "") {
		m["args"].Failf("args names no program")
	}
	return cmd
}

// unique reports a value that an earlier line already has.
func (p *parser) unique(v yamlfile.Value, what, value string) {
	key := what + " " + value
	if line, dup := p.lines[key]; dup && value != "" {
		v.Failf("%s is already used on line %d", key, line)
		return
	}
	p.lines[key] = v.Line()
}

// owned reports what belongs to a component before.
func (p *parser) owned(v yamlfile.Value, what, component, by string) {
	if owner, taken := p.owners[what]; taken {
		v.Failf("%s of %s %s %s", what, component, by, owner)
		return
	}
	p.owners[what] = component
}

// same reports a package or an image of which two components want two versions.
func (p *parser) same(v yamlfile.Value, what, name, version string) {
	key := what + " " + name
	if other := p.versions[key]; name != "" && version != "" && other != "" && other != version {
		v.Failf("%s is wanted as %s here and as %s above", key, version, other)
	} else if version != "" {
		p.versions[key] = version
	}
}

// path reads a path on the nodes, outside of what Platter itself keeps there.
func (p *parser) path(v yamlfile.Value) string {
	return yamlfile.Get(v, func(s string) (string, error) {
		if _, err := parsePath(s); err != nil {
			return "", err
		}
		if clean := path.Clean(s); clean != s {
			return "", fmt.Errorf("must be written as %s", clean)
		}
		for _, dir := range []string{"/etc/platter", "/usr/lib/platter", "/var/lib/platter", quadlet.Dir} {
			if s == dir || strings.HasPrefix(s, dir+"/") {
				return "", fmt.Errorf("is in %s, which is Platter's own", dir)
			}
		}
		for _, own := range []string{"/etc/systemd/system/*.d/platter-order.conf", "/etc/systemd/system/platter-*"} {
			if ok, _ := path.Match(own, s); ok {
				return "", errors.New("is Platter's own")
			}
		}
		return s, nil
	})
}

// parseBeside reads the name of a file below the stack file's folder.
func parseBeside(s string) (string, error) {
	if !fs.ValidPath(s) || s == "." {
		return "", errors.New("must be a file below the stack file's folder, such as etcd/etcd.env")
	}
	return s, nil
}

// read returns the text of a file beside the stack file.
func (p *parser) read(v yamlfile.Value, name string) string {
	fail := func(format string, args ...any) string {
		v.Failf("%s "+format, append([]any{filepath.Join(p.dir, name)}, args...)...)
		return ""
	}
	info, err := fs.Stat(p.fsys, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail("does not exist")
	case err != nil:
		return fail("cannot be read: %v", err)
	case !info.Mode().IsRegular():
		return fail("is no file")
	case info.Size() > provision.MaxStackText-int64(p.bytes):
		return fail("is too large: all templates and manifests of a stack together may have %d KiB", provision.MaxStackText>>10)
	}
	b, err := fs.ReadFile(p.fsys, name)
	if err != nil {
		return fail("cannot be read: %v", err)
	}
	p.bytes += len(b)
	if !utf8.Valid(b) || slices.Contains(b, 0) {
		return fail("is not text in UTF-8")
	}
	return string(b)
}
