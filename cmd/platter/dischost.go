package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"platter/images"
	"platter/images/disc"
	"platter/provision"
	"platter/provision/rack"
)

// keepLabel is the label of a file system that a disc host takes its rack file
// from, and keeps its state on, without being asked.
const keepLabel = "PLATTER"

// discHostCmd is what a machine runs that was booted from a disc: the installer's
// early boot starts it. It is for that console.
func discHostCmd() *cobra.Command {
	var o discHostOptions
	c := &cobra.Command{
		Use: "host --disc PATH", Short: "Serve a rack from the disc that this machine was booted from: asks on its console", Args: cobra.NoArgs,
		Long: `Turn this machine, which was booted from a disc, into a disc host: find the rack
file, choose the network interface, choose where the state is kept, and serve.

A rack file (*.yaml) is looked for at the top of every USB stick and disk with a
FAT or ext4 file system, in the state that was kept there, and in the folder racks
of the disc. Nothing is written to any of them until one is chosen for the state.
Where exactly one file system labelled PLATTER has exactly one rack file, and
there is no doubt about the interface, the machine begins by itself after --wait.

The same is chosen on a page, which also takes a rack file from a browser: the
console shows its address, which is one that computers give themselves where no
DHCP server answers (169.254.0.0/16), and the code that opens it.

It changes the addresses of this machine's interfaces: it is for machines that do
nothing else.`,
		RunE: func(c *cobra.Command, _ []string) error {
			o.in, o.out, o.err, o.page = c.InOrStdin(), c.OutOrStdout(), c.ErrOrStderr(), openChooser
			return o.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&o.disc, "disc", "", "where the disc is mounted")
	f.StringVar(&o.device, "device", "", "the drive that it is in: left out when rack files are looked for")
	f.DurationVar(&o.wait, "wait", 30*time.Second, "begin by itself after this long, where there is no doubt; 0: always ask")
	c.MarkFlagRequired("disc")
	return c
}

const (
	// lookFolder is where file systems are mounted.
	lookFolder = "/run/platter/look"
	// uploadFolder has the rack file that came over the page.
	uploadFolder = "/run/platter/upload"
	// stateFolder is the state's, on a file system that people chose for it. Its
	// folder racks has the rack file where that came from elsewhere.
	stateFolder = "platter-state"
)

type discHostOptions struct {
	disc, device string
	wait         time.Duration
	in           io.Reader
	out, err     io.Writer
	// page opens the page to choose on; openChooser.
	page func(ctx context.Context, m machine, look func(context.Context) (machine, error)) (*chooser, error)
}

// machine is what a disc host may choose from.
type machine struct {
	nics   []nic
	places []place
	racks  []rackFile
	notes  []string // what was found and cannot be used
}

type nic struct {
	name, mac string
	carrier   bool
}

// place is a file system that could keep the state.
type place struct {
	device, kind, label string
	size                int64 // bytes
	dir                 string
}

// rackFile is one that can be read.
type rackFile struct {
	path  string
	place int // index in places; -1: on the disc, or it came over the page
	rack  *provision.Rack
}

// choice is what a disc host goes by.
type choice struct {
	rack  int
	nics  []string // for each network of the rack file
	place int      // where the state is kept; -1: in memory
}

// propose chooses what there is no doubt about. sure is false where somebody has
// to be asked.
func (m machine) propose() (c choice, sure bool) {
	c, sure = choice{rack: -1, place: -1}, true
	var keep []int
	for i, p := range m.places {
		if p.label == keepLabel {
			keep = append(keep, i)
		}
	}
	if len(keep) == 1 {
		c.place = keep[0]
	} else {
		sure = false
	}
	var here []int
	for i, r := range m.racks {
		if c.place >= 0 && r.place == c.place {
			here = append(here, i)
		}
	}
	switch {
	case len(here) == 1:
		c.rack = here[0]
	case len(m.racks) == 1:
		c.rack, sure = 0, false
	default:
		return c, false
	}
	c.nics, sure = m.wires(m.racks[c.rack].rack, sure)
	return c, sure
}

// wires finds an interface for each network: the one of the rack file's name, or
// the only one with a link.
func (m machine) wires(r *provision.Rack, sure bool) ([]string, bool) {
	var up []string
	for _, n := range m.nics {
		if n.carrier {
			up = append(up, n.name)
		}
	}
	var out []string
	for _, nw := range r.Networks {
		switch {
		case slices.ContainsFunc(m.nics, func(n nic) bool { return n.name == nw.Interface && n.carrier }):
			out = append(out, nw.Interface)
		case len(r.Networks) == 1 && len(up) == 1:
			out = append(out, up[0])
		default:
			out, sure = append(out, ""), false
		}
	}
	return out, sure
}

// run serves until the machine is switched off. What ends it is said, and
// somebody decides how to go on.
func (o discHostOptions) run(ctx context.Context) error {
	ask := &asker{out: o.out, in: bufio.NewReader(o.in)}
	for {
		fmt.Fprintf(o.out, "\nThis machine becomes a disc host. Nothing on its disks is changed.\n")
		err := o.once(ctx, ask)
		if ctx.Err() != nil {
			return err
		}
		if err != nil {
			fmt.Fprintf(o.out, "\nIT DOES NOT SERVE\n%v\n", err)
		} else {
			fmt.Fprintf(o.out, "\nIt serves no longer: it was stopped, or the rack was handed over to a node.\n")
		}
		for again := false; !again; {
			fmt.Fprintf(o.out, "\nEnter: begin again. 's' and Enter: a shell.\n")
			line, lerr := ask.line(ctx)
			if lerr != nil {
				return errors.Join(err, lerr)
			}
			if again = line != "s"; !again {
				o.shell(ctx)
			}
		}
	}
}

func (o discHostOptions) once(ctx context.Context, ask *asker) error {
	for o.device != "" { // there may be another disc in the drive than the last time
		if _, err := os.Stat(filepath.Join(o.disc, disc.Program)); err == nil {
			break
		}
		unix.Unmount(o.disc, 0)
		if drives := o.drives(); o.mount(&drives, disc.Program) != "" {
			break
		}
		fmt.Fprintln(o.out, "Insert volume 1 and press Enter.")
		if _, err := ask.line(ctx); err != nil {
			return err
		}
	}
	m, err := o.look(ctx)
	if err != nil {
		return err
	}
	if len(m.nics) == 0 {
		return errors.New("this machine has no network interface that the disc has a driver for: use another machine, or another card")
	}
	m, c, err := o.choose(ctx, m, ask)
	if err != nil {
		return err
	}
	return o.serve(ctx, m, c, ask)
}

// shell gives the console away until somebody is done with it.
func (o discHostOptions) shell(ctx context.Context) {
	fmt.Fprintln(o.out, "A shell, with the command platter. It ends with 'exit'.")
	sh := exec.CommandContext(ctx, "/bin/sh")
	sh.Stdin, sh.Stdout, sh.Stderr = os.Stdin, o.out, o.err
	if err := sh.Run(); err != nil {
		fmt.Fprintf(o.out, "the shell ended: %v\n", err)
	}
}

func (n nic) String() string {
	link := "no link"
	if n.carrier {
		link = "link"
	}
	return fmt.Sprintf("%s %s, %s", n.name, n.mac, link)
}

func (p place) String() string {
	label := ""
	if p.label != "" {
		label = " labelled " + p.label
	}
	return fmt.Sprintf("%s, %s %s%s", p.device, bytesOf(p.size), p.kind, label)
}

func (m machine) show(w io.Writer) {
	fmt.Fprintln(w, "\nInterfaces:")
	for _, n := range m.nics {
		fmt.Fprintf(w, "  %s\n", n)
	}
	fmt.Fprintln(w, "Rack files:")
	for _, r := range m.racks {
		fmt.Fprintf(w, "  %s\n", r)
	}
	for _, note := range m.notes {
		fmt.Fprintln(w, note)
	}
}

func (r rackFile) String() string {
	return fmt.Sprintf("%s: rack %s, %d %s", r.path, r.rack.Name, len(r.rack.Nodes), plural(len(r.rack.Nodes), "node"))
}

// look finds what this machine has. All file systems are mounted to be read.
func (o discHostOptions) look(ctx context.Context) (m machine, err error) {
	if m.nics, err = nics(ctx, 10*time.Second); err != nil {
		return m, err
	}
	dirs, err := filepath.Glob("/sys/class/block/*")
	if err != nil {
		return m, err
	}
	before, _ := filepath.Glob(lookFolder + "/*")
	for _, dir := range before { // of the last time
		unix.Unmount(dir, 0)
	}
	for _, dir := range dirs {
		name := filepath.Base(dir)
		device := "/dev/" + name
		if strings.HasPrefix(device, o.device) && o.device != "" || strings.HasPrefix(name, "ram") || strings.HasPrefix(name, "loop") {
			continue
		}
		p := place{device: device, dir: filepath.Join(lookFolder, name)}
		if p.kind, p.label, err = fileSystem(device); err != nil || p.kind == "" {
			continue
		}
		if err := mountPlace(p, unix.MS_RDONLY); err != nil {
			m.notes = append(m.notes, fmt.Sprintf("%s cannot be mounted: %v", device, err))
			continue
		}
		sectors, _ := os.ReadFile(filepath.Join(dir, "size"))
		n, _ := strconv.ParseInt(strings.TrimSpace(string(sectors)), 10, 64)
		p.size = n * 512
		m.places = append(m.places, p)
		m.find(p.dir, len(m.places)-1)
		m.find(filepath.Join(p.dir, stateFolder, "racks"), len(m.places)-1)
	}
	m.find(filepath.Join(o.disc, "racks"), -1)
	m.find(uploadFolder, -1)
	return m, nil
}

// find reads the rack files in a folder.
func (m *machine) find(dir string, place int) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.yaml"))
	for _, f := range files {
		r, err := rack.Load(f)
		if err != nil {
			if text, _ := os.ReadFile(f); bytes.Contains(text, []byte("nodes:")) {
				m.notes = append(m.notes, fmt.Sprintf("%s is no rack file that can be used:\n%v", f, err))
			}
			continue
		}
		m.racks = append(m.racks, rackFile{f, place, r})
	}
}

// nics brings up every interface that is a real device and waits for links.
func nics(ctx context.Context, patience time.Duration) (out []nic, err error) {
	for end := time.Now().Add(patience); ; {
		links, err := netlink.LinkList()
		if err != nil {
			return nil, fmt.Errorf("network interfaces cannot be listed: %w", err)
		}
		out = nil
		all := true
		for _, l := range links {
			a := l.Attrs()
			if _, err := os.Stat(filepath.Join("/sys/class/net", a.Name, "device")); err != nil {
				continue
			}
			if a.Flags&net.FlagUp == 0 {
				if err := netlink.LinkSetUp(l); err != nil {
					return nil, fmt.Errorf("interface %s cannot be brought up: %w", a.Name, err)
				}
			}
			up := a.OperState == netlink.OperUp || a.OperState == netlink.OperUnknown && a.Flags&net.FlagRunning != 0
			all = all && up
			out = append(out, nic{a.Name, a.HardwareAddr.String(), up})
		}
		if len(out) > 0 && all || time.Now().After(end) {
			return out, nil
		}
		if err := provision.Sleep(ctx, 300*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// fileSystem tells what a device holds by its superblock: ext4 (its magic number
// is at 0x438, its label at 0x478) or FAT (0x36 or 0x52, the label before it).
// kind is empty for anything else.
func fileSystem(device string) (kind, label string, err error) {
	f, err := os.Open(device)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	b := make([]byte, 2048)
	if _, err := io.ReadFull(f, b); err != nil {
		return "", "", err
	}
	text := func(at, n int) string { return strings.TrimRight(string(bytes.TrimRight(b[at:at+n], "\x00")), " ") }
	switch {
	case b[0x438] == 0x53 && b[0x439] == 0xef:
		return "ext4", text(0x478, 16), nil
	case bytes.HasPrefix(b[0x52:], []byte("FAT32")):
		return "vfat", text(0x47, 11), nil
	case bytes.HasPrefix(b[0x36:], []byte("FAT")):
		return "vfat", text(0x2b, 11), nil
	}
	return "", "", nil
}

// mountPlace mounts a file system for root alone. Reading an ext4 file system
// leaves its journal as it is.
func mountPlace(p place, flags uintptr) error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	options := "umask=0077,quiet"
	if p.kind == "ext4" {
		options = ""
		if flags&unix.MS_RDONLY != 0 {
			options = "noload"
		}
	}
	return unix.Mount(p.device, p.dir, p.kind, flags|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options)
}

// serve gives the interfaces their addresses and serves the rack, with the
// nodes' progress on the console.
func (o discHostOptions) serve(ctx context.Context, m machine, c choice, ask *asker) error {
	var err error
	r := m.racks[c.rack]
	state := "/run/platter/state"
	if c.place >= 0 {
		p := m.places[c.place]
		if err := unix.Unmount(p.dir, 0); err != nil {
			return fmt.Errorf("%s is in use: %w", p.device, err)
		}
		// What has to last is synchronised as it is written; FAT's folders are not.
		flags := uintptr(0)
		if p.kind == "vfat" {
			flags = unix.MS_SYNCHRONOUS
		}
		if err := mountPlace(p, flags); err != nil {
			return fmt.Errorf("%s cannot be mounted to be written to, is it write-protected? %w", p.device, err)
		}
		state = filepath.Join(p.dir, stateFolder)
	} else {
		fmt.Fprintf(o.out, "\nWARNING: the state is in memory. When this machine is switched off, the site's keys are lost with it.\n")
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return fmt.Errorf("the state cannot be kept in %s: %w", state, err)
	}
	path := r.path
	if r.place < 0 { // it goes with the disc, or with this machine's memory
		if path, err = keepRack(r.path, state); err != nil {
			return err
		}
	}
	so := serveOptions{rack: path, state: state, socket: defaultSocket, interfaces: map[string]string{}}
	if err := o.source(ctx, r.rack.Image, &so, ask); err != nil {
		return err
	}
	if lo, err := netlink.LinkByName("lo"); err == nil {
		netlink.LinkSetUp(lo)
	}
	undo, err := giveAddresses(ctx, r.rack, c.nics)
	defer undo()
	if err != nil {
		return err
	}
	for i, nw := range r.rack.Networks {
		so.interfaces[nw.Interface] = c.nics[i]
	}
	log, err := os.OpenFile(filepath.Join(state, "serve.log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("the state cannot be kept in %s: %w", state, err)
	}
	defer log.Close()
	g, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.Go(func() error {
		defer cancel()
		return serve(ctx, so, nil, slog.New(slog.NewTextHandler(log, nil)))
	})
	g.Go(func() error { return o.console(ctx, ask, cancel) })
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// giveAddresses gives the disc host's addresses to the interfaces, one for each network,
// unless another machine has one of them. undo takes away what was given: somebody else
// may have it next, or another interface.
func giveAddresses(ctx context.Context, rack *provision.Rack, nics []string) (undo func(), err error) {
	var given []func()
	undo = func() {
		for _, f := range given {
			f()
		}
	}
	for i, nw := range rack.Networks {
		if err := addressFree(ctx, nics[i], nw.DiscHost); err != nil {
			return undo, err
		}
	}
	for i, nw := range rack.Networks {
		link, err := netlink.LinkByName(nics[i])
		if err != nil {
			return undo, fmt.Errorf("interface %s: %w", nics[i], err)
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: nw.DiscHost.AsSlice(), Mask: net.CIDRMask(nw.Subnet.Bits(), 32)}}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return undo, fmt.Errorf("interface %s cannot be given the address %s: %w", nics[i], nw.DiscHost, err)
		}
		given = append(given, func() { netlink.AddrDel(link, addr) })
	}
	return undo, nil
}

// keepRack copies a rack file, with what lies beside it, into the state, in the
// place of one that is there.
func keepRack(path, state string) (string, error) {
	fail := func(err error) error { return fmt.Errorf("the rack file cannot be kept with the state: %w", err) }
	racks, next := filepath.Join(state, "racks"), filepath.Join(state, "racks.new")
	if err := os.RemoveAll(next); err != nil {
		return "", fail(err)
	}
	if err := os.CopyFS(next, os.DirFS(filepath.Dir(path))); err != nil {
		return "", fail(err)
	}
	if err := os.RemoveAll(racks); err != nil {
		return "", fail(err)
	}
	if err := os.Rename(next, racks); err != nil {
		return "", fail(err)
	}
	return filepath.Join(racks, filepath.Base(path)), nil
}

// source says what to serve from: the disc, or, where the image is on several
// volumes, a copy of them in the state.
func (o discHostOptions) source(ctx context.Context, image string, so *serveOptions, ask *asker) error {
	so.store = filepath.Join(so.state, "store")
	st, err := images.Open(so.store)
	if err != nil {
		return err
	}
	volumes := 0
	err = func() error { // which has closed the disc when it ends
		d, err := disc.Open(st.CheckSignature, o.disc)
		if err != nil {
			return err
		}
		defer d.Close()
		lacks := false
		for name, volumes := range d.Blocked() {
			lacks = lacks || len(volumes) > 0 && (name == image || name == "boot/amd64" || strings.HasPrefix(name, "stack"))
		}
		if !lacks {
			so.discs = []string{o.disc}
			return nil
		}
		volumes = len(d.Set.Volumes)
		so.ipxe = filepath.Join(so.state, "ipxe")
		return d.Extract("ipxe", so.ipxe)
	}()
	if err != nil || len(so.discs) > 0 {
		return err
	}
	fmt.Fprintf(o.out, "\nThe set has %d volumes, which are copied to %s, one after the other.\n", volumes, so.store)
	m := &meter{out: o.out}
	options := disc.ImportOptions{Store: st, Instead: true, Older: true,
		Looked:   func(done, total int64) { m.say("reading the store", done, total) },
		Progress: func(done, total int64) { m.say("copying", done, total) }}
	defer unix.Unmount(o.disc, 0) // nothing is read from it any more
	first := true
	var left []string // drives that were not read since the last change
	return disc.Gather(ctx, options, func(ctx context.Context, _ []int) (string, error) {
		if first { // the disc that was booted from
			first, left = false, slices.DeleteFunc(o.drives(), func(d string) bool { return d == o.device })
			return o.disc, nil
		}
		// A drive does not let go of a disc that is mounted.
		if err := unix.Unmount(o.disc, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return "", fmt.Errorf("the disc in %s is in use and cannot be changed: leave the shell that is in it: %w", o.device, err)
		}
		dev := o.mount(&left, disc.SetFile)
		for dev == "" {
			eject(o.device)
			fmt.Fprintln(o.out, "Change the disc and press Enter. 's' and Enter: a shell; 'q' and Enter: choose anew, what was copied stays.")
			switch line, err := ask.line(ctx); {
			case err != nil:
				return "", err
			case line == "s":
				o.shell(ctx)
				continue
			case line == "q":
				return "", errors.New("not all volumes were copied")
			}
			// A drive that has just been closed is not ready yet, and no event tells when it is.
			for end := time.Now().Add(spinUp); dev == "" && time.Now().Before(end); {
				left = o.drives() // all of them: a stick is another device each time
				if dev = o.mount(&left, disc.SetFile); dev == "" {
					if err := provision.Sleep(ctx, time.Second); err != nil {
						return "", err
					}
				}
			}
			if dev == "" {
				fmt.Fprintf(o.out, "No drive has a disc of Platter that can be read.\n")
			}
		}
		fmt.Fprintf(o.out, "Reading %s.\n", dev)
		return o.disc, nil
	}, func(d *disc.Discs, got *disc.Imported, err error) {
		if got != nil {
			sayImported(o.out, d, got)
		}
		if err != nil {
			fmt.Fprintln(o.out, err)
		}
	})
}

// spinUp is how long a drive may take to read a disc that was put into it.
const spinUp = 20 * time.Second

// drives are the devices that may hold a volume.
func (o discHostOptions) drives() (out []string) {
	dirs, _ := filepath.Glob("/sys/class/block/*")
	for _, dir := range dirs {
		name := filepath.Base(dir)
		if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil || strings.HasPrefix(name, "ram") || strings.HasPrefix(name, "loop") {
			continue
		}
		if kind, _, _ := fileSystem("/dev/" + name); kind == "" {
			out = append(out, "/dev/"+name)
		}
	}
	return out
}

// mount mounts the first of the drives whose disc has that file, and takes those
// that it has tried off the list. It returns "" where there is none.
func (o discHostOptions) mount(drives *[]string, file string) string {
	for len(*drives) > 0 {
		dev := (*drives)[0]
		*drives = (*drives)[1:]
		if unix.Mount(dev, o.disc, "iso9660", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "") != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(o.disc, file)); err == nil {
			return dev
		}
		unix.Unmount(o.disc, 0)
	}
	return ""
}

// eject opens the tray of a drive that has one.
func eject(device string) {
	const cdromEject = 0x5309 // <linux/cdrom.h>
	if fd, err := unix.Open(device, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		unix.IoctlSetInt(fd, cdromEject, 0)
		unix.Close(fd)
	}
}

// console shows the nodes, and gives a shell to who asks for it.
func (o discHostOptions) console(ctx context.Context, ask *asker, stop func()) error {
	for { // until the socket is there
		if c, err := net.Dial("unix", defaultSocket); err == nil {
			c.Close()
			break
		}
		if err := provision.Sleep(ctx, 200*time.Millisecond); err != nil {
			return nil
		}
	}
	fmt.Fprintf(o.out, "\nServing. Power the nodes on. 's' and Enter: a shell, with the command platter; 'q' and Enter: stop serving.\n\n")
	// Lines rather than a picture: questions and answers come in between.
	go run(ctx, []string{"watch", "--until", "ready", "--stall", "24h"}, nil, plainWriter{o.out}, o.out)
	for {
		line, err := ask.line(ctx)
		if err != nil {
			<-ctx.Done()
			return nil
		}
		switch line {
		case "q":
			stop()
			return nil
		case "s":
			o.shell(ctx)
		}
	}
}

// plainWriter is no terminal.
type plainWriter struct{ io.Writer }
