package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

func TestProposeOnlyWhatIsSure(t *testing.T) {
	r := func(interfaces ...string) *provision.Rack {
		out := &provision.Rack{Name: "r"}
		for _, i := range interfaces {
			out.Networks = append(out.Networks, provision.Network{Interface: i})
		}
		return out
	}
	up, down := nic{"eth0", "52:54:00:00:00:01", true}, nic{"eth1", "52:54:00:00:00:02", false}
	other := nic{"eth2", "52:54:00:00:00:03", true}
	keep, plain := place{device: "/dev/sda1", label: keepLabel}, place{device: "/dev/sdb1"}
	for name, c := range map[string]struct {
		m    machine
		want choice
		sure bool
	}{
		"a labelled stick and one link": {machine{nics: []nic{up, down}, places: []place{plain, keep}, racks: []rackFile{{"a", 1, r("eno1")}}}, choice{0, []string{"eth0"}, 1}, true},
		"the name of the rack file":     {machine{nics: []nic{up, other}, places: []place{keep}, racks: []rackFile{{"a", 0, r("eth2")}}}, choice{0, []string{"eth2"}, 0}, true},
		"two links":                     {machine{nics: []nic{up, other}, places: []place{keep}, racks: []rackFile{{"a", 0, r("eno1")}}}, choice{0, []string{""}, 0}, false},
		"no link":                       {machine{nics: []nic{down}, places: []place{keep}, racks: []rackFile{{"a", 0, r("eno1")}}}, choice{0, []string{""}, 0}, false},
		"two networks, one wired":       {machine{nics: []nic{up}, places: []place{keep}, racks: []rackFile{{"a", 0, r("eth0", "eno2")}}}, choice{0, []string{"eth0", ""}, 0}, false},
		"no label":                      {machine{nics: []nic{up}, places: []place{plain}, racks: []rackFile{{"a", 0, r("eno1")}}}, choice{0, []string{"eth0"}, -1}, false},
		"two labels":                    {machine{nics: []nic{up}, places: []place{keep, keep}, racks: []rackFile{{"a", 0, r("eno1")}}}, choice{0, []string{"eth0"}, -1}, false},
		"the rack file is elsewhere":    {machine{nics: []nic{up}, places: []place{keep, plain}, racks: []rackFile{{"a", 1, r("eno1")}}}, choice{0, []string{"eth0"}, 0}, false},
		"two rack files":                {machine{nics: []nic{up}, places: []place{keep}, racks: []rackFile{{"a", 0, r("eno1")}, {"b", 0, r("eno1")}}}, choice{-1, nil, 0}, false},
		"another one on the disc":       {machine{nics: []nic{up}, places: []place{keep}, racks: []rackFile{{"a", -1, r("eno1")}, {"b", 0, r("eno1")}}}, choice{1, []string{"eth0"}, 0}, true},
		"nothing":                       {machine{}, choice{-1, nil, -1}, false},
	} {
		got, sure := c.m.propose()
		if got.rack != c.want.rack || got.place != c.want.place || !slices.Equal(got.nics, c.want.nics) || sure != c.sure {
			t.Errorf("%s: %+v, sure %v; want %+v, %v", name, got, sure, c.want, c.sure)
		}
	}
}

// Whoever presses a key is asked everything; wrong answers are asked again.
func TestDiscHostAsks(t *testing.T) {
	m := machine{
		nics:   []nic{{"eth0", "52:54:00:00:00:01", true}, {"eth1", "52:54:00:00:00:02", true}},
		places: []place{{device: "/dev/sda1", kind: "vfat", label: keepLabel}},
		racks:  []rackFile{{"a.yaml", 0, &provision.Rack{Name: "one", Networks: []provision.Network{{Interface: "eth0"}}}}, {"b.yaml", 0, &provision.Rack{Name: "two", Networks: []provision.Network{{Interface: "eno1"}}}}},
	}
	var out bytes.Buffer
	o := discHostOptions{out: &out, wait: time.Hour, page: noPage}
	ask := &asker{out: &out, in: bufio.NewReader(strings.NewReader("2\nseven\n9\n2\n1\nthe rest\n"))}
	_, c, err := o.choose(t.Context(), m, ask)
	if err != nil || c.rack != 1 || !slices.Equal(c.nics, []string{"eth1"}) || c.place != -1 {
		t.Errorf("%+v, %v\n%s", c, err, &out)
	}
	for _, want := range []string{`"seven" is none of 1 to 2`, "ALL IS LOST", "b.yaml: rack two"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q was not said:\n%s", want, &out)
		}
	}
	if rest, _ := ask.in.ReadString('\n'); rest != "the rest\n" {
		t.Errorf("more was read than was asked for: left is %q", rest)
	}
	// Two networks are not wired to one interface.
	two := m
	two.racks = []rackFile{{"c.yaml", 0, &provision.Rack{Name: "three", Networks: []provision.Network{{Interface: "eno1"}, {Interface: "eno2"}}}}}
	out.Reset()
	_, c, err = o.choose(t.Context(), two, &asker{out: &out, in: bufio.NewReader(strings.NewReader("1\n2\n2\n1\n\n"))})
	if err != nil || !slices.Equal(c.nics, []string{"eth1", "eth0"}) || !strings.Contains(out.String(), "eth1 is wired to another network already") {
		t.Errorf("%+v, %v\n%s", c, err, &out)
	}
	two.nics = two.nics[:1]
	if _, _, err := o.choose(t.Context(), two, &asker{out: &out, in: bufio.NewReader(strings.NewReader("1\n1\n"))}); err == nil || !strings.Contains(err.Error(), "2 networks and this machine 1 interface") {
		t.Errorf("one interface for two networks: %v", err)
	}
	// Without a console it waits as long as with one.
	if began := time.Now(); true {
		pressed, err := (&asker{out: &out, in: bufio.NewReader(strings.NewReader(""))}).pressed(t.Context(), 50*time.Millisecond, nil)
		if pressed || err != nil || time.Since(began) < 50*time.Millisecond {
			t.Errorf("%v, %v after %s", pressed, err, time.Since(began))
		}
	}
	// Nobody is there: it begins by itself.
	m.racks = m.racks[:1]
	o.wait = time.Millisecond
	_, c, err = o.choose(t.Context(), m, &asker{out: &out, in: bufio.NewReader(neverReader{t.Context().Done()})})
	if err != nil || c.rack != 0 || c.place != 0 || !slices.Equal(c.nics, []string{"eth0"}) {
		t.Errorf("%+v, %v", c, err)
	}
}

func noPage(context.Context, machine, func(context.Context) (machine, error)) (*chooser, error) {
	return nil, errors.New("no wire")
}

// neverReader is a console where nobody types.
type neverReader struct{ done <-chan struct{} }

func (n neverReader) Read([]byte) (int, error) {
	<-n.done
	return 0, nil
}

func TestFileSystem(t *testing.T) {
	for _, c := range []struct{ kind, label, make string }{
		{"ext4", "PLATTER", "mkfs.ext4 -q -F -L PLATTER FILE 8M"},
		{"ext4", "", "mkfs.ext4 -q -F FILE 8M"},
		{"vfat", "PLATTER", "mkfs.vfat -C -n PLATTER FILE 8192"},
		{"vfat", "STICK", "mkfs.vfat -C -F 32 -n STICK FILE 65536"},
		{"", "", "truncate -s 1M FILE"},
	} {
		file := filepath.Join(t.TempDir(), "x")
		if out, err := exec.Command("sh", "-c", strings.ReplaceAll(c.make, "FILE", file)).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c.make, err, out)
		}
		kind, label, err := fileSystem(file)
		if err != nil || kind != c.kind || label != c.label {
			t.Errorf("%s: %q %q, %v", c.make, kind, label, err)
		}
	}
}

func TestRewire(t *testing.T) {
	for range 20 { // the order of a map is another each time
		networks := []provision.Network{{Interface: "eth0"}, {Interface: "eth1"}, {Interface: "eth2"}}
		if err := rewire(networks, map[string]string{"eth0": "eth1", "eth1": "eth0"}); err != nil || networks[0].Interface != "eth1" || networks[1].Interface != "eth0" || networks[2].Interface != "eth2" {
			t.Fatalf("%+v, %v", networks, err)
		}
	}
	if err := rewire(nil, map[string]string{"eth9": "eth0"}); err == nil || !strings.Contains(err.Error(), "names no interface eth9") {
		t.Errorf("an unknown interface: %v", err)
	}
}
