package hostcmd

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"

	"platter/hostprep"
	"platter/hostprep/profile"
	"platter/provision"
	"platter/provision/jsonfile"
)

// Usage is the help of the command.
const Usage = `Prepare this host, and see whether it is prepared.

Usage:
  host check [-o json]    list what deviates, why it matters and who says so; change nothing
  host apply [--dry-run]  put right what deviates; --dry-run only lists it
  host repair             put right the ports of VMs, without stopping a guest
  host undo               put every file, value, address and bridge back as it was before
                          the first apply; a bridge that VMs are plugged into stays

What should be, the first that is there:
  the plan of the node, /etc/platter/plan.json, where Platter installed the host
  -c FILE         a rack file; --node NAME: which of its nodes this is, where
                  the host's addresses do not tell
  --profile NAME  a kernel profile: messaging, mixed or virtualisation
  what the last apply was told, /etc/platter/host.json
  the profile mixed

Exit codes: 0 as it should be, 1 something failed, 2 wrong usage,
3 it deviates (check, --dry-run) or waits for a reboot.
`

// Exit codes.
const (
	clean  = 0
	failed = 1
	usage  = 2
	drift  = 3
)

// Target is what a host should be.
type Target struct {
	Spec  provision.HostSpec `json:"spec"`
	Reach []netip.AddrPort   `json:"reach,omitempty"` // see hostprep.Host
}

// Env is where the command runs. The zero value is the running host, in a
// program that reads no rack files.
type Env struct {
	Root string // default "/"
	// Rack reads a rack file; node may be empty.
	Rack           func(file, node string) (Target, error)
	Stdout, Stderr io.Writer

	// Tests put others in place.
	steps       func(*hostprep.Host) []hostprep.Step
	undoBridges func(context.Context, *hostprep.Host, func(what string)) error
}

const (
	planPath = "/etc/platter/plan.json"
	toldPath = "/etc/platter/host.json" // the Target of the last apply
)

// Run carries out one command line and returns the exit code. What failed was
// said on Stderr.
func Run(ctx context.Context, args []string, e Env) int {
	if e.Root == "" {
		e.Root = "/"
	}
	if e.steps == nil {
		e.steps = (*hostprep.Host).Steps
	}
	if e.undoBridges == nil {
		e.undoBridges = func(ctx context.Context, h *hostprep.Host, told func(string)) error { return h.UndoBridges(ctx, told) }
	}
	c := command{Env: e}
	code, err := c.run(ctx, args)
	if err != nil {
		fmt.Fprintln(e.Stderr, "host:", err)
		if code == clean {
			code = failed
		}
	}
	return code
}

type command struct {
	Env
	verb, rackFile, node, profile, output string
	dryRun                                bool

	told *Target // on the command line
}

// errUsage is a command line that makes no sense.
func errUsage(format string, args ...any) (int, error) {
	return usage, fmt.Errorf(format+": see 'host --help'", args...)
}

func (c *command) run(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		fmt.Fprint(c.Stderr, Usage)
		return errUsage("check, apply, repair or undo is missing")
	}
	c.verb = args[0]
	f := flag.NewFlagSet("host "+c.verb, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.rackFile, "c", "", "")
	f.StringVar(&c.node, "node", "", "")
	f.StringVar(&c.profile, "profile", "", "")
	var do func(context.Context) (int, error)
	switch c.verb {
	case "check":
		for _, name := range []string{"o", "output"} {
			f.StringVar(&c.output, name, "table", "")
		}
		do = c.check
	case "apply":
		f.BoolVar(&c.dryRun, "dry-run", false, "")
		do = c.apply
	case "undo":
		do = c.undo
	case "repair":
		do = c.repair
	// For units that apply lays down.
	case "guard-uplink":
		do = c.guardUplink
	case "purge-ports":
		do = c.unit((*hostprep.Host).PurgePorts)
	case "start-guests":
		do = c.unit((*hostprep.Host).StartGuests)
	case "stop-guests":
		do = c.unit((*hostprep.Host).StopGuests)
	case "-h", "--help", "help":
		_, err := fmt.Fprint(c.Stdout, Usage)
		return clean, err
	default:
		return errUsage("unknown command %q", c.verb)
	}
	switch err := f.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		_, err := fmt.Fprint(c.Stdout, Usage)
		return clean, err
	case err != nil:
		return errUsage("%w", err)
	case f.NArg() > 0:
		return errUsage("%q is one argument too many", f.Arg(0))
	case c.node != "" && c.rackFile == "":
		return errUsage("--node needs a rack file, -c FILE")
	case c.profile != "" && c.rackFile != "":
		return errUsage("a rack file names its profile itself: -c and --profile exclude each other")
	case c.verb == "check" && c.output != "table" && c.output != "json":
		return errUsage("-o %s: must be table or json", c.output)
	}
	return do(ctx)
}

// host is the machine with what it should be.
func (c *command) host(ctx context.Context) (*hostprep.Host, error) {
	h := &hostprep.Host{Root: c.Root}
	var plan provision.Plan
	switch err := jsonfile.Read(filepath.Join(c.Root, planPath), &plan); {
	case err == nil && (c.rackFile != "" || c.profile != ""):
		return nil, fmt.Errorf("this host has a plan of its own, %s: leave out -c and --profile, or reinstall the node with another rack file", planPath)
	case err == nil && plan.Format != provision.PlanFormat:
		return nil, fmt.Errorf("%s has format %d, this program knows %d: reinstall the node", planPath, plan.Format, provision.PlanFormat)
	case err == nil:
		h.Spec, h.Reach, h.Self = plan.Host, hostprep.ReachOf(plan), hostprep.NodeSelf
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the plan of this host: %w", err)
	default:
		t, err := c.target()
		if err != nil {
			return nil, err
		}
		self, err := c.self()
		if err != nil {
			return nil, err
		}
		h.Spec, h.Reach, h.Self = t.Spec, t.Reach, []string{self, "host"}
	}
	// Without systemd the steps that need one say so.
	if _, err := os.Stat("/run/systemd/system"); err == nil && c.Root == "/" && os.Geteuid() == 0 {
		if h.Systemd, err = hostprep.DialSystemd(ctx); err != nil {
			fmt.Fprintln(c.Stderr, "host:", err)
		}
	}
	return h, nil
}

// target is what a host without a plan should be.
func (c *command) target() (t Target, err error) {
	switch {
	case c.rackFile != "" && c.Rack == nil:
		return t, errors.New("this program reads no rack files: use 'platter host'")
	case c.rackFile != "":
		t, err = c.Rack(c.rackFile, c.node)
		c.told = &t
	case c.profile != "":
		t.Spec, err = ofProfile(c.profile)
		c.told = &t
	default:
		err = jsonfile.Read(filepath.Join(c.Root, toldPath), &t)
		if errors.Is(err, fs.ErrNotExist) {
			t.Spec, err = ofProfile(profile.Default)
		}
	}
	return t, err
}

// ofProfile is a host with the settings of one profile and nothing else.
func ofProfile(name string) (provision.HostSpec, error) {
	settings, errs := profile.Resolve(profile.Wish{Profile: name})
	return provision.HostSpec{Profile: name, Settings: settings}, errors.Join(errs...)
}

// self is this program. Units will call it at every boot, wherever it is.
func (c *command) self() (string, error) {
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		return "", fmt.Errorf("finding this program's own file: %w", err)
	}
	for _, stays := range []string{"/usr/", "/opt/", "/bin/", "/sbin/"} {
		if strings.HasPrefix(self, stays) {
			return self, nil
		}
	}
	if c.verb == "apply" {
		fmt.Fprintf(c.Stderr, "host: warning: units of this host will call %s at every boot: install the program in /usr/local/bin and run it from there\n", self)
	}
	return self, nil
}

// root lets only root go on.
func (c *command) root(what string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return fmt.Errorf("%s changes the host and has to run as root: nothing was changed", what)
}

// alone is the lock of the host, or the name of who has it.
func (c *command) alone(ctx context.Context, h *hostprep.Host) (release func(), err error) {
	return h.Lock(ctx, func(pid string) error {
		return fmt.Errorf("process %s is changing this host right now: wait for its end and try again; nothing was changed", pid)
	})
}

// change is the machine for a command that changes it: as root, and alone.
func (c *command) change(ctx context.Context, what string) (h *hostprep.Host, release func(), err error) {
	if err := c.root(what); err != nil {
		return nil, nil, err
	}
	if h, err = c.host(ctx); err != nil {
		return nil, nil, err
	}
	release, err = c.alone(ctx, h)
	return h, release, err
}

func (c *command) check(ctx context.Context) (int, error) {
	h, err := c.host(ctx)
	if err != nil {
		return failed, err
	}
	results, err := hostprep.Check(ctx, c.steps(h), quiet{})
	if err != nil {
		return failed, err
	}
	if c.output == "json" {
		return Code(results), writeJSON(c.Stdout, results)
	}
	return Code(results), WriteCheck(c.Stdout, results)
}

func (c *command) apply(ctx context.Context) (int, error) {
	if c.dryRun {
		return c.check(ctx)
	}
	h, release, err := c.change(ctx, "host apply")
	if err != nil {
		return failed, err
	}
	defer release()
	h.Retry = true // a person asked for it
	j, err := hostprep.OpenJournal(h.Root)
	if err != nil {
		return failed, err
	}
	if c.told != nil {
		// The units ask for it at every boot.
		text, err := json.MarshalIndent(c.told, "", "  ")
		if err == nil {
			err = j.WriteFile(toldPath, string(text)+"\n", 0o644)
		}
		if err != nil {
			return failed, err
		}
	}
	results, err := hostprep.Apply(ctx, c.steps(h), j, quiet{})
	var f *provision.Failure
	if err != nil && !errors.As(err, &f) {
		return failed, err
	}
	return Code(results), writeApply(c.Stdout, results) // the table tells of the failures
}

// atBoot are the places whose former content only a reboot brings back.
var atBoot = []string{"/boot/", "/etc/default/grub", "/etc/modprobe.d/", "/etc/modules-load.d/", "/etc/systemd/network/"}

func (c *command) undo(ctx context.Context) (int, error) {
	h, release, err := c.change(ctx, "host undo")
	if err != nil {
		return failed, err
	}
	defer release()
	j, err := hostprep.OpenJournal(h.Root)
	if err != nil {
		return failed, err
	}
	n, reboot := 0, 0
	if err := c.undoBridges(ctx, h, func(what string) { n++; fmt.Fprintln(c.Stdout, what) }); err != nil {
		return failed, err
	}
	if n == 0 && j.Empty() {
		_, err := fmt.Fprintln(c.Stdout, "There is nothing to undo: no apply has changed this host.")
		return clean, err
	}
	undone := j.Undo(func(path string) {
		n++
		for _, p := range atBoot {
			if strings.HasPrefix(path, p) {
				reboot++
				path += "  (in effect after a reboot)"
				break
			}
		}
		fmt.Fprintln(c.Stdout, path)
	})
	if h.Systemd != nil {
		undone = errors.Join(undone, h.Systemd.Reload(ctx))
	}
	if undone != nil {
		return failed, fmt.Errorf("%w: put right what is named and run 'host undo' again", undone)
	}
	fmt.Fprintf(c.Stdout, "%d places are as they were before the first apply.\n", n)
	if reboot > 0 {
		fmt.Fprintln(c.Stdout, "Reboot the host: some of them count from the next boot on.")
		return drift, nil
	}
	return clean, nil
}

func (c *command) repair(ctx context.Context) (int, error) {
	h, release, err := c.change(ctx, "host repair")
	if err != nil {
		return failed, err
	}
	defer release()
	return clean, h.Repair(ctx, aloud{c.Stdout})
}

// unit is what a unit does. It neither waits for whoever changes the host, who
// may wait for the unit, nor for systemd.
func (c *command) unit(do func(*hostprep.Host, context.Context, hostprep.Progress) error) func(context.Context) (int, error) {
	return func(ctx context.Context) (int, error) {
		if err := c.root("host " + c.verb); err != nil {
			return failed, err
		}
		h, err := c.host(ctx)
		if err != nil {
			return failed, err
		}
		return clean, do(h, ctx, aloud{c.Stdout})
	}
}

func (c *command) guardUplink(ctx context.Context) (int, error) {
	h, err := c.host(ctx)
	if err != nil {
		return failed, err
	}
	return clean, h.GuardUplink(ctx, func() {
		fmt.Fprintln(c.Stdout, "ready")
		_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // nothing without systemd
	})
}

// Code is the exit code that results come to.
func Code(results []hostprep.Result) int {
	code := clean
	for _, r := range results {
		switch r.Outcome {
		case hostprep.Failed:
			return failed
		case hostprep.Drift, hostprep.Reboot:
			code = drift
		}
	}
	return code
}

// aloud is a Progress that prints what it is told.
type aloud struct{ w io.Writer }

func (aloud) Phase(string, int, int)            {}
func (a aloud) Logf(format string, args ...any) { fmt.Fprintf(a.w, format+"\n", args...) }
func (aloud) Facts(map[string]string)           {}

// quiet is a Progress without a listener: the table at the end says it all.
type quiet struct{}

func (quiet) Phase(string, int, int)  {}
func (quiet) Logf(string, ...any)     {}
func (quiet) Facts(map[string]string) {}
