package load

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// Report is what a run has seen.
type Report struct {
	Began       time.Time `json:"began"`
	Seconds     float64   `json:"seconds"`     // of the whole run
	Interrupted bool      `json:"interrupted"` // ended before its time

	Users    int       `json:"users"`
	LoggedIn int       `json:"logged_in"` // users who were in when messages began
	Nodes    []AtNode  `json:"nodes"`
	Login    Spread    `json:"login"`   // time a log-in took
	Refused  []Trouble `json:"refused"` // log-ins that failed, also of users who got in later
	Broken   []Trouble `json:"broken"`  // sessions that ended by themselves
	Latency  Spread    `json:"latency"` // from sending a message until it arrived

	Sent       int `json:"sent"`
	Delivered  int `json:"delivered"`
	Lost       int `json:"lost"`       // sent, never arrived
	Returned   int `json:"returned"`   // of those, the ones that came back with an error
	Duplicates int `json:"duplicates"` // arrived once more
	Strays     int `json:"strays"`     // arrived at somebody else
	Skipped    int `json:"skipped"`    // never sent: sender or receiver was logged out
	Reconnects int `json:"reconnects"`

	// What the simulation itself took. LateMicros is by how much the latest
	// message was sent after its time: where it is not small beside the
	// latency, the machine that simulates is too slow to measure with.
	LateMicros    int64   `json:"late_us"`
	CPUSeconds    float64 `json:"cpu_seconds"`
	MemoryPerUser int64   `json:"memory_per_user"` // bytes
}

// AtNode counts the users of one node.
type AtNode struct {
	Node string `json:"node"`
	Home int    `json:"home"` // shall log in here first
	End  int    `json:"end"`  // were here at the end
}

// Spread describes durations, in microseconds. A percentile is the smallest of
// them that is not exceeded by that share of all (nearest rank).
type Spread struct {
	Count int   `json:"count"`
	P50   int64 `json:"p50_us"`
	P95   int64 `json:"p95_us"`
	P99   int64 `json:"p99_us"`
	Max   int64 `json:"max_us"`
}

// Trouble is something that went wrong at a node, and how often.
type Trouble struct {
	Node   string `json:"node"`
	Reason string `json:"reason"`
	Count  int    `json:"count"`
}

// Limits are what a run is judged by.
type Limits struct {
	P99  time.Duration // of the latency; 0: any
	Lost int           // messages
}

// Judge says what was not as it should be, a sentence each; nothing where all
// users got in, every message but Limits.Lost of them arrived, in time, once,
// at the right user.
func (r Report) Judge(l Limits) []string {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if r.Interrupted {
		say("the run was ended before its time")
	}
	if out := r.Users - r.LoggedIn; out > 0 {
		why := ""
		for _, t := range r.Refused {
			why += fmt.Sprintf("; %s: %s (%d times)", t.Node, t.Reason, t.Count)
		}
		say("%d of %d users could not log in%s", out, r.Users, why)
	}
	if r.Delivered == 0 {
		say("no message arrived, so nothing was measured")
	}
	if r.Lost > l.Lost {
		say("%d of %d messages did not arrive, %d of them were returned; allowed are %d", r.Lost, r.Sent, r.Returned, l.Lost)
	}
	if l.P99 > 0 && r.Latency.P99 > l.P99.Microseconds() {
		say("99%% of the messages arrived within %s, the limit is %s", short(r.Latency.P99), l.P99)
	}
	if r.Duplicates > 0 {
		say("%d messages arrived more than once", r.Duplicates)
	}
	if r.Strays > 0 {
		say("%d messages arrived at the wrong user", r.Strays)
	}
	for _, t := range r.Broken {
		say("%s: %d sessions broke: %s", t.Node, t.Count, t.Reason)
	}
	if r.Skipped > 0 {
		say("%d messages were not sent because sender or receiver was logged out", r.Skipped)
	}
	return wrong
}

// String is the report for people, in several lines.
func (r Report) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	var at []string
	for _, n := range r.Nodes {
		at = append(at, fmt.Sprintf("%s %d", n.Node, n.End))
	}
	row("users", "%d of %d logged in; at the end: %s", r.LoggedIn, r.Users, strings.Join(at, ", "))
	row("log-in", "%s", r.Login)
	row("message", "%s", r.Latency)
	row("messages", "%d sent, %d delivered, %d lost (%d returned), %d not sent, %d twice, %d astray",
		r.Sent, r.Delivered, r.Lost, r.Returned, r.Skipped, r.Duplicates, r.Strays)
	row("reconnects", "%d", r.Reconnects)
	for _, t := range r.Refused {
		row("refused", "%s: %s (%d times)", t.Node, t.Reason, t.Count)
	}
	for _, t := range r.Broken {
		row("broken", "%s: %s (%d times)", t.Node, t.Reason, t.Count)
	}
	row("simulation", "%.0f s, %.1f s of CPU, %d KiB a user, a message at most %s late", r.Seconds, r.CPUSeconds, r.MemoryPerUser>>10, short(r.LateMicros))
	w.Flush()
	return strings.TrimRight(b.String(), "\n")
}

func (s Spread) String() string {
	return fmt.Sprintf("p50 %s, p95 %s, p99 %s, max %s", short(s.P50), short(s.P95), short(s.P99), short(s.Max))
}

// short writes microseconds as milliseconds.
func short(micros int64) string {
	return strconv.FormatFloat(float64(micros)/1000, 'f', 1, 64) + " ms"
}

// tally counts while a run goes on.
type tally struct {
	Report  // its counters
	phase   Phase
	failed  int // log-ins
	logins  []time.Duration
	latency []time.Duration
	planned int // messages of the users who got in
	handled int // of those, sent or left out
	refused troubles
	broken  troubles
	late    time.Duration
	changed chan struct{} // closed when one of the counters of messages grows; nil where nobody waits
}

func (t *tally) handle() { t.handled++; t.change() }

func (t *tally) change() {
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}

type troubles map[Trouble]int

func (t *troubles) add(node, reason string) {
	if *t == nil {
		*t = troubles{}
	}
	(*t)[Trouble{Node: node, Reason: reason}]++
}

// list is never nil: JSON has a list then, too.
func (t troubles) list() []Trouble {
	out := []Trouble{}
	for k, n := range t {
		k.Count = n
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b Trouble) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(b.Count, a.Count), cmp.Compare(a.Reason, b.Reason))
	})
	return out
}

func (r *run) report(interrupted bool, at []int, memory int64, cpu time.Duration) Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.t.Report
	out.Began, out.Seconds, out.Interrupted = r.start, r.since().Seconds(), interrupted
	out.Users = len(r.users)
	for i, n := range r.Nodes {
		out.Nodes = append(out.Nodes, AtNode{Node: n.Name, Home: (len(r.users) + len(r.Nodes) - 1 - i) / len(r.Nodes), End: at[i]})
	}
	out.Login, out.Latency = spread(r.t.logins), spread(r.t.latency)
	out.Refused, out.Broken = r.t.refused.list(), r.t.broken.list()
	out.Lost = out.Sent - out.Delivered
	if !interrupted {
		for _, u := range r.users {
			out.Skipped += u.rounds()
		}
		out.Skipped -= out.Sent
	}
	out.LateMicros, out.CPUSeconds = r.t.late.Microseconds(), cpu.Seconds()
	out.MemoryPerUser = memory / int64(max(out.LoggedIn, 1))
	return out
}

func spread(all []time.Duration) Spread {
	if len(all) == 0 {
		return Spread{}
	}
	all = slices.Sorted(slices.Values(all))
	at := func(percent int) int64 { return all[(len(all)*percent+99)/100-1].Microseconds() }
	return Spread{Count: len(all), P50: at(50), P95: at(95), P99: at(99), Max: at(100)}
}

// resident is how much memory this process has, in bytes (proc(5), statm).
func resident() int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(f[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// cpuTime is what this process has used so far.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
