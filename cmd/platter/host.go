package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/spf13/cobra"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
)

// hostCmd is the command that platter-node has too: it reads its own flags.
func hostCmd() *cobra.Command {
	c := &cobra.Command{
		Use:                "host check|apply|repair|undo|handover",
		Short:              "Prepare this host: kernel settings, Open vSwitch, libvirt, and their order; hand the rack over to a node",
		Long:               hostcmd.Usage + handoverUsage,
		DisableFlagParsing: true,
		RunE: func(c *cobra.Command, args []string) error {
			code := hostcmd.Run(c.Context(), args, hostcmd.Env{Rack: hostOfRack, Stdout: c.OutOrStdout(), Stderr: c.ErrOrStderr()})
			if code != 0 {
				return said(code)
			}
			return nil
		},
	}
	c.AddCommand(handoverCmd())
	return c
}

// said ends the program with this code; why was said already.
type said int

func (s said) Error() string { return fmt.Sprintf("exit code %d", int(s)) }

// hostOfRack is what a rack file says about this host. Without a node's name
// it is the node that has one of the host's addresses, if there is one.
func hostOfRack(file, name string) (hostcmd.Target, error) {
	r, err := loadRack(file)
	if err != nil {
		return hostcmd.Target{}, err
	}
	t := hostcmd.Target{Spec: r.Host}
	node, ok := r.NodeByName(name)
	switch {
	case !ok && name != "":
		return t, fmt.Errorf("%s has no node %s", file, name)
	case !ok:
		if node, ok = nodeOfAddresses(r); !ok {
			return t, nil
		}
	}
	plan, err := provision.PlanFor(r, node, node.MAC, 0, provision.ImageRef{})
	if err != nil {
		return t, err
	}
	t.Reach = hostprep.ReachOf(plan)
	return t, nil
}

func nodeOfAddresses(r *provision.Rack) (provision.Node, bool) {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		for _, n := range r.Nodes {
			if n.Address == p.Addr() {
				return n, true
			}
		}
	}
	return provision.Node{}, false
}
