package hostprep

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"platter/provision"
)

// Finding is what a check saw.
type Finding struct {
	OK   bool
	Is   string // what is; goes into the facts of the node
	Want string // what should be
	Why  string // why it should, with the source; for people
}

// Step is one part of the preparation. Check changes nothing. Apply may be
// called again after it was cut off at any point; it is nil for what only a
// person can put right.
type Step struct {
	Name  string
	Check func(ctx context.Context) (Finding, error)
	Apply func(ctx context.Context) error
	// Next is what the operator does when the step cannot be put right.
	Next string
}

// Outcome of a step.
type Outcome string

const (
	OK      Outcome = "ok"
	Changed Outcome = "changed"
	Failed  Outcome = "failed"
)

// Result is how one step went.
type Result struct {
	Step    string
	Outcome Outcome
	Finding Finding // of the last check
	Reason  error   // when failed
	Took    time.Duration
}

// Progress hears what happens; client.Reporter is one.
type Progress interface {
	Phase(name string, n, of int)
	Logf(format string, args ...any)
	Facts(facts map[string]string)
}

// Run checks every step in order, applies what deviates and checks again. All
// steps are tried; the error is a *provision.Failure that names the ones that
// failed.
func Run(ctx context.Context, steps []Step, rep Progress) ([]Result, error) {
	var results []Result
	facts := map[string]string{}
	var reasons []string
	next := ""
	for i, s := range steps {
		rep.Phase(s.Name, i+1, len(steps))
		began := time.Now()
		r := one(ctx, s)
		r.Took = time.Since(began)
		if ctx.Err() != nil {
			return results, ctx.Err()
		}
		results = append(results, r)
		facts["host_"+s.Name] = string(r.Outcome)
		facts["host_"+s.Name+"_ms"] = fmt.Sprint(r.Took.Milliseconds())
		if r.Finding.Is != "" {
			facts["host_"+s.Name+"_is"] = r.Finding.Is
		}
		switch r.Outcome {
		case Changed:
			rep.Logf("host: %s: changed, now %s", s.Name, r.Finding.Is)
		case Failed:
			rep.Logf("host: %s: failed: %v", s.Name, r.Reason)
			reasons = append(reasons, fmt.Sprintf("%s: %v", s.Name, r.Reason))
			if next == "" {
				next = s.Next
			}
		}
	}
	rep.Facts(facts)
	if len(reasons) == 0 {
		return results, nil
	}
	if next == "" {
		next = "Look at 'journalctl -u platter-agent' on the node"
	}
	return results, &provision.Failure{Code: "host-check",
		Message: "The host is not as it should be: " + strings.Join(reasons, "; "), Next: next}
}

func one(ctx context.Context, s Step) Result {
	r := Result{Step: s.Name, Outcome: Failed}
	r.Finding, r.Reason = s.Check(ctx)
	if r.Reason == nil && r.Finding.OK {
		r.Outcome = OK
		return r
	}
	if s.Apply == nil {
		if r.Reason == nil {
			r.Reason = r.Finding.deviation()
		}
		return r
	}
	// A check that could not look is also a reason to apply: what it asks may
	// not run yet.
	if err := s.Apply(ctx); err != nil {
		r.Reason = errors.Join(err, r.Reason)
		return r
	}
	r.Finding, r.Reason = s.Check(ctx)
	switch {
	case r.Reason != nil:
	case !r.Finding.OK:
		r.Reason = r.Finding.deviation()
	default:
		r.Outcome = Changed
	}
	return r
}

func (f Finding) deviation() error { return fmt.Errorf("is %s, should be %s", f.Is, f.Want) }
