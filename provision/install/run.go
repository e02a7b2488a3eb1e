package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/disk"
)

// Node is the disc host as this node sees it: a *client.Node.
type Node interface {
	Identity() client.Identity
	Secrets(ctx context.Context) (provision.StackSecrets, error)
}

// Reporter is where the install says what it does: a *client.Reporter.
type Reporter interface {
	Stage(provision.Stage)
	Phase(name string, n, of int)
	Progress(done, total int64)
	Logf(format string, args ...any)
	Facts(map[string]string)
	Fail(*provision.Failure)
	Flush(ctx context.Context) error
}

// Machine is what an install does to the machine it runs on.
type Machine interface {
	// LoadKernel prepares a start of that kernel by kexec.
	LoadKernel(kernel, initrd, args string) error
	// Leave starts the loaded kernel, or goes through the firmware where there
	// is none. It returns only with an error.
	Leave(kexec bool) error
}

// Env is everything an install touches.
type Env struct {
	Root    string // where sys, proc and dev are: "/" on a machine
	Target  string // the disk or file to install on; empty: what the plan's rule selects
	Mount   string // folder for the new root file system while it is being filled
	Node    Node
	Report  Reporter
	HTTP    *http.Client // for objects
	Keys    []minisign.PublicKey
	Devices *Devices // nil: all disks are there already
	Machine Machine
	// EFI is nil where the firmware has no boot entries.
	EFI Variables
	// LoadDriver loads the driver of a file system; nil: they are there.
	LoadDriver func(name string) error
	// Prepare writes the configuration of host and stack below root.
	Prepare func(root string, plan provision.Plan, sec provision.StackSecrets) error
	// Grow grows the file system mounted at dir to size bytes: disk.Grow.
	Grow       func(dir string, size int64) error
	Executable string // platter-node itself
	// Patience is for how long the disc host may be out of reach; zero: 10 minutes.
	Patience time.Duration
}

// phase is one step. It may be repeated after an error or a power cut.
type phase struct {
	name string
	run  func(*job, context.Context) error
}

// phases are the install, in order.
var phases = []phase{
	{"manifest", (*job).manifest},
	{"disk", (*job).selectDisk},
	{"partition", (*job).partition},
	{"write", (*job).write},
	{"grow", (*job).grow},
	{"files", (*job).files},
	{"seal", (*job).seal},
	{"boot-entry", (*job).bootEntry},
	{"finish", (*job).finish},
}

// job is one install under way.
type job struct {
	Env
	plan    provision.Plan
	image   *provision.Image
	path    string // of the disk
	disk    *disk.Device
	in      *disk.Install
	unmount func() error
	kexec   bool
}

// Run carries out the plan. On a machine it does not return but by an error,
// which the disc host has been told of as well: a *provision.Failure, or that
// of ctx.
func Run(ctx context.Context, env Env, plan provision.Plan) error {
	j := &job{Env: env, plan: plan}
	defer j.close()
	env.Report.Stage(provision.StageInstalling)
	for i, p := range phases {
		env.Report.Phase(p.name, i+1, len(phases))
		start := time.Now()
		err := j.patiently(ctx, p)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			f := failure(p.name, err)
			env.Report.Fail(f)
			return f
		}
		if p.name != "finish" {
			env.Report.Facts(map[string]string{p.name + "_ms": strconv.FormatInt(time.Since(start).Milliseconds(), 10)})
		}
	}
	return nil
}

// passingError is trouble that time may cure.
type passingError struct{ error }

func (e passingError) Unwrap() error { return e.error }

func passing(err error) error { return passingError{err} }

// patiently repeats a phase while its trouble may pass.
func (j *job) patiently(ctx context.Context, p phase) error {
	patience := j.Patience
	if patience == 0 {
		patience = 10 * time.Minute
	}
	giveUp := time.Now().Add(patience)
	for n := 0; ; n++ {
		err := p.run(j, ctx)
		var pass passingError
		if err == nil || ctx.Err() != nil || !errors.As(err, &pass) {
			return err
		}
		if time.Now().After(giveUp) {
			return &provision.Failure{Code: "disc-host-lost",
				Message: fmt.Sprintf("%s: the disc host has not answered properly for %s: %v", j.plan.Node, patience, err),
				Next:    "Check that 'platter serve' runs on the disc host and the cable is in, then start the machine again"}
		}
		if n == 0 {
			j.Report.Logf("%s waits: %v", p.name, err)
		}
		wait := min(250*time.Millisecond<<min(n, 5), 5*time.Second)
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// failure names an error for the operator.
func failure(phase string, err error) *provision.Failure {
	var f *provision.Failure
	var e *client.Error
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &e) && e.Code != "":
		return &provision.Failure{Code: e.Code, Message: e.Message, Next: e.Next}
	}
	return &provision.Failure{Code: phase + "-failed", Message: err.Error(),
		Next: "Start the machine again: the install goes on where it stopped; if it stops here again, try another disk"}
}

func (j *job) close() {
	if j.unmount != nil {
		j.unmount()
		j.unmount = nil
	}
	if j.disk != nil {
		j.disk.Close()
	}
}

func (j *job) manifest(ctx context.Context) (err error) {
	j.image, err = fetchManifest(ctx, j.HTTP, j.plan.Files, j.plan.Image, j.Keys)
	if err == nil {
		j.Report.Facts(map[string]string{"image": j.image.Name + " " + j.image.Version})
		j.Report.Logf("image %s %s (%s), kernel %s, signature good", j.image.Name, j.image.Version, j.plan.Image.Digest[:12], j.image.Kernel)
	}
	return err
}

const (
	// diskWait is how long a disk may take to show up: RAID controllers and
	// spinning disks do.
	diskWait = 60 * time.Second
	// diskQuiet without a new device means that all disks have been seen. A
	// second match that shows up late would go unnoticed otherwise.
	diskQuiet = 500 * time.Millisecond
)

func (j *job) selectDisk(ctx context.Context) error {
	if j.Target != "" {
		j.path = j.Target
		st, err := os.Stat(j.path)
		if err != nil {
			return err
		}
		return j.largeEnough(st.Size())
	}
	var found disk.Disk
	var stop *provision.Failure
	look := func() bool {
		disks, err := disk.List(j.Root)
		if err != nil {
			stop = failure("disk", err)
			return false
		}
		found, stop = disk.Select(j.plan.Disk, disks)
		return stop == nil
	}
	if j.Devices == nil {
		look()
	} else {
		limit, cancel := context.WithTimeout(ctx, diskWait)
		defer cancel()
		if err := j.Devices.Settle(limit, diskQuiet); err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
		// Several matches never become one by waiting.
		if err := j.Devices.Wait(limit, func() bool { return look() || stop.Code == "disk-ambiguous" }); err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if stop != nil {
		stop.Message = j.plan.Node + ": " + stop.Message
		return stop
	}
	j.path = found.Path
	j.Report.Logf("installs on %s", found)
	j.Report.Facts(map[string]string{"disk": found.String()})
	return j.largeEnough(found.Size)
}

// largeEnough refuses a machine that is too small for the users of the service,
// before its disk, of that size, is touched.
func (j *job) largeEnough(disk int64) error {
	if j.plan.Stack.Users == 0 { // an older disc host states none
		return nil
	}
	wrong := j.plan.Size().Misfits([]provision.Machine{machineOf(j.Root, j.plan.Node, disk)})
	if len(wrong) == 0 {
		return nil
	}
	if j.plan.Stack.Undersized {
		for _, w := range wrong {
			j.Report.Logf("warning: %s; the rack file allows it", w)
		}
		return nil
	}
	return &provision.Failure{Code: "machine-too-small", Message: strings.Join(wrong, "; "),
		Next: "Its disk was not touched. For a trial, 'stack: {undersized: true}' in the rack file installs it all the same"}
}

func (j *job) partition(context.Context) (err error) {
	if j.disk == nil {
		if j.disk, err = disk.Open(j.path); err != nil {
			return err
		}
	}
	if j.in, err = disk.Begin(j.disk, &j.plan, j.image); err != nil {
		return err
	}
	if j.in.Resumed() {
		j.Report.Logf("goes on with the install that was cut off")
	}
	return nil
}

func (j *job) write(ctx context.Context) error {
	err := j.in.Write(ctx, disk.HTTPSource{Client: j.HTTP, Base: j.plan.Files}, j.Report.Progress)
	var f *provision.Failure
	if err != nil && !errors.As(err, &f) {
		return passing(err)
	}
	return err
}

// grow mounts the new root file system, which stays mounted until seal, and
// makes it fill its partition.
func (j *job) grow(context.Context) error {
	root, ok := j.in.Slot(provision.PartRoot)
	if !ok {
		return fmt.Errorf("the plan of %s has no partition for the root file system", j.plan.Node)
	}
	if j.LoadDriver != nil {
		if err := j.LoadDriver("ext4"); err != nil {
			return err
		}
	}
	if j.unmount == nil {
		if err := os.MkdirAll(j.Mount, 0o700); err != nil {
			return err
		}
		unmount, err := j.disk.Mount(root, j.Mount, "ext4")
		if err != nil {
			// What cannot be mounted is not what was written: the next try
			// writes all of it anew.
			return errors.Join(err, j.in.Forget())
		}
		j.unmount = unmount
	}
	if !root.Grow {
		return nil
	}
	return j.Grow(j.Mount, root.Size)
}

func (j *job) contents() Files {
	root, _ := j.in.Slot(provision.PartRoot)
	f := Files{Plan: j.plan, Identity: j.Node.Identity(), RootUUID: root.ID.String(), Executable: j.Executable, Keys: j.Keys}
	if esp, ok := j.in.Slot(provision.PartESP); ok {
		f.ESPUUID = esp.ID.String()
	}
	return f
}

// files makes the image this node and, meanwhile, loads its kernel.
func (j *job) files(ctx context.Context) error {
	sec, err := j.Node.Secrets(ctx)
	if client.Retryable(err) {
		return passing(err)
	}
	if err != nil {
		return err
	}
	// Loading the kernel takes as long as all files together: its signature and
	// digests are checked.
	var g errgroup.Group
	g.Go(j.kernel)
	g.Go(func() error {
		if err := j.contents().Write(j.Mount); err != nil {
			return err
		}
		return j.Prepare(j.Mount, j.plan, sec)
	})
	return g.Wait()
}

// kernel loads the installed kernel while its file system is at hand. A
// machine that cannot do that goes through its firmware.
func (j *job) kernel() error {
	if j.plan.Finish != provision.FinishKexec || j.kexec {
		return nil
	}
	kernel, err1 := within(j.Mount, "vmlinuz")
	initrd, err2 := within(j.Mount, "initrd.img")
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("the image's kernel: %w", err)
	}
	if err := j.Machine.LoadKernel(kernel, initrd, j.contents().Kernelargs()); err != nil {
		j.Report.Logf("warning: the installed kernel cannot be started directly, the machine goes through its firmware instead: %v", err)
		return nil
	}
	j.kexec = true
	return nil
}

// within follows the link at name in the new root and returns the path that
// leads there from here.
func within(root, name string) (string, error) {
	target, err := os.Readlink(filepath.Join(root, name))
	if errors.Is(err, unix.EINVAL) { // no link
		return filepath.Join(root, name), nil
	}
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, filepath.Join("/", target))
	_, err = os.Stat(path)
	return path, err
}

// seal makes the disk bootable.
func (j *job) seal(ctx context.Context) error {
	if j.unmount != nil {
		if err := j.unmount(); err != nil {
			return err
		}
		j.unmount = nil
	}
	return j.in.Commit(ctx)
}

// bootEntry tells a UEFI firmware of the new system. Without it the firmware
// still finds the loader under the name that every firmware tries, so trouble
// is a warning.
func (j *job) bootEntry(context.Context) error {
	esp, ok := j.in.Slot(provision.PartESP)
	if j.EFI == nil || !ok {
		return nil
	}
	sector := int64(j.disk.SectorSize())
	err := SetBootEntry(j.EFI, LoadOption{
		Active: true, Description: ourPrefix + j.plan.Node, Partition: esp.Number,
		Start: uint64(esp.Start / sector), Size: uint64(esp.Size / sector), ID: esp.ID, File: ourFile,
	}, !j.kexec)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("this kernel shows no firmware variables: %w", err)
	}
	state := "set and read back"
	if err != nil {
		state = err.Error()
		j.Report.Logf("warning: the boot entry of %s: %v", j.plan.Node, err)
	}
	j.Report.Facts(map[string]string{"boot_entry": state})
	return nil
}

// flushWait is how long the machine waits to be heard before it leaves: the
// agent says it again from the installed system.
const flushWait = 2 * time.Minute

// finish reports, which closes the grant, and leaves.
func (j *job) finish(ctx context.Context) error {
	if err := j.disk.Close(); err != nil {
		return err
	}
	j.disk = nil
	j.Report.Stage(provision.StageInstalled)
	wait, cancel := context.WithTimeout(ctx, flushWait)
	defer cancel()
	if err := j.Report.Flush(wait); err != nil {
		j.Report.Logf("leaves without having been heard: %v", err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return j.Machine.Leave(j.kexec)
}
