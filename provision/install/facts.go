package install

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"platter/provision"
	"platter/provision/disk"
)

// Hardware says what the machine is made of, as its kernel shows it. root is
// where sys and proc are.
func Hardware(root string) map[string]string {
	read := func(path string) string {
		b, _ := os.ReadFile(filepath.Join(root, path))
		return strings.TrimSpace(string(b))
	}
	facts := map[string]string{
		"firmware": "bios",
		"cpus":     fmt.Sprint(runtime.NumCPU()),
		"cpu":      field(read("proc/cpuinfo"), "model name"),
		"memory":   field(read("proc/meminfo"), "MemTotal"),
		"vendor":   read("sys/class/dmi/id/sys_vendor"),
		"model":    read("sys/class/dmi/id/product_name"),
		"serial":   read("sys/class/dmi/id/product_serial"),
		"kernel":   read("proc/sys/kernel/osrelease"),
	}
	if _, err := os.Stat(filepath.Join(root, "sys/firmware/efi")); err == nil {
		facts["firmware"] = "uefi"
	}
	if disks, err := disk.List(root); err == nil {
		for _, d := range disks {
			facts["disk."+d.Name] = d.String()
		}
	}
	nics, _ := filepath.Glob(filepath.Join(root, "sys/class/net/*/device"))
	for _, dev := range nics {
		dir := filepath.Dir(dev)
		address, _ := os.ReadFile(filepath.Join(dir, "address"))
		driver, _ := os.Readlink(filepath.Join(dev, "driver"))
		facts["nic."+filepath.Base(dir)] = strings.TrimSpace(string(address)) + " " + filepath.Base(driver)
	}
	for k, v := range facts {
		if v == "" {
			delete(facts, k)
		}
	}
	return facts
}

// field returns the value of the first line "name : value".
func field(text, name string) string {
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(key) == name {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	return ""
}

// machineOf is what the machine of a node has, with a disk of that size.
func machineOf(root, node string, disk int64) provision.Machine {
	m := provision.Machine{Node: node, CPUs: runtime.NumCPU(), Disk: disk}
	b, _ := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	kib, _, _ := strings.Cut(field(string(b), "MemTotal"), " ")
	n, _ := strconv.ParseInt(kib, 10, 64)
	m.Memory = n << 10
	return m
}
