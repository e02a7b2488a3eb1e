package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"platter/provision"
)

// printJSON writes v for programs.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printNodes writes the table of nodes. Times count from since, or where that
// is zero from the node's first boot request of its grant.
func printNodes(w io.Writer, nodes []provision.State, since, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NODE\tSLOT\tADDRESS\tIMAGE\tKERNEL\tSTAGE\tGENERATION\tINSTALLED\tREADY\t")
	for _, s := range nodes {
		from := s.BootedAt
		if !since.IsZero() {
			from = since
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t\n", s.Name, or(s.Slot), or(s.Address), or(s.Facts["image"]),
			or(s.Facts["kernel"]), stage(s, now), s.Generation, seconds(from, s.InstalledAt), seconds(from, s.ReadyAt))
	}
	return tw.Flush()
}

// printTroubles writes what is wrong with nodes, a line each.
func printTroubles(w io.Writer, nodes []provision.State, now time.Time) {
	for _, s := range nodes {
		if s.Stage == provision.StageFailed && s.Failure != nil {
			fmt.Fprintf(w, "%s has failed: %s\n", s.Name, s.Failure.Error())
		}
		if t := s.Trouble(now); t != "" {
			fmt.Fprintf(w, "%s has trouble: %s\n", s.Name, t)
		}
	}
}

func or(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func seconds(from, to time.Time) string {
	if from.IsZero() || to.IsZero() {
		return "-"
	}
	return fmt.Sprintf("%.0f s", to.Sub(from).Seconds())
}

// stage is the stage in words, with what people must not overlook.
func stage(s provision.State, now time.Time) string {
	text := string(s.Stage)
	if s.GrantOpen && (s.Stage == provision.StageReady || s.Stage == provision.StageFailed) {
		text += ", install due"
	}
	if s.Stage != provision.StageOff && s.Stage != provision.StageUnknown && !s.LastSeen.IsZero() && now.Sub(s.LastSeen) > provision.SilentAfter {
		text += fmt.Sprintf(", silent %s", now.Sub(s.LastSeen).Round(time.Second))
	}
	return text
}

// progressLine is a node's state on one line: stage, phase, bar, percent,
// rate, time left, elapsed.
func progressLine(s provision.State, since, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-12s %-11s", s.Name, stage(s, now))
	from := s.BootedAt
	if !since.IsZero() {
		from = since
	}
	switch {
	case s.Stage == provision.StageFailed && s.Failure != nil:
		fmt.Fprintf(&b, " %s: %s", s.Failure.Code, s.Failure.Error())
		return b.String()
	case s.Stage == provision.StageReady:
		fmt.Fprintf(&b, " installed after %s, ready after %s", seconds(from, s.InstalledAt), seconds(from, s.ReadyAt))
		return b.String()
	}
	if s.Phase != "" {
		fmt.Fprintf(&b, " %s (%d/%d)", s.Phase, s.PhaseN, s.PhaseOf)
	}
	if s.Total > 0 {
		fmt.Fprintf(&b, " %s %3d%%", bar(s.Done, s.Total, 20), 100*s.Done/s.Total)
		if t := s.LastSeen.Sub(s.PhaseSince).Seconds(); t >= 1 && s.Done > 0 {
			rate := float64(s.Done) / t
			fmt.Fprintf(&b, " %.1f MB/s", rate/1e6)
			if left := float64(s.Total-s.Done) / rate; s.Done < s.Total {
				fmt.Fprintf(&b, ", %.0f s left", left)
			}
		}
	}
	if !from.IsZero() {
		fmt.Fprintf(&b, "  %s", now.Sub(from).Round(time.Second))
	}
	return b.String()
}

func bar(done, total int64, width int) string {
	n := int(min(int64(width), int64(width)*done/total))
	return "[" + strings.Repeat("=", n) + strings.Repeat(" ", width-n) + "]"
}
