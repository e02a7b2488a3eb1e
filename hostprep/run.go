package hostprep

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	// Person: only a person can put it right, Apply would change nothing. OK
	// is false.
	Person bool
}

// Step is one part of the preparation. Check changes nothing and returns what
// it looked at, right or not. Apply makes right what deviates, writes every
// former state into the journal first, and may be called again after it was
// cut off at any point; it is nil where every deviation is one for a person.
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
	Drift   Outcome = "drift"   // it deviates: it was only looked at, or a person has to put it right
	Failed  Outcome = "failed"
)

// Result is how one step went.
type Result struct {
	Step     string
	Outcome  Outcome
	Before   []Finding // of the first check, where Apply changed something
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
		return s.look(ctx)
	})
}

// Apply checks every step in order, applies what deviates and checks again.
// All steps are tried; the error is a *provision.Failure that names the ones
// that failed. What waits for a reboot or for a person is told, and is no
// failure: where a service needs it, the step that brings the service fails.
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
		case Drift:
			rep.Logf("host: %s: a person has to put right: %s", r.Step, deviation(r.Deviations()))
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

// look checks: the outcome is OK, Reboot, Drift or Failed.
func (s Step) look(ctx context.Context) Result {
	r := Result{Outcome: OK}
	r.Findings, r.Reason = s.Check(ctx)
	switch bad := r.Deviations(); {
	case r.Reason != nil:
		r.Outcome = Failed
	case len(bad) > 0 && !slices.ContainsFunc(bad, func(f Finding) bool { return !f.Boot }):
		r.Outcome = Reboot
	case len(bad) > 0:
		r.Outcome = Drift
	}
	return r
}

func (s Step) apply(ctx context.Context, j *Journal) Result {
	r := s.look(ctx)
	// A check that could not look is also a reason to apply: what it asks may
	// not run yet.
	if s.Apply == nil || r.Reason == nil && !slices.ContainsFunc(r.Deviations(), Finding.forApply) {
		return r
	}
	why, before := r.Reason, r.Findings
	if err := s.Apply(ctx, j); err != nil {
		r.Outcome, r.Reason, r.Before = Failed, errors.Join(err, why), before
		return r
	}
	r = s.look(ctx)
	r.Before = before
	if left := slices.DeleteFunc(r.Deviations(), func(f Finding) bool { return !f.forApply() }); len(left) > 0 && r.Reason == nil {
		r.Outcome, r.Reason = Failed, errors.New(deviation(left))
	}
	if r.Outcome == OK {
		r.Outcome = Changed
	}
	return r
}

// forApply tells whether Apply should put it right.
func (f Finding) forApply() bool { return !f.OK && !f.Boot && !f.Person }

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
