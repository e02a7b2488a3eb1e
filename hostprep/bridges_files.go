package hostprep

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"platter/provision"
)

const (
	networkDir = "/etc/systemd/network"
	linksDir   = "/run/systemd/netif/links" // what systemd-networkd says about each interface
	guardUnit  = "platter-uplink.service"
	fromMark   = "# From: "
)

// networkd tells whether systemd-networkd runs on the host.
func (h *Host) networkd() bool {
	_, err := os.Stat(filepath.Join(h.Root, linksDir))
	return err == nil
}

// networkFile is the .network file by which systemd-networkd configures d;
// empty: it does not.
func (h *Host) networkFile(d device) string {
	b, _ := os.ReadFile(filepath.Join(h.Root, linksDir, fmt.Sprint(d.index)))
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "NETWORK_FILE="); ok {
			return path
		}
	}
	return ""
}

// files are what systemd-networkd needs to bring b about at the next boot,
// before anything of ours runs.
func (v bridgeView) files(b provision.Bridge) []File {
	if !v.networkd {
		return nil
	}
	var out []File
	if b.Management {
		if f, err := v.addressFile(b); err == nil {
			out = append(out, f)
		}
	}
	for _, name := range b.Uplink.Interfaces {
		link := ""
		if b.MTU != 0 {
			link = fmt.Sprintf("MTUBytes=%d\n", b.MTU)
		}
		out = append(out, File{Path: networkDir + "/05-platter-" + name + ".network", Why: "else the interface would not be up, or would have an address of its own", Content: `# Written by Platter: this interface belongs to the bridge ` + b.Name + `.
[Match]
Name=` + name + `

[Link]
RequiredForOnline=no
` + link + `
[Network]
DHCP=no
IPv6AcceptRA=no
LinkLocalAddressing=no
ConfigureWithoutCarrier=yes
`})
	}
	return out
}

// addressFile puts what systemd-networkd configured on the interface with the
// host's address onto the bridge, whatever that is.
func (v bridgeView) addressFile(b provision.Bridge) (File, error) {
	f := File{Path: networkDir + "/05-platter-" + b.Name + ".network", Why: "the host's address is on the bridge after a reboot too"}
	from := v.h.networkFile(v.devices[v.managed])
	if _, ok := v.confirmed[b.Name]; ok || v.managed == b.Name {
		// It moved: the file tells where it came from.
		now, _ := os.ReadFile(filepath.Join(v.h.Root, f.Path))
		for line := range strings.Lines(string(now)) {
			if path, ok := strings.CutPrefix(strings.TrimSpace(line), fromMark); ok {
				from = path
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(v.h.Root, from))
	if err != nil || from == "" {
		return f, fmt.Errorf("no network file to put the address onto the bridge by: %w", err)
	}
	f.Content = "# Written by Platter: the address of this host is on its bridge.\n" + fromMark + from + "\n[Match]\nName=" + b.Name + "\n\n" + withoutMatch(string(text))
	return f, nil
}

// withoutMatch is a .network file without its [Match] section.
func withoutMatch(text string) string {
	var out []string
	keep := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "[") {
			keep = strings.TrimSpace(line) != "[Match]"
		}
		if keep {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// uplinkUnit is the unit that takes back what was cut off, at boot, and what
// nobody confirms, while a change is tried.
func (h *Host) uplinkUnit() []File {
	if !slices.ContainsFunc(Bridges(h.Spec), func(b provision.Bridge) bool { return b.Management }) {
		return nil
	}
	const why = "a change of the uplink that cuts the host off is taken back"
	return []File{
		{Path: "/etc/systemd/system/" + guardUnit, Why: why, Content: `# Written by Platter.
[Unit]
Description=Takes back a change of the uplink that nobody confirmed
ConditionPathExists=` + trialFile + `
After=ovsdb-server.service ovs-vswitchd.service systemd-networkd.service dbus.service
Before=network-online.target

[Service]
Type=notify
ExecStart=` + h.self("guard-uplink") + `
TimeoutStartSec=1min

[Install]
WantedBy=multi-user.target
`},
		{Path: "/etc/systemd/system/multi-user.target.wants/" + guardUnit, Link: "../" + guardUnit, Why: why},
	}
}

// canReload tells whether systemd-networkd runs and can be told something.
func (h *Host) canReload() bool {
	_, err := os.Stat("/run/dbus/system_bus_socket")
	return err == nil && h.networkd()
}

// adopted waits until systemd-networkd configures every interface by its file
// and has done with it, or a few seconds: it answers a reload before it has done
// anything, and on the way it has been seen to drop routes that it then believed
// to be there. What has to be there is put there again after this.
func (h *Host) adopted(ctx context.Context, by map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for h.canReload() {
		all, err := devices()
		if err != nil {
			return err
		}
		late := false
		for name, file := range by {
			state, _ := os.ReadFile(filepath.Join(h.Root, linksDir, fmt.Sprint(all[name].index)))
			late = late || h.networkFile(all[name]) != file || !strings.Contains(string(state), "ADMIN_STATE=configured\n")
		}
		if !late {
			return nil
		}
		select { // it does not tell when
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// reloadNetwork makes systemd-networkd read its files anew, where it can be
// told to.
func (h *Host) reloadNetwork(ctx context.Context) error {
	if !h.canReload() {
		return nil
	}
	bus, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("systemd-networkd: %w", err)
	}
	defer bus.Close()
	err = bus.Object("org.freedesktop.network1", "/org/freedesktop/network1").CallWithContext(ctx, "org.freedesktop.network1.Manager.Reload", 0).Err
	if err != nil {
		return fmt.Errorf("systemd-networkd does not read its files: %w: look at 'journalctl -u systemd-networkd'", err)
	}
	return nil
}
