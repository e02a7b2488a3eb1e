package vmtest

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Accel is how a lab's machines execute instructions.
type Accel string

const (
	KVM Accel = "kvm" // on the processor
	TCG Accel = "tcg" // emulated
)

// AccelVariable is the environment variable that names the accelerator and
// spares the probe: kvm or tcg.
const AccelVariable = "PLATTER_ACCEL"

// accelRecord is an outcome of the probe; it holds until the next boot of the
// machine it was found on.
type accelRecord struct {
	Kind Accel  `json:"kind"`
	Why  string `json:"why"`
	Boot string `json:"boot"`
}

// chooseAccel takes what the environment says, else what last was found on
// this boot of the machine, else what a probe finds.
func chooseAccel(ctx context.Context, env string, last accelRecord, dir string, start func(*exec.Cmd) error) (accelRecord, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return accelRecord{}, err
	}
	rec := accelRecord{Boot: strings.TrimSpace(string(boot))}
	switch {
	case env == string(KVM) || env == string(TCG):
		// Not kept: without the variable the next start must ask.
		return accelRecord{Kind: Accel(env), Why: AccelVariable + " says so"}, nil
	case env != "":
		return rec, fmt.Errorf("%s is %q: it must be kvm or tcg", AccelVariable, env)
	case last.Boot == rec.Boot:
		return last, nil
	}
	rec.Kind, rec.Why, err = probeAccel(ctx, "/dev/kvm", dir, start)
	return rec, err
}

// probeLimit bounds a probe that even emulation does not end. It takes a
// second on an idle machine.
const probeLimit = 2 * time.Minute

// probeAccel boots one tiny program under KVM and under emulation at the same
// time. KVM is chosen if it is the first to end: one that hangs, or that is
// itself emulated by the hypervisor below and slower than QEMU would be, is
// not. The race needs no time limit that load could upset. dir is a scratch
// folder.
func probeAccel(ctx context.Context, device, dir string, start func(*exec.Cmd) error) (Accel, string, error) {
	if _, err := os.Stat(device); errors.Is(err, fs.ErrNotExist) {
		return TCG, "there is no " + device, nil
	}
	qemu, err := findTool("qemu-system-x86_64", "qemu-system-x86")
	if err != nil {
		return "", "", err
	}
	image := filepath.Join(dir, "probe.img")
	disk := make([]byte, 1<<20) // SeaBIOS refuses much smaller disks
	copy(disk, probeProgram())
	if err := os.WriteFile(image, disk, 0o600); err != nil {
		return "", "", err
	}
	defer os.Remove(image)

	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	type result struct {
		kind   Accel
		passed bool
		err    error
	}
	results := make(chan result, 2)
	for kind, accel := range map[Accel]string{KVM: "kvm", TCG: "tcg,thread=multi"} {
		go func() {
			var said strings.Builder
			cmd := exec.CommandContext(ctx, qemu, "-accel", accel, "-machine", "q35", "-m", "64",
				"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
				"-drive", "if=virtio,format=raw,file.locking=off,file=probe.img",
				"-device", "isa-debug-exit,iobase=0xf4,iosize=1")
			cmd.Dir, cmd.Stderr = dir, &said
			err := start(cmd)
			if err == nil {
				err = cmd.Wait()
			}
			var exit *exec.ExitError
			passed := errors.As(err, &exit) && exit.ExitCode() == probePassed
			results <- result{kind, passed, fmt.Errorf("%w %s", err, strings.TrimSpace(said.String()))}
		}()
	}
	var first Accel
	failed := map[Accel]error{}
	for range 2 {
		switch r := <-results; {
		case first != "": // the loser, ended by us
		case r.passed:
			first = r.kind
			cancel()
		default:
			failed[r.kind] = r.err
		}
	}
	switch {
	case first == KVM:
		return KVM, "a boot under KVM ended before the same boot under emulation", nil
	case first == TCG && failed[KVM] != nil:
		return TCG, fmt.Sprintf("/dev/kvm is there but does not work: %v", failed[KVM]), nil
	case first == TCG:
		return TCG, "/dev/kvm is there, but a boot under KVM hangs or is slower than under emulation", nil
	case errors.Is(ctx.Err(), context.Canceled):
		return "", "", ctx.Err()
	}
	return "", "", fmt.Errorf("%s cannot boot a tiny program: under KVM: %w; emulated: %w; check the QEMU package and how busy this machine is, or set %s", qemu, failed[KVM], failed[TCG], AccelVariable)
}

// probePassed is QEMU's exit code when the program writes 0x10 to its
// isa-debug-exit device: (0x10 << 1) | 1.
const probePassed = 0x21

// probeProgram is a boot sector that does, in small, what a kernel does when
// it starts: it waits for a timer interrupt, asks the BIOS about the disk,
// goes through protected mode into long mode and computes for a while. A KVM
// that can only step through such code one instruction at a time falls behind
// in the loop. Loaded at 0x7c00.
func probeProgram() []byte {
	listing := []string{
		// 16 bits
		"fa",             // 7c00 cli
		"31c0",           //      xor ax, ax
		"8ed8 8ec0 8ed0", //      mov ds, ax; mov es, ax; mov ss, ax
		"bc007c",         //      mov sp, 0x7c00
		"fb f4",          //      sti; hlt              ; until the timer ticks
		"b441 bbaa55",    //      mov ah, 0x41; mov bx, 0x55aa
		"b280 cd13",      //      mov dl, 0x80; int 0x13 ; EDD present?
		"fa",             //      cli
		"0f0116c07c",     //      lgdt [0x7cc0]
		"0f20c0 0c01",    //      mov eax, cr0; or al, 1
		"0f22c0",         //      mov cr0, eax
		"ea2a7c0800",     //      jmp 8:0x7c2a
		// 32 bits
		"66b81000",             // 7c2a mov ax, 16
		"8ed8 8ec0 8ed0",       //      mov ds, ax; mov es, ax; mov ss, ax
		"bf00000100 0f22df",    //      mov edi, 0x10000; mov cr3, edi
		"31c0 b9000c0000",      //      xor eax, eax; mov ecx, 3072
		"f3ab",                 //      rep stosd              ; three page tables
		"c7050000010003100100", //      mov [0x10000], 0x11003
		"c7050010010003200100", //      mov [0x11000], 0x12003
		"c7050020010083000000", //      mov [0x12000], 0x83    ; first 2 MiB
		"0f20e0 0c20 0f22e0",   //      cr4 |= PAE
		"b9800000c0 0f32",      //      mov ecx, IA32_EFER; rdmsr
		"80cc01 0f30",          //      or ah, LME; wrmsr
		"0f20c0 0d00000080",    //      cr0 |= PG
		"0f22c0",               //
		"ea897c00001800",       //      jmp 24:0x7c89
		// 64 bits
		"b900000008",       // 7c89 mov ecx, 0x8000000
		"48890c2500900000", // 7c8e mov [0x9000], rcx
		"ffc9 75f4",        //      dec ecx; jnz 0x7c8e
		"b010 e6f4",        //      mov al, 0x10; out 0xf4, al
		"f4 90",            //      hlt
		// 7ca0: descriptors: none, code 32, data, code 64; their address
		"0000000000000000 ffff0000009acf00 ffff00000092cf00 ffff0000009aaf00",
		"1f00 a07c0000",
	}
	code, err := hex.DecodeString(strings.ReplaceAll(strings.Join(listing, ""), " ", ""))
	if err != nil {
		panic(err)
	}
	sector := make([]byte, 512)
	copy(sector, code)
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}

// findTool returns the path of a program that package, of Debian, brings.
func findTool(name, pkg string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath(filepath.Join("/usr/sbin", name)) // not in every root's PATH
	}
	if err != nil {
		return "", fmt.Errorf("%s is not installed: install the package %s", name, pkg)
	}
	return path, nil
}
