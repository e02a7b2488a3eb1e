package stackfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"

	"platter/provision/yamlfile"
)

const schemaFile = "../../docs/stack.schema.json"

func validator(t *testing.T) func(text []byte) error {
	t.Helper()
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	return func(text []byte) error {
		var doc any
		if err := yaml.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		value, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		return schema.Validate(value)
	}
}

// Another program's validator and the schema agree with the parser: on what is
// good, and on every mistake that a schema can see.
func TestSchema(t *testing.T) {
	validate := validator(t)
	builtin, err := embedded.ReadFile("default/" + FileName)
	if err != nil {
		t.Fatal(err)
	}
	dir := goodStack(t)
	good, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"built-in": builtin, "good": good} {
		if err := validate(text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, c := range badForms {
		text := strings.Replace(string(good), c.old, c.new, 1)
		if text == string(good) {
			t.Fatalf("%q is not in the good file", c.old)
		}
		if err := validate([]byte(text)); err == nil {
			t.Errorf("the schema takes %q", c.new)
		}
		if err := os.WriteFile(filepath.Join(dir, FileName), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, want %q", c.new, err, c.says)
		}
	}
}

// badForms are replacements in the good file that make it wrong.
var badForms = []struct{ old, new, says string }{
	{"name: im", "name: Im", "lower-case"},
	{"name: im\n", "", "name is missing"},
	{`"1.2-3"`, "v1", "a version"},
	{"length: 40", "length: 8", "from 16 to 128"},
	{"length: 40", "size: 40", "unknown key"},
	{"secrets:\n", "secret:\n", "unknown key"},
	{"  board: {}", "  Board: {}", "lower-case"},
	{"    kind: compose\n", "", "kind is missing"},
	{"kind: compose", "kind: docker", "is not known"},
	{"kind: compose", "kind: packages", "no images"},
	{"kind: kube", "kind: kube\n    packages: [x1]", "no packages"},
	{"    manifest: pod.yaml\n", "", "manifest is missing"},
	{"manifest: compose.yaml", "manifest: ../compose.yaml", "below the stack file's folder"},
	{"localhost/board:1", "board", "registry and tag"},
	{"digest: \"sha256:", "digest: \"sha512:", "64 hex"},
	{"file: board.oci.tar, ", "", "file is missing"},
	{"[etcd-server, etcd-client=3.5.16-4]", "[]", "empty"},
	{"etcd-server", "Etcd", "Debian package"},
	{"count: 3", "count: 0", "from 1"},
	{"odd: true", "odd: 3", "true or false"},
	{"role: storage", "rôle: storage", "unknown key"},
	{"units: [etcd.service]", "units: [etcd]", "systemd unit"},
	{"units: [etcd.service]", "units: [platter-agent.service]", "Platter's own"},
	{"number: 2379", "number: 65536", "from 1 to 65535"},
	{"local: true", "loopback: true", "unknown key"},
	{"{name: client, number", "{number", "name is missing"},
	{"health: {tcp:", "health: {url: x, tcp:", "one of them"},
	{"data: [/var/lib/etcd]", "data: [var/lib/etcd]", "absolute"},
	{"data: [/var/lib/etcd]", "data: [/var/lib/platter]", "Platter's own"},
	{"data: [/var/lib/etcd]", "data: [/var/../lib]", "must be written as"},
	{"member: etcd", "member: consul", "is not known"},
	{"needs: [db, etcd]", "needs: [db, etcd, db]", "twice"},
	{"path: /etc/default/etcd", "path: /etc/platter/x", "Platter's own"},
	{"from: etcd/etcd.env", "from: /etc/passwd", "below the stack file's folder"},
	{`mode: "0640"`, `mode: "4755"`, "permissions"},
	{"owner: root", "owner: Root", "a name of a user"},
	{"reload: true", "reload: yes please", "true or false"},
	{"{args: [patronictl, reinit]}", "{user: root}", "args is missing"},
	{"{args: [patronictl, reinit]}", "{args: []}", "no program"},
	{"after: true", "later: true", "unknown key"},
	{"optional: true", "optional: 1", "true or false"},
}

// Schema and parser know the same keys, at every place.
func TestSchemaKeys(t *testing.T) {
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	type object struct {
		Properties           map[string]any
		AdditionalProperties any
	}
	var schema struct {
		object
		Defs map[string]object `json:"$defs"`
	}
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	keys := func(o object) string { return strings.Join(slices.Sorted(maps.Keys(o.Properties)), " ") }
	want := map[string]string{"": keys(schema.object)}
	for name, def := range schema.Defs {
		if def.Properties != nil {
			want[name] = keys(def)
		}
	}
	secret := schema.Properties["secrets"].(map[string]any)["additionalProperties"].(map[string]any)["properties"].(map[string]any)
	want["secret"] = strings.Join(slices.Sorted(maps.Keys(secret)), " ")

	// A key that resembles none makes the parser list those that it knows.
	const unlike = "zzzzzzzzzzzz: 1"
	got := map[string]string{}
	for place, in := range map[string]string{
		"":          unlike,
		"secret":    "secrets: {a: {" + unlike + "}}",
		"component": "components: [{" + unlike + "}]",
		"image":     "components: [{images: [{" + unlike + "}]}]",
		"place":     "components: [{place: {" + unlike + "}}]",
		"port":      "components: [{ports: [{" + unlike + "}]}]",
		"health":    "components: [{health: {" + unlike + "}}]",
		"file":      "components: [{files: [{" + unlike + "}]}]",
		"command":   "components: [{upgrade: [{" + unlike + "}]}]",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, FileName), []byte(in), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := Load(dir)
		var problems yamlfile.Problems
		errors.As(err, &problems)
		for _, p := range problems {
			if m := regexp.MustCompile(`^unknown key "z+", known here: (.*)$`).FindStringSubmatch(p.Message); m != nil {
				got[place] = strings.Join(slices.Sorted(slices.Values(strings.Split(m[1], ", "))), " ")
			}
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error("the schema (-) and the parser (+) differ:", d)
	}
}
