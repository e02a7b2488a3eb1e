package main

import (
	"archive/zip"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"platter/provision"
	"platter/provision/client"
)

// manifestFile is the last file of a backup, which is a ZIP archive without
// compression: nodes compress.
const manifestFile = "manifest.json"

// askWithin is how long a node has to ask for an order of a person who waits.
const askWithin = 2 * time.Minute

func backupCmd(op func() *client.Operator) *cobra.Command {
	return &cobra.Command{
		Use: "backup [FILE]", Short: "Write the database and all users' files into one file", Args: cobra.MaximumNArgs(1),
		Long: `Write what users would miss into one file: the database (accounts, contacts,
rooms, archived messages) as it is at one moment, and the files that they have
uploaded, of every node. The service goes on meanwhile. Without FILE it is
RACK-DATE.platter-backup in this folder.

The file is a ZIP archive with a manifest that has the SHA-256 of every part. It
holds messages and is not encrypted: only its owner can read it (mode 0600), keep
it where nobody else gets at it. It appears under its name when it is complete.

Files of a node that does not run cannot be had: the backup says so and is written
all the same.

Exit codes: 0 everything is in the file, 1 there is no file, 3 nodes are missing.`,
		RunE: func(c *cobra.Command, args []string) error {
			m, path, err := writeBackup(c.Context(), op(), c.ErrOrStderr(), strings.Join(args, ""))
			if err != nil {
				return err
			}
			size := int64(0)
			for _, p := range m.Parts {
				size += p.Size
			}
			fmt.Fprintf(c.OutOrStdout(), "%s holds the database and the files of %d %s, %s. It is not encrypted.\n", path, len(m.Parts)-1, plural(len(m.Parts)-1, "node"), bytesOf(size))
			if len(m.Missing) > 0 {
				fmt.Fprintf(c.ErrOrStderr(), "Users' files of these nodes are NOT in it, because they do not run: %s.\n", strings.Join(m.Missing, ", "))
				return notWhole
			}
			return nil
		},
	}
}

// writeBackup makes the file, which is there as a whole or not at all.
func writeBackup(ctx context.Context, op *client.Operator, progress io.Writer, path string) (m provision.BackupManifest, _ string, err error) {
	m = provision.BackupManifest{Format: provision.BackupFormat, ID: newID(), Begun: time.Now().UTC().Truncate(time.Second)}
	running, missing, err := membersNow(ctx, op)
	if err != nil {
		return m, "", err
	}
	if len(running) == 0 {
		return m, "", errors.New("no node runs the service, so there is nothing to back up from. See 'platter stack status'")
	}
	m.Missing = missing
	if _, err := os.Stat(path); path != "" && err == nil {
		return m, "", fmt.Errorf("%s is there already. Choose another name, or remove it", path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".platter-backup-*") // mode 0600
	if err != nil {
		return m, "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	z := zip.NewWriter(f)
	for i, node := range running {
		r, err := backupNode(ctx, op, progress, z, node, i == 0)
		if err != nil {
			return m, "", err
		}
		m.Rack, m.Domain = r.Rack, r.Domain
		if i == 0 {
			m.PostgreSQL, m.Ejabberd, m.Schema = r.PostgreSQL, r.Ejabberd, r.Schema
		}
		m.Parts = append(m.Parts, r.Parts...)
	}
	w, err := z.Create(manifestFile)
	if err == nil {
		e := json.NewEncoder(w)
		e.SetIndent("", "\t")
		err = e.Encode(m)
	}
	if err := errors.Join(err, z.Close(), f.Sync()); err != nil {
		return m, "", fmt.Errorf("the backup cannot be written: %w", err)
	}
	if path == "" {
		path = m.Rack + "-" + m.Begun.Local().Format("2006-01-02-150405") + ".platter-backup"
	}
	// Not over a file that has come meanwhile.
	if err := os.Link(f.Name(), path); err != nil {
		return m, "", fmt.Errorf("the backup cannot be given its name: %w", err)
	}
	return m, path, syncParent(path)
}

func syncParent(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// membersNow are the nodes of the rack that run the service, and the others.
func membersNow(ctx context.Context, op *client.Operator) (running, missing []string, err error) {
	nodes, err := op.Nodes(ctx)
	for _, n := range nodes {
		switch {
		case !n.Known:
		case (n.Stage == provision.StageReady || n.Stage == provision.StageProbing) && time.Since(n.LastSeen) < provision.SilentAfter:
			running = append(running, n.Name)
		default:
			missing = append(missing, n.Name)
		}
	}
	return running, missing, err
}

// backupNode has one node send its parts and writes them.
func backupNode(ctx context.Context, op *client.Operator, progress io.Writer, z *zip.Writer, node string, database bool) (r provision.BackupResult, err error) {
	o, err := op.Order(ctx, node, provision.OrderBackup, provision.BackupArgs{Database: database}, askWithin)
	if err != nil {
		return r, err
	}
	names := []string{provision.PartUploads}
	if database {
		names = slices.Insert(names, 0, provision.PartDatabase)
	}
	var got []provision.BackupPart
	var g errgroup.Group
	taking, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	g.Go(func() (err error) {
		end, err := awaitOrder(ctx, op, progress, node, o.ID)
		if err != nil {
			stop(err)
			return err
		}
		return json.Unmarshal(end.Result, &r)
	})
	g.Go(func() error {
		for _, name := range names {
			p := provision.BackupPart{Node: node, Name: name}
			if err := takePart(taking, op, progress, z, o.ID, &p); err != nil {
				stop(err)
				return err
			}
			got = append(got, p)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return r, cmp.Or(context.Cause(ctx), err)
	}
	if !slices.Equal(got, r.Parts) {
		return r, fmt.Errorf("%s sent other parts than came here: %v, not %v. Try again; look at the network if that does not help", node, r.Parts, got)
	}
	return r, nil
}

// takePart writes a part into the archive and learns its size and hash.
func takePart(ctx context.Context, op *client.Operator, progress io.Writer, z *zip.Writer, order int64, p *provision.BackupPart) error {
	var r io.ReadCloser
	err := untilSomebody(ctx, func() (err error) { r, err = op.TakePart(ctx, order, p.Name); return err })
	if err != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	defer r.Close()
	w, err := z.CreateHeader(&zip.FileHeader{Name: p.File(), Method: zip.Store, Modified: time.Now()})
	if err != nil {
		return err
	}
	sum, rate := sha256.New(), &rateWriter{out: progress, what: p.File()}
	if p.Size, err = io.Copy(io.MultiWriter(w, sum, rate), r); err != nil {
		return fmt.Errorf("the part %s broke off: %w", p.File(), cmp.Or(context.Cause(ctx), err))
	}
	rate.end()
	p.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return nil
}

// untilSomebody tries until the other side of a part is there.
func untilSomebody(ctx context.Context, try func() error) error {
	for {
		err := try()
		if e := (*client.Error)(nil); !errors.As(err, &e) || e.Code != client.CodeNobody || ctx.Err() != nil {
			return err
		}
	}
}

// rateWriter says now and then how much has gone through it, and how fast.
type rateWriter struct {
	out         io.Writer
	what        string
	total       int64 // 0: not known
	done        int64
	begun, said time.Time
}

func (r *rateWriter) Write(p []byte) (int, error) {
	if r.begun.IsZero() {
		r.begun = time.Now()
		r.said = r.begun
	}
	r.done += int64(len(p))
	if time.Since(r.said) > 2*time.Second {
		r.said = time.Now()
		r.say()
	}
	return len(p), nil
}

func (r *rateWriter) end() { r.say() }

func (r *rateWriter) say() {
	of, rate := "", ""
	if r.total > 0 {
		of = " of " + bytesOf(r.total)
	}
	if d := time.Since(r.begun); !r.begun.IsZero() && d > time.Second/2 { // less says nothing
		rate = ", " + bytesOf(int64(float64(r.done)/d.Seconds())) + "/s"
	}
	fmt.Fprintf(r.out, "%s: %s%s%s\n", r.what, bytesOf(r.done), of, rate)
}

// bytesOf is a number of bytes for people.
func bytesOf(n int64) string {
	units := []string{"B", "kB", "MB", "GB", "TB"}
	v, i := float64(n), 0
	for v >= 1000 && i < len(units)-1 {
		v, i = v/1000, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, units[i])
}

func newID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func restoreCmd(op func() *client.Operator) *cobra.Command {
	var yes, other bool
	c := &cobra.Command{
		Use: "restore FILE", Short: "Put a backup in the place of what is there", Args: cobra.ExactArgs(1),
		Long: `Put a backup in the place of what is there: accounts, contacts, rooms, archived
messages, and users' files. What was written since the backup is lost.

Every part's hash is checked first. Then the data are loaded beside the old ones
while the service goes on. Only then ejabberd stops on all nodes, the databases and
folders change places, and it starts again; all sessions end meanwhile. The database
changes in one transaction: whatever fails or loses power before it leaves the
old data in place, and everything after it is brought to its end by the nodes
themselves when they are back. In the end the service is probed, and which data
count is said.

A backup of another rack or domain is refused unless --from-other-site is given, one
of a newer ejabberd always. Files of nodes that are not in this rack are left out.`,
		RunE: func(c *cobra.Command, args []string) error {
			b, err := openBackup(args[0])
			if err != nil {
				return err
			}
			defer b.Close()
			if !yes {
				return fmt.Errorf("%s is good; it is of %s, from %s on the rack %s. It would replace all accounts, messages and files that are there now: say --yes if that is what you want",
					args[0], b.manifest.Begun.Local().Format("2006-01-02 15:04:05"), b.manifest.Domain, b.manifest.Rack)
			}
			return restore(c.Context(), op(), c.OutOrStdout(), c.ErrOrStderr(), b, other)
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "replace what is there")
	c.Flags().BoolVar(&other, "from-other-site", false, "also if the backup is of another rack or domain")
	return c
}

// backup is an open backup whose hashes hold.
type backup struct {
	*zip.ReadCloser
	manifest provision.BackupManifest
}

func openBackup(path string) (_ *backup, err error) {
	z, err := zip.OpenReader(path)
	if err != nil {
		return nil, fmt.Errorf("%s is no whole backup: %w", path, err)
	}
	b := &backup{ReadCloser: z}
	defer func() {
		if err != nil {
			z.Close()
			err = fmt.Errorf("%s cannot be restored: %w", path, err)
		}
	}()
	f, err := z.Open(manifestFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, 16<<20)).Decode(&b.manifest); err != nil {
		return nil, fmt.Errorf("%s: %w", manifestFile, err)
	}
	if err := b.manifest.Check(); err != nil {
		return nil, err
	}
	var wrong []error
	for _, p := range b.manifest.Parts {
		if err := b.verify(p); err != nil {
			wrong = append(wrong, fmt.Errorf("the part %s is damaged: %w", p.File(), err))
		}
	}
	return b, errors.Join(wrong...)
}

func (b *backup) verify(p provision.BackupPart) error {
	f, err := b.Open(p.File())
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, f)
	switch {
	case err != nil:
		return err
	case n != p.Size:
		return fmt.Errorf("it has %d bytes instead of %d", n, p.Size)
	case hex.EncodeToString(sum.Sum(nil)) != p.SHA256:
		return errors.New("its SHA-256 is not that of the manifest")
	}
	return nil
}

func restore(ctx context.Context, op *client.Operator, out, progress io.Writer, b *backup, other bool) error {
	m := b.manifest
	running, missing, err := membersNow(ctx, op)
	if err != nil {
		return err
	}
	if len(running) == 0 {
		return errors.New("no node runs the service, so there is nothing to restore to. See 'platter stack status'")
	}
	if len(missing) > 0 {
		return fmt.Errorf("these nodes do not run the service: %s. A restore is for the whole cluster: bring them back, or take them out of the rack file and restart the disc host", strings.Join(missing, ", "))
	}
	said := &lockedWriter{w: progress}
	args := map[string]provision.RestoreArgs{}
	base := provision.RestoreArgs{ID: newID(), Rack: m.Rack, Domain: m.Domain, OtherSite: other, Schema: m.Schema, Parts: []provision.BackupPart{}}
	for _, node := range running {
		args[node] = base
	}
	var database provision.BackupPart
	for _, p := range m.Parts {
		a, ok := args[p.Node]
		switch {
		case p.Name == provision.PartDatabase:
			database = p
		case !ok:
			fmt.Fprintf(said, "The files of %s are left out: no such node is in this rack.\n", p.Node)
		default:
			a.Parts = append(slices.Clone(a.Parts), p)
			args[p.Node] = a
		}
	}
	// One node leads: the first that may make databases.
	leader := ""
	for _, node := range running {
		a := args[node]
		a.Parts = append(slices.Clone(a.Parts), database)
		err := loadNode(ctx, op, said, b, node, a)
		if f := (*provision.Failure)(nil); errors.As(err, &f) && f.Code == provision.CodeNoDatabase && node != running[len(running)-1] {
			continue
		}
		if err != nil {
			return notLoaded(ctx, err)
		}
		leader, args[node] = node, a
		break
	}
	all := func(do func(node string, a provision.RestoreArgs) error) error {
		var g errgroup.Group
		var wrong []error
		var mu sync.Mutex
		for _, node := range running {
			g.Go(func() error {
				if err := do(node, args[node]); err != nil {
					mu.Lock()
					defer mu.Unlock()
					wrong = append(wrong, err)
				}
				return nil
			})
		}
		g.Wait()
		return errors.Join(wrong...)
	}
	err = all(func(node string, a provision.RestoreArgs) error {
		if node == leader {
			return nil
		}
		return loadNode(ctx, op, said, b, node, a)
	})
	if err != nil {
		return notLoaded(ctx, err)
	}
	fmt.Fprintln(said, "The backup is loaded beside the old data; ejabberd stops now.")
	fresh := 0
	var mu sync.Mutex
	err = all(func(node string, a provision.RestoreArgs) error {
		o, err := orderAndWait(ctx, op, said, node, provision.OrderReplace, a, askWithin)
		if err != nil {
			return err
		}
		var r provision.ReplaceResult
		err = json.Unmarshal(o.Result, &r)
		mu.Lock()
		defer mu.Unlock()
		if r.New {
			fresh++
		}
		return err
	})
	switch {
	case err != nil && fresh > 0:
		return fmt.Errorf("the data of the backup are in place, but not everything was done: %w", err)
	case err != nil:
		return fmt.Errorf("which data are in place is said by the nodes that answered: %w", err)
	}
	fmt.Fprintf(out, "The data of %s are in place.\n", m.Begun.Local().Format("2006-01-02 15:04:05"))
	failed := 0
	for r, err := range op.ProbeStack(ctx) {
		if err != nil {
			return fmt.Errorf("the service was not probed: %w. Run 'platter stack probe'", err)
		}
		if r.Failure != nil {
			failed++
			fmt.Fprintln(out, probeLine(r))
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d probes failed. Run 'platter stack probe' again in a minute", failed)
	}
	fmt.Fprintln(out, "The service works.")
	return nil
}

func notLoaded(ctx context.Context, err error) error {
	return fmt.Errorf("the backup was not loaded, the old data are in place: %w", cmp.Or(context.Cause(ctx), err))
}

// loadNode has one node load its parts, which it is offered until it has them.
func loadNode(ctx context.Context, op *client.Operator, progress io.Writer, b *backup, node string, a provision.RestoreArgs) error {
	o, err := op.Order(ctx, node, provision.OrderLoad, a, askWithin)
	if err != nil {
		return err
	}
	offering, stop := context.WithCancel(ctx)
	var g errgroup.Group
	for _, p := range a.Parts {
		g.Go(func() error {
			// A node that loses power asks again.
			for offering.Err() == nil {
				f, err := b.Open(p.File())
				if err != nil {
					return err
				}
				rate := &rateWriter{out: progress, what: node + "/" + p.Name, total: p.Size}
				err = op.SendPart(offering, o.ID, p.Name, io.TeeReader(f, rate))
				f.Close()
				switch e := (*client.Error)(nil); {
				case err == nil:
					rate.end()
				case errors.As(err, &e) && e.Code == client.CodeNobody:
				default:
					provision.Sleep(offering, time.Second)
				}
			}
			return nil
		})
	}
	_, err = awaitOrder(ctx, op, progress, node, o.ID)
	stop()
	return errors.Join(err, g.Wait())
}

// lockedWriter lets several write lines.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func removeCmd(op func() *client.Operator) *cobra.Command {
	return &cobra.Command{
		Use: "remove NODE", Short: "Remove a dead node from every cluster of the service", Args: cobra.ExactArgs(1),
		Long: `Remove a dead node from the cluster of every component: from the others' lists of
members in etcd, ejabberd and RabbitMQ. PostgreSQL's forgets it by itself. It is
refused while the node speaks to the disc host or answers any other node: switch it
off first. There is no way around that, because a member that runs must not be
removed.

Take the node out of the rack file too, and restart the disc host: then the cluster
is whole without it. To use the machine again, install it anew.`,
		RunE: func(c *cobra.Command, args []string) error {
			gone := args[0]
			nodes, err := op().Nodes(c.Context())
			if err != nil {
				return err
			}
			listed := false
			for _, n := range nodes {
				if n.Name != gone || !n.Known {
					continue
				}
				listed = true
				if since := time.Since(n.LastSeen); since < provision.SilentAfter {
					return fmt.Errorf("%s is not gone: it spoke %s ago. Switch it off and try again a minute later", gone, since.Round(time.Second))
				}
			}
			running, _, err := membersNow(c.Context(), op())
			if err != nil {
				return err
			}
			if len(running) == 0 {
				return errors.New("no node runs the service, so there is nothing to remove it from. See 'platter stack status'")
			}
			var removed []string
			for _, node := range running {
				o, err := orderAndWait(c.Context(), op(), c.ErrOrStderr(), node, provision.OrderForget, provision.ForgetArgs{Node: gone}, askWithin)
				if err != nil {
					return err
				}
				var r provision.ForgetResult
				if err := json.Unmarshal(o.Result, &r); err != nil {
					return fmt.Errorf("what %s did cannot be read: %w", node, err)
				}
				removed = append(removed, r.Removed...)
			}
			slices.Sort(removed)
			removed = slices.Compact(removed)
			if len(removed) == 0 {
				fmt.Fprintf(c.OutOrStdout(), "No cluster has %s any more.\n", gone)
			} else {
				fmt.Fprintf(c.OutOrStdout(), "%s was removed from the clusters of %s.\n", gone, strings.Join(removed, ", "))
			}
			if listed {
				fmt.Fprintf(c.OutOrStdout(), "Next: take %s out of the rack file and restart the disc host, or install it anew: 'platter node reinstall %s'.\n", gone, gone)
			}
			return nil
		},
	}
}
