package hostprep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"platter/hostprep/ovs"
	"platter/hostprep/ovs/ovstest"
	"platter/hostprep/virt"
	"platter/provision"
)

// startLibvirt starts a libvirtd at its usual places, in namespaces of
// ovstest.Alone.
func startLibvirt(t *testing.T) *libvirt.Libvirt {
	t.Helper()
	for _, dir := range []string{"/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("/etc/libvirt/libvirtd.conf", "auth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0700\"\nlog_outputs = \"3:stderr\"\nhost_uuid = \"5c6e7b1e-7a1e-4f2e-8f0a-2f8f4a1b0001\"\n")
	write("/etc/libvirt/qemu.conf", "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\nstdio_handler = \"file\"\n")
	// Debian's asks for an account that only another package makes.
	for path, line := range map[string]string{"/etc/passwd": "libvirt-qemu:x:65534:65534::/:/bin/false\n", "/etc/group": "libvirt-qemu:x:65534:\nkvm:x:65533:\n"} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write("/run/accounts", string(b)+line)
		if err := os.Rename("/run/accounts", "/run/"+filepath.Base(path)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("/run/"+filepath.Base(path), path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	// libvirt tries it out, which takes a minute where it is there but hangs.
	if _, err := os.Stat("/dev/kvm"); err == nil {
		if err := unix.Mount("/dev/null", "/dev/kvm", "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	log, err := os.Create("/run/libvirtd.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	// And every emulator that it finds.
	if err := os.Mkdir("/run/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tool := range []string{"qemu-system-x86_64", "ovs-vsctl"} {
		path, err := exec.LookPath(tool)
		if err == nil {
			err = os.Symlink(path, "/run/bin/"+tool)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("libvirtd")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = []string{"PATH=/run/bin", "HOME=/run", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/no-dbus"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if b, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("libvirtd: %s", b)
		}
	})
	l := libvirt.NewWithDialer(dialers.NewLocal(dialers.WithSocket(virt.Sockets[0])))
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if err := l.ConnectToURI(libvirt.QEMUSystem); err == nil {
			return l
		} else if time.Now().After(deadline) {
			t.Fatalf("libvirtd: %v", err)
		}
	}
}

// machine defines a domain without a disk, whose network card looks for a
// server to boot from: it does not know the power button.
func machine(t *testing.T, l *libvirt.Libvirt, name, memory, bridge, vlan string, autostart bool) libvirt.Domain {
	t.Helper()
	d, err := l.DomainDefineXML(fmt.Sprintf(`<domain type='qemu'><name>%s</name><memory unit='MiB'>%s</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='network'/></os><features><acpi/></features>
<devices><interface type='bridge'><source bridge='%s'/>%s<virtualport type='openvswitch'/><model type='virtio'/></interface>
<memballoon model='none'/></devices></domain>`, name, memory, bridge, vlan))
	if err != nil {
		t.Fatalf("VM %s: %v", name, err)
	}
	if autostart {
		if err := l.DomainSetAutostart(d, 1); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// TestGuests has a real libvirt, QEMU and Open vSwitch.
func TestGuests(t *testing.T) {
	for _, tool := range []string{"libvirtd", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing", tool)
		}
	}
	if !ovstest.Alone(t) {
		return
	}
	daemons := ovstest.Start(t)
	l := startLibvirt(t)
	ctx := t.Context()
	sw, err := ovs.Dial(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	// stale is a row whose device a power cut took.
	stale := func(name, vm string, v ovs.VLAN) ovs.Port {
		return ovs.Port{Name: name, VLAN: v, Interfaces: []ovs.Interface{{Name: name, ExternalIDs: map[string]string{"vm-id": vm}}}}
	}
	apply := func(changes ...ovs.Change) {
		t.Helper()
		if err := sw.Apply(ctx, changes...); err != nil {
			t.Fatal(err)
		}
	}
	apply(ovs.AddBridge(ovs.Bridge{Name: "br0", Datapath: "netdev"}), ovs.AddBridge(ovs.Bridge{Name: "br1", Datapath: "netdev"}))
	a := machine(t, l, "mail", "64", "br0", "<vlan><tag id='10'/></vlan>", true)
	machine(t, l, "web", "64", "br1", "<vlan><tag id='20'/><tag id='30' nativeMode='untagged'/></vlan>", true)
	machine(t, l, "spare", "64", "br0", "", false)
	machine(t, l, "lost", "64", "br9", "", true)
	machine(t, l, "huge", "99999999", "br0", "", true)
	apply(ovs.AddPort("br1", stale("vnet0", uuid.UUID(a.UUID).String(), ovs.VLAN{Tag: new(77)})),
		ovs.AddPort("br0", stale("vnet1", "0e0e0e0e-0000-4000-8000-000000000001", ovs.VLAN{})))

	host := &Host{Root: "/", Self: []string{"platter-node", "host"}, Spec: provision.HostSpec{Guests: provision.GuestSpec{StopWithin: time.Second}}}
	said := func(rep *heard, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(strings.Join(rep.lines, "\n"), w) {
				t.Errorf("not said: %q in\n%s", w, strings.Join(rep.lines, "\n"))
			}
		}
	}
	rows := func() map[string]string { // of the VMs: bridge and VLAN
		t.Helper()
		bridges, err := sw.Bridges(ctx)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, b := range bridges {
			for _, p := range b.Ports {
				if p.Name == b.Name {
					continue
				}
				out[p.Name] = fmt.Sprintf("%s, %s", b.Name, p.VLAN)
				if i := p.Interfaces[0]; i.OFPort <= 0 || i.Error != "" {
					out[p.Name] += fmt.Sprintf(", port %d %s", i.OFPort, i.Error)
				}
			}
		}
		return out
	}
	rep := &heard{}
	err = host.StartGuests(ctx, rep)
	for _, w := range []string{"2 of 4 VMs did not start: VM huge: it wants 95 TiB of memory", "VM lost: bridge br9 is not in Open vSwitch"} {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("start: %v, want %q", err, w)
		}
	}
	said(rep, "repaired: port vnet0 of VM mail: left behind on bridge br1, VLAN 77",
		"port vnet1 of VM 0e0e0e0e-0000-4000-8000-000000000001 (unknown to libvirt)", "mail: runs, vnet", "web: runs, vnet", "lost: failed")
	// Which of the two got which device is a matter of which was faster.
	before := rows()
	device := map[string]string{}
	for name, is := range before {
		device[is] = name
	}
	mail, web := device["br0, VLAN 10"], device["br1, native-untagged VLAN 30, trunk of VLANs 20,30"]
	if len(before) != 2 || mail == "" || web == "" {
		t.Fatalf("ports %v", before)
	}
	same := func(when string) {
		t.Helper()
		if got := rows(); fmt.Sprint(got) != fmt.Sprint(before) {
			t.Errorf("%s: ports %v, want %v", when, got, before)
		}
	}
	index := func() int {
		link, err := netlink.LinkByName(mail)
		if err != nil {
			t.Fatal(err)
		}
		return link.Attrs().Index
	}
	device0 := index()

	// A port on another bridge, in another VLAN, with another owner; one that
	// is gone; and one too many.
	apply(ovs.MovePort(mail, "br1"), ovs.SetVLAN(mail, ovs.VLAN{Tag: new(77)}), ovs.SetIDs(mail, map[string]string{"vm-id": "nobody"}),
		ovs.DeletePort(web), ovs.AddPort("br0", stale("vnet9", uuid.UUID(a.UUID).String(), ovs.VLAN{})))
	step := host.ports()
	found, err := step.Check(ctx)
	if err != nil || len(found) != 3 {
		t.Fatalf("check: %+v, %v", found, err)
	}
	rep = &heard{}
	if err := host.Repair(ctx, rep); err != nil {
		t.Error(err)
	}
	said(rep, mail+" of VM mail: on bridge br1, VLAN 77", web+" of VM web: missing", "vnet9 of VM mail: left behind on bridge br0")
	same("repaired")
	if index() != device0 {
		t.Error("the device was made anew")
	}
	// In the VLAN of the past, looking healthy.
	apply(ovs.SetVLAN(mail, ovs.VLAN{Tag: new(77)}))
	if r, err := Apply(ctx, []Step{step}, nil, &heard{}); err != nil || r[0].Outcome != Changed {
		t.Errorf("step: %+v, %v", r, err)
	}
	same("in its VLAN again")

	// A restart of the switch cuts nobody off.
	daemons.StopSwitch()
	if err := sw.Commit(ctx, ovs.AddPort("br0", stale("vnet9", "", ovs.VLAN{}))); err != nil {
		t.Fatal(err)
	}
	if err := sw.Commit(ctx, ovs.SetIDs("vnet9", map[string]string{"vm-id": uuid.UUID(a.UUID).String()})); err != nil {
		t.Fatal(err)
	}
	rep = &heard{}
	if err := host.PurgePorts(ctx, rep); err != nil {
		t.Error(err)
	}
	said(rep, "deleted port vnet9 of VM mail")
	daemons.StartSwitch()
	apply()
	same("after a restart of the switch")

	// Nothing to do is nothing done.
	rep = &heard{}
	if err := host.StartGuests(ctx, rep); err == nil {
		t.Error("lost is found")
	}
	said(rep, "2 to start")
	same("started twice")
	if f, err := host.guests().Check(ctx); err != nil || len(f) != 5 || f[2].OK || !f[2].Person || f[2].What != "VM lost" || !f[3].OK {
		t.Errorf("step: %+v, %v", f, err)
	}

	// What nothing here can put right is said, and does not fail the host.
	if link, err := netlink.LinkByName(web); err != nil || netlink.LinkDel(link) != nil {
		t.Fatalf("%s: %v", web, err)
	}
	if err := host.Repair(ctx, &heard{}); err == nil || err.Error() != "port "+web+" of VM web: without its device, should be there: stop the VM and start it" {
		t.Errorf("repair: %v", err)
	}
	if r, err := Apply(ctx, []Step{step}, nil, &heard{}); err != nil || r[0].Outcome != Drift {
		t.Errorf("step: %+v, %v", r, err)
	}
	if got := rows(); len(got) != 1 || got[mail] != before[mail] {
		t.Errorf("ports %v", got)
	}

	unheard(t, l, "web")

	for _, want := range []string{"still running, ended now: mail, web", "guests: none runs"} {
		rep = &heard{}
		if err := host.StopGuests(ctx, rep); err != nil {
			t.Error(err)
		}
		said(rep, want)
		if got := rows(); len(got) > 0 {
			t.Errorf("left over: %v", got)
		}
	}
}

// unheard has libvirt tell of changes at the moment at which nobody listens any
// more: what is asked on the same connection after that is answered all the same.
func unheard(t *testing.T, l *libvirt.Libvirt, name string) {
	t.Helper()
	d, err := l.DomainLookupByName(name)
	if err != nil {
		t.Fatal(err)
	}
	toggled := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		for {
			select {
			case <-ended:
				toggled <- nil
				return
			default:
			}
			if err := errors.Join(l.DomainSuspend(d), l.DomainResume(d)); err != nil {
				toggled <- err
				return
			}
		}
	}()
	within, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := virt.Dial(within, virt.Sockets...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for i := range 200 {
		listening, stop := context.WithCancel(within)
		changes, err := conn.Changes(listening)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-changes:
		case <-within.Done():
			t.Fatalf("the %d. time: no change is told", i+1)
		}
		stop()
		if _, err := conn.Domains(); err != nil {
			t.Fatalf("the %d. time: %v", i+1, err)
		}
	}
	close(ended)
	if err := <-toggled; err != nil {
		t.Error(err)
	}
}
