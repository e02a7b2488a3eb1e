package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/accept"
	"platter/provision/client"
)

func watchCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "watch",
		Short: "Show live progress of every node",
		Long: `Show live progress of every node: stage, phase, percent, rate, time left.

With --until ready the command ends when every node of the rack file is ready:
exit code 0 and the table of nodes. It ends with exit code 1 when a node has
failed or when nothing at all has moved for --stall.`,
		Args: cobra.NoArgs,
	}
	op := withOperator(c)
	until := c.Flags().String("until", "", "end when all nodes are at this stage: ready")
	stall := c.Flags().Duration("stall", 10*time.Minute, "with --until: give up when nothing has moved for this long")
	since := c.Flags().String("since", "", "count times from this moment (RFC 3339), for example when power was switched on; default: each node's first boot request")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *until != "" && *until != "ready" {
			return fmt.Errorf("--until %s: must be ready", *until)
		}
		w := watch{out: c.OutOrStdout(), untilReady: *until != "", stall: *stall, now: time.Now}
		if f, ok := w.out.(*os.File); ok {
			w.live = isatty.IsTerminal(f.Fd())
			w.width = func() int {
				if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
					return int(size.Col)
				}
				return 80
			}
		}
		if *since != "" {
			t, err := time.Parse(time.RFC3339, *since)
			if err != nil {
				return fmt.Errorf("--since %s: must be a time such as 2026-01-02T15:04:05Z", *since)
			}
			w.since = t
		}
		return w.run(c.Context(), op())
	}
	return c
}

// watch draws the nodes: on a terminal in place, elsewhere a line for each
// change of stage, phase or failure and every tenth percent.
type watch struct {
	out        io.Writer
	live       bool
	width      func() int // live: columns of the terminal; it may be resized
	untilReady bool
	stall      time.Duration
	since      time.Time
	now        func() time.Time

	order []string
	nodes map[string]provision.State
	said  map[string]string // not live: what was last printed of a node
	drawn int               // live: lines on screen
}

func (w *watch) run(ctx context.Context, op *client.Operator) error {
	first, err := op.Nodes(ctx)
	if err != nil {
		return err
	}
	w.nodes, w.said = map[string]provision.State{}, map[string]string{}
	for _, s := range first {
		w.update(s)
	}
	w.draw()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	states := make(chan provision.State)
	lost := make(chan error)
	go func() {
		for u, err := range op.Events(ctx, -1) {
			if err != nil {
				select {
				case lost <- err:
				case <-ctx.Done():
				}
			} else if u.State != nil {
				select {
				case states <- *u.State:
				case <-ctx.Done():
				}
			}
		}
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	moved := w.now()
	for {
		if done, err := w.done(); done {
			if err != nil {
				return err
			}
			return w.clocks(ctx, op)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s := <-states:
			if w.update(s) {
				moved = w.now()
			}
		case err := <-lost:
			fmt.Fprintf(w.out, "%v; trying again\n", err)
			w.drawn = 0
		case <-tick.C:
		}
		w.draw()
		if w.untilReady && w.now().Sub(moved) > w.stall {
			return fmt.Errorf("nothing has moved for %s. See 'platter node log NAME' and the nodes' consoles", w.stall)
		}
	}
}

// update takes a state and tells whether the node moved on by it.
func (w *watch) update(s provision.State) bool {
	old, known := w.nodes[s.Name]
	if s.Stage == "" { // no longer listed
		delete(w.nodes, s.Name)
		w.order = slices.DeleteFunc(w.order, func(n string) bool { return n == s.Name })
		return known
	}
	if !known {
		w.order = append(w.order, s.Name)
	}
	w.nodes[s.Name] = s
	return old.Stage != s.Stage || old.Phase != s.Phase || old.Done != s.Done || old.LastLog != s.LastLog
}

// done tells whether --until is fulfilled or cannot be any more.
func (w *watch) done() (bool, error) {
	if !w.untilReady {
		return false, nil
	}
	ready, rack := 0, 0
	var failed []error
	for _, name := range w.order {
		s := w.nodes[name]
		if !s.Known {
			continue
		}
		rack++
		switch s.Stage {
		case provision.StageReady:
			if !s.GrantOpen {
				ready++
			}
		case provision.StageFailed:
			failed = append(failed, fmt.Errorf("%s failed: %w", s.Name, s.Failure))
		}
	}
	if len(failed) > 0 {
		return true, errors.Join(failed...)
	}
	if ready < rack {
		return false, nil
	}
	list := make([]provision.State, 0, len(w.order))
	for _, name := range w.order {
		list = append(list, w.nodes[name])
	}
	fmt.Fprintln(w.out)
	return true, printNodes(w.out, list, w.since, w.now())
}

// clocks prints how long the install of the rack took. The journal keeps what
// they are read from.
func (w *watch) clocks(ctx context.Context, op *client.Operator) error {
	var generations []int
	var histories [][]provision.Event
	for _, name := range w.order {
		s := w.nodes[name]
		if !s.Known {
			continue
		}
		var events []provision.Event
		for after := int64(0); ; after = events[len(events)-1].ID {
			more, err := op.Log(ctx, name, after)
			if err != nil {
				return err
			}
			if len(more) == 0 {
				break
			}
			events = append(events, more...)
		}
		generations, histories = append(generations, s.Installed), append(histories, events)
	}
	c := accept.ClocksOf(generations, histories...)
	_, err := fmt.Fprintf(w.out, "\nbare metal to operating system: %s; stack install to first message: %s\n", clock(c.OS), clock(c.Message))
	return err
}

func clock(d time.Duration) string {
	if d == 0 {
		return "not known"
	}
	return d.Round(time.Second).String()
}

func (w *watch) draw() {
	if w.live {
		var b strings.Builder
		if w.drawn > 0 {
			fmt.Fprintf(&b, "\x1b[%dA", w.drawn)
		}
		for _, name := range w.order {
			// A line that wraps would make the next redraw start too low.
			line := []rune(progressLine(w.nodes[name], w.since, w.now()))
			fmt.Fprintf(&b, "\x1b[2K%s\n", string(line[:min(len(line), w.width())]))
		}
		b.WriteString("\x1b[J") // lines of nodes that are no longer listed
		w.drawn = len(w.order)
		io.WriteString(w.out, b.String())
		return
	}
	for _, name := range w.order {
		s := w.nodes[name]
		tenth := int64(0)
		if s.Total > 0 {
			tenth = 10 * s.Done / s.Total
		}
		key := fmt.Sprint(s.Stage, s.Phase, tenth, s.Failure != nil)
		if w.said[name] != key {
			w.said[name] = key
			fmt.Fprintln(w.out, progressLine(s, w.since, w.now()))
		}
	}
}
