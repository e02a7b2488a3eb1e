package stackfile

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"platter/provision"
	"platter/provision/yamlfile"
)

// text is a template of a component.
type text struct {
	component string
	template  string
	file      string         // where it stands; empty: in the stack file
	at        yamlfile.Value // that names it
	// check looks at what the template gives; secrets are the values that must
	// not get everywhere.
	check func(out string, secrets []string) error
}

// inline is a template in the stack file itself.
func (p *parser) inline(c provision.Component, at yamlfile.Value, template string, check func(string, []string) error) {
	if template != "" {
		p.texts = append(p.texts, text{c.Name, template, "", at, check})
	}
}

// try carries out every template as it will be on nodes: in racks of three nodes
// and of one, with all optional components, with none, and with each alone.
func (p *parser) try(s *provision.Stack) {
	var all []string
	needs := map[string][]string{}
	optional := map[string]bool{}
	for _, c := range s.Components {
		needs[c.Name] = c.Needs
		if c.Optional {
			all = append(all, c.Name)
			optional[c.Name] = true
		}
	}
	// with adds what name needs to what is wanted.
	var with func(wanted []string, name string) []string
	with = func(wanted []string, name string) []string {
		if !optional[name] || slices.Contains(wanted, name) {
			return wanted
		}
		wanted = append(wanted, name)
		for _, n := range needs[name] {
			wanted = with(wanted, n)
		}
		return wanted
	}
	said := map[yamlfile.Problem]bool{}
	trials := [][]string{all, nil}
	for _, name := range all {
		trials = append(trials, with(nil, name))
	}
	for _, wanted := range trials {
		for _, size := range []int{3, 1} {
			p.trial(s, wanted, size, said)
		}
	}
}

// trial carries out the templates in one made-up rack.
func (p *parser) trial(s *provision.Stack, wanted []string, size int, said map[yamlfile.Problem]bool) {
	r := &provision.Rack{Name: "trial", Networks: []provision.Network{{Subnet: netip.MustParsePrefix("10.0.0.0/24"), DiscHost: netip.MustParseAddr("10.0.0.254")}},
		Stack: provision.StackSpec{Domain: "im.example.org", Users: provision.DefaultUsers}}
	var roles []string
	for _, c := range s.Components {
		if c.Place.Role != "" {
			roles = append(roles, c.Place.Role)
		}
	}
	for i := range size {
		r.Nodes = append(r.Nodes, provision.Node{Name: fmt.Sprintf("node%d", i+1), Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), Roles: roles})
	}
	// What is wrong with needs has been said.
	r.Stack.Components, _ = s.Place(r.Nodes, wanted)
	for _, n := range r.Nodes {
		plan, err := provision.PlanFor(r, n, "", 1, provision.ImageRef{})
		if err != nil {
			panic(err) // the rack is made up above
		}
		for _, c := range plan.Stack.Components {
			if !slices.Contains(c.Members, n.Name) {
				continue
			}
			view, secrets := trialView(plan, c)
			for _, t := range p.texts {
				if t.component == c.Name {
					p.tryText(t, view, secrets, said)
				}
			}
		}
	}
}

// trialView is what a template of c sees, with made-up secrets: those that c
// lists and no others.
func trialView(plan provision.Plan, c provision.PlacedComponent) (provision.View, []string) {
	sec := provision.StackSecrets{Cookie: "trialcookie", CA: "trial CA", Cert: "trial certificate", Key: "trial private key",
		Probes: []provision.Account{{User: "probe-a", Password: "trial"}, {User: "probe-b", Password: "trial"}}, Named: map[string]string{}}
	values := []string{sec.Key, sec.Cookie}
	for _, s := range c.Secrets {
		sum := sha256.Sum256([]byte(s.Name))
		value := strings.Repeat(hex.EncodeToString(sum[:]), 2)[:s.Length]
		sec.Named[s.Name] = value
		if value != "" {
			values = append(values, value)
		}
	}
	return provision.ViewOf(plan, sec), values
}

func (p *parser) tryText(t text, view provision.View, secrets []string, said map[yamlfile.Problem]bool) {
	out, err := view.Render("it", t.template)
	line, column := 0, 0
	if err != nil {
		line, column, err = place(err)
	} else if t.check != nil {
		err = t.check(out, secrets)
	}
	if err == nil {
		return
	}
	var several yamlfile.Problems
	if errors.As(err, &several) {
		for _, problem := range several {
			if !said[problem] {
				said[problem] = true
				p.file.Add(problem)
			}
		}
		return
	}
	problem := yamlfile.Problem{File: t.file, Line: line, Column: column, Message: err.Error()}
	if t.file == "" {
		problem.Message = fmt.Sprintf("%d %s", t.at.Line(), problem.Message)
	}
	if said[problem] {
		return
	}
	said[problem] = true
	if t.file == "" || line == 0 {
		t.at.Failf("%v", err)
		return
	}
	p.file.Add(problem)
}

// templateError is what text/template says of a template called "it".
var templateError = regexp.MustCompile(`(?s)^template: [^:]*:(\d+)(?::(\d+))?: (?:executing "[^"]*" )?(.*)$`)

// place takes the place out of an error of text/template. Columns begin at 1.
func place(err error) (line, column int, rest error) {
	m := templateError.FindStringSubmatch(err.Error())
	if m == nil {
		return 1, 0, err
	}
	line, _ = strconv.Atoi(m[1])
	if m[2] != "" {
		column, _ = strconv.Atoi(m[2])
		column++
	}
	return line, column, errors.New(callError.ReplaceAllString(m[3], "$1"))
}

var callError = regexp.MustCompile(`(>: )error calling \w+: `)

func holds(out string, secrets []string) bool {
	return slices.ContainsFunc(secrets, func(s string) bool { return strings.Contains(out, s) })
}

var errShown = errors.New("a secret here would be seen in the list of processes and in logs: put it into a file")

func checkArg(out string, secrets []string) error {
	if holds(out, secrets) {
		return errShown
	}
	return nil
}

func checkTCP(out string, secrets []string) error {
	host, port, err := net.SplitHostPort(out)
	if n, _ := strconv.Atoi(port); err != nil || host == "" || n < 1 || n > 65535 {
		return fmt.Errorf("gives %q, not HOST:PORT", out)
	}
	return checkArg(out, secrets)
}

func checkURL(out string, secrets []string) error {
	if u, err := url.Parse(out); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("gives %q, not an address that begins with http:// or https://", out)
	}
	return checkArg(out, secrets)
}
