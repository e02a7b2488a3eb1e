package provision_test

import (
	"fmt"
	"strings"
	"testing"

	"platter/provision"
)

var (
	one = strings.Repeat("11", 32)
	two = strings.Repeat("22", 32)
)

func staged(versions ...string) (out []provision.NodeRelease) {
	for _, v := range versions {
		out = append(out, provision.NodeRelease{ReleaseRef: provision.ReleaseRef{Version: v, Digest: strings.Repeat(v+v, 32)},
			Stack: provision.Stack{Name: "im", Version: v, Components: []provision.Component{{Name: "etcd", Place: provision.Placement{Count: 1}}, {Name: "ejabberd"}}}})
	}
	return out
}

func TestNewRoll(t *testing.T) {
	nodes := []provision.Node{{Name: "a"}, {Name: "b"}, {Name: "c"}}
	type have = map[string]provision.NodeReleases
	each := func(n provision.NodeReleases) have { return have{"a": n, "b": n, "c": n} }
	fresh := provision.NodeReleases{Current: provision.Installed, Staged: staged("1", "2")}
	primary := fresh
	primary.Primary = true
	at2 := provision.NodeReleases{Current: two, Previous: provision.Installed, Staged: staged("1", "2")}
	for name, c := range map[string]struct {
		have have
		ask  provision.RollRequest
		want string // release, nodes in order with what they come from and do once; or the error's beginning
	}{
		"by version":                 {each(fresh), provision.RollRequest{Release: "2"}, "2: a(inst ejabberd,etcd) b(inst ) c(inst )"},
		"by digest":                  {each(fresh), provision.RollRequest{Release: two[:8]}, "2: a(inst ejabberd,etcd) b(inst ) c(inst )"},
		"the primary is last":        {have{"a": primary, "b": fresh, "c": fresh}, provision.RollRequest{Release: "2"}, "2: b(inst ejabberd) c(inst ) a(inst etcd)"},
		"those that do not run it":   {have{"a": at2, "b": fresh, "c": at2}, provision.RollRequest{Release: "2"}, "2: b(inst ejabberd)"},
		"the only one":               {each(provision.NodeReleases{Current: one, Staged: staged("1", "2")}), provision.RollRequest{}, "2: a(1111 ejabberd,etcd) b(1111 ) c(1111 )"},
		"which one":                  {each(fresh), provision.RollRequest{}, "name one of the releases that are staged: 1 (111111111111), 2 (222222222222)"},
		"none is staged":             {each(provision.NodeReleases{Current: provision.Installed}), provision.RollRequest{}, "no node has a release"},
		"another is staged":          {each(fresh), provision.RollRequest{Release: "3"}, "no node has release 3 on its disk, only 1 (111111111111), 2 (222222222222): run 'platter stack stage'"},
		"not on all":                 {have{"a": fresh, "b": {Current: provision.Installed, Staged: staged("1")}, "c": fresh}, provision.RollRequest{Release: "2"}, "release 2 is not on the disk of b"},
		"all run it":                 {each(at2), provision.RollRequest{Release: "2"}, "every node runs release 2 already"},
		"back":                       {each(at2), provision.RollRequest{Rollback: true}, "inst: a(2222 ejabberd,etcd) b(2222 ) c(2222 )"},
		"back from nothing":          {each(fresh), provision.RollRequest{Rollback: true}, "a runs what the install brought"},
		"back from different ones":   {have{"a": at2, "b": fresh, "c": at2}, provision.RollRequest{Rollback: true}, "a and b do not run the same release"},
		"the one that runs is gone":  {each(provision.NodeReleases{Current: one, Staged: staged("2")}), provision.RollRequest{}, "no node has release 111111111111"},
		"... and nobody goes back":   {each(provision.NodeReleases{Current: one, Staged: staged("2")}), provision.RollRequest{NoWayBack: true}, "2: a(1111 ejabberd,etcd) b(1111 ) c(1111 )"},
		"a placement that fails now": {each(provision.NodeReleases{Current: one, Staged: append(staged("1"), broken)}), provision.RollRequest{Release: "9"}, "release 9: no node has the role"},
	} {
		r, err := provision.NewRoll(nodes, nil, c.have, c.ask)
		got := fmt.Sprint(err)
		if err == nil {
			got = r.To[:4] + ":"
			if r.Version != "" {
				got = r.Version + ":"
			}
			for _, n := range r.Nodes {
				got += fmt.Sprintf(" %s(%.4s %s)", n.Name, n.From, strings.Join(n.Once, ","))
			}
			if r.To != provision.Installed && len(r.Members[r.To]["etcd"]) != 1 {
				t.Errorf("%s: members %v", name, r.Members)
			}
		}
		if err == nil && got != c.want || err != nil && !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

var broken = provision.NodeRelease{ReleaseRef: provision.ReleaseRef{Version: "9", Digest: strings.Repeat("99", 32)},
	Stack: provision.Stack{Name: "im", Components: []provision.Component{{Name: "etcd", Place: provision.Placement{Role: "storage"}}}}}

func TestRollNext(t *testing.T) {
	failed := &provision.Failure{Code: "x"}
	for states, want := range map[string]string{
		"waiting waiting":        "0 2222 false",
		"done waiting":           "1 2222 false",
		"done probing":           "1 2222 false",
		"done done":              "ended",
		"! done kept waiting":    "0 1111 true",
		"! done done kept":       "1 1111 true",
		"! done returned kept":   "0 1111 true",
		"! done probing waiting": "1 1111 true",
		"! returned lost":        "ended",
		"! kept waiting":         "ended",
	} {
		r := provision.Roll{To: two}
		list := strings.Fields(states)
		if list[0] == "!" {
			r.Failure, list = failed, list[1:]
		}
		for _, s := range list {
			r.Nodes = append(r.Nodes, provision.RollNode{From: one, State: provision.RollState(s)})
		}
		got := "ended"
		if i, on := r.Next(); on {
			a := r.Args(i)
			got = fmt.Sprintf("%d %.4s %v", i, a.To, a.Rollback)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", states, got, want)
		}
	}
}
