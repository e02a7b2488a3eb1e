package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"platter/hostprep"
	"platter/provision"
	"platter/provision/jsonfile"
)

const (
	planFile      = "etc/platter/plan.json"
	journalFile   = "var/lib/platter/stack/switch.json"
	installedFile = "var/lib/platter/stack/installed.json"
	currentFile   = "var/lib/platter/stack/current"
	previousFile  = "var/lib/platter/stack/previous"
	// holdDir has a file for every component that must not start, at a boot
	// either, because its files and packages are being changed.
	holdDir = "var/lib/platter/stack/hold/"
	// denyFile keeps the scripts of packages from starting services (Debian
	// policy, invoke-rc.d; 101 is "not allowed").
	denyFile = "usr/sbin/policy-rc.d"
)

// Limits of a switch's steps.
const (
	commandLimit  = 10 * time.Minute // one command of the stack file
	packagesLimit = 20 * time.Minute
	stopLimit     = 5 * time.Minute // one unit
	spareSpace    = 256 << 20       // bytes that stay free
)

// step is a part of a switch. Each is in the journal before it has effects, can
// be done again, and ends in the next one.
type step string

const (
	stepSave     step = "save"     // what the install brought is noted down, once
	stepBefore   step = "before"   // commands, while the old version runs
	stepStop     step = "stop"     // what changes is stopped, and held
	stepPackages step = "packages" // the other versions are installed
	stepPlan     step = "plan"     // plan and files are the other ones
	stepStart    step = "start"    // everything is started and healthy
	stepAfter    step = "after"    // commands, when the new version runs
	stepDone     step = "done"
)

var steps = []step{stepSave, stepBefore, stepStop, stepPackages, stepPlan, stepStart, stepAfter, stepDone}

// generation is a state of the node's service that it can be in as a whole.
type generation struct {
	Release string         `json:"release"` // digest, or provision.Installed
	Plan    provision.Plan `json:"plan"`
	// Packages are versions by name: in a switch of all that it changes, in
	// installedFile of all that there are.
	Packages map[string]string `json:"packages"`
}

// switchJournal is the last switch of a node, under way or done.
type switchJournal struct {
	Attempt string                  `json:"attempt"` // names the order
	Args    provision.SwitchArgs    `json:"args"`
	From    generation              `json:"from"`
	To      generation              `json:"to"`
	Changes provision.SwitchChanges `json:"changes"`
	Step    step                    `json:"step"`
	// Back: it goes back to From, because of Why.
	Back bool               `json:"back,omitempty"`
	Why  *provision.Failure `json:"why,omitempty"`
}

// target is where the node is going.
func (j *switchJournal) target() generation {
	if j.Back {
		return j.From
	}
	return j.To
}

// switcher carries out one switch.
type switcher struct {
	root string
	sec  provision.StackSecrets
	sd   *hostprep.Systemd
	ask  func(context.Context) (provision.Join, error)
	rep  Progress
	say  func(line string, done, total int64)
	j    switchJournal
}

// Switch takes the node's components from the release that runs to another one,
// as args say: packages, files and plan, with what changes stopped meanwhile and
// healthy at the end. What fails before anything has changed is a refusal; what
// fails later is taken back, and the error, a *provision.Failure, says why.
//
// Every step is in a journal before it has effects. ctx's end, kill -9 or a power
// cut leave it there: Switch with the same attempt, or ResumeSwitch, goes on.
// With an attempt that has ended it says again how.
//
// Where it acted the plan has to be read anew.
func Switch(ctx context.Context, args provision.SwitchArgs, attempt string, ask func(context.Context) (provision.Join, error), rep Progress, say func(line string, done, total int64)) (result provision.SwitchResult, acted bool, err error) {
	s, err := newSwitcher(ctx, ask, rep, say)
	if err != nil {
		return result, false, err
	}
	defer s.sd.Close()
	known, err := s.load()
	switch {
	case err != nil:
		return result, false, err
	case known && s.j.Step != stepDone && s.j.Attempt != attempt:
		return result, false, &provision.Failure{Code: "switch-busy", Message: "another switch of this node has not ended", Next: "See 'platter node orders'; it goes on by itself"}
	case known && s.j.Attempt == attempt:
		acted = s.j.Step != stepDone
	default:
		say("checking", 0, 0)
		s.j = switchJournal{Attempt: attempt, Args: args, Step: stepSave}
		if err := s.check(ctx); err != nil {
			return result, false, err
		}
		if args.DryRun || s.j.From.Release == s.j.To.Release && s.j.Changes.None() {
			return s.result(), false, nil
		}
		acted = true
	}
	if acted {
		err = s.run(ctx)
	} else if s.j.Back {
		err = s.j.Why
	}
	return s.result(), acted, err
}

// ResumeSwitch ends a switch that was cut off, before anything else is done with
// the node's service. It tells whether there was one; then the plan has to be
// read anew.
func ResumeSwitch(ctx context.Context, ask func(context.Context) (provision.Join, error), rep Progress) (resumed bool, err error) {
	if _, err := os.Stat("/" + journalFile); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	s, err := newSwitcher(ctx, ask, rep, func(string, int64, int64) {})
	if err != nil {
		return false, err
	}
	defer s.sd.Close()
	known, err := s.load()
	if err != nil || !known || s.j.Step == stepDone {
		return false, err
	}
	rep.Logf("the switch to %s goes on: it was cut off at the step %s", name(s.j.target().Release), s.j.Step)
	err = s.run(ctx)
	if s.j.Step == stepDone && err != nil { // it went back, and the order says why
		rep.Logf("%v", err)
		err = nil
	}
	return true, err
}

// Releases tells which releases the node has and which one it runs.
func Releases(ctx context.Context) (provision.NodeReleases, error) {
	var out provision.NodeReleases
	var err error
	if out.Current, out.Previous, err = generations(ReleasesDir); err != nil {
		return out, err
	}
	all, err := releasesAt(ReleasesDir)
	if err != nil {
		return out, err
	}
	for digest, r := range all {
		bare := r.Stack
		bare.Components = nil
		for _, c := range r.Stack.Components {
			bare.Components = append(bare.Components, provision.Component{Name: c.Name, Kind: c.Kind, Place: c.Place, Needs: c.Needs, Optional: c.Optional, Member: c.Member})
		}
		out.Staged = append(out.Staged, provision.NodeRelease{ReleaseRef: provision.ReleaseRef{Version: r.Version, Digest: digest}, Stack: bare})
	}
	slices.SortFunc(out.Staged, func(a, b provision.NodeRelease) int { return strings.Compare(a.Digest, b.Digest) })
	var plan provision.Plan
	if err := jsonfile.Read("/"+planFile, &plan); err != nil {
		return out, err
	}
	if slices.ContainsFunc(here(plan), func(c provision.PlacedComponent) bool { return c.Member == provision.MemberPatroni }) {
		sec, err := Secrets("/")
		if err != nil {
			return out, err
		}
		p, err := newProber(plan, sec)
		if err != nil {
			return out, err
		}
		out.Primary = p.primary(ctx)
	}
	return out, nil
}

// generations are the release in use and the one before, each a digest or
// provision.Installed; previous is empty on a node that was never switched.
func generations(dir string) (current, previous string, err error) {
	if current, previous, err = InUse(dir); err != nil {
		return "", "", err
	}
	if current == "" {
		current = provision.Installed
	} else if previous == "" {
		previous = provision.Installed
	}
	return current, previous, nil
}

// releasesAt are the complete releases below dir, by digest.
func releasesAt(dir string) (map[string]*provision.Release, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	out := map[string]*provision.Release{}
	for _, e := range entries {
		if !provision.ValidDigest(e.Name()) {
			continue
		}
		r, err := Release(dir, e.Name())
		if errors.Is(err, ErrNotStaged) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[e.Name()] = r
	}
	return out, nil
}

// name is a release in words.
func name(release string) string {
	if release == provision.Installed {
		return "what the install brought"
	}
	return "release " + release[:min(12, len(release))]
}

func newSwitcher(ctx context.Context, ask func(context.Context) (provision.Join, error), rep Progress, say func(string, int64, int64)) (*switcher, error) {
	sec, err := Secrets("/")
	if err != nil {
		return nil, err
	}
	sd, err := hostprep.DialSystemd(ctx)
	if err != nil {
		return nil, err
	}
	return &switcher{root: "/", sec: sec, sd: sd, ask: ask, rep: rep, say: say}, nil
}

func (s *switcher) path(p string) string { return filepath.Join(s.root, p) }

func (s *switcher) load() (known bool, err error) {
	err = jsonfile.Read(s.path(journalFile), &s.j)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (s *switcher) save() error { return s.write(journalFile, s.j) }

func (s *switcher) write(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return s.put(path, string(b)+"\n", 0o600)
}

func (s *switcher) put(path, text string, mode fs.FileMode) error {
	if _, err := put(s.root, file{path: path, mode: mode, text: text}); err != nil {
		return fmt.Errorf("writing /%s: %w: look at the disk's free space and health", path, err)
	}
	return nil
}

func (s *switcher) result() provision.SwitchResult {
	return provision.SwitchResult{From: s.j.From.Release, To: s.j.To.Release, Changes: s.j.Changes}
}

// run carries the switch on from its step. A failure turns it round; one on the
// way back leaves it in the journal, to be tried again.
func (s *switcher) run(ctx context.Context) error {
	do := map[step]func(context.Context) error{stepSave: s.note, stepBefore: s.before, stepStop: s.stop,
		stepPackages: s.packages, stepPlan: s.replan, stepStart: s.start, stepAfter: s.after}
	for s.j.Step != stepDone {
		if err := s.save(); err != nil {
			return err
		}
		i := slices.Index(steps, s.j.Step)
		if i < 0 {
			return fmt.Errorf("/%s: there is no step %q: reinstall the node", journalFile, s.j.Step)
		}
		s.say(fmt.Sprintf("to %s: %s", name(s.j.target().Release), s.j.Step), int64(i), int64(len(steps)))
		s.rep.Logf("switch to %s: %s", name(s.j.target().Release), s.j.Step)
		err := do[s.j.Step](ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			s.j.Step = steps[i+1]
		case s.j.Back:
			return &provision.Failure{Code: "switch-stuck", Message: fmt.Sprintf("node %s could not go to %s (%v) and cannot go back to %s either: %v",
				s.j.From.Plan.Node, name(s.j.To.Release), s.j.Why, name(s.j.From.Release), err),
				Next: "It tries on and on. Look at 'journalctl -u platter-agent' on the node"}
		default:
			s.j.Back, s.j.Step = true, stepBefore
			s.j.Why = s.why(err, steps[i])
			s.rep.Logf("switch: %v: goes back to %s", err, name(s.j.From.Release))
		}
	}
	// Which release runs is said before the journal ends.
	if err := s.finish(); err != nil {
		return err
	}
	if s.j.Back {
		return s.j.Why
	}
	return nil
}

// why names the failure that turns the switch round.
func (s *switcher) why(err error, at step) *provision.Failure {
	f := &provision.Failure{Code: "switch-" + string(at), Next: "Look at 'journalctl -u platter-agent' on the node"}
	var named *provision.Failure
	if errors.As(err, &named) {
		f.Next = named.Next
	}
	f.Message = fmt.Sprintf("node %s did not get to %s and went back to %s: %s: %s", s.j.From.Plan.Node, name(s.j.To.Release), name(s.j.From.Release), at, message(err))
	return f
}

// message is an error without what to do next.
func message(err error) string {
	var f *provision.Failure
	if errors.As(err, &f) {
		return strings.Replace(err.Error(), f.Error(), f.Message, 1)
	}
	return err.Error()
}

// note keeps what the install brought, so that the node finds back to it.
func (s *switcher) note(ctx context.Context) error {
	if s.j.From.Release != provision.Installed {
		return nil
	}
	all, err := installed(ctx)
	if err != nil {
		return err
	}
	return s.write(installedFile, generation{provision.Installed, s.j.From.Plan, all})
}

func (s *switcher) before(ctx context.Context) error { return s.commands(ctx, false) }
func (s *switcher) after(ctx context.Context) error  { return s.commands(ctx, true) }

// commands carries out those of the components that change. On the way back by
// itself a command that fails does not stop it.
func (s *switcher) commands(ctx context.Context, after bool) error {
	rollback, of, env := s.j.Args.Rollback != s.j.Back, s.j.To.Plan, s.j.target().Plan
	if s.j.Args.Rollback {
		of = s.j.From.Plan
	}
	view := provision.ViewOf(env, s.sec)
	for _, c := range here(of) {
		if !slices.Contains(s.j.Changes.Components, c.Name) {
			continue
		}
		list := c.Upgrade
		if rollback {
			list = c.Rollback
		}
		for _, cmd := range list {
			if cmd.After != after || cmd.Once && !slices.Contains(s.j.Args.Once, c.Name) {
				continue
			}
			err := s.command(ctx, view, cmd)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				err = fmt.Errorf("component %s: %w", c.Name, err)
				if !s.j.Back {
					return err
				}
				s.rep.Logf("switch: %v", err)
			}
		}
	}
	return nil
}

func (s *switcher) command(ctx context.Context, view provision.View, c provision.Command) error {
	var args []string
	for i, a := range c.Args {
		text, err := view.Render(fmt.Sprintf("argument %d", i), a)
		if err != nil {
			return err
		}
		args = append(args, text)
	}
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if c.User != "" {
		uid, err1 := idOf(s.root, "passwd", c.User)
		gid, err2 := groupOf(s.root, c.User)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	return output(cmd)
}

// output runs cmd; the error has the end of what it said.
func output(cmd *exec.Cmd) error {
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "UCF_FORCE_CONFFOLD=1"}
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		out = bytes.TrimSpace(out)
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, out[max(0, len(out)-600):])
	}
	return nil
}

// stop ends the units of what changes, in reverse order, and holds them.
func (s *switcher) stop(ctx context.Context) error {
	both := append(here(s.j.From.Plan), here(s.j.To.Plan)...)
	var units []string
	for _, name := range s.j.Changes.Components {
		if err := s.put(holdDir+name, "", 0o644); err != nil {
			return err
		}
		for _, c := range both {
			if c.Name != name {
				continue
			}
			for _, u := range c.Units {
				if !slices.Contains(units, u) {
					units = append(units, u)
				}
			}
			if c.Member == provision.MemberPatroni {
				s.handOver(ctx, c)
			}
		}
	}
	for _, u := range slices.Backward(units) {
		limited, cancel := context.WithTimeout(ctx, stopLimit)
		err := s.sd.Unit(u).Stop(limited)
		cancel()
		if err != nil && !strings.Contains(err.Error(), "not loaded") { // as one that comes only now
			return err
		}
	}
	return nil
}

// handOver makes another node's database take the writes, if this one's does. A
// database that is alone, or whose others are behind, just stops.
func (s *switcher) handOver(ctx context.Context, c provision.PlacedComponent) {
	plan := s.j.From.Plan
	p, err := newProber(plan, s.sec)
	if err != nil || len(c.Members) == 1 || !p.primary(ctx) {
		return
	}
	if err := p.switchover(ctx); err != nil {
		s.rep.Logf("switch: the database of another node was not made the primary beforehand: %v", err)
		return
	}
	for n := 0; n < 60 && p.primary(ctx); n++ {
		if provision.Sleep(ctx, time.Second) != nil {
			return
		}
	}
	s.rep.Logf("switch: the database of another node is the primary now")
}

// replan makes plan and files those of the target.
func (s *switcher) replan(ctx context.Context) error {
	plan := s.j.target().Plan
	text, err := json.MarshalIndent(plan, "", "\t")
	if err != nil {
		return err
	}
	if err := s.put(planFile, string(text)+"\n", 0o644); err != nil {
		return err
	}
	if err := Prepare(s.root, plan, s.sec); err != nil {
		return err
	}
	// What the node no longer has does not start at a boot.
	units := map[string]bool{}
	for _, c := range here(plan) {
		for _, u := range c.Units {
			units[u] = true
		}
	}
	for _, c := range append(here(s.j.From.Plan), here(s.j.To.Plan)...) {
		for _, u := range c.Units {
			if !units[u] {
				if err := disable(s.root, u); err != nil {
					return err
				}
			}
		}
	}
	return s.sd.Reload(ctx)
}

// start lets go of what is held and sees every component of the node healthy.
func (s *switcher) start(ctx context.Context) error {
	// With what a power cut left of a file that was being written.
	if err := os.RemoveAll(s.path(holdDir)); err != nil {
		return err
	}
	if err := s.sd.Reload(ctx); err != nil { // a boot may have been in between
		return err
	}
	plan := s.j.target().Plan
	p, err := newProber(plan, s.sec)
	if err != nil {
		return err
	}
	patience := 5 * time.Minute
	// Less is for finding out soon that a release does not work, not for the way back.
	if asked := time.Duration(s.j.Args.Patience) * time.Second; asked > patience || asked > 0 && !s.j.Back {
		patience = asked
	}
	n := &node{plan: plan, sec: s.sec, root: s.root, p: p, ask: s.ask, rep: s.rep, patience: patience, pause: backoff, podman: podman,
		units: func(name string) unit { return s.sd.Unit(name) }}
	for _, c := range here(plan) {
		until := time.Now().Add(patience)
		for k := 0; ; k++ {
			err := n.bring(ctx, c, false)
			if err == nil {
				err = n.healthy(ctx, c)
			}
			if err == nil {
				break
			}
			// One that starts and is asked too early may answer later; one that does
			// not start was tried often enough.
			if f := new(provision.Failure); errors.As(err, &f) && f.Code == "stack-start" || time.Now().After(until) || ctx.Err() != nil {
				return fmt.Errorf("component %s: %w", c.Name, err)
			}
			s.rep.Logf("switch: component %s: %v", c.Name, err)
			if err := provision.Sleep(ctx, n.pause(k)); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish notes which release runs, and ends the journal.
func (s *switcher) finish() error {
	if !s.j.Back && s.j.From.Release != s.j.To.Release {
		if err := errors.Join(s.point(previousFile, s.j.From.Release), s.point(currentFile, s.j.To.Release)); err != nil {
			return err
		}
	}
	return s.save()
}

// point makes a file name a release; none stands for what the install brought.
func (s *switcher) point(path, release string) error {
	if release != provision.Installed {
		return s.put(path, release+"\n", 0o644)
	}
	if err := os.Remove(s.path(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(s.path(path)))
}
