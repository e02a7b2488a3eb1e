package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/stack/probe"
)

// switched are nodes that go to releases as they are ordered.
type switched struct {
	l       *lab
	mu      sync.Mutex
	current map[string]string
	log     []string          // what was switched, in order
	refuses map[string]string // node to release
	dies    string            // node that is not heard of again once it has its order
	hold    chan struct{}     // switches wait for it
}

var release2 = strings.Repeat("22", 32)

// live answers the orders of every node until the test ends.
func (s *switched) live() {
	var members []string
	for _, n := range s.l.rack.Nodes {
		members = append(members, n.Name)
		s.current[n.Name] = provision.Installed
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	s.l.t.Cleanup(func() { cancel(); all.Wait() })
	var clients []*client.Node
	for i := range members {
		clients = append(clients, s.l.installed(i+1))
	}
	for i, n := range members {
		c := clients[i]
		rep := client.NewReporter(nil)
		rep.Attach(c)
		rep.Facts(map[string]string{provision.FactRunning: strings.Join(members, ","), provision.FactDown: ""})
		rep.Stage(provision.StageProbing)
		all.Go(func() {
			defer rep.Close()
			done := map[int64]*provision.OrderNews{}
			for ctx.Err() == nil {
				o, err := c.NextOrder(ctx, true)
				if err != nil || o == nil {
					provision.Sleep(ctx, 20*time.Millisecond)
					continue
				}
				if done[o.ID] == nil {
					was := s.runs(n)
					done[o.ID] = s.carryOut(ctx, n, *o)
					if s.runs(n) != was {
						rep.Stage(provision.StageProbing)
					}
				}
				rep.Order(*done[o.ID])
				rep.Flush(ctx)
			}
		})
	}
	for _, n := range members {
		s.l.await(n, is(provision.StageReady))
	}
}

// switches are those that were ordered until now.
func (s *switched) switches() []string { s.mu.Lock(); defer s.mu.Unlock(); return slices.Clone(s.log) }

func (s *switched) runs(node string) string { s.mu.Lock(); defer s.mu.Unlock(); return s.current[node] }

func (s *switched) carryOut(ctx context.Context, node string, o provision.Order) *provision.OrderNews {
	news := &provision.OrderNews{ID: o.ID, State: provision.OrderDone}
	var result any
	if o.Kind == provision.OrderReleases {
		s.mu.Lock()
		defer s.mu.Unlock()
		r := provision.NodeReleases{Current: s.current[node], Primary: node == "node1", Staged: []provision.NodeRelease{{
			ReleaseRef: provision.ReleaseRef{Version: "2", Digest: release2}, Stack: provision.Stack{Components: []provision.Component{{Name: "ejabberd"}}}}}}
		result = r
	} else {
		var a provision.SwitchArgs
		json.Unmarshal(o.Args, &a)
		if s.hold != nil {
			select {
			case <-s.hold:
			case <-ctx.Done():
			}
		}
		if s.dies == node && !a.DryRun {
			<-ctx.Done()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.log = append(s.log, fmt.Sprintf("%s %.4s %v %v %v", node, a.To, a.Rollback, a.Once, a.Members["ejabberd"]))
		if s.refuses[node] == a.To {
			news.State, news.Failure = provision.OrderFailed, &provision.Failure{Code: "switch-start", Message: "component ejabberd of " + node + " does not start", Next: "Mend it"}
			return news
		}
		if !a.DryRun {
			s.current[node] = a.To
		}
		result = provision.SwitchResult{To: a.To}
	}
	news.Result, _ = json.Marshal(result)
	return news
}

// end follows the roll to its end and returns the states of its nodes.
func (l *lab) rollEnd() (states string, failure *provision.Failure) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	var last provision.Roll
	for r, err := range l.op.FollowRoll(ctx) {
		l.check(err)
		last = r
	}
	for _, n := range last.Nodes {
		states += n.Name + " " + string(n.State) + "; "
	}
	if !last.Ended {
		l.t.Fatalf("the roll did not end: %+v", last)
	}
	return states, last.Failure
}

// The nodes are switched one by one, the primary last, also by a disc host that
// was stopped in between.
func TestRollOverARestart(t *testing.T) {
	l := newLab(t, 3)
	s := &switched{l: l, current: map[string]string{}, hold: make(chan struct{})}
	s.live()
	if _, err := l.op.Roll(t.Context(), provision.RollRequest{Release: "2"}); err != nil {
		t.Fatal(err)
	}
	s.hold <- struct{}{}
	if _, err := l.op.Roll(t.Context(), provision.RollRequest{Release: "2"}); codeOf(err) != client.CodeNoRoll || !strings.Contains(err.Error(), "under way") {
		t.Errorf("a second roll: %v", err)
	}
	l.restart()
	close(s.hold)
	if states, f := l.rollEnd(); states != "node2 done; node3 done; node1 done; " || f != nil {
		t.Errorf("%s%v", states, f)
	}
	want := "node2 2222 false [ejabberd] [node1 node2 node3], node3 2222 false [] [node1 node2 node3], node1 2222 false [] [node1 node2 node3]"
	if got := strings.Join(slices.Compact(s.switches()), ", "); got != want {
		t.Errorf("it was ordered\n%s, want\n%s", got, want)
	}
	if _, err := l.op.Roll(t.Context(), provision.RollRequest{Release: "2"}); err == nil || !strings.Contains(err.Error(), "every node runs release 2 already") {
		t.Errorf("once more: %v", err)
	}
}

// Where one node does not get there, or does not work there, those before it go
// back and those after it stay.
func TestRollTurnsRound(t *testing.T) {
	for name, c := range map[string]struct {
		refuses map[string]string
		dies    string // a node that is not heard of again
		silent  string // a node whose files cannot be had once it runs the release
		states  string
		log     string
		says    string
	}{
		"it does not start": {map[string]string{"node3": release2}, "", "", "node2 returned; node3 kept; node1 waiting; ", "node2 2222, node3 2222, node2 inst", "component ejabberd of node3 does not start"},
		"it does not work":  {nil, "", "node3", "node2 returned; node3 returned; node1 waiting; ", "node2 2222, node3 2222, node3 inst, node2 inst", "node node3 runs the release and does not work"},
		"it cannot go back": {map[string]string{"node3": release2, "node2": provision.Installed}, "", "", "node2 lost; node3 kept; node1 waiting; ", "node2 2222, node3 2222, node2 inst", "component ejabberd of node3 does not start"},
		"it dies":           {nil, "node3", "", "node2 returned; node3 lost; node1 waiting; ", "node2 2222, node2 inst", "node node3 does not say within 5s"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &switched{current: map[string]string{}, refuses: c.refuses, dies: c.dies}
			l := newLab(t, 3, func(l *lab) {
				l.switching, l.proving = 5*time.Second, 2*time.Second
				l.others = func(_ context.Context, k probe.Kind, o probe.Options) (time.Duration, error) {
					if k == probe.Upload && o.From.Node == c.silent && s.runs(c.silent) == release2 {
						return 0, errors.New("no files at " + c.silent)
					}
					return time.Millisecond, nil
				}
			})
			s.l = l
			s.live()
			plans, err := l.op.PlanRoll(t.Context(), provision.RollRequest{})
			if err != nil || len(plans) != 3 || plans[0].Node != "node2" {
				t.Errorf("%+v, %v", plans, err)
			}
			s.mu.Lock()
			s.log = nil
			s.mu.Unlock()
			if _, err := l.op.Roll(t.Context(), provision.RollRequest{}); err != nil {
				t.Fatal(err)
			}
			states, f := l.rollEnd()
			if states != c.states || f == nil || !strings.Contains(f.Message, c.says) {
				t.Errorf("%s%v, want %s%s", states, f, c.states, c.says)
			}
			var got []string
			for _, line := range s.switches() {
				f := strings.Fields(line)
				got = append(got, f[0]+" "+f[1])
			}
			if strings.Join(got, ", ") != c.log {
				t.Errorf("it was ordered %v, want %s", got, c.log)
			}
		})
	}
}
