package stack

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"

	"platter/provision"
)

// Ports of ejabberd.
const (
	ClientPort = 5222 // XMPP, STARTTLS required
	DistPort   = 5210 // Erlang distribution between members
)

const (
	spool       = "var/lib/ejabberd"
	secretsFile = "etc/platter/stack.json"
)

// file is one file that the service needs.
type file struct {
	component string // whose it is; empty: of all
	path      string // below the root
	mode      fs.FileMode
	uid, gid  int
	text      string
	reload    bool // a change needs no restart
}

// Prepare writes the configuration and secrets of the node's components below
// root: "/" on the running host, the mounted target during an install. What is
// already right is not touched; every file is replaced as a whole or not at
// all.
func Prepare(root string, plan provision.Plan, sec provision.StackSecrets) error {
	_, err := prepare(root, plan, sec)
	return err
}

// prepare also tells of which components files have changed that their units
// have to be restarted for.
func prepare(root string, plan provision.Plan, sec provision.StackSecrets) (changed map[string]bool, err error) {
	changed = map[string]bool{}
	if err := check(plan, sec); err != nil {
		return nil, err
	}
	files, err := files(root, plan, sec)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		wrote, err := put(root, f)
		if err != nil {
			return changed, fmt.Errorf("service of node %s: writing /%s: %w: look at the disk's free space and health", plan.Node, f.path, err)
		}
		if wrote && !f.reload {
			changed[f.component] = true
		}
	}
	if err := dropContainers(root, files); err != nil {
		return changed, fmt.Errorf("service of node %s: %w", plan.Node, err)
	}
	for _, c := range here(plan) {
		if contained(c) { // the generator enables its services
			if err := makeData(root, c); err != nil {
				return changed, fmt.Errorf("service of node %s: component %s: %w: look at the disk's free space and health", plan.Node, c.Name, err)
			}
			continue
		}
		for _, u := range c.Units {
			if err := enable(root, u); err != nil {
				return changed, fmt.Errorf("service of node %s: enabling %s: %w", plan.Node, u, err)
			}
		}
	}
	return changed, nil
}

// here are the components of the plan's node.
func here(plan provision.Plan) []provision.PlacedComponent {
	var out []provision.PlacedComponent
	for _, c := range plan.Stack.Components {
		if slices.Contains(c.Members, plan.Node) {
			out = append(out, c)
		}
	}
	return out
}

// Secrets reads what Prepare laid down below root; the error is
// fs.ErrNotExist where it never ran.
func Secrets(root string) (provision.StackSecrets, error) {
	var sec provision.StackSecrets
	b, err := os.ReadFile(filepath.Join(root, secretsFile))
	if err != nil {
		return sec, err
	}
	if err := json.Unmarshal(b, &sec); err != nil {
		return sec, fmt.Errorf("/%s: %w: remove it, the agent fetches it anew", secretsFile, err)
	}
	return sec, nil
}

// files lists everything Prepare writes, all mistakes at once.
func files(root string, plan provision.Plan, sec provision.StackSecrets) ([]file, error) {
	secrets, err := json.MarshalIndent(sec, "", "\t")
	if err != nil {
		return nil, err
	}
	out := []file{
		{path: secretsFile, mode: 0o600, text: string(secrets) + "\n"},
		// The next boot reads it.
		{path: "etc/tmpfiles.d/platter-containers.conf", mode: 0o644, reload: true, text: podmanSecrets},
	}
	view := provision.ViewOf(plan, sec)
	var wrong []error
	for _, c := range here(plan) {
		for _, f := range c.Files {
			text, err := view.Render(f.Path, f.Template)
			uid, err1 := idOf(root, "passwd", f.Owner)
			gid, err2 := idOf(root, "group", f.Group)
			if err := errors.Join(err, err1, err2); err != nil {
				wrong = append(wrong, fmt.Errorf("component %s: %s: %w", c.Name, f.Path, err))
				continue
			}
			out = append(out, file{c.Name, strings.TrimPrefix(f.Path, "/"), fs.FileMode(f.Mode), uid, gid, text, f.Reload})
		}
		if contained(c) {
			units, err := containerFiles(view, c)
			if err != nil {
				wrong = append(wrong, fmt.Errorf("component %s: %w", c.Name, err))
			}
			out = append(out, units...)
		}
		for _, u := range c.Units {
			out = append(out, file{component: c.Name, path: "etc/systemd/system/" + u + ".d/platter-order.conf", mode: 0o644, text: order(plan, c, u)})
		}
	}
	if len(wrong) > 0 {
		return nil, fmt.Errorf("service of node %s: %w", plan.Node, errors.Join(wrong...))
	}
	return out, nil
}

// check refuses what would only fail on the node, all of it at once.
func check(plan provision.Plan, sec provision.StackSecrets) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !validDomain.MatchString(plan.Stack.Domain) {
		bad("the XMPP domain %q is not a DNS name in lower case", plan.Stack.Domain)
	}
	if !validName.MatchString(plan.Node) {
		bad("the node name %q is not of [a-z0-9-]", plan.Node)
	}
	if !plan.Net.Address.Addr().Is4() {
		bad("the node's address %s is not IPv4", plan.Net.Address)
	}
	if !validCookie.MatchString(sec.Cookie) {
		bad("the cluster cookie is not 16 to 255 letters and digits")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(sec.CA)) {
		bad("the CA is not a certificate in PEM form")
	} else if pair, err := tls.X509KeyPair([]byte(sec.Cert), []byte(sec.Key)); err != nil {
		bad("certificate and key: %w", err)
	} else {
		inter := x509.NewCertPool()
		for _, der := range pair.Certificate[1:] {
			if c, err := x509.ParseCertificate(der); err == nil {
				inter.AddCert(c)
			}
		}
		// Validity is not judged by this machine's clock, which may be wrong
		// at its first boot.
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter,
			DNSName: plan.Stack.Domain, CurrentTime: pair.Leaf.NotBefore})
		if err != nil {
			bad("the certificate does not serve %s: %w", plan.Stack.Domain, err)
		}
	}
	if len(sec.Probes) == 0 {
		bad("there are no probe accounts")
	}
	for _, a := range sec.Probes {
		if !validName.MatchString(a.User) || a.Password == "" {
			bad("the probe account %q has no valid name or no password", a.User)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("service of node %s: %w: restart 'platter serve' and install the node again", plan.Node, errors.Join(errs...))
}

var (
	validName   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	validDomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)
	validCookie = regexp.MustCompile(`^[A-Za-z0-9]{16,255}$`)
)

// erlangNode is the Erlang name of the member on node.
func erlangNode(node string) string { return "ejabberd@" + node }

// idOf finds the number of a user or group in the file passwd or group below
// root, which may be another system's. An empty name is root.
func idOf(root, file, name string) (int, error) {
	if name == "" {
		return 0, nil
	}
	b, err := os.ReadFile(filepath.Join(root, "etc", file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) < 3 || f[0] != name {
			continue
		}
		id, err := strconv.Atoi(f[2])
		if err != nil {
			return 0, fmt.Errorf("/etc/%s: %s: %w", file, name, err)
		}
		return id, nil
	}
	return 0, fmt.Errorf("/etc/%s has no %s: build the image with the package that makes it", file, name)
}

// put makes the file below root what f says and tells whether it was not yet.
func put(root string, f file) (wrote bool, err error) {
	path := filepath.Join(root, f.path)
	if st, err := os.Lstat(path); err == nil && st.Mode() == f.mode {
		sys, _ := st.Sys().(*syscall.Stat_t)
		b, err := os.ReadFile(path)
		if err == nil && string(b) == f.text && sys != nil && int(sys.Uid) == f.uid && int(sys.Gid) == f.gid {
			return false, nil
		}
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	tmp, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(f.mode))
	if err != nil {
		return false, err
	}
	defer tmp.Cleanup()
	if err := tmp.Chown(f.uid, f.gid); err != nil {
		return false, err
	}
	if _, err := tmp.WriteString(f.text); err != nil {
		return false, err
	}
	if err := tmp.CloseAtomicallyReplace(); err != nil {
		return false, err
	}
	return true, syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// wants is the link below root that makes unit start at boot.
func wants(root, unit string) string {
	target := "multi-user.target"
	if strings.HasSuffix(unit, ".socket") {
		target = "sockets.target"
	}
	return filepath.Join(root, "etc/systemd/system", target+".wants", unit)
}

// enable makes unit start at boot below root.
func enable(root, unit string) error {
	link := wants(root, unit)
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	err := os.Symlink("/usr/lib/systemd/system/"+unit, link)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return errors.Join(err, syncDir(filepath.Dir(link)))
}

// disable takes back what enable did.
func disable(root, unit string) error {
	link := wants(root, unit)
	err := os.Remove(link)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(err, syncDir(filepath.Dir(link)))
}

// groupOf is the number of the user's own group in the file passwd below root.
func groupOf(root, user string) (int, error) {
	b, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(line, ":"); len(f) > 3 && f[0] == user {
			return strconv.Atoi(f[3])
		}
	}
	return 0, fmt.Errorf("/etc/passwd has no %s", user)
}
