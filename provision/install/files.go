package install

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"aead.dev/minisign"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/client"
)

// Files is what makes an image this node.
type Files struct {
	Plan       provision.Plan
	Identity   client.Identity
	RootUUID   string // PARTUUID of the root partition
	ESPUUID    string // PARTUUID of the EFI system partition
	Executable string // platter-node, copied onto the node
	// Keys are whom the node trusts from then on.
	Keys []minisign.PublicKey
}

// Kernelargs is the kernel command line of the installed system, for GRUB and
// for kexec alike.
func (f Files) Kernelargs() string {
	args := []string{"root=PARTUUID=" + f.RootUUID, "rootfstype=ext4", "ro", "quiet"}
	return strings.Join(append(args, f.Plan.Cmdline...), " ")
}

// Paths on the installed host.
const (
	PlanPath     = "/etc/platter/plan.json"
	IdentityPath = provision.IdentityPath
	AgentPath    = "/usr/lib/platter/platter-node"
	KeysPath     = "/etc/platter/keys" // folder, see ReadKeys; in the initramfs too
)

const agentUnit = `[Unit]
Description=Platter agent: prepares this host and keeps its service
After=network.target dbus.service
Wants=network.target
ConditionPathExists=` + PlanPath + `

[Service]
Type=notify
ExecStart=` + AgentPath + ` agent
Restart=on-failure
RestartSec=5
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
`

const sshdConfig = `# Written by Platter: people log in by key.
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UseDNS no
`

// Write writes everything into the root file system mounted at dir. It may be
// repeated: machine-id, host keys and accounts that are there stay. Each file
// is replaced as a whole, nothing outside dir is touched whatever links are in
// it, and on return all of it is on stable storage.
func (f Files) Write(dir string) error {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("files of %s: %w", f.Plan.Node, err)
	}
	defer r.Close()
	t := tree{r}
	identity, err := json.MarshalIndent(f.Identity, "", "  ")
	if err != nil {
		return fmt.Errorf("files of %s: %w", f.Plan.Node, err)
	}
	plan, err := json.MarshalIndent(f.Plan, "", "  ")
	if err != nil {
		return fmt.Errorf("files of %s: %w", f.Plan.Node, err)
	}
	steps := []error{
		t.write("etc/hostname", 0o644, f.Plan.Node+"\n"),
		t.write("etc/hosts", 0o644, f.hosts()),
		t.write("etc/systemd/network/10-platter.network", 0o644, f.network()),
		f.networkManager(t),
		t.write("etc/fstab", 0o644, f.fstab()),
		t.write("boot/grub/platter.cfg", 0o644, "# Written by the installer.\nset platter_args=\""+grubQuote(f.Kernelargs())+"\"\n"),
		t.write("etc/ssh/sshd_config.d/10-platter.conf", 0o644, sshdConfig),
		t.write(PlanPath[1:], 0o644, string(plan)+"\n"),
		t.write(IdentityPath[1:], 0o600, string(identity)+"\n"),
		t.write("etc/systemd/system/platter-agent.service", 0o644, agentUnit),
		t.link("../platter-agent.service", "etc/systemd/system/multi-user.target.wants/platter-agent.service"),
		t.copy(f.Executable, AgentPath[1:]),
		f.keys(t),
		f.resolvConf(t),
		machineID(t),
		hostKeys(t),
		f.accounts(t),
	}
	if err := errors.Join(steps...); err != nil {
		return fmt.Errorf("files of %s: %w", f.Plan.Node, err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("files of %s: %w", f.Plan.Node, err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("files of %s: flush: %w", f.Plan.Node, err)
	}
	return nil
}

func (f Files) hosts() string {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	for _, h := range f.Plan.Hosts {
		fmt.Fprintf(&b, "%s %s\n", h.Address, h.Name)
	}
	return b.String()
}

func (f Files) network() string {
	var b strings.Builder
	// Kind: a bridge or VLAN may carry the address of the card under it.
	fmt.Fprintf(&b, `# Written by Platter from the rack file.
[Match]
MACAddress=%s
Type=ether
Kind=!*

[Network]
Address=%s
`, f.Plan.Net.MAC, f.Plan.Net.Address)
	if f.Plan.Net.Gateway.IsValid() {
		fmt.Fprintf(&b, "Gateway=%s\n", f.Plan.Net.Gateway)
	}
	for _, a := range f.Plan.Net.DNS {
		fmt.Fprintf(&b, "DNS=%s\n", a)
	}
	b.WriteString("DHCP=no\nIPv6AcceptRA=no\nLinkLocalAddressing=no\nConfigureWithoutCarrier=yes\n")
	return b.String()
}

// networkManager configures the node's address for a system whose network is
// NetworkManager's (nm-settings-keyfile(5)): one that has it and does not
// start systemd-networkd.
func (f Files) networkManager(t tree) error {
	if _, err := t.Lstat("usr/sbin/NetworkManager"); err != nil {
		return nil
	}
	if _, err := t.Lstat("etc/systemd/system/multi-user.target.wants/systemd-networkd.service"); err == nil {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, `# Written by Platter from the rack file.
[connection]
id=platter
type=ethernet
autoconnect-priority=999

[ethernet]
mac-address=%s

[ipv4]
method=manual
address1=%s
`, f.Plan.Net.MAC, f.Plan.Net.Address)
	if f.Plan.Net.Gateway.IsValid() {
		fmt.Fprintf(&b, "gateway=%s\n", f.Plan.Net.Gateway)
	}
	if len(f.Plan.Net.DNS) > 0 {
		b.WriteString("dns=")
		for _, a := range f.Plan.Net.DNS {
			fmt.Fprintf(&b, "%s;", a)
		}
		b.WriteString("\n")
	}
	b.WriteString("\n[ipv6]\nmethod=disabled\n")
	// It takes no connection that others can read.
	return t.write("etc/NetworkManager/system-connections/platter.nmconnection", 0o600, b.String())
}

func (f Files) keys(t tree) error {
	for _, k := range f.Keys {
		text, err := k.MarshalText()
		if err != nil {
			return fmt.Errorf("trusted key %016x: %w", k.ID(), err)
		}
		if err := t.write(path.Join(KeysPath[1:], fmt.Sprintf("%016x.pub", k.ID())), 0o644, string(text)+"\n"); err != nil {
			return err
		}
	}
	return nil
}

func (f Files) resolvConf(t tree) error {
	if len(f.Plan.Net.DNS) == 0 {
		return nil
	}
	var b strings.Builder
	for _, a := range f.Plan.Net.DNS {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return t.write("etc/resolv.conf", 0o644, b.String())
}

func (f Files) fstab() string {
	s := "# Written by the installer.\nPARTUUID=" + f.RootUUID + " / ext4 noatime,errors=remount-ro 0 1\n"
	if f.ESPUUID != "" {
		// Nothing needs it while the system runs: mounting it would only cost time.
		s += "PARTUUID=" + f.ESPUUID + " /boot/efi vfat umask=0077,nofail,noauto 0 0\n"
	}
	return s
}

// grubQuote makes s safe between double quotes of GRUB's script language.
func grubQuote(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`).Replace(s)
}

// machineID gives the system its identity, once (machine-id(5)).
func machineID(t tree) error {
	if b, err := t.ReadFile("etc/machine-id"); err == nil {
		if id, err := hex.DecodeString(strings.TrimSpace(string(b))); err == nil && len(id) == 16 {
			return nil
		}
	}
	id := make([]byte, 16)
	rand.Read(id)
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return t.write("etc/machine-id", 0o444, hex.EncodeToString(id)+"\n")
}

// hostKeys makes the SSH host keys that are missing.
func hostKeys(t tree) error {
	makers := map[string]func() (any, error){
		"ed25519": func() (any, error) { _, k, err := ed25519.GenerateKey(rand.Reader); return k, err },
		"ecdsa":   func() (any, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
	}
	for kind, make := range makers {
		name := "etc/ssh/ssh_host_" + kind + "_key"
		if b, err := t.ReadFile(name); err == nil {
			if s, err := ssh.ParsePrivateKey(b); err == nil {
				if err := t.write(name+".pub", 0o644, string(ssh.MarshalAuthorizedKey(s.PublicKey()))); err != nil {
					return err
				}
				continue
			}
		}
		key, err := make()
		if err != nil {
			return fmt.Errorf("make the %s host key: %w", kind, err)
		}
		block, err := ssh.MarshalPrivateKey(key, "")
		if err != nil {
			return fmt.Errorf("make the %s host key: %w", kind, err)
		}
		signer, err := ssh.NewSignerFromKey(key)
		if err != nil {
			return fmt.Errorf("make the %s host key: %w", kind, err)
		}
		if err := errors.Join(t.write(name, 0o600, string(pem.EncodeToMemory(block))),
			t.write(name+".pub", 0o644, string(ssh.MarshalAuthorizedKey(signer.PublicKey())))); err != nil {
			return err
		}
	}
	return nil
}

// accounts gives the plan's users their keys and, but for root, an account
// with sudo. Nobody has a password.
func (f Files) accounts(t tree) error {
	sudoers := "# Written by Platter: accounts have keys and no passwords.\n"
	for _, u := range f.Plan.Users {
		home, uid := "root", 0
		if u.Name != "root" {
			var err error
			if home, uid, err = account(t, u.Name); err != nil {
				return fmt.Errorf("account %s: %w", u.Name, err)
			}
			sudoers += u.Name + " ALL=(ALL:ALL) NOPASSWD: ALL\n"
		}
		keys := path.Join(home, ".ssh/authorized_keys")
		if err := t.write(keys, 0o600, strings.Join(u.Keys, "\n")+"\n"); err != nil {
			return err
		}
		for _, p := range []string{path.Dir(keys), keys} {
			if err := t.Lchown(p, uid, uid); err != nil {
				return fmt.Errorf("account %s: %w", u.Name, err)
			}
		}
		if err := t.Chmod(path.Dir(keys), 0o700); err != nil {
			return fmt.Errorf("account %s: %w", u.Name, err)
		}
	}
	return t.write("etc/sudoers.d/platter", 0o440, sudoers)
}

// account finds or makes an account with a home folder. Its user and group
// have the same number.
func account(t tree, name string) (home string, uid int, err error) {
	passwd, err := t.ReadFile("etc/passwd")
	if err != nil {
		return "", 0, err
	}
	groups, err := t.ReadFile("etc/group")
	if err != nil {
		return "", 0, err
	}
	taken := map[int]bool{}
	for line := range strings.Lines(string(passwd) + string(groups)) {
		if p := strings.Split(strings.TrimSpace(line), ":"); len(p) > 3 {
			if n, err := strconv.Atoi(p[2]); err == nil {
				taken[n] = true
			}
			if len(p) == 7 && p[0] == name {
				uid, err := strconv.Atoi(p[2])
				home = strings.TrimPrefix(p[5], "/")
				return home, uid, errors.Join(err, t.home(home, uid))
			}
		}
	}
	for uid = 1000; taken[uid]; uid++ {
	}
	home = "home/" + name
	// passwd comes last: an account that is there is complete.
	return home, uid, errors.Join(
		t.home(home, uid),
		t.line("etc/group", 0o644, fmt.Sprintf("%s:x:%d:", name, uid)),
		t.line("etc/gshadow", 0o640, name+":!::"),
		t.line("etc/shadow", 0o640, name+":*:19700:0:99999:7:::"),
		t.line("etc/passwd", 0o644, fmt.Sprintf("%s:x:%d:%d::/%s:/bin/bash", name, uid, uid, home)),
	)
}

// tree writes below one folder and never outside it.
type tree struct{ *os.Root }

// replace writes a whole file and puts it into place in one step. A file that
// is replaced keeps its owner.
func (t tree) replace(name string, mode fs.FileMode, fill func(io.Writer) error) error {
	if err := t.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	tmp := name + ".platter-new"
	f, err := t.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	err = errors.Join(fill(f), f.Chmod(mode))
	if st, serr := t.Stat(name); serr == nil && err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(sys.Uid), int(sys.Gid))
		}
	}
	return errors.Join(err, f.Close(), t.Rename(tmp, name))
}

func (t tree) write(name string, mode fs.FileMode, content string) error {
	return t.replace(name, mode, func(w io.Writer) error { _, err := io.WriteString(w, content); return err })
}

func (t tree) copy(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	return t.replace(to, 0o755, func(w io.Writer) error { _, err := io.Copy(w, src); return err })
}

func (t tree) link(target, name string) error {
	if err := t.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if old, err := t.Readlink(name); err == nil && old == target {
		return nil
	}
	if err := t.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.Symlink(target, name)
}

// line adds a line to a file unless one with the same first field is there.
func (t tree) line(name string, mode fs.FileMode, line string) error {
	b, err := t.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, _, _ := strings.Cut(line, ":")
	for l := range bytes.Lines(b) {
		if bytes.HasPrefix(l, []byte(key+":")) {
			return nil
		}
	}
	if len(b) > 0 && b[len(b)-1] != '\n' {
		b = append(b, '\n')
	}
	if st, err := t.Stat(name); err == nil {
		mode = st.Mode().Perm()
	}
	return t.write(name, mode, string(b)+line+"\n")
}

// home makes a home folder with what every account starts from.
func (t tree) home(home string, uid int) error {
	if _, err := t.Stat(home); err == nil {
		return nil
	}
	if err := t.MkdirAll(home, 0o755); err != nil {
		return err
	}
	skel, err := fs.ReadDir(t.FS(), "etc/skel")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range skel {
		if !e.Type().IsRegular() {
			continue
		}
		b, err := t.ReadFile("etc/skel/" + e.Name())
		if err != nil {
			return err
		}
		to := path.Join(home, e.Name())
		if err := errors.Join(t.write(to, 0o644, string(b)), t.Lchown(to, uid, uid)); err != nil {
			return err
		}
	}
	return errors.Join(t.Chmod(home, 0o700), t.Lchown(home, uid, uid))
}
