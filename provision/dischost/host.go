package dischost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
	"platter/provision/stack/probe"
	"platter/provision/store"
	"platter/pxe"
)

const (
	// tokenLife is from the boot script to the enrolment: a kernel and an
	// initramfs have to be fetched and started in between, on slow machines too.
	tokenLife = 30 * time.Minute
	// sameBoot is how soon a boot request that changes nothing is taken for a
	// repetition and not journaled again.
	sameBoot = 10 * time.Second
	// Anyone can invent machines. maxUnknown bounds how many the journal
	// learns of; the others bound what each of them may add to it an hour.
	maxUnknown       = 1024
	unknownBootEvery = time.Hour
	unknownReports   = 300
)

// Images is what of the image store is needed here; *images.Store is one.
type Images interface {
	Image(name string) (provision.ImageRef, *provision.Image, error)
	Boot(arch string) (images.BootSet, error)
	Releases() ([]provision.StoredRelease, error)
}

// Config is what a Host works with. Every field but Succession is needed.
type Config struct {
	Rack   *provision.Rack // already given to Store.SetRack
	Store  *store.Store
	Site   *site.Site
	Images Images
	// Probe tries one thing that users of the IM service need; it is probe.Run
	// but in tests.
	Probe func(context.Context, probe.Kind, probe.Options) (time.Duration, error)
	Log   *slog.Logger
	Clock func() time.Time
	// Version is that of this program, for reports.
	Version string
	// Succession says what a successor needs; nil: there can be none.
	Succession *Succession
}

// Host answers machines, nodes and operators. Its methods may be called at
// once from several goroutines.
type Host struct {
	Config
	mu sync.Mutex
	// probing is held while an operator's probes run.
	probing sync.Mutex
	// rolling is held while a roll to another release begins.
	rolling sync.Mutex
	// boots has what each machine got last, budget what each unknown machine
	// may still journal. Both have at most one entry for each listed node or
	// machine.
	boots  map[string]boot
	budget map[string]budget
	// heartbeat is how long an event stream may be silent; well below the
	// client's limit.
	heartbeat time.Duration
	poll      time.Duration // how long a node waits for an order
	switching time.Duration // how long a node has to say how its switch ended
	proving   time.Duration // how long a node that was switched has to show that it works
	whole     time.Duration // how long a roll waits for a whole cluster before it begins
	parts     passages
	handover  *handover
}

type boot struct {
	action provision.Action
	why    string
	at     time.Time // journaled
}

type budget struct {
	since time.Time
	used  int
}

// New makes a Host. Serve NodeAPI, OperatorAPI and ReadOnly, give the Host to
// pxe, and Run it.
func New(c Config) *Host {
	return &Host{Config: c, boots: map[string]boot{}, budget: map[string]budget{}, heartbeat: 15 * time.Second, poll: client.OrderPoll, switching: rollSwitch, proving: rollProving, whole: rollWhole, handover: newHandover()}
}

var _ pxe.Backend = (*Host)(nil)

// Reservation returns the address of the node that the machine with that MAC is.
func (h *Host) Reservation(mac provision.MAC) (pxe.Reservation, bool) {
	st, ok := h.Store.ByMAC(mac)
	if !ok {
		return pxe.Reservation{}, false
	}
	n, ok := h.Rack.NodeByName(st.Name)
	return pxe.Reservation{Address: n.Address, Hostname: n.Name}, ok
}

// BootScript answers one boot request: provision.BootDecision of the machine's
// state, in the journal before it is in the answer. Whatever fails on the way,
// the machine is told on its screen and either asks again or boots its own
// disk.
func (h *Host) BootScript(ctx context.Context, req pxe.BootRequest) string {
	st, known := h.Store.ByMAC(req.MAC)
	if !known {
		if st, known = h.Store.Node(string(req.MAC)); !known {
			st = provision.State{Name: string(req.MAC)}
		}
	}
	// A request for a node from another address than the node's comes from a
	// machine that did not take its lease from us: it gets nothing of the node's.
	if st.Known && req.Addr.IsValid() && req.Addr.Unmap().String() != st.Address {
		h.Log.Warn("boot request from a wrong address", "node", st.Name, "mac", req.MAC, "addr", req.Addr, "want", st.Address)
		return req.Explain(fmt.Sprintf("%s asks from %s, but its address is %s: look for a second DHCP server, then switch the machine off and on",
			st.Name, req.Addr, st.Address))
	}
	decision := provision.BootDecision(st)
	event := provision.Event{Kind: provision.EventBoot, Node: st.Name, MAC: req.MAC, Generation: st.Generation, Action: decision.Action, Detail: decision.Why}
	switch decision.Action {
	case provision.ActionInstall:
		return h.bootInstall(ctx, req, st, event)
	case provision.ActionInventory:
		return h.bootInventory(ctx, req, known, event)
	}
	if err := h.journalBoot(ctx, st, event); err != nil {
		// Its own disk is never wrong: only the journal is poorer.
		h.Log.Error("boot request not journaled", "node", st.Name, "err", err)
	}
	// Without the loader the firmware finds its own way, only slower.
	if set, err := h.Images.Boot(imageArch(req.Arch)); err == nil {
		req.LocalLoader = "http://" + req.DiscHost.String() + "/objects/" + set.Local.Hash
	}
	if decision.Action == provision.ActionLocal {
		return req.Local(decision.Why)
	}
	return req.Explain(decision.Why)
}

func (h *Host) bootInstall(ctx context.Context, req pxe.BootRequest, st provision.State, event provision.Event) string {
	node, ok := h.Rack.NodeByName(st.Name)
	if !ok {
		return req.Wait(st.Name + " has left the rack file")
	}
	ref, im, err := h.Images.Image(h.Rack.Image)
	if err != nil {
		return h.cannotInstall(ctx, req, st, "image-unusable", err, fmt.Sprintf("Run 'platter image ls' on the disc host and build or import %s; the machine asks again by itself.", h.Rack.Image))
	}
	// serve has looked too; an image may be replaced while it runs.
	if wrong := im.Misfits(h.Rack.Stack.Components); len(wrong) > 0 {
		return h.cannotInstall(ctx, req, st, "image-unfit", errors.New(strings.Join(wrong, "; ")), "Import an image that has what is missing, or start the disc host with another stack or image; the machine asks again by itself.")
	}
	set, err := h.Images.Boot(imageArch(req.Arch))
	if err != nil {
		return h.cannotInstall(ctx, req, st, "initramfs-unusable", err, "Run 'platter image initramfs' on the disc host; the machine asks again by itself.")
	}
	plan, err := provision.PlanFor(h.Rack, node, req.MAC, st.Generation, ref)
	if err != nil {
		return h.cannotInstall(ctx, req, st, "no-plan", err, "Correct the rack file and start the disc host again.")
	}
	var events []provision.Event
	if !h.repeated(st, event) {
		events = append(events, event)
	}
	token := store.Token{Node: st.Name, MAC: req.MAC, Generation: st.Generation, Life: "installer", Plan: &plan}
	secret, err := h.Store.IssueToken(ctx, token, tokenLife, events...)
	if err != nil {
		h.Log.Error("no token for a boot", "node", st.Name, "err", err)
		return req.Wait("the disc host cannot start the install of " + st.Name + ": " + err.Error())
	}
	h.remember(event, len(events) > 0)
	files := plan.Files + "/objects/"
	return req.Install(event.Detail, files+set.Kernel.Hash, files+set.Initramfs.Hash,
		h.cmdline("installer", plan.DiscHost, secret, req.MAC, plan.Net.Address))
}

// cannotInstall makes a failure of the disc host the node's, once for each
// reason, and lets the machine ask again.
func (h *Host) cannotInstall(ctx context.Context, req pxe.BootRequest, st provision.State, code string, cause error, next string) string {
	f := &provision.Failure{Code: code, Message: fmt.Sprintf("the disc host cannot install %s: %s", st.Name, strings.TrimSuffix(cause.Error(), ".")), Next: next}
	if st.Failure == nil || *st.Failure != *f {
		h.Log.Error("install cannot start", "node", st.Name, "code", code, "err", cause)
		err := h.Store.Append(ctx, provision.Event{Kind: provision.EventReport, Node: st.Name, MAC: req.MAC, Generation: st.Generation,
			Report: &provision.Report{Time: h.Clock(), Failure: f}})
		if err != nil {
			h.Log.Error("failure not journaled", "node", st.Name, "err", err)
		}
	}
	return req.Wait(f.Error())
}

func (h *Host) bootInventory(ctx context.Context, req pxe.BootRequest, listed bool, event provision.Event) string {
	if !listed && h.unknown() >= maxUnknown {
		h.Log.Warn("too many unknown machines", "mac", req.MAC, "limit", maxUnknown)
		return req.Wait(fmt.Sprintf("%d machines that are in no rack file wait already: this one (%s) is not listed any more", maxUnknown, req.MAC))
	}
	nw, ok := h.Rack.NetworkOf(req.Addr.Unmap())
	if !ok {
		return req.Explain(fmt.Sprintf("%s asks from %s, which is in none of the rack's networks", req.MAC, req.Addr))
	}
	set, err := h.Images.Boot(imageArch(req.Arch))
	if err != nil {
		h.Log.Error("inventory cannot start", "mac", req.MAC, "err", err)
		return req.Wait(fmt.Sprintf("%s is not in the rack file, and the disc host cannot list its hardware: %v", req.MAC, err))
	}
	repeated := h.repeated(provision.State{Name: event.Node}, event)
	var events []provision.Event
	if !repeated {
		events = append(events, event)
	}
	secret, err := h.Store.IssueToken(ctx, store.Token{Node: event.Node, MAC: req.MAC, Life: "inventory"}, tokenLife, events...)
	if err != nil {
		h.Log.Error("no token for a boot", "mac", req.MAC, "err", err)
		return req.Wait("the disc host cannot list this machine: " + err.Error())
	}
	if repeated {
		h.Store.Progress(event)
	}
	h.remember(event, !repeated)
	files := "http://" + nw.DiscHost.String() + "/objects/"
	api := "https://" + netip.AddrPortFrom(nw.DiscHost, provision.NodeAPIPort).String()
	// pxe names the life itself.
	return req.Inventory(event.Detail, files+set.Kernel.Hash, files+set.Initramfs.Hash,
		h.cmdline("", api, secret, req.MAC, netip.PrefixFrom(req.Addr.Unmap(), nw.Subnet.Bits())))
}

// cmdline is the kernel command line of our initramfs. The token is all that
// is secret in it: good once, for one install of this node.
func (h *Host) cmdline(life, api, token string, mac provision.MAC, ip netip.Prefix) []string {
	args := []string{
		"platter.url=" + api, "platter.pin=" + h.Site.Pin(), "platter.token=" + token,
		"platter.mac=" + string(mac), "platter.ip=" + ip.String(),
		// Serial and screen: the last one named is /dev/console.
		"console=tty0", "console=ttyS0,115200", "quiet",
		// A kernel that panics boots again, and the install goes on.
		"panic=10",
	}
	if life != "" {
		args = append([]string{"platter.life=" + life}, args...)
	}
	return args
}

// unknown counts the machines that are in no rack file.
func (h *Host) unknown() int {
	return len(h.Store.Nodes()) - len(h.Rack.Nodes)
}

// journalBoot journals a boot request, or only folds it where it repeats the
// one before.
func (h *Host) journalBoot(ctx context.Context, st provision.State, event provision.Event) error {
	if h.repeated(st, event) {
		h.Store.Progress(event)
		return nil
	}
	err := h.Store.Append(ctx, event)
	h.remember(event, err == nil)
	return err
}

// repeated tells whether event says nothing new.
func (h *Host) repeated(st provision.State, event provision.Event) bool {
	window := sameBoot
	switch event.Action {
	case provision.ActionInventory:
		window = unknownBootEvery
	case provision.ActionInstall:
		if st.Stage != provision.StageBooting {
			return false // it takes the node back to that stage
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	last, ok := h.boots[event.Node]
	age := h.Clock().Sub(last.at)
	return ok && last.action == event.Action && last.why == event.Detail && age >= 0 && age < window
}

func (h *Host) remember(event provision.Event, journaled bool) {
	if !journaled {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.boots[event.Node] = boot{event.Action, event.Detail, h.Clock()}
}

// spend takes n from what an unknown machine may journal this hour, and tells
// whether that was left.
func (h *Host) spend(machine string, n int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := h.budget[machine]
	if now := h.Clock(); now.Sub(b.since) >= time.Hour || now.Before(b.since) {
		b = budget{since: now}
	}
	if b.used+n > unknownReports {
		return false
	}
	b.used += n
	h.budget[machine] = b
	return true
}

// imageArch is Debian's name for what iPXE calls its build's architecture. A
// 32-bit iPXE under a BIOS runs on 64-bit machines.
func imageArch(arch string) string {
	switch arch {
	case "i386", "x86_64", "":
		return "amd64"
	}
	return arch
}
