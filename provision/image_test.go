package provision

import (
	"strings"
	"testing"
)

// An image that was imported is refused for components that it cannot run; one
// that Platter built is built for its stack.
func TestImageMisfits(t *testing.T) {
	packages := PlacedComponent{Component: Component{Name: "etcd", Kind: KindPackages, Packages: []Package{{Name: "etcd-server"}, {Name: "etcd-client"}}}, Members: []string{"a"}}
	board := PlacedComponent{Component: Component{Name: "board", Kind: KindCompose}, Members: []string{"a"}}
	im := PlacedComponent{Component: Component{Name: "ejabberd", Kind: KindPackages, Member: MemberEjabberd}, Members: []string{"a"}}
	nowhere := PlacedComponent{Component: Component{Name: "rabbitmq", Kind: KindPackages, Packages: []Package{{Name: "rabbitmq-server"}}}}
	all := []PlacedComponent{packages, im, board, nowhere}
	for _, c := range []struct {
		im   Image
		want string
	}{
		{Image{Name: "debian-13", Family: FamilyDebian}, ""},
		{Image{Name: "older"}, ""},
		{Image{Name: "mine", Family: FamilyDebian, Origin: "x.tar", Packages: map[string]string{"etcd-server": "1", "etcd-client": "1", "podman": "5"}, Extras: []string{ExtraEjabberd}}, ""},
		{Image{Name: "mine", Family: FamilyDebian, Origin: "x.tar", Packages: map[string]string{"etcd-server": "1"}},
			"component etcd needs the package etcd-client, which the image mine does not have; component ejabberd needs /usr/lib/platter/erlang/mod_platter_archive.beam, which the image mine does not have: only 'platter image build' puts it there; component board is run by podman, which the image mine does not have"},
		{Image{Name: "rocky-9", Family: FamilyRHEL, Origin: "x.tar", Packages: map[string]string{"podman": "5"}}, "component etcd comes as Debian packages, and the image rocky-9 is of the family rhel; component ejabberd comes as Debian packages, and the image rocky-9 is of the family rhel"},
		// Its packages are not known: what is no matter of families is not judged.
		{Image{Name: "rocky-9", Family: FamilyRHEL, Origin: "x.tar"}, "component etcd comes as Debian packages, and the image rocky-9 is of the family rhel; component ejabberd comes as Debian packages, and the image rocky-9 is of the family rhel"},
	} {
		if got := strings.Join(c.im.Misfits(all), "; "); got != c.want {
			t.Errorf("%s: %s", c.im.Name, got)
		}
	}
}
