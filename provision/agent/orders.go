package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"platter/provision"
)

const (
	// maxTries is how often an order is begun at most, unless it is bound to succeed:
	// one that takes the host down each time must not do so for ever.
	maxTries = 10
	// keptOutcomes bounds the ended orders in the file; the disc host has them
	// long before so many came.
	keptOutcomes = 8
)

// task is an order as it is carried out.
type task struct {
	provision.Order
	Try int // from 1; above it the order was begun before and cut off
}

// progress says what an order is doing and, where total is not 0, how far it
// is. Calls are cheap.
type progress func(line string, done, total int64)

// orderKind carries out the orders of one kind.
type orderKind struct {
	// do returns a result that is marshalled to JSON, or an error; one that is
	// no *provision.Failure gets a name.
	do     func(ctx context.Context, t task, say progress) (result any, err error)
	within time.Duration // then ctx ends
	// bound tells of an order that was begun whether others rely on its success by now:
	// then no error, no panic and no number of tries ends it. nil: never.
	bound func(provision.Order) bool
}

// orderReporter is what the end of an order is said to; client.Reporter is one.
type orderReporter interface {
	Logf(format string, args ...any)
	Order(provision.OrderNews)
	Flush(context.Context) error
}

// orders carries out what the disc host orders, one after the other.
type orders struct {
	path  string // the file that knows what was begun and how it ended
	kinds map[provision.OrderKind]orderKind
	// next asks the disc host, see client.Node.
	next   func(ctx context.Context, member bool) (*provision.Order, error)
	rep    orderReporter
	log    io.Writer       // for what is too long to be reported
	member context.Context // ends when the node is past provision.StageJoining
	retry  time.Duration   // at most, between questions that fail

	records []record
}

// record is one order in the file. It is there before the order is begun, and
// its end before that is reported.
type record struct {
	Order provision.Order      `json:"order"`
	Tries int                  `json:"tries"`
	End   *provision.OrderNews `json:"end,omitempty"`
}

// same tells orders of two journals apart, whose ids may be the same.
func (r record) same(o provision.Order) bool {
	return r.Order.ID == o.ID && r.Order.Kind == o.Kind && r.Order.Created.Equal(o.Created)
}

// run carries out orders until ctx ends. What that cuts off goes on at the next
// start, with or without a disc host.
func (o *orders) run(ctx context.Context) {
	if err := o.load(); err != nil {
		o.rep.Logf("orders: %v: what was begun before is not known any more", err)
	}
	failures, told := 0, int64(0)
	for ctx.Err() == nil {
		if i := slices.IndexFunc(o.records, o.mayGoOn); i >= 0 {
			o.carryOut(ctx, o.records[i].Order)
			continue
		}
		order, err := o.ask(ctx)
		if ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, errMember):
			continue
		case err != nil:
			if failures == 0 {
				fmt.Fprintf(o.log, "orders: the disc host cannot be asked: %v\n", err)
			}
			o.pause(ctx, failures)
			failures++
			continue
		}
		failures = 0
		if order == nil {
			continue
		}
		i := slices.IndexFunc(o.records, func(r record) bool { return r.same(*order) })
		if i < 0 || o.records[i].End == nil {
			o.carryOut(ctx, *order)
			continue
		}
		// It was carried out and the report of it was lost.
		if told == order.ID {
			o.pause(ctx, 9) // ... or is not understood there
		}
		told = order.ID
		o.rep.Logf("orders: %s had ended already", order)
		o.rep.Order(*o.records[i].End)
	}
}

// errMember ends a question: the node may take other orders now.
var errMember = errors.New("the node has become a member of the cluster")

// ask waits for an order, until the node becomes a member. The disc host has
// everything before that is said here: only what it then still wants is open.
func (o *orders) ask(ctx context.Context) (*provision.Order, error) {
	member := o.isMember()
	short, cancel := context.WithCancel(ctx)
	defer cancel()
	if !member {
		defer context.AfterFunc(o.member, cancel)()
	}
	err := o.rep.Flush(short)
	var order *provision.Order
	if err == nil {
		order, err = o.next(short, member)
	}
	if err != nil && !member && o.isMember() {
		err = errMember
	}
	return order, err
}

func (o *orders) isMember() bool { return o.member.Err() != nil }

// mayGoOn tells whether r was begun, has not ended, and need not wait.
func (o *orders) mayGoOn(r record) bool {
	return r.End == nil && (o.isMember() || r.Order.Kind.Early())
}

// pause waits after failure n, from 0: longer and longer, with jitter so that
// a rack does not ask in step.
func (o *orders) pause(ctx context.Context, n int) {
	d := min(o.retry, 500*time.Millisecond<<min(n, 9))
	provision.Sleep(ctx, d/2+rand.N(d/2+1))
}

// carryOut begins an order, or begins it again, and reports its end.
func (o *orders) carryOut(ctx context.Context, order provision.Order) {
	i := slices.IndexFunc(o.records, func(r record) bool { return r.same(order) })
	if i < 0 {
		o.forget()
		i = len(o.records)
		o.records = append(o.records, record{Order: order})
	}
	o.records[i].Tries++
	t := task{order, o.records[i].Tries}
	end := &provision.OrderNews{ID: order.ID, State: provision.OrderFailed}
	if err := o.save(); err != nil && !o.bound(order) {
		end.Failure = &provision.Failure{Code: "order-record", Next: "Look at the disk's free space and health, then give the order again",
			Message: fmt.Sprintf("%s was not begun, because the node could not note that down: %v", order, err)}
	} else {
		o.rep.Logf("orders: %s begins%s", order, again(t.Try))
		result, err := o.do(ctx, t)
		switch {
		case err == nil:
			end.State, end.Result = provision.OrderDone, result
		case ctx.Err() != nil:
			return // goes on at the next start
		case o.bound(order):
			o.rep.Logf("orders: %s has to succeed, and is tried again: %v", order, orderFailure(order, err))
			o.pause(ctx, t.Try)
			return
		default:
			end.Failure = orderFailure(order, err)
		}
	}
	o.records[i].End = end
	if err := o.save(); err != nil {
		o.rep.Logf("orders: %v: if this host restarts now, %s may be carried out again", err, order)
	}
	if end.Failure != nil {
		o.rep.Logf("orders: %s failed: %v", order, end.Failure)
	} else {
		o.rep.Logf("orders: %s is done", order)
	}
	o.rep.Order(*end)
}

func again(try int) string {
	if try == 1 {
		return ""
	}
	return fmt.Sprintf(" again: it was cut off %d times", try-1)
}

func (o *orders) bound(order provision.Order) bool {
	k := o.kinds[order.Kind]
	return k.bound != nil && k.bound(order)
}

// do calls the kind's function. A panic is an error.
func (o *orders) do(ctx context.Context, t task) (result json.RawMessage, err error) {
	kind, known := o.kinds[t.Kind]
	switch {
	case !known:
		var names []string
		for k := range o.kinds {
			names = append(names, string(k))
		}
		slices.Sort(names)
		return nil, &provision.Failure{Code: "order-unknown",
			Message: fmt.Sprintf("this node's program is older than the disc host's: it does not know the order %.64q, only %s", t.Kind, strings.Join(names, ", ")),
			Next:    "Reinstall the node with an image built by the disc host's version"}
	case t.Try > maxTries && !o.bound(t.Order):
		return nil, &provision.Failure{Code: "order-broken",
			Message: fmt.Sprintf("%s was begun %d times and cut off each time", t.Order, t.Try-1),
			Next:    "Look at 'journalctl -u platter-agent' and the node's console for what ends it"}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, kind.within, &provision.Failure{Code: "order-timeout",
		Message: fmt.Sprintf("%s did not end within %s", t.Order, kind.within), Next: "Look at 'journalctl -u platter-agent' on the node, then give the order again"})
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(o.log, "orders: %s: panic: %v\n%s", t.Order, p, debug.Stack())
			result, err = nil, &provision.Failure{Code: "order-panic",
				Message: fmt.Sprintf("%s met a mistake in the node's program: %v", t.Order, p),
				Next:    "Keep 'journalctl -u platter-agent' of the node for those who maintain the program"}
		}
	}()
	say := func(line string, done, total int64) {
		o.rep.Order(provision.OrderNews{ID: t.ID, Line: line, Done: done, Total: total})
	}
	v, err := kind.do(ctx, t, say)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	if v == nil {
		return nil, nil
	}
	result, err = json.Marshal(v)
	if err == nil && len(result) > provision.MaxOrderResult {
		err = &provision.Failure{Code: "order-result",
			Message: fmt.Sprintf("%s was carried out, but its result has %d bytes, more than the %d that are reported", t.Order, len(result), provision.MaxOrderResult),
			Next:    "Look at the node itself for what it found"}
	}
	if err != nil {
		return nil, err
	}
	return result, nil
}

func orderFailure(order provision.Order, err error) *provision.Failure {
	var f *provision.Failure
	if errors.As(err, &f) {
		return f
	}
	return &provision.Failure{Code: "order-failed", Message: fmt.Sprintf("%s: %v", order, err), Next: "Look at 'journalctl -u platter-agent' on the node"}
}

func (o *orders) load() error {
	o.records = nil
	b, err := os.ReadFile(o.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, &o.records)
	}
	if err != nil {
		o.records = nil
		return fmt.Errorf("%s: %w", o.path, err)
	}
	return nil
}

// forget drops the oldest of many ended orders.
func (o *orders) forget() {
	ended := 0
	for _, r := range o.records {
		if r.End != nil {
			ended++
		}
	}
	o.records = slices.DeleteFunc(o.records, func(r record) bool {
		if r.End == nil || ended <= keptOutcomes {
			return false
		}
		ended--
		return true
	})
}

// save writes the file, durably.
func (o *orders) save() error {
	b, err := json.Marshal(o.records)
	if err != nil {
		return err
	}
	dir := filepath.Dir(o.path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := renameio.WriteFile(o.path, b, 0o600, renameio.WithTempDir(dir)); err != nil {
		return fmt.Errorf("%s: %w", o.path, err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
