package stackfile

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"platter/provision"
)

// The built-in stack's files follow from the number of users, and fit each
// other: what ejabberd on all nodes opens, the proxy and PostgreSQL take.
func TestSizes(t *testing.T) {
	s, err := Default()
	if err != nil {
		t.Fatal(err)
	}
	rendered := func(users int) func(path, pattern string) int {
		r := &provision.Rack{Name: "r", Networks: []provision.Network{{Subnet: netip.MustParsePrefix("10.0.0.0/24"), DiscHost: netip.MustParseAddr("10.0.0.1")}},
			Stack: provision.StackSpec{Domain: "im.example.org", Users: users}}
		for i := range 3 {
			r.Nodes = append(r.Nodes, provision.Node{Name: fmt.Sprintf("n%d", i+1), Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(11 + i)})})
		}
		if r.Stack.Components, err = s.Place(r.Nodes, nil); err != nil {
			t.Fatal(err)
		}
		plan, err := provision.PlanFor(r, r.Nodes[0], "", 1, provision.ImageRef{})
		if err != nil {
			t.Fatal(err)
		}
		sec := provision.StackSecrets{Named: map[string]string{}}
		for _, n := range plan.NamedSecrets() {
			sec.Named[n.Name] = "x"
		}
		files := map[string]string{}
		for _, c := range plan.Stack.Components {
			for _, f := range c.Files {
				if files[f.Path], err = provision.ViewOf(plan, sec).Render(f.Path, f.Template); err != nil {
					t.Fatal(err)
				}
			}
		}
		return func(path, pattern string) int {
			t.Helper()
			m := regexp.MustCompile(`(?m)` + pattern).FindStringSubmatch(files[path])
			if m == nil {
				t.Fatalf("%d users: %s has no %s", users, path, pattern)
			}
			n, err := strconv.Atoi(strings.TrimSpace(m[1]))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	var last []int
	for _, users := range []int{100, 10_000, 100_000} {
		get := rendered(users)
		pool := get("/etc/ejabberd/ejabberd.yml", `^sql_pool_size: (\d+)$`)
		most := get("/etc/patroni/config.yml", `max_connections: (\d+)$`)
		if 3*pool > most-10 {
			t.Errorf("%d users: three pools of %d, PostgreSQL takes %d", users, pool, most)
		}
		if proxy := get("/etc/haproxy/haproxy.cfg", `maxconn (\d+)$`); proxy < pool+2 {
			t.Errorf("%d users: a pool of %d, the proxy takes %d", users, pool, proxy)
		}
		files := get("/etc/systemd/system/ejabberd.service.d/platter.conf", `^LimitNOFILE=(\d+)$`)
		ports := get("/etc/default/ejabberd", `^ERL_MAX_PORTS=(\d+)$`)
		if files < users/2+pool || ports < users/2*3 {
			t.Errorf("%d users, half of them here: %d files, %d ports", users, files, ports)
		}
		get("/etc/ejabberd/ejabberd.yml", `backlog: (\d+)$`)
		get("/etc/default/etcd", `^ETCD_QUOTA_BACKEND_BYTES=(\d+)$`)
		now := []int{pool, most, files, get("/etc/patroni/config.yml", `shared_buffers: (\d+)MB$`)}
		for i := range last {
			if now[i] <= last[i] {
				t.Errorf("%d users get %v, fewer %v", users, now, last)
				break
			}
		}
		last = now
	}
}
