// Package browser lets tests look at pages in a real browser: a headless
// Chromium, spoken to over its debugging pipe.
package browser

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Options of a browser.
type Options struct {
	// Command goes before the browser's own, for example one that enters a
	// network namespace. It has to keep its descriptors 3 and 4.
	Command []string
	// Hosts are the only ones that the browser finds; without any, 127.0.0.1.
	Hosts []string
	// CA is the file of a certificate in PEM that the browser trusts.
	CA            string
	Width, Height int    // of the page, in pixels
	Scheme        string // dark or light
}

// Browser is one page in a browser of its own. Its methods end the test when the
// browser or the page does not do what they want.
type Browser struct {
	t       testing.TB
	w       io.Writer
	session string
	id      int
	answers chan message
	loaded  chan struct{} // has one when a document was loaded

	mu       sync.Mutex
	console  []string
	requests []string
}

type message struct {
	ID     int
	Method string
	Params json.RawMessage
	Result json.RawMessage
	Error  *struct{ Message string }
}

// patience is how long the browser may take for anything.
const patience = 3 * time.Minute

// Open opens address in a new browser, which ends with the test.
func Open(t testing.TB, address string, o Options) *Browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("pages are tested in a real browser: install Debian's package chromium: %v", err)
	}
	home := t.TempDir()
	if o.CA != "" {
		trust(t, home, o.CA)
	}
	if len(o.Hosts) == 0 {
		o.Hosts = []string{"127.0.0.1"}
	}
	toR, toW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fromR, fromW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(o.Command), path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE "+strings.Join(o.Hosts, " , EXCLUDE "),
		"--remote-debugging-pipe", "--user-data-dir="+filepath.Join(home, "profile"))
	cmd := exec.Command(args[0], args[1:]...)
	cmd.ExtraFiles = []*os.File{toR, fromW} // descriptors 3 and 4
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "HOME="+home)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	toR.Close()
	fromW.Close()
	b := &Browser{t: t, w: toW, answers: make(chan message), loaded: make(chan struct{}, 1)}
	go b.read(fromR)
	t.Cleanup(func() {
		fmt.Fprintf(b.w, `{"id":999999,"method":"Browser.close"}`+"\x00")
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		go func() {
			for range b.answers { // what nobody waits for any more
			}
		}()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			cmd.Process.Kill()
			<-ended
		}
		toW.Close()
		fromR.Close()
	})
	var target struct {
		TargetID string `json:"targetId"`
	}
	b.Call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var session struct {
		SessionID string `json:"sessionId"`
	}
	b.Call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &session)
	b.session = session.SessionID
	for _, domain := range []string{"Runtime", "Log", "Page", "Network", "DOM"} {
		b.Call(domain+".enable", map[string]any{}, nil)
	}
	b.Call("Emulation.setDeviceMetricsOverride", map[string]any{"width": o.Width, "height": o.Height, "deviceScaleFactor": 1, "mobile": o.Width < 600}, nil)
	b.Call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": o.Scheme}}}, nil)
	b.Open(address)
	return b
}

// trust makes the certificate a trusted issuer for the user whose folder home is.
func trust(t testing.TB, home, ca string) {
	t.Helper()
	db := filepath.Join(home, ".pki/nssdb")
	if err := os.MkdirAll(db, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-N", "--empty-password"}, {"-A", "-n", "site", "-t", "C,,", "-i", ca}} {
		if out, err := exec.Command("certutil", append([]string{"-d", "sql:" + db}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("certutil, which makes the browser trust a CA (Debian's package libnss3-tools): %v\n%s", err, out)
		}
	}
}

// read sorts what the browser says, until it ends.
func (b *Browser) read(from io.Reader) {
	defer close(b.answers)
	for r := bufio.NewReader(from); ; {
		raw, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m message
		if err := json.Unmarshal(raw[:len(raw)-1], &m); err != nil {
			b.t.Errorf("the browser says %q: %v", raw, err)
			return
		}
		var p struct {
			Request struct{ URL string }
			URL     string
			Entry   struct{ Source string }
		}
		json.Unmarshal(m.Params, &p)
		b.mu.Lock()
		switch m.Method {
		case "":
			b.mu.Unlock()
			b.answers <- m
			continue
		case "Network.requestWillBeSent":
			b.requests = append(b.requests, p.Request.URL)
		case "Network.webSocketCreated":
			b.requests = append(b.requests, p.URL)
		case "Page.loadEventFired":
			select {
			case b.loaded <- struct{}{}:
			default:
			}
		case "Runtime.exceptionThrown":
			b.console = append(b.console, string(m.Params))
		case "Log.entryAdded":
			if p.Entry.Source == "security" || strings.Contains(string(m.Params), "ecurity") {
				b.console = append(b.console, string(m.Params))
			}
		}
		b.mu.Unlock()
	}
}

// Open goes to another address.
func (b *Browser) Open(address string) {
	b.t.Helper()
	var r struct {
		ErrorText string `json:"errorText"`
	}
	b.Call("Page.navigate", map[string]any{"url": address}, &r)
	if r.ErrorText != "" {
		b.t.Fatalf("%s: %s", address, r.ErrorText)
	}
}

// Call sends one command of the DevTools protocol and reads its result into out.
func (b *Browser) Call(method string, params any, out any) {
	b.t.Helper()
	b.id++
	command := map[string]any{"id": b.id, "method": method, "params": params}
	if b.session != "" {
		command["sessionId"] = b.session
	}
	msg, err := json.Marshal(command)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.w.Write(append(msg, 0)); err != nil {
		b.t.Fatalf("the browser is gone: %v", err)
	}
	for late := time.After(2 * patience); ; {
		select {
		case <-late:
			b.t.Fatalf("%s: the browser does not answer", method)
		case m, ok := <-b.answers:
			switch {
			case !ok:
				b.t.Fatalf("%s: the browser has ended", method)
			case m.ID != b.id: // of a call that was given up
			case m.Error != nil:
				b.t.Fatalf("%s: %s", method, m.Error.Message)
			default:
				if out != nil {
					if err := json.Unmarshal(m.Result, out); err != nil {
						b.t.Fatal(err)
					}
				}
				return
			}
		}
	}
}

// Console is what the page complained about: exceptions that nobody caught, and
// what the browser refused for security's sake.
func (b *Browser) Console() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.console)
}

// Hosts are those that the browser was to ask for anything, WebSockets
// included, each once.
func (b *Browser) Hosts() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var hosts []string
	for _, r := range b.requests {
		u, err := url.Parse(r)
		if err != nil || u.Host == "" { // data: and blob: ask nobody
			continue
		}
		if !slices.Contains(hosts, u.Host) {
			hosts = append(hosts, u.Host)
		}
	}
	slices.Sort(hosts)
	return hosts
}

// Eval returns the value of a JavaScript expression, which may be a promise.
func (b *Browser) Eval(expr string) any {
	b.t.Helper()
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails *struct {
			Text      string
			Exception struct{ Description string }
		}
	}
	b.Call("Runtime.evaluate", map[string]any{"expression": expr, "awaitPromise": true, "returnByValue": true, "userGesture": true}, &r)
	if r.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s %s", expr, r.ExceptionDetails.Text, r.ExceptionDetails.Exception.Description)
	}
	return r.Result.Value
}

// Await waits until the page makes a condition true.
func (b *Browser) Await(cond string) {
	b.t.Helper()
	ok := b.Eval(fmt.Sprintf(`new Promise(resolve => {
		const check = () => { try { return %s } catch { return false } };
		const end = truth => { seen.disconnect(); clearInterval(again); resolve(truth); };
		const look = () => { if (check()) end(true); };
		const seen = new MutationObserver(look);
		const again = setInterval(look, 200); // not all that changes is in the document
		seen.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
		setTimeout(() => end(check()), %d);
		look();
	})`, cond, patience.Milliseconds()))
	if ok != true {
		b.t.Fatalf("never true: %s\nthe page shows:\n%v\n%s", cond, b.Eval("document.body.innerText"), strings.Join(b.Console(), "\n"))
	}
}

// Follow clicks on what leads to another document, and waits until that is there.
func (b *Browser) Follow(selector string) {
	b.t.Helper()
	b.Await("performance.getEntriesByType('navigation')[0].loadEventEnd > 0") // of this one
	select {
	case <-b.loaded:
	default:
	}
	b.Eval(fmt.Sprintf("document.querySelector(%q).click()", selector))
	select {
	case <-b.loaded:
	case <-time.After(patience):
		b.t.Fatalf("%s leads nowhere", selector)
	}
}

// Text is what a user reads in the element.
func (b *Browser) Text(selector string) string {
	b.t.Helper()
	s, _ := b.Eval(fmt.Sprintf("document.querySelector(%q).innerText", selector)).(string)
	return s
}

// Type enters text where the focus is.
func (b *Browser) Type(text string) {
	b.t.Helper()
	b.Call("Input.insertText", map[string]any{"text": text}, nil)
}

// Press sends a key to what has the focus.
func (b *Browser) Press(key string, code int) {
	b.t.Helper()
	for _, kind := range []string{"keyDown", "keyUp"} {
		p := map[string]any{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
		if key == "Enter" && kind == "keyDown" {
			p["text"] = "\r"
		}
		b.Call("Input.dispatchKeyEvent", p, nil)
	}
}

// Choose puts files into the page's field for files.
func (b *Browser) Choose(selector string, files ...string) {
	b.t.Helper()
	var r struct{ Result struct{ ObjectID string } }
	b.Call("Runtime.evaluate", map[string]any{"expression": fmt.Sprintf("document.querySelector(%q)", selector)}, &r)
	if r.Result.ObjectID == "" {
		b.t.Fatalf("the page has no %s", selector)
	}
	b.Call("DOM.setFileInputFiles", map[string]any{"objectId": r.Result.ObjectID, "files": files}, nil)
}

// Screenshot writes a picture of the page, as PNG, for people to look at.
func (b *Browser) Screenshot(file string) {
	b.t.Helper()
	var r struct{ Data string }
	b.Call("Page.captureScreenshot", map[string]any{"format": "png"}, &r)
	png, err := base64.StdEncoding.DecodeString(r.Data)
	if err == nil {
		err = os.WriteFile(file, png, 0o644)
	}
	if err != nil {
		b.t.Error(err)
	}
}
