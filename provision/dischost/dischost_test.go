package dischost

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/images"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/site"
	"platter/provision/stack/probe"
	"platter/provision/store"
	"platter/pxe"
)

// TestMain fails when a goroutine of ours outlives the tests.
func TestMain(m *testing.M) {
	code := m.Run()
	deadline := time.Now().Add(10 * time.Second)
	for code == 0 {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		left := ""
		for _, g := range strings.Split(string(stacks), "\n\n")[1:] {
			if strings.Contains(g, "platter/") || strings.Contains(g, "net/http") {
				left += g + "\n\n"
			}
		}
		if left == "" {
			break
		}
		if time.Now().After(deadline) {
			fmt.Fprintf(os.Stderr, "goroutines left:\n%s", left)
			code = 1
		}
		time.Sleep(20 * time.Millisecond)
	}
	os.Exit(code)
}

const mac1, mac2, mac3, mac9 = provision.MAC("52:54:00:00:00:01"), provision.MAC("52:54:00:00:00:02"), provision.MAC("52:54:00:00:00:03"), provision.MAC("52:54:00:00:00:09")

// fakeImages is an image store that a test can empty.
type fakeImages struct {
	mu    sync.Mutex
	err   error
	image provision.Image
	list  []provision.StoredRelease
}

func (f *fakeImages) set(err error) { f.mu.Lock(); defer f.mu.Unlock(); f.err = err }

func (f *fakeImages) Image(name string) (provision.ImageRef, *provision.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	im := f.image
	im.Name = name
	return provision.ImageRef{Name: name, Digest: strings.Repeat("ab", 32)}, &im, f.err
}

func (f *fakeImages) Boot(arch string) (images.BootSet, error) {
	if arch != "amd64" {
		return images.BootSet{}, fmt.Errorf("there is no initramfs for %s", arch)
	}
	return images.BootSet{Kernel: provision.Object{Hash: strings.Repeat("01", 32)}, Initramfs: provision.Object{Hash: strings.Repeat("02", 32)},
		Local: provision.Object{Hash: strings.Repeat("03", 32)}}, nil
}

func (f *fakeImages) Releases() ([]provision.StoredRelease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list), f.err
}

// lab is a disc host that can be stopped and started on the same state: real
// sockets, TLS and journal; images and the probe are the test's.
type lab struct {
	t      *testing.T
	dir    string
	rack   *provision.Rack
	images *fakeImages
	probe  func(context.Context, probe.Options) (time.Duration, error)             // of kind Message
	others func(context.Context, probe.Kind, probe.Options) (time.Duration, error) // of other kinds; nil: all work
	clock  func() time.Time

	switching, proving time.Duration // of the host; 0: its defaults

	host *Host
	url  string // of the node API; stays the same over restarts
	addr string
	page string
	op   *client.Operator
	stop func()
}

// newLab starts a disc host; what is set with "with" is so before it runs.
func newLab(t *testing.T, nodes int, with ...func(*lab)) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir(), images: &fakeImages{}, clock: time.Now, addr: "127.0.0.1:0",
		probe: func(context.Context, probe.Options) (time.Duration, error) {
			return 12 * time.Millisecond, nil
		}}
	l.rack = &provision.Rack{
		Name: "lab", Image: "debian-13", Stack: provision.StackSpec{Domain: "im.example.org"},
		Networks: []provision.Network{{Subnet: netip.MustParsePrefix("10.9.0.0/24"), DiscHost: netip.MustParseAddr("10.9.0.1")}},
	}
	for i := range nodes {
		l.rack.Nodes = append(l.rack.Nodes, provision.Node{
			Name: fmt.Sprintf("node%d", i+1), MAC: provision.MAC(fmt.Sprintf("52:54:00:00:00:%02x", i+1)),
			Address: netip.AddrFrom4([4]byte{10, 9, 0, byte(11 + i)})})
	}
	for _, set := range with {
		set(l)
	}
	l.start()
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *lab) check(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) start() {
	l.t.Helper()
	s, err := site.Open(l.dir)
	l.check(err)
	st, err := store.Open(filepath.Join(l.dir, "journal.db"), l.clock)
	l.check(err)
	l.check(st.SetRack(context.Background(), l.rack))
	l.host = New(Config{Rack: l.rack, Store: st, Site: s, Images: l.images, Clock: l.clock,
		Probe: func(ctx context.Context, kind probe.Kind, o probe.Options) (time.Duration, error) {
			switch {
			case kind == probe.Message:
				return l.probe(ctx, o)
			case l.others != nil:
				return l.others(ctx, kind, o)
			}
			return 5 * time.Millisecond, nil
		},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if l.switching != 0 {
		l.host.switching = l.switching
	}
	if l.proving != 0 {
		l.host.proving = l.proving
	}
	cfg, err := s.ServerTLS([]netip.Addr{netip.MustParseAddr("127.0.0.1")})
	l.check(err)
	nodes, err := net.Listen("tcp", l.addr)
	l.check(err)
	l.addr = nodes.Addr().String()
	l.url = "https://" + l.addr
	socket := filepath.Join(l.dir, "op.sock")
	operators, err := net.Listen("unix", socket)
	l.check(err)
	page, err := net.Listen("tcp", "127.0.0.1:0")
	l.check(err)
	l.page = "http://" + page.Addr().String()
	l.op = client.NewOperator(socket)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := l.host.Run(ctx); !errors.Is(err, context.Canceled) {
			l.t.Errorf("Run: %v", err)
		}
	})
	var servers []*http.Server
	for _, s := range []struct {
		l net.Listener
		h http.Handler
	}{{tls.NewListener(nodes, cfg), l.host.NodeAPI()}, {operators, l.host.OperatorAPI()}, {page, l.host.ReadOnly()}} {
		srv := &http.Server{Handler: s.h, ErrorLog: log.New(io.Discard, "", 0), BaseContext: func(net.Listener) context.Context { return ctx }}
		servers = append(servers, srv)
		running.Go(func() { srv.Serve(s.l) })
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		for _, s := range servers {
			s.Close()
		}
		running.Wait()
		l.op.Close()
		if err := st.Close(); err != nil {
			l.t.Error(err)
		}
	})
}

func (l *lab) restart() { l.t.Helper(); l.stop(); l.start() }

// boot asks for a boot script as the machine with that MAC at that address.
func (l *lab) boot(mac provision.MAC, addr string) string {
	return l.host.BootScript(l.t.Context(), pxe.BootRequest{MAC: mac, Addr: netip.MustParseAddr(addr),
		DiscHost: netip.MustParseAddr("10.9.0.1"), Platform: "efi", Arch: "x86_64", Again: "http://10.9.0.1/boot.ipxe"})
}

var argument = regexp.MustCompile(`platter\.([a-z]+)=(\S+)`)

func args(script string) map[string]string {
	out := map[string]string{}
	for _, m := range argument.FindAllStringSubmatch(script, -1) {
		out[m[1]] = m[2]
	}
	return out
}

// enrol boots and enrols one of the rack's nodes as its initramfs would.
func (l *lab) enrol(node int) *client.Node {
	l.t.Helper()
	n := l.rack.Nodes[node-1]
	script := l.boot(n.MAC, n.Address.String())
	a := args(script)
	c, plan, err := client.Enrol(l.t.Context(), l.url, a["pin"], a["token"])
	if err != nil {
		l.t.Fatalf("%v\n%s", err, script)
	}
	l.t.Cleanup(c.Close)
	if plan == nil || plan.Node != n.Name || c.Identity().Node != n.Name {
		l.t.Fatalf("plan %+v of %+v", plan, c.Identity())
	}
	return c
}

func (l *lab) report(c *client.Node, reports ...provision.Report) {
	l.t.Helper()
	l.check(c.Report(l.t.Context(), reports))
}

// await waits until the node's state is as wanted, told by the event stream.
func (l *lab) await(node string, want func(provision.State) bool) provision.State {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 30*time.Second)
	defer cancel()
	var last provision.State
	for u, err := range l.op.Events(ctx, -1) {
		if err == nil && u.State != nil && u.State.Name == node {
			if last = *u.State; want(last) {
				return last
			}
		}
	}
	l.t.Fatalf("%s never came there: %+v", node, last)
	return last
}

func is(stage provision.Stage) func(provision.State) bool {
	return func(s provision.State) bool { return s.Stage == stage }
}

func (l *lab) node(name string) provision.State {
	l.t.Helper()
	s, err := l.op.Node(l.t.Context(), name)
	l.check(err)
	return s
}

func (l *lab) journal(node string) []provision.Event {
	l.t.Helper()
	events, err := l.op.Log(l.t.Context(), node, 0)
	l.check(err)
	return events
}

func codeOf(err error) string {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return fmt.Sprint(err)
}

// The whole way of two nodes, with the disc host killed in between.
func TestTwoNodes(t *testing.T) {
	l := newLab(t, 2)
	var mu sync.Mutex
	var sent []string
	l.probe = func(_ context.Context, o probe.Options) (time.Duration, error) {
		mu.Lock()
		defer mu.Unlock()
		if o.Domain != "im.example.org" || !strings.Contains(o.CA, "CERTIFICATE") || o.From.Account.Password == "" {
			t.Errorf("%+v", o)
		}
		sent = append(sent, fmt.Sprintf("%s@%s>%s@%s", o.From.Account.User, o.From.Addr, o.To.Account.User, o.To.Addr))
		return 12 * time.Millisecond, nil
	}
	ctx := t.Context()
	script := l.boot(mac1, "10.9.0.11")
	a := args(script)
	if a["life"] != "installer" || a["url"] != "https://10.9.0.1:8443" || a["mac"] != string(mac1) || a["ip"] != "10.9.0.11/24" || a["pin"] != l.host.Site.Pin() || len(a["token"]) != 64 {
		t.Fatalf("%v\n%s", a, script)
	}
	for _, want := range []string{"http://10.9.0.1/objects/" + strings.Repeat("01", 32), "http://10.9.0.1/objects/" + strings.Repeat("02", 32), "console=ttyS0,115200", "quiet", "panic=10"} {
		if !strings.Contains(script, want) {
			t.Fatalf("%s is not in\n%s", want, script)
		}
	}
	if s := l.node("node1"); s.Stage != provision.StageBooting || s.BootedAt.IsZero() {
		t.Fatalf("%+v", s)
	}
	n1, n2 := l.enrol(1), l.enrol(2)
	p1, err := n1.Plan(ctx)
	if err != nil || p1.Node != "node1" || p1.Generation != 1 || p1.Net.Address.String() != "10.9.0.11/24" || p1.Image.Name != "debian-13" {
		t.Fatalf("%+v %v", p1, err)
	}
	rep := client.NewReporter(nil)
	rep.Attach(n1)
	defer rep.Close()
	rep.Stage(provision.StageInstalling)
	rep.Phase("write", 4, 7)
	rep.Progress(5, 10)
	l.check(rep.Flush(ctx))
	if s := l.node("node1"); s.Stage != provision.StageInstalling || s.Phase != "write" || s.Done != 5 {
		t.Fatalf("%+v", s)
	}

	// Killed in the middle: the nodes keep their identities, what they say
	// meanwhile arrives once.
	l.stop()
	rep.Logf("said while the disc host was away")
	rep.Progress(8, 10)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	if err := rep.Flush(short); err == nil {
		t.Fatal("flushed to nobody")
	}
	cancel()
	l.start()
	l.check(rep.Flush(ctx))
	s := l.node("node1")
	if s.Stage != provision.StageInstalling || s.Phase != "write" || s.Done != 8 || s.LastLog != "said while the disc host was away" || !s.GrantOpen {
		t.Fatalf("%+v", s)
	}
	said := 0
	for _, e := range l.journal("node1") {
		if e.Report != nil && e.Report.Log != "" {
			said++
		}
	}
	if said != 1 {
		t.Fatalf("the line is %d times in the journal", said)
	}

	for _, n := range []*client.Node{n1, n2} {
		l.report(n, provision.Report{Stage: provision.StageInstalled})
	}
	if s := l.node("node1"); s.GrantOpen || s.Installed != 1 {
		t.Fatalf("%+v", s)
	}
	if script := l.boot(mac1, "10.9.0.11"); args(script)["token"] != "" || !strings.Contains(script, "exit 1") {
		t.Fatalf("an installed node was given\n%s", script)
	}
	// The agent speaks with what the installer left it.
	raw, err := json.Marshal(n1.Identity())
	l.check(err)
	var id client.Identity
	l.check(json.Unmarshal(raw, &id))
	agent, err := client.NewNode(id)
	l.check(err)
	defer agent.Close()
	sec1, err := agent.Secrets(ctx)
	l.check(err)
	sec2, err := n2.Secrets(ctx)
	l.check(err)
	if sec1.Cookie == "" || sec1.Cookie != sec2.Cookie || sec1.Cert == sec2.Cert {
		t.Fatal("secrets")
	}
	if j, err := agent.Join(ctx); err != nil || j.Role != provision.RoleForm {
		t.Fatal(j, err)
	}
	if j, err := n2.Join(ctx); err != nil || j.Role != provision.RoleWait {
		t.Fatal(j, err)
	}
	l.report(agent, provision.Report{Stage: provision.StageProbing})
	l.await("node1", func(s provision.State) bool { return strings.Contains(s.LastLog, "waits for a second node") })
	if j, err := n2.Join(ctx); err != nil || j.Role != provision.RoleJoin || j.Target != "node1" {
		t.Fatal(j, err)
	}
	l.report(n2, provision.Report{Stage: provision.StageProbing})
	for _, name := range []string{"node1", "node2"} {
		if s := l.await(name, is(provision.StageReady)); s.ReadyAt.IsZero() {
			t.Fatalf("%+v", s)
		}
		events := l.journal(name)
		if e := events[len(events)-1]; e.Kind != provision.EventProbe || e.Detail != "message from probe-a on node1 reached probe-b on node2 in 12 ms; message from probe-a on node2 reached probe-b on node1 in 12 ms" {
			t.Fatalf("%+v", e)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if fmt.Sprint(sent) != "[probe-a@10.9.0.11:5222>probe-b@10.9.0.12:5222 probe-a@10.9.0.12:5222>probe-b@10.9.0.11:5222]" {
		t.Fatal(sent)
	}
}

// Who may enrol, and how often.
func TestEnrolment(t *testing.T) {
	l := newLab(t, 1)
	ctx := t.Context()
	now := time.Now()
	var mu sync.Mutex
	l.stop()
	l.clock = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	l.start()
	try := func(token string) error {
		n, _, err := client.Enrol(ctx, l.url, l.host.Site.Pin(), token)
		if err == nil {
			n.Close()
		}
		return err
	}
	token := func() string { return args(l.boot(mac1, "10.9.0.11"))["token"] }
	old := token()
	first := token()
	if code := codeOf(try(old)); code != client.CodeTokenUnknown {
		t.Fatal(code)
	}
	l.check(try(first))
	err := try(first)
	var e *client.Error
	if !errors.As(err, &e) || e.Code != client.CodeTokenUsed || e.Status != http.StatusForbidden || client.Retryable(err) {
		t.Fatal(err)
	}
	late := token()
	mu.Lock()
	now = now.Add(tokenLife)
	mu.Unlock()
	if code := codeOf(try(late)); code != client.CodeTokenExpired {
		t.Fatal(code)
	}
	void := token()
	_, err = l.op.Withdraw(ctx, "node1")
	l.check(err)
	if code := codeOf(try(void)); code != client.CodeTokenUnknown {
		t.Fatal(code)
	}
	l.restart()
	if code := codeOf(try(first)); code != client.CodeTokenUsed {
		t.Fatal(code)
	}
	if script := l.boot(mac1, "10.9.0.11"); args(script)["token"] != "" || !strings.Contains(script, "no open grant") {
		t.Fatalf("after the withdrawal:\n%s", script)
	}

	// Raw requests: malformed ones, and whoever has no certificate.
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer hc.CloseIdleConnections()
	for _, c := range []struct {
		method, path, body string
		want               int
		code               string
	}{
		{"POST", client.PathEnrol, `{"token":"x","csr":"y"}`, 400, client.CodeBadRequest},
		{"POST", client.PathEnrol, `not JSON`, 400, client.CodeBadRequest},
		{"POST", client.PathEnrol, `{} {}`, 400, client.CodeBadRequest},
		{"POST", client.PathEnrol, `{"token":"` + strings.Repeat("x", maxEnrol) + `"}`, 413, client.CodeTooLarge},
		{"GET", client.PathPlan, "", 401, client.CodeNoIdentity},
		{"GET", client.PathSecrets, "", 401, client.CodeNoIdentity},
		{"GET", client.PathJoin, "", 401, client.CodeNoIdentity},
		{"GET", client.PathApproval, "", 401, client.CodeNoIdentity},
		{"POST", client.PathReports, "[]", 401, client.CodeNoIdentity},
		{"GET", "/v1/nodes", "", 404, "not-found"},
		{"POST", "/v1/nodes/node1/reinstall", "", 404, "not-found"},
	} {
		req, _ := http.NewRequestWithContext(ctx, c.method, l.url+c.path, strings.NewReader(c.body))
		resp, err := hc.Do(req)
		l.check(err)
		var e client.Error
		json.NewDecoder(resp.Body).Decode(&e)
		resp.Body.Close()
		if resp.StatusCode != c.want || e.Code != c.code || e.Message == "" {
			t.Errorf("%s %s: %d %+v", c.method, c.path, resp.StatusCode, e)
		}
	}
}

// What a node has for the IM stack is a client's certificate of the same CA,
// and opens nothing here.
func TestStackCertificateIsNoIdentity(t *testing.T) {
	l := newLab(t, 1)
	n := l.enrol(1)
	sec, err := n.Secrets(t.Context())
	l.check(err)
	pair, err := tls.X509KeyPair([]byte(sec.Cert), []byte(sec.Key))
	l.check(err)
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }}}}
	defer hc.CloseIdleConnections()
	for _, path := range []string{client.PathPlan, client.PathSecrets, client.PathJoin, client.PathApproval} {
		resp, err := hc.Get(l.url + path)
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s: %s", path, resp.Status)
		} else if !strings.Contains(err.Error(), "bad certificate") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// A disc host that comes back with another stack changes nothing for a node
// that is installed: neither its boots nor its plan nor its secrets.
func TestNewerStackLeavesInstalledNodesAlone(t *testing.T) {
	l := newLab(t, 2)
	with := func(name, text string) {
		c := provision.Component{Name: name, Kind: provision.KindPackages, Secrets: []provision.Secret{{Name: name, Length: 20}},
			Files: []provision.StackFile{{Path: "/etc/" + name, Template: text}}}
		l.rack.Stack.Components = []provision.PlacedComponent{{Component: c, Members: []string{"node1"}}}
	}
	with("old", "1")
	l.restart()
	n1, n2 := l.enrol(1), l.enrol(2)
	l.report(n1, provision.Report{Stage: provision.StageInstalled})
	plan, err := n1.Plan(t.Context())
	l.check(err)
	sec, err := n1.Secrets(t.Context())
	l.check(err)
	if len(plan.Stack.Components[0].Files) != 1 || len(sec.Named["old"]) != 20 || len(sec.Named) != 1 {
		t.Fatalf("%+v, %q", plan.Stack, sec.Named)
	}
	if sec, err := n2.Secrets(t.Context()); err != nil || len(sec.Named) != 0 {
		t.Fatalf("a node without the component got %q, %v", sec.Named, err)
	}

	with("new", "2")
	l.restart()
	if s := l.node("node1"); s.GrantOpen || s.Stage != provision.StageInstalled {
		t.Fatalf("%+v", s)
	}
	if script := l.boot(l.rack.Nodes[0].MAC, "10.9.0.11"); args(script)["token"] != "" {
		t.Fatalf("an installed node was given\n%s", script)
	}
	again, err := n1.Plan(t.Context())
	if err != nil || again.Digest() != plan.Digest() {
		t.Fatalf("%+v, %v", again.Stack, err)
	}
	if s, err := n1.Secrets(t.Context()); err != nil || s.Named["old"] != sec.Named["old"] || len(s.Named) != 1 {
		t.Fatalf("%q, %v", s.Named, err)
	}
	l.report(n1, provision.Report{Stage: provision.StagePreparing})

	// Its next install brings the new one.
	_, err = l.op.Reinstall(t.Context(), "node1")
	l.check(err)
	plan, err = l.enrol(1).Plan(t.Context())
	if err != nil || plan.Stack.Components[0].Name != "new" {
		t.Fatalf("%+v, %v", plan.Stack, err)
	}
}

// A plan as large as the stack file may make it reaches its node.
func TestLargePlan(t *testing.T) {
	l := newLab(t, 1)
	text := strings.Repeat("<", provision.MaxStackText) // six bytes each
	c := provision.Component{Name: "a", Files: []provision.StackFile{{Path: "/etc/a", Template: text}}}
	l.rack.Stack.Components = []provision.PlacedComponent{{Component: c, Members: []string{"node1"}}}
	l.restart()
	if plan, err := l.enrol(1).Plan(t.Context()); err != nil || plan.Stack.Components[0].Files[0].Template != text {
		t.Fatalf("%d bytes, %v", len(plan.Stack.Components[0].Files[0].Template), err)
	}
}

// A reinstall ends the rights of the generation before, a withdrawal gives
// them back.
func TestSuperseded(t *testing.T) {
	l := newLab(t, 2)
	ctx := t.Context()
	old := l.enrol(1)
	l.report(old, provision.Report{Stage: provision.StageInstalled})
	s, err := l.op.Reinstall(ctx, "node1")
	if err != nil || s.Generation != 2 || !s.GrantOpen {
		t.Fatalf("%+v %v", s, err)
	}
	if _, err = l.op.Reinstall(ctx, "node1"); codeOf(err) != client.CodeGrantOpen {
		t.Fatal(err)
	}
	refused := func(n *client.Node) {
		t.Helper()
		_, err1 := n.Plan(ctx)
		_, err2 := n.Secrets(ctx)
		_, err3 := n.Join(ctx)
		for _, err := range []error{n.Report(ctx, []provision.Report{{Log: "x"}}), err1, err2, err3} {
			if codeOf(err) != client.CodeSuperseded {
				t.Fatal(err)
			}
		}
	}
	refused(old)
	_, err = l.op.Withdraw(ctx, "node1")
	l.check(err)
	l.report(old, provision.Report{Log: "still here"})
	if s := l.node("node1"); s.LastLog != "still here" || s.Generation != 2 {
		t.Fatalf("%+v", s)
	}
	if _, err = l.op.Withdraw(ctx, "node1"); codeOf(err) != client.CodeGrantClosed {
		t.Fatal(err)
	}
	_, err = l.op.Reinstall(ctx, "node1")
	l.check(err)
	fresh := l.enrol(1)
	if fresh.Identity().Generation != 3 {
		t.Fatalf("%+v", fresh.Identity())
	}
	p, err := fresh.Plan(ctx)
	if err != nil || p.Generation != 3 || !p.Reinstall {
		t.Fatalf("%+v %v", p, err)
	}
	l.report(fresh, provision.Report{Stage: provision.StageInstalled})
	refused(old)
	// A node that leaves the rack file has no rights either.
	l.stop()
	l.rack.Nodes = l.rack.Nodes[1:]
	l.start()
	refused(fresh)
}

// What a node says is bounded, and cannot speak to a terminal.
func TestReportsAreChecked(t *testing.T) {
	l := newLab(t, 1)
	ctx := t.Context()
	n := l.enrol(1)
	for _, s := range []provision.Stage{provision.StageReady, provision.StageOff, provision.StageBooting, provision.StageUnknown, "nonsense"} {
		if code := codeOf(n.Report(ctx, []provision.Report{{Log: "kept?"}, {Stage: s}})); code != client.CodeBadRequest {
			t.Errorf("stage %s: %s", s, code)
		}
	}
	if code := codeOf(n.Report(ctx, make([]provision.Report, client.MaxBatch+1))); code != client.CodeTooLarge {
		t.Error(code)
	}
	if code := codeOf(n.Report(ctx, []provision.Report{{Log: strings.Repeat("x", client.MaxBatchSize)}})); code != client.CodeTooLarge {
		t.Error(code)
	}
	if s := l.node("node1"); s.LastLog != "" {
		t.Fatalf("part of a refused batch was kept: %q", s.LastLog)
	}
	facts := map[string]string{}
	for i := range 400 {
		facts[fmt.Sprint("key", i)] = strings.Repeat("v", 2*maxFactValue)
	}
	l.report(n, provision.Report{Log: "\x1b[2Jred\nline \u202e " + strings.Repeat("é", client.MaxLogLine), Facts: facts, Done: -5, Total: 3})
	l.report(n, provision.Report{Facts: map[string]string{"one\x00more": "x"}, Failure: &provision.Failure{Code: "x\n", Message: "a\tb", Next: "\x07"}})
	s := l.node("node1")
	if len(s.Facts) != maxFacts || s.Done != 0 || s.Failure.Code != "x" || s.Failure.Message != "a b" || s.Failure.Next != "?" {
		t.Fatalf("%d facts, %+v", len(s.Facts), s)
	}
	for k, v := range s.Facts {
		if len(k) > maxFactKey || len(v) > maxFactValue {
			t.Fatal(len(k), len(v))
		}
	}
	for _, e := range l.journal("node1") {
		if e.Report != nil && (strings.ContainsAny(e.Report.Log, "\x1b\n\u202e") || len(e.Report.Log) > client.MaxLogLine) {
			t.Fatalf("%q", e.Report.Log)
		}
	}
}

// A machine that is in no rack file is listed and waits; nothing installs it
// but its approval.
func TestUnknownMachine(t *testing.T) {
	l := newLab(t, 2)
	l.stop()
	l.rack.Nodes[1].MAC = ""
	l.start()
	ctx := t.Context()
	if _, ok := l.host.Reservation(mac9); ok {
		t.Fatal("an unknown machine has a reservation")
	}
	script := l.boot(mac9, "10.9.0.100")
	a := args(script)
	if a["life"] != "inventory" || a["ip"] != "10.9.0.100/24" || a["url"] != "https://10.9.0.1:8443" {
		t.Fatal(script)
	}
	n, plan, err := client.Enrol(ctx, l.url, a["pin"], a["token"])
	if err != nil || plan != nil || n.Identity().Node != string(mac9) {
		t.Fatal(plan, err)
	}
	defer n.Close()
	l.report(n, provision.Report{Facts: map[string]string{"memory": "64 GiB"}}, provision.Report{Log: "two disks"})
	nodes, err := l.op.Nodes(ctx)
	l.check(err)
	if len(nodes) != 3 || nodes[2].Name != string(mac9) || nodes[2].Stage != provision.StageUnknown || nodes[2].Facts["memory"] != "64 GiB" || nodes[2].Known {
		t.Fatalf("%+v", nodes)
	}
	_, err1 := n.Plan(ctx)
	_, err2 := n.Secrets(ctx)
	_, err3 := n.Join(ctx)
	for _, err := range []error{err1, err2, err3} {
		if codeOf(err) != client.CodeNotApproved || !strings.Contains(err.Error(), "approve "+string(mac9)) {
			t.Fatal(err)
		}
	}
	if code := codeOf(n.Report(ctx, []provision.Report{{Stage: provision.StageInstalled}})); code != client.CodeBadRequest {
		t.Fatal(code)
	}
	if ap, err := n.Approval(ctx); err != nil || ap.Node != "" {
		t.Fatal(ap, err)
	}
	for name, c := range map[string]struct {
		node string
		mac  provision.MAC
		want string
	}{
		"node with a MAC":  {"node1", mac9, client.CodeConflict},
		"MAC of a node":    {"node2", mac1, client.CodeConflict},
		"no such node":     {"node7", mac9, client.CodeUnknownNode},
		"a machine":        {string(mac9), mac9, client.CodeUnknownNode},
		"no MAC":           {"node2", "", client.CodeBadRequest},
		"multicast":        {"node2", "01:00:5e:00:00:01", client.CodeBadRequest},
		"an infiniband id": {"node2", "00:00:00:00:fe:80:00:00:00:00:00:00:02:00:5e:10:00:00:00:01", client.CodeBadRequest},
	} {
		if _, err := l.op.Approve(ctx, c.node, c.mac); codeOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, change := range []func(context.Context, string) (provision.State, error){l.op.Reinstall, l.op.Withdraw} {
		if _, err := change(ctx, string(mac9)); codeOf(err) != client.CodeUnknownNode {
			t.Fatal(err)
		}
	}
	s, err := l.op.Approve(ctx, "node2", "52-54-00-00-00-09")
	if err != nil || s.MAC != mac9 {
		t.Fatal(s, err)
	}
	if _, err := l.op.Approve(ctx, "node2", mac3); codeOf(err) != client.CodeConflict {
		t.Fatal(err)
	}
	if ap, err := n.Approval(ctx); err != nil || ap.Node != "node2" {
		t.Fatal(ap, err)
	}
	l.report(n, provision.Report{Log: "still here"})
	if nodes, _ = l.op.Nodes(ctx); len(nodes) != 2 {
		t.Fatalf("%+v", nodes)
	}
	if r, ok := l.host.Reservation(mac9); !ok || r.Address.String() != "10.9.0.12" || r.Hostname != "node2" {
		t.Fatal(r, ok)
	}
	// With its old address it gets nothing yet, with its own it is installed.
	if script := l.boot(mac9, "10.9.0.100"); args(script)["token"] != "" || !strings.Contains(script, "10.9.0.12") {
		t.Fatal(script)
	}
	if a := args(l.boot(mac9, "10.9.0.12")); a["life"] != "installer" {
		t.Fatal(a)
	}
}

// Invented machines and chatty ones do not grow the journal without bound.
func TestUnknownMachinesAreBounded(t *testing.T) {
	l := newLab(t, 1)
	ctx := t.Context()
	a := args(l.boot(mac9, "10.9.0.100"))
	n, _, err := client.Enrol(ctx, l.url, a["pin"], a["token"])
	l.check(err)
	defer n.Close()
	for range 10 {
		l.boot(mac9, "10.9.0.100")
		batch := make([]provision.Report, 100)
		for i := range batch {
			batch[i].Log = "x"
		}
		l.report(n, batch...)
	}
	if got := len(l.journal(string(mac9))); got > unknownReports+3 {
		t.Fatalf("%d events of one unknown machine", got)
	}
	// Filled up by hand: booting a thousand would only take longer.
	var events []provision.Event
	for i := range maxUnknown - 1 {
		mac := provision.MAC(fmt.Sprintf("52:54:01:00:%02x:%02x", i>>8, i&255))
		events = append(events, provision.Event{Kind: provision.EventBoot, Node: string(mac), MAC: mac, Action: provision.ActionInventory})
	}
	l.check(l.host.Store.Append(ctx, events...))
	script := l.boot("52:54:02:00:00:00", "10.9.0.101")
	if args(script)["token"] != "" || !strings.Contains(script, "next try") {
		t.Fatal(script)
	}
	if nodes, _ := l.op.Nodes(ctx); len(nodes) != 1+maxUnknown {
		t.Fatal(len(nodes))
	}
	if args(l.boot(mac9, "10.9.0.100"))["token"] == "" || args(l.boot(mac1, "10.9.0.11"))["token"] == "" {
		t.Fatal("listed machines and nodes are shut out too")
	}
}

// An image that cannot run the stack installs on no node.
func TestImageUnfit(t *testing.T) {
	l := newLab(t, 1, func(l *lab) {
		l.images.image = provision.Image{Family: provision.FamilyRHEL, Origin: "rocky.qcow2"}
		l.rack.Stack.Components = []provision.PlacedComponent{{Component: provision.Component{Name: "etcd", Kind: provision.KindPackages}, Members: []string{"node1"}}}
	})
	if script := l.boot(mac1, "10.9.0.11"); args(script)["token"] != "" || !strings.Contains(script, "of the family rhel") {
		t.Fatal(script)
	}
	if s := l.node("node1"); s.Stage != provision.StageFailed || s.Failure.Code != "image-unfit" || !strings.Contains(s.Failure.Message, "component etcd") || !s.GrantOpen {
		t.Fatalf("%+v", s)
	}
}

// A disc without a usable image stops the node with a name, once, and lets it
// try again.
func TestImageMissing(t *testing.T) {
	l := newLab(t, 1)
	l.images.set(errors.New("manifest abcd of image debian-13 is signed by no trusted key"))
	for range 3 {
		script := l.boot(mac1, "10.9.0.11")
		if args(script)["token"] != "" || !strings.Contains(script, "no trusted key") || !strings.Contains(script, "chain --replace --autofree http://10.9.0.1/boot.ipxe") {
			t.Fatal(script)
		}
	}
	s := l.node("node1")
	if s.Stage != provision.StageFailed || s.Failure.Code != "image-unusable" || !strings.Contains(s.Failure.Message, "no trusted key") || s.Failure.Next == "" || !s.GrantOpen {
		t.Fatalf("%+v", s)
	}
	if got := len(l.journal("node1")); got != 2 { // the grant and the failure
		t.Fatalf("%d events", got)
	}
	l.images.set(nil)
	l.enrol(1)
	if s := l.node("node1"); s.Stage != provision.StageBooting || s.Failure != nil {
		t.Fatalf("%+v", s)
	}
	arm := l.host.BootScript(t.Context(), pxe.BootRequest{MAC: mac1, Addr: netip.MustParseAddr("10.9.0.11"), Platform: "efi", Arch: "arm64", Again: "http://x/"})
	if args(arm)["token"] != "" || !strings.Contains(arm, "arm64") {
		t.Fatal(arm)
	}
}

// Repeated requests are one event; a power cut is another.
func TestBootEvents(t *testing.T) {
	l := newLab(t, 1)
	boots := func() (n int) {
		for _, e := range l.journal("node1") {
			if e.Kind == provision.EventBoot {
				n++
			}
		}
		return n
	}
	for range 3 {
		l.boot(mac1, "10.9.0.11")
	}
	if boots() != 1 {
		t.Fatalf("%d boots", boots())
	}
	n := l.enrol(1)
	l.report(n, provision.Report{Stage: provision.StageInstalling})
	l.boot(mac1, "10.9.0.11") // at once, but it was installing
	if boots() != 2 || l.node("node1").Stage != provision.StageBooting {
		t.Fatalf("%d boots, %+v", boots(), l.node("node1"))
	}
	l.report(n, provision.Report{Stage: provision.StageInstalled})
	for range 3 {
		l.boot(mac1, "10.9.0.11")
	}
	if boots() != 3 {
		t.Fatalf("%d boots", boots())
	}
	if script := l.boot(mac1, "10.9.0.77"); !strings.Contains(script, "10.9.0.77") || boots() != 3 {
		t.Fatal(script)
	}
}

// The page's listener shows all and changes nothing.
func TestReadOnly(t *testing.T) {
	l := newLab(t, 1)
	do := func(method, path string) (int, string) {
		t.Helper()
		req, _ := http.NewRequestWithContext(t.Context(), method, l.page+path, nil)
		resp, err := http.DefaultClient.Do(req)
		l.check(err)
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	defer http.DefaultClient.CloseIdleConnections()
	for _, what := range []string{"reinstall", "withdraw", "approve"} {
		if status, _ := do("POST", "/v1/nodes/node1/"+what); status != 404 && status != 405 {
			t.Errorf("%s: %d", what, status)
		}
	}
	if got := len(l.journal("node1")); got != 1 {
		t.Fatalf("%d events", got)
	}
	if status, body := do("GET", "/v1/nodes/node1"); status != 200 || !strings.Contains(body, `"name":"node1"`) {
		t.Error(status, body)
	}
	if status, body := do("GET", "/v1/nodes/nodeX"); status != 404 || !strings.Contains(body, "There are: node1.") || !strings.Contains(body, client.CodeUnknownNode) {
		t.Error(status, body)
	}
	if status, body := do("GET", "/v1/events?after=x"); status != 400 || !strings.Contains(body, client.CodeBadRequest) {
		t.Error(status, body)
	}
	if status, _ := do("GET", "/v1/nonsense"); status != 404 {
		t.Error(status)
	}
}

// A stream on which nothing happens shows that it is alive, and the browser's
// way to go on after the last event works.
func TestStreamHeartbeat(t *testing.T) {
	l := newLab(t, 1)
	l.host.heartbeat = 10 * time.Millisecond // before the first stream
	req, _ := http.NewRequestWithContext(t.Context(), "GET", l.page+"/v1/events?after=0", nil)
	req.Header.Set("Last-Event-ID", "1")
	resp, err := http.DefaultClient.Do(req)
	l.check(err)
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatal(resp.Header)
	}
	got := ""
	// On a busy machine the stream may be alive before it has the state.
	state := "id: 1\nevent: state\ndata: {\"name\":\"node1\""
	for in := bufio.NewScanner(resp.Body); !strings.Contains(got, ": alive\n\n: alive\n") || !strings.Contains(got, state); {
		if !in.Scan() {
			t.Fatalf("ended after %q: %v", got, in.Err())
		}
		got += in.Text() + "\n"
	}
	if strings.Contains(got, `"kind"`) {
		t.Fatal(got)
	}
}

// A watcher misses no event while the disc host is restarted under it.
func TestEventsOverRestarts(t *testing.T) {
	l := newLab(t, 1)
	n := l.enrol(1)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const total = 60
	rep := client.NewReporter(nil)
	rep.Attach(n)
	defer rep.Close()
	rep.Logf("line 0")
	var last int64
	next, lost := 0, 0
	for u, err := range l.op.Events(ctx, 0) {
		if err != nil {
			lost++
			continue
		}
		if u.Event == nil {
			continue
		}
		if u.Event.ID != last+1 {
			t.Fatalf("event %d after %d", u.Event.ID, last)
		}
		last = u.Event.ID
		if u.Event.Report == nil || u.Event.Report.Log == "" {
			continue
		}
		if want := fmt.Sprintf("line %d", next); u.Event.Report.Log != want {
			t.Fatalf("%q, want %q", u.Event.Report.Log, want)
		}
		if next++; next == total {
			break
		}
		if next%20 == 0 {
			old := l.op
			l.restart()
			defer old.Close()
		}
		rep.Logf("line %d", next)
	}
	if next != total || lost == 0 {
		t.Fatalf("%d lines, %d times lost: %v", next, lost, ctx.Err())
	}
}

// A rack of one probes itself; a probe that fails is repeated and said once.
func TestProbeRetries(t *testing.T) {
	l := newLab(t, 1)
	var mu sync.Mutex
	tries := 0
	l.probe = func(_ context.Context, o probe.Options) (time.Duration, error) {
		mu.Lock()
		defer mu.Unlock()
		if tries++; tries < 3 {
			return 0, errors.New("node1 does not answer on port 5222")
		}
		return 0, nil
	}
	n := l.enrol(1)
	l.report(n, provision.Report{Stage: provision.StageInstalled}, provision.Report{Stage: provision.StageProbing})
	l.await("node1", is(provision.StageReady))
	said := 0
	events := l.journal("node1")
	for _, e := range events {
		if e.Report != nil && strings.Contains(e.Report.Log, "port 5222") {
			said++
		}
	}
	if said != 1 || !strings.HasSuffix(events[len(events)-1].Detail, "in 1 ms") {
		t.Fatalf("said %d times; %+v", said, events[len(events)-1])
	}
	// The agent starts again: it is not ready before a message passed again.
	l.report(n, provision.Report{Stage: provision.StagePreparing})
	if s := l.node("node1"); s.Stage != provision.StagePreparing {
		t.Fatalf("%+v", s)
	}
	l.report(n, provision.Report{Stage: provision.StageProbing})
	l.await("node1", is(provision.StageReady))
}

// A node that went away while its message was under way is not ready, and one
// broken node does not hold up the others.
func TestProbeRaces(t *testing.T) {
	l := newLab(t, 3)
	inProbe, goOn := make(chan string, 100), make(chan struct{})
	l.probe = func(ctx context.Context, o probe.Options) (time.Duration, error) {
		if o.From.Node == "node1" || o.To.Node == "node1" {
			select {
			case inProbe <- o.From.Node + o.To.Node:
			default:
			}
			select {
			case <-goOn:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		return time.Millisecond, nil
	}
	nodes := []*client.Node{l.enrol(1), l.enrol(2), l.enrol(3)}
	for _, n := range nodes {
		l.report(n, provision.Report{Stage: provision.StageInstalled})
	}
	l.report(nodes[0], provision.Report{Stage: provision.StageProbing})
	l.report(nodes[1], provision.Report{Stage: provision.StageProbing})
	<-inProbe // node1 with node2
	l.report(nodes[0], provision.Report{Stage: provision.StagePreparing})
	close(goOn)
	l.await("node2", is(provision.StageReady))
	if s := l.node("node1"); s.Stage != provision.StagePreparing {
		t.Fatalf("%+v", s)
	}
	l.report(nodes[2], provision.Report{Stage: provision.StageProbing})
	l.await("node3", is(provision.StageReady))
}

func TestPairsFor(t *testing.T) {
	rack := func(stages ...provision.Stage) (out []provision.State) {
		for i, s := range stages {
			out = append(out, provision.State{Name: fmt.Sprint("n", i+1), Stage: s})
		}
		return out
	}
	const p, r, i, f = provision.StageProbing, provision.StageReady, provision.StageInstalling, provision.StageFailed
	set := func(names ...string) map[string]bool {
		m := map[string]bool{}
		for _, n := range names {
			m[n] = true
		}
		return m
	}
	for _, c := range []struct {
		name        string
		states      []provision.State
		busy, later map[string]bool
		tries       map[string]int
		want, waits string
	}{
		{"alone in the rack", rack(p), nil, nil, nil, "n1n1", ""},
		{"nothing to do", rack(r, r, i), nil, nil, nil, "", ""},
		{"two", rack(p, p), nil, nil, nil, "n1n2", ""},
		{"three", rack(p, p, p), nil, nil, nil, "n1n2", ""},
		{"four", rack(p, p, p, p), nil, nil, nil, "n1n2 n3n4", ""},
		{"one is ready", rack(r, p), nil, nil, nil, "n2n1", ""},
		{"no partner yet", rack(p, i, f), nil, nil, nil, "", "n1 works and waits for a second node to pass a message with: n2 is installing, n3 is failed"},
		{"partner is busy", rack(p, p, p), set("n1", "n2"), nil, nil, "", ""},
		{"pauses, but helps", rack(p, p, p), nil, set("n1", "n2"), nil, "n3n1", ""},
		{"another partner's turn", rack(p, r, r), nil, nil, map[string]int{"n1": 1}, "n1n3", ""},
	} {
		pairs, waits := pairsFor(c.states, c.busy, c.later, c.tries)
		var got []string
		for _, p := range pairs {
			got = append(got, p.a.Name+p.b.Name)
		}
		if strings.Join(got, " ") != c.want || waits["n1"] != c.waits {
			t.Errorf("%s: %v, waits %v", c.name, got, waits)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\x1b[2Jb", 10)
	f.Add("ééééé", 4)
	f.Add("\xff\xfe\u202e", 3)
	f.Add("0000\xc40\xf20\xee", 14)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		if limit < 3 || limit > 1<<16 {
			return // not a limit that is used
		}
		got := text(s, limit)
		if len(got) > limit || got != text(got, limit) {
			t.Fatalf("%q, limit %d: %q", s, limit, got)
		}
		for _, c := range got {
			if c < ' ' || c == 0x7f || c == '\uFFFD' && !strings.ContainsRune(s, c) {
				t.Fatalf("%q has %q", got, c)
			}
		}
	})
}

func FuzzParseBatch(f *testing.F) {
	for _, s := range []string{"", "a:1", ":", "a:", "a:0", "a:-1", "a:99999999999999999999", "a:1:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := parseBatch(s)
		if err == nil && s != "" && (b.Stream == "" || b.Seq < 1 || len(b.Stream) > 64) {
			t.Fatalf("%q: %+v", s, b)
		}
	})
}
