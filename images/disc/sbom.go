package disc

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"
	"github.com/package-url/packageurl-go"

	"platter/images"
	"platter/provision"
)

// SBOMInput is what a set is made of.
type SBOMInput struct {
	Name    string    // of the set
	Version string    // of the set
	Time    time.Time // of the set, not of the build: equal sets have equal lists
	// Images are the operating systems, each with its packages.
	Images []*provision.Image
	// Releases are those of the stack.
	Releases []*provision.Release
	// Boot has what machines boot over the network, by architecture.
	Boot map[string]images.BootSet
	// URoot is the version of u-root in the initramfs; empty: none.
	URoot string
	// Programs are files of Go programs, such as bin/platter: they know their modules.
	Programs []string
	// WebLock is npm's lock file of the web client that the images hold; empty: they
	// hold none.
	WebLock []byte
}

// SBOM lists everything in a set as CycloneDX 1.6 in JSON (ECMA-424,
// https://cyclonedx.org/docs/1.6/json/). It depends on nothing but in: the
// serial number is made of the content. The error names every part that cannot be
// listed.
func SBOM(in SBOMInput) ([]byte, error) {
	var wrong []error
	var parts []cyclonedx.Component
	add := func(c cyclonedx.Component, err error) {
		wrong = append(wrong, err)
		parts = append(parts, c)
	}
	for _, im := range in.Images {
		add(imageComponent(im), nil)
	}
	for _, r := range in.Releases {
		add(releaseComponent(r, in.Images), nil)
	}
	for _, arch := range slices.Sorted(maps.Keys(in.Boot)) {
		parts = append(parts, bootComponents(arch, in.Boot[arch])...)
	}
	if in.URoot != "" {
		add(library("", "u-root", purl(packageurl.TypeGolang, "github.com/u-root", "u-root", in.URoot, nil), in.URoot), nil)
	}
	for _, file := range in.Programs {
		add(programComponent(file, in.Version))
	}
	if len(in.WebLock) > 0 {
		add(webComponent(in.WebLock))
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, fmt.Errorf("the list of what the set holds cannot be made: %w", err)
	}
	sortComponents(parts)

	root := cyclonedx.Component{BOMRef: "set", Type: cyclonedx.ComponentTypePlatform, Name: in.Name, Version: in.Version, Description: "Platter disc set"}
	bom := cyclonedx.NewBOM()
	bom.Metadata = &cyclonedx.Metadata{Timestamp: in.Time.UTC().Format(time.RFC3339), Component: &root}
	bom.Components = &parts
	var refs []string
	for _, c := range parts {
		refs = append(refs, c.BOMRef)
	}
	bom.Dependencies = &[]cyclonedx.Dependency{{Ref: root.BOMRef, Dependencies: &refs}}

	anonymous, err := encodeBOM(bom)
	if err != nil {
		return nil, err
	}
	bom.SerialNumber = uuid.NewHash(sha256.New(), uuid.NameSpaceOID, anonymous, 8).URN()
	return encodeBOM(bom)
}

func encodeBOM(bom *cyclonedx.BOM) ([]byte, error) {
	var b bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&b, cyclonedx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cyclonedx.SpecVersion1_6); err != nil {
		return nil, fmt.Errorf("the list of what the set holds cannot be written: %w", err)
	}
	return b.Bytes(), nil
}

func imageComponent(im *provision.Image) cyclonedx.Component {
	c := cyclonedx.Component{
		BOMRef: "image:" + im.Name, Type: cyclonedx.ComponentTypeOS, Name: im.Name, Version: im.Version,
		Description: "operating system image for " + im.Arch + ", kernel " + im.Kernel,
		Hashes:      hashes(im.Pack.Hash),
	}
	var packages []cyclonedx.Component
	for _, name := range slices.Sorted(maps.Keys(im.Packages)) {
		packages = append(packages, library(c.BOMRef, name, packagePURL(im, name, im.Packages[name]), im.Packages[name]))
	}
	return nested(c, packages)
}

// packagePURL names a package of im's distribution, as the specification of
// package URLs says for its kind: https://github.com/package-url/purl-spec.
func packagePURL(im *provision.Image, name, version string) string {
	kind := packageurl.TypeRPM
	if im.Family == "debian" || im.Family == "ubuntu" {
		kind = packageurl.TypeDebian
	}
	return purl(kind, im.Family, name, version, map[string]string{"arch": im.Arch, "distro": im.Name})
}

func releaseComponent(r *provision.Release, all []*provision.Image) cyclonedx.Component {
	c := cyclonedx.Component{
		BOMRef: "stack:" + r.Name + "@" + r.Version, Type: cyclonedx.ComponentTypeApplication, Name: r.Name, Version: r.Version,
		Description: "release of the stack for the image " + r.Image.Name,
	}
	im := &provision.Image{Name: r.Image.Name, Family: "debian", Arch: "amd64"}
	if i := slices.IndexFunc(all, func(im *provision.Image) bool { return im.Name == r.Image.Name }); i >= 0 {
		im = all[i]
	}
	archives := map[string]provision.OCIImage{}
	for _, part := range r.Stack.Components {
		for _, oci := range part.Images {
			archives[oci.ReleaseName()] = oci
		}
	}
	var files []cyclonedx.Component
	for _, f := range r.Files {
		file := cyclonedx.Component{BOMRef: c.BOMRef + "/" + f.Name, Type: cyclonedx.ComponentTypeFile, Name: f.Name, Hashes: hashes(f.Digest)}
		switch oci, ok := archives[f.Name]; {
		case f.Kind == provision.FilePackage:
			file.Type, file.Name, file.Version = cyclonedx.ComponentTypeLibrary, f.Package, f.Version
			file.PackageURL = packagePURL(im, f.Package, f.Version)
		case f.Kind == provision.FileImage && ok:
			file.Type, file.Name, file.Version = cyclonedx.ComponentTypeContainer, oci.Name, oci.Digest
			// The name of an OCI purl is the last part of the repository, in lower case.
			repository, _, _ := strings.Cut(path.Base(oci.Name), ":")
			file.PackageURL = purl(packageurl.TypeOCI, "", strings.ToLower(repository), oci.Digest, nil)
		}
		files = append(files, file)
	}
	return nested(c, files)
}

func bootComponents(arch string, set images.BootSet) []cyclonedx.Component {
	file := func(name, about string, o provision.Object) cyclonedx.Component {
		return cyclonedx.Component{BOMRef: "boot:" + arch + "/" + name, Type: cyclonedx.ComponentTypeFile, Name: name, Version: set.Release, Description: about, Hashes: hashes(o.Hash)}
	}
	return []cyclonedx.Component{
		file("initramfs", "what machines of "+arch+" boot over the network", set.Initramfs),
		file("kernel", "Linux for machines of "+arch, set.Kernel),
		file("local.efi", "starts the loader of a machine's own disk", set.Local),
	}
}

// programComponent lists the modules of a Go program, its standard library among
// them. version stands for the program's own where it knows none.
func programComponent(file, version string) (cyclonedx.Component, error) {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return cyclonedx.Component{}, fmt.Errorf("%s does not say what it is made of, is it a Go program? %w", file, err)
	}
	sum, err := fileSum(file)
	if err != nil {
		return cyclonedx.Component{}, err
	}
	name := filepath.Base(file)
	c := cyclonedx.Component{BOMRef: "program:" + name, Type: cyclonedx.ComponentTypeApplication, Name: name, Version: version, Hashes: hashes(sum)}
	goVersion := strings.TrimPrefix(strings.Fields(info.GoVersion)[0], "go")
	modules := []cyclonedx.Component{library(c.BOMRef, "stdlib", purl(packageurl.TypeGolang, "", "stdlib", goVersion, nil), goVersion)}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		namespace, base := path.Split(m.Path)
		modules = append(modules, library(c.BOMRef, m.Path, purl(packageurl.TypeGolang, strings.TrimSuffix(namespace, "/"), base, m.Version, nil), m.Version))
	}
	return nested(c, modules), nil
}

// webComponent lists the packages of a package-lock.json, version 2 or 3
// (https://docs.npmjs.com/cli/configuring-npm/package-lock-json).
func webComponent(lock []byte) (cyclonedx.Component, error) {
	var file struct {
		Name     string `json:"name"`
		Packages map[string]struct {
			Version   string `json:"version"`
			Integrity string `json:"integrity"`
			License   any    `json:"license"`
		} `json:"packages"`
	}
	if err := json.Unmarshal(lock, &file); err != nil {
		return cyclonedx.Component{}, fmt.Errorf("the lock file of the web client cannot be read: %w", err)
	}
	c := cyclonedx.Component{BOMRef: "web", Type: cyclonedx.ComponentTypeApplication, Name: cmp.Or(file.Name, "web"), Description: "web client in the operating system images"}
	var packages []cyclonedx.Component
	for _, where := range slices.Sorted(maps.Keys(file.Packages)) {
		p := file.Packages[where]
		_, name, ok := lastCut(where, "node_modules/")
		if !ok || p.Version == "" {
			continue // the project itself, or a link to a folder inside another package
		}
		namespace, base := path.Split(name)
		m := library(c.BOMRef, name, purl(packageurl.TypeNPM, strings.TrimSuffix(namespace, "/"), base, p.Version, nil), p.Version)
		m.BOMRef = c.BOMRef + "/" + where // the same package may be there twice
		if sum, ok := strings.CutPrefix(p.Integrity, "sha512-"); ok {
			raw, err := base64.StdEncoding.DecodeString(sum)
			if err != nil {
				return c, fmt.Errorf("the lock file of the web client has no valid hash for %s: %w", where, err)
			}
			m.Hashes = &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA512, Value: hex.EncodeToString(raw)}}
		}
		if licence, ok := p.License.(string); ok {
			m.Licenses = &cyclonedx.Licenses{{Expression: strings.ReplaceAll(licence, " or ", " OR ")}}
		}
		packages = append(packages, m)
	}
	return nested(c, packages), nil
}

func library(in, name, url, version string) cyclonedx.Component {
	return cyclonedx.Component{BOMRef: strings.TrimPrefix(in+"/"+url, "/"), Type: cyclonedx.ComponentTypeLibrary, Name: name, Version: version, PackageURL: url}
}

func nested(c cyclonedx.Component, parts []cyclonedx.Component) cyclonedx.Component {
	if len(parts) > 0 {
		sortComponents(parts)
		c.Components = &parts
	}
	return c
}

func sortComponents(parts []cyclonedx.Component) {
	slices.SortFunc(parts, func(a, b cyclonedx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
}

func purl(kind, namespace, name, version string, qualifiers map[string]string) string {
	return packageurl.NewPackageURL(kind, namespace, name, version, packageurl.QualifiersFromMap(qualifiers), "").ToString()
}

func hashes(sha256 string) *[]cyclonedx.Hash {
	return &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: sha256}}
}

func lastCut(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func fileSum(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("%s cannot be read: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
