package hostprep

import (
	"context"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"platter/provision"
)

// Host is the machine that is prepared.
type Host struct {
	Root string // "/" on the running host
	Spec provision.HostSpec
	// Self is the command line by which units call this program's host
	// commands: /usr/lib/platter/platter-node host.
	Self    []string
	Systemd *Systemd // nil where no systemd runs: in an image, in tests
	// Reach are the disc host and the gateway. A change of the uplink that the
	// host is managed over is kept only if one of them answers after it. Port
	// 0: any sign of life counts.
	Reach []netip.AddrPort
	// Retry: a change of an uplink that was taken back once is tried again.
	Retry bool

	run      runner        // tests put another in place
	datapath string        // of bridges that are made; tests say netdev
	patience time.Duration // with a switch that does not act; default one minute
	within   time.Duration // for a change of an uplink to be confirmed; default tryWithin
}

// NodeSelf is Self on a node that Platter installed.
var NodeSelf = []string{"/usr/lib/platter/platter-node", "host"}

// ReachOf are the disc host and the gateway of a plan.
func ReachOf(p provision.Plan) []netip.AddrPort {
	var out []netip.AddrPort
	if u, err := url.Parse(p.DiscHost); err == nil {
		if a, err := netip.ParseAddrPort(u.Host); err == nil {
			out = append(out, a)
		}
	}
	if p.Net.Gateway.IsValid() {
		out = append(out, netip.AddrPortFrom(p.Net.Gateway, 0))
	}
	return out
}

// File is one file that the preparation lays down.
type File struct {
	Path    string // with a leading /
	Content string
	Mode    fs.FileMode // 0: 0644
	Link    string      // instead of content: a symbolic link to this
	Why     string
	Source  string
}

// Files are all files that the preparation of the host consists of. A later
// boot reads them, so an image into which they were written is prepared from
// its first boot on.
func (h *Host) Files() []File {
	return slices.Concat(
		h.orderFiles(),
		h.kernelFiles(),
		shareFiles(),
		h.uplinkUnit(),
	)
}

// Prepare writes the files below the host's root and changes nothing that
// runs. What is right already is not touched.
func (h *Host) Prepare(j *Journal) error {
	for _, f := range h.Files() {
		if err := j.lay(f); err != nil {
			return err
		}
	}
	return nil
}

// lay writes one file or link.
func (j *Journal) lay(f File) error {
	if f.Link != "" {
		return j.Link(f.Path, f.Link)
	}
	return j.WriteFile(f.Path, f.Content, f.mode())
}

func (f File) mode() fs.FileMode {
	if f.Mode == 0 {
		return 0o644
	}
	return f.Mode
}

// find tells whether the file is as it should be.
func (f File) find(j *Journal) Finding {
	out := Finding{What: f.Path, Is: "as written", Want: "as written", Why: f.Why, Source: f.Source}
	if f.Link != "" {
		out.Is, _ = os.Readlink(j.at(f.Path))
		out.Want, out.OK = f.Link, out.Is == f.Link
		if out.Is == "" {
			out.Is = "missing"
		}
		return out
	}
	ok, err := j.has(f.Path, f.Content, f.mode())
	switch {
	case ok:
		out.OK = true
	case err != nil:
		out.Is = err.Error()
	default:
		out.Is = "different"
		if _, err := os.Lstat(j.at(f.Path)); err != nil {
			out.Is = "missing"
		}
	}
	return out
}

// filesStep keeps files as they should be; after runs when any was written.
func (h *Host) filesStep(name, next string, files []File, after func(context.Context) error) Step {
	look := &Journal{root: h.Root} // only looks
	return Step{
		Name: name,
		Next: next,
		Check: func(context.Context) ([]Finding, error) {
			var out []Finding
			for _, f := range files {
				out = append(out, f.find(look))
			}
			return out, nil
		},
		Apply: func(ctx context.Context, j *Journal) error {
			for _, f := range files {
				if err := j.lay(f); err != nil {
					return err
				}
			}
			if after == nil {
				return nil
			}
			return after(ctx)
		},
	}
}

// reload makes systemd read what was written, where one runs.
func (h *Host) reload(ctx context.Context) error {
	if h.Systemd == nil {
		return nil
	}
	return h.Systemd.Reload(ctx)
}

// self is the command line of one host command, for a unit.
func (h *Host) self(command ...string) string { return strings.Join(append(h.Self, command...), " ") }
