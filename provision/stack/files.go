package stack

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/template"

	"github.com/google/renameio/v2"

	"platter/provision"
)

// Ports of a member.
const (
	ClientPort = 5222 // XMPP, STARTTLS required
	TLSPort    = 5223 // XMPP, TLS from the first byte
	WebPort    = 5443 // XMPP over WebSocket and users' files, TLS
	DistPort   = 5210 // Erlang distribution between members
)

const (
	spool       = "var/lib/ejabberd"
	secretsFile = "etc/platter/stack.json"
)

//go:embed ejabberd.yml.tmpl
var ejabberdYML string

// file is one file that the service needs.
type file struct {
	path     string // below the root
	mode     fs.FileMode
	uid, gid int
	text     string
}

// Prepare writes the configuration and secrets of the service below root: "/"
// on the running host, the mounted target during an install. What is already
// right is not touched; every file is replaced as a whole or not at all. It
// reports whether anything changed, in which case a running ejabberd has to be
// restarted.
func Prepare(root string, plan provision.Plan, sec provision.StackSecrets) error {
	_, err := prepare(root, plan, sec)
	return err
}

func prepare(root string, plan provision.Plan, sec provision.StackSecrets) (changed bool, err error) {
	if err := check(plan, sec); err != nil {
		return false, err
	}
	uid, gid, err := lookupUser(root, "ejabberd")
	if err != nil {
		return false, err
	}
	files, err := files(plan, sec, uid, gid)
	if err != nil {
		return false, err
	}
	for _, f := range files {
		wrote, err := put(root, f)
		if err != nil {
			return changed, fmt.Errorf("IM service of node %s: writing /%s: %w: look at the disk's free space and health", plan.Node, f.path, err)
		}
		changed = changed || wrote
	}
	if err := enable(root, "ejabberd.service"); err != nil {
		return changed, fmt.Errorf("IM service of node %s: enabling ejabberd.service: %w", plan.Node, err)
	}
	return changed, nil
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

// files lists everything Prepare writes.
func files(plan provision.Plan, sec provision.StackSecrets, uid, gid int) ([]file, error) {
	var yml bytes.Buffer
	t := template.Must(template.New("ejabberd.yml").Funcs(template.FuncMap{"quote": quote}).Parse(ejabberdYML))
	addr := plan.Net.Address.Addr()
	var probes []string
	for _, a := range sec.Probes {
		probes = append(probes, a.User)
	}
	err := t.Execute(&yml, map[string]any{
		"Domain": plan.Stack.Domain, "Address": addr, "Probes": probes,
		"ClientPort": ClientPort, "TLSPort": TLSPort, "WebPort": WebPort,
	})
	if err != nil {
		return nil, err
	}
	secrets, err := json.MarshalIndent(sec, "", "\t")
	if err != nil {
		return nil, err
	}
	return []file{
		{"etc/ejabberd/ejabberd.yml", 0o640, 0, gid, yml.String()},
		{"etc/ejabberd/platter.pem", 0o640, 0, gid, lines(sec.Cert) + lines(sec.Key)},
		{"etc/ejabberd/platter-ca.pem", 0o644, 0, 0, lines(sec.CA)},
		{"etc/ejabberd/vm.args", 0o644, 0, 0, vmArgs(addr)},
		{"etc/ejabberd/inetrc", 0o644, 0, 0, "%% Written by Platter. Members are found in /etc/hosts; no name server is asked.\n{file, hosts, \"/etc/hosts\"}.\n{lookup, [file]}.\n"},
		{"etc/default/ejabberd", 0o644, 0, 0, ctlConfig(plan.Node)},
		{spool + "/.erlang.cookie", 0o400, uid, gid, sec.Cookie},
		{"etc/systemd/system/ejabberd.service.d/platter.conf", 0o644, 0, 0, dropIn(addr)},
		{"etc/systemd/system/epmd.socket.d/platter.conf", 0o644, 0, 0, epmdDropIn},
		{secretsFile, 0o600, 0, 0, string(secrets) + "\n"},
	}, nil
}

// vmArgs are the arguments of every Erlang machine that ejabberdctl starts.
func vmArgs(addr netip.Addr) string {
	a := addr.As4()
	return fmt.Sprintf(`# Written by Platter.
# Members speak to each other on the node's own address only. INET_DIST_INTERFACE
# would say the same, but starts a second Erlang machine each time to parse it.
-kernel inet_dist_use_interface {%d,%d,%d,%d}
# IP_FREEBIND: start in parallel with the network, do not wait for the address.
# TCP_USER_TIMEOUT: what is sent to a member behind a dead link until that is
# noticed is lost. Unchanged, Erlang notices it after 45 to 75 s; so the kernel
# ends connections on which nothing is acknowledged for 6 s. The other machine's
# kernel acknowledges, so a busy Erlang there is not taken for a dead link.
-kernel inet_dist_listen_options [{raw,0,15,<<1:32/native>>},{raw,6,18,<<6000:32/native>>}]
-kernel inet_dist_connect_options [{raw,6,18,<<6000:32/native>>}]
# Something is sent at least every quarter of this (seconds): after 12 s a dead
# link is known. Members that have Erlang's default send every 15 s, which
# must not look like silence (three quarters of this).
-kernel net_ticktime 24
# The code path does not change while we run: list directories once.
-cache_boot_path true
# Idle schedulers sleep at once: the processor belongs to the VMs.
+sbwt none
+sbwtdcpu none
+sbwtdio none
-env ERL_CRASH_DUMP_BYTES 0
`, a[0], a[1], a[2], a[3])
}

// ctlConfig is a shell file that ejabberdctl reads.
func ctlConfig(node string) string {
	return fmt.Sprintf(`# Written by Platter. Arguments of the Erlang machine are in /etc/ejabberd/vm.args.
ERLANG_NODE=%s
ERL_DIST_PORT=%d
# Two to three ports a connection; the default of ejabberdctl ends near 10,000 users.
ERL_MAX_PORTS=131072
ERL_OPTIONS=
EJABBERD_PID_PATH=/run/ejabberd/ejabberd.pid
EJABBERD_CONFIG_PATH=/etc/ejabberd/ejabberd.yml
CONTRIB_MODULES_CONF_DIR=/etc/ejabberd/modules.d
# glibc asks for the time zone's file at every call unless it is named.
export TZ=:/etc/localtime
`, erlangNode(node), DistPort)
}

func dropIn(addr netip.Addr) string {
	return fmt.Sprintf(`# Written by Platter.
[Service]
LimitNOFILE=131072
# After a power cut a member may have to wait for the one that stopped last.
TimeoutStartSec=infinity
TimeoutStopSec=60
# Debian's way starts two Erlang machines to stop one.
ExecStop=
ExecStop=/bin/sh -c 'HOME=/%s exec /usr/bin/erl_call -r -address %s:%d -timeout 50 -a "init stop []"'
ExecStop=/bin/sh -c 'while kill -0 "$MAINPID" 2>/dev/null; do sleep 0.2; done'
`, spool, addr, DistPort)
}

// The distribution port is fixed, so the port mapper has nothing to tell
// anybody; Debian's unit of ejabberd requires it all the same.
const epmdDropIn = `# Written by Platter.
[Socket]
ListenStream=
ListenStream=127.0.0.1:4369
`

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
	return fmt.Errorf("IM service of node %s: %w: restart 'platter serve' and install the node again", plan.Node, errors.Join(errs...))
}

var (
	validName   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	validDomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)
	validCookie = regexp.MustCompile(`^[A-Za-z0-9]{16,255}$`)
)

// erlangNode is the Erlang name of the member on node.
func erlangNode(node string) string { return "ejabberd@" + node }

// quote makes a YAML scalar; JSON's strings are a subset of YAML's.
func quote(s string) (string, error) {
	b, err := json.Marshal(s)
	return string(b), err
}

func lines(pem string) string { return strings.TrimRight(pem, "\n") + "\n" }

// lookupUser finds a user and its group in the passwd file below root, which
// may be another system's.
func lookupUser(root, name string) (uid, gid int, err error) {
	b, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
	if err != nil {
		return 0, 0, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Split(line, ":")
		if len(f) < 4 || f[0] != name {
			continue
		}
		uid, err1 := strconv.Atoi(f[2])
		gid, err2 := strconv.Atoi(f[3])
		if err := errors.Join(err1, err2); err != nil {
			return 0, 0, fmt.Errorf("/etc/passwd: user %s: %w", name, err)
		}
		return uid, gid, nil
	}
	return 0, 0, fmt.Errorf("/etc/passwd has no user %s: build the image with the package ejabberd", name)
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

// enable makes unit start at boot below root.
func enable(root, unit string) error {
	dir := filepath.Join(root, "etc/systemd/system/multi-user.target.wants")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	err := os.Symlink("/usr/lib/systemd/system/"+unit, filepath.Join(dir, unit))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return errors.Join(err, syncDir(dir))
}
