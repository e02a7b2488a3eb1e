package stack

import (
	"reflect"
	"testing"
)

func TestParseControl(t *testing.T) {
	c := parseControl("Depends: libc6 (>= 2.38), erlang-base (>= 1:27) | erlang-base-hipe,python3:any, adduser,  ucf(>= 1)\nPre-Depends: init-system-helpers (>= 1.54~)\nInstalled-Size: 8421\n")
	want := controlFields{depends: []string{"libc6", "erlang-base", "erlang-base-hipe", "python3", "adduser", "ucf", "init-system-helpers"}, size: 8421 << 10}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v, want %+v", c, want)
	}
}

func TestParseInstalled(t *testing.T) {
	got := parseInstalled("haproxy 3.0.11-1+deb13u5 installed\ngone 1 config-files\nhalf 2 unpacked\nnever  not-installed\nliberl 1:2 installed\n")
	if want := map[string]string{"haproxy": "3.0.11-1+deb13u5", "liberl": "1:2"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
