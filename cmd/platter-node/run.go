package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/agent"
	"platter/provision/client"
	"platter/provision/disk"
	"platter/provision/install"
	"platter/provision/jsonfile"
	"platter/provision/stack"
)

const usage = `usage: platter-node COMMAND

  agent     the life on an installed host, started by platter-agent.service
  boot      the life in the initramfs, also started as uinit
  host      check, apply, repair, undo the preparation of this host; see 'host --help'
  install   lay a plan's image on a file or disk, without a disc host's orders
  version   print the version
`

// run does what args (the program's name first) ask for until ctx ends.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	command := ""
	if len(args) > 1 {
		command = args[1]
	}
	if len(args) > 0 && filepath.Base(args[0]) == "uinit" {
		command = "boot"
	}
	switch command {
	case "agent":
		c := agent.Config{Log: stderr}
		f := flag.NewFlagSet("agent", flag.ContinueOnError)
		f.SetOutput(stderr)
		f.BoolVar(&c.LeaveHost, "leave-host", false, "leave kernel, bridges and VMs to whoever prepares this host")
		if err := f.Parse(args[2:]); err != nil {
			return err
		}
		return agent.Run(ctx, c)
	case "boot":
		return install.Boot(ctx, install.System{Console: stdout, Prepare: prepare})
	case "install":
		return installByHand(ctx, args[2:], stdout, stderr)
	case "host":
		if code := hostcmd.Run(ctx, args[2:], hostcmd.Env{Stdout: stdout, Stderr: stderr}); code != 0 {
			return said(code)
		}
		return nil
	case "stack-wait": // by systemd, before a unit that needs another component
		return stackWait(ctx, args[2:], func(ctx context.Context, plan provision.Plan, component string) error {
			sec, err := stack.Secrets("/")
			if err != nil {
				return err
			}
			return stack.Wait(ctx, plan, sec, component, stderr)
		})
	case "stack-founded": // by systemd, before one that must not be the first
		return stackWait(ctx, args[2:], stack.Founded)
	case "version":
		_, err := fmt.Fprintln(stdout, version())
		return err
	case "-h", "--help", "help":
		_, err := fmt.Fprint(stdout, usage)
		return err
	}
	fmt.Fprint(stderr, usage)
	return fmt.Errorf("unknown command %q", command)
}

// stackWait waits for a component, as this host's plan has it.
func stackWait(ctx context.Context, args []string, wait func(context.Context, provision.Plan, string) error) error {
	if len(args) != 1 {
		return errors.New("name one component")
	}
	var plan provision.Plan
	if err := jsonfile.Read("/etc/platter/plan.json", &plan); err != nil {
		return fmt.Errorf("the plan of this host: %w: reinstall the node", err)
	}
	return wait(ctx, plan, args[0])
}

// said ends the program with this code; why was said already.
type said int

func (s said) Error() string { return fmt.Sprintf("exit code %d", int(s)) }

// version is the commit that the program was built from.
func version() string {
	commit, changed := "unknown", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				commit = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				changed = "+"
			}
		}
	}
	return "platter-node " + commit + changed
}

// installByHand carries out a plan on a file or disk that the caller names,
// with what a disc host would have said read from files. It neither touches
// boot entries nor restarts the machine.
func installByHand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("install", flag.ContinueOnError)
	f.SetOutput(stderr)
	plan := f.String("plan", "", "the plan, a JSON `file`")
	secrets := f.String("secrets", "", "what the stack has to keep to itself, a JSON `file`")
	keys := f.String("keys", "", "`folder` of the minisign keys (*.pub) whose signatures count")
	target := f.String("target", "", "the `disk`, or a file that stands in for one")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *plan == "" || *secrets == "" || *keys == "" || *target == "" {
		return errors.New("install: all of --plan, --secrets, --keys and --target are needed")
	}
	var p provision.Plan
	var n byHand
	if err := errors.Join(jsonfile.Read(*plan, &p), jsonfile.Read(*secrets, &n.secrets)); err != nil {
		return err
	}
	n.identity = client.Identity{Node: p.Node, Generation: p.Generation, URL: p.DiscHost}
	trusted, err := install.ReadKeys(*keys)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	mount, err := os.MkdirTemp("", "platter-root-")
	if err != nil {
		return err
	}
	defer os.Remove(mount)
	return install.Run(ctx, install.Env{
		Root: "/", Target: *target, Mount: mount, Node: n, Report: unheard{client.NewReporter(stdout)}, Keys: trusted,
		HTTP:    &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Timeout: 10 * time.Second}).DialContext}},
		Machine: stays{}, Prepare: prepare, Grow: disk.Grow, Executable: self,
	}, p)
}

// byHand is a disc host whose answers are known beforehand.
type byHand struct {
	identity client.Identity
	secrets  provision.StackSecrets
}

func (n byHand) Identity() client.Identity { return n.identity }

func (n byHand) Secrets(context.Context) (provision.StackSecrets, error) { return n.secrets, nil }

// unheard is a Reporter with nobody to report to.
type unheard struct{ *client.Reporter }

func (unheard) Flush(context.Context) error { return nil }

// stays is a machine that is not to be restarted.
type stays struct{}

func (stays) LoadKernel(string, string, string) error {
	return errors.New("installed by hand, this machine stays as it is")
}

func (stays) Leave(bool) error { return nil }

// prepare lays down what host and stack need from their first boot on.
func prepare(root string, plan provision.Plan, sec provision.StackSecrets) error {
	j, err := hostprep.OpenJournal(root)
	if err != nil {
		return err
	}
	host := hostprep.Host{Root: root, Spec: plan.Host, Self: hostprep.NodeSelf, Reach: hostprep.ReachOf(plan)}
	if err := host.Prepare(j); err != nil {
		return err
	}
	return stack.Prepare(root, plan, sec)
}
