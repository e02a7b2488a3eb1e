package stack

import (
	"context"
	"errors"
	"slices"
	"time"

	"platter/hostprep"
	"platter/provision"
)

// Outage ends all programs of the node's components at once, as a power cut
// would, and starts them again after d, in their order. say hears what happens.
// Where ctx ends it, the components stay as they are: call Start.
func Outage(ctx context.Context, plan provision.Plan, d time.Duration, say func(line string)) error {
	sd, err := hostprep.DialSystemd(ctx)
	if err != nil {
		return err
	}
	defer sd.Close()
	say("the service is ended")
	units := unitsHere(plan)
	for _, u := range units {
		sd.Unit(u).Kill(ctx) // one that has no process is an error, and no trouble
	}
	slices.Reverse(units)
	var errs []error
	for _, u := range units {
		errs = append(errs, sd.Unit(u).Stop(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		// Half of a node is worse than none.
		return errors.Join(err, start(ctx, sd, plan))
	}
	say("the service is away")
	if err := provision.Sleep(ctx, d); err != nil {
		return err
	}
	say(provision.OutageEnds)
	return start(ctx, sd, plan)
}

// Start starts all units of the node's components, in their order. Those that
// run are left alone.
func Start(ctx context.Context, plan provision.Plan) error {
	sd, err := hostprep.DialSystemd(ctx)
	if err != nil {
		return err
	}
	defer sd.Close()
	return start(ctx, sd, plan)
}

func start(ctx context.Context, sd *hostprep.Systemd, plan provision.Plan) error {
	var errs []error
	for _, u := range unitsHere(plan) {
		errs = append(errs, sd.Unit(u).Start(ctx))
	}
	return errors.Join(errs...)
}

// unitsHere are the units of the node's components, in the order in which they
// start.
func unitsHere(plan provision.Plan) []string {
	var out []string
	for _, c := range here(plan) {
		out = append(out, c.Units...)
	}
	return out
}
