package quadlet

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"platter/provision/yamlfile"
)

// What the Compose specification has and Platter does not take, and why.
var (
	refusedInFile = map[string]string{
		"version": "it has no meaning any more, leave it out",
		"name":    "the component's name in the stack file is the project's",
		"secrets": "make a file of the component with mode \"0600\" and name it in env_file or volumes",
		"configs": "make a file of the component and name it in volumes",
		"include": "write it out",
		"models":  "there is nothing to run them",
	}
	refusedInService = map[string]string{
		"build":          "images come on the disc: build them before, and list them in the stack file",
		"pull_policy":    "nothing is ever pulled",
		"container_name": "the container is called COMPONENT_SERVICE",
		"privileged":     "it would own the host: name what it needs in cap_add",
		"devices":        "containers get no devices of the host",
		"pid":            "the processes of the host are the host's",
		"ipc":            "services share no memory",
		"userns_mode":    "set user",
		"cgroup_parent":  "systemd places the service",
		"deploy":         "the stack file's place says where a component runs; here, mem_limit and cpus bound it",
		"scale":          "the stack file's place says where a component runs",
		"profiles":       "the rack file says which optional components run",
		"extends":        "write it out",
		"expose":         "services of a component reach each other at every port, leave it out",
		"links":          "services of a component reach each other by their names, leave it out",
		"networks":       "all services of a component are in one network, leave it out",
		"dns":            "a rack has no name servers; services of a component find each other by their names",
		"extra_hosts":    "services of a component find each other by their names; use addresses for others",
		"secrets":        "make a file of the component with mode \"0600\" and name it in env_file or volumes",
		"configs":        "make a file of the component and name it in volumes",
		"logging":        "the journal has what a service prints: journalctl -u COMPONENT_SERVICE",
		"volumes_from":   "name the volumes in both services",
		"tty":            "nobody sits before it",
		"stdin_open":     "nobody sits before it",
		"sysctls":        "kernel settings are the host's: see the rack file's host.kernel",
		"platform":       "the image's digest decides",
		"runtime":        "crun runs all containers",
	}
)

// wanted says how others wait for a service.
type wanted struct{ started, healthy bool }

// service is one service of a compose file while it is translated.
type service struct {
	name  string
	needs []string
	text  func(want wanted) string
}

// compose translates a compose file into a network and a container for each
// service.
func (t *translator) compose(v yamlfile.Value) {
	top := fields(v, refusedInFile, "services", "networks", "volumes")
	subnet := ""
	for _, n := range top["networks"].Pairs() {
		if name := yamlfile.Get(n.Key, yamlfile.Text); name != "default" {
			n.Key.Failf("all services of a component are in one network, default")
		}
		ipam := n.Value.Fields("ipam")["ipam"].Fields("config")["config"].List()
		for i, c := range ipam {
			subnet = yamlfile.Get(c.Fields("subnet")["subnet"].Required(), parseSubnet)
			if i > 0 {
				c.Failf("the network has one subnet")
			}
		}
	}
	volumes := map[string]bool{}
	for _, n := range top["volumes"].Pairs() {
		volumes[yamlfile.Get(n.Key, parseVolume)] = true
		if len(n.Value.Pairs()) > 0 {
			n.Key.Failf("a volume takes no settings: it is a folder on the node's own disk")
		}
	}
	var names []string
	for _, p := range top["services"].Required().Pairs() {
		names = append(names, text(p.Key))
	}
	if top["services"].Exists() && len(names) == 0 {
		top["services"].Failf("services has no service")
	}
	var services []service
	want := map[string]wanted{}
	checked := map[string]bool{} // services with a health check
	var healthy []func()
	bridged := false
	for _, p := range top["services"].Pairs() {
		s := service{name: yamlfile.Get(p.Key, parseName)}
		m := fields(p.Value, refusedInService, "image", "command", "entrypoint", "environment", "env_file", "ports", "volumes", "tmpfs", "user",
			"working_dir", "read_only", "init", "cap_add", "cap_drop", "security_opt", "ulimits", "mem_limit", "cpus", "depends_on", "healthcheck",
			"restart", "labels", "hostname", "network_mode", "stop_grace_period", "stop_signal")
		if !p.Value.Exists() {
			p.Key.Failf("the service %s is empty", s.name)
		}
		need := func(v yamlfile.Value, name string, w wanted) {
			if !slices.Contains(names, name) {
				v.Failf("%s depends on %s, which is no service%s", s.name, name, yamlfile.Suggest(name, names))
			}
			s.needs = append(s.needs, name)
			o := want[name]
			want[name] = wanted{o.started || w.started, o.healthy || w.healthy}
			if w.healthy {
				healthy = append(healthy, func() {
					if !checked[name] {
						v.Failf("%s waits until %s is healthy, which has no healthcheck", s.name, name)
					}
				})
			}
		}
		if d := m["depends_on"]; d.IsMapping() {
			for _, p := range d.Pairs() {
				condition := yamlfile.Get(p.Value.Fields("condition")["condition"].Required(), oneOf("service_started", "service_healthy"))
				need(p.Key, text(p.Key), wanted{condition == "service_started", condition == "service_healthy"})
			}
		} else {
			for _, d := range d.List() {
				need(d, yamlfile.Get(d, yamlfile.Text), wanted{started: true})
			}
		}
		host := yamlfile.Get(m["network_mode"], oneOf("host", "none", "bridge"))
		bridged = bridged || host == "" || host == "bridge"
		health := t.health(m["healthcheck"])
		checked[s.name] = len(health) > 0
		s.text = t.service(s.name, host, m, volumes, health, &s.needs)
		services = append(services, s)
	}
	for _, f := range healthy {
		f()
	}
	if bridged {
		t.network(subnet)
	}
	for len(services) > 0 {
		i := slices.IndexFunc(services, func(s service) bool {
			return !slices.ContainsFunc(services, func(o service) bool { return slices.Contains(s.needs, o.name) })
		})
		if i < 0 {
			top["services"].Failf("no service can be the first to start: %s wait for each other", listed(services))
			return
		}
		s := services[i]
		unit := t.c.Name + "_" + s.name
		t.file(unit+".container", 0o644, s.text(want[s.name]))
		t.out.Services = append(t.out.Services, unit+".service")
		services = slices.Delete(services, i, i+1)
	}
}

func listed(services []service) string {
	var names []string
	for _, s := range services {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// service reads a service and returns what writes its file.
func (t *translator) service(name, network string, m map[string]yamlfile.Value, volumes map[string]bool, health [][2]string, needs *[]string) func(wanted) string {
	image := t.image(m["image"])
	var u, limits unit // the sections Container and Service, from their second line
	u.set("ContainerName", t.c.Name+"_"+name)
	u.set("Image", Reference(image))
	u.set("Pull", "never")
	switch network {
	case "host", "none":
		u.set("Network", network)
		for _, key := range []string{"ports", "hostname"} {
			if network == "host" && m[key].Exists() {
				m[key].Failf("%s has no effect in the network of the host", key)
			}
		}
	default:
		u.set("Network", t.c.Name+".network")
		u.set("NetworkAlias", name)
	}
	if m["hostname"].Exists() {
		u.set("HostName", yamlfile.Get(m["hostname"], parseName))
	} else if network != "host" {
		u.set("HostName", name)
	}
	for _, p := range m["ports"].List() {
		u.set("PublishPort", t.port(p))
	}
	for _, v := range m["volumes"].List() {
		u.set("Volume", t.volume(v, volumes))
	}
	for _, v := range several(m["tmpfs"]) {
		u.set("Tmpfs", yamlfile.Get(v, parseTmpfs))
	}
	if words := command(m["entrypoint"]); len(words) > 0 {
		u.literal("Entrypoint", array(words))
	}
	if words := command(m["command"]); len(words) > 0 {
		u.words("Exec", words...)
	}
	for _, p := range assignments(m["environment"]) {
		u.words("Environment", p)
	}
	for _, v := range several(m["env_file"]) {
		file := yamlfile.Get(v, yamlfile.Text)
		t.hostPath(v, file)
		u.set("EnvironmentFile", file)
	}
	for _, p := range assignments(m["labels"]) {
		u.words("Label", p)
	}
	u.set("User", yamlfile.Get(m["user"], parseUser))
	u.set("WorkingDir", yamlfile.Get(m["working_dir"], parseInside))
	if yamlfile.Get(m["init"], yamlfile.Bool) {
		u.set("RunInit", "true")
	}
	if yamlfile.Get(m["read_only"], yamlfile.Bool) {
		u.set("ReadOnly", "true")
		u.set("ReadOnlyTmpfs", "false") // tmpfs says what is writable
	}
	for _, v := range m["cap_add"].List() {
		u.set("AddCapability", yamlfile.Get(v, parseCapability))
	}
	for _, v := range m["cap_drop"].List() {
		u.set("DropCapability", yamlfile.Get(v, parseCapability))
	}
	for _, v := range m["security_opt"].List() {
		if yamlfile.Get(v, oneOf("no-new-privileges", "no-new-privileges:true")) != "" {
			u.set("NoNewPrivileges", "true")
		}
	}
	for _, p := range m["ulimits"].Pairs() {
		what := yamlfile.Get(p.Key, match(`[a-z]+`, "a limit such as nofile"))
		limit := yamlfile.Int(-1, 1<<40)
		if p.Value.IsMapping() {
			l := p.Value.Fields("soft", "hard")
			u.set("Ulimit", fmt.Sprintf("%s=%d:%d", what, yamlfile.Get(l["soft"].Required(), limit), yamlfile.Get(l["hard"].Required(), limit)))
		} else {
			n := yamlfile.Get(p.Value.Required(), limit)
			u.set("Ulimit", fmt.Sprintf("%s=%d:%d", what, n, n))
		}
	}
	u.set("StopSignal", yamlfile.Get(m["stop_signal"], match(`SIG[A-Z0-9]+`, "a signal such as SIGINT")))
	if m["stop_grace_period"].Exists() {
		s := int(yamlfile.Get(m["stop_grace_period"], parseDuration).Seconds() + 0.999)
		u.set("StopTimeout", strconv.Itoa(s))
		limits.set("TimeoutStopSec", strconv.Itoa(s+20)) // podman's own work comes on top
	}
	yamlfile.Get(m["restart"], parseRestart) // systemd restarts everything
	if m["mem_limit"].Exists() {
		limits.set("MemoryMax", strconv.FormatInt(yamlfile.Get(m["mem_limit"], parseBytes), 10))
	}
	if m["cpus"].Exists() {
		limits.set("CPUQuota", yamlfile.Get(m["cpus"], parseCPUs))
	}
	for _, h := range health {
		u.set(h[0], h[1])
	}
	return func(want wanted) string {
		var out unit
		out.section("Unit")
		out.set("Description", fmt.Sprintf("%s of the component %s", name, t.c.Name))
		for _, n := range *needs {
			// A service that is restarted takes nobody with it.
			out.set("Wants", t.c.Name+"_"+n+".service")
			out.set("After", t.c.Name+"_"+n+".service")
		}
		out.section("Container")
		out.WriteString(u.String())
		if len(health) > 0 && (want.healthy || !want.started) {
			out.set("Notify", "healthy")
		}
		out.section("Service")
		// What waits for this service goes on waiting while it is tried again.
		out.set("RestartMode", "direct")
		out.WriteString(limits.String())
		out.section("Install")
		out.set("WantedBy", "multi-user.target")
		return out.String()
	}
}

var portForm = regexp.MustCompile(`^(?:(\d+\.\d+\.\d+\.\d+):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?$`)

func (t *translator) port(v yamlfile.Value) string {
	return yamlfile.Get(v, func(s string) (string, error) {
		m := portForm.FindStringSubmatch(s)
		if m == nil {
			return "", errors.New("must be HOST:CONTAINER or ADDRESS:HOST:CONTAINER, with numbers of ports, and /udp where it is that")
		}
		if _, err := netip.ParseAddr(m[1]); m[1] != "" && err != nil {
			return "", fmt.Errorf("%s is no address", m[1])
		}
		for _, n := range m[2:4] {
			if p, _ := strconv.Atoi(n); p < 1 || p > 65535 {
				return "", fmt.Errorf("%s is no port", n)
			}
		}
		host, _ := strconv.Atoi(m[2])
		t.publish(v, m[1], host, m[4] == "udp")
		return s, nil
	})
}

var volumeForm = regexp.MustCompile(`^([A-Za-z0-9._@+=/-]+):(/[A-Za-z0-9._@+=/-]*)(:ro|:rw)?$`)

func (t *translator) volume(v yamlfile.Value, named map[string]bool) string {
	return yamlfile.Get(v, func(s string) (string, error) {
		m := volumeForm.FindStringSubmatch(s)
		switch {
		case m == nil:
			return "", errors.New("must be NAME:PATH or PATH:PATH, with :ro where it is only read")
		case strings.HasPrefix(m[1], "/"):
			t.hostPath(v, m[1])
			return s, nil
		case strings.HasPrefix(m[1], "."):
			return "", errors.New("a node has no project folder: name an absolute path")
		case !named[m[1]]:
			return "", fmt.Errorf("%s is not among the volumes of the file", m[1])
		}
		return t.c.Name + "_" + s, nil
	})
}

// health reads a health check and returns its keys and values.
func (t *translator) health(v yamlfile.Value) [][2]string {
	if !v.Exists() {
		return nil
	}
	m := v.Fields("test", "interval", "timeout", "retries", "start_period", "disable")
	if yamlfile.Get(m["disable"], yamlfile.Bool) {
		return nil
	}
	cmd := ""
	if test := m["test"].Required(); test.IsList() {
		words := command(test)
		switch {
		case len(words) == 1 && words[0] == "NONE":
			return nil
		case len(words) == 2 && words[0] == "CMD-SHELL":
			cmd = array([]string{"/bin/sh", "-c", words[1]})
		case len(words) == 2 && words[0] == "CMD":
			// podman takes a list of one for the shell's.
			if cmd = "CMD " + words[1]; strings.ContainsAny(words[1], " \t\n\\\"'") {
				test.Failf("a program without arguments must have a simple name here")
			}
		case len(words) > 2 && words[0] == "CMD":
			cmd = array(words[1:])
		default:
			test.Failf("test must be [CMD, PROGRAM, ARGUMENT...], [CMD-SHELL, COMMAND] or a command of the shell")
		}
	} else {
		cmd = array([]string{"/bin/sh", "-c", yamlfile.Get(test, interpolated)})
	}
	out := [][2]string{{"HealthCmd", escape(cmd)}}
	for _, k := range [][2]string{{"HealthInterval", "interval"}, {"HealthTimeout", "timeout"}, {"HealthStartPeriod", "start_period"}} {
		if m[k[1]].Exists() {
			out = append(out, [2]string{k[0], yamlfile.Get(m[k[1]], parseDuration).String()})
		}
	}
	if m["retries"].Exists() {
		out = append(out, [2]string{"HealthRetries", strconv.Itoa(yamlfile.Get(m["retries"], yamlfile.Int(1, 1000)))})
	}
	return out
}

// several reads one value or a list of them.
func several(v yamlfile.Value) []yamlfile.Value {
	if v.IsList() || !v.Exists() {
		return v.List()
	}
	return []yamlfile.Value{v}
}

// command reads a list of words, or a line of words that needs no quotes.
func command(v yamlfile.Value) []string {
	if !v.IsList() {
		line := yamlfile.Get(v, interpolated)
		if strings.ContainsAny(line, "\"'\\") {
			v.Failf("a command with quotes is written as a list")
		}
		return strings.Fields(line)
	}
	var words []string
	for _, w := range v.List() {
		word := yamlfile.Get(w, interpolated)
		if word == "" {
			w.Failf("a word of a command must not be empty")
		}
		words = append(words, word)
	}
	return words
}

// assignments reads a mapping, or a list of KEY=VALUE.
func assignments(v yamlfile.Value) []string {
	var out []string
	check := func(at yamlfile.Value, key, value string) {
		if !keyForm.MatchString(key) {
			at.Failf("%q is no name of letters, digits and ._/-", key)
		}
		out = append(out, key+"="+value)
	}
	if v.IsMapping() {
		for _, p := range v.Pairs() {
			if !p.Value.Exists() {
				p.Key.Failf("%s has no value: nothing is taken from the host's environment", text(p.Key))
			}
			check(p.Key, text(p.Key), yamlfile.Get(p.Value, interpolated))
		}
		return out
	}
	for _, e := range v.List() {
		text := yamlfile.Get(e, interpolated)
		key, value, ok := strings.Cut(text, "=")
		if !ok && text != "" {
			e.Failf("%q must be KEY=VALUE: nothing is taken from the host's environment", text)
		}
		check(e, key, value)
	}
	return out
}

var keyForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._/-]*$`)

// interpolated reads text as the specification does: $$ is a dollar sign. There
// are no variables.
func interpolated(s string) (string, error) {
	if strings.Contains(strings.ReplaceAll(s, "$$", ""), "$") {
		return "", errors.New("variables are not replaced here: use the stack's template, such as {{.Node}}, or write $$ for a dollar sign")
	}
	return plain(strings.ReplaceAll(s, "$$", "$"))
}

var (
	parseVolume     = match(`[a-z0-9][a-z0-9_-]{0,62}`, "lower-case letters, digits, _ and hyphens, at most 63")
	parseTmpfs      = match(`/[A-Za-z0-9._@+=/-]*(:[a-z0-9=,]+)?`, "a path in the container, with options such as /tmp:size=64m")
	parseUser       = match(`[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?`, "USER or USER:GROUP")
	parseCapability = match(`(CAP_)?[A-Z_]+`, "a capability such as NET_BIND_SERVICE, or ALL")
)

func oneOf(known ...string) func(string) (string, error) {
	return func(s string) (string, error) {
		if slices.Contains(known, s) {
			return s, nil
		}
		return "", fmt.Errorf("is not supported%s", yamlfile.Suggest(s, known))
	}
}

func parseRestart(s string) (string, error) {
	if s != "always" && s != "unless-stopped" {
		return "", errors.New("is not supported: every service is restarted always, leave it out")
	}
	return s, nil
}

func parseSubnet(s string) (string, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p != p.Masked() {
		return "", errors.New("must be an IPv4 subnet such as 10.89.7.0/24")
	}
	return s, nil
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 || d > 24*time.Hour {
		return 0, errors.New("must be a time such as 5s or 1m30s, at most a day")
	}
	return d, nil
}

var bytesForm = regexp.MustCompile(`^(\d{1,9})([bkmg])b?$`)

func parseBytes(s string) (int64, error) {
	m := bytesForm.FindStringSubmatch(s)
	if m == nil {
		return 0, errors.New("must be a size such as 512m or 2g")
	}
	n, _ := strconv.ParseInt(m[1], 10, 64)
	return n << (10 * strings.Index("bkmg", m[2])), nil
}

func parseCPUs(s string) (string, error) {
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || n < 0.01 || n > 4096 {
		return "", errors.New("must be a number of processors such as 0.5")
	}
	return strconv.Itoa(int(n*100+0.5)) + "%", nil
}
