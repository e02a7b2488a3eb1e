//go:build soak

package vmtest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/renameio/v2"
)

// soak is what a long test has seen so far. It is kept beside the host's disk, so
// that one that was ended goes on with the same host at the next boot.
type soak struct {
	Prepared tally `json:"prepared"`
	Stock    tally `json:"stock"`
	IsStock  bool  `json:"isStock"` // the host is no longer prepared
}

type tally struct {
	Boots  int            `json:"boots"`
	Faulty int            `json:"faulty"`
	Kinds  map[string]int `json:"kinds"`
}

// TestSoak: many boots of the prepared host and of the stock image, clean ones
// and power cuts mixed, side by side. PLATTER_SOAK says how many, PLATTER_SOAK_DIR
// where the host is kept until all are done.
func TestSoak(t *testing.T) {
	boots, err := strconv.Atoi(os.Getenv("PLATTER_SOAK"))
	dir := os.Getenv("PLATTER_SOAK_DIR")
	if err != nil || boots < 1 || !filepath.IsAbs(dir) {
		t.Fatalf("PLATTER_SOAK=%q is a number of boots, PLATTER_SOAK_DIR=%q an absolute path", os.Getenv("PLATTER_SOAK"), dir)
	}
	var s soak
	file := filepath.Join(dir, "soak.json")
	keep := func() {
		t.Helper()
		text, err := json.Marshal(s)
		if err == nil {
			err = renameio.WriteFile(file, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	begun := err == nil
	if begun {
		err = json.Unmarshal(text, &s)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		t.Fatalf("%v: 'make soak-down' begins anew", err)
	}

	if !begun { // one whose installation was ended is of no use
		if out, err := exec.Command("../bin/platter", "lab", "down", "--state", filepath.Join(dir, "lab"), "--purge").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	h := host{hostRig(t, dir), hostAddress, allGuests}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		fmt.Printf("ended after %d boots; 'make soak' goes on with the same host\n", s.Prepared.Boots)
		h.stopServe(syscall.SIGTERM)
		h.power("off", "node1")
		os.Exit(1)
	}()
	if begun {
		h.keep = true
		t.Logf("going on after %d boots, %d of them with faults", s.Prepared.Boots, s.Prepared.Faulty)
		h.power("off", "node1")
		h.power("on", "node1")
		h.answers("")
	} else {
		h.install()
		h.define()
		h.leases()
		h.want(0, "start-guests")
		if found := h.faults(2 * time.Minute); len(found) > 0 {
			t.Fatalf("first start: %v", found)
		}
		s.Prepared.Kinds, s.Stock.Kinds = map[string]int{}, map[string]int{}
		h.keep = true
		keep()
	}
	run := func(kind string, all *tally, n int, patience time.Duration) {
		t.Helper()
		began, before := time.Now(), all.Boots
		for all.Boots < n {
			began := time.Now()
			how := []string{"reboot", "cut", "cut"}[all.Boots%3]
			switch {
			case begun: // this boot is after a power cut: the end of the last run
				begun, how = false, "ended"
			case how == "cut":
				h.falls(how, h.swap())
			default:
				h.falls(how, h.resume())
			}
			up := time.Since(began)
			found := h.faults(patience)
			if len(found) > 0 {
				all.Faulty++
			}
			for _, f := range found {
				all.Kinds[f.kind]++
			}
			all.Boots++
			keep()
			t.Logf("%s %d/%d, %s: %d faults %v; up after %.0f s, looked at after %.0f s", kind, all.Boots, n, how, len(found), found,
				up.Seconds(), time.Since(began).Seconds())
		}
		if done := all.Boots - before; done > 0 {
			t.Logf("%s: %.0f s a boot", kind, time.Since(began).Seconds()/float64(done))
		}
	}
	if !s.IsStock {
		run("prepared", &s.Prepared, boots, 2*time.Minute)
		h.stock()
		s.IsStock, begun = true, false
		keep()
	}
	run("stock", &s.Stock, min(boots, 3), time.Minute) // what fails every time needs no fifty
	fmt.Printf("\n%-22s  prepared  stock image\n", "")
	line := func(what string, a, b int) { fmt.Printf("%-22s  %8d  %11d\n", what, a, b) }
	line("boots", s.Prepared.Boots, s.Stock.Boots)
	line("boots with faults", s.Prepared.Faulty, s.Stock.Faulty)
	for _, kind := range []string{faultOff, faultStale, faultPlace, faultLease, faultPort} {
		line(kind, s.Prepared.Kinds[kind], s.Stock.Kinds[kind])
	}
	fmt.Println()
	if s.Prepared.Faulty > 0 {
		t.Errorf("%d of %d boots of the prepared host had faults", s.Prepared.Faulty, s.Prepared.Boots)
	}
	if s.Stock.Faulty == 0 {
		t.Error("the stock image has no fault: this soak proves nothing")
	}
	h.keep = false
	if err := os.Remove(file); err != nil {
		t.Error(err)
	}
}
