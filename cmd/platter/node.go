package main

import (
	"context"
	"fmt"
	"io"
	"sort"
	"time"

	"github.com/spf13/cobra"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/rack"
)

// defaultSocket is where the disc host listens for operators.
const defaultSocket = "/run/platter/platter.sock"

// withOperator gives c the flag for the disc host's socket and returns a
// function that connects to it.
func withOperator(c *cobra.Command) func() *client.Operator {
	socket := c.PersistentFlags().String("socket", defaultSocket, "the disc host's socket")
	return func() *client.Operator { return client.NewOperator(*socket) }
}

func nodeCmd() *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "Show and steer nodes"}
	op := withOperator(c)

	var output string
	ls := &cobra.Command{
		Use: "ls", Short: "List all nodes, and machines that wait for approval", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			nodes, err := op().Nodes(c.Context())
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), nodes)
			}
			if err := printNodes(c.OutOrStdout(), nodes, time.Time{}, time.Now()); err != nil {
				return err
			}
			printTroubles(c.OutOrStdout(), nodes, time.Now())
			return nil
		},
	}
	show := &cobra.Command{
		Use: "show NAME", Short: "Show everything known about one node", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := op().Node(c.Context(), args[0])
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), s)
			}
			showNode(c.OutOrStdout(), s, time.Now())
			return nil
		},
	}
	for _, sub := range []*cobra.Command{ls, show} {
		tableOrJSON(sub, &output)
	}
	c.AddCommand(ls, show, ordersCmd(op), diagnoseCmd(op),
		&cobra.Command{
			Use: "log NAME", Short: "Print a node's journal: boots, grants, and what the node said", Args: cobra.ExactArgs(1),
			RunE: func(c *cobra.Command, args []string) error {
				return printLog(c.Context(), c.OutOrStdout(), op(), args[0])
			},
		},
		changeCmd(op, "reinstall NAME", "Raise the node's generation: its next network boot installs it anew", 1,
			func(ctx context.Context, o *client.Operator, args []string) (string, error) {
				s, err := o.Reinstall(ctx, args[0])
				return fmt.Sprintf("%s is due for install %d: boot it from the network now", s.Name, s.Generation), err
			}),
		changeCmd(op, "withdraw NAME", "Close an open grant: the node will not be installed", 1,
			func(ctx context.Context, o *client.Operator, args []string) (string, error) {
				s, err := o.Withdraw(ctx, args[0])
				return fmt.Sprintf("%s will not be installed", s.Name), err
			}),
		changeCmd(op, "approve MAC NAME", "Make a machine that waits the node NAME of the rack file, which has no MAC yet", 2,
			func(ctx context.Context, o *client.Operator, args []string) (string, error) {
				mac, err := rack.ParseMAC(args[0])
				if err != nil {
					return "", fmt.Errorf("%q %w", args[0], err)
				}
				s, err := o.Approve(ctx, args[1], mac)
				return fmt.Sprintf("%s is %s now and is due for install %d", mac, s.Name, s.Generation), err
			}),
	)
	return c
}

// tableOrJSON gives c the flag that chooses between people and programs.
func tableOrJSON(c *cobra.Command, output *string) {
	c.Flags().StringVarP(output, "output", "o", "table", "table or json")
	c.PreRunE = func(*cobra.Command, []string) error {
		if *output != "table" && *output != "json" {
			return fmt.Errorf("--output %s: must be table or json", *output)
		}
		return nil
	}
}

// changeCmd is a command that changes one thing and says what it did.
func changeCmd(op func() *client.Operator, use, short string, args int, change func(context.Context, *client.Operator, []string) (string, error)) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(args),
		RunE: func(c *cobra.Command, args []string) error {
			done, err := change(c.Context(), op(), args)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), done)
			return nil
		},
	}
}

func showNode(w io.Writer, s provision.State, now time.Time) {
	line := func(k, v string) {
		if v != "" {
			fmt.Fprintf(w, "%-14s %s\n", k, v)
		}
	}
	at := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.Local().Format("2006-01-02 15:04:05")
	}
	line("node", s.Name)
	line("slot", s.Slot)
	line("mac", string(s.MAC))
	line("address", s.Address)
	line("stage", stage(s, now))
	line("generation", fmt.Sprintf("%d granted, %d installed", s.Generation, s.Installed))
	line("boots now", string(provision.BootDecision(s).Action)+": "+provision.BootDecision(s).Why)
	if s.Phase != "" {
		line("phase", fmt.Sprintf("%s (%d/%d)", s.Phase, s.PhaseN, s.PhaseOf))
	}
	if s.Failure != nil {
		line("failure", s.Failure.Code+": "+s.Failure.Message)
		line("next", s.Failure.Next)
	}
	line("first boot", at(s.BootedAt))
	line("installed", at(s.InstalledAt))
	line("ready", at(s.ReadyAt))
	line("last seen", at(s.LastSeen))
	line("last line", s.LastLog)
	keys := make([]string, 0, len(s.Facts))
	for k := range s.Facts {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		line("fact "+k, s.Facts[k])
	}
}

func printLog(ctx context.Context, w io.Writer, op *client.Operator, name string) error {
	for after := int64(0); ; {
		events, err := op.Log(ctx, name, after)
		if err != nil || len(events) == 0 {
			return err
		}
		for _, e := range events {
			fmt.Fprintf(w, "%s  %s\n", e.Time.Local().Format("2006-01-02 15:04:05.000"), eventText(e))
			after = e.ID
		}
	}
}

// eventText is one event in words.
func eventText(e provision.Event) string {
	switch e.Kind {
	case provision.EventGrant:
		return fmt.Sprintf("grant: generation %d. %s", e.Generation, e.Detail)
	case provision.EventBoot:
		return fmt.Sprintf("boot request, answered with %s. %s", e.Action, e.Detail)
	case provision.EventOrder:
		return fmt.Sprintf("order %d given: %s", e.ID, e.Detail)
	case provision.EventOrderAccept:
		return e.Detail + " accepted"
	case provision.EventOrderWithdraw:
		return fmt.Sprintf("order %d withdrawn: %s", e.Order.ID, e.Detail)
	case provision.EventReport:
		r := e.Report
		switch {
		case r == nil:
			return "report"
		case r.Order != nil && r.Order.Failure != nil:
			return fmt.Sprintf("order %d FAILED %s: %s", r.Order.ID, r.Order.Failure.Code, r.Order.Failure.Error())
		case r.Order != nil:
			return fmt.Sprintf("order %d %s", r.Order.ID, r.Order.State)
		case r.Failure != nil:
			return "FAILED " + r.Failure.Code + ": " + r.Failure.Error()
		case r.Log != "":
			return r.Log
		case r.Stage != "":
			return "stage " + string(r.Stage)
		case len(r.Facts) > 0:
			return fmt.Sprintf("facts %v", r.Facts)
		}
		return "phase " + r.Phase
	}
	return fmt.Sprintf("%s. %s", e.Kind, e.Detail)
}
