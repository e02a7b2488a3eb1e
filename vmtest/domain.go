package vmtest

import (
	"fmt"
	"strings"

	"github.com/google/uuid"
	"libvirt.org/go/libvirtxml"
)

// maxDisks keeps a machine's devices on the root bus, whose last slots are the
// chipset's.
const maxDisks = 16

// maxMedia keeps CD drives within the chipset's SATA ports.
const maxMedia = 4

// Places of a machine's files, as its libvirtd sees them.
const (
	imageFolder   = "/var/lib/libvirt/images"
	consoleFolder = "/run/console" // the console logs
	serialFolder  = "/run/serial"  // sockets for attaching
)

func imageName(machine string, disk int) string { return fmt.Sprintf("%s-%d.raw", machine, disk) }

// domainXML describes a machine to libvirt.
//
// It has few devices, all on the root bus, because firmware and kernel visit
// every bridge and every device and emulation makes each visit dear. The NIC
// is always slot 2 and the disks follow. It has its HPET: a kernel that mistrusts
// the TSC, as on a busy host, would else take the ACPI timer, which comes round
// every 4.7 s, and a machine that slept as long was seen to stop its clock.
func domainXML(lab string, m Machine, accel Accel, bridge string) (string, error) {
	d := libvirtxml.Domain{
		Type:   "kvm",
		Name:   m.Name,
		UUID:   uuid.NewSHA1(uuid.NameSpaceOID, []byte("platter lab "+lab+" "+m.Name)).String(),
		Memory: &libvirtxml.DomainMemory{Unit: "MiB", Value: uint(m.Memory >> 20)},
		VCPU:   &libvirtxml.DomainVCPU{Value: uint(m.CPUs)},
		OS:     &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: "q35", Type: "hvm"}},
		Features: &libvirtxml.DomainFeatureList{
			ACPI:   &libvirtxml.DomainFeature{},
			APIC:   &libvirtxml.DomainFeatureAPIC{},
			VMPort: &libvirtxml.DomainFeatureState{State: "off"},
		},
		CPU:        &libvirtxml.DomainCPU{Mode: "host-passthrough"},
		Clock:      &libvirtxml.DomainClock{Offset: "utc"},
		OnPoweroff: "destroy", OnReboot: "restart", OnCrash: "destroy",
		Devices: &libvirtxml.DomainDeviceList{
			Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
			Interfaces: []libvirtxml.DomainInterface{{
				MAC:     &libvirtxml.DomainInterfaceMAC{Address: string(m.MAC)},
				Source:  &libvirtxml.DomainInterfaceSource{Bridge: &libvirtxml.DomainInterfaceSourceBridge{Bridge: bridge}},
				Model:   &libvirtxml.DomainInterfaceModel{Type: "virtio"},
				Boot:    &libvirtxml.DomainDeviceBoot{Order: 1},
				Address: slot(2),
			}},
			Serials: []libvirtxml.DomainSerial{{
				Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind", Path: serialFolder + "/" + m.Name}},
				Log:    &libvirtxml.DomainChardevLog{File: consoleFolder + "/" + m.Name + ".log", Append: "on"},
			}},
			// Firmware and early userspace wait for entropy without it.
			RNGs: []libvirtxml.DomainRNG{{
				Model:   "virtio",
				Backend: &libvirtxml.DomainRNGBackend{Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"}},
				Address: slot(3),
			}},
			MemBalloon: &libvirtxml.DomainMemBalloon{Model: "none"},
		},
	}
	if accel == TCG {
		d.Type = "qemu"
		d.CPU = &libvirtxml.DomainCPU{Mode: "maximum"}
		// What a guest would use at a price: walks of five page tables, a
		// hypervisor of its own, protection keys. Emulation of them is young.
		for _, name := range []string{"la57", "svm", "pku"} {
			d.CPU.Features = append(d.CPU.Features, libvirtxml.DomainCPUFeature{Policy: "disable", Name: name})
		}
	}
	switch m.Firmware {
	case UEFI:
		d.OS.Firmware = "efi"
		d.OS.FirmwareInfo = &libvirtxml.DomainOSFirmwareInfo{Features: []libvirtxml.DomainOSFirmwareFeature{{Enabled: "no", Name: "secure-boot"}}}
	default:
		// A machine that found nothing to boot tries again after a second.
		again := 1000
		d.OS.BIOS = &libvirtxml.DomainBIOS{UseSerial: "yes", RebootTimeout: &again}
	}
	if m.PXE == PXEPlain {
		d.Devices.Interfaces[0].ROM = &libvirtxml.DomainROM{Enabled: "no"}
	}
	first := uint(len(m.Media)) // of the boot order
	d.Devices.Interfaces[0].Boot.Order += first
	for i := range m.Media {
		d.Devices.Disks = append(d.Devices.Disks, mediumXML(m.Media, i))
	}
	for i, disk := range m.Disks {
		d.Devices.Disks = append(d.Devices.Disks, libvirtxml.DomainDisk{
			Device: "disk",
			// Unsafe drops the guest's flushes to the host's disk, no more:
			// what a guest has written is in the host's page cache and
			// outlives QEMU, so a power cut of the machine loses the same as
			// with any other mode. Only a crash of the host would lose more,
			// and the lab with it.
			Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw", Cache: "unsafe", Discard: "unmap"},
			Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: imageFolder + "/" + imageName(m.Name, i)}},
			Target: &libvirtxml.DomainDiskTarget{Dev: "vd" + string(rune('a'+i)), Bus: "virtio"},
			Serial: disk.Serial,
			Boot:   &libvirtxml.DomainDeviceBoot{Order: first + uint(i) + 2},
			// Slot 4 and up; the chipset has 0x1f.
			Address: slot(uint(i) + 4),
		})
	}
	return d.Marshal()
}

// mediumXML describes one of a machine's media.
func mediumXML(media []string, i int) libvirtxml.DomainDisk {
	d := libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: media[i]}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "sd" + string(rune('a'+i)), Bus: "sata"},
		Boot:   &libvirtxml.DomainDeviceBoot{Order: uint(i) + 1},
	}
	if isCD(media[i]) {
		d.Device, d.ReadOnly = "cdrom", &libvirtxml.DomainDiskReadOnly{}
	}
	return d
}

func isCD(file string) bool { return strings.HasSuffix(file, ".iso") }

func slot(n uint) *libvirtxml.DomainAddress {
	var zero uint
	return &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{Domain: &zero, Bus: &zero, Slot: &n, Function: &zero}}
}
