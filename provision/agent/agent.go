package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"platter/hostprep"
	"platter/provision"
	"platter/provision/client"
	"platter/provision/jsonfile"
	"platter/provision/stack"
)

// Config says where the agent finds things. The zero value is the installed
// host.
type Config struct {
	PlanPath     string // default /etc/platter/plan.json
	IdentityPath string // default /etc/platter/identity.json
	OrdersPath   string // default /var/lib/platter/orders.json
	Log          io.Writer
	LeaveHost    bool               // somebody else prepares this host: only its service is ours
	Notify       func(state string) // tells systemd, see sd_notify(3); default: does so
	Watch        time.Duration      // between looks at the cluster; default 15 s
	Retry        time.Duration      // after something failed; default 30 s
}

// Reporter is what the agent says things to; client.Reporter is one.
type Reporter interface {
	stack.Progress
	Stage(provision.Stage)
	Progress(done, total int64)
	Fail(*provision.Failure)
}

// work is what the agent does, in order; tests put other things in place.
type work struct {
	prepare func(ctx context.Context, rep Reporter) error
	bring   func(ctx context.Context, rep Reporter) error
	guests  func(ctx context.Context, rep Reporter) error
	look    func(ctx context.Context) (stack.Cluster, error)
	tend    func(ctx context.Context, rep Reporter) (stack.Cluster, error) // looks, and heals a split
	alarms  func() []string                                                // of the host, each beginning with its name and a colon
	// troubles of the service that have lasted for so long
	troubles func(ctx context.Context, atLeast time.Duration) []stack.Trouble
}

// errAnew ends a life of the agent that another one follows: the plan has
// changed.
var errAnew = errors.New("agent: the plan has changed")

// Run is the agent's whole life; it returns when ctx ends or when the host was
// not installed by Platter.
func Run(ctx context.Context, c Config) error {
	c = c.withDefaults()
	for {
		life, end := context.WithCancelCause(ctx)
		err := c.run(life, func() { end(errAnew) })
		anew := context.Cause(life) == errAnew
		end(nil)
		if !anew || ctx.Err() != nil {
			return err
		}
	}
}

// run is the agent's life with one plan. anew ends it for another one.
func (c Config) run(ctx context.Context, anew func()) error {
	upAtStart := hostprep.SinceBoot()
	var plan provision.Plan
	if err := jsonfile.Read(c.PlanPath, &plan); err != nil {
		return fmt.Errorf("agent: the plan of this host: %w: reinstall the node", err)
	}
	if plan.Format != provision.PlanFormat {
		return fmt.Errorf("agent: %s has format %d, this program knows %d: reinstall the node", c.PlanPath, plan.Format, provision.PlanFormat)
	}
	rep := client.NewReporter(c.Log)
	defer rep.Close()
	c.Notify("READY=1\nSTATUS=Node " + plan.Node)

	// Without an identity nothing can be reported or asked, but a member runs
	// on.
	var node *client.Node
	var id client.Identity
	err := jsonfile.Read(c.IdentityPath, &id)
	if err == nil {
		node, err = client.NewNode(id)
	}
	if err != nil {
		rep.Logf("agent: this node cannot speak to the disc host: %v: reinstall the node", err)
	} else {
		rep.Attach(node)
		defer node.Close()
	}

	facts := osFacts("/")
	facts["os_up_ms"] = upAtStart
	maps.Copy(facts, stagedFacts(stack.ReleasesDir))
	if r, _, err := stack.InUse(stack.ReleasesDir); err == nil {
		facts[provision.FactRelease] = or(r, provision.Installed)
	}
	withHost := func(ctx context.Context, do func(*hostprep.Host) error) error {
		sd, err := hostprep.DialSystemd(ctx)
		if err != nil {
			return err
		}
		defer sd.Close()
		return do(&hostprep.Host{Root: "/", Spec: plan.Host, Self: hostprep.NodeSelf, Systemd: sd, Reach: hostprep.ReachOf(plan)})
	}
	host := func(steps func(*hostprep.Host) []hostprep.Step) func(context.Context, Reporter) error {
		return func(ctx context.Context, rep Reporter) error {
			return withHost(ctx, func(h *hostprep.Host) error { return prepare(ctx, h, steps(h), rep) })
		}
	}
	watcher := stack.NewWatcher(plan)
	ahead := func() (time.Duration, bool) { return 0, false }
	if node != nil {
		ahead = node.Ahead
	}
	w := work{
		prepare:  host((*hostprep.Host).HostSteps),
		guests:   host((*hostprep.Host).GuestSteps),
		bring:    func(ctx context.Context, rep Reporter) error { return bring(ctx, plan, node, rep, anew) },
		look:     func(ctx context.Context) (stack.Cluster, error) { return stack.Look(ctx, plan) },
		tend:     func(ctx context.Context, rep Reporter) (stack.Cluster, error) { return watcher.Tend(ctx, rep) },
		alarms:   func() []string { return hostprep.Alarms("/", plan.Host) },
		troubles: stack.NewDoctor(plan, ahead).Look,
	}
	checked := func(ctx context.Context, rep hostprep.Progress) (results []hostprep.Result, err error) {
		err = withHost(ctx, func(h *hostprep.Host) (err error) {
			results, err = hostprep.Check(ctx, h.Steps(), rep)
			return err
		})
		return results, err
	}
	if c.LeaveHost {
		leave := func(context.Context, Reporter) error { return nil }
		w.prepare, w.guests, w.alarms = leave, leave, func() []string { return nil }
		checked = func(context.Context, hostprep.Progress) ([]hostprep.Result, error) { return nil, nil }
	}
	// While a switch stops and starts the service, nobody else heals it.
	var service sync.Mutex
	w.tend = undisturbed(&service, w.tend)
	status := statusReporter{rep, c.Notify, func() {}}
	if node != nil {
		member, isMember := context.WithCancel(context.Background())
		defer isMember()
		status.member = isMember
		kinds := map[provision.OrderKind]orderKind{
			provision.OrderStage:        {do: staging(plan, rep), within: 6 * time.Hour},
			provision.OrderReleases:     {do: releases, within: 2 * time.Minute},
			provision.OrderSwitch:       {do: switching(plan, node, rep, &service, anew), within: 4 * time.Hour},
			provision.OrderDiagnose:     {do: diagnosing(checked, plan, w), within: 3 * time.Minute},
			provision.OrderLoadAccounts: {do: loadAccounts(plan, node), within: 6 * time.Hour},
			provision.OrderHandover:     handingOver(node),
			provision.OrderOutage:       {do: outage(plan, &service), within: provision.MaxOutage*time.Second + 20*time.Minute},
		}
		maps.Copy(kinds, lifeKinds(plan, node, &service))
		o := &orders{path: c.OrdersPath, kinds: kinds, next: node.NextOrder, rep: rep, log: c.Log, member: member, retry: c.Retry}
		var running sync.WaitGroup
		octx, stop := context.WithCancel(ctx)
		running.Go(func() { o.run(octx) })
		defer running.Wait()
		defer stop()
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	tctx, stop := context.WithCancel(ctx)
	defer stop()
	watching.Go(func() {
		var last []stack.Trouble
		c.sayTroubles(tctx, func(ctx context.Context, atLeast time.Duration) []stack.Trouble {
			// While it is locked, what does not run was stopped on purpose.
			if service.TryLock() {
				service.Unlock()
				last = w.troubles(ctx, atLeast)
			}
			return last
		}, rep)
	})
	return c.live(ctx, w, facts, status)
}

// ailing is for how long a component may not serve before people are told:
// others restart too.
const ailing = time.Minute

// sayTroubles looks now and then for what keeps the service of this node from
// working, from the agent's first moment on, and says when that changes.
func (c Config) sayTroubles(ctx context.Context, look func(context.Context, time.Duration) []stack.Trouble, rep Reporter) {
	said := "\n" // at first it is said in any case: an older life may have left something
	for {
		troubles := look(ctx, ailing)
		if ctx.Err() != nil {
			return
		}
		var about, texts []string
		for _, t := range troubles {
			about, texts = append(about, t.About), append(texts, t.Text)
		}
		if now := strings.Join(about, "\n"); now != said {
			for _, t := range texts {
				rep.Logf("trouble: %s", t)
			}
			if now == "" && said != "\n" {
				rep.Logf("trouble: over")
			}
			rep.Facts(map[string]string{provision.FactTrouble: strings.Join(texts, ". ")})
			said = now
		}
		if provision.Sleep(ctx, c.Watch) != nil {
			return
		}
	}
}

// prepare puts right what is safe to put right on the host. What waits for a
// reboot or a person is said, and keeps nobody from being ready.
func prepare(ctx context.Context, host *hostprep.Host, steps []hostprep.Step, rep Reporter) error {
	release, err := host.Lock(ctx, func(pid string) error {
		rep.Logf("host: waiting for process %s, which is changing this host", pid)
		return nil
	})
	if err != nil {
		return err
	}
	defer release()
	j, err := hostprep.OpenJournal(host.Root)
	if err != nil {
		return err
	}
	_, err = hostprep.Apply(ctx, steps, j, rep)
	return err
}

// live goes through the stages until the node is a member of the cluster, then
// watches. What fails is reported by name and tried again.
func (c Config) live(ctx context.Context, w work, facts map[string]string, rep Reporter) error {
	rep.Stage(provision.StagePreparing)
	rep.Facts(facts)
	for {
		err := c.stages(ctx, w, rep)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			break
		}
		rep.Fail(failure(err))
		if provision.Sleep(ctx, c.Retry) != nil {
			return nil
		}
		rep.Stage(provision.StagePreparing)
	}
	rep.Stage(provision.StageProbing)
	// The service waits for no VM, and what is wrong with one is said and does
	// not make the node fail.
	guests := make(chan struct{})
	go func() {
		defer close(guests)
		if err := w.guests(ctx, rep); err != nil && ctx.Err() == nil {
			rep.Logf("host: %v", err)
		}
	}()
	defer func() { <-guests }()
	return c.watch(ctx, w, rep)
}

func (c Config) stages(ctx context.Context, w work, rep Reporter) error {
	began := time.Now()
	if err := w.prepare(ctx, rep); err != nil {
		return err
	}
	rep.Facts(map[string]string{"prepare_ms": ms(began)})
	rep.Stage(provision.StageJoining)
	began = time.Now()
	if err := w.bring(ctx, rep); err != nil {
		return err
	}
	rep.Facts(map[string]string{"stack_ms": ms(began), "member_up_ms": hostprep.SinceBoot()})
	return nil
}

// watch looks at the cluster now and then, says what changes, and gives a sign
// of life. A local member that stays away is a failure; systemd restarts it. A
// member that was silent for long, or apart, has to show again that it works.
func (c Config) watch(ctx context.Context, w work, rep Reporter) error {
	const enough = 4 // looks in a row before a silent member is a failure
	said, silent, apart := "", 0, false
	alarmed := ""
	for {
		alarmed = sayAlarms(rep, w.alarms(), alarmed)
		cl, err := w.tend(ctx, rep)
		if ctx.Err() != nil {
			return nil
		}
		now := describe(cl)
		if err != nil {
			silent++
			now = "ejabberd of this node does not answer: " + err.Error()
		}
		if err == nil || silent == 1 {
			if now != said {
				if said != "" {
					rep.Logf("cluster: %s", now)
				}
				rep.Facts(map[string]string{provision.FactRunning: strings.Join(cl.Running, ","), provision.FactDown: strings.Join(cl.Down, ",")})
				said = now
			}
		}
		switch {
		case err == nil:
			if silent >= enough || apart && len(cl.Apart) == 0 {
				rep.Stage(provision.StageProbing) // the disc host decides when it is ready again
			}
			silent, apart = 0, len(cl.Apart) > 0
		case silent == enough:
			rep.Fail(&provision.Failure{Code: "stack-stopped", Message: now, Next: "Look at 'journalctl -u ejabberd' on the node; systemd and the agent keep trying"})
		}
		rep.Progress(0, 0) // pure progress: seen, but not kept
		if provision.Sleep(ctx, c.Watch) != nil {
			return nil
		}
	}
}

// sayAlarms says which alarms began or ended and returns their names. The
// numbers in them change all the time.
func sayAlarms(rep Reporter, alarms []string, before string) string {
	var names []string
	for _, a := range alarms {
		name, _, _ := strings.Cut(a, ":")
		names = append(names, name)
	}
	now := strings.Join(names, ",")
	switch {
	case now == before:
		return now
	case now == "":
		rep.Logf("alarm: %s: over", before)
	}
	for _, a := range alarms {
		rep.Logf("alarm: %s", a)
	}
	rep.Facts(map[string]string{"alarms": now})
	return now
}

// bring ends a switch that was cut off, or makes the node a member, with secrets
// from its own disk or, where they are missing, from the disc host.
func bring(ctx context.Context, plan provision.Plan, node *client.Node, rep Reporter, anew func()) error {
	if resumed, err := stack.ResumeSwitch(ctx, asking(node), rep); err != nil || resumed {
		if err == nil {
			anew()
			err = errAnew
		}
		return err
	}
	sec, err := stack.Secrets("/")
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			rep.Logf("agent: %v", err)
		}
		if node == nil {
			return errors.New("the secrets of the IM service are missing and this node has no identity: reinstall it")
		}
		if sec, err = node.Secrets(ctx); err != nil {
			return fmt.Errorf("fetching the secrets of the IM service: %w", err)
		}
	}
	return stack.Bring(ctx, plan, sec, asking(node), rep)
}

// asking asks the disc host for the node's part in the cluster.
func asking(node *client.Node) func(context.Context) (provision.Join, error) {
	return func(ctx context.Context) (provision.Join, error) {
		if node == nil {
			return provision.Join{}, errors.New("this node has no identity: reinstall it")
		}
		return node.Join(ctx)
	}
}

// failure gives every error a name.
func failure(err error) *provision.Failure {
	var f *provision.Failure
	if errors.As(err, &f) {
		return f
	}
	return &provision.Failure{Code: "agent", Message: err.Error(), Next: "Look at 'journalctl -u platter-agent' on the node; the agent keeps trying"}
}

func describe(c stack.Cluster) string {
	s := "running: " + strings.Join(c.Running, ", ")
	if len(c.Down) > 0 {
		s += "; not running: " + strings.Join(c.Down, ", ")
	}
	if len(c.Apart) > 0 {
		s += "; split: " + strings.Join(c.Apart, ", ") + " run and answer, but in a cluster of their own"
	}
	return s
}

// osFacts are the facts about the system at root that do not change until it
// reboots.
func osFacts(root string) map[string]string {
	facts := map[string]string{
		"kernel":  hostprep.KernelRelease(),
		"boot_id": strings.TrimSpace(readText(root + "/proc/sys/kernel/random/boot_id")),
		"cpus":    strconv.Itoa(runtime.NumCPU()),
	}
	for line := range strings.Lines(readText(root + "/etc/os-release")) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			facts["os"] = strings.Trim(v, `"`)
		}
	}
	for line := range strings.Lines(readText(root + "/proc/meminfo")) {
		if v, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			facts["memory_kib"] = strings.TrimSuffix(strings.TrimSpace(v), " kB")
		}
	}
	for _, k := range slices.Collect(maps.Keys(facts)) {
		if facts[k] == "" {
			delete(facts, k)
		}
	}
	return facts
}

// statusReporter also tells systemd what the agent is about, and the orders
// when they may begin.
type statusReporter struct {
	*client.Reporter
	notify func(string)
	member func() // the node is past joining
}

func (s statusReporter) Stage(st provision.Stage) {
	if st == provision.StageProbing {
		s.member()
	}
	s.notify("STATUS=" + string(st))
	s.Reporter.Stage(st)
}

func (s statusReporter) Phase(name string, n, of int) {
	s.notify(fmt.Sprintf("STATUS=%s (%d/%d)", name, n, of))
	s.Reporter.Phase(name, n, of)
}

func (s statusReporter) Fail(f *provision.Failure) {
	s.notify("STATUS=failed: " + strings.ReplaceAll(f.Error(), "\n", " "))
	s.Reporter.Fail(f)
}

func (c Config) withDefaults() Config {
	if c.PlanPath == "" {
		c.PlanPath = "/etc/platter/plan.json"
	}
	if c.IdentityPath == "" {
		c.IdentityPath = "/etc/platter/identity.json"
	}
	if c.OrdersPath == "" {
		c.OrdersPath = "/var/lib/platter/orders.json"
	}
	if c.Log == nil {
		c.Log = os.Stdout
	}
	if c.Notify == nil {
		c.Notify = func(state string) { daemon.SdNotify(false, state) } // nothing without systemd
	}
	if c.Watch == 0 {
		c.Watch = 15 * time.Second
	}
	if c.Retry == 0 {
		c.Retry = 30 * time.Second
	}
	return c
}

func readText(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

func ms(since time.Time) string { return strconv.FormatInt(time.Since(since).Milliseconds(), 10) }
