package provision

import (
	"fmt"
	"strings"
	"testing"
)

func TestSizing(t *testing.T) {
	for _, c := range []struct {
		users, nodes int
		connections  int
		fits         Machine // the smallest of a usual kind that is large enough
		tooSmall     Machine // and one that is not, in everything that it names
	}{
		{100, 1, 100, Machine{CPUs: 1, Memory: 1900 * mib, Disk: 8 * gib}, Machine{Memory: 900 * mib, Disk: 4 * gib}},
		{100, 3, 50, Machine{CPUs: 1, Memory: 1900 * mib, Disk: 8 * gib}, Machine{Memory: 900 * mib, Disk: 4 * gib}},
		{1000, 1, 1000, Machine{CPUs: 1, Memory: 3900 * mib, Disk: 40 * gib}, Machine{Memory: 900 * mib, Disk: 8 * gib}},
		{1000, 3, 500, Machine{CPUs: 1, Memory: 3900 * mib, Disk: 40 * gib}, Machine{Memory: 900 * mib, Disk: 8 * gib}},
		{10_000, 1, 10_000, Machine{CPUs: 4, Memory: 16 * gib, Disk: 400 * gib}, Machine{Memory: 3900 * mib, Disk: 40 * gib}},
		{10_000, 3, 5000, Machine{CPUs: 2, Memory: 8 * gib, Disk: 400 * gib}, Machine{Memory: 3900 * mib, Disk: 40 * gib}},
		{10_000, 5, 2500, Machine{CPUs: 2, Memory: 8 * gib, Disk: 400 * gib}, Machine{Memory: 1900 * mib, Disk: 40 * gib}},
		{MaxUsers, 1, 100_000, Machine{CPUs: 24, Memory: 64 * gib, Disk: 4000 * gib}, Machine{CPUs: 4, Memory: 16 * gib, Disk: 400 * gib}},
		{MaxUsers, 5, 25_000, Machine{CPUs: 8, Memory: 32 * gib, Disk: 4000 * gib}, Machine{CPUs: 1, Memory: 8 * gib, Disk: 400 * gib}},
	} {
		s := SizingFor(c.users, c.nodes)
		name := fmt.Sprintf("%d users on %d nodes", c.users, c.nodes)
		t.Logf("%s: %d CPUs, %s of memory (ejabberd %d MiB, PostgreSQL %d, nginx %d, RabbitMQ %d), %s of disk (archive %s, files %s)", name, s.CPUs,
			gibibytes(s.Memory, true), s.Ejabberd.Memory/mib, s.PostgreSQL.Memory/mib, s.Nginx.Memory/mib, s.RabbitMQ.Memory/mib,
			gibibytes(s.Disk, true), gibibytes(s.Archive, true), gibibytes(s.Uploads, true))
		if s.Connections != c.connections {
			t.Errorf("%s: %d connections, want %d", name, s.Connections, c.connections)
		}
		if s.Ejabberd.Ports < 3*s.Connections || s.Ejabberd.Ports < 131072 || s.Files < 2*s.Connections || s.Files > 1<<20 || s.Ejabberd.Processes < 2*s.Connections {
			t.Errorf("%s: limits: %+v", name, s)
		}
		if pg := s.PostgreSQL; pg.MaxConnections < c.nodes*s.Ejabberd.SQLPool+10 || pg.SharedBuffers < 128*mib || pg.SharedBuffers > 8*gib || pg.Memory < pg.SharedBuffers {
			t.Errorf("%s: PostgreSQL: %+v", name, pg)
		}
		if sum := s.Host + s.Ejabberd.Memory + s.PostgreSQL.Memory + s.Etcd.Memory + s.Nginx.Memory + s.RabbitMQ.Memory; s.Memory != sum {
			t.Errorf("%s: %d bytes of memory, the sum is %d", name, s.Memory, sum)
		}
		if wrong := s.Misfits([]Machine{c.fits, c.fits}); len(wrong) != 0 {
			t.Errorf("%s does not fit: %q", name, wrong)
		}
		want := 2
		if c.tooSmall.CPUs == 0 {
			c.tooSmall.CPUs = c.fits.CPUs
		} else {
			want = 3
		}
		if wrong := s.Misfits([]Machine{c.fits, c.tooSmall}); len(wrong) != want {
			t.Errorf("%s: %d sentences, want %d: %q", name, len(wrong), want, wrong)
		}
	}
}

// More users never need less, and more nodes never need more of each.
func TestSizingGrows(t *testing.T) {
	for nodes := 1; nodes <= 16; nodes++ {
		last := Sizing{}
		for users := 1; users <= MaxUsers; users += 1 + users/3 {
			s := SizingFor(users, nodes)
			if s.Memory < last.Memory || s.Disk < last.Disk || s.CPUs < last.CPUs || s.Files < last.Files || s.Backlog < last.Backlog ||
				s.Ejabberd.Ports < last.Ejabberd.Ports || s.PostgreSQL.SharedBuffers < last.PostgreSQL.SharedBuffers {
				t.Errorf("%d users on %d nodes need less than %d do", users, nodes, last.Users)
			}
			if more := SizingFor(users, nodes+1); nodes > 1 && more.Ejabberd.Memory > s.Ejabberd.Memory {
				t.Errorf("%d users: ejabberd needs more on %d nodes than on %d", users, nodes+1, nodes)
			}
			last = s
		}
	}
}

// A lab's VM shows a little less than the 2 GiB that it was given.
func TestTheDefaultFitsALab(t *testing.T) {
	for nodes := range 6 {
		if wrong := SizingFor(DefaultUsers, nodes).Misfits([]Machine{{"node1", 1, 1850 * mib, 8 * gib}}); len(wrong) != 0 {
			t.Errorf("%d nodes: %q", nodes, wrong)
		}
	}
}

func TestMisfits(t *testing.T) {
	s := SizingFor(1000, 3)
	s.CPUs, s.Memory, s.Disk = 2, 3*gib, 20*gib
	got := strings.Join(s.Misfits([]Machine{{"node1", 1, 2*gib - 1, 30 * gib}, {"node2", 2, 3 * gib, 20*gib - 1}}), "\n")
	want := `node1 has 1 CPU, the stack for 1,000 users on 3 nodes needs 2: add CPUs or choose a smaller licence
node1 has 1.9 GiB of memory, the stack for 1,000 users on 3 nodes needs 3.2 GiB: add memory or choose a smaller licence
node2 has 19.9 GiB of disk, the stack for 1,000 users on 3 nodes needs 20.0 GiB: add disk or choose a smaller licence`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
