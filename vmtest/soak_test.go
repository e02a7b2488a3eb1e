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
	run := func(kind string, n int) (faulty, faults int) {
		for i := range n {
			h.upset(h.guests...)
			how := []string{"reboot", "cut", "cut"}[i%3]
			h.falls(how)
			h.settled()
			found := h.faults(2 * time.Minute)
			if len(found) > 0 {
				faulty++
				faults += len(found)
			}
			t.Logf("%s %d/%d, %s: %d faults %v", kind, i+1, n, how, len(found), found)
		}
		return faulty, faults
	}
	faulty, faults := run("prepared", boots)
	h.stock()
	n := min(boots, 6) // what fails every time needs no fifty
	stockFaulty, stockFaults := run("stock", n)
	fmt.Printf("\n            boots  boots with faults  faults\nprepared    %5d  %17d  %6d\nstock image %5d  %17d  %6d\n\n", boots, faulty, faults, n, stockFaulty, stockFaults)
	if faulty > 0 {
		t.Errorf("%d of %d boots of the prepared host had faults", faulty, boots)
	}
	if stockFaulty == 0 {
		t.Error("the stock image has no fault: this soak proves nothing")
	}
}
