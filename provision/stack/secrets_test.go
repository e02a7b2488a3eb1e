package stack

import (
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

// secretsOf are what the plan's node gets of the site; one password is hard to
// quote.
func secretsOf(t *testing.T, s *site.Site, plan provision.Plan) provision.StackSecrets {
	t.Helper()
	sec, err := s.StackSecrets(plan)
	if err != nil {
		t.Fatal(err)
	}
	sec.Probes[1].Password += ` needs 'quoting' " \ `
	return sec
}

func testSecrets(t *testing.T) provision.StackSecrets {
	t.Helper()
	return secretsOf(t, openSite(t), testPlan(t))
}
