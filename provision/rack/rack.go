package rack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"platter/hostprep/profile"
	"platter/provision"
	"platter/provision/yamlfile"
)

// Load reads the rack file at name. Its error is yamlfile.Problems where the
// content is wrong.
func Load(name string) (*provision.Rack, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("cannot read the rack file: %w", err)
	}
	return Parse(name, data)
}

var (
	nameForm   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	domainForm = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	deviceForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)
	imageForm  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	loginForm  = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,30}$`)
	// An argument becomes part of a kernel command line and of GRUB's
	// configuration: nothing that either would split or interpret.
	argForm = regexp.MustCompile(`^[A-Za-z0-9_.,:/=@+-]+$`)

	parseName   = yamlfile.Match(nameForm, "lower-case letters, digits and hyphens, at most 63, as in a host name")
	parseDomain = yamlfile.Match(domainForm, "a domain name in lower case, such as im.example.org")
	parseDevice = yamlfile.Match(deviceForm, "a network device name of at most 15 characters")
	parseImage  = yamlfile.Match(imageForm, "the name of an image in the store, such as debian-13")
	parseLogin  = yamlfile.Match(loginForm, "a login name: lower-case letters, digits, _ and -")
	parseArg    = yamlfile.Match(argForm, "one kernel argument without spaces or quotes")
)

// Parse reads a rack file's content; name serves messages and is the place
// that key-files are relative to.
func Parse(name string, data []byte) (*provision.Rack, error) {
	f := yamlfile.Parse(name, data)
	p := parser{dir: filepath.Dir(name), seen: map[string]int{}}
	r := p.rack(f.Root())
	if err := f.Err(); err != nil {
		return nil, err
	}
	return r, nil
}

// KeyFiles are the key-files that the rack file called name has, as it names them,
// each once.
func KeyFiles(name string) ([]string, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("the rack file cannot be read: %w", err)
	}
	f := yamlfile.Parse(name, data)
	p := parser{dir: filepath.Dir(name), seen: map[string]int{}}
	p.rack(f.Root())
	slices.Sort(p.files)
	return slices.Compact(p.files), f.Err()
}

type parser struct {
	files []string // with keys, as they are named
	dir   string
	seen  map[string]int // what must be unique -> line
}

// unique reports a value that an earlier line already has.
func (p *parser) unique(v yamlfile.Value, what, value string) {
	if value == "" || value == "invalid IP" {
		return
	}
	key := what + " " + value
	if line, dup := p.seen[key]; dup {
		v.Failf("%s is already used on line %d", key, line)
		return
	}
	p.seen[key] = v.Line()
}

func (p *parser) rack(v yamlfile.Value) *provision.Rack {
	top := v.Fields("rack", "image", "page", "networks", "users", "host", "stack", "defaults", "nodes")
	r := &provision.Rack{
		Name:  yamlfile.Get(top["rack"].Required(), parseName),
		Image: yamlfile.Get(top["image"].Required(), parseImage),
		Page:  yamlfile.Get(top["page"], parsePage),
	}
	for _, n := range top["networks"].Required().List() {
		r.Networks = append(r.Networks, p.network(n, r.Networks))
	}
	for _, u := range top["users"].List() {
		r.Users = append(r.Users, p.user(u))
	}
	host := top["host"].Fields("profile", "kernel", "hugepages", "isolate", "bridges", "guests")
	p.kernel(host, top["host"], &r.Host)
	r.Host.Bridges = p.bridges(host["bridges"])
	guests := host["guests"].Fields("parallel", "delay", "stop-within", "memory-percent")
	r.Host.Guests = provision.GuestSpec{
		Parallel:      yamlfile.Get(guests["parallel"], yamlfile.Int(1, 64)),
		Delay:         yamlfile.Get(guests["delay"], parseTime(0, 10*time.Minute)),
		StopWithin:    yamlfile.Get(guests["stop-within"], parseTime(5*time.Second, time.Hour)),
		MemoryPercent: yamlfile.Get(guests["memory-percent"], yamlfile.Int(10, 120)),
	}
	stack := top["stack"].Required().Fields("domain", "users", "undersized", "components")
	r.Stack = provision.StackSpec{Domain: yamlfile.Get(stack["domain"].Required(), parseDomain), Users: provision.DefaultUsers}
	if stack["users"].Exists() {
		r.Stack.Users = yamlfile.Get(stack["users"], yamlfile.Int(1, provision.MaxUsers))
	}

	r.Stack.Undersized = yamlfile.Get(stack["undersized"], yamlfile.Bool)
	r.Stack.Optional = p.names(stack["components"])

	defaults := provision.Node{Finish: provision.FinishKexec}
	d := top["defaults"].Fields("disk", "finish", "cmdline", "roles")
	p.common(d, &defaults)
	for _, n := range top["nodes"].Required().List() {
		r.Nodes = append(r.Nodes, p.node(n, defaults, r))
	}
	if top["nodes"].Exists() && len(r.Nodes) == 0 {
		top["nodes"].Failf("nodes has no node")
	}
	if top["networks"].Exists() && len(r.Networks) == 0 {
		top["networks"].Failf("networks has no network")
	}
	return r
}

// kernel resolves the settings of every host.
func (p *parser) kernel(m map[string]yamlfile.Value, host yamlfile.Value, spec *provision.HostSpec) {
	wish := profile.Wish{Profile: profile.Default}
	if m["profile"].Exists() {
		if wish.Profile = yamlfile.Get(m["profile"], profile.Name); wish.Profile == "" {
			wish.Profile = profile.Default // to find what else is wrong
		}
	}
	var kinds []string
	for _, k := range profile.Kinds() {
		kinds = append(kinds, string(k))
	}
	kernel := m["kernel"].Fields(kinds...)
	for _, kind := range profile.Kinds() {
		for _, line := range kernel[string(kind)].Pairs() {
			key := yamlfile.Get(line.Key, profile.Key(kind))
			if key == "" {
				continue
			}
			if value := yamlfile.Get(line.Value.Required(), profile.Value(kind, key)); value != "" {
				wish.Overrides = append(wish.Overrides, provision.Setting{Kind: kind, Key: key, Value: value})
			}
		}
	}
	if m["hugepages"].Exists() {
		h := m["hugepages"].Fields("size", "count")
		wish.Hugepages.Size = yamlfile.Get(h["size"].Required(), profile.PageSize)
		wish.Hugepages.Count = yamlfile.Get(h["count"].Required(), profile.PageCount(wish.Hugepages.Size))
		if wish.Hugepages.Size == "" || wish.Hugepages.Count == 0 {
			wish.Hugepages = profile.Hugepages{} // said already
		}
	}
	wish.Isolate = yamlfile.Get(m["isolate"], profile.CPUs)
	settings, errs := profile.Resolve(wish)
	for _, err := range errs {
		host.Failf("%v", err)
	}
	spec.Profile, spec.Settings = wish.Profile, settings
}

func (p *parser) network(v yamlfile.Value, others []provision.Network) provision.Network {
	m := v.Fields("interface", "subnet", "disc-host", "gateway", "dns", "pool", "lease")
	n := provision.Network{
		Interface: yamlfile.Get(m["interface"].Required(), parseDevice),
		Subnet:    yamlfile.Get(m["subnet"].Required(), parsePrefix),
		DiscHost:  yamlfile.Get(m["disc-host"].Required(), parseAddr),
		Gateway:   yamlfile.Get(m["gateway"], parseAddr),
		Lease:     10 * time.Minute,
	}
	p.unique(m["interface"], "interface", n.Interface)
	for _, o := range others {
		if o.Subnet.IsValid() && n.Subnet.IsValid() && o.Subnet.Overlaps(n.Subnet) {
			m["subnet"].Failf("subnet %s overlaps %s of interface %s", n.Subnet, o.Subnet, o.Interface)
		}
	}
	inside := func(v yamlfile.Value, what string, a netip.Addr) {
		if a.IsValid() && n.Subnet.IsValid() && !usable(n.Subnet, a) {
			v.Failf("%s %s is not a host address of %s", what, a, n.Subnet)
		}
	}
	inside(m["disc-host"], "disc-host", n.DiscHost)
	p.unique(m["disc-host"], "address", n.DiscHost.String())
	inside(m["gateway"], "gateway", n.Gateway)
	for _, d := range m["dns"].List() {
		n.DNS = append(n.DNS, yamlfile.Get(d, parseAddr))
	}
	if pool := yamlfile.Get(m["pool"].Required(), parseRange); pool[0].IsValid() {
		n.PoolFirst, n.PoolLast = pool[0], pool[1]
		inside(m["pool"], "pool start", pool[0])
		inside(m["pool"], "pool end", pool[1])
		for what, a := range map[string]netip.Addr{"disc-host": n.DiscHost, "gateway": n.Gateway} {
			if inPool(n, a) {
				m["pool"].Failf("the pool contains %s %s", what, a)
			}
		}
	}
	if m["lease"].Exists() {
		n.Lease = yamlfile.Get(m["lease"], parseTime(time.Minute, 7*24*time.Hour))
	}
	return n
}

func (p *parser) user(v yamlfile.Value) provision.User {
	m := v.Fields("name", "keys", "key-files")
	u := provision.User{Name: yamlfile.Get(m["name"].Required(), parseLogin)}
	p.unique(m["name"], "user", u.Name)
	for _, k := range m["keys"].List() {
		if key := yamlfile.Get(k, parseKey); key != "" {
			u.Keys = append(u.Keys, key)
		}
	}
	for _, f := range m["key-files"].List() {
		u.Keys = append(u.Keys, yamlfile.Get(f, p.keyFile)...)
	}
	if !m["keys"].Exists() && !m["key-files"].Exists() {
		v.Failf("user %s has neither keys nor key-files: nobody could log in", u.Name)
	}
	return u
}

func (p *parser) keyFile(name string) ([]string, error) {
	p.files = append(p.files, name)
	if !filepath.IsAbs(name) {
		name = filepath.Join(p.dir, name)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	var keys []string
	for i, line := range strings.Split(string(data), "\n") {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		k, err := parseKey(line)
		if err != nil {
			return nil, fmt.Errorf("line %d %w", i+1, err)
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, errors.New("holds no key")
	}
	return keys, nil
}

// common reads what a node and the defaults share.
func (p *parser) common(m map[string]yamlfile.Value, n *provision.Node) {
	if m["disk"].Exists() {
		n.Disk = p.disk(m["disk"])
	}
	if m["finish"].Exists() {
		n.Finish = yamlfile.Get(m["finish"], parseFinish)
	}
	if m["cmdline"].Exists() {
		n.Cmdline = nil
		for _, a := range m["cmdline"].List() {
			n.Cmdline = append(n.Cmdline, yamlfile.Get(a, parseArg))
		}
	}
	if m["roles"].Exists() {
		n.Roles = p.names(m["roles"])
	}
}

// names reads a list of names, each only once.
func (p *parser) names(v yamlfile.Value) []string {
	var out []string
	for _, item := range v.List() {
		name := yamlfile.Get(item, parseName)
		if name != "" && slices.Contains(out, name) {
			item.Failf("%s is listed twice", name)
		}
		out = append(out, name)
	}
	return out
}

func (p *parser) disk(v yamlfile.Value) provision.DiskRule {
	m := v.Fields("serial", "wwn", "path", "model", "min", "max", "wipe")
	d := provision.DiskRule{
		Serial:  yamlfile.Get(m["serial"], yamlfile.Text),
		WWN:     yamlfile.Get(m["wwn"], yamlfile.Text),
		Path:    yamlfile.Get(m["path"], parseGlob),
		Model:   yamlfile.Get(m["model"], parseGlob),
		MinSize: yamlfile.Get(m["min"], yamlfile.Size),
		MaxSize: yamlfile.Get(m["max"], yamlfile.Size),
		Wipe:    yamlfile.Get(m["wipe"], yamlfile.Bool),
	}
	if d.MaxSize > 0 && d.MinSize > d.MaxSize {
		m["min"].Failf("min is larger than max: no disk can match")
	}
	return d
}

func (p *parser) node(v yamlfile.Value, defaults provision.Node, r *provision.Rack) provision.Node {
	m := v.Fields("name", "slot", "mac", "address", "disk", "finish", "cmdline", "roles")
	n := defaults
	n.Name = yamlfile.Get(m["name"].Required(), parseName)
	n.Slot = yamlfile.Get(m["slot"], yamlfile.Text)
	n.MAC = yamlfile.Get(m["mac"], ParseMAC)
	n.Address = yamlfile.Get(m["address"].Required(), parseAddr)
	p.common(m, &n)
	p.unique(m["name"], "node", n.Name)
	p.unique(m["slot"], "slot", n.Slot)
	p.unique(m["mac"], "mac", string(n.MAC))
	p.unique(m["address"], "address", n.Address.String())
	if n.Address.IsValid() && len(r.Networks) > 0 {
		nw, ok := r.NetworkOf(n.Address)
		switch {
		case !ok:
			m["address"].Failf("address %s is in none of the networks", n.Address)
		case !usable(nw.Subnet, n.Address):
			m["address"].Failf("address %s is not a host address of %s", n.Address, nw.Subnet)
		case n.Address == nw.Gateway:
			m["address"].Failf("address %s is the gateway's", n.Address)
		case inPool(nw, n.Address):
			m["address"].Failf("address %s is in the pool for unknown machines, %s-%s", n.Address, nw.PoolFirst, nw.PoolLast)
		}
	}
	return n
}

// usable tells whether a is an address that a host may have in p.
func usable(p netip.Prefix, a netip.Addr) bool {
	p = p.Masked()
	if !p.Contains(a) || a == p.Addr() {
		return false
	}
	broadcast := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		broadcast[i/8] |= 1 << (7 - i%8)
	}
	return a != netip.AddrFrom4(broadcast)
}

func inPool(n provision.Network, a netip.Addr) bool {
	return a.IsValid() && n.PoolFirst.IsValid() && a.Compare(n.PoolFirst) >= 0 && a.Compare(n.PoolLast) <= 0
}

// ParseMAC reads an Ethernet address with colons or hyphens in any case.
func ParseMAC(s string) (provision.MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 || strings.Contains(s, ".") {
		return "", errors.New("must be an Ethernet address such as 52:54:00:12:34:56")
	}
	if hw[0]&1 == 1 {
		return "", errors.New("is a multicast address, no machine has it")
	}
	return provision.MAC(hw.String()), nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is4() {
		return netip.Addr{}, errors.New("must be an IPv4 address such as 10.0.0.1")
	}
	return a, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 30 {
		return netip.Prefix{}, errors.New("must be an IPv4 network such as 10.0.0.0/24, from /8 to /30")
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("has host bits set, meant is %s", p.Masked())
	}
	return p, nil
}

func parseRange(s string) ([2]netip.Addr, error) {
	first, last, ok := strings.Cut(s, "-")
	a, err1 := parseAddr(strings.TrimSpace(first))
	b, err2 := parseAddr(strings.TrimSpace(last))
	if !ok || err1 != nil || err2 != nil || b.Less(a) {
		return [2]netip.Addr{}, errors.New("must be FIRST-LAST, such as 10.0.0.200-10.0.0.250")
	}
	return [2]netip.Addr{a, b}, nil
}

// parseTime takes a time from lo to hi, such as 90s or 10m.
func parseTime(lo, hi time.Duration) func(string) (time.Duration, error) {
	words := strings.NewReplacer("h0m0s", "h", "m0s", "m")
	return func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		if err != nil || d < lo || d > hi {
			return 0, fmt.Errorf("must be a time from %s to %s", words.Replace(lo.String()), words.Replace(hi.String()))
		}
		return d, nil
	}
}

func parsePage(s string) (string, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return "", errors.New("must be ADDRESS:PORT, such as 127.0.0.1:8080")
	}
	return ap.String(), nil
}

func parseFinish(s string) (provision.Finish, error) {
	switch f := provision.Finish(s); f {
	case provision.FinishKexec, provision.FinishReboot:
		return f, nil
	}
	return "", errors.New("must be kexec or reboot")
}

func parseGlob(s string) (string, error) {
	if _, err := path.Match(s, ""); err != nil || s == "" {
		return "", errors.New("must be a name, in which * and ? may stand for anything")
	}
	return s, nil
}

func parseKey(s string) (string, error) {
	s = strings.TrimSpace(s)
	_, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(s))
	if err != nil || len(rest) > 0 || strings.ContainsAny(s, "\r\n") {
		return "", errors.New("must be one public key line, as in authorized_keys")
	}
	return s, nil
}
