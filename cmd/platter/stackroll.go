package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"platter/provision"
	"platter/provision/client"
)

// rollCmds take the rack to another release of the stack.
func rollCmds(op func() *client.Operator) []*cobra.Command {
	var ask provision.RollRequest
	var dry, watch bool
	var patience time.Duration
	var output string
	run := func(c *cobra.Command, args []string) error {
		ask.Release, ask.Patience = strings.Join(args, ""), int((patience+time.Second-1)/time.Second)
		if watch {
			return followRoll(c.Context(), op(), c.OutOrStdout())
		}
		if dry {
			plans, err := op().PlanRoll(c.Context(), ask)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), plans)
			}
			return printRollPlans(c.OutOrStdout(), plans)
		}
		if _, err := op().Roll(c.Context(), ask); err != nil {
			return err
		}
		return followRoll(c.Context(), op(), c.OutOrStdout())
	}
	const how = `
One node after the other: what changes on it is stopped, packages and files are
replaced, everything is started and has to be healthy, and every probe has to
pass between it and another node. The node whose database takes the writes is
the last; it hands them over first. A node on which that fails goes back by
itself, and those before it are taken back, in reverse order.

Once it has begun it goes on without this command, also after a restart of the
disc host or a power cut of a node. --watch shows it again.

Exit codes: 0 every node runs the release, 1 it did not come to that.`
	upgrade := &cobra.Command{Use: "upgrade [VERSION]", Short: "Take the rack to another release that its nodes have staged, node by node", Args: cobra.MaximumNArgs(1),
		Long: "Take the rack to the release of that version (or with that beginning of a digest),\nor to the only one that the nodes have staged and do not all run.\n" + how,
		RunE: run}
	rollback := &cobra.Command{Use: "rollback", Short: "Take the rack back to the release before, node by node", Args: cobra.NoArgs,
		Long: "Take the rack back to the release that it ran before. Accounts and messages\nstay: the database is touched by nothing but the stack file's commands.\n" + how,
		RunE: func(c *cobra.Command, args []string) error {
			ask.Rollback = true
			return run(c, args)
		}}
	for _, sub := range []*cobra.Command{upgrade, rollback} {
		sub.Flags().BoolVar(&dry, "dry-run", false, "only show what would change on each node")
		sub.Flags().BoolVar(&watch, "watch", false, "show the last one, which may be under way, and begin none")
		sub.Flags().BoolVar(&ask.NoWayBack, "no-way-back", false, "go even if the packages that run now are in no release on the node")
		sub.Flags().DurationVar(&patience, "patience", 5*time.Minute, "how long a component may take to serve again")
		tableOrJSON(sub, &output)
	}
	return []*cobra.Command{upgrade, rollback}
}

// followRoll says what changes until the roll has ended.
func followRoll(ctx context.Context, op *client.Operator, w io.Writer) error {
	said, line := map[string]provision.RollState{}, ""
	var last provision.Roll
	for r, err := range op.FollowRoll(ctx) {
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%w. It goes on: see 'platter stack upgrade --watch'", err)
		}
		if last.ID == 0 {
			var names []string
			for _, n := range r.Nodes {
				names = append(names, n.Name)
			}
			fmt.Fprintf(w, "To %s: %s\n", rollTarget(r), strings.Join(names, ", "))
		}
		if r.Failure != nil && last.Failure == nil {
			fmt.Fprintf(w, "%v\n", r.Failure)
		}
		for _, n := range r.Nodes {
			if said[n.Name] != n.State && n.State != provision.RollWaiting {
				fmt.Fprintf(w, "%-12s  %s\n", n.Name, n.State)
			}
			said[n.Name] = n.State
		}
		if r.Line != line && r.Line != "" {
			fmt.Fprintf(w, "              %s\n", r.Line)
		}
		last, line = r, r.Line
	}
	if last.Failure == nil {
		fmt.Fprintf(w, "Every node runs %s.\n", rollTarget(last))
		return nil
	}
	var lost []string
	for _, n := range last.Nodes {
		if n.State == provision.RollLost {
			lost = append(lost, n.Name)
		}
	}
	if len(lost) > 0 {
		return fmt.Errorf("the rack did not go to %s, and %s did not come back: %w", rollTarget(last), strings.Join(lost, ", "), last.Failure)
	}
	return fmt.Errorf("the rack runs what it ran before, not %s: %w", rollTarget(last), last.Failure)
}

func rollTarget(r provision.Roll) string {
	if r.To == provision.Installed {
		return "what the install brought"
	}
	return "release " + r.Version
}

func printRollPlans(w io.Writer, plans []provision.RollPlan) error {
	for _, p := range plans {
		fmt.Fprintf(w, "%s:\n", p.Node)
		switch {
		case p.Failure != nil:
			fmt.Fprintf(w, "  refuses: %v\n", p.Failure)
		case p.Changes.None():
			fmt.Fprintln(w, "  nothing is stopped")
		default:
			fmt.Fprintf(w, "  stops and starts %s\n", or(strings.Join(p.Changes.Components, ", ")))
		}
		for _, c := range p.Changes.Packages {
			fmt.Fprintf(w, "  %s  %s -> %s\n", c.Name, or(c.From), or(c.To))
		}
	}
	_, err := fmt.Fprintln(w, "Nothing was changed.")
	return err
}
