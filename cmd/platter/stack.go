package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"platter/provision"
)

// notWhole is the exit code of 'stack status' where the cluster is not whole.
const notWhole = said(3)

func stackCmd() *cobra.Command {
	c := &cobra.Command{Use: "stack", Short: "Look at the IM cluster, probe it, back it up and restore it; work with stack files and their releases"}
	op := withOperator(c)
	var output string

	status := &cobra.Command{
		Use: "status", Short: "Show the cluster as its members see it, and what is wrong with it", Args: cobra.NoArgs,
		Long: `Show the cluster as its members see it, and what is wrong with it: nodes that
are not members, that do not run and since when, that have gone silent, whose
components do not work and why, and where it is split into sides that do not see
each other.

It asks nobody: it tells what the nodes' agents have said, every 15 seconds.
'platter stack probe' tries the service itself.

Exit codes: 0 the cluster is whole, 1 the command failed, 3 it is not whole.`,
		RunE: func(c *cobra.Command, _ []string) error {
			nodes, err := op().Nodes(c.Context())
			if err != nil {
				return err
			}
			cluster := provision.ClusterOf(nodes, time.Now())
			if output == "json" {
				err = printJSON(c.OutOrStdout(), cluster)
			} else {
				err = printCluster(c.OutOrStdout(), cluster, time.Now())
			}
			if err == nil && !cluster.Whole {
				return notWhole
			}
			return err
		},
	}
	probe := &cobra.Command{
		Use: "probe [NODE NODE]", Short: "Try now what users need: login, messages, rooms, archive, files",
		Long: `Try now what users need of the IM service, with two accounts of the site's own:

  login       on every node
  message     a message reaches a user on the other node
  offline     a message waits for a user who is away, and comes once
  group-chat  a room spans both nodes
  archive     what was said on one node is found on the other
  upload      the node takes a file over HTTPS and gives it back

Without names every node is probed with the next one in the rack file, the last
with the first; with two names only those two, both ways. Real users notice
nothing. Each probe ends within 30 seconds.

Exit codes: 0 everything works, 1 a probe failed; it says what to do next.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 0 && len(args) != 2 {
				return fmt.Errorf("name two nodes, or none to probe all; got %d", len(args))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			all, failed := []provision.ProbeResult{}, 0
			for r, err := range op().ProbeStack(c.Context(), args...) {
				if err != nil {
					return err
				}
				if r.Failure != nil {
					failed++
				}
				all = append(all, r)
				if output == "table" {
					fmt.Fprintln(c.OutOrStdout(), probeLine(r))
				}
			}
			if output == "json" {
				if err := printJSON(c.OutOrStdout(), all); err != nil {
					return err
				}
			}
			switch {
			case len(all) == 0:
				return errors.New("the disc host ran no probe: the rack has no nodes")
			case failed > 0:
				return fmt.Errorf("%d of %d probes failed", failed, len(all))
			}
			return nil
		},
	}
	for _, sub := range []*cobra.Command{status, probe} {
		tableOrJSON(sub, &output)
	}
	c.AddCommand(status, probe, acceptCmd(op), siteKeyCmd(op), backupCmd(op), restoreCmd(op), removeCmd(op))
	c.AddCommand(rollCmds(op)...)
	c.AddCommand(stackFileCmds()...)
	c.AddCommand(releaseCmds(op)...)
	return c
}

func printCluster(w io.Writer, c provision.Cluster, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NODE\tSTAGE\tRELEASE\tSEES\tMISSES\tLAST SEEN\t")
	for _, m := range c.Members {
		var misses []string
		for _, x := range m.Misses {
			misses = append(misses, x.Node)
		}
		seen := "never"
		if !m.LastSeen.IsZero() {
			seen = fmt.Sprintf("%s ago", now.Sub(m.LastSeen).Round(time.Second))
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t\n", m.Node, m.Stage, or(m.Release[:min(12, len(m.Release))]), or(strings.Join(m.Sees, ",")), or(strings.Join(misses, ",")), seen)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, m := range c.Members {
		if m.Release != c.Members[0].Release {
			fmt.Fprintln(w, "\nNot all nodes run the same release of the stack: 'platter stack upgrade' brings them to one.")
			break
		}
	}
	if c.Whole {
		_, err := fmt.Fprintf(w, "\nThe cluster is whole: %d %s.\n", len(c.Members), plural(len(c.Members), "member"))
		return err
	}
	fmt.Fprintln(w, "\nThe cluster is not whole:")
	for _, line := range c.Wrong {
		if _, err := fmt.Fprintf(w, "- %s.\n", line); err != nil {
			return err
		}
	}
	return nil
}

// probeLine is one result in words.
func probeLine(r provision.ProbeResult) string {
	where := r.From
	if r.To != "" {
		where += " -> " + r.To
	}
	if r.Failure != nil {
		return fmt.Sprintf("%-10s  %-20s  FAILED  %s: %s", r.Probe, where, r.Failure.Code, r.Failure.Error())
	}
	return fmt.Sprintf("%-10s  %-20s  ok      %.1f ms", r.Probe, where, float64(r.Micros)/1000)
}
