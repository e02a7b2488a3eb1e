package disc

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"
	"github.com/package-url/packageurl-go"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"platter/images"
	"platter/provision"
)

func sbomInput(t *testing.T) SBOMInput {
	t.Helper()
	program := filepath.Join(t.TempDir(), "platter-node")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "platter/cmd/platter-node")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as make does: it is in the cache
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lock := images.WebLock("debian-13")
	if len(lock) == 0 {
		t.Fatal("the recipe debian-13 has no web client any more")
	}
	hash := func(c string) string { return strings.Repeat(c, 64) }
	debian := &provision.Image{
		Name: "debian-13", Version: "13.7-8919cd06", Arch: "amd64", Family: "debian", Kernel: "6.12.1", Pack: provision.Object{Hash: hash("a")},
		Packages: map[string]string{"bash": "5.2.37-2+b10", "bsdutils": "1:2.41.5-0+deb13u1", "libstdc++6": "14.2.0-19", "base-files": "13.8~rc1"},
	}
	other := &provision.Image{
		Name: "rocky-9", Version: "9.6", Arch: "amd64", Family: "rocky", Kernel: "5.14", Pack: provision.Object{Hash: hash("b")},
		Packages: map[string]string{"bash": "5.1.8-9.el9"},
	}
	release := &provision.Release{
		Name: "im", Version: "2", Image: provision.ImageRef{Name: "debian-13"},
		Stack: provision.Stack{Components: []provision.Component{{Images: []provision.OCIImage{{Name: "localhost/Board:1", File: "oci/board.oci.tar", Digest: "sha256:" + hash("c")}}}}},
		Files: []provision.ReleaseFile{
			{Name: "Packages", Kind: provision.FileIndex, Digest: hash("d")},
			{Name: "etcd-server_3.5.16-4_amd64.deb", Kind: provision.FilePackage, Package: "etcd-server", Version: "3.5.16-4", Digest: hash("e")},
			{Name: "oci_board.oci.tar", Kind: provision.FileImage, Digest: hash("f")},
		},
	}
	return SBOMInput{
		Name: "platter", Version: "1", Time: time.Unix(1_790_000_000, 0), Images: []*provision.Image{debian, other}, Releases: []*provision.Release{release},
		Boot:  map[string]images.BootSet{"amd64": {Kernel: provision.Object{Hash: hash("1")}, Initramfs: provision.Object{Hash: hash("2")}, Local: provision.Object{Hash: hash("3")}, Release: "6.12.1"}},
		URoot: "v0.16.0", Programs: []string{program}, WebLock: lock,
	}
}

func TestSBOM(t *testing.T) {
	in := sbomInput(t)
	list, err := SBOM(in)
	if err != nil {
		t.Fatal(err)
	}
	againIn := in
	againIn.Images = slices.Clone(in.Images)
	slices.Reverse(againIn.Images)
	if again, err := SBOM(againIn); err != nil || !bytes.Equal(list, again) {
		t.Errorf("the same set, in another order, has another list: %v", err)
	}
	validate(t, list)

	var bom cyclonedx.BOM
	if err := cyclonedx.NewBOMDecoder(bytes.NewReader(list), cyclonedx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if got := bom.Metadata.Timestamp; got != in.Time.UTC().Format(time.RFC3339) {
		t.Errorf("the list's time is %s, the set's is %s", got, in.Time.UTC())
	}
	if _, err := uuid.Parse(bom.SerialNumber); err != nil {
		t.Errorf("serial number %s: %v", bom.SerialNumber, err)
	}
	changed := in
	changed.Version = "2"
	if other, err := SBOM(changed); err != nil || bytes.Contains(other, []byte(bom.SerialNumber)) {
		t.Errorf("another set has the same serial number: %v", err)
	}

	seen := map[string]cyclonedx.Component{}
	purls := map[string]cyclonedx.ComponentType{}
	var walk func([]cyclonedx.Component)
	walk = func(parts []cyclonedx.Component) {
		for _, c := range parts {
			if _, twice := seen[c.BOMRef]; twice || c.BOMRef == "" || c.Name == "" || c.Type == "" {
				t.Errorf("a component lacks its bom-ref, name or type, or is there twice: %+v", c)
			}
			seen[c.BOMRef] = c
			if c.PackageURL != "" {
				u, err := packageurl.FromString(c.PackageURL)
				if err != nil || u.Version == "" {
					t.Errorf("%s of %s: %v", c.PackageURL, c.BOMRef, err)
				}
				qualifiers := u.Qualifiers.Map()
				purls[fmt.Sprint(u.Type, " ", u.Namespace, " ", u.Name, " ", u.Version, " ", qualifiers["arch"], " ", qualifiers["distro"])] = c.Type
			}
			if c.Components != nil {
				walk(*c.Components)
			}
		}
	}
	walk([]cyclonedx.Component{*bom.Metadata.Component})
	walk(*bom.Components)

	want := []string{
		"rpm rocky bash 5.1.8-9.el9 amd64 rocky-9",
		"deb debian etcd-server 3.5.16-4 amd64 debian-13",
		"oci  board sha256:" + strings.Repeat("c", 64) + "  ",
		"golang github.com/u-root u-root v0.16.0  ",
		"golang github.com/klauspost compress v1.20.3  ",
		"npm  converse.js 14.0.0  ",
		"npm @babel runtime 7.29.14  ",
	}
	for _, name := range slices.Sorted(maps.Keys(in.Images[0].Packages)) {
		want = append(want, fmt.Sprintf("deb debian %s %s amd64 debian-13", name, in.Images[0].Packages[name]))
	}
	for _, w := range want {
		if _, ok := purls[w]; !ok {
			t.Errorf("%s is not in the list", w)
		}
	}
	if !slices.ContainsFunc(slices.Collect(maps.Keys(purls)), func(p string) bool { return strings.HasPrefix(p, "golang  stdlib 1.") }) {
		t.Error("Go's standard library is not in the list")
	}
	for ref, kind := range map[string]cyclonedx.ComponentType{
		"image:debian-13": cyclonedx.ComponentTypeOS, "stack:im@2": cyclonedx.ComponentTypeApplication,
		"stack:im@2/oci_board.oci.tar": cyclonedx.ComponentTypeContainer, "stack:im@2/Packages": cyclonedx.ComponentTypeFile,
		"boot:amd64/kernel": cyclonedx.ComponentTypeFile, "boot:amd64/initramfs": cyclonedx.ComponentTypeFile,
	} {
		c, ok := seen[ref]
		if !ok || c.Type != kind || c.Hashes == nil || len(*c.Hashes) == 0 {
			if ok && ref == "stack:im@2" {
				continue // a release is its files
			}
			t.Errorf("%s is %+v", ref, c)
		}
	}
	for _, d := range *bom.Dependencies {
		for _, ref := range append([]string{d.Ref}, *d.Dependencies...) {
			if _, ok := seen[ref]; !ok {
				t.Errorf("a dependency names %s, which is not in the list", ref)
			}
		}
	}
}

// validate asks the published schema, which comes with the library.
func validate(t *testing.T, list []byte) {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	if err != nil {
		t.Fatalf("where the schema lies is not known: %v", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(out)), "schema")
	c := jsonschema.NewCompiler()
	for url, file := range map[string]string{
		"http://cyclonedx.org/schema/bom-1.6.schema.json":  "bom-1.6.schema.json",
		"http://cyclonedx.org/schema/spdx.schema.json":     "spdx.schema.json",
		"http://cyclonedx.org/schema/jsf-0.82.schema.json": "jsf-0.82.schemax.json",
	} {
		f, err := os.Open(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		doc, err := jsonschema.UnmarshalJSON(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.AddResource(url, doc); err != nil {
			t.Fatal(err)
		}
	}
	schema, err := c.Compile("http://cyclonedx.org/schema/bom-1.6.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(list))
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Errorf("the list is no CycloneDX 1.6: %v", err)
	}
}

func TestSBOMRefuses(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no program"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := SBOM(SBOMInput{Programs: []string{text, text + "2"}, WebLock: []byte("{")})
	for _, want := range []string{text, text + "2", "lock file"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
}
