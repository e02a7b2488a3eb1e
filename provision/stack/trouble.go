package stack

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"platter/provision"
)

// Trouble is one thing that keeps this node's part of the service from working.
type Trouble struct {
	About string // of what it is; the same as long as it is the same trouble
	Text  string // one line: what is wrong, on which node, and what to do
}

// Doctor names what keeps this node's part of the service from working: the
// clock or the certificate, a port that is taken, a component that does not
// serve. It changes nothing.
type Doctor struct {
	plan  provision.Plan
	ahead func() (time.Duration, bool)

	mu    sync.Mutex
	since map[string]time.Time // component -> when it was first seen not to serve
}

// NewDoctor makes a Doctor. ahead tells how far the node's clock is ahead of the
// disc host's, and whether that is known.
func NewDoctor(plan provision.Plan, ahead func() (time.Duration, bool)) *Doctor {
	return &Doctor{plan: plan, ahead: ahead, since: map[string]time.Time{}}
}

// Look returns what is wrong now. A component counts once it has not served for
// that long; 0: at once. Of what follows from another trouble only the cause is
// told. It may be called at once from several goroutines.
func (d *Doctor) Look(ctx context.Context, patience time.Duration) []Trouble {
	d.mu.Lock()
	defer d.mu.Unlock()
	sec, err := Secrets("/")
	if err != nil {
		return nil // Bring gets them, or says why it cannot
	}
	pair, err := tls.X509KeyPair([]byte(sec.Cert), []byte(sec.Key))
	if err != nil {
		return nil // so here
	}
	ahead, known := d.ahead()
	if text := untimely(d.plan.Node, pair.Leaf, time.Now(), ahead, known); text != "" {
		return []Trouble{{"time", text}}
	}
	p, err := newProber(d.plan, sec)
	if err != nil {
		return nil
	}
	listeners := listening(ctx)
	var out []Trouble
	for _, c := range here(d.plan) {
		if taken := d.taken(c, listeners); taken != "" {
			out = append(out, Trouble{c.Name + " port", taken})
			continue
		}
		err := p.check(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			delete(d.since, c.Name)
			continue
		}
		if d.since[c.Name].IsZero() {
			d.since[c.Name] = time.Now()
		}
		cause := slices.ContainsFunc(c.Needs, func(need string) bool { return !d.since[need].IsZero() })
		if !cause && time.Since(d.since[c.Name]) >= patience {
			out = append(out, Trouble{c.Name, d.silent(ctx, c, err)})
		}
	}
	return out
}

// clockBound is how wrong a node's clock may be: logs of several nodes can still
// be read together.
const clockBound = time.Minute

// untimely says what is wrong with the node's clock or with its certificate by
// it. ahead counts if known.
func untimely(node string, cert *x509.Certificate, now time.Time, ahead time.Duration, known bool) string {
	const layout = "2006-01-02 15:04:05 MST"
	valid := !now.Before(cert.NotBefore) && !now.After(cert.NotAfter)
	switch {
	case known && ahead.Abs() > clockBound:
		which := "ahead of"
		if ahead < 0 {
			which = "behind"
		}
		text := fmt.Sprintf("the clock of node %s is %s %s the disc host's: it says %s instead of %s", node, span(ahead.Abs()), which,
			now.UTC().Format(layout), now.Add(-ahead).UTC().Format(layout))
		if !valid {
			text += ", and by that its certificate is not valid, so the other nodes and its own users are refused"
		}
		return text + fmt.Sprintf(". Set the one that is wrong, on the node with 'timedatectl set-time \"%s\"', then 'hwclock --systohc'", now.Add(-ahead).UTC().Format("2006-01-02 15:04:05"))
	case valid:
		return ""
	}
	text := fmt.Sprintf("the certificate of node %s expired on %s", node, cert.NotAfter.UTC().Format(layout))
	if now.Before(cert.NotBefore) {
		text = fmt.Sprintf("the certificate of node %s is valid from %s on only", node, cert.NotBefore.UTC().Format(layout))
	}
	if !known {
		return text + fmt.Sprintf("; the node's clock says %s. If that is wrong, set it with 'timedatectl set-time'; otherwise run 'platter node reinstall %s', which gives it a new one", now.UTC().Format(layout), node)
	}
	return text + fmt.Sprintf(", so the other nodes and users refuse it. Run 'platter node reinstall %s', which gives it a new one", node)
}

// span is a duration for people, of days where it is long.
func span(d time.Duration) string {
	if days := int(d.Hours() / 24); days >= 2 {
		return fmt.Sprintf("%d days", days)
	}
	return d.Round(time.Second).String()
}

// listener is a process that listens on a TCP port of this host.
type listener struct {
	address string // * or an IP address
	port    int
	program string
	pid     int
}

var listenerUser = regexp.MustCompile(`\("([^"]*)",pid=(\d+)`)

// listening are all that listen; none where ss(8) does not tell.
func listening(ctx context.Context) []listener {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ss", "-Hltnp").Output()
	if err != nil {
		return nil
	}
	return parseListeners(string(out))
}

func parseListeners(text string) (out []listener) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line) // state, waiting, backlog, address and port, peer, users
		if len(f) < 6 {
			continue
		}
		colon := strings.LastIndex(f[3], ":")
		if colon < 0 {
			continue
		}
		port, err := strconv.Atoi(f[3][colon+1:])
		if err != nil {
			continue
		}
		address, _, _ := strings.Cut(strings.Trim(f[3][:colon], "[]"), "%")
		if address == "0.0.0.0" || address == "::" {
			address = "*"
		}
		for _, user := range listenerUser.FindAllStringSubmatch(line, -1) {
			pid, _ := strconv.Atoi(user[2])
			out = append(out, listener{address, port, user[1], pid})
		}
	}
	return out
}

// taken says which port of the component something else has; empty: none.
func (d *Doctor) taken(c provision.PlacedComponent, all []listener) string {
	if contained(c) {
		return "" // who listens there is podman's
	}
	for _, p := range c.Ports {
		if p.UDP {
			continue
		}
		var stranger *listener
		own := false
		for _, l := range all {
			here := l.address == "*" || l.address == "127.0.0.1" || l.address == d.plan.Net.Address.Addr().String()
			switch {
			case l.port != p.Number || !here:
			case l.pid == 1 || d.ours(l.pid): // systemd listens for sockets
				own = true
			default:
				stranger = &l
			}
		}
		if stranger != nil && !own {
			command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", stranger.pid))
			said := strings.TrimSpace(strings.ReplaceAll(string(command), "\x00", " "))
			return fmt.Sprintf("%s cannot work on node %s: its port %d is taken by %s (process %d: %.120s). End that program or give it another port; %s then starts by itself",
				c.Name, d.plan.Node, p.Number, stranger.program, stranger.pid, said, c.Name)
		}
	}
	return ""
}

// ours tells whether a process belongs to a unit of this node's components.
func (d *Doctor) ours(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)) // cgroups(7)
	if err != nil {
		return true // it has ended, or cannot be blamed
	}
	for line := range strings.Lines(string(b)) {
		for part := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			name := strings.TrimSuffix(part, path.Ext(part))
			for _, c := range here(d.plan) {
				if part != name && slices.ContainsFunc(c.Units, func(u string) bool { return strings.TrimSuffix(u, path.Ext(u)) == name }) {
					return true
				}
			}
		}
	}
	return false
}

// silent says that the component does not serve, what it last complained of,
// and what to do.
func (d *Doctor) silent(ctx context.Context, c provision.PlacedComponent, why error) string {
	unit := c.Units[len(c.Units)-1]
	text := fmt.Sprintf("%s on node %s does not work since %s", c.Name, d.plan.Node, d.since[c.Name].UTC().Format("15:04:05 MST"))
	if _, err := os.Stat("/" + memberDir + c.Name); err != nil && slices.Contains(gated, c.Member) {
		return text + ": it has not found its part in its cluster yet. See that the other nodes are on and 'platter serve' runs; it goes on by itself"
	}
	if line := complaint(journal(ctx, unit)); line != "" {
		text += fmt.Sprintf("; %s says %q", unit, line)
	} else {
		text += ": " + why.Error()
	}
	text += fmt.Sprintf(". Look at 'journalctl -u %s' there", unit)
	switch {
	case len(c.Data) == 0:
	case len(c.Members) > 1:
		text += fmt.Sprintf("; if its data are damaged, 'platter node reinstall %s' gives it those of the other nodes", d.plan.Node)
	default:
		text += fmt.Sprintf("; if its data are damaged, 'platter node reinstall %s' and then 'platter stack restore FILE'", d.plan.Node)
	}
	return text
}

// journal is what the unit's own processes last said, oldest first.
func journal(ctx context.Context, unit string) string {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	out, _ := exec.CommandContext(ctx, "journalctl", "-q", "-b", "-n", "50", "-o", "cat", "--no-pager", "_SYSTEMD_UNIT="+unit).Output()
	return string(out)
}

var complains = regexp.MustCompile(`(?i)\b(emerg|fatal|panic|critical|error|fail(ed|ure)?|cannot|could not|denied|in use|invalid|no space|not exist)\b`)

// complaint is the last line that complains, or the last one; at most 300 bytes.
func complaint(journal string) string {
	last, found := "", ""
	for line := range strings.Lines(journal) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		last = line
		if complains.MatchString(line) {
			found = line
		}
	}
	if found == "" {
		found = last
	}
	if len(found) > 300 {
		found = strings.ToValidUTF8(found[:300], "")
	}
	return found
}
