package stack

import (
	"net/netip"
	"testing"

	"platter/provision"
	"platter/provision/site"
)

// openSite is a site that has just been made.
func openSite(t *testing.T) *site.Site {
	t.Helper()
	s, err := site.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// secretsOf are what a node of the site gets; one password is hard to quote.
func secretsOf(t *testing.T, s *site.Site, node, addr string) provision.StackSecrets {
	t.Helper()
	sec, err := s.StackSecrets(provision.Plan{Node: node, Stack: provision.StackPlan{Domain: "im.test"},
		Net: provision.NodeNet{Address: netip.PrefixFrom(netip.MustParseAddr(addr), 24)}})
	if err != nil {
		t.Fatal(err)
	}
	sec.Probes[1].Password += ` needs 'quoting' " \ `
	return sec
}

func testSecrets(t *testing.T) provision.StackSecrets {
	t.Helper()
	return secretsOf(t, openSite(t), "node2", "10.1.2.3")
}
