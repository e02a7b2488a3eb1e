package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"aead.dev/minisign"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/dischost"
	"platter/provision/jsonfile"
	"platter/provision/rack"
	"platter/provision/site"
	"platter/provision/store"
	"platter/pxe"
)

// handoverUsage is what of host is no matter of hostcmd.
const handoverUsage = `
  host handover NODE      make a node the disc host of the rack: see 'host handover --help'
`

func handoverCmd() *cobra.Command {
	var socket string
	var req provision.HandoverRequest
	c := &cobra.Command{
		Use:   "handover NODE",
		Short: "Make an installed node the disc host of this rack, so that this machine can leave",
		Long: `Make an installed node the disc host of this rack, so that this machine can
leave. The node fetches the image store, this program, the rack file, the stack file
and, at the very end, the journal and the site's secrets, each byte verified. Then
this machine notes that it is not the disc host any more, gives up the disc host's
address and ends. The node takes that address as a second one and serves with it,
also after a reboot.

It is refused unless the node is ready, has room, and nothing else is under way in
the rack. What was cut off goes on: run the command again, or only start what has
lost its power. This machine may leave when this command says so, and not before;
Ctrl-C ends this command, not the handover. Afterwards 'platter' works on the node:

  ssh root@NODE ` + provision.SuccessorDir + `/platter node ls`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			op := client.NewOperator(socket)
			defer op.Close()
			return handOver(c.Context(), op, args[0], req, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, "the disc host's socket")
	c.Flags().BoolVar(&req.Busy, "busy", false, "also while installs or orders of other nodes are under way")
	return c
}

// handOver begins a handover, or follows the one under way, until this machine is
// not the disc host any more.
func handOver(ctx context.Context, op *client.Operator, node string, req provision.HandoverRequest, out, progress io.Writer) error {
	o, err := op.Handover(ctx, node, req)
	if err != nil {
		return err
	}
	said := ""
	for o, err = range op.FollowOrder(ctx, o.ID) {
		if err != nil {
			break
		}
		if line := orderProgress(o); line != "" && line != said && !o.State.Final() {
			said = line
			fmt.Fprintf(progress, "%s: %s\n", node, line)
		}
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintf(progress, "the handover goes on: see 'platter node orders %s'\n", node)
		return ctx.Err()
	case err == nil && o.State == provision.OrderFailed:
		return fmt.Errorf("%s: %w", node, o.Failure)
	case err == nil && o.State == provision.OrderWithdrawn:
		return fmt.Errorf("the handover was withdrawn: %s. See 'platter node show %s'", o.Why, node)
	}
	// The disc host has broken off: it has been handed over, or has ended.
	return awaitTaken(ctx, op, node, out, progress)
}

// awaitTaken waits until the disc host on this machine has ended, and tells whether
// this machine may leave: only when the node is known to have the receipt.
func awaitTaken(ctx context.Context, op *client.Operator, node string, out, progress io.Writer) error {
	var marked, taken bool
	for silent := 0; silent <= 10; { // between both of its lives it does not answer for a moment
		m, err := op.HandedOver(ctx)
		var e *client.Error
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil && m == nil:
			return fmt.Errorf("the disc host was started again before %s had it: see 'platter node orders %s'", node, node)
		case errors.As(err, &e) && e.Code == client.CodeNotRunning:
			silent++
		default:
			silent = 0
			if m != nil && !marked {
				marked = true
				fmt.Fprintf(progress, "%s is the disc host: waiting until it has taken over\n", node)
			}
			taken = taken || m != nil && m.Taken
		}
		if err := provision.Sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	switch {
	case taken:
		fmt.Fprintf(out, "%s is the disc host of the rack. This machine is not any more, and may leave.\n", node)
		return nil
	case marked:
		return fmt.Errorf("the disc host on this machine ended before it was known that %s has the receipt, without which %s does not serve: start 'platter serve' again on this machine, and do not switch it off", node, node)
	default:
		return fmt.Errorf("the disc host on this machine has ended: start 'platter serve' again, it knows whether it was handed over to %s", node)
	}
}

// errHandedOver ends the work of a disc host that is none any more.
var errHandedOver = errors.New("the rack was handed over")

func untilHandedOver(ctx context.Context, host *dischost.Host) error {
	select {
	case <-host.HandedOver():
		return errHandedOver
	case err := <-host.Lost():
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// startOf says what this start of a disc host is for; StartRefuse comes without an
// error where nothing is wrong about that. A node that is the disc host has its address
// then, for the receipt of the next one too.
func startOf(ctx context.Context, journal *store.Store, o serveOptions, rack *provision.Rack, place *successorPlace, log *slog.Logger) (provision.StartKind, error) {
	if err := os.RemoveAll(filepath.Join(o.state, dischost.CopyFolder)); err != nil {
		return "", err
	}
	mark := journal.HandedOver()
	start := provision.StartDecision(mark, o.takeBack)
	switch start {
	case provision.StartTakeBack:
		return start, takeBack(ctx, journal, mark, rack, place, log)
	case provision.StartHandOut:
		if !successorServes(ctx, rack, mark, log) {
			break
		}
		if err := noteTaken(ctx, journal, mark); err != nil {
			return start, err
		}
		return provision.StartRefuse, refuse(o, rack, mark, log)
	case provision.StartRefuse:
		return start, refuse(o, rack, mark, log)
	}
	return start, place.take(ctx, log)
}

// takeBack makes this machine the disc host again, unless another one serves.
func takeBack(ctx context.Context, journal *store.Store, mark *provision.HandoverMark, rack *provision.Rack, place *successorPlace, log *slog.Logger) error {
	if err := checkAlone(ctx, rack, place, log); err != nil {
		return fmt.Errorf("the rack is not taken back from %s, nothing was changed: %w", mark.Node, err)
	}
	log.Warn("the rack is taken back", "from", mark.Node, "handed over", mark.Time)
	return journal.Append(ctx, provision.Event{Kind: provision.EventTakeBack, Node: mark.Node, Detail: "an operator made this machine the disc host again"})
}

// checkAlone looks whether this machine can serve the rack, and no other does.
func checkAlone(ctx context.Context, rack *provision.Rack, place *successorPlace, log *slog.Logger) error {
	for _, n := range rack.Networks {
		if err := addressFree(ctx, n.Interface, n.DiscHost); err != nil {
			return err
		}
	}
	if err := place.take(ctx, log); err != nil {
		return err
	}
	return (&pxe.Server{Networks: rack.Networks, Log: log}).Check(ctx)
}

// addressFree returns an error where another machine has the disc host's address.
func addressFree(ctx context.Context, iface string, address netip.Addr) error {
	mac, err := pxe.AddressHolder(ctx, iface, address)
	if err == nil && mac != "" {
		err = fmt.Errorf("the machine with the MAC %s has the disc host's address %s. Where that is the disc host, work there; else take the address from it", mac, address)
	}
	return err
}

// refuse ends a disc host that is none any more.
func refuse(o serveOptions, rack *provision.Rack, mark *provision.HandoverMark, log *slog.Logger) error {
	// It may have been killed just before it did so.
	if err := giveUpAddresses(rack); err != nil {
		return err
	}
	if o.successor != "" { // a unit that starts at every boot
		log.Info("the rack was handed over: there is nothing to do here", "node", mark.Node, "time", mark.Time)
		return nil
	}
	return fmt.Errorf("this machine is not the disc host any more: the rack was handed over to %s on %s. Work there: ssh root@%s %s/platter node ls. Only if %s is gone for good: platter serve --take-back",
		mark.Node, mark.Time.Local().Format("2006-01-02 15:04:05"), mark.Node, provision.SuccessorDir, mark.Node)
}

// handOut gives the successor its receipt, then gives up the disc host's address.
func handOut(ctx context.Context, o serveOptions, rack *provision.Rack, st *site.Site, host *dischost.Host, log *slog.Logger) error {
	node := host.Store.HandedOver().Node
	log.Warn(fmt.Sprintf("the rack was handed over to %s, which fetches its receipt here by itself: leave both machines on. Only if %s is gone for good: stop this, and start it with --take-back", node, node))
	g, working := errgroup.WithContext(ctx)
	if err := listenNodesAndOperators(working, g, o, rack, st, host.HandedOverToNodes(), host.HandedOverAPI(), log); err != nil {
		return err
	}
	var kept error // an address that is not given up
	g.Go(func() error {
		if err := untilTaken(working, host, rack, log); err != nil {
			return err
		}
		kept = giveUpAddresses(rack)
		// The operator's command shall hear of it.
		provision.Sleep(working, time.Second)
		return errHandedOver
	})
	switch err := g.Wait(); {
	case kept != nil:
		return kept
	case ctx.Err() != nil:
		return nil
	case !errors.Is(err, errHandedOver):
		return err
	}
	log.Info("the disc host's address is given up: this machine may leave")
	return nil
}

// lookEvery is how often a disc host that waits for its successor looks whether that
// serves already.
const lookEvery = 30 * time.Second

// untilTaken waits until the successor has the receipt. Where its word did not come
// through, that it has the disc host's address says so.
func untilTaken(ctx context.Context, host *dischost.Host, rack *provision.Rack, log *slog.Logger) error {
	for {
		select {
		case <-host.Taken():
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lookEvery):
		}
		if mark := host.Store.HandedOver(); successorServes(ctx, rack, mark, log) {
			return noteTaken(ctx, host.Store, mark)
		}
	}
}

// successorServes tells whether the node that the rack was handed over to has the disc
// host's address, which it does not take without the receipt. This machine may have it
// as well: it comes back with it where it was switched off in the middle.
func successorServes(ctx context.Context, rack *provision.Rack, mark *provision.HandoverMark, log *slog.Logger) bool {
	node, ok := rack.NodeByName(mark.Node)
	n, inside := rack.NetworkOf(node.Address)
	if !ok || !inside {
		return false
	}
	mac, err := pxe.AddressHolder(ctx, n.Interface, n.DiscHost)
	var own provision.MAC
	if err == nil && mac != "" {
		own, err = pxe.AddressHolder(ctx, n.Interface, node.Address)
	}
	switch {
	case err != nil:
		log.Warn("it is not known whether another machine has the disc host's address", "err", err)
		return false
	case mac != "" && mac != own && mac != node.MAC:
		log.Warn(fmt.Sprintf("another machine than %s has the disc host's address: take it from that one, or %s does not find this one", node.Name, node.Name), "address", n.DiscHost, "mac", mac)
		return false
	}
	return mac != ""
}

func noteTaken(ctx context.Context, journal *store.Store, mark *provision.HandoverMark) error {
	return journal.Append(ctx, provision.Event{Kind: provision.EventHandoverTaken, Node: mark.Node})
}

// giveUpAddresses takes the disc host's addresses from this machine, for which the
// successor waits.
func giveUpAddresses(rack *provision.Rack) error {
	var wrong []error
	for _, n := range rack.Networks {
		wrong = append(wrong, pxe.DropAddress(n.DiscHost))
	}
	if err := errors.Join(wrong...); err != nil {
		return fmt.Errorf("the node waits until this machine gives up the disc host's address: %w. Take it away yourself, or switch this machine off", err)
	}
	return nil
}

// succession says what a successor of this disc host needs; nil where that is not
// known, which only keeps it from being handed over.
func (o serveOptions) succession(imgs *images.Store, place *successorPlace, log *slog.Logger) *dischost.Succession {
	s := &dischost.Succession{IPXE: o.loaders(), Rack: o.rack, Stack: o.stack, Images: imgs, State: o.state}
	var err1, err2 error
	s.Program, err1 = os.Executable()
	s.RackFiles, err2 = rack.KeyFiles(o.rack)
	err := errors.Join(err1, err2)
	for _, f := range s.RackFiles {
		if !filepath.IsLocal(f) {
			err = errors.Join(err, fmt.Errorf("the key file %s does not lie beside the rack file", f))
		}
	}
	if err != nil {
		log.Info("this disc host cannot be handed over to a node", "err", err)
		return nil
	}
	if place != nil {
		s.Self = place.node
	}
	return s
}

// successorPlace is where a node serves that the rack was handed over to.
type successorPlace struct {
	node    string
	own     netip.Addr
	address netip.Prefix
	iface   string // that has own
	// taken says at the disc host's address that this node has the receipt.
	taken func(context.Context) error
}

// serveSuccessor serves what was handed over to this node.
func serveSuccessor(ctx context.Context, o serveOptions, log *slog.Logger) error {
	dir := o.successor
	o.rack, o.store, o.state, o.ipxe = filepath.Join(dir, "rack/rack.yaml"), filepath.Join(dir, "store"), filepath.Join(dir, "state"), filepath.Join(dir, "ipxe")
	o.stack = filepath.Join(dir, "stack")
	if _, err := os.Stat(o.stack); errors.Is(err, os.ErrNotExist) {
		o.stack = ""
	}
	place, err := readSuccession(dir)
	if err != nil {
		return err
	}
	if place.iface, err = pxe.InterfaceOf(place.own); err != nil {
		return err
	}
	return serve(ctx, o, place, log)
}

// readSuccession returns where this node serves, if the receipt says that it is
// the disc host.
func readSuccession(dir string) (*successorPlace, error) {
	var note provision.HandoverNote
	var signed provision.SignedReceipt
	err := errors.Join(jsonfile.Read(filepath.Join(dir, provision.NoteFile), &note), jsonfile.Read(filepath.Join(dir, provision.ReceiptFile), &signed))
	if err != nil {
		return nil, fmt.Errorf("%s does not say that the rack was handed over to this node: %w. Run 'platter host handover' on the disc host", dir, err)
	}
	st, err := site.Open(filepath.Join(dir, "state", dischost.SiteFolder))
	if err != nil {
		return nil, err
	}
	key, err := st.SigningKey()
	if err != nil {
		return nil, err
	}
	var r provision.HandoverReceipt
	if !minisign.Verify(key.Public().(minisign.PublicKey), signed.Receipt, signed.Signature) || json.NewDecoder(bytes.NewReader(signed.Receipt)).Decode(&r) != nil {
		return nil, fmt.Errorf("the receipt in %s is not signed by the site: run 'platter host handover' again on the disc host", dir)
	}
	if r.State != note.Digest() || r.Node != note.Node || r.Order != note.Order {
		return nil, fmt.Errorf("the receipt in %s is for another handover: run 'platter host handover' again on the disc host", dir)
	}
	taken := func(ctx context.Context) error {
		var id client.Identity
		if err := jsonfile.Read(provision.IdentityPath, &id); err != nil {
			return err
		}
		node, err := client.NewNode(id)
		if err != nil {
			return err
		}
		defer node.Close()
		return node.HandoverTaken(ctx, note.Order, r.State)
	}
	return &successorPlace{node: note.Node, own: note.Own, address: note.Address, taken: taken}, nil
}

// apply makes the rack one that is served from this place: interfaces of nodes have
// other names than those of the first disc host.
func (p *successorPlace) apply(rack *provision.Rack) {
	if p == nil {
		return
	}
	for i, n := range rack.Networks {
		if n.Subnet.Contains(p.own) {
			rack.Networks[i].Interface = p.iface
		}
	}
}

// take gives the disc host's address to this node. Another machine that has it may be the
// old disc host, which lost its power before it heard that this node has the receipt: it
// is told so until the address is free.
func (p *successorPlace) take(ctx context.Context, log *slog.Logger) error {
	if p == nil {
		return nil
	}
	telling, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		for p.taken(telling) != nil && provision.Sleep(telling, 5*time.Second) == nil {
		}
	}()
	return pxe.TakeAddress(ctx, p.own, p.address, log)
}
