package provision

import (
	"net/netip"
	"strings"
	"testing"
)

func TestView(t *testing.T) {
	host := func(name, addr string) Host { return Host{name, netip.MustParseAddr(addr)} }
	plan := Plan{Rack: "muc-7", Node: "n2", Net: NodeNet{Address: netip.MustParsePrefix("10.0.0.2/24")},
		Hosts: []Host{host("n1", "10.0.0.1"), host("n2", "10.0.0.2"), host("n3", "10.0.0.3")},
		Stack: StackPlan{Domain: "im.example.org", Components: []PlacedComponent{
			{Component{Name: "db", Ports: []Port{{Name: "sql", Number: 5432}}}, []string{"n3", "n1"}}}}}
	v := ViewOf(plan, StackSecrets{CA: "ca\n\n", Cert: "cert", Key: "key\n", Named: map[string]string{"pw": `a"b`},
		Probes: []Account{{User: "probe-a", Password: "hidden"}, {User: "probe-b"}}})
	for text, want := range map[string]string{
		`{{.Rack}} {{.Node}} {{.Address}} {{.Domain}} {{.Service}}`:       "muc-7 n2 10.0.0.2 im.example.org stack.muc-7.internal",
		`{{.CA}}{{.Cert}}{{.Key}}`:                                        "ca\ncert\nkey\n", // one newline ends each, however many came
		`{{range .Members "db"}}{{.Name}}={{.Address}} {{end}}`:           "n1=10.0.0.1 n3=10.0.0.3 ",
		`{{.Size.Users}} {{mib .Size.PostgreSQL.WorkMem}}MB`:              "100 4MB",
		`{{.Port "db" "sql"}} {{.Has "db"}} {{.Has "mq"}}`:                "5432 true false",
		`{{range .Probes}}{{.}} {{end}}`:                                  "probe-a probe-b ",
		`{{.Secret "pw"}} {{quote (.Secret "pw")}} {{quote "é <b>"}}`:     `a"b "a\"b" "é \u003cb\u003e"`,
		`{{if .Has "mq"}}{{.Port "mq" "amqp"}}{{end}}`:                    "",
		`{{with index (.Members "db") 0}}http://{{.Address}}:2379{{end}}`: "http://10.0.0.1:2379",
	} {
		if got, err := v.Render("t", text); err != nil || got != want {
			t.Errorf("%s\n is %q, %v\nwant %q", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"a\n{{.Port \"db\" \"sq\"}}": `t:2:2: executing "t" at <.Port>: error calling Port: the component db has no port "sq"`,
		`{{.Port "mq" "amqp"}}`:      `there is no component "mq"`,
		`{{.Members "mq"}}`:          `there is no component "mq"`,
		`{{.Secret "other"}}`:        `the secret "other" is not among those that this node's components list`,
		`{{.Nod}}`:                   "can't evaluate field Nod",
		"\n\n{{if}}":                 "t:3: missing value for if",
		`{{.plan}}`:                  "plan", // what is not exported is not to be had
		`{{.sec.Cookie}}`:            "sec",
	} {
		got, err := v.Render("t", text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n gives %q, %v\nwant %q", text, got, err, want)
		}
	}
}
