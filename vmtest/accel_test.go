package vmtest

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// behave returns a start function under which the probe's KVM and emulation
// do what is said: run QEMU emulated ("run"), end at once ("fail"), never end
// ("hang"). It is real QEMU that runs the real program.
func behave(kvm, tcg string, started *[]*exec.Cmd) func(*exec.Cmd) error {
	lock := make(chan struct{}, 1)
	return func(c *exec.Cmd) error {
		i := slices.Index(c.Args, "-accel") + 1
		how := tcg
		if c.Args[i] == "kvm" {
			how = kvm
		}
		c.Args[i] = "tcg"
		switch how {
		case "hang":
			c.Path, c.Args = "/bin/sleep", []string{"sleep", "1000"}
		case "fail":
			c.Path, c.Args = "/bin/sh", []string{"sh", "-c", "echo no such virtualisation >&2; exit 1"}
		}
		lock <- struct{}{}
		*started = append(*started, c)
		<-lock
		return c.Start()
	}
}

func TestTheFirstAcceleratorToBootIsChosen(t *testing.T) {
	for _, c := range []struct {
		kvm, tcg string
		want     Accel
		why      string
	}{
		{"run", "hang", KVM, "before"},
		{"run", "fail", KVM, "before"},
		{"hang", "run", TCG, "hangs or is slower"},
		{"fail", "run", TCG, "no such virtualisation"},
		{"fail", "fail", "", "cannot boot a tiny program"},
	} {
		t.Run(c.kvm+"-"+c.tcg, func(t *testing.T) {
			t.Parallel()
			var started []*exec.Cmd
			got, why, err := probeAccel(t.Context(), "/dev/null", t.TempDir(), behave(c.kvm, c.tcg, &started))
			if err != nil {
				why = err.Error()
			}
			if got != c.want || !strings.Contains(why, c.why) {
				t.Errorf("chose %q because %q, want %q because %q", got, why, c.want, c.why)
			}
			for _, s := range started {
				if s.ProcessState == nil {
					t.Errorf("%v is left running", s.Args)
				}
			}
		})
	}
}

func TestWithoutKVMNothingIsProbed(t *testing.T) {
	got, why, err := probeAccel(t.Context(), "/dev/absent", t.TempDir(), func(*exec.Cmd) error {
		t.Error("a machine was started")
		return nil
	})
	if got != TCG || err != nil || !strings.Contains(why, "/dev/absent") {
		t.Errorf("chose %q because %q, %v", got, why, err)
	}
}

func TestWhatIsKnownIsNotProbed(t *testing.T) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	known := accelRecord{KVM, "seen", strings.TrimSpace(string(boot))}
	start := func(*exec.Cmd) error {
		t.Error("a machine was started")
		return context.Canceled
	}
	if got, err := chooseAccel(t.Context(), "", known, t.TempDir(), start); got != known || err != nil {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := chooseAccel(t.Context(), "tcg", known, t.TempDir(), start); got.Kind != TCG || got.Boot != "" || err != nil {
		t.Errorf("the environment gives %+v, %v", got, err)
	}
	if _, err := chooseAccel(t.Context(), "xen", known, t.TempDir(), start); err == nil || !strings.Contains(err.Error(), AccelVariable) {
		t.Errorf("a wrong %s gives %v", AccelVariable, err)
	}
}
