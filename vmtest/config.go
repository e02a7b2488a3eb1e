package vmtest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"

	"platter/provision"
	"platter/provision/yamlfile"
)

// Config is a checked lab file: the machines and the network that a lab has.
type Config struct {
	Name     string    `json:"lab"` // [a-z0-9-], at most 32 characters
	Network  Network   `json:"network"`
	Machines []Machine `json:"machines"` // unique names and MACs
}

// Network is the lab's one L2 segment.
type Network struct {
	Bridge  string       `json:"bridge"`  // the disc host's interface
	Address netip.Prefix `json:"address"` // the disc host's IPv4 address and the segment's length
}

// Machine is one virtual server.
type Machine struct {
	Name     string        `json:"name"` // [a-z0-9-], at most 63 characters
	MAC      provision.MAC `json:"mac"`
	Firmware Firmware      `json:"firmware"`
	PXE      PXE           `json:"pxe"`
	CPUs     int           `json:"cpus"`
	Memory   int64         `json:"memory"` // bytes, whole MiB
	Disks    []Disk        `json:"disks"`  // may be empty
	// Media are files that the machine boots from before anything else: *.iso in a
	// CD drive, others as disks, such as an image of a USB stick, which it may write
	// to. Absolute paths.
	Media []string `json:"media,omitempty"`
}

// Disk is a virtio disk; it is blank when it is first seen.
type Disk struct {
	Size   int64  `json:"size"`   // bytes, whole MiB
	Serial string `json:"serial"` // at most 20 characters; may be empty
}

// Firmware is what a machine starts with.
type Firmware string

const (
	BIOS Firmware = "bios" // SeaBIOS
	UEFI Firmware = "uefi" // OVMF, Secure Boot off, variables kept over power cycles
)

// PXE is the network boot code of a machine's NIC.
type PXE string

const (
	// PXEiPXE is the option ROM that QEMU brings: it is iPXE already and says
	// so in DHCP. SeaBIOS has no network boot but this.
	PXEiPXE PXE = "ipxe"
	// PXEPlain is the firmware's own PXE, without iPXE: UEFI only. Servers
	// have this, so it is what UEFI machines have unless the lab file says
	// otherwise.
	PXEPlain PXE = "plain"
)

// Load reads the lab file at name. Its error is yamlfile.Problems where the
// content is wrong.
func Load(name string) (Config, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return Config{}, fmt.Errorf("cannot read the lab file: %w", err)
	}
	return Parse(name, data)
}

var (
	parseLab     = yamlfile.Match(regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`), "lower-case letters, digits and hyphens, at most 32")
	parseMachine = yamlfile.Match(regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`), "lower-case letters, digits and hyphens, at most 63, as in a host name")
	parseSerial  = yamlfile.Match(regexp.MustCompile(`^[A-Za-z0-9_.+-]{1,20}$`), "letters, digits and _.+-, at most 20, which is all that a virtio disk can hold")
	bridgeForm   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)
	tapForm      = regexp.MustCompile(`^vnet[0-9]*$`) // libvirt's names for the machines' ports
)

// Parse reads a lab file's content; name serves messages.
func Parse(name string, data []byte) (Config, error) {
	f := yamlfile.Parse(name, data)
	top := f.Root().Fields("lab", "network", "machines")
	c := Config{Name: yamlfile.Get(top["lab"].Required(), parseLab)}
	nw := top["network"].Required().Fields("bridge", "address")
	c.Network = Network{
		Bridge:  yamlfile.Get(nw["bridge"].Required(), parseBridge),
		Address: yamlfile.Get(nw["address"].Required(), parseAddress),
	}
	list := top["machines"].Required()
	seen := map[string]int{}
	for _, v := range list.List() {
		c.Machines = append(c.Machines, parseOne(v, filepath.Dir(name), seen))
	}
	if list.Exists() && len(c.Machines) == 0 {
		list.Failf("machines has no machine")
	}
	return c, f.Err()
}

// parseOne reads a machine; dir is what the paths of its media are relative to.
func parseOne(v yamlfile.Value, dir string, seen map[string]int) Machine {
	m := Machine{Firmware: BIOS, CPUs: 2, Memory: 2 << 30}
	f := v.Fields("name", "mac", "firmware", "pxe", "cpus", "memory", "disks", "media")
	m.Name = yamlfile.Get(f["name"].Required(), parseMachine)
	m.MAC = yamlfile.Get(f["mac"].Required(), parseMAC)
	for key, value := range map[string]string{"name": m.Name, "mac": string(m.MAC)} {
		at := key + " " + value
		if line, dup := seen[at]; dup && value != "" {
			f[key].Failf("%s is already used on line %d", at, line)
			continue
		}
		seen[at] = f[key].Line()
	}
	if f["firmware"].Exists() {
		m.Firmware = yamlfile.Get(f["firmware"], oneOf(BIOS, UEFI))
	}
	if m.PXE = PXEPlain; m.Firmware == BIOS {
		m.PXE = PXEiPXE
	}
	if f["pxe"].Exists() {
		m.PXE = yamlfile.Get(f["pxe"], oneOf(PXEiPXE, PXEPlain))
		if m.PXE == PXEPlain && m.Firmware == BIOS {
			f["pxe"].Failf("pxe plain needs firmware uefi: the BIOS of these machines boots from the network by iPXE only")
		}
	}
	if f["cpus"].Exists() {
		m.CPUs = yamlfile.Get(f["cpus"], yamlfile.Int(1, 64))
	}
	if f["memory"].Exists() {
		m.Memory = yamlfile.Get(f["memory"], sizeFrom(128<<20))
	}
	for i, d := range f["disks"].List() {
		df := d.Fields("size", "serial")
		if i == maxDisks {
			d.Failf("a machine has at most %d disks", maxDisks)
			break
		}
		m.Disks = append(m.Disks, Disk{
			Size:   yamlfile.Get(df["size"].Required(), sizeFrom(1<<20)),
			Serial: yamlfile.Get(df["serial"], parseSerial),
		})
	}
	for i, w := range f["media"].List() {
		path := yamlfile.Get(w, yamlfile.Text)
		if i == maxMedia {
			w.Failf("a machine has at most %d media", maxMedia)
			break
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		abs, err := filepath.Abs(path)
		if err != nil {
			w.Failf("%v", err)
		} else if st, err := os.Stat(abs); path != "" && (err != nil || !st.Mode().IsRegular()) {
			w.Failf("there is no file %s", abs)
		}
		m.Media = append(m.Media, abs)
	}
	return m
}

func oneOf[T ~string](a, b T) func(string) (T, error) {
	return func(s string) (T, error) {
		if t := T(s); t == a || t == b {
			return t, nil
		}
		return "", fmt.Errorf("must be %s or %s", a, b)
	}
}

// sizeFrom takes whole MiB of at least lo bytes, as libvirt and sector sizes
// want it.
func sizeFrom(lo int64) func(string) (int64, error) {
	return func(s string) (int64, error) {
		n, err := yamlfile.Size(s)
		if err == nil && (n < lo || n%(1<<20) != 0) {
			err = fmt.Errorf("must be whole MiB and at least %d MiB", lo>>20)
		}
		return n, err
	}
}

func parseBridge(s string) (string, error) {
	if !bridgeForm.MatchString(s) || s == "lo" || tapForm.MatchString(s) {
		return "", errors.New("must be a network device name of at most 15 characters, not lo and not vnetN")
	}
	return s, nil
}

func parseAddress(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p.Bits() > 30 || p.Bits() < 8 || p.Addr() == p.Masked().Addr() {
		return netip.Prefix{}, errors.New("must be the disc host's IPv4 address with a length of 8 to 30, such as 10.77.0.1/24")
	}
	return p, nil
}

func parseMAC(s string) (provision.MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 || hw[0]&1 != 0 {
		return "", errors.New("must be a unicast Ethernet address such as 52:54:00:12:34:56")
	}
	return provision.MAC(hw.String()), nil
}
