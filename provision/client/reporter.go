package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"platter/provision"
)

const (
	progressEvery  = 500 * time.Millisecond // pure progress is sent no faster
	heartbeatEvery = 30 * time.Second       // of silence, then an empty report
	// What is held while the disc host cannot be reached; past it the oldest
	// log lines go first.
	maxQueue     = 4096
	maxQueueSize = 4 << 20
)

// Reporter sends what a node says about itself, in order, in the background
// and for ever: a caller never waits and never handles an error. It may be
// used before the node is enrolled. Memory is bounded: while the disc host is
// away, progress overwrites itself and, at the limit, old log lines are
// dropped with a line that says so; stages, facts, failures and the ends of
// orders stay.
type Reporter struct {
	echo   io.Writer
	stream string // names this Reporter's batches

	mu         sync.Mutex
	queue      []provision.Report
	size       int                // bytes of text in queue, roughly
	dropped    int                // log lines lost since the last batch
	progress   *provision.Report  // newest pure progress, not sent yet
	progressAt time.Time          // when the last one was taken
	phase      provision.Report   // the current phase, repeated by progress
	sending    []provision.Report // the batch under way
	node       *Node
	err        error         // why the batch under way was not taken yet
	wake       chan struct{} // something to send; capacity 1
	moved      chan struct{} // closed and replaced when a batch was taken
	stop       context.CancelFunc
	done       chan struct{}
}

// NewReporter makes a Reporter that also prints lines, stages, phases and
// failures to echo.
func NewReporter(echo io.Writer) *Reporter {
	return &Reporter{echo: echo, stream: rand.Text(), wake: make(chan struct{}, 1), moved: make(chan struct{})}
}

// Attach starts sending as n. A second Attach goes on as another node.
func (r *Reporter) Attach(n *Node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.node = n
	if r.done != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop, r.done = cancel, make(chan struct{})
	go func(done chan struct{}) {
		defer close(done)
		r.send(ctx)
	}(r.done)
}

// Close stops sending at once; call Flush first.
func (r *Reporter) Close() {
	r.mu.Lock()
	stop, done := r.stop, r.done
	r.mu.Unlock()
	if done != nil {
		stop()
		<-done
	}
}

// Stage says where the node is now.
func (r *Reporter) Stage(s provision.Stage) {
	r.print("== %s", s)
	r.add(provision.Report{Stage: s}, true)
}

// Phase says which step of the stage begins, the n-th of of.
func (r *Reporter) Phase(name string, n, of int) {
	r.print("[%d/%d] %s", n, of, name)
	r.add(provision.Report{Phase: name, PhaseN: n, PhaseOf: of}, true)
}

// Progress counts bytes of the current phase. Calls are cheap: at most two a
// second are sent. A total of 0 is a sign of life only.
func (r *Reporter) Progress(done, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var p provision.Report
	if total > 0 {
		p = r.phase // so that a disc host that was restarted knows it too
	}
	p.Time, p.Done, p.Total = r.now(), done, total
	if r.progress == nil {
		r.signal()
	} else {
		p.Order = r.progress.Order
	}
	r.progress = &p
}

// Logf adds one line to the node's log.
func (r *Reporter) Logf(format string, args ...any) {
	line := strings.ToValidUTF8(strings.TrimSpace(fmt.Sprintf(format, args...)), "\uFFFD")
	if line == "" {
		return
	}
	r.print("%s", line)
	if len(line) > MaxLogLine {
		line = strings.ToValidUTF8(line[:MaxLogLine-len(" …")], "") + " …"
	}
	r.add(provision.Report{Log: line}, false)
}

// Facts adds what the node found to what is known of it.
func (r *Reporter) Facts(facts map[string]string) {
	copied := make(map[string]string, len(facts))
	for k, v := range facts {
		copied[k] = v
	}
	r.add(provision.Report{Facts: copied}, false)
}

// Order says how far an order is, or how it ended. Of progress the newest is
// sent, at most twice a second.
func (r *Reporter) Order(n provision.OrderNews) {
	if n.State != "" {
		r.add(provision.Report{Order: &n}, false)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.progress == nil {
		r.progress = &provision.Report{Time: r.now()}
		r.signal()
	}
	r.progress.Order = &n
}

// Fail says that the node stopped, why and what to do.
func (r *Reporter) Fail(f *provision.Failure) {
	r.print("failed: %s", f.Error())
	r.add(provision.Report{Failure: f}, false)
}

// Flush waits until the disc host has everything said so far. When ctx ends
// first it returns why the disc host does not take it.
func (r *Reporter) Flush(ctx context.Context) error {
	for {
		r.mu.Lock()
		empty := len(r.queue) == 0 && r.progress == nil && r.sending == nil
		moved, err, attached := r.moved, r.err, r.node != nil
		r.mu.Unlock()
		if empty {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			if !attached {
				err = errors.New("the node is not enrolled")
			}
			return fmt.Errorf("reports were not all sent: %w", errors.Join(ctx.Err(), err))
		}
	}
}

func (r *Reporter) print(format string, args ...any) {
	if r.echo != nil {
		fmt.Fprintf(r.echo, format+"\n", args...)
	}
}

// now is called with mu held.
func (r *Reporter) now() time.Time {
	if r.node != nil {
		return r.node.Time()
	}
	return time.Now()
}

func (r *Reporter) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// add queues one report. step: a stage or phase begins, so progress of the one
// before says nothing any more.
func (r *Reporter) add(rep provision.Report, step bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rep.Time = r.now()
	if step {
		r.phase = provision.Report{Phase: rep.Phase, PhaseN: rep.PhaseN, PhaseOf: rep.PhaseOf}
		if r.progress != nil && r.progress.Order != nil {
			r.progress = &provision.Report{Time: rep.Time, Order: r.progress.Order}
		} else {
			r.progress = nil
		}
	}
	r.queue = append(r.queue, rep)
	r.size += weight(rep)
	if len(r.queue) > maxQueue || r.size > maxQueueSize {
		r.shrink()
	}
	r.signal()
}

// shrink drops the oldest lines, a quarter of what may be held at a time. What
// must not be lost stays: its number is small by nature.
func (r *Reporter) shrink() {
	left := len(r.queue)
	r.queue = slices.DeleteFunc(r.queue, func(rep provision.Report) bool {
		if !isLine(rep) || left <= maxQueue*3/4 && r.size <= maxQueueSize*3/4 {
			return false
		}
		left--
		r.size -= weight(rep)
		r.dropped++
		return true
	})
}

func isLine(rep provision.Report) bool {
	return rep.Stage == "" && rep.Phase == "" && rep.Failure == nil && len(rep.Facts) == 0 && rep.Order == nil
}

// weight estimates the bytes of rep as JSON, from above for ordinary text.
func weight(rep provision.Report) int {
	n := 256 + 2*len(rep.Log) + len(rep.Phase)
	for k, v := range rep.Facts {
		n += 2*(len(k)+len(v)) + 8
	}
	if rep.Failure != nil {
		n += 2 * (len(rep.Failure.Message) + len(rep.Failure.Next))
	}
	if o := rep.Order; o != nil {
		n += len(o.Result) + 2*len(o.Line)
		if o.Failure != nil {
			n += 2 * (len(o.Failure.Message) + len(o.Failure.Next))
		}
	}
	return n
}

// send delivers batch after batch until ctx ends.
func (r *Reporter) send(ctx context.Context) {
	for seq := 1; ; seq++ {
		batch := r.next(ctx)
		if batch == nil {
			return
		}
		r.deliver(ctx, fmt.Sprintf("%s:%d", r.stream, seq), batch)
		if ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		r.sending, r.err = nil, nil
		close(r.moved)
		r.moved = make(chan struct{})
		r.mu.Unlock()
	}
}

// next waits for something to send and takes it; nil when ctx ended.
func (r *Reporter) next(ctx context.Context) []provision.Report {
	quiet := time.NewTimer(heartbeatEvery)
	defer quiet.Stop()
	due := time.NewTimer(0)
	defer due.Stop()
	beat := false
	for ctx.Err() == nil {
		batch, wait := r.take(beat)
		if batch != nil {
			return batch
		}
		due.Reset(wait)
		select {
		case <-r.wake:
		case <-due.C:
		case <-quiet.C:
			beat = true
		case <-ctx.Done():
		}
	}
	return nil
}

// take moves one batch from the queue to sending. beat asks for an empty
// report where there is nothing else. Where there is nothing to send, wait
// says when to look again unasked.
func (r *Reporter) take(beat bool) (batch []provision.Report, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dropped > 0 {
		batch = append(batch, provision.Report{Time: r.now(),
			Log: fmt.Sprintf("%d log lines were dropped while the disc host could not be reached", r.dropped)})
		r.dropped = 0
	}
	size, n := 0, 0
	for ; n < len(r.queue) && n < MaxBatch-2; n++ {
		w := weight(r.queue[n])
		if n > 0 && size+w > MaxBatchSize/2 {
			break
		}
		size += w
		batch = append(batch, r.queue[n])
	}
	r.queue = slices.Delete(r.queue, 0, n)
	r.size -= size
	wait = heartbeatEvery
	if r.progress != nil && len(r.queue) == 0 {
		if wait = progressEvery - time.Since(r.progressAt); wait <= 0 {
			batch = append(batch, *r.progress)
			r.progress, r.progressAt = nil, time.Now()
		}
	}
	if len(batch) == 0 && beat {
		batch = append(batch, provision.Report{Time: r.now()})
	}
	r.sending = batch
	return batch, wait
}

// deliver sends one batch until the server has taken it. Only a batch that the
// server calls malformed is given up: an identity that is refused now may
// count again when the operator withdraws a reinstall.
func (r *Reporter) deliver(ctx context.Context, id string, batch []provision.Report) {
	said := ""
	for n := 0; ; n++ {
		r.mu.Lock()
		node := r.node
		r.mu.Unlock()
		err := node.report(ctx, id, batch)
		if err == nil {
			if said != "" {
				r.print("reports reach the disc host again")
			}
			return
		}
		if ctx.Err() != nil {
			return
		}
		var e *Error
		if errors.As(err, &e) && (e.Status == http.StatusBadRequest || e.Status == http.StatusRequestEntityTooLarge) {
			r.print("the disc host refused %d reports, they are lost: %v", len(batch), err)
			return
		}
		if said != err.Error() {
			said = err.Error()
			r.print("reports wait for the disc host: %v", err)
		}
		r.mu.Lock()
		r.err = err
		r.mu.Unlock()
		if provision.Sleep(ctx, backoff(n)) != nil {
			return
		}
	}
}

// backoff is the pause after failure n, from 0: a quarter of a second,
// doubling to 16 s, with jitter so that a rack does not ask in step.
func backoff(n int) time.Duration {
	d := 250 * time.Millisecond << min(n, 6)
	return d/2 + mrand.N(d)
}
