package images

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"database/sql"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	rpmdb "github.com/knqyf263/go-rpmdb/pkg"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	_ "modernc.org/sqlite" // the newer form of rpm's database

	"platter/hostprep/versions"
	"platter/provision"
)

// Degree is how much a finding about a foreign image weighs.
type Degree string

const (
	// Refused: a node would not boot it, or not be heard of again.
	Refused Degree = "refused"
	// Lacks: it boots, but something that Platter does will not work there.
	Lacks Degree = "lacks"
	// Changed: the import puts it right, in the image.
	Changed Degree = "changed"
)

// Finding is one thing about a foreign image that its owner has to know.
type Finding struct {
	Degree Degree `json:"degree"`
	What   string `json:"what"`
	Why    string `json:"why"`
	Next   string `json:"next,omitempty"` // what to do
}

// Foreign is what was found out about an image of somebody else.
type Foreign struct {
	File     string            `json:"file"`
	Kind     string            `json:"kind"`              // how it comes: qcow2, tar zstd, ...
	Name     string            `json:"name,omitempty"`    // what it is called in the store
	System   string            `json:"system,omitempty"`  // PRETTY_NAME of os-release(5)
	Version  string            `json:"version,omitempty"` // VERSION_ID
	Family   string            `json:"family,omitempty"`  // provision.FamilyDebian, FamilyRHEL, or the ID of another
	Arch     string            `json:"arch,omitempty"`
	Kernel   string            `json:"kernel,omitempty"` // release
	Packages map[string]string `json:"packages,omitempty"`
	Findings []Finding         `json:"findings"`

	initramfs string // path in the tree, of the kernel above
	extra     bool   // it has provision.ExtraEjabberd
}

// Of are the findings of one degree.
func (f Foreign) Of(d Degree) (out []Finding) {
	for _, x := range f.Findings {
		if x.Degree == d {
			out = append(out, x)
		}
	}
	return out
}

// Unfit is the error of an image that was refused.
type Unfit struct{ Foreign Foreign }

func (u *Unfit) Error() string {
	var lines []string
	for _, f := range u.Foreign.Of(Refused) {
		lines = append(lines, fmt.Sprintf("%s: %s. %s", f.What, f.Why, f.Next))
	}
	return fmt.Sprintf("%s is refused, the store is as it was:\n  %s", u.Foreign.File, strings.Join(lines, "\n  "))
}

// osRelease reads os-release(5).
func osRelease(text string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = strings.NewReplacer(`\"`, `"`, `\$`, `$`, `\\`, `\`, "\\`", "`").Replace(value[1 : n-1])
		}
		out[key] = value
	}
	return out
}

// families are the names that distributions give themselves, by their family.
var families = map[string][]string{
	provision.FamilyDebian: {"debian", "ubuntu", "deepin", "uos", "linuxmint"},
	provision.FamilyRHEL:   {"rhel", "centos", "rocky", "almalinux", "fedora", "ol", "anolis", "openeuler", "kylin", "opencloudos"},
}

// familyOf is the family of a system by its os-release. One that calls itself
// by no known name is what it says it is like; one that belongs to neither
// family is one of its own. Kylin's desktop, which is of Debian's family, has
// the name of its server: what installs its packages tells them apart.
func familyOf(release map[string]string, dpkg, rpm bool) string {
	for _, word := range strings.Fields(strings.ToLower(release["ID"] + " " + release["ID_LIKE"])) {
		for _, family := range []string{provision.FamilyDebian, provision.FamilyRHEL} {
			if !slices.Contains(families[family], word) {
				continue
			}
			if word == "kylin" && dpkg && !rpm {
				return provision.FamilyDebian
			}
			return family
		}
	}
	return strings.ToLower(release["ID"])
}

// nameOf is what an image is called where nobody says: rocky-9, ubuntu-24.04.
func nameOf(release map[string]string) string {
	clean := func(s string) string {
		return strings.Trim(strings.Map(func(r rune) rune {
			if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_' {
				return r
			}
			return '-'
		}, strings.ToLower(s)), "-._")
	}
	return strings.Trim(clean(release["ID"])+"-"+clean(release["VERSION_ID"]), "-")
}

// look finds out what the tree is and what it has.
type look struct {
	*jail
	Foreign
	scratch string // folder for copies
	release map[string]string
	stack   []provision.Component
	disk    bool // it comes from a disk, whose other partitions were not copied
	labels  int64
}

func (l *look) refuse(what, why, next string) { l.add(Refused, what, why, next) }
func (l *look) lacks(what, why, next string)  { l.add(Lacks, what, why, next) }
func (l *look) add(d Degree, what, why, next string) {
	l.Findings = append(l.Findings, Finding{d, what, why, next})
}

// all looks at everything: what is wrong is told at once.
func (l *look) all() {
	l.release = osRelease(l.text("etc/os-release"))
	l.System, l.Version = l.release["PRETTY_NAME"], l.release["VERSION_ID"]
	rpm := l.rpmFile() != ""
	l.Family = familyOf(l.release, l.has("var/lib/dpkg/status"), rpm)
	if l.release["ID"] == "" {
		l.refuse("os-release", "/etc/os-release is missing or names no ID: nobody knows what this system is", "Put the file of its distribution there (os-release(5)) and import it again")
	}
	if l.Name == "" {
		l.Name = nameOf(l.release)
	}
	l.readPackages()
	l.arch()
	l.init()
	l.kernel()
	l.mounts()
	l.network()
	l.host()
	l.service()
	l.security()
	slices.SortStableFunc(l.Findings, func(a, b Finding) int {
		order := []Degree{Refused, Lacks, Changed}
		return slices.Index(order, a.Degree) - slices.Index(order, b.Degree)
	})
}

// arch is told by the first program that can be read.
func (l *look) arch() {
	for _, name := range []string{"sbin/init", "usr/lib/systemd/systemd", "bin/sh", "usr/bin/env"} {
		f, err := l.open(name)
		if err != nil {
			continue
		}
		e, err := elf.NewFile(f)
		if err != nil {
			f.Close()
			continue
		}
		machine, class := e.Machine, e.Class
		f.Close()
		if machine == elf.EM_X86_64 && class == elf.ELFCLASS64 {
			l.Arch = "amd64"
			return
		}
		l.Arch = strings.ToLower(strings.TrimPrefix(machine.String(), "EM_"))
		l.refuse("architecture", fmt.Sprintf("/%s is a program for %s, nodes are amd64 (x86-64)", name, l.Arch), "Take the image for amd64 (x86_64) of the same system")
		return
	}
	l.refuse("architecture", "there is no program by which it could be told: /sbin/init, /bin/sh", "See that the archive holds the whole root file system")
}

func (l *look) install(debian, rhel string) string {
	if l.Family == provision.FamilyRHEL {
		return fmt.Sprintf("Install %s in it and import it again", rhel)
	}
	return fmt.Sprintf("Install %s in it and import it again", debian)
}

func (l *look) init() {
	const systemd = "usr/lib/systemd/systemd"
	target := l.readlink("sbin/init")
	switch {
	case !l.hasAny(systemd, "lib/systemd/systemd"):
		l.refuse("systemd", "it is not there; the installed system is started and kept by it", l.install("systemd-sysv", "systemd"))
	case !l.has("sbin/init"):
		l.refuse("/sbin/init", "the kernel starts it, and it is missing", l.install("systemd-sysv", "systemd"))
	case target != "" && path.Base(target) != "systemd":
		l.refuse("/sbin/init", fmt.Sprintf("it leads to %s, not to systemd", target), l.install("systemd-sysv", "systemd"))
	}
	for _, name := range []string{"etc/passwd", "etc/group"} {
		if !l.has(name) {
			l.refuse("/"+name, "the installer adds accounts to it, and it is missing", "See that the archive holds the whole root file system")
		}
	}
}

// kernel chooses the newest kernel that has its modules and an initramfs.
func (l *look) kernel() {
	const bootDir = "boot"
	rebuild := "Build it in the image, with drivers for every machine: 'update-initramfs -c -k all' with MODULES=most; then import it again"
	if l.Family == provision.FamilyRHEL {
		rebuild = "Build it in the image, with drivers for every machine: 'dracut --regenerate-all --no-hostonly --add-drivers ext4 --force'; then import it again"
	}
	var releases []string
	for _, file := range l.glob(bootDir, "vmlinuz-") {
		if r := strings.TrimPrefix(path.Base(file), "vmlinuz-"); !strings.Contains(r, "rescue") {
			releases = append(releases, r)
		}
	}
	slices.SortFunc(releases, func(a, b string) int { return versions.Order(b, a) })
	if len(releases) == 0 {
		l.refuse("kernel", "there is no /boot/vmlinuz-RELEASE", l.install("linux-image-amd64 (Ubuntu: linux-image-generic)", "kernel")+". Images of containers have none")
		l.refuse("initramfs", "there is no kernel that it could be for", rebuild)
		return
	}
	var reasons []Finding
	for _, r := range releases {
		var bad []Finding
		if !l.has("usr/lib/modules/"+r+"/modules.dep") && !l.has("lib/modules/"+r+"/modules.dep") {
			bad = append(bad, Finding{Refused, "modules of kernel " + r, "/usr/lib/modules/" + r + "/modules.dep is missing: no driver would load", "Install the kernel's package as a whole ('depmod " + r + "' where the modules are there), and import it again"})
		}
		initramfs := ""
		for _, name := range []string{"initrd.img-" + r, "initramfs-" + r + ".img", "initrd-" + r} {
			if l.has(path.Join(bootDir, name)) {
				initramfs = path.Join(bootDir, name)
				break
			}
		}
		if initramfs == "" {
			bad = append(bad, Finding{Refused, "initramfs of kernel " + r, fmt.Sprintf("neither /boot/initrd.img-%s nor /boot/initramfs-%s.img is there: the kernel would not find the root file system", r, r), rebuild})
		}
		if len(bad) == 0 {
			l.Kernel, l.initramfs = r, initramfs
			l.drivers(rebuild)
			return
		}
		if reasons == nil { // what the newest lacks is told
			reasons = bad
		}
	}
	l.Findings = append(l.Findings, reasons...)
}

// drivers looks into the initramfs for those that a root disk can hang on.
func (l *look) drivers(rebuild string) {
	f, err := l.open(l.initramfs)
	if err != nil {
		l.refuse("initramfs", err.Error(), rebuild)
		return
	}
	defer f.Close()
	have, files, err := initramfsModules(f)
	if err != nil {
		l.lacks("drivers in the initramfs", fmt.Sprintf("they are unknown: /%s cannot be looked into: %v", l.initramfs, err), "See that it has drivers for the disks of the nodes and for ext4, or build it anew")
		return
	}
	if files == 0 {
		l.refuse("initramfs", fmt.Sprintf("/%s holds no files", l.initramfs), rebuild)
		return
	}
	for _, dir := range []string{"usr/lib/modules/", "lib/modules/"} {
		for line := range strings.Lines(l.text(dir + l.Kernel + "/modules.builtin")) {
			have[moduleName(strings.TrimSpace(line))] = true
		}
	}
	if !have["ext4"] {
		l.refuse("initramfs", fmt.Sprintf("/%s has no driver for ext4, the file system that nodes have", l.initramfs), rebuild)
	}
	wanted, err := words(recipes, storageModules)
	if err != nil {
		panic(err) // it is embedded
	}
	var missing []string
	found := false
	for _, w := range wanted {
		name := strings.ReplaceAll(w, "-", "_")
		switch {
		case strings.HasPrefix(name, "raid") || name == "dm_mod" || name == "sr_mod": // no root disk of ours
		case !have[name]:
			missing = append(missing, w)
		case name != "sd_mod" && name != "virtio_pci" && name != "virtio_mmio": // those alone reach no disk
			found = true
		}
	}
	switch {
	case !found:
		l.refuse("initramfs", fmt.Sprintf("/%s has no driver for any disk: %s", l.initramfs, strings.Join(missing, ", ")), rebuild)
	case len(missing) > 0:
		l.lacks("drivers in the initramfs", fmt.Sprintf("a node whose disk needs one of these does not start: %s", strings.Join(missing, ", ")), rebuild)
	}
}

// mounts looks for folders of the system that were on file systems of their own
// and so are not in the copy of a disk.
func (l *look) mounts() {
	if !l.disk {
		return
	}
	table := fstab(l.text("etc/fstab"))
	var root string
	if i := slices.IndexFunc(table, func(f []string) bool { return f[1] == "/" }); i >= 0 {
		root = table[i][0]
	}
	for _, f := range table {
		dir := path.Clean(f[1])
		if slices.Contains([]string{"/", "/boot", "/boot/efi", "/efi"}, dir) || !(strings.HasPrefix(f[0], "/dev/") || strings.Contains(f[0], "=")) ||
			slices.Contains([]string{"iso9660", "udf", "swap", "tmpfs"}, f[2]) || slices.Contains(strings.Split(f[3], ","), "noauto") {
			continue
		}
		if f[2] == "btrfs" && f[0] == root { // a subvolume of the same file system
			l.lacks(dir, "it is a subvolume of its own in /etc/fstab: only what is below / was copied", "Where it is missing, pack the running system with tar and import that")
			continue
		}
		l.refuse(dir, fmt.Sprintf("it is a file system of its own (%s in /etc/fstab), which was not copied", f[0]), "Pack the running system with tar, that folder with it, and import the archive")
	}
}

// fstab are the lines of fstab(5) that mount something on a folder: what, where,
// its file system, and the options.
func fstab(text string) (table [][]string) {
	for line := range strings.Lines(text) {
		f := append(strings.Fields(line), "defaults")
		if len(f) > 3 && !strings.HasPrefix(f[0], "#") && strings.HasPrefix(f[1], "/") {
			table = append(table, f[:4])
		}
	}
	return table
}

// network: the installer configures systemd-networkd, or NetworkManager where
// that is what the image uses.
func (l *look) network() {
	networkd, manager := l.hasAny("usr/lib/systemd/systemd-networkd", "lib/systemd/systemd-networkd"), l.has("usr/sbin/NetworkManager")
	switch {
	case !networkd && !manager:
		l.refuse("network service", "neither systemd-networkd nor NetworkManager is there: the node would have no address and nobody would hear of it", l.install("systemd (or network-manager)", "NetworkManager"))
	case !l.usesNetworkd():
		l.lacks("systemd-networkd", "its network is NetworkManager's: the node gets its address, but a bridge over its management interface cannot be made", l.install("systemd and enable systemd-networkd", "systemd-networkd, where the distribution has it, and enable it"))
	}
}

const networkdWanted = "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"

// usesNetworkd tells whether systemd-networkd is what configures the network:
// it is enabled, or there is nothing else.
func (l *look) usesNetworkd() bool {
	return l.hasAny("usr/lib/systemd/systemd-networkd", "lib/systemd/systemd-networkd") &&
		(l.readlink(networkdWanted) != "" || !l.has("usr/sbin/NetworkManager"))
}

// host: what the preparation of a host wants.
func (l *look) host() {
	fails := ": the preparation of the host fails, the node does not become ready"
	for _, p := range []struct {
		what, why, debian, rhel string
		files                   []string
	}{
		{"OpenSSH server", "nobody can log in" + fails, "openssh-server", "openssh-server", []string{"usr/sbin/sshd"}},
		{"Open vSwitch", "there are no bridges for guests" + fails, "openvswitch-switch", "openvswitch", []string{"usr/sbin/ovs-vswitchd", "usr/lib/openvswitch-switch/ovs-vswitchd"}},
		{"libvirt", "no VM runs on it" + fails, "libvirt-daemon-system", "libvirt-daemon-driver-qemu", []string{"usr/sbin/libvirtd", "usr/sbin/virtqemud"}},
		{"QEMU", "libvirt has nothing to run VMs with", "qemu-system-x86", "qemu-kvm", []string{"usr/bin/qemu-system-x86_64", "usr/libexec/qemu-kvm", "usr/bin/qemu-kvm"}},
		{"sudo", "named accounts have no rights", "sudo", "sudo", []string{"usr/bin/sudo"}},
		{"bash", "it is the shell of the accounts of the rack file", "bash", "bash", []string{"bin/bash", "usr/bin/bash"}},
		{"e2fsck", "the root file system is never checked", "e2fsprogs", "e2fsprogs", []string{"usr/sbin/e2fsck", "sbin/e2fsck"}},
	} {
		if !l.hasAny(p.files...) {
			l.lacks(p.what, p.why, l.install(p.debian, p.rhel))
		}
	}
	if l.has("usr/sbin/sshd") && l.has("etc/ssh/sshd_config") && !strings.Contains(l.text("etc/ssh/sshd_config"), "sshd_config.d") {
		l.lacks("sshd_config.d", "/etc/ssh/sshd_config does not include it: log-in by password stays as the image has it", "Put 'Include /etc/ssh/sshd_config.d/*.conf' at its top and import it again")
	}
	if l.has("usr/sbin/update-grub") {
		l.lacks("boot entry after an update of the kernel", "the packages of GRUB would write a /boot/grub/grub.cfg of their own, without the arguments of this node", l.install("nothing of grub-pc, grub-efi-amd64 and grub2-common (remove them)", "nothing"))
	} else if l.Family == provision.FamilyRHEL {
		l.lacks("boot entry after an update of the kernel", "/vmlinuz and /initrd.img go on leading to the kernel that was imported", "After an update set both links by hand, or import an updated image")
	}
	if l.Kernel == "" {
		return
	}
	modules := map[string]bool{}
	for _, dir := range []string{"usr/lib/modules/", "lib/modules/"} {
		for _, list := range []string{"/modules.dep", "/modules.builtin"} {
			for line := range strings.Lines(l.text(dir + l.Kernel + list)) {
				file, _, _ := strings.Cut(strings.TrimSpace(line), ":")
				modules[moduleName(file)] = true
			}
		}
	}
	for _, m := range []struct{ name, why string }{{"openvswitch", "Open vSwitch has no data path"}, {"kvm", "VMs run without KVM, if at all"}} {
		if !modules[m.name] {
			l.lacks("kernel module "+m.name, m.why, l.install("the kernel's full package (Ubuntu: linux-modules-extra)", "kernel-modules-core and kernel-modules-extra"))
		}
	}
	bad, err := versions.KnownBad(versions.FromPackages(l.Packages))
	if err != nil {
		return // versions that nobody can compare
	}
	for _, b := range bad {
		l.lacks("versions that go together", b.String(), "Move it to other versions and import it again")
	}
}

// service: what the components of the stack want.
func (l *look) service() {
	l.extra = l.has(provision.ExtraEjabberd)
	var needPodman, foreign []string
	for _, c := range l.stack {
		if c.Kind != provision.KindPackages {
			needPodman = append(needPodman, c.Name)
			continue
		}
		if l.Family != provision.FamilyDebian {
			foreign = append(foreign, c.Name)
			continue
		}
		var missing []string
		for _, p := range c.Packages {
			if l.Packages[p.Name] == "" {
				missing = append(missing, p.Name)
			}
		}
		if len(missing) > 0 {
			what := "component " + c.Name
			if c.Optional {
				what += " (optional)"
			}
			l.lacks(what, "packages are missing: "+strings.Join(missing, ", "), l.install(strings.Join(missing, " "), ""))
		}
		const ours = " is missing, which 'platter image build' puts there"
		if c.Member == provision.MemberEjabberd && !l.extra {
			l.lacks("component "+c.Name, "/"+provision.ExtraEjabberd+ours, "Serve a stack without it for this image (platter stack export)")
		}
		page := slices.ContainsFunc(c.Files, func(f provision.StackFile) bool { return strings.HasPrefix(f.Path, "/"+webRoot) })
		if page && !l.has(webRoot+"/converse") {
			l.lacks("component "+c.Name, "/"+webRoot+"/converse"+ours+": the chat page stays empty", "Put that folder of an image that Platter built there and import it again")
		}
	}
	if len(foreign) > 0 {
		l.lacks("components "+strings.Join(foreign, ", "), fmt.Sprintf("they come as Debian packages, and this system is of the family %s: a rack with them and this image is refused", l.Family),
			"Serve a stack whose components are container images (platter stack export)")
	}
	if !l.has("usr/lib/systemd/system-generators/podman-system-generator") {
		why := "components of the kinds compose and kube cannot run"
		if l.has("usr/bin/podman") {
			why += ": it is older than 4.4, which knows quadlets"
		}
		if len(needPodman) > 0 {
			why += ", of this stack: " + strings.Join(needPodman, ", ")
		}
		l.lacks("podman", why, l.install("podman crun netavark aardvark-dns", "podman"))
	}
	if l.hasAny("etc/systemd/system/multi-user.target.wants/firewalld.service", "etc/systemd/system/multi-user.target.wants/ufw.service") && l.hasAny("usr/sbin/firewalld", "usr/sbin/ufw") {
		l.lacks("open ports", "a firewall (firewalld or ufw) starts with the system and does not know the ports of the service", "Open them there, or disable it, and import it again; 'platter stack show' lists the ports")
	}
}

func (l *look) security() {
	if l.labels > 0 || selinux(l.text("etc/selinux/config")) == "enforcing" {
		l.lacks("SELinux", "what the installer writes has no labels, so the import sets it to permissive; labels of files are not kept", "On a node 'touch /.autorelabel', set SELINUX=enforcing in /etc/selinux/config, and restart it twice")
	}
}

// selinux is what SELINUX= says in a configuration of SELinux, which reads no
// further than the word.
func selinux(config string) string {
	for line := range strings.Lines(config) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "SELINUX="); ok {
			word, _, _ := strings.Cut(strings.TrimSpace(v), " ")
			return strings.ToLower(word)
		}
	}
	return ""
}

// rpmFile is where the database of rpm lies, in any of its forms.
func (l *look) rpmFile() string {
	for _, dir := range []string{"usr/lib/sysimage/rpm/", "var/lib/rpm/"} {
		for _, name := range []string{"rpmdb.sqlite", "Packages.db", "Packages"} {
			if l.has(dir + name) {
				return dir + name
			}
		}
	}
	return ""
}

// readPackages lists what is installed, as dpkg or rpm has it.
func (l *look) readPackages() {
	l.Packages = map[string]string{}
	var err error
	switch {
	case l.has("var/lib/dpkg/status"):
		var b []byte
		if b, err = l.read("var/lib/dpkg/status"); err == nil {
			l.Packages = dpkgStatus(string(b))
		}
	case l.rpmFile() != "":
		l.Packages, err = l.rpmPackages(l.rpmFile())
	default:
		err = errors.New("there is no database of dpkg or rpm")
	}
	if err != nil {
		l.lacks("list of packages", fmt.Sprintf("it cannot be read: %v; the manifest of the image names no packages", err), "Import a tree whose package manager works")
	}
}

// dpkgStatus reads the packages that are installed and their versions.
func dpkgStatus(text string) map[string]string {
	out := map[string]string{}
	var name string
	var installed bool
	for line := range strings.Lines(text) {
		switch key, value, _ := strings.Cut(strings.TrimRight(line, "\n"), ": "); key {
		case "Package":
			name, installed = value, false
		case "Status":
			installed = strings.HasSuffix(value, " installed")
		case "Version":
			if installed {
				out[name] = value
			}
		}
	}
	return out
}

// rpmPackages reads a copy of the database: the reader may write beside it.
func (l *look) rpmPackages(file string) (map[string]string, error) {
	copyOf := filepath.Join(l.scratch, path.Base(file))
	for _, suffix := range []string{"", "-wal"} {
		if err := l.copyOut(file+suffix, copyOf+suffix); err != nil && (suffix == "" || !errors.Is(err, fs.ErrNotExist)) {
			return nil, err
		}
	}
	if path.Ext(file) == ".sqlite" { // the library takes no broken one
		db, err := sql.Open("sqlite", copyOf)
		if err != nil {
			return nil, err
		}
		var n int
		err = errors.Join(db.QueryRow("SELECT count(blob) FROM Packages").Scan(&n), db.Close())
		if err != nil {
			return nil, err
		}
	}
	db, err := rpmdb.Open(copyOf)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	list, err := db.ListPackages()
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, p := range list {
		out[p.Name] = p.Version + "-" + p.Release
	}
	return out, nil
}

// initramfsModules are the kernel modules in an initramfs, by their names, and
// the number of its entries. An initramfs is a row of cpio archives, some of
// them compressed (Linux, Documentation/driver-api/early-userspace/buffer-format).
func initramfsModules(r io.Reader) (modules map[string]bool, entries int, err error) {
	modules = map[string]bool{}
	b := bufio.NewReaderSize(r, 64<<10)
	for {
		head, err := b.Peek(6)
		if len(head) == 0 {
			return modules, entries, nil
		}
		if head[0] == 0 { // padding
			b.Discard(1)
			continue
		}
		if err != nil && len(head) < 6 {
			return modules, entries, nil
		}
		magic := string(head)
		var in io.Reader
		switch {
		case magic == "070701" || magic == "070702":
			if err := newcNames(b, modules, &entries); err != nil {
				return nil, 0, err
			}
			continue
		case strings.HasPrefix(magic, "\x1f\x8b"):
			in, err = gzip.NewReader(b)
		case strings.HasPrefix(magic, "\xfd7zXZ"):
			in, err = xz.NewReader(b)
		case strings.HasPrefix(magic, "\x28\xb5\x2f\xfd"):
			var z *zstd.Decoder
			if z, err = zstd.NewReader(b, zstd.WithDecoderMaxWindow(1<<30), zstd.WithDecoderConcurrency(1)); err == nil {
				defer z.Close()
				in = z
			}
		case strings.HasPrefix(magic, "\x02\x21\x4c\x18"), strings.HasPrefix(magic, "\x04\x22\x4d\x18"):
			in = lz4.NewReader(b)
		default:
			return nil, 0, fmt.Errorf("a part of it is packed in an unknown way (% x)", head)
		}
		if err != nil {
			return nil, 0, err
		}
		unpacked := bufio.NewReaderSize(in, 64<<10)
		if err := newcNames(unpacked, modules, &entries); err != nil {
			return nil, 0, err
		}
		return modules, entries, nil // what is packed comes last
	}
}

// newcNames reads one cpio archive, of the form newc, to its end.
func newcNames(b *bufio.Reader, modules map[string]bool, entries *int) error {
	header := make([]byte, 110)
	for {
		if _, err := io.ReadFull(b, header); err != nil {
			return fmt.Errorf("its list of files breaks off: %w", err)
		}
		if magic := string(header[:6]); magic != "070701" && magic != "070702" {
			return errors.New("its list of files is damaged")
		}
		size, err1 := strconv.ParseInt(string(header[54:62]), 16, 64)
		length, err2 := strconv.ParseInt(string(header[94:102]), 16, 64)
		if err := errors.Join(err1, err2); err != nil || length < 1 || length > 4096 {
			return errors.New("its list of files is damaged")
		}
		// The name begins after the header; it and the content end at multiples of 4.
		name := make([]byte, length+3-(110+length+3)%4)
		if _, err := io.ReadFull(b, name); err != nil {
			return fmt.Errorf("its list of files breaks off: %w", err)
		}
		file := string(bytes.TrimRight(name[:length], "\x00"))
		if file == "TRAILER!!!" {
			return nil
		}
		*entries++
		if strings.Contains(path.Base(file), ".ko") {
			modules[moduleName(file)] = true
		}
		size += (4 - size%4) % 4
		if _, err := io.CopyN(io.Discard, b, size); err != nil {
			return fmt.Errorf("its list of files breaks off: %w", err)
		}
	}
}
