package stack

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"platter/hostprep"
	"platter/provision"
)

// memberDir has a file for every component whose instance on this node may
// start. What it holds is up to the component.
const memberDir = "var/lib/platter/member/"

// gated components do not start before this node has found its part in their
// cluster: alone they would begin one of their own.
var gated = []provision.MemberKind{provision.MemberEtcd, provision.MemberPatroni, provision.MemberRabbitMQ}

// order is the drop-in that lets a unit of c start, by itself at every boot,
// when what it needs on this node is healthy.
func order(plan provision.Plan, c provision.PlacedComponent, unit string) string {
	var after, wait []string
	for _, need := range here(plan) {
		if slices.Contains(c.Needs, need.Name) {
			after = append(after, need.Units...)
			wait = append(wait, need.Name)
		}
	}
	// Units of one component start in their order; a manifest orders its own.
	if !contained(c) {
		after = append(after, c.Units[:slices.Index(c.Units, unit)]...)
	}
	service := strings.HasSuffix(unit, ".service")
	if !service {
		after = nil // sockets come before every service: systemd would break the cycle anywhere
	}
	var s strings.Builder
	s.WriteString("# Written by Platter.\n[Unit]\n")
	if len(after) > 0 {
		fmt.Fprintf(&s, "After=%s\n", strings.Join(after, " "))
	}
	fmt.Fprintf(&s, "# There while the component is changed.\nConditionPathExists=!/%s%s\n", holdDir, c.Name)
	if slices.Contains(gated, c.Member) {
		fmt.Fprintf(&s, "# The agent makes it once this node has its part in the cluster.\nConditionPathExists=/%s%s\n", memberDir, c.Name)
	} else if contained(c) {
		fmt.Fprintf(&s, "# The agent makes it once the container images are there.\nConditionPathExists=/%s%s\n", memberDir, c.Name)
	}
	if !service {
		return s.String()
	}
	s.WriteString(`# Others may be away for long: it is tried until they are back.
StartLimitIntervalSec=0

[Service]
Restart=always
RestartSec=2
TimeoutStartSec=infinity
`)
	for _, name := range wait {
		fmt.Fprintf(&s, "ExecStartPre=+%s stack-wait %s\n", hostprep.NodeSelf[0], name)
	}
	if c.Member == provision.MemberEjabberd && plan.Node != c.Members[0] {
		fmt.Fprintf(&s, "# Two that make the database's tables at the same time fail.\nExecStartPre=+%s stack-founded %s\n", hostprep.NodeSelf[0], c.Name)
	}
	return s.String()
}

// Founded returns when another node serves the component, or at once where this
// node has been its member before. It waits for a few minutes only: the others
// may be away.
func Founded(ctx context.Context, plan provision.Plan, component string) error {
	if _, err := os.Stat("/" + markerFile); err == nil {
		return nil
	}
	view := provision.ViewOf(plan, provision.StackSecrets{})
	hosts, err := view.Members(component)
	if err != nil {
		return err
	}
	port, err := view.Port(component, "xmpp")
	if err != nil {
		return err
	}
	for began := time.Now(); time.Since(began) < 10*time.Minute; {
		for _, h := range hosts {
			if h.Name == plan.Node {
				continue
			}
			if greets(ctx, netip.AddrPortFrom(h.Address, uint16(port)), plan.Stack.Domain) {
				return nil
			}
		}
		if err := provision.Sleep(ctx, time.Second); err != nil {
			return err
		}
	}
	return nil
}

// greets tells whether an XMPP server opens a stream at addr (RFC 6120, 4.2). That
// somebody listens there says little: ejabberd does so long before it has made its
// tables, and answers when it has started.
func greets(ctx context.Context, addr netip.AddrPort, domain string) bool {
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprintf(conn, "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='%s'>", domain)
	n, _ := conn.Read(make([]byte, 1))
	return n > 0
}

// Wait returns when the component, which this node has, is healthy. Now and
// then it says on log what it waits for.
func Wait(ctx context.Context, plan provision.Plan, sec provision.StackSecrets, component string, log io.Writer) error {
	i := slices.IndexFunc(here(plan), func(c provision.PlacedComponent) bool { return c.Name == component })
	if i < 0 {
		return fmt.Errorf("node %s has no component %q", plan.Node, component)
	}
	c := here(plan)[i]
	p, err := newProber(plan, sec)
	if err != nil {
		return err
	}
	said := time.Now()
	for n := 0; ; n++ {
		err := p.check(ctx, c)
		if err == nil {
			return nil
		}
		if time.Since(said) > time.Minute {
			said = time.Now()
			fmt.Fprintf(log, "waiting for %s: %v\n", component, err)
		}
		if err := provision.Sleep(ctx, min(250*time.Millisecond<<min(n, 3), 2*time.Second)); err != nil {
			return err
		}
	}
}
