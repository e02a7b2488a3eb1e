package install

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"platter/provision"
)

// interfaceOf returns the name of the interface with that address, or "". A
// VLAN or bridge on top carries the same address: only real devices count.
func interfaceOf(root string, mac provision.MAC) string {
	dirs, _ := filepath.Glob(filepath.Join(root, "sys/class/net/*"))
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "address"))
		if err != nil || !strings.EqualFold(strings.TrimSpace(string(b)), string(mac)) {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, "device")); err == nil {
			return filepath.Base(dir)
		}
	}
	return ""
}

// carrierWait is how long a link may take to come up before it is used as it
// is: some drivers never tell.
const carrierWait = 15 * time.Second

// configure brings the interface up with one static address.
func configure(ctx context.Context, name string, addr netip.Prefix) error {
	if lo, err := netlink.LinkByName("lo"); err == nil {
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bring up lo: %w", err)
		}
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	updates, done := make(chan netlink.LinkUpdate, 16), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ListExisting: true}); err != nil {
		return fmt.Errorf("watch interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	ipnet := &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), 32)}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipnet}); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, addr, err)
	}
	limit := time.NewTimer(carrierWait)
	defer limit.Stop()
	for {
		select {
		case u, ok := <-updates:
			if !ok || u.Link.Attrs().Index == link.Attrs().Index && u.Link.Attrs().RawFlags&iffLowerUp != 0 {
				return nil
			}
		case <-limit.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// iffLowerUp is IFF_LOWER_UP of netdevice(7): the link has a carrier.
const iffLowerUp = 0x10000
