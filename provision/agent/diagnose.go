package agent

import (
	"context"

	"platter/hostprep"
	"platter/hostprep/hostcmd"
	"platter/provision"
	"platter/provision/stack"
)

// diagnosing makes the function of provision.OrderDiagnose: it checks the host
// and asks the local member about the cluster. What cannot be looked at is a
// finding too.
func diagnosing(host func(context.Context, hostprep.Progress) ([]hostprep.Result, error), plan provision.Plan, w work) func(context.Context, task, progress) (any, error) {
	return func(ctx context.Context, _ task, say progress) (any, error) {
		d := provision.Diagnosis{Alarms: append([]string{}, w.alarms()...), Versions: stack.Versions(ctx, plan), Limits: stack.InEffect(ctx, "/", plan), Machine: stack.Machine("/")}
		results, err := host(ctx, checking(say))
		if err == nil {
			d.Host, err = hostcmd.Marshal(results)
		}
		if err != nil {
			return nil, err
		}
		say("components", 0, 0)
		for _, t := range w.troubles(ctx, 0) {
			d.Troubles = append(d.Troubles, t.Text)
		}
		say("cluster", 0, 0)
		cl, err := w.look(ctx)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		d.Running, d.Down = append([]string{}, cl.Running...), append([]string{}, cl.Down...)
		if err != nil {
			d.Stack = err.Error()
		}
		return d, nil
	}
}

// checking says which check of the host runs.
type checking progress

func (c checking) Phase(name string, n, of int) { c("checking "+name, int64(n-1), int64(of)) }
func (checking) Logf(string, ...any)            {}
func (checking) Facts(map[string]string)        {}
