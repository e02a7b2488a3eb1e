package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"platter/images"
	"platter/images/disc"
)

// discCmd is `platter disc`: makes, checks and takes in sets of discs.
func discCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "disc", Short: "Build sets of discs, check them, and bring them into a store", Args: cobra.NoArgs,
		Long: `A set of discs is one or more ISO files that carry everything: images,
installer, releases of the stack, programs, documentation. Its first volume starts
from a CD, a USB stick or a BMC's virtual media.

Where a command takes PATH, that is a folder on which a volume is mounted, an ISO
file, or a drive (/dev/sr0). Discs are only ever read.`,
	}
	cmd.AddCommand(discBuildCmd(), discDeltaCmd(), discKeygenCmd(), discLsCmd(), discVerifyCmd(), discImportCmd(), discInventoryCmd(), discHostCmd())
	return cmd
}

// discBuild are the options that building a set and a patch have in common.
type discBuild struct {
	spec, store, size string
	o                 disc.BuildOptions
}

func (b *discBuild) flags(c *cobra.Command) {
	self, _ := os.Executable()
	f := c.Flags()
	f.StringVarP(&b.spec, "file", "f", "", "the disc file: what the set holds")
	f.StringVarP(&b.o.Out, "out", "o", "", "folder for the volumes")
	f.StringVar(&b.store, "store", defaultStore, "folder of the image store")
	f.StringVar(&b.o.SecretKey, "key", "", "minisign secret key to sign with")
	f.StringVar(&b.size, "volume-size", "dvd", "the most that a volume has: cd, dvd, bd, or a size such as 700MB")
	f.StringVar(&b.o.Platter, "platter", self, "the program platter that comes with the set")
	f.StringVar(&b.o.Node, "node", filepath.Join(filepath.Dir(self), "platter-node"), "the program platter-node that comes with it")
	f.StringVar(&b.o.IPXE, "ipxe", defaultIPXE, "folder of the iPXE loaders, as in Debian's package ipxe")
	f.StringToStringVar(&b.o.Files, "add", nil, "put a file onto the first volume: PATH-THERE=FILE; may be repeated")
	for _, name := range []string{"file", "out", "key"} {
		c.MarkFlagRequired(name)
	}
}

func (b *discBuild) run(c *cobra.Command) (err error) {
	spec, serr := disc.LoadSpec(b.spec)
	size, zerr := disc.VolumeSize(b.size)
	if err := errors.Join(serr, zerr); err != nil {
		return err
	}
	b.o.Spec, b.o.VolumeSize = spec, size
	if b.o.Store, err = images.Open(b.store); err != nil {
		return err
	}
	m := &meter{out: c.ErrOrStderr()}
	b.o.Progress = m.say
	built, err := disc.Build(c.Context(), b.o)
	if err != nil {
		return err
	}
	return printSet(c.OutOrStdout(), built)
}

func printSet(w io.Writer, b *disc.Built) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "VOLUME\tLABEL\tFILES\tSIZE\tFILE\t")
	var all int64
	for i, file := range b.Volumes {
		v := b.Set.Volumes[i]
		fmt.Fprintf(tw, "%d\t%s\t%d\t%s\t%s\t\n", i+1, v.Label, len(v.Files), bytesOf(b.Sizes[i]), file)
		all += b.Sizes[i]
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	what := "set"
	if b.Set.Base != "" {
		what = "patch"
	}
	_, err := fmt.Fprintf(w, "\n%s %s, %d volumes, %s, set %s\n", what, b.Set, len(b.Volumes), bytesOf(all), b.ID)
	return err
}

func discBuildCmd() *cobra.Command {
	var b discBuild
	c := &cobra.Command{
		Use: "build -f disc.yaml -o OUT", Short: "Build a set of discs from what a store has", Args: cobra.NoArgs,
		Long: `Build a set of discs: everything that disc.yaml names, as ISO files in OUT.

  name: platter
  version: "1.0"
  date: 2026-11-22         # of the set; no clock is asked
  images: [debian-13]      # names in the store
  releases: [newest]       # of the stack: versions, or newest
  languages: [en, zh]      # of the pages to read offline; all, unless it is there

Equal inputs give equal bytes: building twice gives the same set. A name that is
not in the store, a volume that is too small and every other mistake is said
before work starts.`,
		RunE: func(c *cobra.Command, _ []string) error { return b.run(c) },
	}
	b.flags(c)
	return c
}

func discDeltaCmd() *cobra.Command {
	var b discBuild
	var from string
	c := &cobra.Command{
		Use: "delta --from INVENTORY -f disc.yaml -o OUT", Short: "Build a patch: a set with only what a site lacks", Args: cobra.NoArgs,
		Long: `Build a patch for a site: the set of disc.yaml without the chunks that the site
has, by the inventory that 'platter disc inventory' wrote there. After its import
the site's store is the same as after one of the whole set. A patch does not boot,
and nothing can be served from it.`,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if b.o.Have, err = disc.ReadInventory(from); err != nil {
				return err
			}
			return b.run(c)
		},
	}
	b.flags(c)
	c.Flags().StringVar(&from, "from", "", "inventory of the site")
	c.MarkFlagRequired("from")
	return c
}

func discKeygenCmd() *cobra.Command {
	var store string
	c := imageKeygenCmd(func() (*images.Store, error) { return images.Open(store) })
	c.Long = `Make a minisign key pair that signs images, releases and sets: the secret key in
FILE, mode 0600, the public key in FILE.pub, which the store then trusts.

The public key comes into the initramfs that nodes boot, and into the program
platter of a set ('make disc'). A site adds a key of its own to its store with
'platter image trust FILE.pub'.`
	c.Flags().StringVar(&store, "store", defaultStore, "folder of the image store")
	return c
}

// discSource are the options of commands that read discs.
type discSource struct {
	keys  []string
	store string
}

func (s *discSource) flags(c *cobra.Command) {
	c.Flags().StringArrayVar(&s.keys, "key", nil, "minisign public key (.pub) whose signatures count as well; may be repeated")
	c.Flags().StringVar(&s.store, "store", defaultStore, "image store whose keys count as well")
}

// open opens volumes. Signatures count that the program, the store if there is
// one, or a key on the command line knows.
func (s *discSource) open(paths []string) (*disc.Discs, error) {
	keys := slices.Clone(s.keys)
	more, err := filepath.Glob(filepath.Join(s.store, "keys", "*.pub"))
	if err != nil {
		return nil, err
	}
	check, err := images.Signatures(append(keys, more...)...)
	if err != nil {
		return nil, err
	}
	return disc.Open(check, paths...)
}

func discVerifyCmd() *cobra.Command {
	var s discSource
	c := &cobra.Command{
		Use: "verify PATH...", Short: "Compare every byte of volumes with the set's signed manifest", Args: cobra.MinimumNArgs(1),
		Long: `Read volumes of one set from end to end and compare every byte with the set's
signed manifest. What is wrong is named: volume, file and offset; exit code 1. Of a
folder that is no mounted drive only the files are compared, not the boot areas.`,
		RunE: func(c *cobra.Command, args []string) error {
			d, err := s.open(args)
			if err != nil {
				return err
			}
			defer d.Close()
			m := &meter{out: c.ErrOrStderr()}
			if err := d.Verify(c.Context(), func(done, total int64) { m.say("verifying", done, total) }); err != nil {
				return err
			}
			return sayVerified(c.OutOrStdout(), d)
		},
	}
	s.flags(c)
	return c
}

func sayVerified(w io.Writer, d *disc.Discs) error {
	n, bare := len(d.Set.Volumes), d.FilesOnly()
	if len(bare) == 0 {
		_, err := fmt.Fprintf(w, "%s: every byte of %s is right\n", d.Set, volumesOf(d.Have(), n))
		return err
	}
	_, err := fmt.Fprintf(w, "%s: every file of %s is right; of %s the boot areas were not compared: name the drive or the ISO file for that\n",
		d.Set, volumesOf(d.Have(), n), volumesOf(bare, n))
	return err
}

// volumesOf names volumes of a set of n.
func volumesOf(numbers []int, n int) string {
	var out []string
	for _, k := range numbers {
		out = append(out, fmt.Sprint(k))
	}
	word := "volume "
	if len(out) > 1 {
		word = "volumes "
	}
	return fmt.Sprintf("%s%s of %d", word, strings.Join(out, ", "), n)
}

func discLsCmd() *cobra.Command {
	var s discSource
	var output string
	c := &cobra.Command{
		Use: "ls [PATH...]", Short: "Show what a set holds, and what is missing", Args: cobra.ArbitraryArgs,
		Long: `Show what the set of these volumes holds, which of its volumes are here, and what
cannot be used without the others. Without PATH: the sets that the store has
taken in, and what they miss.`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return lsHeld(c.OutOrStdout(), s.store, output)
			}
			d, err := s.open(args)
			if err != nil {
				return err
			}
			defer d.Close()
			return lsDiscs(c.OutOrStdout(), d, output)
		},
	}
	s.flags(c)
	tableOrJSON(c, &output)
	return c
}

func lsHeld(w io.Writer, dir, output string) error {
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("there is no store %s yet: name volumes, or another --store: %w", dir, err)
	}
	st, err := images.Open(dir)
	if err != nil {
		return err
	}
	held, err := disc.Sets(st)
	if err != nil {
		return err
	}
	type row struct {
		Name, Version, ID string
		Date              time.Time
		Complete, Current bool
		Volumes           int
		Patch             bool
	}
	rows := []row{}
	for _, h := range held {
		rows = append(rows, row{h.Name, h.Version, h.ID, h.Made, h.Complete, h.Current, len(h.Volumes), h.Base != ""})
	}
	if output == "json" {
		return printJSON(w, rows)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tVERSION\tDATE\tVOLUMES\tSTATE\tSET\t")
	for _, r := range rows {
		state := "complete"
		switch {
		case !r.Complete:
			state = "volumes are missing: 'platter disc import' goes on"
		case !r.Current:
			state = "all there, but names stand for something else: 'platter disc import' changes that"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\t%.12s\t\n", r.Name, r.Version, r.Date.Format(time.DateOnly), r.Volumes, state, r.ID)
	}
	return tw.Flush()
}

func lsDiscs(w io.Writer, d *disc.Discs, output string) error {
	blocked := d.Blocked()
	type ref struct {
		Name, Digest string
		Size         int64
		Needs        []int // volumes that are not here
	}
	out := struct {
		Name, Version, ID string
		Date              time.Time
		Arch              []string
		Patch             bool
		Volumes           int
		Have, Missing     []int
		Holds             []ref
	}{d.Set.Name, d.Set.Version, d.ID, d.Set.Made, d.Set.Arch, d.Set.Base != "", len(d.Set.Volumes), d.Have(), d.Missing(), nil}
	for _, r := range d.Set.Refs {
		x := ref{Name: r.Name, Digest: r.Digest, Needs: blocked[r.Name]}
		for _, i := range r.Objects {
			x.Size += d.Set.Objects[i].Object.Size
		}
		out.Holds = append(out.Holds, x)
	}
	if output == "json" {
		return printJSON(w, out)
	}
	fmt.Fprintf(w, "%s of %s, for %s, set %s\n", d.Set, d.Set.Made.Format(time.DateOnly), strings.Join(d.Set.Arch, ", "), d.ID)
	fmt.Fprintf(w, "here: %s\n", volumesOf(out.Have, out.Volumes))
	if len(out.Missing) > 0 {
		fmt.Fprintf(w, "missing: %s\n", volumesOf(out.Missing, out.Volumes))
	}
	if out.Patch {
		fmt.Fprintf(w, "a patch for the store %.12s: 'platter disc import' brings it in\n", d.Set.Base)
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tSIZE\tDIGEST\tUSABLE\t")
	for _, x := range out.Holds {
		usable := "yes"
		if needs, is := blocked[x.Name]; is {
			usable = "with " + volumesOf(needs, out.Volumes)
			if len(needs) == 0 {
				usable = "after an import"
			}
		}
		fmt.Fprintf(tw, "%s\t%s\t%.12s\t%s\t\n", x.Name, bytesOf(x.Size), x.Digest, usable)
	}
	return tw.Flush()
}

func discImportCmd() *cobra.Command {
	var s discSource
	var o disc.ImportOptions
	c := &cobra.Command{
		Use: "import PATH...", Short: "Bring a set into the store, volume by volume in any order", Args: cobra.MinimumNArgs(1),
		Long: `Bring volumes of a set into the store. They may come in any order, one at a time
with one drive: the command says which are still missing; insert the next one and
run it again. What is there is not read twice, not even after an eject, Ctrl-C or a
power cut. Every chunk is compared; one that is damaged is read once more, then
named, and all others come all the same.

A name of the store points to something new only when all of that is there; until
then what was there before stays. A set that is older than the one in the store is
refused unless --older says so; sets of one version are told apart by their date.`,
		RunE: func(c *cobra.Command, args []string) error {
			st, err := images.Open(s.store)
			if err != nil {
				return err
			}
			o.Store = st
			d, err := s.open(args)
			if err != nil {
				return err
			}
			defer d.Close()
			for _, k := range s.keys { // a node must be able to check what comes with it
				if err := st.Trust(k); err != nil {
					return err
				}
			}
			m := &meter{out: c.ErrOrStderr()}
			o.Looked = func(done, total int64) { m.say("reading the store", done, total) }
			o.Progress = func(done, total int64) { m.say("copying", done, total) }
			got, err := disc.Import(c.Context(), d, o)
			if got != nil {
				sayImported(c.OutOrStdout(), d, got)
			}
			return err
		},
	}
	s.flags(c)
	c.Flags().BoolVar(&o.Older, "older", false, "take a set that is older than the one in the store")
	c.Flags().BoolVar(&o.Repair, "repair", false, "compare what the store has already as well, and bring anew what is damaged")
	c.Flags().BoolVar(&o.Instead, "instead", false, "give up another set, of which only some volumes have come")
	return c
}

func sayImported(w io.Writer, d *disc.Discs, got *disc.Imported) {
	n := len(d.Set.Volumes)
	fmt.Fprintf(w, "%s: %s came from %s, %s were there\n", d.Set, bytesOf(got.Read), volumesOf(d.Have(), n), bytesOf(got.Kept))
	if len(got.Blocked) == 0 {
		fmt.Fprintf(w, "complete; the store is %s\n", got.Hash)
		return
	}
	if len(got.Missing) > 0 {
		var numbers []string
		for _, k := range got.Missing {
			numbers = append(numbers, fmt.Sprint(k))
		}
		fmt.Fprintf(w, "%d of %d held, insert %s\n", n-len(got.Missing), n, strings.Join(numbers, " or "))
	}
	for _, r := range d.Set.Refs {
		if needs, is := got.Blocked[r.Name]; is {
			fmt.Fprintf(w, "  %s waits for %s\n", r.Name, volumesOf(needs, n))
		}
	}
}

func discInventoryCmd() *cobra.Command {
	var store, out string
	c := &cobra.Command{
		Use: "inventory", Short: "Write down what this site's store has, for a patch disc", Args: cobra.NoArgs,
		Long: `Write down which chunks this site's store has: hashes only, nothing of the site's
data. 'platter disc delta --from' makes a patch from it.`,
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := images.Open(store)
			if err != nil {
				return err
			}
			inv, err := disc.TakeInventory(c.Context(), st)
			if err != nil {
				return err
			}
			text, err := json.Marshal(inv)
			if err != nil {
				return err
			}
			text = append(text, '\n')
			if out == "" || out == "-" {
				_, err = c.OutOrStdout().Write(text)
				return err
			}
			if err := renameio.WriteFile(out, text, 0o644); err != nil {
				return fmt.Errorf("the inventory cannot be written: %w", err)
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%d chunks of the store %.12s are in %s\n", len(inv.Chunks), inv.Store, out)
			return err
		},
	}
	c.Flags().StringVar(&store, "store", defaultStore, "folder of the image store")
	c.Flags().StringVarP(&out, "out", "o", "", "file to write to (default: standard output)")
	return c
}

// meter says how far a copy has come, at most every two seconds and at its end:
// bytes, rate, time left.
type meter struct {
	out io.Writer

	mu          sync.Mutex
	what        string
	begun, said time.Time
	at          int64 // when it began
}

func (m *meter) say(what string, done, total int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if what != m.what {
		m.what, m.begun, m.said, m.at = what, now, now, done
	}
	if now.Sub(m.said) < 2*time.Second && (done < total || now.Sub(m.begun) < 2*time.Second) {
		return
	}
	m.said = now
	rate := float64(done-m.at) / max(now.Sub(m.begun).Seconds(), 0.001)
	left := ""
	if done < total && rate > 0 {
		left = fmt.Sprintf(", %.0f s left", float64(total-done)/rate)
	}
	fmt.Fprintf(m.out, "%s: %s of %s, %s/s%s\n", what, bytesOf(done), bytesOf(total), bytesOf(int64(rate)), left)
}
