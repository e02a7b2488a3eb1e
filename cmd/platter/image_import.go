package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"platter/images"
)

func imageImportCmd(open openStore) *cobra.Command {
	var o images.ImportOptions
	var stack, output string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Take in an image of another system: qcow2, raw disk, root file system tar, OCI archive",
		Long: `Make an image of the system in FILE and sign it into the store: a disk image
(qcow2 or raw, with partitions or a bare ext4, XFS or Btrfs), a tar archive of a
root file system, or an OCI archive. What FILE is, is told by its content; it may
be packed with gzip, xz, zstd, bzip2 or lz4. It is only read.

First it says what the system is, and lists three kinds of findings:

  refused   nodes would not boot it, or never be heard of again; nothing is stored
  lacks     it boots, but something that Platter does will not work there
  changed   what the import puts right, in the image

Boot code and loaders are taken from the image --loader of the store. --check
only looks, stores nothing and needs no key. Exit code 1: refused.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !o.Check {
				if o.SecretKey == "" {
					return errors.New("name the key to sign with: --key, or only look with --check")
				}
				var err error
				if o.Store, err = open(); err != nil {
					return err
				}
			}
			s, err := loadStack(stack)
			if err != nil {
				return err
			}
			o.File, o.Stack = args[0], s.Components
			// What programs read has standard output to itself.
			o.Out = cmd.OutOrStdout()
			if output == "json" {
				o.Out = cmd.ErrOrStderr()
			}
			f, err := images.Import(cmd.Context(), o)
			if f.File == "" {
				return err
			}
			if output == "json" {
				return errors.Join(printJSON(cmd.OutOrStdout(), f), short(err))
			}
			return errors.Join(printForeign(cmd.OutOrStdout(), f), short(err))
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "name in the store (default: of its os-release, such as rocky-9)")
	f.StringVar(&o.Loader, "loader", "debian-13", "image in the store that boot code and loaders are taken from")
	f.StringVar(&stack, "stack", "", "folder of the stack file whose needs are looked for (default: the stack that comes with this program)")
	f.StringVar(&o.SecretKey, "key", "", "minisign secret key to sign with")
	f.StringVar(&o.WorkDir, "work", "/var/tmp/platter-build", "scratch folder of root's alone, takes twice the size of the unpacked system, more where a disk is fuller than its files")
	f.BoolVar(&o.Check, "check", false, "only look and say what was found")
	tableOrJSON(cmd, &output)
	return cmd
}

// short leaves out of the error what the table has said.
func short(err error) error {
	var unfit *images.Unfit
	if errors.As(err, &unfit) {
		return fmt.Errorf("%s is refused for %d reasons, the store is as it was", unfit.Foreign.File, len(unfit.Foreign.Of(images.Refused)))
	}
	return err
}

func printForeign(w io.Writer, f images.Foreign) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "file\t%s (%s)\n", f.File, or(f.Kind))
	if f.Arch != "" || f.System != "" {
		fmt.Fprintf(tw, "system\t%s\nfamily\t%s\narchitecture\t%s\nkernel\t%s\npackages\t%d\n", or(f.System), or(f.Family), or(f.Arch), or(f.Kernel), len(f.Packages))
	}
	if len(f.Findings) > 0 {
		fmt.Fprintf(tw, "\t\nFINDING\tWHAT\tWHY, AND WHAT TO DO\n")
	}
	for _, x := range f.Findings {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", x.Degree, x.What, strings.TrimSuffix(x.Why+". "+x.Next, ". "))
	}
	return tw.Flush()
}
