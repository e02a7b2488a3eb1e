package hostprep

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/dbus"
)

// Systemd speaks to the service manager. It waits for the manager's own word
// that a job has ended; it never polls.
type Systemd struct{ conn *dbus.Conn }

// DialSystemd connects over the system bus, or straight to the manager where
// no bus runs.
func DialSystemd(ctx context.Context) (*Systemd, error) {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("systemd does not answer: %w: is this a host that systemd booted?", err)
	}
	return &Systemd{conn}, nil
}

// Close ends the connection.
func (s *Systemd) Close() { s.conn.Close() }

// defaultLimit is SOFT:HARD of what services get that do not ask for their
// own: NOFILE, NPROC, MEMLOCK.
func (s *Systemd) defaultLimit(name string) (string, error) {
	var out []string
	for _, suffix := range []string{"Soft", ""} {
		v, err := s.conn.GetManagerProperty("DefaultLimit" + name + suffix)
		if err != nil {
			return "", fmt.Errorf("systemd's DefaultLimit%s: %w", name, err)
		}
		out = append(out, strings.TrimPrefix(v, "@t "))
	}
	return strings.Join(out, ":"), nil
}

// Unit is one unit.
func (s *Systemd) Unit(name string) *Unit { return &Unit{s, name} }

// Reload makes systemd read unit files anew.
func (s *Systemd) Reload(ctx context.Context) error { return s.conn.ReloadContext(ctx) }

// Unit is one unit of systemd.
type Unit struct {
	s    *Systemd
	name string
}

// Start waits until the unit is active: for a service of Type=notify until it
// has said that it is ready. A start that is under way is joined.
func (u *Unit) Start(ctx context.Context) error {
	return u.job(ctx, "start", u.s.conn.StartUnitContext)
}

// Restart stops and starts the unit and waits as Start does.
func (u *Unit) Restart(ctx context.Context) error {
	return u.job(ctx, "restart", u.s.conn.RestartUnitContext)
}

// Stop waits until nothing of the unit runs any more.
func (u *Unit) Stop(ctx context.Context) error {
	return u.job(ctx, "stop", u.s.conn.StopUnitContext)
}

// Kill ends every process of the unit at once, without a word to them. systemd
// may start the unit again: stop it after that.
func (u *Unit) Kill(ctx context.Context) error {
	if err := u.s.conn.KillUnitWithTarget(ctx, u.name, dbus.All, int32(syscall.SIGKILL)); err != nil {
		return fmt.Errorf("kill %s: %w", u.name, err)
	}
	return nil
}

func (u *Unit) job(ctx context.Context, verb string, call func(context.Context, string, string, chan<- string) (int, error)) error {
	done := make(chan string, 1)
	if _, err := call(ctx, u.name, "replace", done); err != nil {
		return fmt.Errorf("%s %s: %w", verb, u.name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("%s %s: %s: look at 'journalctl -u %s'", verb, u.name, result, u.name)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", verb, u.name, ctx.Err())
	}
}

// state is a unit's ActiveState: active, activating, inactive, failed ...
// A start that systemd has queued, as at boot, is waited for.
func (u *Unit) state(ctx context.Context) (load, active string, err error) {
	for {
		p, err := u.s.conn.GetUnitPropertiesContext(ctx, u.name)
		if err != nil {
			return "", "", fmt.Errorf("%s: %w", u.name, err)
		}
		load, _ := p["LoadState"].(string)
		active, _ := p["ActiveState"].(string)
		if job, _ := p["Job"].([]any); len(job) == 2 && job[0] != uint32(0) && active != "active" && load == "loaded" {
			if err := u.Start(ctx); err != nil && ctx.Err() != nil {
				return "", "", err
			}
			continue
		}
		return load, active, nil
	}
}

// noSystemd is the finding on a host that another init started.
var noSystemd = Finding{What: "systemd", Is: "not running, or silent", Want: "running", Why: "it starts, stops and orders the services"}

// services is the step that wants one unit of every group to be active. The
// groups hold alternatives, the preferred one first.
func services(s *Systemd, groups [][]string) Step {
	// look returns a finding for each group and the units that can be started.
	look := func(ctx context.Context) (found []Finding, start []string, err error) {
		if s == nil {
			return []Finding{noSystemd}, nil, nil
		}
		for _, g := range groups {
			f := Finding{What: g[0], Is: "not installed", Want: "active", Why: "VMs and operators need it"}
			loaded := ""
			for _, name := range g {
				load, active, err := s.Unit(name).state(ctx)
				if err != nil {
					return nil, nil, err
				}
				if active == "active" {
					f.What, f.OK, f.Is = name, true, active
					break
				}
				if load == "loaded" && loaded == "" {
					loaded, f.What, f.Is = name, name, active
				}
			}
			if !f.OK && loaded != "" {
				start = append(start, loaded)
			}
			found = append(found, f)
		}
		return found, start, nil
	}
	return Step{
		Name: "services",
		Next: "Look at 'systemctl --failed' on the node; what is not installed has to be installed",
		Check: func(ctx context.Context) ([]Finding, error) {
			found, _, err := look(ctx)
			return found, err
		},
		Apply: func(ctx context.Context, _ *Journal) error {
			_, start, err := look(ctx)
			if err != nil {
				return err
			}
			for _, name := range start {
				if err := s.Unit(name).Start(ctx); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// startFirst starts the first of the units that is installed.
func startFirst(ctx context.Context, s *Systemd, names ...string) error {
	if s == nil {
		return errors.New("no systemd starts the services of this host")
	}
	for _, name := range names {
		load, _, err := s.Unit(name).state(ctx)
		if err != nil {
			return err
		}
		if load == "loaded" {
			return s.Unit(name).Start(ctx)
		}
	}
	return fmt.Errorf("%s is not installed", strings.Join(names, " or "))
}
