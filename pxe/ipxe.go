package pxe

import (
	"net/netip"
	"net/url"
	"strings"

	"platter/provision"
)

// BootRequest is one machine's request for a boot script.
type BootRequest struct {
	MAC      provision.MAC
	Addr     netip.Addr // the machine's own address, as the connection shows it
	DiscHost netip.Addr // the disc host's address on the machine's network
	Platform string     // iPXE's ${platform}: pcbios or efi
	Arch     string     // iPXE's ${buildarch}: i386, x86_64, arm64
	// Again is the URL that the script asks when something failed: the same
	// request once more, so that a changed decision takes effect.
	Again string
	// LocalLoader is the URL of a UEFI program that starts the machine's own
	// disk; empty: there is none.
	LocalLoader string
}

// ScriptURL is where iPXE on a machine gets its boot script. server is the
// disc host's host or host:port.
func ScriptURL(server string, mac provision.MAC, platform, arch string) string {
	q := "mac=" + string(mac)
	if platform != "" {
		q += "&platform=" + url.QueryEscape(platform)
	}
	if arch != "" {
		q += "&arch=" + url.QueryEscape(arch)
	}
	return "http://" + server + "/boot.ipxe?" + q
}

// Install is the script that starts the installer (or any other life of our
// initramfs) from the URLs of its kernel and initramfs. why is one sentence
// for the screen.
func (r BootRequest) Install(why, kernel, initramfs string, cmdline []string) string {
	var s script
	s.say(why)
	// The kernel's EFI stub finds the initramfs by the name on its command
	// line; under BIOS the argument is not looked at.
	args := []string{"kernel", word(kernel), "initrd=platter.img"}
	for _, a := range cmdline {
		if a = word(a); a != "" {
			args = append(args, a)
		}
	}
	s.line(strings.Join(args, " ") + " || goto again")
	s.line("initrd --name platter.img " + word(initramfs) + " || goto again")
	s.line("boot || goto again")
	s.again(r.Again)
	return s.String()
}

// Inventory is Install with the life that reports the hardware, touches no
// disk and waits.
func (r BootRequest) Inventory(why, kernel, initramfs string, cmdline []string) string {
	return r.Install(why, kernel, initramfs, append([]string{"platter.life=inventory"}, cmdline...))
}

// Local is the script that boots the machine's own disk.
func (r BootRequest) Local(why string) string {
	var s script
	s.say(why)
	s.local(r)
	return s.String()
}

// Explain is the script that shows text for half a minute and then boots the
// machine's own disk.
func (r BootRequest) Explain(text string) string {
	var s script
	s.say(text)
	s.line("sleep 30 ||")
	s.local(r)
	return s.String()
}

// Wait is the script that shows why and asks again, first soon, then every
// minute.
func (r BootRequest) Wait(why string) string {
	var s script
	s.say(why)
	s.again(r.Again)
	return s.String()
}

// script builds an iPXE script line by line.
type script struct{ b strings.Builder }

func (s *script) line(l string) { s.b.WriteString(l + "\n") }

func (s *script) String() string { return "#!ipxe\n" + s.b.String() }

// say shows text on the screen, wrapped so that 80 columns never cut a word.
func (s *script) say(text string) {
	for i, l := range wrap(clean(text), 66) {
		if i == 0 {
			s.line("echo Platter: " + l)
		} else {
			// Without a word in front, a line could begin with a dash and be
			// read as an option.
			s.line("echo . " + l)
		}
	}
}

// again waits and asks for the script anew, for ever. The wait doubles from 2
// to 64 seconds; the variable outlives the script, so that it keeps growing
// over one failure after the other.
func (s *script) again(url string) {
	s.line(":again")
	s.line("imgfree ||")
	s.line("isset ${platter-wait} || set platter-wait:int32 2")
	s.line("echo Platter: next try in ${platter-wait} s")
	s.line("sleep ${platter-wait} ||")
	s.line("iseq ${platter-wait} 64 || inc platter-wait ${platter-wait} ||")
	s.line("chain --replace --autofree " + word(url) + " || goto again")
}

// local leaves for the machine's own disk.
//
// A BIOS's boot order may have the network first for ever, so under BIOS the
// first disk is started directly; exit hands back to the firmware, which goes
// on to its next device. Under UEFI iPXE cannot start a disk, so it fetches a
// loader that can. Where that fails the firmware goes on: a boot entry that
// returns success ends in its menu (UEFI specification 2.10, 3.1.2), one that
// returns an error lets it try the next entry, hence exit 1.
func (s *script) local(r BootRequest) {
	switch {
	case r.Platform != "efi":
		s.line("sanboot --no-describe --drive 0x80 ||")
	case r.LocalLoader != "":
		s.line("chain " + word(r.LocalLoader) + " ||")
	}
	s.line("exit 1")
}

// clean keeps what is safe in an iPXE script line: iPXE expands ${...}, ends
// commands at ||, && and ;, starts comments at #, joins lines at a backslash,
// and its console knows ASCII only.
func clean(text string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9',
			strings.ContainsRune(" .,:!?()'\"/+-=@%_<>[]*~^", c):
			return c
		case c == '\n', c == '\r', c == '\t', c == ';':
			return ' '
		case c == '{':
			return '('
		case c == '}':
			return ')'
		}
		return '?'
	}, text)
}

// word makes one argument of a command: printable ASCII without spaces and
// without the characters that iPXE expands or that end a script's line.
func word(arg string) string {
	return strings.Map(func(c rune) rune {
		if c <= ' ' || c >= 0x7f || strings.ContainsRune("$#;|\\", c) {
			return -1
		}
		return c
	}, arg)
}

// wrap breaks text at spaces into lines of at most width characters, at most
// 12 of them: an iPXE screen has 25.
func wrap(text string, width int) []string {
	var lines []string
	cur := ""
	for _, w := range strings.Fields(text) {
		for len(w) > width {
			w = w[:width]
		}
		switch {
		case cur == "":
			cur = w
		case len(cur)+1+len(w) > width:
			lines, cur = append(lines, cur), w
		default:
			cur += " " + w
		}
	}
	if cur != "" {
		lines = append(lines, cur)
	}
	return lines[:min(len(lines), 12)]
}
