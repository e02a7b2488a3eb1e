package install

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Host is the machine itself.
type Host struct{}

var _ Machine = Host{}

// LoadKernel hands kernel and initramfs to kexec_file_load(2).
func (Host) LoadKernel(kernel, initrd, args string) error {
	k, err := os.Open(kernel)
	if err != nil {
		return err
	}
	defer k.Close()
	i, err := os.Open(initrd)
	if err != nil {
		return err
	}
	defer i.Close()
	if err := unix.KexecFileLoad(int(k.Fd()), int(i.Fd()), args, 0); err != nil {
		return fmt.Errorf("load %s: %w", kernel, err)
	}
	return nil
}

// Leave starts the loaded kernel, or resets the machine.
func (Host) Leave(kexec bool) error {
	unix.Sync()
	var errs []error
	if kexec {
		errs = append(errs, unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC))
	}
	errs = append(errs, unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
	return fmt.Errorf("restart the machine: %w", errors.Join(errs...))
}
