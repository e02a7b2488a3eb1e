package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"platter/provision"
	"platter/provision/rack"
	"platter/provision/yamlfile"
)

func rackCmd() *cobra.Command {
	c := &cobra.Command{Use: "rack", Short: "Work with rack files"}
	c.AddCommand(&cobra.Command{
		Use:   "check FILE",
		Short: "Read a rack file and list every mistake with its line",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := loadRack(args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s is good: rack %s, %d nodes, image %s, IM domain %s for %d users\n", args[0], r.Name, len(r.Nodes), r.Image, r.Stack.Domain, r.Stack.Users)
			return nil
		},
	})
	return c
}

// loadRack reads a rack file; its error lists every mistake, a line each.
func loadRack(name string) (*provision.Rack, error) {
	r, err := rack.Load(name)
	var problems yamlfile.Problems
	if errors.As(err, &problems) {
		return nil, fmt.Errorf("%s has %d %s, nothing was started:\n%w", name, len(problems), plural(len(problems), "mistake"), err)
	}
	return r, err
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}
