package provision

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"text/template"
)

// View is what the templates of a stack file see of a node.
type View struct {
	Rack    string
	Node    string     // name of this node
	Address netip.Addr // of this node
	Domain  string     // XMPP domain
	Service string     // DNS name that certificates of this rack's nodes have and no others, see Plan.ServiceName
	Probes  []string   // names of the probes' accounts
	Cookie  string     // of the Erlang distribution
	CA      string     // PEM: the site's CA
	Cert    string     // PEM: this node's certificate, for the domain, the node's name and its address
	Key     string     // PEM: the certificate's private key
	Size    Sizing     // for the rack's users and nodes

	plan Plan
	sec  StackSecrets
}

// ViewOf is the view of plan's node.
func ViewOf(plan Plan, sec StackSecrets) View {
	v := View{Rack: plan.Rack, Node: plan.Node, Address: plan.Net.Address.Addr(), Domain: plan.Stack.Domain, Service: plan.ServiceName(),
		Size: plan.Size(), Cookie: sec.Cookie, CA: pemLines(sec.CA), Cert: pemLines(sec.Cert), Key: pemLines(sec.Key), plan: plan, sec: sec}
	for _, a := range sec.Probes {
		v.Probes = append(v.Probes, a.User)
	}
	return v
}

func pemLines(pem string) string { return strings.TrimRight(pem, "\n") + "\n" }

func (v View) component(name string) (PlacedComponent, error) {
	i := slices.IndexFunc(v.plan.Stack.Components, func(c PlacedComponent) bool { return c.Name == name })
	if i < 0 {
		return PlacedComponent{}, fmt.Errorf("there is no component %q", name)
	}
	return v.plan.Stack.Components[i], nil
}

// Has tells whether the rack runs the component at all.
func (v View) Has(component string) bool {
	_, err := v.component(component)
	return err == nil
}

// Members are the nodes that have the component, in rack order.
func (v View) Members(component string) ([]Host, error) {
	c, err := v.component(component)
	if err != nil {
		return nil, err
	}
	var out []Host
	for _, h := range v.plan.Hosts {
		if slices.Contains(c.Members, h.Name) {
			out = append(out, h)
		}
	}
	return out, nil
}

// Port is the number of a component's port.
func (v View) Port(component, name string) (int, error) {
	c, err := v.component(component)
	if err != nil {
		return 0, err
	}
	for _, p := range c.Ports {
		if p.Name == name {
			return p.Number, nil
		}
	}
	return 0, fmt.Errorf("the component %s has no port %q", component, name)
}

// Secret is the value of a named secret.
func (v View) Secret(name string) (string, error) {
	s, ok := v.sec.Named[name]
	if !ok {
		return "", fmt.Errorf("the secret %q is not among those that this node's components list", name)
	}
	return s, nil
}

// Render carries out a template of a stack file. name serves messages.
//
// Beside text/template's own there are the functions quote, which makes a string
// of JSON, and so of YAML, replace OLD NEW TEXT, and mib BYTES: whole mebibytes.
func (v View) Render(name, text string) (string, error) {
	t, err := template.New(name).Option("missingkey=error").Funcs(functions).Parse(text)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		return "", err
	}
	return b.String(), nil
}

var functions = template.FuncMap{
	"quote":   quote,
	"replace": func(old, with, text string) string { return strings.ReplaceAll(text, old, with) },
	"mib":     func(bytes int64) int64 { return bytes / mib },
}

func quote(s string) (string, error) {
	b, err := json.Marshal(s)
	return string(b), err
}
