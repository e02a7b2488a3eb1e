package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"platter/provision"
	"platter/provision/disk"
	"platter/provision/install"
	"platter/provision/stack"
)

// staging makes the function of provision.OrderStage: it brings a release of
// the stack onto this node's disk and says which are there.
func staging(plan provision.Plan, rep interface{ Facts(map[string]string) }) func(context.Context, task, progress) (any, error) {
	return func(ctx context.Context, t task, say progress) (any, error) {
		var ref provision.ReleaseRef
		if err := json.Unmarshal(t.Args, &ref); err != nil {
			return nil, fmt.Errorf("the order names no release: %w", err)
		}
		keys, err := install.ReadKeys(install.KeysPath)
		if err != nil {
			return nil, &provision.Failure{Code: "no-keys", Message: "this node does not know whose releases to trust: " + err.Error(),
				Next: "Reinstall the node: the installer of this version lays the keys down"}
		}
		client := install.ObjectClient()
		defer client.CloseIdleConnections()
		s := stack.Staging{Dir: stack.ReleasesDir, Keys: keys, From: disk.HTTPSource{Client: client, Base: plan.Files}, Say: say}
		staged, err := s.Stage(ctx, ref)
		// Whatever came of it: others may have been removed.
		rep.Facts(stagedFacts(stack.ReleasesDir))
		if err != nil {
			return nil, err
		}
		return staged, nil
	}
}

// stagedFacts says which releases are complete below dir. What cannot be read
// is not there.
func stagedFacts(dir string) map[string]string {
	staged, _ := stack.StagedReleases(dir)
	var digests []string
	for _, r := range staged.Releases {
		digests = append(digests, r.Digest)
	}
	return map[string]string{provision.FactStaged: strings.Join(digests, ",")}
}
