package dischost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"platter/provision"
	"platter/provision/client"
	"platter/provision/stack/probe"
)

// probeStack runs every probe now on the nodes that are named, or on all nodes
// of the rack, and answers with a line of JSON for each as it ends.
func (h *Host) probeStack(w http.ResponseWriter, r *http.Request) (any, error) {
	var nodes []provision.State
	for _, name := range r.URL.Query()["node"] {
		st, err := h.ofRack(name)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(nodes, func(s provision.State) bool { return s.Name == st.Name }) {
			nodes = append(nodes, st)
		}
	}
	if len(nodes) == 0 {
		nodes = h.rackStates()
	}
	// Two runs would take each other's waiting messages.
	if !h.probing.TryLock() {
		return nil, &client.Error{Status: http.StatusConflict, Code: client.CodeProbing,
			Message: "the probes run already for another operator", Next: "Wait until they are done."}
	}
	defer h.probing.Unlock()
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Cache-Control", "no-store")
	out := http.NewResponseController(w)
	out.Flush()
	ctx, gone := context.WithCancel(r.Context())
	defer gone()
	lines := json.NewEncoder(w)
	h.probeAll(ctx, nodes, func(res provision.ProbeResult) {
		if lines.Encode(res) != nil || out.Flush() != nil {
			gone()
		}
	})
	if ctx.Err() != nil {
		panic(http.ErrAbortHandler) // else it would look as if these were all
	}
	return nil, nil
}

// probeAll logs in on every node; those that let users in form a ring, in
// which each is probed with the next one, the last with the first.
func (h *Host) probeAll(ctx context.Context, nodes []provision.State, say func(provision.ProbeResult)) {
	try := func(kind probe.Kind, from, to provision.State) bool {
		res := provision.ProbeResult{Probe: string(kind), From: from.Name}
		if to.Name != from.Name && kind != probe.Upload {
			res.To = to.Name
		}
		took, err := h.probe(ctx, kind, from, to)
		if ctx.Err() != nil {
			return false
		}
		res.Micros = took.Microseconds()
		if err != nil && !errors.As(err, &res.Failure) {
			res.Failure = &provision.Failure{Code: "probe", Message: err.Error(), Next: "See the disc host's log"}
		}
		say(res)
		return err == nil
	}
	var ring []provision.State
	for _, n := range nodes {
		switch {
		case n.Installed == 0, n.Stage == provision.StageBooting, n.Stage == provision.StageInstalling:
			say(provision.ProbeResult{Probe: string(probe.Login), From: n.Name, Failure: &provision.Failure{Code: "probe-not-installed",
				Message: fmt.Sprintf("node %s has no IM service yet: it is %s", n.Name, n.Stage), Next: "See 'platter watch'"}})
		case try(probe.Login, n, n):
			ring = append(ring, n)
		}
	}
	for i, n := range ring {
		for _, kind := range probe.Kinds[1:] {
			try(kind, n, ring[(i+1)%len(ring)])
		}
	}
}
