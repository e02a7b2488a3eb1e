//go:build e2e

package vmtest_test

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/provision"
	"platter/provision/jsonfile"
)

// trouble waits until the node names what is wrong with it.
func (r *rig) trouble(node string, says ...string) {
	r.t.Helper()
	r.await(node+" names its trouble", func(states map[string]provision.State) bool {
		for _, want := range says {
			if !strings.Contains(states[node].Facts[provision.FactTrouble], want) {
				return false
			}
		}
		return true
	}, node)
}

// wellAgain waits until nothing is wrong with any node and each sees all.
func (r *rig) wellAgain(nodes string) {
	r.t.Helper()
	r.await("all are well", func(states map[string]provision.State) bool {
		for _, s := range states {
			if s.Known && (s.Stage != provision.StageReady || s.Facts[provision.FactTrouble] != "" || s.Facts[provision.FactRunning] != nodes) {
				return false
			}
		}
		return len(states) == len(strings.Split(nodes, ","))
	}, strings.Split(nodes, ",")...)
}

// wants has a command of the program end with that code and say all that.
func (r *rig) wants(code int, args []string, says ...string) {
	r.t.Helper()
	cmd := exec.Command(r.bin(), append(args, "--socket", r.dir+"/socket")...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
		r.t.Errorf("%v: %v, not exit code %d:\n%s", args, err, code, out)
	}
	for _, want := range says {
		if !strings.Contains(string(out), want) {
			r.t.Errorf("%v does not say %q:\n%s", args, want, out)
		}
	}
}

// serves waits until everything works on two nodes and between them: the others
// may have to take over first.
func (r *rig) serves(a, b string) {
	r.t.Helper()
	for began := time.Now(); ; time.Sleep(time.Second) {
		out, err := exec.Command(r.bin(), "stack", "probe", a, b, "--socket", r.dir+"/socket").CombinedOutput()
		if err == nil {
			return
		}
		if time.Since(began) > 3*time.Minute {
			r.t.Fatalf("%s and %s do not serve: %v\n%s", a, b, err, out)
		}
	}
}

// expired is the certificate with a validity that is over, signed by the site.
func (r *rig) expired(cert string) string {
	r.t.Helper()
	var file struct{ CA, Key string }
	if err := jsonfile.Read(filepath.Join(r.dir, "state/site/site.json"), &file); err != nil {
		r.t.Fatal(err)
	}
	ca, err := tls.X509KeyPair([]byte(file.CA), []byte(file.Key))
	if err != nil {
		r.t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(cert))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		r.t.Fatal(err)
	}
	leaf.NotBefore, leaf.NotAfter = ca.Leaf.NotBefore, time.Now().Add(-time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca.Leaf, leaf.PublicKey, ca.PrivateKey)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// TestStackTrouble: what goes wrong on one node is named there, with what to do,
// while the others go on; and it ends well.
func TestStackTrouble(t *testing.T) {
	r, boxes := boxRack(t, 3)
	const all = "node1,node2,node3"
	boxes[0].on()
	boxes[1].on()
	r.await("two are ready", func(s map[string]provision.State) bool {
		return s["node1"].Stage == provision.StageReady && s["node2"].Stage == provision.StageReady
	}, "node1", "node2") // a start that fails is tried again

	for _, phase := range []string{"etcd", "postgresql"} {
		t.Logf("node3 loses power while it joins, at %s", phase)
		boxes[2].on()
		seen := time.Now()
		r.await("node3 joins", func(s map[string]provision.State) bool {
			return s["node3"].LastSeen.After(seen) && s["node3"].Stage == provision.StageJoining && s["node3"].Phase == phase
		}, "node3")
		boxes[2].off()
	}
	boxes[2].on()
	r.wellAgain(all)
	r.stack("probe")

	t.Log("the database of node3 is damaged")
	boxes[2].off()
	control, err := filepath.Glob(boxes[2].dir + "/root/var/lib/postgresql/*/*/global/pg_control")
	if err != nil || len(control) != 1 {
		t.Fatalf("pg_control: %v, %v", control, err)
	}
	if err := os.Truncate(control[0], 100); err != nil {
		t.Fatal(err)
	}
	boxes[2].on()
	wrong := []string{"postgresql on node node3 does not work since", "patroni.service", "platter node reinstall node3"}
	r.trouble("node3", wrong...)
	r.serves("node1", "node2")
	r.wants(3, []string{"stack", "status"}, append(wrong, "node3 has trouble: ")...)
	r.wants(0, []string{"node", "ls"}, append(wrong, "node3 has trouble: ")...)
	r.wants(3, []string{"node", "diagnose", "node3"}, append(wrong, "Trouble: ")...)

	t.Log("it is reinstalled; meanwhile a program takes a port on node1")
	r.node("reinstall", "node3")
	boxes[2].off()
	boxes[2].install()
	boxes[2].on()
	boxes[0].sh(`until ss -Hltnp sport = :443 | grep -q python3; do
	systemctl stop nginx
	systemctl -q is-active squatter || systemd-run -q --collect --unit squatter python3 -m http.server 443
	sleep 0.2
done
systemctl start --no-block nginx`)
	r.trouble("node1", "web cannot work on node node1: its port 443 is taken by python3 (process ", "http.server 443")
	boxes[0].sh("systemctl stop squatter")
	r.wellAgain(all)

	t.Log("the certificate of node2 expires")
	file := boxes[1].dir + "/root/etc/platter/stack.json"
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var sec provision.StackSecrets
	if err := json.Unmarshal(good, &sec); err != nil {
		t.Fatal(err)
	}
	sec.Cert = r.expired(sec.Cert)
	bad, err := json.Marshal(sec)
	if err != nil {
		t.Fatal(err)
	}
	put := func(text []byte) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		boxes[1].sh("systemctl restart platter-agent")
	}
	put(bad)
	r.trouble("node2", "the certificate of node node2 expired on", "platter node reinstall node2")
	r.wants(3, []string{"stack", "status"}, "node2 has trouble: the certificate of node node2 expired on")
	r.serves("node1", "node3")
	put(good)
	r.wellAgain(all)
	r.stack("probe")
}
