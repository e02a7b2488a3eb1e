package hostprep

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	guestsUnit = "platter-guests.service"
	purgeUnit  = "platter-ovs-purge.service"

	units = "/etc/systemd/system/"
	// switchUnits are all three of the switch: the one that people know returns
	// from its stop before its daemons have ended. Debian's name of it is the
	// first, the RHEL family's the second. systemd does not mind units that are
	// not there.
	switchUnits = "openvswitch-switch.service openvswitch.service ovsdb-server.service ovs-vswitchd.service"
	// virtUnits run VMs: one daemon for everything, or one for QEMU alone.
	virtUnits = "libvirtd.service virtqemud.service"
)

// orderFiles are what puts the switch, libvirt and the VMs into order, at the
// start and, the other way round, at the stop:
//
//	ovsdb-server ▸ purge ▸ ovs-vswitchd ▸ libvirt ▸ virt-guest-shutdown.target ▸ platter-guests
//
// In Debian libvirt and the switch are only linked through network.target,
// which nothing may want: libvirtd then starts before the switch, and the
// switch stops before the VMs. Wants, not Requires: a restart of the switch
// must not restart libvirt. The services are ordered, not the sockets that
// start them.
func (h *Host) orderFiles() []File {
	const why = "else VMs lose their ports at a reboot"
	const source = "systemd.unit(5); Open vSwitch's and libvirt's units"
	unit := func(name, content string) File {
		return File{Path: units + name, Content: "# Written by Platter.\n" + content, Why: why, Source: source}
	}
	virtOrder := `[Unit]
Wants=openvswitch-switch.service openvswitch.service
After=` + switchUnits + `
[Service]
# It asks every emulator what it can do: a slow machine needs minutes.
TimeoutStartSec=15min
`
	files := []File{
		unit("libvirtd.service.d/platter.conf", virtOrder),
		unit("virtqemud.service.d/platter.conf", virtOrder),

		// Rows of VMs that a power cut or a killed VM left are gone before the
		// switch acts on them. Wanted by the database, so that it runs with
		// each start of it; a VM that runs then keeps its port. If it fails
		// the switch starts all the same.
		unit(purgeUnit, fmt.Sprintf(`[Unit]
Description=Delete the switch's ports of VMs that are gone
DefaultDependencies=no
After=ovsdb-server.service
Before=ovs-vswitchd.service

[Service]
Type=oneshot
ExecStart=%s
TimeoutStartSec=1min

[Install]
WantedBy=ovsdb-server.service
`, h.self("purge-ports"))),
		{Path: units + "ovsdb-server.service.wants/" + purgeUnit, Link: "../" + purgeUnit, Why: why, Source: source},

		// The scopes in which VMs run are ordered before
		// virt-guest-shutdown.target, so what is ordered after it stops while
		// all of them still run. The target has to be active for that.
		//
		// A start that fails or is cut off by a shutdown must not keep the VMs
		// that run from being ended properly: hence the "-", and ExecStopPost,
		// which is run in any case. Its time is the one of the rack file and
		// what it takes to end by force those that do not listen.
		unit(guestsUnit, fmt.Sprintf(`[Unit]
Description=The VMs of this host
Wants=virt-guest-shutdown.target openvswitch-switch.service openvswitch.service
After=%s
After=%s libvirtd.socket virtqemud.socket virt-guest-shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=-%s
ExecStopPost=-%s
TimeoutStartSec=infinity
TimeoutStopSec=%d

[Install]
WantedBy=multi-user.target
`, switchUnits, virtUnits, h.self("start-guests"), h.self("stop-guests"), int((h.guestSpec().StopWithin+5*time.Minute).Seconds()))),
		{Path: units + "multi-user.target.wants/" + guestsUnit, Link: "../" + guestsUnit, Why: why, Source: source},

		// libvirt's own unit for guests would stop them too, one after the
		// other and for up to five minutes each, save some to disk, and start
		// at boot those that ran before whether they are marked autostart or
		// not. Two must not do that.
		{Path: units + "libvirt-guests.service", Link: "/dev/null", Source: source,
			Why: "platter-guests.service starts and stops the VMs; libvirt's own stops them one by one, minutes each"},

		// libvirt starts what is marked autostart once per boot: all at one go,
		// without a second try, before anybody has looked at ports or memory.
		// It takes this file for the sign that it has done so
		// (virDriverShouldAutostart in its source, asked by both daemons).
		{Path: "/etc/tmpfiles.d/platter-libvirt.conf", Source: "libvirt: virDriverShouldAutostart",
			Why: "platter-guests.service starts the VMs that are marked autostart, and tries again",
			Content: `# Written by Platter.
d /run/libvirt 0755 root root -
d /run/libvirt/qemu 0755 root root -
f /run/libvirt/qemu/autostarted 0600 root root -
`},
	}
	for _, daemon := range []string{"libvirtd", "virtqemud"} {
		if f, ok := h.keyed("/etc/libvirt/"+daemon+".conf", "ovs_timeout", "60"); ok {
			f.Why = "libvirt gives the switch 5 seconds for a port: in a storm of starts on a slow host that has failed"
			f.Source = "libvirtd.conf: ovs_timeout"
			files = append(files, f)
		}
	}
	return files
}

// keyed is the configuration file at path, of lines like "key = value", with
// that key at that value and everything else as it is. Not ok where there is no
// such file.
func (h *Host) keyed(path, key, value string) (File, bool) {
	name := filepath.Join(h.Root, path)
	b, err := os.ReadFile(name)
	if err != nil {
		return File{}, false
	}
	line, found := key+" = "+value+"\n", false
	var out strings.Builder
	for l := range strings.Lines(string(b)) {
		k, _, _ := strings.Cut(l, "=")
		switch {
		case strings.TrimSpace(k) != key:
			out.WriteString(l)
		case !found:
			out.WriteString(line)
			found = true
		}
	}
	if !found {
		if text := out.String(); text != "" && !strings.HasSuffix(text, "\n") {
			out.WriteByte('\n')
		}
		out.WriteString(line)
	}
	f := File{Path: path, Content: out.String()}
	if info, err := os.Stat(name); err == nil {
		f.Mode = info.Mode().Perm()
	}
	return f, true
}

func (h *Host) unitOrder() Step {
	return h.filesStep("unit-order", "", h.orderFiles(), h.reload)
}
