package hostprep

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"platter/hostprep/ovs"
	"platter/provision"
)

// A change of the interface that the host is managed over is a trial. What was
// there before is on stable storage first, in a file that the process which
// changes keeps locked. Then a guard starts, a process of its own that waits
// for the lock. When the disc host or the gateway answers over the new uplink,
// the file goes, which confirms the change. In every other case somebody takes
// the change back: this process; the guard, when this process is killed or
// hangs; or the guard's unit at the next boot. A change that was taken back is
// remembered, so that no boot tries it again.

const (
	stateDir  = "/var/lib/platter/host"
	trialFile = stateDir + "/uplink"
	// Of the 30 seconds in which a host has to be back: to bring the change
	// about and have it confirmed; until the guard ends a process that hangs.
	tryWithin   = 20 * time.Second
	guardWithin = 24 * time.Second
)

// trial is what was there before a change, and who makes it.
type trial struct {
	Bridge  string             `json:"bridge"`
	Want    provision.Bridge   `json:"want"`
	PID     int                `json:"pid"`
	Until   time.Duration      `json:"until"` // since boot: then the guard takes the change back
	Rows    *ovs.Bridge        `json:"rows,omitempty"`
	Devices []device           `json:"devices"`
	Managed string             `json:"managed"` // the interface with the host's address
	Files   map[string]*string `json:"files"`   // former contents; null: there was none
}

// takenBackFile and beforeFile keep, for each bridge, the change that was taken
// back and the state before the first change that was confirmed.
func takenBackFile(bridge string) string { return stateDir + "/uplink-taken-back-" + bridge }
func beforeFile(bridge string) string    { return stateDir + "/uplink-before-" + bridge }

// takenBack is a change that is not to be tried again by itself.
type takenBack struct {
	Digest string    `json:"digest"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

func bridgeDigest(b provision.Bridge) string {
	text, err := json.Marshal(b)
	if err != nil {
		panic(err) // a Bridge can always be marshalled
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// takenBack is why this very change was taken back before; empty: it was not.
func (h *Host) takenBack(b provision.Bridge) string {
	var t takenBack
	text, err := os.ReadFile(h.at(takenBackFile(b.Name)))
	if err != nil || json.Unmarshal(text, &t) != nil || t.Digest != bridgeDigest(b) {
		return ""
	}
	return fmt.Sprintf("tried at %s and taken back: %s", t.At.UTC().Format("2006-01-02 15:04:05 MST"), t.Reason)
}

func (h *Host) at(path string) string { return filepath.Join(h.Root, path) }

// try brings b about and keeps it only if it is confirmed.
func (h *Host) try(ctx context.Context, s *ovs.Switch, v bridgeView, b provision.Bridge, j *Journal) error {
	t := trial{Bridge: b.Name, Want: b, PID: os.Getpid(), Until: sinceBoot() + guardWithin, Managed: v.managed, Files: map[string]*string{}}
	if row, ok := v.rows[b.Name]; ok {
		t.Rows = &row
	}
	for _, name := range slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(b.Uplink.Interfaces), v.managed)))) {
		d, err := v.devices[name].withRoutes()
		if err != nil {
			return err
		}
		d.File = h.networkFile(d)
		t.Devices = append(t.Devices, d)
	}
	files := v.files(b)
	for _, f := range files {
		t.Files[f.Path] = nil
		if text, err := os.ReadFile(h.at(f.Path)); err == nil {
			t.Files[f.Path] = new(string(text))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(h.within, tryWithin))
	defer cancel()
	lock, err := h.begin(t)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := h.startGuard(ctx); err != nil {
		return errors.Join(fmt.Errorf("nothing was changed, the guard does not start: %w", err), h.forget(trialFile))
	}

	err = func() error {
		if err := h.makeBridge(ctx, s, v, b); err != nil {
			return err
		}
		if b.Management && t.Managed != b.Name {
			d := t.managed()
			if err := d.drop(d.Name); err != nil {
				return err
			}
			if err := d.carry(b.Name); err != nil {
				return err
			}
		}
		if err := answers(ctx, h.Reach); err != nil {
			return err
		}
		// Only now what the next boot reads, and another question, because
		// systemd-networkd acts on it.
		if err := h.layFiles(ctx, j, files); err != nil {
			return err
		}
		by := map[string]string{}
		for _, f := range files {
			by[strings.TrimSuffix(strings.TrimPrefix(f.Path, networkDir+"/05-platter-"), ".network")] = f.Path
		}
		if err := h.adopted(ctx, by); err != nil {
			return err
		}
		if b.Management && t.Managed != b.Name {
			if err := t.managed().carry(b.Name); err != nil {
				return err
			}
		}
		if err := answers(ctx, h.Reach); err != nil {
			return err
		}
		return h.confirm(t)
	}()
	if err == nil {
		return nil
	}
	if ctx.Err() == context.Canceled {
		err = errors.Join(errors.New("interrupted"), err)
	}
	back, done := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer done()
	if failed := h.takeBack(back, t, err.Error()); failed != nil {
		return fmt.Errorf("%w, and taking the change back failed: %w", err, failed)
	}
	return fmt.Errorf("the change of the uplink was taken back, the host is reached as before: %w: look at cable, switch port and VLANs, then 'host apply'", err)
}

// managed is the interface that had the host's address.
func (t trial) managed() device {
	i := slices.IndexFunc(t.Devices, func(d device) bool { return d.Name == t.Managed })
	return t.Devices[i]
}

// begin writes the trial down, durably and locked from its first moment.
func (h *Host) begin(t trial) (*os.File, error) {
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	name := h.at(trialFile)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, fmt.Errorf("uplink: %w: nothing was changed", err)
	}
	f, err := os.OpenFile(name+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("uplink: %w: nothing was changed", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		_, err = f.Write(text)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err == nil {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("uplink: %w: nothing was changed", err)
	}
	return f, nil
}

// confirm keeps the change. What was before the first one is kept for Undo.
func (h *Host) confirm(t trial) error {
	if _, err := os.Lstat(h.at(beforeFile(t.Bridge))); errors.Is(err, fs.ErrNotExist) {
		if err := os.Rename(h.at(trialFile), h.at(beforeFile(t.Bridge))); err != nil {
			return err
		}
	}
	return errors.Join(h.forget(takenBackFile(t.Bridge)), h.forget(trialFile))
}

// forget removes a file, durably.
func (h *Host) forget(path string) error {
	if err := os.Remove(h.at(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(h.at(stateDir))
}

// openTrial opens the trial that is under way or was cut off; nil: none.
func (h *Host) openTrial() (*os.File, *trial, error) {
	f, err := os.Open(h.at(trialFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var t trial
	if err := json.NewDecoder(f).Decode(&t); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("%s is damaged: %w: look at the host's network, then remove the file", trialFile, err)
	}
	return f, &t, nil
}

func (h *Host) pendingTrial() (*trial, error) {
	f, t, err := h.openTrial()
	if f != nil {
		f.Close()
	}
	return t, err
}

// stands tells whether f is still the trial that nobody ended.
func (h *Host) stands(f *os.File) bool {
	a, err1 := f.Stat()
	b, err2 := os.Stat(h.at(trialFile))
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// endTrial takes back a change that was cut off. One that is under way is
// waited for.
func (h *Host) endTrial(ctx context.Context) error { return h.GuardUplink(ctx, func() {}) }

// GuardUplink takes back a change of an uplink when the process that makes it
// ends or hangs before the change is confirmed. ready is called when nothing
// can go wrong any more. Where no change is under way it returns at once.
func (h *Host) GuardUplink(ctx context.Context, ready func()) error {
	f, t, err := h.openTrial()
	if err != nil || f == nil {
		ready()
		return err
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		ready()
		if err := h.outlive(ctx, f, t); err != nil {
			return err
		}
	} else {
		defer ready()
	}
	if !h.stands(f) {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := h.takeBack(limit, *t, "it was cut off before anybody answered"); err != nil {
		return fmt.Errorf("bridge %s: taking back a change of its uplink that was cut off: %w", t.Bridge, err)
	}
	return nil
}

// outlive returns with the lock of the trial. A process that keeps it for too
// long is ended.
func (h *Host) outlive(ctx context.Context, f *os.File, t *trial) error {
	// The wait cannot be called off and may outlast f: it has a descriptor of
	// its own, for the same lock.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", trialFile, err)
	}
	got := make(chan error, 1)
	go func() {
		defer unix.Close(fd)
		for {
			if err := unix.Flock(fd, unix.LOCK_EX); err != unix.EINTR {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(t.Until - sinceBoot()):
	}
	// The number means that process only while it is the one that holds the
	// lock: another guard may, and after a reboot the number is anybody's.
	if t.PID != os.Getpid() && h.stands(f) && locks(t.PID, f) {
		if err := unix.Kill(t.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("ending process %d, which hangs in a change of the uplink: %w", t.PID, err)
		}
	}
	select {
	case err := <-got:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// locks tells whether a process holds the lock of f, as the kernel lists them
// (proc_locks(5)).
func locks(pid int, f *os.File) bool {
	var st unix.Stat_t
	text, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		// 1: FLOCK  ADVISORY  WRITE 4321 08:01:123456 0 EOF
		w := strings.Fields(line)
		if len(w) == 8 && w[1] == "FLOCK" && w[4] == fmt.Sprint(pid) && strings.HasSuffix(w[5], fmt.Sprintf(":%d", st.Ino)) {
			return true
		}
	}
	return false
}

// startGuard returns when the guard watches. It is a unit, because what ends
// this process may end all its children.
func (h *Host) startGuard(ctx context.Context) error {
	if h.Systemd != nil {
		return h.Systemd.Unit(guardUnit).Restart(ctx)
	}
	cmd := exec.Command(h.Self[0], append(slices.Clone(h.Self[1:]), "guard-uplink")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	line := make(chan string, 1)
	go func() {
		s, _ := bufio.NewReader(out).ReadString('\n')
		line <- strings.TrimSpace(s)
		_ = cmd.Wait()
	}()
	select {
	case s := <-line:
		if s != "ready" {
			return fmt.Errorf("%s says %q", cmd, s)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// takeBack brings everything back to what it was before the trial, remembers
// the reason and ends the trial. It may be called again after it was cut off.
func (h *Host) takeBack(ctx context.Context, t trial, reason string) error {
	if err := h.restore(ctx, t); err != nil {
		return err
	}
	text, err := json.Marshal(takenBack{bridgeDigest(t.Want), reason, time.Now()})
	if err != nil {
		return err
	}
	if err := (&Journal{root: h.Root}).put(takenBackFile(t.Bridge), text, 0o600); err != nil {
		return err
	}
	return h.forget(trialFile)
}

// restore brings rows, interfaces and files back, as much as can be.
func (h *Host) restore(ctx context.Context, t trial) error {
	var failed []error
	reload := false
	for path, text := range t.Files {
		now, err := os.ReadFile(h.at(path))
		if text == nil && errors.Is(err, fs.ErrNotExist) || text != nil && err == nil && string(now) == *text {
			continue
		}
		reload = true
		if text == nil {
			if err := os.Remove(h.at(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				failed = append(failed, err)
			}
		} else if err := (&Journal{root: h.Root}).put(path, []byte(*text), 0o644); err != nil {
			failed = append(failed, err)
		}
	}
	// The switch takes every frame of its interfaces: it lets go of them
	// first.
	failed = append(failed, restoreRows(ctx, t))
	if t.Managed != "" && t.Managed != t.Bridge {
		failed = append(failed, t.managed().drop(t.Bridge))
	}
	for _, d := range t.Devices {
		failed = append(failed, d.level())
	}
	carry := func() {
		for _, d := range t.Devices {
			failed = append(failed, d.carry(d.Name))
		}
	}
	carry()
	if reload {
		by := map[string]string{}
		for _, d := range t.Devices {
			if d.File != "" {
				by[d.Name] = d.File
			}
		}
		failed = append(failed, h.reloadNetwork(ctx), h.adopted(ctx, by))
		carry()
	}
	return errors.Join(failed...)
}

func restoreRows(ctx context.Context, t trial) error {
	s, err := ovs.Dial(ctx, "")
	if err != nil {
		return err
	}
	rows, err := s.Bridges(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(rows, func(b ovs.Bridge) bool { return b.Name == t.Bridge })
	if t.Rows == nil && (i < 0 || len(othersPorts(rows[i], t.Want)) == 0) {
		return s.Apply(ctx, ovs.DeleteBridge(t.Bridge))
	}
	if i < 0 {
		return fmt.Errorf("the bridge %s has been deleted meanwhile: make it anew with 'ovs-vsctl add-br %s'", t.Bridge, t.Bridge)
	}
	var former ovs.Bridge
	if t.Rows != nil {
		former = *t.Rows
	}
	changes := []ovs.Change{ovs.SetHardwareAddr(t.Bridge, former.OtherConfig["hwaddr"])}
	if p := uplinkOf(rows[i], t.Want); p != nil {
		changes = append(changes, ovs.DeletePort(p.Name))
	}
	if p := uplinkOf(former, t.Want); p != nil {
		changes = append(changes, ovs.AddPort(t.Bridge, *p))
	}
	mtu := 0
	for _, p := range former.Ports {
		if p.Name == t.Bridge && len(p.Interfaces) > 0 {
			mtu = p.Interfaces[0].MTURequest
		}
	}
	return s.Apply(ctx, append(changes, ovs.SetMTU(t.Bridge, mtu))...)
}

// othersPorts are the ports of a bridge that are neither its host's side nor
// its uplink: those of VMs.
func othersPorts(row ovs.Bridge, b provision.Bridge) []string {
	var out []string
	up := uplinkOf(row, b)
	for _, p := range row.Ports {
		if p.Name != row.Name && (up == nil || p.Name != up.Name) {
			out = append(out, p.Name)
		}
	}
	return out
}

// before are the states before the first change of each management uplink.
func (h *Host) before() ([]trial, error) {
	names, err := filepath.Glob(h.at(beforeFile("*")))
	if err != nil {
		return nil, err
	}
	var out []trial
	for _, name := range names {
		var t trial
		text, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(text, &t)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, t)
	}
	return out, nil
}

// fallBack puts the host's address where it was before its bridge, until the
// next boot, where the bridge has no device: a host that is reached can be
// mended.
func (h *Host) fallBack() (on string, err error) {
	all, err := h.before()
	for _, t := range all {
		if _, e := net.InterfaceByName(t.Bridge); e == nil || t.Managed == t.Bridge {
			continue
		}
		on = t.Managed
		err = errors.Join(err, raise(on, 0), t.managed().carry(on))
	}
	return on, err
}

// UndoBridges takes back what the bridges step did: addresses are on their
// former interfaces, and the bridges that it made are gone, but for those that
// VMs are plugged into. told hears of each.
func (h *Host) UndoBridges(ctx context.Context, told func(string)) error {
	if err := h.endTrial(ctx); err != nil {
		return err
	}
	all, err := h.before()
	if err != nil {
		return err
	}
	for _, t := range all {
		if err := h.restore(ctx, t); err != nil {
			return fmt.Errorf("undoing the bridge %s: %w", t.Bridge, err)
		}
		if err := errors.Join(h.forget(beforeFile(t.Bridge)), h.forget(takenBackFile(t.Bridge))); err != nil {
			return err
		}
		told(fmt.Sprintf("the host's address is on %s", t.Managed))
	}
	s, err := ovs.Dial(ctx, "")
	if err != nil {
		return nil // a host without a switch has no bridges
	}
	rows, err := s.Bridges(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		others := othersPorts(row, provision.Bridge{})
		up := uplinkOf(row, provision.Bridge{})
		switch {
		case row.ExternalIDs[ourKey] == "made" && len(others) == 0:
			if err := s.Apply(ctx, ovs.DeleteBridge(row.Name)); err != nil {
				return err
			}
			told("bridge " + row.Name)
		case row.ExternalIDs[ourKey] == "made":
			told(fmt.Sprintf("bridge %s stays: %s are plugged into it", row.Name, strings.Join(others, ", ")))
		case up != nil:
			if err := s.Apply(ctx, ovs.DeletePort(up.Name)); err != nil {
				return err
			}
			told("uplink of " + row.Name)
		}
	}
	return nil
}
