package install

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/provision/disk"
)

const goodCmdline = "BOOT_IMAGE=vmlinuz console=ttyS0 quiet platter.life=installer platter.url=https://10.0.0.1:8443 " +
	"platter.pin=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff platter.token=00112233445566778899aabbccddeeff " +
	"platter.mac=52:54:00:AA:bb:01 platter.ip=10.0.0.11/24"

func TestParseCmdline(t *testing.T) {
	c, err := ParseCmdline(goodCmdline + "\n")
	if err != nil || c.Life != LifeInstaller || c.MAC != "52:54:00:aa:bb:01" || c.Addr != netip.MustParsePrefix("10.0.0.11/24") || c.URL != "https://10.0.0.1:8443" {
		t.Fatalf("%+v, %v", c, err)
	}
	for old, bad := range map[string]string{
		"life=installer":         "life=reaper",
		"url=https://":           "url=http://",
		"10.0.0.1:8443":          "disc.example.org:8443",
		":8443 ":                 ":8443/x ",
		"platter.pin=00":         "platter.pin=",
		"platter.token=0011":     "platter.token=zz11",
		"platter.mac=52:":        "platter.mac=",
		"/24":                    "/33",
		"10.0.0.11/24":           "10.0.0.11",
		"ip=10.0.0.11":           "ip=fd00::1",
		"console=ttyS0":          "platter.ip=10.0.0.12/24",
		"quiet":                  "platter.life",
		"platter.life=installer": "",
	} {
		line := strings.Replace(goodCmdline, old, bad, 1)
		if line == goodCmdline {
			t.Fatalf("%q is not in the line", old)
		}
		if _, err := ParseCmdline(line); err == nil || !strings.Contains(err.Error(), "platter.") {
			t.Errorf("%q for %q: %v", bad, old, err)
		}
	}
}

func FuzzCmdline(f *testing.F) {
	f.Add(goodCmdline)
	f.Add("platter.life=inventory platter.life=x platter.")
	f.Fuzz(func(t *testing.T, line string) {
		c, err := ParseCmdline(line)
		if err == nil && (len(c.MAC) != 17 || !c.Addr.IsValid() || len(c.Pin) != 64 || !strings.HasPrefix(c.URL, "https://")) {
			t.Errorf("%q gave %+v", line, c)
		}
	})
}

func TestModules(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("modules.dep", "kernel/net-core.ko:\nkernel/virtio.ko:\nkernel/virtio-net.ko: kernel/net-core.ko kernel/virtio.ko\nkernel/bad.ko:\nkernel/needs_bad.ko: kernel/bad.ko\n")
	write("modules.alias", "# comment\nalias virtio:d00000001v* virtio_net\nalias pci:v*d*sv*sd*bc01sc06i01* missing\nalias pci:v00001AF4d* virtio\nalias x:* needs_bad\n")
	m, err := OpenModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	var loaded []string
	m.load = func(file string) error {
		loaded = append(loaded, filepath.Base(file))
		switch filepath.Base(file) {
		case "bad.ko":
			return unix.ENOEXEC
		case "virtio.ko":
			return unix.EEXIST
		}
		return nil
	}
	for range 2 {
		if err := m.LoadFor("virtio:d00000001v00001AF4"); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(loaded, []string{"virtio.ko", "net-core.ko", "virtio-net.ko"}) {
		t.Errorf("loaded %v", loaded)
	}
	if err := m.LoadFor("pci:v00008086d00002922sv0sd0bc01sc06i01"); err != nil {
		t.Errorf("a driver that is built in: %v", err)
	}
	if err := m.LoadFor("x:1"); !errors.Is(err, unix.ENOEXEC) || !strings.Contains(err.Error(), "needs bad") {
		t.Error(err)
	}
	if err := m.LoadFor("y:1"); err != nil {
		t.Error(err)
	}
}

func TestUevent(t *testing.T) {
	msg := []byte("add@/devices/pci0/virtio1\x00ACTION=add\x00DEVPATH=/x\x00MODALIAS=virtio:d2v1\x00SEQNUM=7\x00")
	if a, added := parseUevent(msg); a != "virtio:d2v1" || !added {
		t.Errorf("%q %v", a, added)
	}
	if _, added := parseUevent(bytes.ReplaceAll(msg, []byte("=add"), []byte("=remove"))); added {
		t.Error("a device that goes counts as one that came")
	}
}

// A real device that appears is noticed.
func TestDevices(t *testing.T) {
	d, err := WatchDevices("/", nil, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	file := filepath.Join(t.TempDir(), "x")
	sparse(t, file, 1<<20)
	seen := make(chan error, 1)
	ready := make(chan struct{})
	loops := func() int {
		m, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		n := 0
		for _, f := range m {
			if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == file {
				n++
			}
		}
		return n
	}
	go func() {
		first := true
		seen <- d.Wait(t.Context(), func() bool {
			if first {
				close(ready)
				first = false
			}
			return loops() == 1
		})
	}()
	<-ready
	dev := strings.TrimSpace(tool(t, "losetup", "--find", "--show", file))
	defer exec.Command("losetup", "--detach", dev).Run()
	if err := <-seen; err != nil {
		t.Fatal(err)
	}
	if err := d.Settle(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
}

// efiMap is a firmware's memory.
type efiMap map[string][]byte

func (m efiMap) Names() ([]string, error) { return slices.Sorted(maps.Keys(m)), nil }
func (m efiMap) Get(name string) ([]byte, error) {
	if b, ok := m[name]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}
func (m efiMap) Set(name string, b []byte) error { m[name] = bytes.Clone(b); return nil }
func (m efiMap) Delete(name string) error        { delete(m, name); return nil }

func option(name, file string, id byte) LoadOption {
	return LoadOption{Active: true, Description: name, Partition: 2, Start: 4096, Size: 131072, ID: disk.GUID{id, 1}, File: file}
}

func TestSetBootEntry(t *testing.T) {
	network := []byte("\x01\x00\x00\x00\x04\x00N\x00\x00\x00\x7f\xff\x04\x00")
	foreign := option("Debian", `\EFI\debian\grubx64.efi`, 7)
	stale := option("Platter node1", ourFile, 8)
	want := option("Platter node1", ourFile, 9)
	v := efiMap{
		"Boot0000": network, "Boot0001": foreign.Encode(), "Boot0002": stale.Encode(), "Boot0004": []byte("rubbish"),
		"BootOrder": encodeNumbers([]uint16{2, 0, 1}), "BootCurrent": encodeNumbers([]uint16{0}), "Timeout": {0, 0},
	}
	if err := SetBootEntry(v, want, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(v["BootOrder"], encodeNumbers([]uint16{0, 3, 1})) || !bytes.Equal(v["Boot0003"], want.Encode()) || v["Boot0002"] != nil || v["BootNext"] != nil {
		t.Errorf("%q", v)
	}
	before := maps.Clone(v)
	if err := SetBootEntry(v, want, true); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(v["BootNext"], encodeNumbers([]uint16{3})) {
		t.Errorf("BootNext is %q", v["BootNext"])
	}
	delete(v, "BootNext")
	if !maps.EqualFunc(before, v, bytes.Equal) {
		t.Errorf("the second time changed %q to %q", before, v)
	}
	if err := SetBootEntry(forgetful{efiMap{}}, want, false); err == nil {
		t.Error("a firmware that forgets was believed")
	}
}

type forgetful struct{ efiMap }

func (forgetful) Set(string, []byte) error { return nil }

func TestBootOrder(t *testing.T) {
	for _, c := range []struct {
		old     []uint16
		current int
		stale   map[uint16]bool
		want    []uint16
	}{
		{nil, -1, nil, []uint16{9}},
		{[]uint16{1, 2}, -1, nil, []uint16{9, 1, 2}},
		{[]uint16{1, 2}, 1, nil, []uint16{1, 9, 2}},
		{[]uint16{1, 2}, 2, nil, []uint16{1, 2, 9}},
		{[]uint16{1, 2}, 5, nil, []uint16{9, 1, 2}},
		{[]uint16{9, 1, 2, 9}, 2, nil, []uint16{1, 2, 9}},
		{[]uint16{3, 1, 4}, 1, map[uint16]bool{3: true, 4: true}, []uint16{1, 9}},
	} {
		if got := bootOrder(c.old, c.current, 9, c.stale); !slices.Equal(got, c.want) {
			t.Errorf("%v from %d: %v, want %v", c.old, c.current, got, c.want)
		}
	}
}

func TestLoadOption(t *testing.T) {
	want := option("Platter nöde", ourFile, 3)
	want.Data = []byte("more")
	got, ok := ParseLoadOption(want.Encode())
	if !ok || got.Description != want.Description || got.File != want.File || got.ID != want.ID || got.Start != want.Start ||
		got.Size != want.Size || got.Partition != 2 || !got.Active || string(got.Data) != "more" {
		t.Errorf("%+v, %v", got, ok)
	}
	// As efibootmgr wrote it on a machine with edk2: Boot0001 "debian" on
	// partition 1, 2048 to 1050624.
	real := "\x01\x00\x00\x00\x62\x00d\x00e\x00b\x00i\x00a\x00n\x00\x00\x00" +
		"\x04\x01\x2a\x00\x01\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00" +
		"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x02\x02" +
		"\x04\x04\x34\x00\\\x00E\x00F\x00I\x00\\\x00d\x00e\x00b\x00i\x00a\x00n\x00\\\x00s\x00h\x00i\x00m\x00x\x006\x004\x00.\x00e\x00f\x00i\x00\x00\x00\x7f\xff\x04\x00"
	got, ok = ParseLoadOption([]byte(real))
	if !ok || got.File != `\EFI\debian\shimx64.efi` || got.Start != 2048 || got.Size != 1<<20 || !bytes.Equal(got.Encode(), []byte(real)) {
		t.Errorf("%+v, %v\n%x\n%x", got, ok, got.Encode(), real)
	}
}

func FuzzLoadOption(f *testing.F) {
	f.Add(option("Platter node1", ourFile, 1).Encode())
	f.Add([]byte("\x01\x00\x00\x00\x04\x00N\x00\x00\x00\x7f\xff\x04\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, ok := ParseLoadOption(b)
		if !ok {
			return
		}
		again, ok := ParseLoadOption(o.Encode())
		if !ok || again.File != o.File || again.ID != o.ID || again.Description != o.Description {
			t.Fatalf("%+v became %+v", o, again)
		}
	})
}

func TestEFIVars(t *testing.T) {
	v := EFIVars(t.TempDir())
	if _, err := v.Get("BootOrder"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := v.Set("BootOrder", []byte{1, 0}); err != nil {
		t.Fatal(err)
	}
	if b := read(t, v.path("BootOrder")); !bytes.Equal(b, []byte{7, 0, 0, 0, 1, 0}) {
		t.Errorf("%x", b)
	}
	// As efivarfs does, protect it from accidents.
	file, err := os.Open(v.path("BootOrder"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.IoctlSetPointerInt(int(file.Fd()), unix.FS_IOC_SETFLAGS, immutableFlag); err != nil {
		t.Fatal(err)
	}
	if err := v.Set("BootOrder", []byte{2, 0}); err != nil {
		t.Fatal(err)
	}
	if b, err := v.Get("BootOrder"); err != nil || !bytes.Equal(b, []byte{2, 0}) {
		t.Errorf("%x, %v", b, err)
	}
	if names, err := v.Names(); err != nil || !slices.Equal(names, []string{"BootOrder"}) {
		t.Errorf("%v, %v", names, err)
	}
	if err := v.Delete("BootOrder"); err != nil {
		t.Error(err)
	}
}
