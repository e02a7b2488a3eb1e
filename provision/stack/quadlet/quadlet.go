package quadlet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"platter/provision"
	"platter/provision/yamlfile"
)

// Dir is a folder that the generator looks into; all of it is Platter's.
const Dir = "/etc/containers/systemd/platter"

// Units are what a component becomes on a node.
type Units struct {
	Files []File
	// Services that the generator makes of the files, each after those that it
	// waits for.
	Services []string
}

// File is one file of Dir.
type File struct {
	Name string
	Mode uint32 // permission bits
	Text string
}

// Of translates the component c, whose compose file or Kubernetes manifest, with
// its template carried out, is text. The error is yamlfile.Problems with all
// mistakes, in a file called name.
func Of(c provision.Component, name, text string) (Units, error) {
	t := &translator{c: c, ports: map[string]bool{}}
	var f *yamlfile.File
	switch c.Kind {
	case provision.KindCompose:
		f = yamlfile.Parse(name, []byte(text))
		t.compose(f.Root())
	case provision.KindKube:
		var docs []yamlfile.Value
		f, docs = yamlfile.ParseAll(name, []byte(text))
		t.kube(docs, text)
	default:
		return Units{}, fmt.Errorf("component %s: a component of kind %s has no containers", c.Name, c.Kind)
	}
	if err := f.Err(); err != nil {
		return Units{}, err
	}
	return t.out, nil
}

// Reference names the image by its content; its tag may move, this cannot.
func Reference(i provision.OCIImage) string {
	return i.Name[:strings.LastIndex(i.Name, ":")] + "@" + i.Digest
}

type translator struct {
	c     provision.Component
	ports map[string]bool // of the host, used so far
	out   Units
}

// unit is the text of a file in the making.
type unit struct{ strings.Builder }

func (u *unit) section(name string) {
	if u.Len() > 0 {
		u.WriteByte('\n')
	} else {
		u.WriteString("# Written by Platter.\n")
	}
	fmt.Fprintf(u, "[%s]\n", name)
}

// set adds a key whose value is taken as it is.
func (u *unit) set(key, value string) {
	if value != "" {
		fmt.Fprintf(u, "%s=%s\n", key, value)
	}
}

// literal adds a key whose value the generator hands on as one argument. systemd
// still replaces % and $ in that, see systemd.service(5).
func (u *unit) literal(key, value string) { u.set(key, escape(value)) }

// words adds a key whose value the generator splits into words.
func (u *unit) words(key string, words ...string) {
	for i, w := range words {
		words[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\t", `\t`).Replace(escape(w)) + `"`
	}
	u.set(key, strings.Join(words, " "))
}

func escape(s string) string { return strings.NewReplacer("%", "%%", "$", "$$").Replace(s) }

// array is a list of words as podman takes it where a shell command could stand.
func array(words []string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.Encode(words) // strings have a form in JSON
	return strings.TrimSpace(b.String())
}

func (t *translator) file(name string, mode uint32, text string) {
	t.out.Files = append(t.out.Files, File{name, mode, text})
}

// network adds the component's network, which subnet may place.
func (t *translator) network(subnet string) {
	var u unit
	u.section("Unit")
	u.set("Description", "network of the component "+t.c.Name)
	u.section("Network")
	u.set("NetworkName", t.c.Name+"_default")
	u.set("Subnet", subnet)
	t.file(t.c.Name+".network", 0o644, u.String())
}

// image checks that the stack file has the image.
func (t *translator) image(v yamlfile.Value) provision.OCIImage {
	name := yamlfile.Get(v.Required(), yamlfile.Text)
	var known []string
	for _, i := range t.c.Images {
		if i.Name == name {
			return i
		}
		known = append(known, i.Name)
	}
	if name != "" {
		v.Failf("the image %s is not among those of the component %s%s", name, t.c.Name, yamlfile.Suggest(name, known))
	}
	return provision.OCIImage{Name: ":"}
}

// publish checks that the stack file gives the port of the host to the
// component; address is empty for all.
func (t *translator) publish(v yamlfile.Value, address string, number int, udp bool) {
	what := "port " + strconv.Itoa(number)
	if udp {
		what += "/udp"
	}
	i := slices.IndexFunc(t.c.Ports, func(p provision.Port) bool { return p.Number == number && p.UDP == udp })
	switch {
	case i < 0:
		v.Failf("%s of the host is not among the ports that the stack file gives to the component %s", what, t.c.Name)
	case t.c.Ports[i].Local && address != "127.0.0.1":
		v.Failf("%s is local in the stack file: publish it at 127.0.0.1", what)
	case t.ports[what]:
		v.Failf("%s of the host is published twice", what)
	}
	t.ports[what] = true
}

// hostPath reads a path on the node that a container may see: files that the
// stack file writes for the component, and its data.
func (t *translator) hostPath(v yamlfile.Value, p string) {
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p {
		v.Failf("%s must be an absolute path without detours", p)
		return
	}
	for _, d := range t.c.Data {
		if p == d || strings.HasPrefix(p, d+"/") {
			return
		}
	}
	if !slices.ContainsFunc(t.c.Files, func(f provision.StackFile) bool { return f.Path == p }) {
		v.Failf("%s is neither a file nor below a data folder of the component %s: list it in the stack file", p, t.c.Name)
	}
}

func match(form, what string) func(string) (string, error) {
	return yamlfile.Match(regexp.MustCompile("^("+form+")$"), what)
}

var (
	parseName   = match(`[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`, "lower-case letters, digits and hyphens, at most 63")
	parseInside = match(`/[A-Za-z0-9._@+=/-]*`, "an absolute path in the container, of letters, digits and ._@+=/-")
)

// text is a scalar as it is written.
func text(v yamlfile.Value) string {
	return yamlfile.Get(v, func(s string) (string, error) { return s, nil })
}

// plain takes text that fits into one line of a unit file.
func plain(s string) (string, error) {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' && r != '\n' || r == 0x7f }) {
		return "", errors.New("has control characters")
	}
	return s, nil
}

// fields reads a mapping like yamlfile.Value.Fields. Keys of refused are in the
// specification; whoever uses one hears why it is not taken.
func fields(v yamlfile.Value, refused map[string]string, known ...string) map[string]yamlfile.Value {
	words := slices.Sorted(maps.Keys(refused))
	m := v.Fields(append(known, words...)...)
	for _, k := range words {
		if m[k].Exists() {
			m[k].Failf("%s is not supported: %s", k, refused[k])
		}
	}
	return m
}
