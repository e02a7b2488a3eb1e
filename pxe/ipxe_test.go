package pxe

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

var testRequest = BootRequest{MAC: "52:54:00:12:34:56", Addr: netip.MustParseAddr("10.1.2.11"), DiscHost: netip.MustParseAddr("10.1.2.1"), Platform: "efi", Arch: "x86_64",
	Again: "http://10.1.2.1/boot.ipxe?mac=52:54:00:12:34:56&platform=efi&arch=x86_64"}

func TestScripts(t *testing.T) {
	want := `#!ipxe
echo Platter: n1 is due for install 1
kernel http://10.1.2.1/objects/aa initrd=platter.img platter.life=installer platter.token=00ff || goto again
initrd --name platter.img http://10.1.2.1/objects/bb || goto again
boot || goto again
:again
imgfree ||
isset ${platter-wait} || set platter-wait:int32 2
echo Platter: next try in ${platter-wait} s
sleep ${platter-wait} ||
iseq ${platter-wait} 64 || inc platter-wait ${platter-wait} ||
chain --replace --autofree http://10.1.2.1/boot.ipxe?mac=52:54:00:12:34:56&platform=efi&arch=x86_64 || goto again
`
	if got := testRequest.Install("n1 is due for install 1", "http://10.1.2.1/objects/aa", "http://10.1.2.1/objects/bb", []string{"platter.life=installer", "platter.token=00ff"}); got != want {
		t.Errorf("install:\n%s", got)
	}
	if got := testRequest.Inventory("", "k", "i", []string{"a=b"}); !strings.Contains(got, "kernel k initrd=platter.img platter.life=inventory a=b ||") {
		t.Errorf("inventory:\n%s", got)
	}
	if got := testRequest.Local("n1 is installed"); got != "#!ipxe\necho Platter: n1 is installed\nexit 1\n" {
		t.Errorf("local, UEFI:\n%s", got)
	}
	efi := testRequest
	efi.LocalLoader = "http://10.1.2.1/objects/cc"
	if got := efi.Local("n1 is installed"); got != "#!ipxe\necho Platter: n1 is installed\nchain http://10.1.2.1/objects/cc ||\nexit 1\n" {
		t.Errorf("local, UEFI, with a loader:\n%s", got)
	}
	bios := testRequest
	bios.Platform = "pcbios"
	if got := bios.Local("n1 is installed"); got != "#!ipxe\necho Platter: n1 is installed\nsanboot --no-describe --drive 0x80 ||\nexit 1\n" {
		t.Errorf("local, BIOS:\n%s", got)
	}
	long := bios.Explain(strings.Repeat("a rather long sentence for the screen, ", 40))
	if n := strings.Count(long, "\necho "); n != 12 {
		t.Errorf("%d lines on the screen", n)
	}
	for _, l := range strings.Split(long, "\n") {
		if len(strings.TrimPrefix(l, "echo ")) > 79 {
			t.Errorf("too long for a screen: %q", l)
		}
	}
}

// FuzzScripts: whatever text gets in, the script has the same commands, no
// setting is expanded and no line continued.
func FuzzScripts(f *testing.F) {
	f.Add("n1 failed: no disk", "http://10.1.2.1/objects/aa", "platter.life=installer")
	f.Add("evil\nimgexec http://evil/", "http://x/\nshell", "a b\rshell")
	f.Add("${cwuri} ; shell || shell && shell", "${net0/mac}", "x || shell")
	f.Add("# comment \\", "x\\", "\\")
	f.Add("--help -n -- é \x00 \u2028", "--help", "#")
	f.Add(strings.Repeat("x", 500), "", "")
	command := regexp.MustCompile(`^(#!ipxe|echo (Platter:|\.) .*|:again|imgfree \|\||kernel \S* initrd=platter\.img( \S+)* \|\| goto again|` +
		`initrd --name platter\.img \S* \|\| goto again|boot \|\| goto again|isset \$\{platter-wait\} \|\| set platter-wait:int32 2|` +
		`sleep (30|\$\{platter-wait\}) \|\||iseq \$\{platter-wait\} 64 \|\| inc platter-wait \$\{platter-wait\} \|\||` +
		`chain --replace --autofree \S+ \|\| goto again|sanboot --no-describe --drive 0x80 \|\||exit 1)$`)
	token := regexp.MustCompile(`(^|\s)(\|\||&&|;|#\S*)(\s|$)`)
	f.Fuzz(func(t *testing.T, text, url, arg string) {
		r := testRequest
		for _, r.Platform = range []string{"efi", "pcbios"} {
			for _, s := range []string{r.Install(text, url, url, []string{arg, "last=1"}), r.Inventory(text, url, url, []string{arg}), r.Local(text), r.Explain(text), r.Wait(text)} {
				for l := range strings.SplitSeq(strings.TrimSuffix(s, "\n"), "\n") {
					if !command.MatchString(l) {
						t.Fatalf("a line that is none of ours: %q", l)
					}
					if strings.HasPrefix(l, "echo") && !strings.Contains(l, "${platter-wait}") && (strings.ContainsAny(l, "$\\") || token.MatchString(l)) {
						t.Fatalf("not inert: %q", l)
					}
					if strings.HasPrefix(l, "kernel") && strings.ContainsAny(l, "$\\#;") {
						t.Fatalf("not inert: %q", l)
					}
					for i := range len(l) {
						if l[i] < ' ' || l[i] > '~' {
							t.Fatalf("not ASCII: %q", l)
						}
					}
				}
			}
		}
	})
}
