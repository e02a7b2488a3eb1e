package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/dischost"
	"platter/provision/site"
	"platter/provision/store"
	"platter/pxe"
)

// A disc host that was handed over does not start, gives up the address that its
// successor waits for, and starts when it is told to.
func TestStartAfterHandover(t *testing.T) {
	rack := &provision.Rack{Networks: []provision.Network{{DiscHost: netip.MustParseAddr("10.9.0.1")}}, Nodes: []provision.Node{{Name: "node1", Address: netip.MustParseAddr("10.9.0.11")}}}
	o := serveOptions{state: t.TempDir()}
	journal, err := store.Open(filepath.Join(o.state, dischost.JournalFile), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer journal.Close()
	if err := journal.SetRack(t.Context(), rack); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	start := func(want provision.StartKind, o serveOptions) error {
		t.Helper()
		got, err := startOf(context.Background(), journal, o, rack, log)
		if got != want {
			t.Errorf("it starts to %s, want %s: %v", got, want, err)
		}
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with its network
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = unix.Unshare(unix.CLONE_NEWNET)
		}
		address, err2 := netlink.ParseAddr("10.9.0.1/32")
		if err := errors.Join(err, err2); err != nil {
			t.Error(err)
			return
		}
		if err := netlink.AddrAdd(lo, address); err != nil {
			t.Error(err)
			return
		}
		if err := start(provision.StartServe, o); err != nil {
			t.Error(err)
		}
		frozen := journal.Freeze()
		err = frozen.HandOver(provision.Event{Node: "node1", Detail: "digest"})
		frozen.Release()
		if err != nil {
			t.Error(err)
		}
		if err := start(provision.StartHandOut, o); err != nil {
			t.Error(err)
		}
		if _, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err != nil {
			t.Errorf("the address was given up before the node has the receipt: %v", err)
		}
		if err := journal.Append(context.Background(), provision.Event{Kind: provision.EventHandoverTaken, Node: "node1"}); err != nil {
			t.Error(err)
		}
		if err := start(provision.StartRefuse, o); err == nil || !strings.Contains(err.Error(), "handed over to node1") || !strings.Contains(err.Error(), "--take-back") {
			t.Errorf("it says: %v", err)
		}
		if name, err := pxe.InterfaceOf(netip.MustParseAddr("10.9.0.1")); err == nil {
			t.Errorf("%s still has the address", name)
		}
		// The unit of a node that was one ends in peace.
		if err := start(provision.StartRefuse, serveOptions{state: o.state, successor: "x"}); err != nil {
			t.Error(err)
		}
		if err := start(provision.StartTakeBack, serveOptions{state: o.state, takeBack: true}); err != nil {
			t.Error(err)
		}
		if err := start(provision.StartServe, o); err != nil {
			t.Error(err)
		}
	}()
	<-done
}

// A node serves only with a receipt of its site, for the state that it has.
func TestReadSuccession(t *testing.T) {
	dir := t.TempDir()
	own, err := site.Open(filepath.Join(dir, "state", dischost.SiteFolder))
	if err != nil {
		t.Fatal(err)
	}
	other, err := site.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	note := provision.HandoverNote{Order: 7, HandoverList: provision.HandoverList{Node: "node1", Address: netip.MustParsePrefix("10.9.0.1/24"), Own: netip.MustParseAddr("10.9.0.11")}}
	write := func(name string, v any) {
		t.Helper()
		b, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	receipt := func(by *site.Site, r provision.HandoverReceipt) {
		t.Helper()
		key, err := by.SigningKey()
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		write(provision.ReceiptFile, provision.SignedReceipt{Receipt: text, Signature: minisign.Sign(key, text)})
	}
	refused := func(want string) {
		t.Helper()
		if _, err := readSuccession(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	good := provision.HandoverReceipt{Node: "node1", Order: 7, State: note.Digest()}
	write(provision.NoteFile, note)
	refused("does not say that the rack was handed over")
	receipt(other, good)
	refused("not signed by the site")
	for _, r := range []provision.HandoverReceipt{{Node: "node2", Order: 7, State: good.State}, {Node: "node1", Order: 8, State: good.State}, {Node: "node1", Order: 7}} {
		receipt(own, r)
		refused("for another handover")
	}
	receipt(own, good)
	if p, err := readSuccession(dir); err != nil || p.node != "node1" || p.own != note.Own || p.address != note.Address {
		t.Errorf("%+v, %v", p, err)
	}
}

// A machine may leave only when the node is known to have the receipt.
func TestAwaitTaken(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		mark      provision.HandoverMark
		out, fail string
	}{
		{mark: provision.HandoverMark{Node: "node1", Taken: true}, out: "may leave"},
		{mark: provision.HandoverMark{Node: "node1"}, fail: "do not switch it off"},
		{fail: "was started again"},
	} {
		t.Run(c.out+c.fail, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			// A disc host that says what its journal has, and is killed.
			srv := &http.Server{}
			srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				json.NewEncoder(w).Encode(c.mark)
				l.Close()
				srv.SetKeepAlivesEnabled(false)
			})
			go srv.Serve(l)
			defer srv.Close()
			op := client.NewOperator(socket)
			defer op.Close()
			var out strings.Builder
			err = awaitTaken(t.Context(), op, "node1", &out, io.Discard)
			if (err != nil) != (c.fail != "") || err != nil && !strings.Contains(err.Error(), c.fail) || !strings.Contains(out.String(), c.out) || c.out == "" && out.Len() > 0 {
				t.Errorf("%q, %v", out.String(), err)
			}
		})
	}
}
