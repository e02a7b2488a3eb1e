package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/accept"
	"platter/provision/client"
)

// An acceptance is refused where it makes no sense. What it does to the rack it
// takes back, also when whoever asked for it goes away in the middle.
func TestAcceptance(t *testing.T) {
	l := newLab(t, 2)
	try := func(ctx context.Context, o accept.Options) (lines []client.AcceptNews, err error) {
		for n, err := range l.op.Accept(ctx, o) {
			if err != nil {
				return lines, err
			}
			lines = append(lines, n)
		}
		return lines, nil
	}
	if _, err := try(t.Context(), accept.Options{Users: 1, Lost: -1}); err == nil || !strings.Contains(err.Error(), "1 users: must be") || !strings.Contains(err.Error(), "negative") {
		t.Errorf("%v", err)
	}
	n1, n2 := l.installed(1), l.installed(2)
	facts := map[string]string{provision.FactRunning: "node1,node2", provision.FactDown: ""}
	for _, c := range []*client.Node{n1, n2} {
		l.report(c, provision.Report{Stage: provision.StageProbing}, provision.Report{Facts: facts})
	}
	l.await("node1", is(provision.StageReady))
	l.await("node2", is(provision.StageReady))

	// node2 cannot be diagnosed; node1 makes accounts until it is told to go on.
	making, goOn, over := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var asked []provision.LoadAccountsArgs
	ctx, leave := context.WithCancel(t.Context())
	serve := func(c *client.Node, do func(provision.Order) (any, *provision.Failure), until func() bool) {
		rep := client.NewReporter(nil)
		rep.Attach(c)
		defer rep.Close()
		for !until() {
			o, err := c.NextOrder(t.Context(), true)
			if err != nil || o == nil {
				t.Errorf("%v %v", o, err)
				return
			}
			end := provision.OrderNews{ID: o.ID, State: provision.OrderDone}
			result, failure := do(*o)
			if end.Failure = failure; failure != nil {
				end.State = provision.OrderFailed
			}
			end.Result, _ = json.Marshal(result)
			rep.Order(end)
			if err := rep.Flush(t.Context()); err != nil {
				t.Error(err)
				return
			}
		}
	}
	go func() {
		n := 0
		serve(n2, func(provision.Order) (any, *provision.Failure) {
			n++
			return nil, &provision.Failure{Code: "x", Message: "node2 cannot", Next: "Look"}
		}, func() bool { return n == 1 })
	}()
	go func() {
		defer close(over)
		serve(n1, func(o provision.Order) (any, *provision.Failure) {
			if o.Kind == provision.OrderDiagnose {
				return provision.Diagnosis{Host: []byte("[]")}, nil
			}
			var args provision.LoadAccountsArgs
			if err := json.Unmarshal(o.Args, &args); err != nil || o.Kind != provision.OrderLoadAccounts || strings.Contains(string(o.Args), l.host.Site.LoadSecret()) {
				t.Errorf("%s %s", o.Kind, o.Args)
			}
			asked = append(asked, args)
			if args.Users > 0 {
				close(making)
				<-goOn
			}
			return provision.LoadAccountsResult{}, nil
		}, func() bool { return len(asked) == 3 })
	}()
	left := make(chan error)
	go func() {
		_, err := try(ctx, accept.Options{Users: 10})
		left <- err
	}()
	<-making
	if _, err := l.probes(); !isCode(err, client.CodeProbing) {
		t.Errorf("probes meanwhile: %v", err)
	}
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(goOn)
	select {
	case <-over:
	case <-time.After(30 * time.Second):
		t.Fatalf("the accounts were not removed: %s", l.orders(""))
	}
	// All of an earlier run's, the users and two for each node, and all of this run's.
	if len(asked) != 3 || asked[0].Users != 0 || asked[1].Users != 10+4 || asked[2].Users != 0 {
		t.Errorf("%+v", asked)
	}
	l.host.probing.Lock() // the handler has ended
	defer l.host.probing.Unlock()

	// A cluster that is not whole is not tested.
	l.report(n2, provision.Report{Failure: &provision.Failure{Code: "stack-stopped", Message: "it stopped", Next: "Look"}})
	within := wholeWithin
	wholeWithin = 10 * time.Millisecond
	defer func() { wholeWithin = within }()
	if _, err := try(t.Context(), accept.Options{}); !isCode(err, client.CodeNotWhole) || !strings.Contains(err.Error(), "node2 has failed") {
		t.Errorf("%v", err)
	}
}

func isCode(err error, code string) bool {
	var e *client.Error
	return errors.As(err, &e) && e.Code == code
}

// The key that signs reports stays, and is told.
func TestSiteKey(t *testing.T) {
	l := newLab(t, 1)
	before, err := l.op.SiteKey(t.Context())
	l.check(err)
	l.restart()
	after, err := l.op.SiteKey(t.Context())
	l.check(err)
	key, err := l.host.Site.SigningKey()
	l.check(err)
	public, err := l.host.signingKey()
	l.check(err)
	if before != after || before.Key != public.String() {
		t.Errorf("%+v, %+v", before, after)
	}
	if err := accept.Verify(public, []byte("report"), accept.Sign(key, []byte("report"), "name")); err != nil {
		t.Error(err)
	}
}
