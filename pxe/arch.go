package pxe

import (
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"platter/provision"
)

// loaders are the iPXE programs served, by file name, read once: what is
// served does not change under a machine that fetches it.
type loaders struct {
	files map[string][]byte
	bios  string // name of the loader for BIOS machines
	efi   string // name of the loader for UEFI x86-64 machines
}

// readLoaders reads the loaders from dir. snponly.efi is preferred for UEFI:
// it drives the network card through the firmware, which has just proved that
// it can.
func readLoaders(dir fs.FS) (loaders, error) {
	l := loaders{files: map[string][]byte{}, bios: "undionly.kpxe"}
	missing := func(name string, err error) (loaders, error) {
		return loaders{}, fmt.Errorf("the iPXE loader %s is missing: install Debian's package ipxe ('apt install ipxe'): %w", name, err)
	}
	if dir == nil {
		return missing("undionly.kpxe", fs.ErrNotExist)
	}
	b, err := fs.ReadFile(dir, l.bios)
	if err != nil {
		return missing(l.bios, err)
	}
	l.files[l.bios] = b
	for _, name := range []string{"snponly.efi", "ipxe.efi"} {
		b, ferr := fs.ReadFile(dir, name)
		if ferr != nil {
			err = ferr
			continue
		}
		l.files[name] = b
		if l.efi == "" {
			l.efi = name
		}
	}
	if l.efi == "" {
		return missing("snponly.efi or ipxe.efi", err)
	}
	return l, nil
}

// boot is what a DHCP answer tells a machine to load next.
type boot struct {
	file string // name for TFTP, or URL; empty: nothing
	http bool   // the client is UEFI HTTP boot and must see its own class in the answer
	ipxe bool   // the client is iPXE: it needs no proxy DHCP server
	note string // why a machine that wants to boot gets nothing
}

// iPXE's own options, encapsulated in option 175 (its src/include/ipxe/dhcp.h).
const (
	optIPXE         = dhcpv4.GenericOptionCode(175)
	ipxeNoPXEDHCP   = 0xb0 // in an answer: do not wait for a proxy DHCP server
	ipxeFeatureHTTP = 0x13 // in a request: this build speaks HTTP
)

// bootFor decides what the sender of req loads, from what its firmware says
// about itself: vendor class (option 60), client architecture (option 93, RFC
// 4578 and IANA's list), user class (option 77) and iPXE's features (option
// 175). server is the disc host as URLs name it.
func bootFor(req *dhcpv4.DHCPv4, l loaders, server string) boot {
	class := req.ClassIdentifier()
	pxe, http := strings.HasPrefix(class, "PXEClient"), strings.HasPrefix(class, "HTTPClient")
	if slices.Contains(req.UserClass(), "iPXE") || (pxe || http) && req.Options.Has(optIPXE) {
		features := req.Options.Get(optIPXE)
		if _, ok := suboption(features, ipxeFeatureHTTP); ok || len(features) == 0 {
			platform, arch := "pcbios", "i386"
			if a := archs(req); !slices.Contains(a, iana.INTEL_X86PC) && len(a) > 0 {
				platform, arch = "efi", "x86_64"
			}
			mac := provision.MAC(req.ClientHWAddr.String())
			return boot{file: ScriptURL(server, mac, platform, arch), ipxe: true}
		}
		// An iPXE in a network card that cannot speak HTTP loads ours.
	}
	switch {
	case pxe:
		for _, a := range archs(req) {
			switch a {
			case iana.INTEL_X86PC:
				return boot{file: l.bios}
			case iana.EFI_X86_64, iana.EFI_BC:
				return boot{file: l.efi}
			}
		}
	case http:
		for _, a := range archs(req) {
			if a == iana.EFI_X86_64_HTTP || a == iana.EFI_BC_HTTP {
				return boot{file: "http://" + server + "/ipxe/" + l.efi, http: true}
			}
		}
	default:
		return boot{}
	}
	return boot{note: fmt.Sprintf("firmware of kind %v is none that Platter boots (BIOS and UEFI on x86-64)", archs(req))}
}

// archs are the architectures a client claims: option 93, or what its class
// says (PXEClient:Arch:00007:UNDI:003016), or BIOS, as firmware older than RFC
// 4578 means.
func archs(req *dhcpv4.DHCPv4) []iana.Arch {
	if a := req.ClientArch(); len(a) > 0 {
		return a
	}
	if f := strings.Split(req.ClassIdentifier(), ":"); len(f) >= 3 && f[1] == "Arch" {
		if n, err := strconv.ParseUint(f[2], 10, 16); err == nil {
			return []iana.Arch{iana.Arch(n)}
		}
	}
	return []iana.Arch{iana.INTEL_X86PC}
}

// suboption finds an encapsulated option.
func suboption(b []byte, code byte) ([]byte, bool) {
	for len(b) > 0 {
		switch {
		case b[0] == 0:
			b = b[1:]
		case b[0] == 255 || len(b) < 2 || len(b) < 2+int(b[1]):
			return nil, false
		case b[0] == code:
			return b[2 : 2+int(b[1])], true
		default:
			b = b[2+int(b[1]):]
		}
	}
	return nil, false
}
