package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/client"
)

// orderDesk answers a socket as a disc host that has these orders; follow is
// what becomes of the one that is given, withdrawn tells which were taken back.
func orderDesk(t *testing.T, orders, follow []provision.OrderStatus) (socket string, given chan client.OrderRequest, withdrawn chan string) {
	t.Helper()
	socket, given, withdrawn = t.TempDir()+"/op.sock", make(chan client.OrderRequest, 2), make(chan string, 1)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/orders", func(w http.ResponseWriter, r *http.Request) {
		out := []provision.OrderStatus{}
		for _, o := range orders {
			if node := r.URL.Query().Get("node"); node == "" || node == o.Node {
				out = append(out, o)
			}
		}
		json.NewEncoder(w).Encode(out)
	})
	mux.HandleFunc("POST /v1/orders", func(w http.ResponseWriter, r *http.Request) {
		var req client.OrderRequest
		json.NewDecoder(r.Body).Decode(&req)
		given <- req
		json.NewEncoder(w).Encode(follow[0])
	})
	mux.HandleFunc("GET /v1/orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		for _, o := range follow {
			json.NewEncoder(w).Encode(o)
			http.NewResponseController(w).Flush()
		}
		if !follow[len(follow)-1].State.Final() {
			<-r.Context().Done()
		}
	})
	mux.HandleFunc("POST /v1/orders/{id}/withdraw", func(w http.ResponseWriter, r *http.Request) {
		withdrawn <- r.PathValue("id")
		json.NewEncoder(w).Encode(provision.OrderStatus{Order: provision.Order{ID: 5, Node: "node1", Kind: "load"}, State: provision.OrderWithdrawn})
	})
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket, given, withdrawn
}

func runIn(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(ctx, args, nil, &out, &errs)
	return code, out.String(), errs.String()
}

func TestNodeOrders(t *testing.T) {
	given := time.Now().Add(-3 * time.Minute)
	order := func(id int64, node string, state provision.OrderState) provision.OrderStatus {
		return provision.OrderStatus{Order: provision.Order{ID: id, Node: node, Kind: "load", Created: given, Deadline: given.Add(time.Hour)}, State: state, Since: given.Add(90 * time.Second)}
	}
	waiting, accepted, done, failed, withdrawn := order(1, "node1", provision.OrderWaiting), order(2, "node2", provision.OrderAccepted),
		order(3, "node1", provision.OrderDone), order(4, "node1", provision.OrderFailed), order(5, "node1", provision.OrderWithdrawn)
	accepted.Line, accepted.Done, accepted.Total = "making accounts", 1, 4
	failed.Failure = &provision.Failure{Code: "order-panic", Message: "it broke", Next: "Mend it"}
	withdrawn.Why = "an operator withdrew it"
	shown := done
	shown.Result = json.RawMessage(`{"accounts":7}`)
	socket, _, taken := orderDesk(t, []provision.OrderStatus{waiting, accepted, done, failed, withdrawn}, []provision.OrderStatus{shown})
	ctx := context.Background()
	for _, c := range []struct {
		args []string
		code int
		says []string
		not  string
	}{
		{nil, 0, []string{"ID", "withdrawn if node1 does not ask for it until", "making accounts (25 %)", "after 1m30s", "order-panic: it broke. Mend it", "an operator withdrew it", "3m0s"}, "{"},
		{[]string{"node2"}, 0, []string{"making accounts"}, "node1"},
		{[]string{"node2", "-o", "json"}, 0, []string{`"state": "accepted"`, `"id": 2`}, "node1"},
		{[]string{"-o", "xml"}, 1, []string{"table or json"}, "ID"},
		{[]string{"show", "3"}, 0, []string{`"accounts": 7`}, "node2"},
		{[]string{"show", "three"}, 1, []string{`"three" is not the number of an order`}, "ID"},
		{[]string{"withdraw", "5"}, 0, []string{"node1 will not do order 5 (load)"}, "ID"},
		{[]string{"withdraw", "0"}, 1, []string{"not the number of an order"}, "ID"},
	} {
		code, out, errs := runIn(ctx, append([]string{"node", "orders", "--socket", socket}, c.args...)...)
		for _, want := range c.says {
			if code != c.code || !strings.Contains(out+errs, want) || strings.Contains(out, c.not) {
				t.Errorf("%v: exit %d, %q not in:\n%s%s", c.args, code, want, out, errs)
			}
		}
	}
	if id := <-taken; id != "5" {
		t.Errorf("withdrew %s", id)
	}
}

func TestNodeDiagnose(t *testing.T) {
	found := func(ok bool, reason error, d provision.Diagnosis) provision.OrderStatus {
		r := hostprep.Result{Step: "sysctl", Outcome: hostprep.OK, Findings: []hostprep.Finding{{What: "vm.swappiness", OK: ok, Is: "60", Want: "10", Why: "VMs"}}}
		if !ok {
			r.Outcome = hostprep.Drift
		}
		if reason != nil {
			r.Outcome, r.Reason, r.Next = hostprep.Failed, reason, "Look"
		}
		var err error
		if d.Host, err = hostcmd.Marshal([]hostprep.Result{r}); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		return provision.OrderStatus{Order: provision.Order{ID: 9, Node: "node1"}, State: provision.OrderDone, Result: b}
	}
	waiting := provision.OrderStatus{Order: provision.Order{ID: 9, Node: "node1"}, State: provision.OrderWaiting}
	checking := waiting
	checking.State, checking.Line, checking.Done, checking.Total = provision.OrderAccepted, "checking sysctl", 1, 2
	ended := func(state provision.OrderState, why string, f *provision.Failure) provision.OrderStatus {
		o := waiting
		o.State, o.Why, o.Failure = state, why, f
		return o
	}
	for name, c := range map[string]struct {
		end  provision.OrderStatus
		code int
		says []string
	}{
		"clean":    {found(true, nil, provision.Diagnosis{Running: []string{"node1", "node2"}}), 0, []string{"as it should be: 1 steps", "node1 sees node1, node2 in the cluster, and misses nobody"}},
		"drift":    {found(false, nil, provision.Diagnosis{}), 3, []string{"vm.swappiness", "60", "1 of 1 things deviate"}},
		"failed":   {found(true, errors.New("no bus"), provision.Diagnosis{}), 1, []string{"sysctl failed: no bus. Look"}},
		"alone":    {found(true, nil, provision.Diagnosis{Running: []string{"node1"}, Down: []string{"node2"}}), 3, []string{"misses node2"}},
		"no stack": {found(true, nil, provision.Diagnosis{Stack: "refused"}), 3, []string{"messaging service of node1 does not answer: refused"}},
		"alarm":    {found(true, nil, provision.Diagnosis{Alarms: []string{"low: 4 % left"}}), 3, []string{"Alarm: low: 4 % left."}},
		"trouble":  {found(true, nil, provision.Diagnosis{Troubles: []string{"web on node node1 does not work"}}), 3, []string{"Trouble: web on node node1 does not work."}},
		"older":    {ended(provision.OrderFailed, "", &provision.Failure{Message: "this node's program is older", Next: "Reinstall it"}), 1, []string{"node1: this node's program is older. Reinstall it"}},
		"off":      {ended(provision.OrderWithdrawn, "node1 did not ask for it in time", nil), 1, []string{"order 9 was withdrawn: node1 did not ask for it in time. See 'platter node show node1'"}},
	} {
		socket, given, _ := orderDesk(t, nil, []provision.OrderStatus{waiting, checking, c.end})
		code, out, errs := runIn(t.Context(), "node", "diagnose", "node1", "--socket", socket)
		for _, want := range append(c.says, "order 9: waits for node1\norder 9: checking sysctl (50 %)\n") {
			if code != c.code || !strings.Contains(out+errs, want) {
				t.Errorf("%s: exit %d, %q not in:\n%s%s", name, code, want, out, errs)
			}
		}
		if req := <-given; req.Node != "node1" || req.Kind != provision.OrderDiagnose || req.Within != 120 || req.Args != nil {
			t.Errorf("%s: %+v", name, req)
		}
		if c.end.State != provision.OrderDone {
			continue
		}
		code, out, _ = runIn(t.Context(), "node", "diagnose", "node1", "-o", "json", "--socket", socket)
		var d provision.Diagnosis
		if err := json.Unmarshal([]byte(out), &d); err != nil || code != c.code || !strings.Contains(string(d.Host), "sysctl") {
			t.Errorf("%s: exit %d, %v: %s", name, code, err, out)
		}
	}
}

// A command that is interrupted takes back what the node has not begun.
func TestNodeDiagnoseInterrupted(t *testing.T) {
	waiting := provision.OrderStatus{Order: provision.Order{ID: 9, Node: "node1"}, State: provision.OrderWaiting}
	socket, given, withdrawn := orderDesk(t, nil, []provision.OrderStatus{waiting})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan string)
	said, errs := io.Pipe()
	go func() {
		code := run(ctx, []string{"node", "diagnose", "node1", "--socket", socket}, nil, io.Discard, errs)
		ended <- fmt.Sprint(code)
		errs.Close()
	}()
	lines := bufio.NewScanner(said)
	if !lines.Scan() || !strings.Contains(lines.Text(), "waits for node1") {
		t.Fatal(lines.Text())
	}
	cancel()
	if !lines.Scan() || !strings.Contains(lines.Text(), "interrupted") {
		t.Error(lines.Text())
	}
	if code := <-ended; code != "1" {
		t.Error(code)
	}
	select {
	case id := <-withdrawn:
		if id != "9" {
			t.Errorf("withdrew %s", id)
		}
	default:
		t.Errorf("%+v goes on", <-given)
	}
}
