//go:build e2e || soak

package vmtest_test

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// A guest is a domain of the host under test. It has no disk, no system and no
// ACPI: its network card's own ROM asks for a lease, and a lease proves that
// its port forwards both ways, in the VLAN whose server gave it.
type guest struct {
	name, bridge string
	tag          int
}

var allGuests = []guest{
	{"vm1", "br-a", 10}, {"vm2", "br-b", 10}, {"vm3", "br-a", 20},
	{"vm4", "br-b", 30}, {"vm5", "br-a", 10}, {"vm6", "br-b", 10},
}

// passer is a domain that somebody started by hand and that no boot starts.
var passer = guest{"passer", "br-c", 40}

// prefix of the subnet that the guest's VLAN has a DHCP server for.
func (g guest) prefix() string { return subnet(g.bridge, g.tag) }

func subnet(bridge string, tag int) string {
	return fmt.Sprintf("10.%d.%d.", 100+int(bridge[3]-'a'), tag)
}

func (g guest) xml(n int) string {
	return fmt.Sprintf(`<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='network'/></os>
<devices><controller type='usb' model='none'/>
<interface type='bridge'><mac address='52:54:00:aa:00:%02x'/><source bridge='%s'/>
<virtualport type='openvswitch'/><vlan><tag id='%d'/></vlan><model type='virtio'/></interface>
<memballoon model='none'/></devices></domain>`, g.name, n+1, g.bridge, g.tag)
}

// host is an installed node under test.
type host struct {
	*rig
	addr   string
	guests []guest
}

const platterHost = "/usr/lib/platter/platter-node host "

// define defines the guests, to be started at boot.
func (h host) define() {
	h.t.Helper()
	var s strings.Builder
	s.WriteString("set -eu\n")
	for i, g := range append(h.guests, passer) {
		fmt.Fprintf(&s, "virsh -q define /dev/stdin <<'EOF'\n%s\nEOF\n", g.xml(i))
	}
	for _, g := range h.guests {
		fmt.Fprintf(&s, "virsh -q autostart %s\n", g.name)
	}
	h.script(s.String())
}

// leases puts a DHCP server into every VLAN of the bridges, for this boot and
// later ones. A guest that has got its lease is suspended: it has proved all that
// it can.
func (h host) leases() {
	h.t.Helper()
	var s strings.Builder
	s.WriteString("set -eu\n")
	for _, b := range []string{"br-a", "br-b", "br-c"} {
		fmt.Fprintf(&s, "ovs-vsctl --may-exist add-br %s\n", b)
	}
	args, pre := "", ""
	for _, g := range h.guests {
		dev := fmt.Sprintf("dh-%c%d", g.bridge[3], g.tag)
		if strings.Contains(pre, dev+" ") {
			continue
		}
		fmt.Fprintf(&s, "ovs-vsctl --may-exist add-port %s %s tag=%d -- set interface %s type=internal\n", g.bridge, dev, g.tag, dev)
		pre += fmt.Sprintf("ExecStartPre=/bin/sh -c 'until ip link set %s up; do sleep 1; done; ip addr replace %s1/24 dev %s'\n", dev, g.prefix(), dev)
		args += fmt.Sprintf(" --interface=%s --dhcp-range=%s10,%s200", dev, g.prefix(), g.prefix())
	}
	fmt.Fprintf(&s, `cat > /usr/local/sbin/test-leased <<'EOF'
#!/bin/sh
# A ROM that has nothing to start takes all the processor it can get.
[ "$1" = add ] || exit 0
mac=$2; set -- %s; shift $((0x${mac##*:} - 1)); exec virsh -q suspend $1
EOF
chmod 755 /usr/local/sbin/test-leased
cat > /etc/systemd/system/test-leases.service <<'EOF'
[Unit]
After=ovs-vswitchd.service
[Service]
TimeoutStartSec=infinity
%sExecStart=/usr/sbin/dnsmasq -k -C /dev/null -p 0 -u root --bind-interfaces --dhcp-leasefile=/run/test-leases --dhcp-script=/usr/local/sbin/test-leased%s
[Install]
WantedBy=multi-user.target
EOF
systemctl -q daemon-reload; systemctl -q enable test-leases; systemctl -q restart test-leases
`, h.names(), pre, args)
	h.script(s.String())
}

// script runs a shell script on the host.
func (h host) script(text string) string {
	h.t.Helper()
	out, err := h.try(text)
	if err != nil {
		h.t.Fatalf("on the host: %v\n%s\n%s", err, text, out)
	}
	return strings.TrimSpace(out)
}

func (h host) try(text string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), stall)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.bin(), "lab", "exec", "--state", h.lab, "--", "ssh", "-i", h.dir+"/key",
		"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
		"-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=12", "root@"+h.addr, "sh -s")
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// swap is a script that leaves the ports as upset does, without libvirt, which takes
// minutes for it here: every name belongs to the domain before the one that gets it at
// the next boot. The rows are those that libvirt writes.
func (h host) swap() string {
	var s strings.Builder
	s.WriteString("uuid() { sed -n 's,.*<uuid>\\(.*\\)</uuid>.*,\\1,p' /etc/libvirt/qemu/$1.xml; }\novs-vsctl")
	for i, g := range append([]guest{passer}, h.guests...) {
		fmt.Fprintf(&s, ` -- --if-exists del-port vnet%d -- add-port %s vnet%d tag=%d -- set interface vnet%d external_ids:vm-id=$(uuid %s) other_config:transient=true`,
			i, g.bridge, i, g.tag, i, g.name)
	}
	return s.String() + "\nsync\n"
}

// resume is a script that lets the guests run that have their leases.
func (h host) resume() string { return "virsh -q '" + h.each("resume %s;") + "' || true\n" }

// falls makes the host go down after a last script, and returns once it answers again.
// Every connection takes seconds here, so there is one.
func (h host) falls(how string, last ...string) {
	h.t.Helper()
	script := "set -eu\n" + strings.Join(last, "") + "echo this boot is $(cat /proc/sys/kernel/random/boot_id)\n"
	if how == "reboot" {
		script += "systemctl reboot\n"
	}
	out, err := h.try(script)
	_, rest, found := strings.Cut(out, "this boot is ")
	id, _, _ := strings.Cut(rest, "\n")
	if !found || err != nil && how != "reboot" { // whose connection may end first
		h.t.Fatalf("on the host: %v\n%s\n%s", err, script, out)
	}
	if how == "cut" {
		h.power("off", "node1")
		h.power("on", "node1")
	}
	h.answers(id)
}

// answers returns once the host does, in another boot than the one named.
func (h host) answers(before string) {
	h.t.Helper()
	for began := time.Now(); ; {
		out, err := h.try("cat /proc/sys/kernel/random/boot_id")
		if id := strings.TrimSpace(out); err == nil && id != before {
			break
		}
		if time.Since(began) > stall {
			h.t.Fatalf("the host does not answer: %v %s", err, out)
		}
		if err != nil {
			time.Sleep(time.Second) // refused at once: between two tries, not for an event
		}
	}
}

// settled returns once every job of the boot has ended. The outcome is
// "degraded" without the messaging service.
func (h host) settled() { h.try("systemctl is-system-running --wait") }

// fault is one thing that is wrong with a guest or with the switch.
type fault struct{ kind, who, what string }

// The kinds of faults, as the soak counts them.
const (
	faultOff   = "not running"
	faultStale = "stale row"
	faultPlace = "wrong bridge or VLAN"
	faultLease = "no lease in its VLAN"
	faultPort  = "no OpenFlow port"
)

// faults looks at every guest and at the switch, when the boot has settled and every
// guest has its lease or none has come for a while.
func (h host) faults(patience time.Duration) (found []fault) {
	h.t.Helper()
	out := h.script(fmt.Sprintf(`
systemctl is-system-running --wait >/dev/null
n=-1; left=%d
while [ $left -gt 0 ]; do
	now=$(grep -c . /run/test-leases 2>/dev/null) || true
	[ "$now" = %d ] && break
	[ "$now" = "$n" ] || { n=$now; left=%d; }
	left=$((left - 2)); sleep 2
done
virsh -q '%s' 2>/dev/null | awk '
	function tell() { if (vm) print vm, state, dev, mac }
	$1 == "Name:" { tell(); vm = $2; state = dev = mac = "-" }
	$1 == "State:" { state = $2 $3 }
	$5 ~ /..:..:/ { dev = $1; mac = $5 }
	END { tell() }' | while read -r vm state dev mac; do
	lease=$(awk -v mac=$mac '$2 == mac { print $3 }' /run/test-leases)
	port=$(ovs-vsctl port-to-br $dev -- get port $dev tag -- get interface $dev ofport 2>/dev/null) || port="- - -"
	echo guest $vm $state ${lease:--} $port
done
for dev in $(ovs-vsctl --bare --columns=name find interface 'external_ids:vm-id!=""'); do
	[ -e /sys/class/net/$dev ] || echo "stale $dev"
done`, int(patience.Seconds()), len(h.guests), int(patience.Seconds()), h.each("dominfo %[1]s; domiflist %[1]s;")))
	seen := map[string]bool{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "stale":
			found = append(found, fault{faultStale, f[1], "its row has no device"})
		case len(f) == 7 && f[0] == "guest":
			i := slices.IndexFunc(h.guests, func(g guest) bool { return g.name == f[1] })
			if i < 0 {
				continue
			}
			seen[f[1]] = true
			found = append(found, h.guests[i].faults(f[2], f[3], f[4], f[5], f[6])...)
		}
	}
	for _, g := range h.guests {
		if !seen[g.name] {
			found = append(found, fault{faultOff, g.name, "is not there: " + out})
		}
	}
	return found
}

func (g guest) faults(state, lease, bridge, tag, ofport string) (found []fault) {
	if state != "running" && (state != "paused" || lease == "-") {
		return []fault{{faultOff, g.name, "is " + state}}
	}
	if !strings.HasPrefix(lease, g.prefix()) {
		found = append(found, fault{faultLease, g.name, "has the lease " + lease + ", want " + g.prefix() + "x"})
	}
	if bridge != g.bridge || tag != strconv.Itoa(g.tag) {
		found = append(found, fault{faultPlace, g.name, fmt.Sprintf("is on %s with tag %s, want %s with %d", bridge, tag, g.bridge, g.tag)})
	}
	if n, err := strconv.Atoi(ofport); err != nil || n <= 0 {
		found = append(found, fault{faultPort, g.name, "has the OpenFlow port " + ofport})
	}
	return found
}

// each is commands of virsh for every guest.
func (h host) each(format string) string {
	var s strings.Builder
	for _, g := range h.guests {
		fmt.Fprintf(&s, format, g.name)
	}
	return s.String()
}

// names of the guests, for a shell.
func (h host) names() string {
	var names []string
	for _, g := range h.guests {
		names = append(names, g.name)
	}
	return strings.Join(names, " ")
}

// newHost installs a host.
func newHost(t *testing.T, guests []guest) host {
	t.Helper()
	h := host{hostRig(t, t.TempDir()), hostAddress, guests}
	h.install()
	return h
}

const hostAddress = "10.77.0.11"

// hostRig has one machine, whose host gets three bridges.
func hostRig(t *testing.T, dir string) *rig {
	t.Helper()
	return newRigIn(t, dir, "../build/store", fmt.Sprintf(labHead, "host")+`
  - {name: node1, mac: "52:54:00:77:05:01", cpus: 2, memory: 4GiB, disks: [{size: 8GiB, serial: one}]}
`, strings.Replace(rackHead, "nodes:", "host: {bridges: [{name: br-a}, {name: br-b}, {name: br-c}], guests: {stop-within: 5s}}\nnodes:", 1)+`
  - {name: node1, mac: "52:54:00:77:05:01", address: `+hostAddress+`}
`)
}

// install brings the machine from power-on to a prepared host.
func (h host) install() {
	h.t.Helper()
	h.power("on", "node1")
	h.await("the host is prepared", stageIs("node1", provision.StageJoining))
	// The messaging service is tested elsewhere; its start is half of a boot.
	// Masked, not disabled, and killed, not stopped: the one reloads systemd again and
	// again, the other is an orderly end of what has just begun; both take minutes.
	// Nor does the test's own shell need a service manager, which takes seconds to start.
	h.script(`all="nginx ejabberd haproxy patroni etcd"
systemctl -q mask $all user@0; systemctl -q kill -s KILL $all || true; systemctl -q stop $all`)
}

// files is every file that says how the host starts: its mode, owner, link and
// hash.
const files = `places="/etc /boot /usr/lib/systemd /usr/lib/tmpfiles.d /usr/lib/udev"
skip="! -name .updated ! -path /etc/openvswitch/* ! -path /etc/libvirt/qemu/* ! -path /etc/apparmor.d/libvirt/*"
set -f
find $places -xdev $skip -printf '%p %m %U %G %l\n' | sort
find $places -xdev -type f $skip -print0 | sort -z | xargs -0 sha256sum`

// platter runs a host command and returns its exit code and output.
func (h host) platter(command string) (int, string) {
	h.t.Helper()
	out := h.script("code=0; " + platterHost + command + " 2>&1 || code=$?; echo; echo exit $code")
	text, last, _ := strings.Cut(out, "\nexit ")
	code, err := strconv.Atoi(strings.TrimSpace(last))
	if err != nil {
		h.t.Fatalf("host %s: %s", command, out)
	}
	return code, strings.TrimSpace(text)
}

func (h host) want(code int, command string) string {
	h.t.Helper()
	got, out := h.platter(command)
	if got != code {
		h.t.Errorf("host %s ends with %d, want %d:\n%s", command, got, code, out)
	}
	return out
}

// stock makes the host what the image alone would be.
func (h host) stock() {
	h.t.Helper()
	h.script("systemctl -q disable --now platter-agent")
	if code, out := h.platter("undo"); code != 0 && code != 3 {
		h.t.Fatalf("host undo ends with %d:\n%s", code, out)
	}
	h.leases() // undoing took the bridges away
}

// upset leaves the ports as a day of work would: the first name went to a
// domain on another bridge than the one whose domain gets it at the next boot.
// again are the guests that are started after it.
func (h host) upset(again ...guest) {
	h.t.Helper()
	names := host{guests: append([]guest{passer}, again...)}.names()
	h.script(`for vm in $(virsh list --name); do virsh -q destroy $vm; done
for dev in $(ovs-vsctl --bare --columns=name find interface 'external_ids:vm-id!=""'); do ovs-vsctl --if-exists del-port $dev; done
systemctl restart libvirtd
for vm in ` + names + `; do virsh -q start $vm; done`)
}

// TestHost: guests that ignore ACPI run in their VLANs after a clean reboot and
// after a power cut of the prepared host, and do not on the stock image. What
// the preparation changes is undone to the byte.
func TestHost(t *testing.T) {
	h := newHost(t, allGuests[:2])
	t.Log(h.want(0, "check"))
	h.define()
	h.leases()
	t.Log(h.want(0, "start-guests"))
	good := func(when string) {
		t.Helper()
		began := time.Now()
		for _, f := range h.faults(3 * time.Minute) {
			t.Errorf("%s: %s %s", when, f.who, f.what)
		}
		t.Logf("%s: looked at after %s", when, time.Since(began).Round(time.Second))
	}
	good("first start")
	for _, how := range []string{"reboot", "cut"} {
		if how == "cut" {
			h.upset()
		}
		h.falls(how)
		good("prepared, after " + how)
		if t.Failed() {
			t.Log(h.script("journalctl -b -u platter-guests -u platter-ovs-purge -u libvirtd -u platter-agent --no-pager | tail -60; ovs-vsctl show"))
			return
		}
	}

	h.stock()
	bytes := h.script(files)
	h.upset()
	h.falls("cut")
	if found := h.faults(time.Minute); len(found) == 0 {
		t.Error("the stock image has no fault: this test proves nothing")
	} else {
		t.Logf("stock, after cut: %v", found)
	}
	deviations := h.want(3, "check")
	t.Logf("the stock host deviates:\n%s", deviations)
	t.Log(h.want(3, "apply"))                                                                   // 3: a reboot is due
	h.script("for vm in $(virsh list --all --name); do virsh -q autostart --disable $vm; done") // not needed any more
	h.falls("reboot")
	h.settled()
	h.want(0, "check")
	applied := h.script(files)
	h.want(0, "apply")
	if again := h.script(files); again != applied {
		t.Errorf("the second apply changed files:\n%s", lineDiff(applied, again))
	}
	h.want(3, "undo") // 3: a module's options are the former ones from the next boot on
	if after := h.script(files); after != bytes {
		t.Errorf("undoing left files different:\n%s", lineDiff(bytes, after))
	}
}

// lineDiff names the lines that only one of two sorted texts has.
func lineDiff(a, b string) string {
	var out []string
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for _, l := range as {
		if !slices.Contains(bs, l) {
			out = append(out, "- "+l)
		}
	}
	for _, l := range bs {
		if !slices.Contains(as, l) {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}
