package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"platter/images"
)

// imageCmd is `platter image`: makes and checks what nodes boot and install.
func imageCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build, list and verify operating system images and the installer's initramfs",
		Args:  cobra.NoArgs,
	}
	dir := cmd.PersistentFlags().String("store", "/var/lib/platter/store", "folder of the image store")
	open := func() (*images.Store, error) { return images.Open(*dir) }
	cmd.AddCommand(imageBuildCmd(open), imageImportCmd(open), imageInitramfsCmd(open), imageKeygenCmd(open), imageTrustCmd(open), imageListCmd(open), imageVerifyCmd(open), imageExportCmd(open))
	return cmd
}

type openStore func() (*images.Store, error)

func imageBuildCmd(open openStore) *cobra.Command {
	var o images.BuildOptions
	cmd := &cobra.Command{
		Use:   "build [NAME]",
		Short: "Build an operating system image with the package versions of its lock file",
		Long: `Build an operating system image (default: debian-13) and sign it.

Package versions are those of the lock file. A version that the archive no
longer has is replaced by its current one; every such change is listed and the
lock file rewritten, or, with --frozen, the build fails. When nothing has changed
since the last build, nothing is built.

Kernel, QEMU, libvirt and Open vSwitch of versions that are known not to work
together are refused, unless --allow names that combination.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.Store, err = open(); err != nil {
				return err
			}
			o.Name = "debian-13"
			if len(args) > 0 {
				o.Name = args[0]
			}
			if o.LockFile == "" {
				o.LockFile = o.Name + ".lock"
			}
			if len(o.Mirrors) == 0 {
				o.Mirrors = strings.FieldsFunc(os.Getenv("PLATTER_MIRRORS"), func(r rune) bool { return r == '\n' })
			}
			o.Out = cmd.OutOrStdout()
			_, err = images.BuildOS(cmd.Context(), o)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.LockFile, "lock", "", "lock file (default NAME.lock)")
	f.StringSliceVar(&o.Allow, "allow", nil, "build although this combination of versions, by NAME, is known not to work")
	f.BoolVar(&o.Frozen, "frozen", false, "fail rather than leave a locked version")
	f.BoolVar(&o.Update, "update", false, "move to the newest versions and rewrite the lock file")
	f.StringVar(&o.SecretKey, "key", "", "minisign secret key to sign with")
	f.StringVar(&o.WorkDir, "work", "/var/tmp/platter-build", "scratch folder, takes about 3 GB")
	f.StringVar(&o.Suite, "suite", "trixie", "Debian suite")
	f.StringArrayVar(&o.Mirrors, "mirror", nil, "package source for mmdebstrap, an address or a sources.list line; may be repeated (default $PLATTER_MIRRORS, one a line, else mmdebstrap's own)")
	cmd.MarkFlagRequired("key")
	cmd.MarkFlagsMutuallyExclusive("frozen", "update")
	return cmd
}

func imageInitramfsCmd(open openStore) *cobra.Command {
	var o images.InitramfsOptions
	cmd := &cobra.Command{
		Use:   "initramfs",
		Short: "Build what nodes boot over the network: kernel, u-root, platter-node, drivers",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Store, err = open(); err != nil {
				return err
			}
			o.Out = cmd.OutOrStdout()
			_, err = images.BuildInitramfs(cmd.Context(), o)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.PlatterNode, "node", "bin/platter-node", "static platter-node binary")
	f.StringVar(&o.Image, "image", "debian-13", "image in the store that kernel and drivers are taken from")
	f.StringVar(&o.Source, "source", ".", "source tree of Platter: u-root is built in the versions of its go.mod")
	f.StringVar(&o.SecretKey, "key", "", "minisign secret key to sign with")
	f.StringVar(&o.WorkDir, "work", "/var/tmp/platter-build", "scratch folder, also keeps u-root between builds")
	cmd.MarkFlagRequired("key")
	return cmd
}

func imageKeygenCmd(open openStore) *cobra.Command {
	return &cobra.Command{
		Use:   "keygen FILE",
		Short: "Make a signing key in FILE and FILE.pub and let the store trust it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			if err := images.GenerateKey(args[0]); err != nil {
				return err
			}
			if err := s.Trust(args[0] + ".pub"); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "secret key in %s, public key in %s.pub, trusted by the store %s\n", args[0], args[0], s.Dir())
			return nil
		},
	}
}

func imageTrustCmd(open openStore) *cobra.Command {
	return &cobra.Command{
		Use:   "trust FILE.pub",
		Short: "Let the store trust a minisign public key",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			return s.Trust(args[0])
		},
	}
}

func imageListCmd(open openStore) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List what the store has",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			names, err := s.Refs()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tVERSION\tKERNEL\tSIZE\tDIGEST")
			var bad []error
			for _, name := range names {
				if arch, ok := strings.CutPrefix(name, "boot/"); ok {
					set, err := s.Boot(arch)
					if err != nil {
						bad = append(bad, err)
						continue
					}
					fmt.Fprintf(w, "%s\t\t%s\t%.1f MB\t%.16s\n", name, set.Release, float64(set.Kernel.Size+set.Initramfs.Size)/1e6, set.Initramfs.Hash)
					continue
				}
				if version, ok := images.ReleaseOf(name); ok {
					ref, r, err := s.Release(version)
					if err != nil {
						bad = append(bad, err)
						continue
					}
					fmt.Fprintf(w, "%s\t%s\t\t%.1f MB\t%.16s\n", name, r.Version, float64(r.Size())/1e6, ref.Digest)
					continue
				}
				ref, im, err := s.Image(name)
				if err != nil {
					bad = append(bad, err)
					continue
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%.1f MB\t%.16s\n", name, im.Version, im.Kernel, float64(im.Pack.Size)/1e6, ref.Digest)
			}
			return errors.Join(w.Flush(), errors.Join(bad...))
		},
	}
}

func imageVerifyCmd(open openStore) *cobra.Command {
	return &cobra.Command{
		Use:   "verify [NAME...]",
		Short: "Read every byte of images and compare it with the signed manifest",
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				if args, err = s.Refs(); err != nil {
					return err
				}
			}
			var bad []error
			for _, name := range args {
				if err := s.Verify(cmd.Context(), name, nil); err != nil {
					bad = append(bad, err)
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: every byte is right\n", name)
			}
			return errors.Join(bad...)
		},
	}
}

func imageExportCmd(open openStore) *cobra.Command {
	return &cobra.Command{
		Use:   "export NAME PART FILE",
		Short: "Write one part of an image (root, esp, bios, boot) to a file, to look into it",
		Args:  cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := open()
			if err != nil {
				return err
			}
			return s.Export(cmd.Context(), args[0], args[1], args[2])
		},
	}
}
