package quadlet

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"platter/provision/yamlfile"
)

// shape is what part of a manifest may look like.
type shape interface{ check(v yamlfile.Value) }

type (
	single  struct{}             // one value
	object  map[string]shape     // the keys that are taken
	listOf  struct{ of shape }   // a sequence
	mapping struct{ to shape }   // keys are data
	refused struct{ why string } // Kubernetes has it
)

func (single) check(v yamlfile.Value) { text(v) }

func (o object) check(v yamlfile.Value) {
	known := slices.Sorted(maps.Keys(o))
	m := v.Fields(known...)
	for _, k := range known {
		if m[k].Exists() {
			o[k].check(m[k])
		}
	}
}

func (l listOf) check(v yamlfile.Value) {
	for _, e := range v.List() {
		l.of.check(e)
	}
}

func (m mapping) check(v yamlfile.Value) {
	for _, p := range v.Pairs() {
		m.to.check(p.Value)
	}
}

func (r refused) check(v yamlfile.Value) { v.Failf("%s", r.why) }

// What 'podman kube play' of podman 5.4 acts on, see podman-kube-play(1); the
// rest it would pass over in silence.
var (
	metadata = object{"name": single{}, "labels": mapping{single{}}, "annotations": mapping{single{}}}
	items    = listOf{object{"key": single{}, "path": single{}}}
	keyRef   = object{"name": single{}, "key": single{}, "optional": single{}}
	amounts  = object{"cpu": single{}, "memory": single{}}

	probe = object{
		"exec":                object{"command": listOf{single{}}},
		"httpGet":             object{"path": single{}, "port": single{}, "host": single{}, "scheme": single{}},
		"tcpSocket":           object{"port": single{}, "host": single{}},
		"initialDelaySeconds": single{}, "periodSeconds": single{}, "timeoutSeconds": single{}, "failureThreshold": single{}, "successThreshold": single{},
	}
	container = object{
		"name": single{}, "image": single{}, "imagePullPolicy": single{}, "command": listOf{single{}}, "args": listOf{single{}}, "workingDir": single{},
		"env":     listOf{object{"name": single{}, "value": single{}, "valueFrom": object{"configMapKeyRef": keyRef, "secretKeyRef": keyRef}}},
		"envFrom": listOf{object{"prefix": single{}, "configMapRef": object{"name": single{}, "optional": single{}}, "secretRef": object{"name": single{}, "optional": single{}}}},
		"ports":   listOf{object{"name": single{}, "containerPort": single{}, "hostPort": single{}, "hostIP": single{}, "protocol": single{}}},
		"volumeMounts": listOf{object{"name": single{}, "mountPath": single{}, "readOnly": single{},
			"subPath": single{}}},
		"resources":     object{"limits": amounts, "requests": amounts},
		"livenessProbe": probe, "startupProbe": probe,
		"readinessProbe": refused{"podman has no readiness: use livenessProbe, and the component's health in the stack file"},
		"securityContext": object{"runAsUser": single{}, "runAsGroup": single{}, "runAsNonRoot": single{}, "readOnlyRootFilesystem": single{}, "allowPrivilegeEscalation": single{},
			"capabilities": object{"add": listOf{single{}}, "drop": listOf{single{}}}, "privileged": refused{"it would own the host: name what it needs in capabilities"}},
	}
	podSpec = object{
		"containers": listOf{container}, "initContainers": listOf{container}, "restartPolicy": single{}, "hostNetwork": single{}, "hostname": single{},
		"terminationGracePeriodSeconds": single{}, "automountServiceAccountToken": single{}, "enableServiceLinks": single{},
		"securityContext": object{"runAsUser": single{}, "runAsGroup": single{}, "runAsNonRoot": single{}, "fsGroup": refused{"podman passes it over: use runAsUser"}},
		"nodeSelector":    refused{"the stack file's place says where a component runs"},
		"affinity":        refused{"the stack file's place says where a component runs"},
		"hostPID":         refused{"the processes of the host are the host's"},
		"volumes": listOf{object{"name": single{}, "hostPath": object{"path": single{}, "type": single{}}, "persistentVolumeClaim": object{"claimName": single{}},
			"configMap": object{"name": single{}, "items": items, "optional": single{}, "defaultMode": single{}}, "secret": object{"secretName": single{}, "items": items, "optional": single{}, "defaultMode": single{}},
			"emptyDir": object{"medium": single{}, "sizeLimit": single{}}}},
	}
	kinds = map[string]object{
		"v1 Pod": {"spec": podSpec},
		"apps/v1 Deployment": {"spec": object{"replicas": single{}, "selector": object{"matchLabels": mapping{single{}}},
			"strategy": object{"type": single{}},
			"template": object{"metadata": metadata, "spec": podSpec}}},
		"v1 ConfigMap": {"data": mapping{single{}}, "binaryData": mapping{single{}}, "immutable": single{}},
		"v1 Secret":    {"type": single{}, "data": mapping{single{}}, "stringData": mapping{single{}}, "immutable": single{}},
		"v1 PersistentVolumeClaim": {"spec": object{"accessModes": listOf{single{}}, "resources": object{"requests": object{"storage": single{}}},
			"storageClassName": refused{"volumes are folders on the node's own disk"}}},
	}
)

// kube checks a Kubernetes manifest, which podman itself carries out.
func (t *translator) kube(docs []yamlfile.Value, manifest string) {
	workloads, hostNetwork := 0, false
	names := map[string]bool{}
	for _, doc := range docs {
		// A document of an unknown kind has one mistake, not one for each key.
		head := doc.Head("apiVersion", "kind", "metadata")
		kind := yamlfile.Get(head["apiVersion"].Required(), yamlfile.Text) + " " + yamlfile.Get(head["kind"].Required(), yamlfile.Text)
		body, known := kinds[kind]
		if !known {
			switch {
			case !head["apiVersion"].Exists() || !head["kind"].Exists(): // said
			case kind == "v1 Service":
				head["kind"].Failf("a Service has no effect here: containers of a pod share an address, hostPort publishes a port")
			default:
				head["kind"].Failf("%s is not supported%s", kind, yamlfile.Suggest(kind, slices.Sorted(maps.Keys(kinds))))
			}
			continue
		}
		whole := object{"apiVersion": single{}, "kind": single{}, "metadata": metadata}
		maps.Copy(whole, body)
		whole.check(doc)
		m := doc.Head("metadata", "spec")
		nameAt := m["metadata"].Required().Head("name")["name"].Required()
		name := yamlfile.Get(nameAt, parseName)
		// These names are the node's, not the component's.
		if kind != "v1 ConfigMap" && name != "" && name != t.c.Name && !strings.HasPrefix(name, t.c.Name+"-") {
			nameAt.Failf("%s must be called %s or %s-something: other components of the node have pods, secrets and volumes too", name, t.c.Name, t.c.Name)
		}
		if key := kind + " " + name; names[key] {
			nameAt.Failf("there are two of %s", key)
		} else {
			names[key] = true
		}
		switch kind {
		case "v1 Pod":
			workloads++
			hostNetwork = t.pod(m["spec"].Required()) || hostNetwork
		case "apps/v1 Deployment":
			workloads++
			spec := m["spec"].Required().Head("replicas", "template")
			if n := spec["replicas"]; n.Exists() && text(n) != "1" {
				n.Failf("replicas must be 1: the stack file's place says on how many nodes the component runs")
			}
			hostNetwork = t.pod(spec["template"].Required().Head("spec")["spec"].Required()) || hostNetwork
		}
	}
	if len(docs) > 0 && workloads == 0 {
		docs[0].Failf("the manifest has neither a Pod nor a Deployment")
	}
	var u unit
	u.section("Unit")
	u.set("Description", "pods of the component "+t.c.Name)
	u.section("Kube")
	u.set("Yaml", t.c.Name+"_pod.yaml")
	if !hostNetwork {
		t.network("")
		u.set("Network", t.c.Name+".network")
	}
	u.section("Service")
	u.set("RestartMode", "direct")
	u.section("Install")
	u.set("WantedBy", "multi-user.target")
	t.file(t.c.Name+"_pod.kube", 0o644, u.String())
	t.file(t.c.Name+"_pod.yaml", 0o600, manifest) // Secrets are in it
	t.out.Services = []string{t.c.Name + "_pod.service"}
}

// pod checks what the shape cannot say, and tells whether the pod is in the
// host's network.
func (t *translator) pod(v yamlfile.Value) (hostNetwork bool) {
	m := v.Head("containers", "initContainers", "restartPolicy", "hostNetwork", "volumes")
	hostNetwork = yamlfile.Get(m["hostNetwork"], yamlfile.Bool)
	if p := m["restartPolicy"]; p.Exists() && text(p) != "Always" {
		p.Failf("restartPolicy must be Always: what has done its work is an initContainer")
	}
	if m["containers"].Required().Exists() && len(m["containers"].List()) == 0 {
		m["containers"].Failf("the pod has no container")
	}
	for _, c := range slices.Concat(m["containers"].List(), m["initContainers"].List()) {
		k := c.Head("name", "image", "imagePullPolicy", "ports")
		yamlfile.Get(k["name"].Required(), parseName)
		t.image(k["image"])
		switch policy := text(k["imagePullPolicy"]); {
		case policy == "" && strings.HasSuffix(text(k["image"]), ":latest"):
			k["image"].Failf("set imagePullPolicy: Never, podman would look for a newer %s", text(k["image"]))
		case policy != "" && policy != "Never" && policy != "IfNotPresent":
			k["imagePullPolicy"].Failf("imagePullPolicy must be Never or IfNotPresent: there is nowhere to pull from")
		}
		for _, p := range k["ports"].List() {
			f := p.Head("containerPort", "hostPort", "hostIP", "protocol")
			yamlfile.Get(f["containerPort"].Required(), yamlfile.Int(1, 65535))
			protocol := yamlfile.Get(f["protocol"], oneOf("TCP", "UDP"))
			address := text(f["hostIP"])
			if _, err := netip.ParseAddr(address); address != "" && err != nil {
				f["hostIP"].Failf("hostIP %q is no address", address)
			}
			if n := yamlfile.Get(f["hostPort"], yamlfile.Int(1, 65535)); n > 0 {
				t.publish(f["hostPort"], address, n, protocol == "UDP")
			}
		}
	}
	for _, vol := range m["volumes"].List() {
		if p := vol.Head("hostPath")["hostPath"]; p.Exists() {
			path := p.Head("path")["path"].Required()
			if text(path) != "" {
				t.hostPath(path, text(path))
			}
		}
		if p := vol.Head("persistentVolumeClaim")["persistentVolumeClaim"]; p.Exists() {
			claim := p.Head("claimName")["claimName"].Required()
			if n := text(claim); n != "" && n != t.c.Name && !strings.HasPrefix(n, t.c.Name+"-") {
				claim.Failf("%s must be called %s or %s-something: volumes are the node's", n, t.c.Name, t.c.Name)
			}
		}
	}
	return hostNetwork
}
