package main

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"

	"github.com/spf13/cobra"

	"platter/provision"
	"platter/provision/rack"
	"platter/provision/stackfile"
	"platter/provision/yamlfile"
)

func rackCmd() *cobra.Command {
	var stack string
	c := &cobra.Command{Use: "rack", Short: "Work with rack files"}
	check := &cobra.Command{
		Use:   "check FILE",
		Short: "Read a rack file and list every mistake with its line",
		Long: `Read a rack file, list every mistake with its line, and find the nodes for every
component of the stack. It also says what machine the stated users need; one that
is too small is refused when it is to be installed.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, s, err := loadRackAndStack(args[0], stack)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s is good: rack %s, %d nodes, image %s, IM domain %s for %d users, stack %s %s\n",
				args[0], r.Name, len(r.Nodes), r.Image, r.Stack.Domain, r.Stack.Users, s.Name, s.Version)
			need := provision.SizingFor(r.Stack.Users, len(r.Nodes))
			fmt.Fprintf(c.OutOrStdout(), "each node needs %d %s, %.1f GiB of memory and %.1f GiB of disk for them", need.CPUs, plural(need.CPUs, "CPU"), gib(need.Memory), gib(need.Disk))
			if r.Stack.Undersized {
				fmt.Fprint(c.OutOrStdout(), "; smaller ones are taken too (undersized: true)")
			}
			fmt.Fprintln(c.OutOrStdout())
			return nil
		},
	}
	withStack(check, &stack)
	c.AddCommand(check)
	return c
}

// gib rounds up to a tenth of a gibibyte.
func gib(bytes int64) float64 { return math.Ceil(float64(bytes)/(1<<30)*10) / 10 }

func withStack(c *cobra.Command, dir *string) {
	c.Flags().StringVar(dir, "stack", "", "folder of a stack file; without it, the stack that comes with this program")
}

// loadRack reads a rack file; its error lists every mistake, a line each.
func loadRack(name string) (*provision.Rack, error) {
	r, err := rack.Load(name)
	return r, counted(name, err)
}

// loadStack reads the stack in the folder dir, or where that is empty the one
// that comes with the program. Its error lists every mistake, a line each.
func loadStack(dir string) (*provision.Stack, error) {
	if dir == "" {
		return stackfile.Default()
	}
	s, err := stackfile.Load(dir)
	return s, counted(filepath.Join(dir, stackfile.FileName), err)
}

// loadRackAndStack reads both files and places the stack's components on the
// rack's nodes.
func loadRackAndStack(file, dir string) (*provision.Rack, *provision.Stack, error) {
	r, err1 := loadRack(file)
	s, err2 := loadStack(dir)
	if err := errors.Join(err1, err2); err != nil {
		return nil, nil, err
	}
	var err error
	if r.Stack.Components, err = s.Place(r.Nodes, r.Stack.Optional); err != nil {
		return nil, nil, fmt.Errorf("%s does not fit the stack %s %s, nothing was started:\n%w", file, s.Name, s.Version, err)
	}
	return r, s, nil
}

// counted says how many mistakes err lists.
func counted(name string, err error) error {
	var problems yamlfile.Problems
	if errors.As(err, &problems) {
		return fmt.Errorf("%s has %d %s, nothing was started:\n%w", name, len(problems), plural(len(problems), "mistake"), err)
	}
	return err
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}
