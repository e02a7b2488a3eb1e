package dischost

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"platter/provision"
)

// Which nodes have a release is what they say.
func TestReleases(t *testing.T) {
	l := newLab(t, 3)
	one, two := strings.Repeat("1a", 32), strings.Repeat("2b", 32)
	l.images.mu.Lock()
	l.images.list = []provision.StoredRelease{
		{ReleaseRef: provision.ReleaseRef{Version: "2", Digest: two}, Nodes: []string{}},
		{ReleaseRef: provision.ReleaseRef{Version: "1", Digest: one}, Nodes: []string{}},
	}
	l.images.mu.Unlock()
	for i, staged := range []string{one + "," + two, two, ""} {
		c := l.installed(i + 1)
		l.report(c, provision.Report{Facts: map[string]string{provision.FactStaged: staged}})
	}
	for range 2 {
		list, err := l.op.Releases(t.Context())
		l.check(err)
		if len(list) != 2 || !slices.Equal(list[0].Nodes, []string{"node1", "node2"}) || !slices.Equal(list[1].Nodes, []string{"node1"}) {
			t.Errorf("releases: %+v", list)
		}
		l.restart()
	}
	// One that is damaged does not hide the others; nothing but damage is an error.
	l.images.set(errors.New("file x of release 3 is missing"))
	if list, err := l.op.Releases(t.Context()); err != nil || len(list) != 2 {
		t.Errorf("releases: %+v, %v", list, err)
	}
	l.images.mu.Lock()
	l.images.list = nil
	l.images.mu.Unlock()
	if _, err := l.op.Releases(t.Context()); err == nil {
		t.Error("a damaged store looks like an empty one")
	}
}
