//go:build soak

package vmtest_test

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

// TestSoak: many boots of the prepared host and of the stock image, clean ones
// and power cuts mixed, side by side. PLATTER_SOAK says how many; 50.
func TestSoak(t *testing.T) {
	boots, err := strconv.Atoi(os.Getenv("PLATTER_SOAK"))
	if err != nil || boots < 1 {
		t.Fatalf("PLATTER_SOAK=%q is no number of boots", os.Getenv("PLATTER_SOAK"))
	}
	h := newHost(t, allGuests)
	h.define()
	h.leases()
	h.want(0, "start-guests")
	if found := h.faults(2 * time.Minute); len(found) > 0 {
		t.Fatalf("first start: %v", found)
	}
	type tally struct {
		boots, faulty int
		kinds         map[string]int
	}
	run := func(kind string, n int, patience time.Duration) tally {
		all := tally{boots: n, kinds: map[string]int{}}
		for i := range n {
			began := time.Now()
			how := []string{"reboot", "cut", "cut"}[i%3]
			if how == "cut" {
				h.swap()
			} else {
				h.resume()
			}
			upset := time.Since(began)
			h.falls(how)
			up := time.Since(began)
			h.settled()
			found := h.faults(patience)
			if len(found) > 0 {
				all.faulty++
			}
			for _, f := range found {
				all.kinds[f.kind]++
			}
			t.Logf("%s %d/%d, %s: %d faults %v; prepared after %.0f s, up %.0f s, looked at %.0f s", kind, i+1, n, how, len(found), found,
				upset.Seconds(), up.Seconds(), time.Since(began).Seconds())
		}
		return all
	}
	prepared := run("prepared", boots, 2*time.Minute)
	h.stock()
	stock := run("stock", min(boots, 3), time.Minute) // what fails every time needs no fifty
	fmt.Printf("\n%-22s  prepared  stock image\n", "")
	line := func(what string, a, b int) { fmt.Printf("%-22s  %8d  %11d\n", what, a, b) }
	line("boots", prepared.boots, stock.boots)
	line("boots with faults", prepared.faulty, stock.faulty)
	for _, kind := range []string{faultOff, faultStale, faultPlace, faultLease, faultPort} {
		line(kind, prepared.kinds[kind], stock.kinds[kind])
	}
	fmt.Println()
	if prepared.faulty > 0 {
		t.Errorf("%d of %d boots of the prepared host had faults", prepared.faulty, boots)
	}
	if stock.faulty == 0 {
		t.Error("the stock image has no fault: this soak proves nothing")
	}
}
