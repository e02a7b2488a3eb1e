package install

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"

	"platter/provision"
)

// Life is what the initramfs was started for.
type Life string

const (
	LifeInstaller Life = "installer"
	LifeInventory Life = "inventory"
	// LifeDiscHost and LifeRescue are started from a disc, without a disc host.
	LifeDiscHost Life = "dischost"
	LifeRescue   Life = "rescue"
)

// Cmdline is our part of the kernel command line, written by the boot script or
// by the loader of a disc.
type Cmdline struct {
	Life  Life
	Do    string        // platter.do, of a disc host: another command about the disc than to serve from it
	URL   string        // platter.url: the node API, https by address
	Pin   string        // platter.pin: SHA-256 of the CA's key, hex
	Token string        // platter.token: worth one enrolment
	MAC   provision.MAC // platter.mac: the interface to use
	Addr  netip.Prefix  // platter.ip: its static address
}

// ParseCmdline reads /proc/cmdline. Every argument of ours must be there once
// and be right; those of others are left alone.
func ParseCmdline(line string) (Cmdline, error) {
	got := map[string]string{}
	for _, word := range strings.Fields(line) {
		key, value, ok := strings.Cut(word, "=")
		if !strings.HasPrefix(key, "platter.") {
			continue
		}
		if _, twice := got[key]; twice || !ok || value == "" {
			return Cmdline{}, fmt.Errorf("kernel argument %s is given twice or without a value: start the machine again over the network", key)
		}
		got[key] = value
	}
	c := Cmdline{Life: Life(got["platter.life"]), URL: got["platter.url"], Pin: got["platter.pin"], Token: got["platter.token"]}
	bad := func(key, why string) (Cmdline, error) {
		return Cmdline{}, fmt.Errorf("kernel argument platter.%s %s: start the machine again over the network", key, why)
	}
	switch c.Life {
	case LifeInstaller, LifeInventory:
	case LifeDiscHost, LifeRescue:
		if c.Do = got["platter.do"]; c.Do != "" && c.Do != "verify" {
			return bad("do", fmt.Sprintf("is %q and not verify", c.Do))
		}
		return c, nil
	default:
		return bad("life", fmt.Sprintf("is %q and none of installer, inventory, dischost, rescue", c.Life))
	}
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "https" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return bad("url", "is not https://ADDRESS:PORT")
	}
	if _, err := netip.ParseAddrPort(u.Host); err != nil {
		return bad("url", "does not name an address and a port")
	}
	if b, err := hex.DecodeString(c.Pin); err != nil || len(b) != 32 {
		return bad("pin", "is not a SHA-256 in hex")
	}
	if b, err := hex.DecodeString(c.Token); err != nil || len(b) < 16 || len(b) > 64 {
		return bad("token", "is not a token in hex")
	}
	hw, err := net.ParseMAC(got["platter.mac"])
	if err != nil || len(hw) != 6 {
		return bad("mac", "is not an Ethernet address")
	}
	c.MAC = provision.MAC(hw.String())
	if c.Addr, err = netip.ParsePrefix(got["platter.ip"]); err != nil || !c.Addr.Addr().Is4() || c.Addr.Bits() == 0 {
		return bad("ip", "is not an IPv4 address with a prefix length")
	}
	return c, nil
}
