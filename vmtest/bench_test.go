//go:build bench

package vmtest_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"aead.dev/minisign"

	"platter/images"
	"platter/provision"
)

// TestBenchInstall is one node from power-on to ready, next to a floor in the
// same VM and the same run: a minimal initramfs that pipes the same disk
// through `zstd -d` to the disk, unverified, and starts it by kexec as well.
// It prints; it judges only that both became ready.
func TestBenchInstall(t *testing.T) {
	r := newRig(t, fmt.Sprintf(labHead, "bench")+`
  - {name: node1, mac: "52:54:00:77:09:01", firmware: bios, cpus: 2, memory: 3GiB, disks: [{size: 1280MiB, serial: one}]}
`, strings.Replace(rackHead, "stack: {", "stack: {undersized: true, ", 1)+`
  - {name: node1, slot: U1, mac: "52:54:00:77:09:01", address: 10.77.0.11}
`)
	b := &bench{rig: r, disk: filepath.Join(r.lab, "var/lib/libvirt/images/node1-0.raw")}
	r.stopServe(syscall.SIGTERM)
	fresh := filepath.Join(r.dir, "fresh-state")
	r.run("cp", "-a", filepath.Join(r.dir, "state"), fresh)
	again := func() { // a blank disk and a disc host that has seen nothing
		b.blank()
		r.run("rm", "-rf", filepath.Join(r.dir, "state"))
		r.run("cp", "-a", fresh, filepath.Join(r.dir, "state"))
	}

	r.startServe()
	ours := b.measure("platter")
	preparation := b.preparation()
	r.power("off", "node1")
	r.stopServe(syscall.SIGTERM)

	// The same disk as it is between the write and the first boot.
	again()
	r.startServe()
	r.power("on", "node1")
	r.await("the disk is complete", func(s map[string]provision.State) bool {
		return s["node1"].Stage == provision.StageInstalled
	})
	r.power("off", "node1")
	r.stopServe(syscall.SIGTERM)
	b.makeFloor()
	again()
	r.store = filepath.Join(r.dir, "floor-store")
	r.startServe()
	floor := b.measure("floor")

	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\nstep\twall s\tCPU s\tfloor wall s\tfloor CPU s\t")
	for _, name := range []string{"kernel and initramfs up", "disk written", "installed system up", "ready"} {
		o, f := ours[name], floor[name]
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.1f\t%.1f\t\n", name, o.wall, o.cpu, f.wall, f.cpu)
	}
	w.Flush()
	o, f := ours["ready"], floor["ready"]
	fmt.Printf("ratio to the floor: wall %.2f, CPU %.2f (aim: at most 1.15)\n\n", o.wall/f.wall, o.cpu/f.cpu)
	fmt.Println(b.phases)
	fmt.Println(preparation)
}

// preparation tells what looking at a host that is as it should be adds to
// each of its boots, step by step.
func (b *bench) preparation() string {
	b.t.Helper()
	var steps []struct {
		Step    string `json:"step"`
		Outcome string `json:"outcome"`
		TookMS  int64  `json:"took_ms"`
	}
	out := b.ssh("10.77.0.11", "/usr/lib/platter/platter-node host check -o json || [ $? = 3 ]")
	if err := json.Unmarshal([]byte(out), &steps); err != nil {
		b.t.Fatalf("host check: %v\n%s", err, out)
	}
	var parts []string
	var sum int64
	for _, s := range steps {
		parts = append(parts, fmt.Sprintf("%s %d ms", s.Step, s.TookMS))
		sum += s.TookMS
	}
	return fmt.Sprintf("preparation of a clean host, at each boot: %.1f s (aim: under 3 s): %s", float64(sum)/1000, strings.Join(parts, ", "))
}

type bench struct {
	*rig
	disk   string
	phases string // the installer's own times
}

// sample is time since power-on: on the clock, and of the VM's processors.
type sample struct{ wall, cpu float64 }

// measure powers the node on and returns when each step was reached. Both runs
// are watched the same way: by what the console and the disc host say.
func (b *bench) measure(what string) map[string]sample {
	b.t.Helper()
	consolePath := filepath.Join(b.lab, "console/node1.log")
	os.Truncate(consolePath, 0)
	start := time.Now()
	b.power("on", "node1")
	pid := b.qemu()
	out := map[string]sample{}
	var mu sync.Mutex
	reach := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		if _, ok := out[name]; !ok {
			out[name] = sample{time.Since(start).Seconds(), cpuSeconds(b.t, pid)}
			b.t.Logf("%s: %s after %.1f s", what, name, out[name].wall)
		}
	}
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { // the floor's initramfs reports to nobody: both are read off the console
		defer close(done)
		for tick := time.NewTicker(100 * time.Millisecond); ; {
			text, _ := os.ReadFile(consolePath)
			if strings.Contains(string(text), "FLOOR: up") {
				reach("kernel and initramfs up")
			}
			if strings.Contains(string(text), "FLOOR: written") {
				reach("disk written")
			}
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()
	b.await(what+" is ready", func(s map[string]provision.State) bool {
		switch n := s["node1"]; n.Stage {
		case provision.StageInstalling:
			reach("kernel and initramfs up")
		case provision.StageInstalled:
			reach("kernel and initramfs up")
			reach("disk written")
		case provision.StagePreparing, provision.StageJoining, provision.StageProbing:
			reach("installed system up")
		case provision.StageReady:
			reach("installed system up")
			reach("ready")
			return true
		}
		return false
	})
	close(stop)
	<-done
	if b.phases == "" {
		var keys []string
		for _, e := range b.events("node1") {
			if e.Report == nil {
				continue
			}
			for k, v := range e.Report.Facts {
				if name, ok := strings.CutSuffix(k, "_ms"); ok {
					ms, _ := strconv.ParseFloat(v, 64)
					keys = append(keys, fmt.Sprintf("%s %.2f s", name, ms/1000))
				}
			}
		}
		b.phases = "the node's own clocks: " + strings.Join(keys, ", ")
	}
	return out
}

// qemu is the pid of the lab's one machine.
func (b *bench) qemu() int {
	b.t.Helper()
	comm, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range comm {
		text, _ := os.ReadFile(path)
		if strings.HasPrefix(filepath.Base(strings.SplitN(string(text), "\x00", 2)[0]), "qemu-system") && strings.Contains(string(text), filepath.Base(b.disk)) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil && strings.Contains(string(text), "node1") {
				return pid
			}
		}
	}
	b.t.Fatal("the machine has no QEMU process")
	return 0
}

func cpuSeconds(t *testing.T, pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Error(err)
		return 0
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ is 100 on Linux
}

// blank makes the node's disk as new.
func (b *bench) blank() {
	b.t.Helper()
	st, err := os.Stat(b.disk)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.Truncate(b.disk, 0); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Truncate(b.disk, st.Size()); err != nil {
		b.t.Fatal(err)
	}
}

// makeFloor makes a store whose installer is the floor: the disk as one zstd
// stream, and an initramfs of busybox, zstd, kexec and the drivers of this VM.
func (b *bench) makeFloor() {
	b.t.Helper()
	store := filepath.Join(b.dir, "floor-store")
	b.run("cp", "-a", b.store, store)
	st, err := images.Open(store)
	if err != nil {
		b.t.Fatal(err)
	}
	set, err := st.Boot("amd64")
	if err != nil {
		b.t.Fatal(err)
	}
	// The disk is hardly larger than the image, so that the floor writes
	// little more than what is in it.
	b.run("zstd", "-q", "-3", "-T2", b.disk, "-o", filepath.Join(b.dir, "disk.zst"))
	disk := b.object(store, filepath.Join(b.dir, "disk.zst"))

	tree := filepath.Join(b.dir, "floor")
	for _, d := range []string{"bin", "proc", "sys", "dev", "mnt", "modules"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			b.t.Fatal(err)
		}
	}
	b.run("cp", "/bin/busybox", filepath.Join(tree, "bin/busybox"))
	for _, tool := range []string{"/usr/bin/zstd", "/sbin/kexec"} {
		b.run("cp", tool, filepath.Join(tree, "bin"))
		for _, lib := range strings.Fields(b.run("sh", "-c", "ldd "+tool+" | grep -o '/[^ ]*'")) {
			dst := filepath.Join(tree, lib)
			os.MkdirAll(filepath.Dir(dst), 0o755)
			b.run("cp", "-L", lib, dst)
		}
	}
	// Drivers come from our own initramfs, which has them decompressed.
	ours := filepath.Join(b.dir, "ours")
	os.MkdirAll(ours, 0o755)
	b.run("sh", "-c", fmt.Sprintf("cd %s && zstd -dcq %s | cpio -idm --quiet '*lib/modules/*'", ours, filepath.Join(store, "objects", set.Initramfs.Hash)))
	var insmod strings.Builder
	for _, name := range []string{"virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "failover", "net_failover", "virtio_net", "virtio_blk", "crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4"} {
		found := strings.Fields(b.run("find", ours, "-name", name+".ko"))
		if len(found) == 1 { // others are built in
			b.run("cp", found[0], filepath.Join(tree, "modules", name+".ko"))
			fmt.Fprintf(&insmod, "busybox insmod /modules/%s.ko\n", name)
		}
	}
	init := `#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc; busybox mount -t sysfs sys /sys; busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1
` + insmod.String() + `
for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/class/net/eth0 ] && [ -e /dev/vda ] && break; busybox sleep 0.1; done
busybox ifconfig eth0 10.77.0.11 netmask 255.255.255.0 up
echo FLOOR: up
busybox wget -q -O - http://10.77.0.1/objects/` + disk + ` | zstd -dcq | busybox dd of=/dev/vda bs=1M conv=fsync 2>/dev/null
busybox blockdev --rereadpt /dev/vda
echo FLOOR: written
busybox mount -o ro /dev/vda3 /mnt
args=$(busybox sed -n 's/^set platter_args="\(.*\)"$/\1/p' /mnt/boot/grub/platter.cfg)
kexec -s -l /mnt/vmlinuz --initrd=/mnt/initrd.img --command-line="$args"
busybox umount /mnt
kexec -e
echo FLOOR: failed; busybox sleep 1000
`
	if err := os.WriteFile(filepath.Join(tree, "init"), []byte(init), 0o755); err != nil {
		b.t.Fatal(err)
	}
	b.run("sh", "-c", fmt.Sprintf("cd %s && find . | cpio -o -H newc --quiet | zstd -q -19 -o %s/floor.cpio.zst", tree, b.dir))
	b.sign(store, set, filepath.Join(b.dir, "floor.cpio.zst"))
}

// object puts a file into the store and returns its hash.
func (b *bench) object(store, file string) string {
	b.t.Helper()
	in, err := os.Open(file)
	if err != nil {
		b.t.Fatal(err)
	}
	defer in.Close()
	h := sha256.New()
	if _, err := io.Copy(h, in); err != nil {
		b.t.Fatal(err)
	}
	hash := hex.EncodeToString(h.Sum(nil))
	b.run("cp", file, filepath.Join(store, "objects", hash))
	return hash
}

// sign lets the store's boot set be the same kernel with another initramfs.
func (b *bench) sign(store string, set images.BootSet, initramfs string) {
	b.t.Helper()
	edit := func(path string, change func(map[string]any)) {
		text, err := os.ReadFile(path)
		if err != nil {
			b.t.Fatal(err)
		}
		m := map[string]any{}
		if err := json.Unmarshal(text, &m); err != nil {
			b.t.Fatal(err)
		}
		change(m)
		if text, err = json.Marshal(m); err != nil {
			b.t.Fatal(err)
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	refPath := filepath.Join(store, "refs/boot/amd64")
	var ref struct{ Digest string }
	text, err := os.ReadFile(refPath)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := json.Unmarshal(text, &ref); err != nil {
		b.t.Fatal(err)
	}
	manifest := filepath.Join(b.dir, "boot.json")
	b.run("cp", filepath.Join(store, "objects", ref.Digest), manifest)
	st, err := os.Stat(initramfs)
	if err != nil {
		b.t.Fatal(err)
	}
	edit(manifest, func(m map[string]any) {
		m["initramfs"] = provision.Object{Hash: b.object(store, initramfs), Size: st.Size()}
	})
	keyText, err := os.ReadFile(filepath.Join(b.repo, "build/keys/image.key"))
	if err != nil {
		b.t.Fatal(err)
	}
	var key minisign.PrivateKey
	if err := key.UnmarshalText([]byte(strings.TrimSpace(string(keyText)))); err != nil {
		b.t.Fatal(err)
	}
	raw, err := os.ReadFile(manifest)
	if err != nil {
		b.t.Fatal(err)
	}
	digest := b.object(store, manifest)
	if err := os.WriteFile(filepath.Join(store, "objects", digest+".minisig"), minisign.Sign(key, raw), 0o644); err != nil {
		b.t.Fatal(err)
	}
	edit(refPath, func(m map[string]any) { m["digest"] = digest })
}
