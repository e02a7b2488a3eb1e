package images

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/provision"
)

// XFS, which the RHEL family has, is read where the kernel can, also with a
// journal that was never replayed; elsewhere that is said.
func TestForeignXFS(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := sparse(file, 320<<20); err != nil {
		t.Fatal(err)
	}
	proto := filepath.Join(t.TempDir(), "proto")
	if err := os.WriteFile(proto, []byte("/\n0 0\nd--755 0 0\netc d--755 0 0\nos-release ---644 5 6 /etc/os-release\n$\n$\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", "-p", proto, file)
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	_, tree, err := unpackTest(t, file)
	if !strings.Contains(string(known), "\txfs\n") && err != nil {
		wantError(t, err, "does not mount", "xfs", "tar")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(tree, "etc/os-release"), &st); err != nil || st.Uid != 5 || st.Gid != 6 {
		t.Errorf("%+v, %v", st, err)
	}
}

// A system of the RHEL family, with a database that rpm itself wrote.
func TestForeignRPM(t *testing.T) {
	root := foreignTree(t)
	at := func(name string) string { return filepath.Join(root, name) }
	spec := filepath.Join(t.TempDir(), "x.spec")
	if err := errors.Join(os.RemoveAll(at("var/lib/dpkg")), os.MkdirAll(at("etc/selinux"), 0o755),
		os.WriteFile(at("etc/selinux/config"), []byte("# SELINUX= can be enforcing\nSELINUX=enforcing # as it came\nSELINUXTYPE=targeted\n"), 0o644),
		os.Remove(at("usr/lib/systemd/systemd-networkd")), os.WriteFile(at("usr/sbin/NetworkManager"), nil, 0o755),
		os.Rename(at("boot/initrd.img-"+testKernel), at("boot/initramfs-"+testKernel+".img")),
		os.WriteFile(at("etc/os-release"), []byte("PRETTY_NAME=\"Rocky Linux 9.4 (Blue Onyx)\"\nID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\n"), 0o644),
		os.WriteFile(spec, []byte("Name: openssh-server\nVersion: 8.7p1\nRelease: 38.el9\nSummary: x\nLicense: x\nBuildArch: noarch\n%description\nx\n%files\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	top := t.TempDir()
	run(t, "rpmbuild", "--quiet", "-bb", "--define", "_topdir "+top, spec)
	db := t.TempDir()
	run(t, "rpm", "--dbpath", db, "--install", "--nodeps", "--justdb", filepath.Join(top, "RPMS/noarch/openssh-server-8.7p1-38.el9.noarch.rpm"))
	if err := os.MkdirAll(at("var/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "cp", "-r", db, at("var/lib/rpm"))
	l := lookAt(t, root, provision.Component{Name: "etcd", Kind: provision.KindPackages, Packages: []provision.Package{{Name: "etcd-server"}}})
	if l.Family != provision.FamilyRHEL || l.Packages["openssh-server"] != "8.7p1-38.el9" || len(l.Packages) != 1 || len(l.Of(Refused)) > 0 {
		t.Errorf("%+v", l.Foreign)
	}
	for _, c := range []struct{ what, why string }{{"components etcd", "Debian packages"}, {"SELinux", "permissive"}, {"systemd-networkd", "NetworkManager"}, {"boot entry", "/vmlinuz"}} {
		if !has(l, Lacks, c.what, c.why) {
			t.Errorf("not said: %v in %+v", c, l.Findings)
		}
	}
	if err := l.fit().apply(l.jail); err != nil {
		t.Fatal(err)
	}
	if got := l.text("etc/selinux/config"); got != "# SELINUX= can be enforcing\nSELINUX=permissive\nSELINUXTYPE=targeted\n" {
		t.Errorf("%s", got)
	}
	if got := l.readlink("initrd.img"); got != "boot/initramfs-"+testKernel+".img" || l.has(networkdWanted) {
		t.Errorf("initrd.img leads to %q", got)
	}
	// One with the file names of many packages is large; it is read all the same.
	if err := os.Truncate(at("var/lib/rpm/rpmdb.sqlite"), maxText+4096); err != nil {
		t.Fatal(err)
	}
	if l := lookAt(t, root); l.Packages["openssh-server"] == "" {
		t.Errorf("%+v", l.Findings)
	}
	// A database that is none costs the list and nothing else.
	for _, name := range []string{"rpmdb.sqlite", "rpmdb.sqlite-wal", "rpmdb.sqlite-shm"} {
		os.Remove(at("var/lib/rpm/" + name))
	}
	run(t, "dd", "if=/dev/zero", "of="+at("var/lib/rpm/rpmdb.sqlite"), "bs=1k", "count=8", "status=none")
	if err := os.WriteFile(at("var/lib/rpm/rpmdb.sqlite"), append([]byte("SQLite format 3\x00"), make([]byte, 8192)...), 0o644); err != nil {
		t.Fatal(err)
	}
	if l := lookAt(t, root); !has(l, Lacks, "list of packages", "") {
		t.Errorf("%+v", l.Findings)
	}
}
