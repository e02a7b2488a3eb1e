package stack

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/hostprep"
	"platter/provision"
)

// Progress of an order: what it is doing, and how far it is where total is not 0.
type Say func(line string, done, total int64)

// Send streams what r yields as a part of the order, see client.Node.SendPart.
type Send func(ctx context.Context, name string, r io.Reader) error

// Take opens a part of the order, see client.Node.TakePart.
type Take func(ctx context.Context, name string) (io.ReadCloser, error)

const (
	uploads  = spool + "/upload"
	replaced = spool + "/upload.replaced"
	loaded   = spool + "/upload.restore-" // and the restore's ID
)

// The databases of a restore, beside ejabberd's own: PostgreSQL renames both in
// one transaction, so that there is one or the other.
const (
	dbName     = "ejabberd"
	dbLoaded   = "ejabberd_restore"
	dbReplaced = "ejabberd_replaced"
)

// database reaches the PostgreSQL that takes writes, on whichever node it is.
type database struct {
	plan     provision.Plan
	user     string
	password string
	port     int
	command  func(ctx context.Context, name string, args ...string) *exec.Cmd
}

// Ways into the database: what ejabberd may do, or everything.
const (
	asOwner = "ejabberd"
	asAdmin = "postgres"
)

func openDatabase(plan provision.Plan, sec provision.StackSecrets, user string) (*database, error) {
	secret := map[string]string{asOwner: "ejabberd-database", asAdmin: "postgresql-admin"}[user]
	password, ok := sec.Named[secret]
	if !ok {
		return nil, &provision.Failure{Code: provision.CodeNoDatabase, Message: fmt.Sprintf("node %s has no password of the database user %s", plan.Node, user),
			Next: "Choose a node that runs PostgreSQL"}
	}
	port, err := provision.ViewOf(plan, sec).Port("database", "sql")
	if err != nil {
		return nil, err
	}
	// The account that can read the passwords anyway.
	command, err := commandAs("postgres", "/var/lib/postgresql")
	return &database{plan, user, password, port, command}, err
}

// program is a client program of PostgreSQL. The password is in its
// environment, which nobody else can read.
func (d *database) program(ctx context.Context, name, db string, args ...string) *exec.Cmd {
	dir := "/usr/bin"
	if all, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name); len(all) > 0 {
		dir = filepath.Dir(all[len(all)-1])
	}
	cmd := d.command(ctx, filepath.Join(dir, name), append(args, "--dbname="+fmt.Sprintf(
		"host=127.0.0.1 port=%d user=%s dbname=%s sslmode=verify-ca sslrootcert=/etc/haproxy/platter-ca.pem connect_timeout=10", d.port, d.user, db))...)
	cmd.Env = append(cmd.Env, "PGPASSWORD="+d.password, "PGAPPNAME=platter", "LC_ALL=C.UTF-8")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// sql runs statements and returns what the last ones yield, unaligned.
func (d *database) sql(ctx context.Context, db, statements string) (string, error) {
	cmd := d.program(ctx, "psql", db, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1")
	cmd.Stdin = strings.NewReader(statements)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("database %s: %w: %s", db, err, last(stderr.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// last is the end of what a program complained of.
func last(text string) string {
	text = strings.TrimSpace(text)
	return text[max(0, len(text)-500):]
}

// comment is what was noted at a database; empty where there is none.
func (d *database) comment(ctx context.Context, db string) (string, error) {
	return d.sql(ctx, "postgres", "SELECT coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database WHERE datname = '"+db+"';\n")
}

// schema is the version of ejabberd's tables by module.
func (d *database) schema(ctx context.Context) (map[string]int, error) {
	text, err := d.sql(ctx, dbName, "SELECT module || ' ' || version FROM schema_version;\n")
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for line := range strings.Lines(text) {
		module, version, _ := strings.Cut(strings.TrimSpace(line), " ")
		if out[module], err = strconv.Atoi(version); err != nil {
			return nil, fmt.Errorf("schema_version of %s: %w", module, err)
		}
	}
	return out, nil
}

// Backup sends what users would miss of this node, and the database where args
// say so: as it was at one moment, while everything runs.
func Backup(ctx context.Context, plan provision.Plan, sec provision.StackSecrets, args provision.BackupArgs, send Send, say Say) (provision.BackupResult, error) {
	result := provision.BackupResult{Rack: plan.Rack, Domain: plan.Stack.Domain}
	part := func(name string, write func(io.Writer) error) error {
		say("sending "+name, 0, 0)
		in, out := io.Pipe()
		go func() { out.CloseWithError(write(out)) }()
		sum := &summed{r: in, hash: sha256.New()}
		err := send(ctx, name, sum)
		in.CloseWithError(errors.New("nobody takes it any more"))
		if sum.err != nil {
			err = sum.err // why it broke off
		}
		if err != nil {
			return fmt.Errorf("part %s of node %s: %w", name, plan.Node, err)
		}
		result.Parts = append(result.Parts, provision.BackupPart{Node: plan.Node, Name: name, Size: sum.size, SHA256: hex.EncodeToString(sum.hash.Sum(nil))})
		return nil
	}
	if args.Database {
		d, err := openDatabase(plan, sec, asOwner)
		if err != nil {
			return result, err
		}
		if result.Schema, err = d.schema(ctx); err != nil {
			return result, err
		}
		if result.PostgreSQL, err = d.sql(ctx, dbName, "SHOW server_version;\n"); err != nil {
			return result, err
		}
		m, err := local(plan)
		if err != nil {
			return result, err
		}
		if result.Ejabberd, err = m.quick(ctx, versionExpr); err != nil {
			return result, err
		}
		if err := part(provision.PartDatabase, func(w io.Writer) error { return d.dump(ctx, w) }); err != nil {
			return result, err
		}
	}
	return result, part(provision.PartUploads, func(w io.Writer) error { return packFiles("/"+uploads, w) })
}

const versionExpr = `case application:get_key(ejabberd, vsn) of {ok, V} -> V; _ -> "" end.`

func (d *database) dump(ctx context.Context, w io.Writer) error {
	cmd := d.program(ctx, "pg_dump", dbName, "--format=custom", "--compress=zstd", "--no-owner", "--no-privileges")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_dump: %w: %s", err, last(stderr.String()))
	}
	return nil
}

// summed counts and hashes what is read through it.
type summed struct {
	r    io.Reader
	hash hash.Hash
	size int64
	err  error // other than io.EOF
}

func (s *summed) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.hash.Write(p[:n])
	s.size += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// packFiles writes the regular files below dir as a tar archive, paths relative to
// dir. Files that go meanwhile are left out: users may remove them.
func packFiles(dir string, w io.Writer) error {
	t := tar.NewWriter(w)
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return t.Close()
	}
	if err != nil {
		return err
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := root.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Size: st.Size(), Mode: int64(st.Mode().Perm()), ModTime: st.ModTime()}); err != nil {
			return err
		}
		if _, err := io.CopyN(t, f, st.Size()); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	})
	return errors.Join(err, t.Close())
}

// unpackFiles is the reverse of packFiles into a new folder, durably. Files belong
// to uid and gid.
func unpackFiles(r io.Reader, dir string, uid, gid int) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o750); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	folders := []string{"."}
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%q is no file", h.Name)
		}
		if parent := filepath.Dir(h.Name); !slices.Contains(folders[max(0, len(folders)-8):], parent) {
			if err := root.MkdirAll(parent, 0o750); err != nil {
				return err
			}
			folders = append(folders, parent)
		}
		f, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(h.Mode).Perm())
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		if err := errors.Join(err, f.Chown(uid, gid), f.Close()); err != nil {
			return err
		}
		if err := root.Chtimes(h.Name, h.ModTime, h.ModTime); err != nil {
			return err
		}
	}
	// Folders, also those between.
	err = fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		return root.Chown(path, uid, gid)
	})
	d, err2 := os.Open(dir)
	if err2 != nil {
		return errors.Join(err, err2)
	}
	defer d.Close()
	return errors.Join(err, unix.Syncfs(int(d.Fd())))
}

// Load puts the parts beside what is there. Users notice nothing, and what an
// earlier restore has left half-done is removed.
func Load(ctx context.Context, plan provision.Plan, sec provision.StackSecrets, args provision.RestoreArgs, take Take, say Say) error {
	if !validID(args.ID) {
		return fmt.Errorf("%.80q is not the ID of a restore", args.ID)
	}
	if (args.Rack != plan.Rack || args.Domain != plan.Stack.Domain) && !args.OtherSite {
		return &provision.Failure{Code: "backup-site", Message: fmt.Sprintf("the backup is of the domain %s on the rack %s, node %s serves %s on %s. Nothing has changed", args.Domain, args.Rack, plan.Node, plan.Stack.Domain, plan.Rack),
			Next: "Add --from-other-site if that is what you want"}
	}
	old, err := filepath.Glob("/" + loaded + "*")
	if err != nil {
		return err
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	part := func(name string, use func(io.Reader) error) error {
		p, ok := args.Part(name)
		if !ok {
			return nil
		}
		say("loading "+name, 0, p.Size)
		r, err := take(ctx, name)
		if err != nil {
			return err
		}
		defer r.Close()
		sum := &summed{r: r, hash: sha256.New()}
		err = use(sum)
		if err == nil {
			_, err = io.Copy(io.Discard, sum) // what a reader leaves: padding
		}
		if sum.err != nil {
			err = sum.err // why it broke off
		}
		if err == nil && (sum.size != p.Size || hex.EncodeToString(sum.hash.Sum(nil)) != p.SHA256) {
			err = fmt.Errorf("it came with %d bytes and another hash than that of the backup's %d bytes", sum.size, p.Size)
		}
		if err != nil {
			return fmt.Errorf("part %s of node %s: %w. Nothing has changed", name, plan.Node, err)
		}
		return nil
	}
	if _, ok := args.Part(provision.PartDatabase); ok {
		d, err := openDatabase(plan, sec, asAdmin)
		if err != nil {
			return err
		}
		if _, err := d.sql(ctx, "postgres", openExpr); err != nil { // of a switch that was cut off
			return err
		}
		here, err := d.schema(ctx)
		if err != nil {
			return err
		}
		if newer := provision.NewerSchema(args.Schema, here); len(newer) > 0 {
			return &provision.Failure{Code: "backup-newer", Message: fmt.Sprintf("the backup is of a newer ejabberd: its tables of %s are newer than those here. Nothing has changed", strings.Join(newer, ", ")),
				Next: "Bring the rack to that version first"}
		}
		if err := part(provision.PartDatabase, func(r io.Reader) error { return d.load(ctx, r) }); err != nil {
			short, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			d.sql(short, "postgres", "DROP DATABASE IF EXISTS "+dbLoaded+" WITH (FORCE);\n") // or the next restore does
			return err
		}
		// Only now it is good.
		if _, err := d.sql(ctx, "postgres", "COMMENT ON DATABASE "+dbLoaded+" IS '"+mark(args.ID)+"';\n"); err != nil {
			return err
		}
	}
	uid, err1 := idOf("/", "passwd", "ejabberd")
	gid, err2 := idOf("/", "group", "ejabberd")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	return part(provision.PartUploads, func(r io.Reader) error { return unpackFiles(r, "/"+loaded+args.ID, uid, gid) })
}

// mark is what a database's comment says once it holds a restored backup.
func mark(id string) string { return "platter restore " + id }

func validID(id string) bool {
	b, err := hex.DecodeString(id)
	return err == nil && len(b) > 0 && len(b) <= 32
}

// load makes the database beside ejabberd's.
func (d *database) load(ctx context.Context, r io.Reader) error {
	for _, s := range []string{"DROP DATABASE IF EXISTS " + dbLoaded + " WITH (FORCE);\n", "DROP DATABASE IF EXISTS " + dbReplaced + " WITH (FORCE);\n",
		"CREATE DATABASE " + dbLoaded + " OWNER " + asOwner + ";\n"} {
		if _, err := d.sql(ctx, "postgres", s); err != nil {
			return err
		}
	}
	cmd := d.program(ctx, "pg_restore", dbLoaded, "--exit-on-error", "--no-owner", "--no-privileges", "--role="+asOwner)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = r, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("pg_restore: %w: %s", err, last(stderr.String()))
	}
	return nil
}

const openExpr = "ALTER DATABASE " + dbName + " ALLOW_CONNECTIONS true;\n"

const (
	quietLimit  = 5 * time.Minute  // until ejabberd has stopped on all nodes
	switchLimit = 10 * time.Minute // until the new database is in place
)

// Replace stops ejabberd here, has what Load has laid beside take the place of
// what is there, and starts ejabberd again, in any case. Who has the database's
// part renames the databases, once no ejabberd uses them any more; the others
// wait for that: which data count is said by the database alone. Cut off at any
// point and called again it ends with one or the other on all nodes.
func Replace(ctx context.Context, plan provision.Plan, sec provision.StackSecrets, args provision.RestoreArgs, say Say) (result provision.ReplaceResult, err error) {
	if !validID(args.ID) {
		return result, fmt.Errorf("%.80q is not the ID of a restore", args.ID)
	}
	_, leads := args.Part(provision.PartDatabase)
	user := asOwner
	if leads {
		user = asAdmin
	}
	d, err := openDatabase(plan, sec, user)
	if err != nil {
		return result, err
	}
	m, err := local(plan)
	if err != nil {
		return result, err
	}
	sd, err := hostprep.DialSystemd(ctx)
	if err != nil {
		return result, err
	}
	defer sd.Close()
	m.unit = sd.Unit("ejabberd.service")

	say("stopping ejabberd", 0, 0)
	err = m.unit.Stop(ctx)
	if err == nil {
		say("waiting for the new data", 0, 0)
		if leads {
			err = d.rename(ctx, args.ID)
		} else {
			err = d.renamed(ctx, args.ID)
		}
	}
	if err == nil {
		result.New = true
		if _, ok := args.Part(provision.PartUploads); ok {
			err = swapFiles(args.ID)
		}
	}
	say("starting ejabberd", 0, 0)
	for n := 0; ; n++ {
		err2 := m.unit.Restart(ctx)
		if err2 == nil {
			break
		}
		if n == 4 || provision.Sleep(ctx, m.pause(n)) != nil {
			return result, errors.Join(err, err2)
		}
	}
	if err != nil {
		return result, err
	}
	if leads {
		if _, err := d.sql(ctx, "postgres", "DROP DATABASE IF EXISTS "+dbReplaced+" WITH (FORCE);\n"); err != nil {
			return result, err
		}
	}
	// A backup from another site knows other passwords. After a power cut ejabberd
	// may be started once more meanwhile.
	for n, began := 0, time.Now(); ; n++ {
		err := m.accounts(ctx, sec)
		if err == nil || time.Since(began) > quietLimit || provision.Sleep(ctx, m.pause(n)) != nil {
			return result, err
		}
	}
}

// rename puts the loaded database in the place of ejabberd's, which nobody may
// use any more.
func (d *database) rename(ctx context.Context, id string) error {
	for began := time.Now(); ; {
		done, err := d.comment(ctx, dbName)
		if err == nil && done == mark(id) {
			return nil
		}
		ready, users := "", ""
		if err == nil {
			ready, err = d.comment(ctx, dbLoaded)
		}
		if err == nil && ready != mark(id) {
			return &provision.Failure{Code: "restore-lost", Message: "the database that was loaded is not there any more; the old data are in place",
				Next: "Run 'platter stack restore' again"}
		}
		if err == nil {
			users, err = d.sql(ctx, "postgres", "SELECT string_agg(DISTINCT coalesce(host(client_addr), 'the host itself'), ' ') FROM pg_stat_activity WHERE datname = '"+dbName+"';\n")
		}
		own := d.plan.Net.Address.Addr().String()
		if err == nil && (users == "" || users == own) {
			statements := ""
			if users != "" {
				// After a power cut this host starts its own again; that is
				// restarted in the end.
				statements = "ALTER DATABASE " + dbName + " ALLOW_CONNECTIONS false;\nSELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '" + dbName + "';\n"
			}
			_, err = d.sql(ctx, "postgres", statements+"BEGIN;\nALTER DATABASE "+dbName+" RENAME TO "+dbReplaced+";\nALTER DATABASE "+dbLoaded+" RENAME TO "+dbName+";\nCOMMIT;\n")
			if err == nil {
				return nil
			}
			_, err2 := d.sql(ctx, "postgres", openExpr)
			err = errors.Join(err, err2)
		}
		if err == nil {
			err = fmt.Errorf("the database is in use from %s", d.names(users))
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Since(began) > quietLimit {
			return &provision.Failure{Code: "restore-switch", Message: fmt.Sprintf("the databases were not exchanged within %s: %v; the old data are in place", quietLimit, err),
				Next: "See that these nodes are on and reach the disc host, then run 'platter stack restore' again"}
		}
		if err := provision.Sleep(ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
}

// names are the nodes with these addresses.
func (d *database) names(addresses string) string {
	var out []string
	for _, a := range strings.Fields(addresses) {
		addr, _ := netip.ParseAddr(a)
		if i := slices.IndexFunc(d.plan.Hosts, func(h provision.Host) bool { return h.Address == addr }); i >= 0 {
			a = d.plan.Hosts[i].Name
		}
		out = append(out, a)
	}
	return strings.Join(out, ", ")
}

// renamed waits until the loaded database is in place.
func (d *database) renamed(ctx context.Context, id string) error {
	var now string
	var err error
	for began := time.Now(); time.Since(began) < switchLimit; {
		now, err = d.comment(ctx, dbName)
		if err == nil && now == mark(id) {
			return nil
		}
		var there string
		if err == nil {
			there, err = d.comment(ctx, dbLoaded)
		}
		if err == nil && there != mark(id) {
			// It may have moved between the two questions.
			if now, err = d.comment(ctx, dbName); err == nil && now != mark(id) {
				return &provision.Failure{Code: "restore-lost", Message: "the backup's database was not put in place; the old data are in place", Next: "Run 'platter stack restore' again"}
			}
		}
		if err := provision.Sleep(ctx, time.Second); err != nil {
			return err
		}
	}
	return &provision.Failure{Code: "restore-switch", Message: fmt.Sprintf("the backup's database was not put in place within %s (%v); the old data are in place as far as node %s knows", switchLimit, err, d.plan.Node),
		Next: "See 'platter node orders' for the node that has to do it, then run 'platter stack restore' again"}
}

// swapFiles puts the loaded files in the place of those that are there.
func swapFiles(id string) error {
	from := "/" + loaded + id
	if _, err := os.Stat(from); err == nil {
		if _, err := os.Stat("/" + replaced); errors.Is(err, fs.ErrNotExist) {
			if err := os.Rename("/"+uploads, "/"+replaced); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := os.Rename(from, "/"+uploads); err != nil {
			return err
		}
		if err := syncDir("/" + spool); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll("/" + replaced)
}
