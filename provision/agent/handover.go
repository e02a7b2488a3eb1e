package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"aead.dev/minisign"
	"github.com/dustin/go-humanize"
	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"platter/hostprep"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/jsonfile"
)

// What a node is that becomes a disc host.
const (
	successorDir  = provision.SuccessorDir
	successorUnit = "platter-serve.service"
	// successorSpare stays free on the disk, in bytes.
	successorSpare = 1 << 30
)

const successorUnitText = `[Unit]
Description=Platter disc host of this rack
After=network.target
Wants=network.target
ConditionPathExists=` + successorDir + `/` + provision.ReceiptFile + `

[Service]
ExecStart=` + successorDir + `/platter serve --successor ` + successorDir + `
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
`

// handoverAPI is what a handover asks of the old disc host; client.Node is one.
type handoverAPI interface {
	Handover(ctx context.Context, order int64) (provision.HandoverList, error)
	HandoverState(ctx context.Context, order int64) (provision.HandoverList, error)
	HandoverFile(ctx context.Context, order int64, path string, from int64) (io.ReadCloser, error)
	CommitHandover(ctx context.Context, order int64, state string) (provision.SignedReceipt, error)
	HandoverTaken(ctx context.Context, order int64, state string) error
}

// succession makes this node the disc host. Everything it does may be cut off and
// done again.
type succession struct {
	dir   string
	api   handoverAPI
	free  func(dir string) (bytes int64, err error)
	ports func(address netip.Addr) error  // why a disc host could not listen there
	serve func(ctx context.Context) error // starts the new disc host, and waits until it answers
	retry time.Duration                   // between tries, at most; they begin with a tenth of it
	leave time.Duration                   // before the start, for the old disc host to hear that it may go
}

// handingOver makes the kind of provision.OrderHandover.
func handingOver(node *client.Node) orderKind {
	s := succession{dir: successorDir, api: node, free: freeBytes, ports: freePorts, retry: 5 * time.Second, leave: 30 * time.Second}
	s.serve = func(ctx context.Context) error { return startSuccessor(ctx, node) }
	return s.kind()
}

func (s succession) kind() orderKind {
	return orderKind{within: 24 * time.Hour, bound: s.bound, do: func(ctx context.Context, t task, say progress) (any, error) {
		return nil, s.run(ctx, t.Order, say)
	}}
}

// bound tells whether the old disc host may have given up the rack for this order:
// then nobody serves before the order is carried out.
func (s succession) bound(order provision.Order) bool {
	note, _, err := s.arrived(order)
	return note != nil || err != nil
}

// run carries the order out, from wherever it was cut off.
func (s succession) run(ctx context.Context, order provision.Order, say progress) error {
	note, receipt, err := s.arrived(order)
	if err != nil {
		return err
	}
	if receipt == nil && note != nil {
		// The state is here. Whether the switch has happened, only the old one knows.
		say("asks whether it is the disc host", 0, 0)
		if receipt, err = s.commit(ctx, order, *note); err != nil && !client.Refused(err, client.CodeStale) {
			return err
		}
	}
	if receipt == nil {
		if err := s.fetchAll(ctx, order, say); err != nil {
			return err
		}
	}
	for receipt == nil {
		if note, err = s.fetchState(ctx, order, say); err != nil {
			return err
		}
		if receipt, err = s.commit(ctx, order, *note); err != nil && !client.Refused(err, client.CodeStale) {
			return err
		}
	}
	say("is the disc host: waits until the old one has gone", 0, 0)
	return s.takeOver(ctx, order, note.Digest())
}

// arrived returns what an earlier try has brought to its end: the note that the
// state is complete, and the receipt. One that cannot be read is given again.
func (s succession) arrived(order provision.Order) (*provision.HandoverList, *provision.SignedReceipt, error) {
	var note provision.HandoverNote
	err := jsonfile.Read(filepath.Join(s.dir, provision.NoteFile), &note)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (note.Order != order.ID || !note.Created.Equal(order.Created)) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var receipt provision.SignedReceipt
	if jsonfile.Read(filepath.Join(s.dir, provision.ReceiptFile), &receipt) != nil || checkReceipt(receipt, note.HandoverList, order) != nil {
		return &note.HandoverList, nil, nil
	}
	return &note.HandoverList, &receipt, nil
}

// commit asks for the receipt until there is an answer, and keeps it.
func (s succession) commit(ctx context.Context, order provision.Order, state provision.HandoverList) (*provision.SignedReceipt, error) {
	var receipt provision.SignedReceipt
	err := s.again(ctx, func() (err error) {
		receipt, err = s.api.CommitHandover(ctx, order.ID, state.Digest())
		return err
	})
	if client.Refused(err, client.CodeUnknownOrder) || client.Refused(err, client.CodeSuperseded) {
		// The old disc host serves, and waits for this order no more: it was taken back, or
		// this node is to be installed anew.
		return nil, errors.Join(err, os.Remove(filepath.Join(s.dir, provision.NoteFile)))
	}
	if err != nil {
		return nil, err
	}
	if err := checkReceipt(receipt, state, order); err != nil {
		return nil, err
	}
	return &receipt, s.keep(provision.ReceiptFile, receipt)
}

// checkReceipt tells whether a receipt is for this order and state.
func checkReceipt(signed provision.SignedReceipt, state provision.HandoverList, order provision.Order) error {
	wrong := func(why string) error {
		return &provision.Failure{Code: "handover-receipt", Message: "the receipt for the rack is not what it should be: " + why,
			Next: "Look at 'platter serve' on the old disc host; it alone knows whether it was handed over"}
	}
	var key minisign.PublicKey
	if err := key.UnmarshalText([]byte(state.Key)); err != nil {
		return wrong("the site's key cannot be read: " + err.Error())
	}
	if !minisign.Verify(key, signed.Receipt, signed.Signature) {
		return wrong("it is not signed by the site")
	}
	var r provision.HandoverReceipt
	if err := json.Unmarshal(signed.Receipt, &r); err != nil {
		return wrong(err.Error())
	}
	if r.Order != order.ID || r.Node != state.Node || r.State != state.Digest() {
		return wrong("it is for another handover")
	}
	return nil
}

// again repeats what may succeed later.
func (s succession) again(ctx context.Context, do func() error) error {
	for n := 0; ; n++ {
		err := do()
		var final *provision.Failure
		if err == nil || !client.Retryable(err) || errors.As(err, &final) {
			return err
		}
		if e := provision.Sleep(ctx, min(s.retry, s.retry/10<<min(n, 4))); e != nil {
			return errors.Join(err, e)
		}
	}
}

// takeOver starts the new disc host, when the old one has heard that it may go. One that
// does not answer has gone, or comes back, maybe with its address, and then waits for
// that word: it is told until the new disc host answers in its place.
func (s succession) takeOver(ctx context.Context, order provision.Order, state string) error {
	telling, stop := context.WithCancel(ctx)
	told := make(chan struct{})
	go func() {
		defer close(told)
		s.again(telling, func() error { return s.api.HandoverTaken(telling, order.ID, state) })
	}()
	defer func() { stop(); <-told }()
	select {
	case <-told:
	case <-time.After(s.leave):
	case <-ctx.Done():
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.serve(ctx)
}

// fetchAll brings the program, its files and the store.
func (s succession) fetchAll(ctx context.Context, order provision.Order, say progress) error {
	var list provision.HandoverList
	err := s.again(ctx, func() (err error) { list, err = s.api.Handover(ctx, order.ID); return err })
	if err != nil {
		return err
	}
	if err := checkPaths(list, false); err != nil {
		return err
	}
	if err := s.ports(list.Address.Addr()); err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	missing := int64(0)
	for _, f := range list.Files {
		st, err := os.Stat(s.path(f))
		if err != nil || st.Size() != f.Size {
			missing += f.Size
		}
	}
	free, err := s.free(s.dir)
	if err != nil {
		return err
	}
	if need := missing + successorSpare; free < need {
		return &provision.Failure{Code: "no-room", Message: fmt.Sprintf("%s has %s free for the disc host's store, and needs %s", list.Node, humanize.IBytes(uint64(free)), humanize.IBytes(uint64(need))),
			Next: "Make room on its disk, or hand the rack over to another node"}
	}
	done, total := int64(0), list.Size()
	for _, f := range list.Files {
		step := func(n int64) {
			done += n
			say("fetches what a disc host needs", done, total)
		}
		if err := s.fetch(ctx, order, f, s.path(f), step); err != nil {
			return err
		}
	}
	// What an earlier handover left must not be taken for the rack's.
	return s.prune(list, "rack", "stack", "store/refs", "store/keys", "store/sets")
}

// fetchState brings the state, and notes when it is complete.
func (s succession) fetchState(ctx context.Context, order provision.Order, say progress) (*provision.HandoverList, error) {
	say("fetches the journal and the site's secrets: the disc host answers nobody else meanwhile", 0, 0)
	// From here on the state of an earlier handover counts no more.
	for _, name := range []string{provision.ReceiptFile, provision.NoteFile, "state"} {
		if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
			return nil, err
		}
	}
	var list provision.HandoverList
	for { // the copy may be gone before all of it is here
		err := s.again(ctx, func() (err error) { list, err = s.api.HandoverState(ctx, order.ID); return err })
		if err == nil {
			err = checkPaths(list, true)
		}
		if err != nil {
			return nil, err
		}
		for _, f := range list.Files {
			if err = s.fetch(ctx, order, f, s.path(f), func(int64) {}); err != nil {
				break
			}
		}
		if client.Refused(err, client.CodeStale) {
			continue
		}
		if err == nil {
			err = s.keep(provision.NoteFile, provision.HandoverNote{HandoverList: list, Order: order.ID, Created: order.Created})
		}
		return &list, err
	}
}

func checkPaths(list provision.HandoverList, state bool) error {
	var wrong []error
	for _, f := range list.Files {
		if !provision.ValidHandoverPath(f.Path) || strings.HasPrefix(f.Path, "state/") != state || !provision.ValidDigest(f.Digest) || f.Size < 0 {
			wrong = append(wrong, fmt.Errorf("the disc host names a file %.100q that it may not hand over", f.Path))
		}
	}
	return errors.Join(wrong...)
}

func (s succession) path(f provision.HandoverFile) string {
	return filepath.Join(s.dir, filepath.FromSlash(f.Path))
}

// fetch brings one file to where it belongs, unless it is there. What a try that
// was cut off has brought is not fetched again.
func (s succession) fetch(ctx context.Context, order provision.Order, f provision.HandoverFile, to string, step func(int64)) error {
	if sum, size, err := sumFile(to); err == nil && sum == f.Digest && size == f.Size {
		step(f.Size)
		return os.Chmod(to, os.FileMode(f.Mode))
	}
	mode := os.FileMode(0o755)
	if strings.HasPrefix(f.Path, "state/") {
		mode = 0o700
	}
	if err := os.MkdirAll(filepath.Dir(to), mode); err != nil {
		return err
	}
	part := filepath.Join(filepath.Dir(to), ".part-"+filepath.Base(to))
	damaged, seen := 0, int64(0) // seen: bytes that step was told of
	return s.again(ctx, func() error {
		if err := s.append(ctx, order, f, part, &seen, step); err != nil {
			return err
		}
		sum, size, err := sumFile(part)
		if err != nil {
			return onDisk(err)
		}
		if sum != f.Digest || size != f.Size {
			if err := os.Remove(part); err != nil {
				return onDisk(err)
			}
			if damaged++; damaged > 2 {
				return &provision.Failure{Code: "handover-damaged", Message: fmt.Sprintf("%s arrived damaged %d times", f.Path, damaged),
					Next: "Run 'platter image verify' on the disc host; 'platter host handover' again goes on where this ended"}
			}
			return fmt.Errorf("%s is damaged", f.Path)
		}
		return place(part, to, os.FileMode(f.Mode))
	})
}

// append fetches what part lacks of f.
func (s succession) append(ctx context.Context, order provision.Order, f provision.HandoverFile, part string, seen *int64, step func(int64)) error {
	out, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return onDisk(err)
	}
	defer out.Close()
	have, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return onDisk(err)
	}
	step(have - *seen)
	*seen = have
	if have >= f.Size {
		return nil
	}
	in, err := s.api.HandoverFile(ctx, order.ID, f.Path, have)
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := io.Copy(counted{out, func(n int64) { *seen += n; step(n) }}, io.LimitReader(in, f.Size-have)); err != nil {
		return err
	}
	return nil
}

// counted tells what is written, and a disk that takes no more from a connection
// that breaks off.
type counted struct {
	w    io.Writer
	step func(int64)
}

func (c counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.step(int64(n))
	if err != nil {
		err = onDisk(err)
	}
	return n, err
}

func onDisk(err error) error {
	if err == nil {
		return nil
	}
	return &provision.Failure{Code: "handover-disk", Message: "what a disc host needs cannot be kept: " + err.Error(),
		Next: "Look at the disk's free space and health. An order that has failed by this is given anew with 'platter host handover', and goes on where this ended"}
}

// place makes part the file to, durably.
func place(part, to string, mode os.FileMode) error {
	f, err := os.Open(part)
	if err != nil {
		return onDisk(err)
	}
	defer f.Close()
	return onDisk(errors.Join(f.Chmod(mode), f.Sync(), os.Rename(part, to), syncDir(filepath.Dir(to))))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// keep writes v to a file that only root may read, durably.
func (s succession) keep(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return onDisk(errors.Join(renameio.WriteFile(filepath.Join(s.dir, name), b, 0o600, renameio.WithTempDir(s.dir)), syncDir(s.dir)))
}

// prune removes what is in folders and not on the list.
func (s succession) prune(list provision.HandoverList, folders ...string) error {
	wanted := map[string]bool{}
	for _, f := range list.Files {
		wanted[s.path(f)] = true
	}
	for _, folder := range folders {
		err := filepath.WalkDir(filepath.Join(s.dir, folder), func(file string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || d.IsDir() || wanted[file] {
				return err
			}
			return os.Remove(file)
		})
		if err != nil {
			return onDisk(err)
		}
	}
	return nil
}

func sumFile(name string) (digest string, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// freeBytes is what root may still write to the file system of dir.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("the free space of %s is not known: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// freePorts tells which ports of a disc host another program has, of an address that
// this node does not have yet (IP_FREEBIND in ip(7)). The web server of the stack
// shares its port with the disc host.
func freePorts(address netip.Addr) error {
	var taken []string
	for _, p := range []struct {
		network string
		port    uint16
	}{{"tcp", provision.HTTPPort}, {"tcp", provision.NodeAPIPort}, {"udp", 67}, {"udp", 69}} {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
				if p.port == provision.HTTPPort {
					err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
				}
			})
			return errors.Join(cerr, err)
		}}
		var l io.Closer
		var err error
		at := netip.AddrPortFrom(address, p.port).String()
		if p.network == "udp" {
			l, err = lc.ListenPacket(context.Background(), "udp4", at)
		} else {
			l, err = lc.Listen(context.Background(), "tcp4", at)
		}
		if err != nil {
			taken = append(taken, fmt.Sprintf("%s port %d (%v)", strings.ToUpper(p.network), p.port, err))
			continue
		}
		l.Close()
	}
	if len(taken) > 0 {
		return &provision.Failure{Code: "port-taken", Message: "a disc host could not listen on this node: " + strings.Join(taken, ", "),
			Next: "'ss -lnp' on the node names the program. Where it is the web server of a node that was installed by an older version, take the rack to a newer release of the stack, or install the node anew"}
	}
	return nil
}

// startSuccessor installs and starts the unit of the new disc host, and waits
// until it answers.
func startSuccessor(ctx context.Context, node *client.Node) error {
	const folder = "/etc/systemd/system"
	wants := filepath.Join(folder, "multi-user.target.wants")
	err := errors.Join(
		renameio.WriteFile(filepath.Join(folder, successorUnit), []byte(successorUnitText), 0o644),
		os.MkdirAll(wants, 0o755),
		renameio.Symlink("../"+successorUnit, filepath.Join(wants, successorUnit)),
		syncDir(folder), syncDir(wants))
	if err != nil {
		return onDisk(err)
	}
	sd, err := hostprep.DialSystemd(ctx)
	if err != nil {
		return err
	}
	defer sd.Close()
	if err := sd.Reload(ctx); err != nil {
		return err
	}
	if err := sd.Unit(successorUnit).Start(ctx); err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for n := 0; ; n++ {
		// Only a disc host that serves answers this; the old one has stopped doing so.
		if _, err = node.Join(short); err == nil {
			return nil
		}
		if provision.Sleep(short, min(2*time.Second, 100*time.Millisecond<<min(n, 5))) != nil {
			return &provision.Failure{Code: "handover-start", Message: "the new disc host does not answer: " + err.Error(),
				Next: "Look at 'journalctl -u " + successorUnit + "' on the node: it waits while another machine has the disc host's address"}
		}
	}
}
