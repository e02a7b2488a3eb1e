package hostprep

// orderFiles: in Debian libvirt and the switch are only linked through
// network.target, which nothing may want: libvirtd then starts before the
// switch, and the switch stops before the VMs. Wants, not Requires: a restart
// of the switch must not restart libvirt.
func (h *Host) orderFiles() []File {
	const why = "else VMs lose their ports at a reboot"
	return []File{
		{Path: "/etc/systemd/system/libvirtd.service.d/platter.conf", Why: why, Content: `# Written by Platter.
[Unit]
Wants=openvswitch-switch.service
After=openvswitch-switch.service ovs-vswitchd.service ovsdb-server.service
[Service]
# It asks every emulator what it can do: a slow machine needs minutes.
TimeoutStartSec=15min
`},
		{Path: "/etc/systemd/system/libvirt-guests.service.d/platter.conf", Why: why, Content: `# Written by Platter.
[Unit]
Wants=libvirtd.service
After=libvirtd.service openvswitch-switch.service ovs-vswitchd.service
`},
	}
}

func (h *Host) unitOrder() Step {
	return h.filesStep("unit-order", "", h.orderFiles(), h.reload)
}
