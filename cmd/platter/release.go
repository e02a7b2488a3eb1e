package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
)

// releaseCmds are the commands about releases of the stack: what a disc carries
// of it, and what of that nodes have.
func releaseCmds(op func() *client.Operator) []*cobra.Command {
	return []*cobra.Command{stackBuildCmd(), stackReleasesCmd(op), stackStageCmd(op)}
}

func stackBuildCmd() *cobra.Command {
	var o images.ReleaseOptions
	var store string
	c := &cobra.Command{
		Use: "build", Short: "Build and sign a release of a stack: its packages and container images, for nodes without a network", Args: cobra.NoArgs,
		Long: `Build a release of the stack in the folder DIR, or of the one that comes with
this program, and sign it into the store: everything that its components need
and the nodes' image does not have in the same version.

That is: packages and all that these depend on, in the versions of the lock file
or, where it has none, the newest; container archives; and an index that makes
apt take the packages from a node's own disk. Packages that the stack names are in
it even if the image has them (--complete), so that a node can go back to this
release later. Packages (.deb) in the folder DIR/packages are taken before any
other.

Equal inputs make the same release. A release that is in the store keeps its
content: another content needs another version in the stack file.`,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if o.Stack, err = loadStack(o.Dir); err != nil {
				return err
			}
			if o.Store, err = images.Open(store); err != nil {
				return err
			}
			if o.LockFile == "" {
				o.LockFile = filepath.Join(o.Dir, "stack.lock")
			}
			if len(o.Mirrors) == 0 {
				o.Mirrors = strings.FieldsFunc(os.Getenv("PLATTER_MIRRORS"), func(r rune) bool { return r == '\n' })
			}
			o.Out = c.OutOrStdout()
			built, err := images.BuildRelease(c.Context(), o)
			if err != nil {
				return err
			}
			return printRelease(c.OutOrStdout(), built)
		},
	}
	f := c.Flags()
	f.StringVarP(&o.Dir, "file", "f", "", "folder of the stack file (default: the stack that comes with this program)")
	f.StringVar(&store, "store", defaultStore, "folder of the image store")
	f.StringVar(&o.SecretKey, "key", "", "minisign secret key to sign with")
	f.StringVar(&o.Image, "image", "debian-13", "image of the nodes, in the store")
	f.StringVar(&o.LockFile, "lock", "", "lock file (default stack.lock, beside the stack file)")
	f.BoolVar(&o.Frozen, "frozen", false, "fail rather than leave a locked version")
	f.BoolVar(&o.Update, "update", false, "move to the newest versions and rewrite the lock file")
	f.BoolVar(&o.Complete, "complete", true, "put packages that the stack names into the release even if the image has them")
	f.BoolVar(&o.Offline, "offline", false, "ask no mirror: packages come from DIR/packages alone")
	f.BoolVar(&o.Replace, "replace", false, "take the place of a release with the same version and other content")
	f.StringVar(&o.WorkDir, "work", "/var/tmp/platter-build", "scratch folder, takes about 2 GB")
	f.StringVar(&o.Suite, "suite", "trixie", "Debian suite")
	f.StringArrayVar(&o.Mirrors, "mirror", nil, "package source for mmdebstrap, an address or a sources.list line; may be repeated (default $PLATTER_MIRRORS, one a line, else mmdebstrap's own)")
	c.MarkFlagRequired("key")
	c.MarkFlagsMutuallyExclusive("frozen", "update")
	c.MarkFlagsMutuallyExclusive("offline", "mirror")
	return c
}

func printRelease(w io.Writer, b *images.BuiltRelease) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "FILE\tKIND\tCOMPONENT\tVERSION\tSIZE\t")
	for _, f := range b.Release.Files {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%.1f MB\t\n", f.Name, f.Kind, or(f.Component), or(f.Version), float64(f.Size)/1e6)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nrelease %s of the stack %s for the image %s: %d files, %.1f MB, digest %.12s\n",
		b.Release.Version, b.Release.Name, b.Release.Image.Name, len(b.Release.Files), float64(b.Release.Size())/1e6, b.Ref.Digest)
	return err
}

func stackReleasesCmd(op func() *client.Operator) *cobra.Command {
	var output, store string
	c := &cobra.Command{
		Use: "releases", Short: "List the releases of the stack on the disc host, and the nodes that have them", Args: cobra.NoArgs,
		Long: `List the releases of the stack in the disc host's store, the newest first, and
the nodes that have each of them whole on their disks. With --store it looks into
that store and asks nobody; it knows of no nodes then.`,
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := releasesOf(c.Context(), op, store)
			if err != nil && len(list) == 0 {
				return err
			}
			if output == "json" {
				return errors.Join(err, printJSON(c.OutOrStdout(), list))
			}
			tw := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "VERSION\tSTACK\tIMAGE\tCOMPONENTS\tFILES\tSIZE\tBUILT\tDIGEST\tON NODES\t")
			for _, r := range list {
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%.1f MB\t%s\t%.12s\t%s\t\n", r.Version, r.Name, or(r.Image), or(strings.Join(r.Components, ",")), r.Files,
					float64(r.Size)/1e6, r.Built.Local().Format("2006-01-02 15:04"), r.Digest, or(strings.Join(r.Nodes, ",")))
			}
			return errors.Join(err, tw.Flush())
		},
	}
	tableOrJSON(c, &output)
	c.Flags().StringVar(&store, "store", "", "look into this store, without a disc host")
	return c
}

// releasesOf lists the releases of a store, or of the disc host where it is empty.
func releasesOf(ctx context.Context, op func() *client.Operator, store string) ([]provision.StoredRelease, error) {
	if store == "" {
		return op().Releases(ctx)
	}
	s, err := images.Open(store)
	if err != nil {
		return nil, err
	}
	return s.Releases()
}

func stackStageCmd(op func() *client.Operator) *cobra.Command {
	var within time.Duration
	c := &cobra.Command{
		Use: "stage [VERSION]", Short: "Bring a release of the stack onto the disks of all nodes; nothing that runs changes", Args: cobra.MaximumNArgs(1),
		Long: `Bring a release of the stack, the newest unless VERSION says otherwise, onto the
disks of all nodes of the rack, and end when all have it. Nothing that runs
changes.

Nodes verify the signature and every byte. They fetch only what they do not have,
go on where they stopped, and repair what is wrong, so it may be run at any time
again. A node keeps the release in use, the one before, and this one. When the disc
goes away meanwhile, nodes keep what they have and wait for it, an hour at most.

Ctrl-C ends the command; nodes that have begun go on.`,
		RunE: func(c *cobra.Command, args []string) error {
			ref, err := findRelease(c.Context(), op(), strings.Join(args, ""))
			if err != nil {
				return err
			}
			return stageAll(c.Context(), op(), c.OutOrStdout(), ref, within)
		},
	}
	c.Flags().DurationVar(&within, "within", 5*time.Minute, "give up on a node that has not asked for the order for this long")
	return c
}

// findRelease is the disc host's release of that version, or its newest where
// it is empty.
func findRelease(ctx context.Context, op *client.Operator, version string) (provision.ReleaseRef, error) {
	list, err := op.Releases(ctx)
	if err != nil {
		return provision.ReleaseRef{}, err
	}
	var have []string
	for _, r := range list {
		if version == "" || r.Version == version {
			return r.ReleaseRef, nil
		}
		have = append(have, r.Version)
	}
	if version == "" {
		return provision.ReleaseRef{}, errors.New("the disc host has no release of the stack: 'platter stack build' makes one")
	}
	return provision.ReleaseRef{}, fmt.Errorf("the disc host has no release %q of the stack, but: %s", version, or(strings.Join(have, ", ")))
}

// stageAll orders every node of the rack to stage the release and returns when
// all have, or cannot.
func stageAll(ctx context.Context, op *client.Operator, out io.Writer, ref provision.ReleaseRef, within time.Duration) error {
	nodes, err := op.Nodes(ctx)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var running sync.WaitGroup
	var wrong []error
	all := 0
	for _, n := range nodes {
		if !n.Known {
			continue
		}
		all++
		running.Go(func() {
			say := &nodeLines{out: out, mu: &mu, node: n.Name}
			_, err := orderAndWait(ctx, op, say, n.Name, provision.OrderStage, ref, within)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				if !strings.HasPrefix(err.Error(), n.Name) {
					err = fmt.Errorf("%s: %w", n.Name, err)
				}
				wrong = append(wrong, err)
				return
			}
			fmt.Fprintf(out, "%s: has release %s\n", n.Name, ref.Version)
		})
	}
	running.Wait()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case all == 0:
		return errors.New("the rack has no nodes")
	case len(wrong) > 0:
		return fmt.Errorf("%d of %d nodes have release %s (%.12s):\n%w", all-len(wrong), all, ref.Version, ref.Digest, errors.Join(wrong...))
	}
	_, err = fmt.Fprintf(out, "all %d nodes have release %s (%.12s)\n", all, ref.Version, ref.Digest)
	return err
}

// nodeLines shows lines about one of several nodes, not too many of them.
type nodeLines struct {
	out  io.Writer
	mu   *sync.Mutex
	node string
	last time.Time
}

func (l *nodeLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	waits := bytes.Contains(p, []byte(" waits "))
	if !waits && time.Since(l.last) < 2*time.Second {
		return len(p), nil
	}
	l.last = time.Now()
	_, err := fmt.Fprintf(l.out, "%s: %s", l.node, p)
	return len(p), err
}
