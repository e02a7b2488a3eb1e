package provision_test

import (
	"strings"
	"testing"

	"platter/provision"
)

func TestReadRelease(t *testing.T) {
	digest := strings.Repeat("ab", 32)
	good := provision.Release{Format: provision.ReleaseFormat, Name: "im", Version: "2", Files: []provision.ReleaseFile{
		{Name: "Packages", Kind: provision.FileIndex, Size: 2, Digest: digest},
		{Name: "etcd-server_3.5.16-4+b1_amd64.deb", Kind: provision.FilePackage, Package: "etcd-server", Version: "3.5.16-4+b1", Size: 1 << 20, Digest: digest},
		{Name: "postgresql-17_17.2-1~deb13u1_amd64.deb", Kind: provision.FilePackage, Package: "postgresql-17", Version: "1:17.2-1~deb13u1", Size: 3, Digest: digest},
	}}
	raw, sum, err := good.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if !provision.ValidDigest(sum) {
		t.Errorf("digest %q", sum)
	}
	r, err := provision.ReadRelease(raw)
	if err != nil {
		t.Fatal(err)
	}
	if again, sum2, _ := r.Manifest(); string(again) != string(raw) || sum2 != sum {
		t.Errorf("read and written again it is\n%s\ninstead of\n%s", again, raw)
	}
	if r.Size() != 1<<20+5 {
		t.Errorf("size %d", r.Size())
	}

	bad := good
	bad.Files = []provision.ReleaseFile{
		{Name: "../etc/passwd", Digest: digest},
		{Name: ".hidden", Digest: digest},
		{Name: "b", Digest: digest},
		{Name: "a", Digest: digest},
		{Name: "c", Digest: "../../etc/shadow"},
		{Name: "d", Digest: digest, Size: -1},
	}
	raw, _, _ = bad.Manifest()
	_, err = provision.ReadRelease(raw)
	for _, want := range []string{`"../etc/passwd"`, `".hidden"`, "file a is out of order", "file c has no valid", "file d has no valid"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q:\n%v", want, err)
		}
	}
	bad.Format++
	raw, _, _ = bad.Manifest()
	if _, err := provision.ReadRelease(raw); err == nil || !strings.Contains(err.Error(), "format 2") {
		t.Errorf("format 2 is read: %v", err)
	}
}
