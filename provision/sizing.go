package provision

import (
	"fmt"
	"strings"
)

// Sizing is how the stack of a node is dimensioned, for the templates of its
// configuration and to tell whether the machines are large enough. Sizes are in
// bytes. It counts every component, also those that are optional.
type Sizing struct {
	Users       int `json:"users"` // of the whole service
	Nodes       int `json:"nodes"`
	Connections int `json:"connections"` // that one node must be able to bear
	CPUs        int `json:"cpus"`
	Backlog     int `json:"backlog"` // of connections that a listener has not accepted yet
	Files       int `json:"files"`   // open files of a service that users connect to: LimitNOFILE
	Proxy       int `json:"proxy"`   // connections to the database through the node's own way to it

	Ejabberd   EjabberdSizing   `json:"ejabberd"`
	PostgreSQL PostgreSQLSizing `json:"postgresql"`
	Etcd       EtcdSizing       `json:"etcd"`
	Nginx      NginxSizing      `json:"nginx"`
	RabbitMQ   RabbitMQSizing   `json:"rabbitmq"`

	Host    int64 `json:"host"`    // memory that is not the stack's
	Memory  int64 `json:"memory"`  // of all these together
	System  int64 `json:"system"`  // disk: the installed system, journal, logs
	Archive int64 `json:"archive"` // disk: messages
	Uploads int64 `json:"uploads"` // disk: users' files
	Disk    int64 `json:"disk"`    // all of it, with what must stay free
}

// EjabberdSizing is for ejabberd and its Erlang machine.
type EjabberdSizing struct {
	Memory    int64 `json:"memory"`
	Ports     int   `json:"ports"`     // ERL_MAX_PORTS
	Processes int   `json:"processes"` // ERL_PROCESSES
	SQLPool   int   `json:"sql_pool"`  // sql_pool_size
}

// PostgreSQLSizing is for postgresql.conf.
type PostgreSQLSizing struct {
	Memory         int64 `json:"memory"` // of the server with all its connections
	SharedBuffers  int64 `json:"shared_buffers"`
	WorkMem        int64 `json:"work_mem"`
	MaxConnections int   `json:"max_connections"`
	MaxWAL         int64 `json:"max_wal"` // max_wal_size
}

// EtcdSizing is for etcd.
type EtcdSizing struct {
	Memory int64 `json:"memory"`
	Quota  int64 `json:"quota"` // quota-backend-bytes
}

// NginxSizing is for nginx.
type NginxSizing struct {
	Memory            int64 `json:"memory"`
	WorkerConnections int   `json:"worker_connections"` // for one worker that gets all
}

// RabbitMQSizing is for RabbitMQ.
type RabbitMQSizing struct {
	Memory    int64 `json:"memory"`
	Watermark int64 `json:"watermark"` // vm_memory_high_watermark.absolute
	DiskFree  int64 `json:"disk_free"` // disk_free_limit.absolute
}

// What users are taken to do. Nobody has measured the owner of the rack: these
// are assumptions, on the safe side for people who write at work.
const (
	messagesPerDay = 50        // that a user writes, on each of 7 days
	bytesPerCopy   = 1536      // of a message in the archive: 300 bytes of text, its XML, the row, three indexes
	copies         = 2         // one for the sender, one for the receiver
	daysKept       = 90        // in the archive
	filesPerUser   = 10 << 20  // bytes that are kept
	returnWithin   = 300       // seconds in which all users come back after a power cut
	loginsPerCPU   = 16        // log-ins a second that one CPU bears; seen: 10 ms of CPU each in ejabberd 24.12, with TLS and SCRAM; six times that with the database, a proxy and slower machines
	sessionMemory  = 256 << 10 // bytes of one user in ejabberd; seen: 64 to 101 KiB for one who does little
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// SizingFor dimensions the stack for so many users on so many nodes, all alike.
// A plan that names no users has DefaultUsers.
func SizingFor(users, nodes int) Sizing {
	if users < 1 {
		users = DefaultUsers
	}
	nodes = max(nodes, 1)
	// All users must fit on the nodes that remain when one fails.
	remain := max(nodes-1, 1)
	n := (users + remain - 1) / remain
	n64 := int64(n)
	s := Sizing{Users: users, Nodes: nodes, Connections: n}

	// One for the host, the rest, rounded, for a mass reconnect.
	s.CPUs = 1 + (n+returnWithin*loginsPerCPU/2)/(returnWithin*loginsPerCPU)
	// listen(2) caps it at net.core.somaxconn: 4096 in the profile base, 8192 in
	// messaging (hostprep/profile). A second's worth of returning users fits many
	// times over.
	s.Backlog = 4096
	if n > 10_000 {
		s.Backlog = 8192
	}
	// A connection is one socket; a proxied one is two. The hard limit in the
	// profiles is 1,048,576.
	s.Files = powerOfTwo(2*n + 8192)

	s.Ejabberd = EjabberdSizing{
		// Seen: 100 MiB of an ejabberd 24.12 without users.
		Memory: 150*mib + n64*sessionMemory,
		// Two to three ports a connection (Erlang counts sockets, files and
		// drivers); 131,072 is what Platter has always set.
		Ports: powerOfTwo(max(3*n+8192, 131072)),
		// Seen: one process a connection, a second while it is busy; 262,144 is
		// Erlang's own default (erl(1), +P).
		Processes: powerOfTwo(max(4*n, 262144)),
		// ejabberd's default is 10 (sql_pool_size). A query takes about a
		// millisecond, so a connection bears a few hundred users.
		SQLPool: min(max(n/250, 8), 40),
	}
	pg := PostgreSQLSizing{
		// What is asked for most are the last hours of the archive; not under
		// PostgreSQL's default of 128 MiB, and not over 8 GiB, beyond which the
		// kernel's cache does as well (PostgreSQL 17, 19.4.1).
		SharedBuffers: min(max(int64(users)*100*kib, 128*mib), 8*gib),
		WorkMem:       4 * mib, // the default: queries of ejabberd go over indexes and sort little
		// The pools of all nodes meet on the primary, those of one more too: it may
		// come later, and this setting stays as the cluster was made with it. 15
		// more for Patroni, backup, people and superuser_reserved_connections.
		MaxConnections: (nodes+1)*s.Ejabberd.SQLPool + 15,
		MaxWAL:         gib, // the default
	}
	// A backend takes about 2 MiB of its own beside its work_mem; 64 MiB for
	// autovacuum (maintenance_work_mem's default) and 32 MiB for Patroni.
	pg.Memory = pg.SharedBuffers + int64(pg.MaxConnections)*(2*mib+pg.WorkMem) + 96*mib
	s.PostgreSQL = pg
	// The node's own pool, twice while a primary that has gone is given up.
	s.Proxy = 2*s.Ejabberd.SQLPool + 16
	// Patroni's few keys; etcd.io's hardware page has 8 GiB for a typical
	// cluster, which has a hundred thousand times as many.
	s.Etcd = EtcdSizing{Memory: 96 * mib, Quota: 256 * mib}
	s.Nginx = NginxSizing{
		// Two buffers of 16 KiB a proxied connection (proxy_buffer_size of the
		// stream module) and OpenSSL's. As if every user came through it.
		Memory:            16*mib + n64*64*kib,
		WorkerConnections: 2*n + 1024,
	}
	// Services speak through it, not users. The limit is where publishers are
	// stopped; Erlang's garbage collection may for a moment need as much again
	// (rabbitmq.com/docs/memory).
	watermark := min(96*mib+n64*8*kib, gib)
	s.RabbitMQ = RabbitMQSizing{Memory: 2 * watermark, Watermark: watermark, DiskFree: max(2*watermark, 256*mib)}

	// Kernel, systemd, Open vSwitch, libvirt, the agent. Seen: 300 MiB.
	s.Host = 384 * mib
	s.Memory = s.Host + s.Ejabberd.Memory + pg.Memory + s.Etcd.Memory + s.Nginx.Memory + s.RabbitMQ.Memory

	// Two versions of the system's packages during an upgrade, and a gibibyte of
	// journal, logs and the like. Seen: 600 MiB for one.
	s.System = 2*gib + gib/2
	s.Archive = int64(users) * messagesPerDay * copies * bytesPerCopy * daysKept
	s.Uploads = n64 * filesPerUser // files stay on the node that took them
	used := s.System + s.Archive + s.Uploads + pg.MaxWAL + s.Etcd.Quota + s.RabbitMQ.DiskFree
	s.Disk = used + used/8 // file systems slow down when they are full; alarms come first
	return s
}

func powerOfTwo(atLeast int) int {
	n := 1
	for n < atLeast {
		n *= 2
	}
	return n
}

// Machine is what a node has.
type Machine struct {
	Node   string `json:"node"`
	CPUs   int    `json:"cpus"`
	Memory int64  `json:"memory"` // bytes, as the kernel counts them (MemTotal)
	Disk   int64  `json:"disk"`   // bytes of the disk that the system is on
}

// Misfits says what is too small for s, a sentence each; nothing where all
// machines are large enough.
func (s Sizing) Misfits(machines []Machine) []string {
	var out []string
	short := func(m Machine, has, needs, what string) {
		out = append(out, fmt.Sprintf("%s has %s, the stack for %s %s on %d %s needs %s: add %s or choose a smaller licence", m.Node, has,
			thousands(s.Users), plural(s.Users, "user"), s.Nodes, plural(s.Nodes, "node"), needs, what))
	}
	// A kernel keeps some of a machine's memory to itself: one of 2 GiB shows 1.9.
	const kept = 16 // a sixteenth
	for _, m := range machines {
		if need := s.CPUs; m.CPUs < need {
			short(m, fmt.Sprintf("%d %s", m.CPUs, plural(m.CPUs, "CPU")), fmt.Sprint(need), "CPUs")
		}
		if m.Memory < s.Memory {
			short(m, gibibytes(m.Memory, false)+" of memory", gibibytes(s.Memory+s.Memory/kept, true), "memory")
		}
		if m.Disk < s.Disk {
			short(m, gibibytes(m.Disk, false)+" of disk", gibibytes(s.Disk, true), "disk")
		}
	}
	return out
}

func plural(n int, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}

// gibibytes rounds down what there is and up what is needed.
func gibibytes(n int64, up bool) string {
	tenths := n * 10 / gib
	if up && n*10%gib != 0 {
		tenths++
	}
	return fmt.Sprintf("%d.%d GiB", tenths/10, tenths%10)
}

// thousands writes 10000 as 10,000.
func thousands(n int) string {
	s := fmt.Sprint(n)
	var parts []string
	for len(s) > 3 {
		parts = append([]string{s[len(s)-3:]}, parts...)
		s = s[:len(s)-3]
	}
	return strings.Join(append([]string{s}, parts...), ",")
}
