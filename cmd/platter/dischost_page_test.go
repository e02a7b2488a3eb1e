package main

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/provision"
	"platter/vmtest/browser"
)

const pageRack = `rack: over-the-page
image: debian-13
page: 10.77.0.1:8080
networks:
  - {interface: eno1, subnet: 10.77.0.0/24, disc-host: 10.77.0.1, pool: 10.77.0.200-10.77.0.220}
users:
  - {name: root, key-files: [key.pub]}
stack: {domain: im.example.org}
nodes:
  - {name: node1, mac: "52:54:00:77:0d:01", address: 10.77.0.11}
`

const pageKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1eYVWgCI0zkyZEPuAH/eQDEyW2YRvkC3z5oSNcL2cJ admin\n"

// chooserServer serves a page on loopback, with its own certificate, which is
// in the file ca.
func chooserServer(t *testing.T, m machine, look func(context.Context) (machine, error)) (p *chooser, address, ca string) {
	t.Helper()
	dir := t.TempDir()
	p, err := newChooser(m, look, filepath.Join(dir, "upload"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := p.certify([]netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(p.handler())
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	ca = filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	return p, srv.URL, ca
}

func twoNics() []nic {
	return []nic{{"eth0", "52:54:00:00:00:01", false}, {"eth1", "52:54:00:00:00:02", true}}
}

// Somebody with a browser and no stick: the code, a rack file with its key, the
// interface, where the state goes.
func TestChooseInABrowser(t *testing.T) {
	m := machine{nics: twoNics(), places: []place{{device: "/dev/sdb1", kind: "ext4", size: 8 << 30}}}
	p, address, ca := chooserServer(t, m, func(context.Context) (machine, error) { return m, nil })
	b := browser.Open(t, address, browser.Options{CA: ca, Width: 1000, Height: 900, Scheme: "light"})
	code := func(s string) {
		t.Helper()
		b.Await("document.querySelector('#code')")
		b.Eval("document.querySelector('#code').focus()")
		b.Type(s)
		b.Follow("button")
	}
	code("1234567")
	if text := b.Text("[role=alert]"); !strings.Contains(text, "9 more tries") {
		t.Errorf("a wrong code: %q", text)
	}
	code(p.code[:4] + " " + p.code[4:])
	select {
	case <-p.entered:
	default:
		t.Error("the console does not hear that somebody is on the page")
	}
	if text := b.Text("main"); !strings.Contains(text, "There is no rack file: bring one") {
		t.Errorf("the page: %q", text)
	}
	dir := t.TempDir()
	files := func(content string) {
		t.Helper()
		for name, text := range map[string]string{"rack.yaml": content, "key.pub": pageKey} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		b.Choose("#file", filepath.Join(dir, "rack.yaml"), filepath.Join(dir, "key.pub"))
		b.Follow("form[action='/upload'] button")
	}
	files(strings.Replace(pageRack, "subnet: 10.77.0.0/24", "subnet: 10.78.0.0/24", 1))
	if text := b.Text("[role=alert]"); !strings.Contains(text, "Nothing was taken") || !strings.Contains(text, "10.78.0.0/24") {
		t.Errorf("a wrong rack file: %q", text)
	}
	files(pageRack)
	if text := b.Text("main"); !strings.Contains(text, "rack over-the-page, 1 node") {
		t.Fatalf("the page: %q", text)
	}
	b.Follow("form[method=get] button")
	if nic := b.Eval("document.querySelector('#nic0').value"); nic != "eth1" {
		t.Errorf("the interface with a link is not proposed, but %v", nic)
	}
	b.Eval("document.querySelector('input[name=place][value=\"/dev/sdb1\"]').click()")
	b.Follow("button.go")
	if text := b.Text("main"); !strings.Contains(text, "Chosen") || !strings.Contains(text, "http://10.77.0.1:8080/") {
		t.Errorf("the page: %q", text)
	}
	on := <-p.chosen
	r := on.m.racks[on.c.rack]
	if r.rack.Name != "over-the-page" || r.place != -1 || len(on.c.nics) != 1 || on.c.nics[0] != "eth1" || on.c.place != 0 {
		t.Errorf("chosen: %+v of %+v", on.c, on.m)
	}
	if said := b.Console(); len(said) > 0 {
		t.Errorf("the browser complains: %q", said)
	}
	// What was brought is kept with the state, and a later one in its place.
	state := t.TempDir()
	for range 2 {
		path, err := keepRack(r.path, state)
		if err != nil {
			t.Fatal(err)
		}
		kept := machine{}
		kept.find(filepath.Join(state, "racks"), 0)
		if len(kept.racks) != 1 || kept.racks[0].path != path || len(kept.notes) > 0 {
			t.Errorf("kept: %+v", kept)
		}
	}
}

// A page changes nothing for those who have not given the code, or who come from
// another page.
func TestChooserRefuses(t *testing.T) {
	m := machine{nics: twoNics(), racks: []rackFile{{"a.yaml", -1, &provision.Rack{Name: "a", Networks: []provision.Network{{Interface: "eno1"}}}}}}
	looks := 0
	p, address, _ := chooserServer(t, m, func(context.Context) (machine, error) { looks++; return m, nil })
	client := &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	post := func(path, session, origin string, form url.Values) (int, string, []*http.Cookie) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "POST", address+path, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if session != "" {
			req.AddCookie(&http.Cookie{Name: chooserCookie, Value: session})
		}
		if origin != "" {
			req.Header.Set("Origin", origin)
		}
		r, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(body), r.Cookies()
	}
	serve := url.Values{"rack": {"a.yaml"}, "nic": {"eth1"}, "place": {""}}
	for _, path := range []string{"/serve", "/look", "/upload"} {
		for _, session := range []string{"", "guessed"} {
			if status, _, _ := post(path, session, "", serve); status != http.StatusForbidden {
				t.Errorf("%s without the code: %d", path, status)
			}
		}
	}
	p.tries = 0
	status, _, cookies := post("/code", "", "", url.Values{"code": {p.code}})
	if status != http.StatusSeeOther || len(cookies) != 1 || !cookies[0].Secure || !cookies[0].HttpOnly || cookies[0].SameSite != http.SameSiteStrictMode {
		t.Fatalf("the right code: %d, %+v", status, cookies)
	}
	session := cookies[0].Value
	if status, _, _ := post("/serve", session, "https://elsewhere.example", serve); status != http.StatusForbidden {
		t.Errorf("from another page: %d", status)
	}
	for name, c := range map[string]struct {
		form url.Values
		said string
	}{
		"no rack file":        {url.Values{"rack": {"b.yaml"}, "nic": {"eth1"}}, "not there any more"},
		"no interface":        {url.Values{"rack": {"a.yaml"}}, "for each network"},
		"an unknown one":      {url.Values{"rack": {"a.yaml"}, "nic": {"eth7"}}, "eth7"},
		"the same for two":    {url.Values{"rack": {"a.yaml"}, "nic": {"eth1", "eth1"}}, "chosen twice"},
		"a place that left":   {url.Values{"rack": {"a.yaml"}, "nic": {"eth1"}, "place": {"/dev/sdz"}}, "/dev/sdz is not there any more"},
		"one network too few": {url.Values{"rack": {"a.yaml"}, "nic": {"eth0", "eth1"}}, "for each network"},
	} {
		if status, body, _ := post("/serve", session, "", c.form); status < 400 || !strings.Contains(body, c.said) {
			t.Errorf("%s: %d\n%s", name, status, body)
		}
	}
	if len(p.chosen) > 0 || looks > 0 {
		t.Errorf("a refused request had effects: %d chosen, %d looks", len(p.chosen), looks)
	}
	// Whoever guesses is shut out; who is in stays.
	for range chooserTries {
		post("/code", "", "", url.Values{"code": {"0"}})
	}
	if status, body, _ := post("/code", "", "", url.Values{"code": {p.code}}); status != http.StatusForbidden || !strings.Contains(body, "Too many wrong codes") {
		t.Errorf("after %d wrong codes the right one: %d", chooserTries, status)
	}
	if status, _, _ := post("/look", session, address, nil); status != http.StatusSeeOther || looks != 1 {
		t.Errorf("a new look: %d, %d looks", status, looks)
	}
	if status, body, _ := post("/serve", session, address, serve); status != http.StatusOK || !strings.Contains(body, "Chosen") {
		t.Errorf("the choice: %d\n%s", status, body)
	}
	if status, _, _ := post("/serve", session, address, serve); status != http.StatusOK || len(p.chosen) != 1 {
		t.Errorf("chosen twice: %d, %d", status, len(p.chosen))
	}
}

func TestLinkLocal(t *testing.T) {
	for mac, want := range map[string]string{"52:54:00:77:0d:00": "169.254.14.0", "52:54:00:77:fe:ff": "169.254.1.255", "52:54:00:77:ff:07": "169.254.2.7", "52:54:00:77:fd:07": "169.254.254.7"} {
		if got, err := linkLocal(mac); err != nil || got.String() != want {
			t.Errorf("%s: %v, %v; want %s", mac, got, err, want)
		}
	}
}
