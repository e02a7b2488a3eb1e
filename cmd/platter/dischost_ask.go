package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// choose finds out what to go by: from what there is no doubt about, from whoever
// answers on the console, or from whoever chooses on the page, which is open
// meanwhile. The machine that it returns is the one that the choice is of.
func (o discHostOptions) choose(ctx context.Context, m machine, ask *asker) (machine, choice, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var one sync.Mutex // file systems are mounted for one look at a time
	look := func(ctx context.Context) (machine, error) {
		one.Lock()
		defer one.Unlock()
		return o.look(ctx)
	}
	page, err := o.page(ctx, m, look)
	if err != nil {
		fmt.Fprintf(o.out, "\nThere is no page to choose on: %v\n", err)
		page = new(chooser) // one that nobody gets into
	}
	defer func() {
		page.close()
		one.Lock() // for good: the page looks no more, nothing is mounted beside what serves
	}()
	type answer struct {
		m   machine
		c   choice
		err error
	}
	console := make(chan answer, 1)
	go func() {
		m, c, err := o.chooseHere(ctx, m, ask, page, look)
		console <- answer{m, c, err}
	}()
	select {
	case a := <-console:
		if a.err != nil || page.overtake() {
			return a.m, a.c, a.err
		}
		on := <-page.chosen // a moment earlier
		return on.m, on.c, nil
	case on := <-page.chosen:
		cancel()
		<-console // it says nothing more
		fmt.Fprintf(o.out, "\nChosen on the page: %s, on %s.\n", on.m.racks[on.c.rack].path, strings.Join(on.c.nics, ", "))
		return on.m, on.c, nil
	}
}

// chooseHere asks on the console for what is in doubt, or for all of it when
// somebody presses a key.
func (o discHostOptions) chooseHere(ctx context.Context, m machine, ask *asker, page *chooser, look func(context.Context) (machine, error)) (machine, choice, error) {
	for {
		m.show(o.out)
		page.show(o.out)
		c, sure := m.propose()
		if sure && o.wait > 0 {
			fmt.Fprintf(o.out, "\nIt begins in %s with %s, on %s, with its state on %s.\nPress Enter to choose something else.\n", o.wait, m.racks[c.rack].path, strings.Join(c.nics, ", "), m.places[c.place].device)
			pressed, err := ask.pressed(ctx, o.wait, page.entered)
			if err != nil || !pressed {
				return m, c, err
			}
		}
		if len(m.racks) == 0 {
			fmt.Fprintf(o.out, "\nThere is no rack file. Plug in a USB stick (FAT or ext4) with one at its top, and press Enter.\n")
			if _, err := ask.line(ctx); err != nil {
				return m, c, err
			}
			again, err := look(ctx)
			if err != nil {
				return m, c, err
			}
			m = again
			continue
		}
		var err error
		var names []string
		for _, r := range m.racks {
			names = append(names, r.String())
		}
		if c.rack, err = ask.one(ctx, "Which rack file?", names, max(c.rack, 0)); err != nil {
			return m, c, err
		}
		c.nics, _ = m.wires(m.racks[c.rack].rack, true)
		names = nil
		for _, n := range m.nics {
			names = append(names, n.String())
		}
		for i, nw := range m.racks[c.rack].rack.Networks {
			free := func(n nic) bool { return !slices.Contains(c.nics[:i], n.name) }
			k := slices.IndexFunc(m.nics, func(n nic) bool { return n.name == c.nics[i] && free(n) })
			if k < 0 {
				k = slices.IndexFunc(m.nics, free)
			}
			if k < 0 {
				return m, c, fmt.Errorf("the rack file has %d networks and this machine %d %s: use another machine, or another rack file", len(c.nics), len(m.nics), plural(len(m.nics), "interface"))
			}
			for {
				if k, err = ask.one(ctx, fmt.Sprintf("Which interface is wired to the network %s (%s in the rack file)?", nw.Subnet, nw.Interface), names, k); err != nil {
					return m, c, err
				}
				if free(m.nics[k]) {
					break
				}
				fmt.Fprintf(o.out, "%s is wired to another network already.\n", m.nics[k].name)
			}
			c.nics[i] = m.nics[k].name
		}
		names = []string{inMemory}
		for _, p := range m.places {
			names = append(names, fmt.Sprintf("%s, folder %s", p, stateFolder))
		}
		k, err := ask.one(ctx, "Where is the state kept (journal, the site's keys)?", names, c.place+1)
		if err != nil {
			return m, c, err
		}
		c.place = k - 1
		return m, c, nil
	}
}

const inMemory = "in memory: ALL IS LOST when this machine is switched off, nodes have to be installed again to be looked after"

// asker asks people on a console. It reads no further than the line that was
// asked for: the rest is for the shell.
type asker struct {
	out     io.Writer
	in      *bufio.Reader
	pending chan answer // of a line that is being waited for
}

type answer struct {
	line string
	err  error
}

func (a *asker) ask() <-chan answer {
	if a.pending == nil {
		pending := make(chan answer, 1)
		a.pending = pending
		go func() {
			l, err := a.in.ReadString('\n')
			pending <- answer{strings.TrimSpace(l), err}
		}()
	}
	return a.pending
}

func (a *asker) line(ctx context.Context) (string, error) {
	select {
	case got := <-a.ask():
		a.pending = nil
		if got.err != nil {
			return "", fmt.Errorf("nobody can be asked, the console is gone: %w", got.err)
		}
		return got.line, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// pressed tells whether somebody presses Enter within d. Once stop is closed
// it waits for that without end.
func (a *asker) pressed(ctx context.Context, d time.Duration, stop <-chan struct{}) (bool, error) {
	t := time.NewTimer(d)
	defer t.Stop()
	pending := a.ask()
	for {
		select {
		case got := <-pending:
			a.pending = nil
			if got.err == nil {
				return true, nil
			}
			pending = nil // there is no console: nobody presses anything
			continue
		case <-t.C:
			return false, nil
		case <-stop:
			fmt.Fprintln(a.out, "Somebody chooses on the page. Press Enter to choose here.")
			_, err := a.line(ctx)
			return err == nil, err
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// one has people choose one of several; Enter takes the default.
func (a *asker) one(ctx context.Context, question string, of []string, preset int) (int, error) {
	for {
		fmt.Fprintf(a.out, "\n%s\n", question)
		for i, text := range of {
			fmt.Fprintf(a.out, "  %d  %s\n", i+1, text)
		}
		fmt.Fprintf(a.out, "[%d] ", preset+1)
		l, err := a.line(ctx)
		if err != nil {
			return 0, err
		}
		if l == "" {
			return preset, nil
		}
		if n, err := strconv.Atoi(l); err == nil && n >= 1 && n <= len(of) {
			return n - 1, nil
		}
		fmt.Fprintf(a.out, "%q is none of 1 to %d.\n", l, len(of))
	}
}
