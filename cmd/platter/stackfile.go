package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"platter/provision"
	"platter/provision/stackfile"
)

// stackFileCmds are the commands about what a stack is made of. They need no
// disc host.
func stackFileCmds() []*cobra.Command {
	var rack, output string
	// load reads the stack that args name and, with --rack, places it.
	load := func(args []string) (*provision.Stack, []provision.PlacedComponent, error) {
		dir := strings.Join(args, "")
		if rack == "" {
			s, err := loadStack(dir)
			return s, nil, err
		}
		r, s, err := loadRackAndStack(rack, dir)
		if err != nil {
			return nil, nil, err
		}
		return s, r.Stack.Components, nil
	}
	check := &cobra.Command{
		Use: "check [DIR]", Short: "Read a stack file and list every mistake with its line", Args: cobra.MaximumNArgs(1),
		Long: `Read the stack file DIR/stack.yaml and all that it names, and list every mistake
with its file and line. Templates are tried on made-up racks, container images
are hashed. Without DIR it is the stack that comes with this program.

It prints the components in the order in which they start, with --rack on which
nodes.`,
		RunE: func(c *cobra.Command, args []string) error {
			s, placed, err := load(args)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "stack %s %s is good, its components start in this order:\n", s.Name, s.Version)
			for i, comp := range s.Components {
				fmt.Fprintf(c.OutOrStdout(), "%3d. %s: %s\n", i+1, comp.Name, where(comp, placed, rack != ""))
			}
			return nil
		},
	}
	show := &cobra.Command{
		Use: "show [DIR]", Short: "Show a stack's components, their versions, ports and nodes", Args: cobra.MaximumNArgs(1),
		Long: `Show the components of the stack in DIR, or without DIR of the one that comes
with this program, in the order in which they start. With --rack it shows the
nodes too.`,
		RunE: func(c *cobra.Command, args []string) error {
			s, placed, err := load(args)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), shownStack(s, placed))
			}
			return printStack(c.OutOrStdout(), s, placed, rack != "")
		},
	}
	tableOrJSON(show, &output)
	for _, c := range []*cobra.Command{check, show} {
		c.Flags().StringVar(&rack, "rack", "", "rack file to place the components in")
	}
	export := &cobra.Command{
		Use: "export DIR", Short: "Write the stack that comes with this program into a new folder, to be edited", Args: cobra.ExactArgs(1),
		Long: `Write the stack that comes with this program into the new folder DIR. What you
make of it is checked by 'platter stack check DIR' and served by
'platter serve --stack DIR'.`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := stackfile.Export(args[0]); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s is written: edit it, then run 'platter stack check %s'\n", args[0], args[0])
			return nil
		},
	}
	return []*cobra.Command{check, show, export}
}

// shown is a component as programs are told of it.
type shown struct {
	Name     string                  `json:"name"`
	About    string                  `json:"about"`
	Kind     provision.ComponentKind `json:"kind"`
	Needs    []string                `json:"needs"`
	Optional bool                    `json:"optional"`
	Place    provision.Placement     `json:"place"`
	Packages []provision.Package     `json:"packages"`
	Images   []provision.OCIImage    `json:"images"`
	Ports    []provision.Port        `json:"ports"`
	Nodes    []string                `json:"nodes"` // empty also without a rack
}

func shownStack(s *provision.Stack, placed []provision.PlacedComponent) any {
	out := struct {
		Name       string  `json:"name"`
		Version    string  `json:"version"`
		Components []shown `json:"components"`
	}{s.Name, s.Version, []shown{}}
	for _, c := range s.Components {
		out.Components = append(out.Components, shown{c.Name, c.About, c.Kind, list(c.Needs), c.Optional, c.Place,
			list(c.Packages), list(c.Images), list(c.Ports), list(nodesOf(c, placed))})
	}
	return out
}

// list is never null in JSON.
func list[T any](l []T) []T { return append([]T{}, l...) }

func nodesOf(c provision.Component, placed []provision.PlacedComponent) []string {
	for _, p := range placed {
		if p.Name == c.Name {
			return p.Members
		}
	}
	return nil
}

// where says on which nodes a component runs.
func where(c provision.Component, placed []provision.PlacedComponent, inRack bool) string {
	if inRack {
		if nodes := nodesOf(c, placed); nodes != nil {
			return strings.Join(nodes, ", ")
		}
		return "not in this rack (optional)"
	}
	p := c.Place
	text := "all nodes"
	if p.Count > 0 {
		text = "the first " + strconv.Itoa(p.Count)
		if p.Role == "" {
			text += " " + plural(p.Count, "node")
		}
	}
	if p.Role != "" {
		text += " with role " + p.Role
	}
	if p.Odd {
		text += ", an odd number"
	}
	if c.Optional {
		text += " (optional)"
	}
	return text
}

func printStack(w io.Writer, s *provision.Stack, placed []provision.PlacedComponent, inRack bool) error {
	fmt.Fprintf(w, "stack %s %s\n\n", s.Name, s.Version)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "COMPONENT\tVERSION\tPORTS\tNODES\tABOUT\t")
	for _, c := range s.Components {
		var versions, ports []string
		for _, p := range c.Packages {
			versions = append(versions, strings.TrimSuffix(p.Name+"="+p.Version, "="))
		}
		for _, i := range c.Images {
			versions = append(versions, i.Name)
		}
		for _, p := range c.Ports {
			text := p.Name + " " + strconv.Itoa(p.Number)
			if p.UDP {
				text += "/udp"
			}
			if p.Local {
				text += " (local)"
			}
			ports = append(ports, text)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t\n", c.Name, or(strings.Join(versions, ", ")), or(strings.Join(ports, ", ")), where(c, placed, inRack), or(c.About))
	}
	return tw.Flush()
}
