package dischost

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
	"platter/vmtest/browser"
)

func TestPageHeaders(t *testing.T) {
	srv := httptest.NewServer(Page())
	defer srv.Close()
	get := func(method, path string, header ...string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(header) == 2 {
			req.Header.Set(header[0], header[1])
		}
		r, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		return r
	}
	for path, kind := range map[string]string{"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"} {
		r := get("GET", path)
		if r.StatusCode != 200 || !strings.HasPrefix(r.Header.Get("Content-Type"), kind) {
			t.Errorf("%s: %s %s", path, r.Status, r.Header.Get("Content-Type"))
		}
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"} {
			if !strings.Contains(r.Header.Get("Content-Security-Policy"), want) {
				t.Errorf("%s: the policy lacks %s", path, want)
			}
		}
		if r := get("GET", path, "If-None-Match", r.Header.Get("ETag")); r.StatusCode != 304 {
			t.Errorf("%s again: %s", path, r.Status)
		}
		if r := get("POST", path); r.StatusCode != 405 {
			t.Errorf("POST %s: %s", path, r.Status)
		}
	}
	for _, path := range []string{"/page", "/page/page.js", "/index.html", "/../page.go", "/favicon.ico"} {
		if r := get("GET", path); r.StatusCode != 404 {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
}

// rackServer serves the page and, behind the API that it reads, states and
// events that a test sets.
type rackServer struct {
	*httptest.Server
	mu      sync.Mutex
	states  []provision.State
	logs    map[string][]provision.Event
	streams map[chan string]struct{}
	down    bool
}

func newRackServer(t *testing.T, states ...provision.State) *rackServer {
	s := &rackServer{states: states, logs: map[string][]provision.Event{}, streams: map[chan string]struct{}{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/nodes", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		json.NewEncoder(w).Encode(s.states)
	})
	mux.HandleFunc("GET /v1/nodes/{name}/log", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		var after int64
		fmt.Sscan(r.URL.Query().Get("after"), &after)
		events := []provision.Event{}
		for _, e := range s.logs[r.PathValue("name")] {
			if e.ID > after {
				events = append(events, e)
			}
		}
		json.NewEncoder(w).Encode(events)
	})
	mux.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) {
		out := make(chan string, 100)
		s.mu.Lock()
		s.streams[out] = struct{}{}
		for _, st := range s.states {
			out <- sse("state", 0, st)
		}
		s.mu.Unlock()
		w.Header().Set("Content-Type", "text/event-stream")
		for {
			select {
			case m, ok := <-out:
				if !ok {
					return
				}
				io.WriteString(w, m)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	mux.Handle("GET /", Page())
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		down := s.down
		s.mu.Unlock()
		if down {
			panic(http.ErrAbortHandler) // the connection breaks off
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		s.setDown(true)
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func sse(event string, id int64, v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	m := fmt.Sprintf("id: %d\n", id)
	if event != "" {
		m += "event: " + event + "\n"
	}
	return m + "data: " + string(b) + "\n\n"
}

func (s *rackServer) send(m string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for out := range s.streams {
		out <- m
	}
}

// set makes st the state of its node and tells the pages.
func (s *rackServer) set(st provision.State) {
	s.mu.Lock()
	found := false
	for i := range s.states {
		if s.states[i].Name == st.Name {
			s.states[i], found = st, true
		}
	}
	if !found {
		s.states = append(s.states, st)
	}
	s.mu.Unlock()
	s.send(sse("state", 0, st))
}

// setDown makes the server drop its streams and answer nobody, or answer again.
func (s *rackServer) setDown(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
	if down {
		for out := range s.streams {
			close(out)
		}
		clear(s.streams)
	}
}

// openBrowser opens url in a new headless Chromium.
func openBrowser(t *testing.T, url string, width, height int, scheme string) *browser.Browser {
	t.Helper()
	return browser.Open(t, url, browser.Options{Width: width, Height: height, Scheme: scheme})
}

// screenshot writes a picture to the folder PAGE_SCREENSHOTS, if that is set,
// for people to look at.
func screenshot(b *browser.Browser, name string) {
	if dir := os.Getenv("PAGE_SCREENSHOTS"); dir != "" {
		b.Screenshot(filepath.Join(dir, name+".png"))
	}
}

// rackStates is a rack in which everything happens at once.
func rackStates(now time.Time) []provision.State {
	return []provision.State{
		{Name: "n1", Slot: "rack 4, unit 12", MAC: "52:54:00:12:34:01", Address: "10.20.0.11", Known: true, Stage: provision.StageReady, Generation: 1, Installed: 1,
			BootedAt: now.Add(-10 * time.Minute), InstalledAt: now.Add(-8 * time.Minute), ReadyAt: now.Add(-400 * time.Second), LastLog: "a message went from n1 to n2 in 9 ms",
			Facts: map[string]string{"kernel": "6.12.117", "write_ms": "31250", "disk": "/dev/nvme0n1 SAMSUNG MZQL 3.84 TB"}, LastSeen: now},
		{Name: "n2", Slot: "rack 4, unit 13", MAC: "52:54:00:12:34:02", Address: "10.20.0.12", Known: true, Stage: provision.StageInstalling, Generation: 1, GrantOpen: true,
			Phase: "write image", PhaseN: 4, PhaseOf: 9, Done: 300 << 20, Total: 1000 << 20, PhaseSince: now.Add(-10 * time.Second), BootedAt: now.Add(-75 * time.Second),
			LastLog: "wrote part root, frame 75 of 250", LastSeen: now},
		{Name: "n3", Slot: "rack 4, unit 14", MAC: "52:54:00:12:34:03", Address: "10.20.0.13", Known: true, Stage: provision.StageFailed, Generation: 1,
			BootedAt: now.Add(-5 * time.Minute), LastSeen: now, LastLog: "two disks match",
			Failure: &provision.Failure{Code: "disk-ambiguous", Message: "two disks match the rule of n3: /dev/sda (serial S1) and /dev/sdb (serial S2)",
				Next: "Give the serial of the right disk in the rack file, then run 'platter node reinstall n3' on the disc host."}},
		{Name: "n4", Slot: "rack 4, unit 15", MAC: "52:54:00:12:34:04", Address: "10.20.0.14", Known: true, Stage: provision.StageJoining, Generation: 2, Installed: 2,
			BootedAt: now.Add(-4 * time.Minute), InstalledAt: now.Add(-2 * time.Minute), LastLog: "ejabberd starts", LastSeen: now.Add(-90 * time.Second)},
		{Name: "n5", Slot: "rack 4, unit 16", Address: "10.20.0.15", Known: true, Stage: provision.StageOff, Generation: 1, GrantOpen: true},
		{Name: "52:54:00:99:99:99", MAC: "52:54:00:99:99:99", Address: "10.20.0.201", Stage: provision.StageUnknown, LastSeen: now,
			LastLog: "inventory: 2 disks, 64 GiB of memory"},
	}
}

func TestPageInBrowser(t *testing.T) {
	now := time.Now()
	states := rackStates(now)
	srv := newRackServer(t, states...)
	srv.logs["n2"] = []provision.Event{
		{ID: 1, Time: now, Kind: provision.EventGrant, Node: "n2", Generation: 1, Detail: "the rack file approves it"},
		{ID: 2, Time: now, Kind: provision.EventBoot, Node: "n2", MAC: "52:54:00:12:34:02", Action: provision.ActionInstall},
		{ID: 3, Time: now, Kind: provision.EventReport, Node: "n2", Generation: 1, Report: &provision.Report{Log: "the disk is /dev/vda"}},
	}
	b := openBrowser(t, srv.URL, 1600, 1000, "dark")
	b.Await(`document.querySelectorAll('#nodes > .node').length === 5 && !document.querySelector('#strangers').hidden`)
	screenshot(b, "dark")

	// What a person reads.
	for selector, want := range map[string][]string{
		"#summary":            {"1 of 5 ready"},
		"#counts":             {"1 failed", "1 installing", "1 joining", "1 off", "1 unknown"},
		`[data-node="n1"]`:    {"rack 4, unit 12", "n1", "10.20.0.11", "ready", "installed", "2:00", "3:20", "a message went from n1 to n2"},
		`[data-node="n2"]`:    {"installing", "write image 4 of 9", "30 %", "300 MiB of", "MiB/s", "left", "wrote part root"},
		`[data-node="n3"]`:    {"failed", "/dev/sda (serial S1) and /dev/sdb", "Give the serial of the right disk in the rack file, then run 'platter node reinstall n3'", "disk-ambiguous"},
		`[data-node="n4"]`:    {"joining", "silent\n1:"},
		`[data-node="n5"]`:    {"off", "Due for install 1"},
		"#strangers .node":    {"52:54:00:99:99:99", "platter node approve 52:54:00:99:99:99 n5", "inventory: 2 disks"},
		"#strangers .command": {"platter node approve 52:54:00:99:99:99 n5"},
	} {
		got := b.Text(selector)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s does not show %q:\n%s", selector, w, got)
			}
		}
	}
	if got := b.Eval(`document.title`); got != "1 failed, 1 of 5 ready – Platter" {
		t.Errorf("title %q", got)
	}
	// 300 MiB in 10 s, and however long the browser took to start.
	if got := b.Text(`[data-node="n2"] .rate`); strings.Contains(got, " 0 B/s") || !strings.Contains(got, "300 MiB of 1.0 GiB") {
		t.Errorf("rate %q", got)
	}

	// A state comes in: the page shows it without being asked.
	n2 := states[1]
	n2.Done = 650 << 20
	srv.set(n2)
	b.Await(`document.querySelector('[data-node="n2"] .percent').textContent === '65 %' && document.querySelector('[data-node="n2"] progress').value === 650 * 1048576`)
	n2.Stage, n2.Phase, n2.Total, n2.Done, n2.InstalledAt = provision.StageInstalled, "", 0, 0, n2.BootedAt.Add(100*time.Second)
	n2.LastLog = `<img src=x onerror="document.title='pwned'"><script>document.title='pwned'</script> ${1}`
	srv.set(n2)
	b.Await(`document.querySelector('[data-node="n2"]').dataset.stage === 'installed'`)
	if got := b.Text(`[data-node="n2"]`); !strings.Contains(got, "1:40") || !strings.Contains(got, "<img src=x onerror=") || strings.Contains(got, "%") {
		t.Errorf("after the install:\n%s", got)
	}
	if got := b.Eval(`document.querySelectorAll('.node img, .node script').length`); got != 0.0 {
		t.Error("text of a node became markup")
	}
	if got := b.Text("#announce"); got != "n2: installed" {
		t.Errorf("announced %q", got)
	}

	// The log, by keyboard alone.
	b.Eval(`document.querySelector('[data-node="n2"] .name').focus()`)
	b.Press("Enter", 13)
	b.Await(`document.querySelector('#log').open && document.querySelector('#log-lines').innerText.includes('the disk is /dev/vda')`)
	srv.send(sse("", 4, provision.Event{ID: 4, Time: now, Kind: provision.EventReport, Node: "n2", Generation: 1, Report: &provision.Report{Log: "the ${last} line <b>of</b> all"}}))
	srv.send(sse("", 5, provision.Event{ID: 5, Time: now, Kind: provision.EventReport, Node: "n1", Generation: 1, Report: &provision.Report{Log: "of another node"}}))
	srv.send(sse("", 6, provision.Event{ID: 6, Time: now, Kind: provision.EventReport, Node: "n2", Generation: 1,
		Report: &provision.Report{Failure: &provision.Failure{Code: "c", Message: "it broke", Next: "Mend it."}}}))
	b.Await(`document.querySelector('#log-lines').innerText.includes('Mend it.')`)
	screenshot(b, "log")
	if got := b.Text("#log-lines"); !strings.Contains(got, "Asked to boot") || !strings.Contains(got, "the ${last} line <b>of</b> all") || strings.Contains(got, "of another node") ||
		strings.Count(got, "the disk is") != 1 {
		t.Errorf("log:\n%s", got)
	}
	b.Press("Escape", 27)
	b.Await(`!document.querySelector('#log').open`)
	if got := b.Eval(`document.activeElement.closest('.node')?.dataset.node`); got != "n2" {
		t.Errorf("after the log the focus is on %v", got)
	}

	// A machine is approved: nobody is left to give it to, and it leaves the list of strangers.
	n5 := states[4]
	n5.MAC = states[5].MAC
	srv.set(n5)
	b.Await(`document.querySelector('#strangers .command').textContent === 'platter node approve 52:54:00:99:99:99 NAME'`)
	srv.mu.Lock()
	srv.states = srv.states[:5]
	srv.mu.Unlock()
	srv.send(sse("state", 0, provision.State{Name: states[5].Name}))
	b.Await(`document.querySelector('#strangers').hidden`)

	// The disc host goes away, things change meanwhile, and it comes back.
	srv.setDown(true)
	b.Await(`!document.querySelector('#lost').hidden`)
	if got := b.Text("#lost"); !strings.Contains(got, "Disc host not reachable") || !strings.Contains(got, "for 0:0") {
		t.Errorf("banner %q", got)
	}
	screenshot(b, "lost")
	srv.mu.Lock()
	srv.states = srv.states[:4]
	srv.states[1].Stage, srv.states[1].ReadyAt = provision.StageReady, n2.BootedAt.Add(200*time.Second)
	srv.mu.Unlock()
	srv.setDown(false)
	b.Await(`document.querySelector('#lost').hidden && document.querySelector('[data-node="n2"]').dataset.stage === 'ready'`)
	if got := b.Eval(`document.querySelectorAll('.node').length`); got != 4.0 {
		t.Errorf("%v nodes after the return, want 4", got)
	}
	if got := b.Text("#summary"); got != "2 of 4 ready" {
		t.Errorf("summary %q", got)
	}
	for _, c := range b.Console() {
		t.Errorf("the browser complains: %s", c)
	}

	// A whole rack.
	for i := range 20 {
		st := rackStates(now)[i%4]
		st.Name, st.Slot = fmt.Sprintf("node-%02d", i), fmt.Sprintf("unit %d", i)
		srv.set(st)
	}
	b.Await(`document.querySelectorAll('.node').length === 24`)
	screenshot(b, "many")
}

// TestPageOnPhone: in a narrow window nothing is cut off, in light colours
// too, and text stands out from its ground.
func TestPageOnPhone(t *testing.T) {
	srv := newRackServer(t, rackStates(time.Now())...)
	b := openBrowser(t, srv.URL, 390, 844, "light")
	b.Await(`document.querySelectorAll('#nodes > .node').length === 5`)
	screenshot(b, "phone")
	b.Eval(`document.querySelector('[data-node="n1"] .name').click()`)
	b.Await(`document.querySelector('#log-facts').innerText.includes('31.3 s')`)
	if got := b.Text("#log-facts"); !strings.Contains(got, "52:54:00:12:34:01") || !strings.Contains(got, "SAMSUNG") {
		t.Errorf("facts:\n%s", got)
	}
	screenshot(b, "phone-log")
	b.Eval(`document.querySelector('#log-close').click()`)
	if got := b.Eval(`document.documentElement.scrollWidth`); got != 390.0 {
		t.Errorf("the page is %v pixels wide on a phone of 390", got)
	}
	for _, scheme := range []string{"light", "dark"} {
		b.Call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
		low := b.Eval(`(() => {
			const rgb = c => c.match(/[\d.]+/g).map(Number);
			const lum = c => { const [r, g, b] = rgb(c).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
			const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (rgb(c).length < 4 || rgb(c)[3] > 0) return c; } };
			const out = [];
			for (const e of document.querySelectorAll('body *')) {
				if (!e.checkVisibility() || e.childElementCount || !e.textContent.trim()) continue;
				const [hi, lo] = [lum(getComputedStyle(e).color), lum(ground(e))].sort((a, b) => b - a), ratio = (hi + .05) / (lo + .05);
				if (ratio < 4.5) out.push(e.className + ' ' + e.textContent.slice(0, 30) + ' ' + ratio.toFixed(1));
			}
			return out.join('\n');
		})()`)
		if low != "" { // WCAG 2.2, 1.4.3
			t.Errorf("contrast below 4.5 in %s:\n%v", scheme, low)
		}
	}
	for _, c := range b.Console() {
		t.Errorf("the browser complains: %s", c)
	}
}
