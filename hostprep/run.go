package hostprep

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"platter/provision"
)

// Finding is one thing that a check looked at.
type Finding struct {
	What   string // its name, for example "sysctl net.core.somaxconn"
	OK     bool
	Is     string // what is
	Want   string // what should be
	Why    string // the reason, for people
	Source string // where the reason is written down
	// Boot: everything that can be done now is done, the next boot brings it
	// into effect. OK is false.
	Boot bool
}

// Step is one part of the preparation. Check changes nothing and returns what
// it looked at, right or not. Apply makes right what deviates, writes every
// former state into the journal first, and may be called again after it was
// cut off at any point; it is nil for what only a person can put right.
type Step struct {
	Name  string
	Check func(ctx context.Context) ([]Finding, error)
	Apply func(ctx context.Context, j *Journal) error
	// Next is what the operator does when the step cannot be put right.
	Next string
}

// Outcome of a step.
type Outcome string

const (
	OK      Outcome = "ok"
	Changed Outcome = "changed" // it deviated and was put right
	Reboot  Outcome = "reboot"  // as Changed, but the next boot has to bring it into effect
	Drift   Outcome = "drift"   // it deviates and was only looked at
	Failed  Outcome = "failed"
)

// Result is how one step went.
type Result struct {
	Step     string
	Outcome  Outcome
	Findings []Finding // of the last check
	Reason   error     // when failed
	Took     time.Duration
	Next     string // for the operator, when failed
}

// Deviations are the findings that are not as they should be.
func (r Result) Deviations() []Finding {
	var out []Finding
	for _, f := range r.Findings {
		if !f.OK {
			out = append(out, f)
		}
	}
	return out
}

// Progress hears what happens; client.Reporter is one.
type Progress interface {
	Phase(name string, n, of int)
	Logf(format string, args ...any)
	Facts(facts map[string]string)
}

// Check looks at every step and changes nothing. Its error is only that of
// ctx: a check that could not look is in its result.
func Check(ctx context.Context, steps []Step, rep Progress) ([]Result, error) {
	return each(ctx, steps, rep, func(ctx context.Context, s Step) Result {
		r := s.look(ctx)
		if r.Outcome == Drift && r.onlyBoot() {
			r.Outcome = Reboot
		}
		return r
	})
}

// Apply checks every step in order, applies what deviates and checks again.
// All steps are tried; the error is a *provision.Failure that names the ones
// that failed.
func Apply(ctx context.Context, steps []Step, j *Journal, rep Progress) ([]Result, error) {
	results, err := each(ctx, steps, rep, func(ctx context.Context, s Step) Result { return s.apply(ctx, j) })
	if err != nil {
		return results, err
	}
	facts := map[string]string{}
	var reasons []string
	next := ""
	for _, r := range results {
		facts["host_"+r.Step] = string(r.Outcome)
		facts["host_"+r.Step+"_ms"] = fmt.Sprint(r.Took.Milliseconds())
		if is := r.is(); is != "" {
			facts["host_"+r.Step+"_is"] = is
		}
		switch r.Outcome {
		case Changed:
			rep.Logf("host: %s: changed, now %s", r.Step, r.is())
		case Reboot:
			rep.Logf("host: %s: the next boot brings into effect: %s", r.Step, deviation(r.Deviations()))
		case Failed:
			rep.Logf("host: %s: failed: %v", r.Step, r.Reason)
			reasons = append(reasons, fmt.Sprintf("%s: %v", r.Step, r.Reason))
			if next == "" {
				next = r.Next
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

func each(ctx context.Context, steps []Step, rep Progress, do func(context.Context, Step) Result) ([]Result, error) {
	var results []Result
	for i, s := range steps {
		rep.Phase(s.Name, i+1, len(steps))
		began := time.Now()
		r := do(ctx, s)
		r.Step, r.Took = s.Name, time.Since(began)
		if r.Outcome == Failed {
			r.Next = s.Next
		}
		if ctx.Err() != nil {
			return results, ctx.Err()
		}
		results = append(results, r)
	}
	return results, nil
}

// look checks: the outcome is OK, Drift or Failed.
func (s Step) look(ctx context.Context) Result {
	r := Result{Outcome: Drift}
	r.Findings, r.Reason = s.Check(ctx)
	switch {
	case r.Reason != nil:
		r.Outcome = Failed
	case len(r.Deviations()) == 0:
		r.Outcome = OK
	}
	return r
}

func (s Step) apply(ctx context.Context, j *Journal) Result {
	r := s.look(ctx)
	if r.Outcome == OK {
		return r
	}
	before := r.Reason
	if r.Outcome == Drift && r.onlyBoot() {
		r.Outcome = Reboot
		return r
	}
	if s.Apply == nil {
		r.Outcome = Failed
		if r.Reason == nil {
			r.Reason = errors.New(deviation(r.Deviations()))
		}
		return r
	}
	// A check that could not look is also a reason to apply: what it asks may
	// not run yet.
	if err := s.Apply(ctx, j); err != nil {
		r.Outcome, r.Reason = Failed, errors.Join(err, before)
		return r
	}
	switch r = s.look(ctx); {
	case r.Outcome == OK:
		r.Outcome = Changed
	case r.Outcome == Drift && r.onlyBoot():
		r.Outcome = Reboot
	case r.Outcome == Drift:
		r.Outcome, r.Reason = Failed, errors.New(deviation(r.Deviations()))
	}
	return r
}

// onlyBoot tells whether nothing but a boot is missing.
func (r Result) onlyBoot() bool {
	for _, f := range r.Deviations() {
		if !f.Boot {
			return false
		}
	}
	return true
}

// is is what was found, in few words.
func (r Result) is() string {
	if len(r.Findings) == 1 {
		return r.Findings[0].Is
	}
	if bad := r.Deviations(); len(bad) > 0 {
		return deviation(bad)
	}
	if len(r.Findings) > 8 {
		return fmt.Sprintf("%d settings right", len(r.Findings))
	}
	var parts []string
	for _, f := range r.Findings {
		parts = append(parts, strings.TrimSpace(f.What+" "+f.Is))
	}
	return strings.Join(parts, ", ")
}

// deviation says in one line what is wrong.
func deviation(bad []Finding) string {
	var parts []string
	for i, f := range bad {
		if i == 5 {
			parts = append(parts, fmt.Sprintf("and %d more", len(bad)-i))
			break
		}
		parts = append(parts, strings.TrimSpace(fmt.Sprintf("%s is %s, should be %s", f.What, f.Is, f.Want)))
	}
	return strings.Join(parts, "; ")
}
