package dischost

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/stack/probe"
)

// probes runs the operator's command and returns what it found, in words.
func (l *lab) probes(nodes ...string) (found []string, err error) {
	for r, err := range l.op.ProbeStack(l.t.Context(), nodes...) {
		if err != nil {
			return found, err
		}
		line := r.Probe + " " + r.From + " " + r.To
		if r.Failure != nil {
			line += " " + r.Failure.Code
		} else if r.Micros <= 0 {
			l.t.Errorf("%s took no time", line)
		}
		found = append(found, line)
	}
	return found, nil
}

// Every node logs in; those that do form a ring in which each is probed with
// the next one.
func TestProbeStack(t *testing.T) {
	l := newLab(t, 4)
	for i := range 3 {
		l.report(l.enrol(i+1), provision.Report{Stage: provision.StageInstalled}, provision.Report{Stage: provision.StageProbing})
	}
	for _, n := range []string{"node1", "node2", "node3"} {
		l.await(n, is(provision.StageReady))
	}
	users := l.host.Site.Probes()
	l.others = func(_ context.Context, kind probe.Kind, o probe.Options) (time.Duration, error) {
		if o.From.Account != users[0] || o.To.Account != users[1] || o.Domain != "im.example.org" || o.From.Addr.Port() != 5222 {
			return 0, fmt.Errorf("asked with %+v", o)
		}
		switch {
		case kind == probe.Login && o.From.Node == "node2":
			return 0, &provision.Failure{Code: "probe-connect", Message: "m", Next: "n"}
		case kind == probe.Upload && o.From.Node == "node3":
			return 0, &provision.Failure{Code: "probe-upload", Message: "m", Next: "n"}
		}
		return time.Millisecond, nil
	}
	want := []string{"login node1 ", "login node2  probe-connect", "login node3 ", "login node4  probe-not-installed",
		"message node1 node3", "offline node1 node3", "group-chat node1 node3", "archive node1 node3", "upload node1 ",
		"message node3 node1", "offline node3 node1", "group-chat node3 node1", "archive node3 node1", "upload node3  probe-upload"}
	if got, err := l.probes(); err != nil || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%v\n%s", err, strings.Join(got, "\n"))
	}
	if got, err := l.probes("node3", "node1"); err != nil || len(got) != 12 || got[0] != "login node3 " || got[2] != "message node3 node1" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := l.probes("node1", "node1"); err != nil || len(got) != 6 || got[1] != "message node1 " {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := l.probes("node1", "node9"); codeOf(err) != client.CodeUnknownNode {
		t.Errorf("a node that there is not: %v", err)
	}
}

// One run at a time; it ends with whoever asked for it, and with the disc host.
func TestProbeStackOnce(t *testing.T) {
	l := newLab(t, 1)
	l.report(l.enrol(1), provision.Report{Stage: provision.StageInstalled}, provision.Report{Stage: provision.StageProbing})
	l.await("node1", is(provision.StageReady))
	inside, goOn := make(chan bool, 9), make(chan bool)
	l.others = func(ctx context.Context, _ probe.Kind, _ probe.Options) (time.Duration, error) {
		inside <- true
		select {
		case <-goOn:
			return time.Millisecond, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	ended := make(chan error)
	go func() {
		_, err := l.probes()
		ended <- err
	}()
	<-inside
	if _, err := l.probes(); codeOf(err) != client.CodeProbing {
		t.Errorf("a second run: %v", err)
	}
	close(goOn)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if got, err := l.probes(); err != nil || len(got) != 6 {
		t.Errorf("afterwards: %v, %v", got, err)
	}

	goOn = make(chan bool)
	for len(inside) > 0 {
		<-inside
	}
	go func() {
		_, err := l.probes()
		ended <- err
	}()
	<-inside
	l.stop()
	if err := <-ended; err == nil {
		t.Error("probes that the disc host did not finish look as if it did")
	}
}
