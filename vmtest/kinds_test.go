//go:build e2e

package vmtest_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/provision"
)

// ociArchive is a container image of one program, /board, as an OCI archive (OCI
// image specification 1.1), and the digest of its manifest. What env adds makes
// images differ that share their layer.
func ociArchive(t *testing.T, program []byte, env ...string) (archive []byte, digest string) {
	t.Helper()
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	pack := func(mode int64, add func(put func(name string, content []byte))) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		add(func(name string, content []byte) {
			if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(content))}); err != nil {
				t.Fatal(err)
			}
			w.Write(content)
		})
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	var blobs [][]byte
	blob := func(kind string, content []byte) descriptor {
		blobs = append(blobs, content)
		return descriptor{"application/vnd.oci.image." + kind, "sha256:" + hash(content), len(content)}
	}
	object := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	layer := blob("layer.v1.tar", pack(0o755, func(put func(string, []byte)) { put("board", program) }))
	config := blob("config.v1+json", object(map[string]any{"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/board"}, "Env": env},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}}}))
	manifest := blob("manifest.v1+json", object(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": []descriptor{layer}}))
	return pack(0o644, func(put func(string, []byte)) {
		put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
		put("index.json", object(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}))
		for _, b := range blobs {
			put("blobs/sha256/"+hash(b), b)
		}
	}), manifest.Digest
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// TestStackKinds: components that come as container images, as a compose file
// and as a Kubernetes manifest, run beside packages on every node and survive a
// loss of power with what was written. A node whose archive is damaged says so.
func TestStackKinds(t *testing.T) {
	dir := t.TempDir()
	put := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	must := func(cmd *exec.Cmd) {
		t.Helper()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "board"), "./testdata/board")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	must(build)
	program, err := os.ReadFile(filepath.Join(dir, "board"))
	if err != nil {
		t.Fatal(err)
	}
	stackDir := filepath.Join(dir, "stack")
	must(exec.Command("../bin/platter", "stack", "export", stackDir))
	must(exec.Command("cp", "testdata/kinds/compose.yaml", "testdata/kinds/pod.yaml", "testdata/kinds/board.env", stackDir))
	one, digest1 := ociArchive(t, program, "OF=1")
	two, digest2 := ociArchive(t, program, "OF=2")
	damaged := bytes.Clone(one)
	damaged[len(damaged)/3] ^= 1
	put("stack/board-1.oci.tar", damaged)
	put("stack/board-2.oci.tar", two)
	text, err := os.ReadFile(filepath.Join(stackDir, "stack.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	more, err := os.ReadFile("testdata/kinds/components.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("\nsecrets:\n"), []byte("\nsecrets:\n  board: {length: 32}\n"), 1)
	put("stack/stack.yaml", append(text, strings.NewReplacer("@DIGEST1@", digest1, "@DIGEST2@", digest2).Replace(string(more))...))
	if out, err := exec.Command("../bin/platter", "stack", "check", stackDir).CombinedOutput(); err == nil || !strings.Contains(string(out), "image localhost/board:1 of board: board-1.oci.tar is corrupt") {
		t.Fatalf("a damaged archive passes the check: %v\n%s", err, out)
	}
	put("stack/board-1.oci.tar", one)

	r, boxes := servedRack(t, "../build/store", 3, nil, "--stack", stackDir)
	for _, b := range boxes {
		b.containers(map[string][]byte{"board-1.oci.tar": one, "board-2.oci.tar": two})
	}
	last := boxes[2]
	last.archive("board-1.oci.tar", damaged)
	for _, b := range boxes {
		b.on()
	}
	failed := r.await("node3 says which image is damaged", func(s map[string]provision.State) bool { return s["node3"].Stage == provision.StageFailed }, "node3")
	if f := failed["node3"].Failure; f.Code != "stack-image" || !strings.Contains(f.Message, "the image localhost/board:1 of the component board cannot be imported on node node3") {
		t.Errorf("node3 says %+v", f)
	}
	last.archive("board-1.oci.tar", one)
	r.await("all are ready", allReady, "node3")

	// get is what both boards of a box show.
	get := func(b *box) string {
		out, _ := exec.Command(r.bin(), "lab", "exec", "--state", r.lab, "--", "curl", "-sS", "--fail", "--max-time", "5", "http://"+b.addr+":8088/", "http://"+b.addr+":8089/").CombinedOutput()
		return string(out)
	}
	password := last.sh("cat /etc/board.env")
	password = strings.TrimPrefix(password, "PASSWORD=")
	if len(password) != 32 {
		t.Errorf("the password is %q", password)
	}
	want := func(b *box) string {
		return "board 1 of " + b.name + ", $5 or 5%, password " + password + "\nkept by " + b.name + "\n" +
			"board 2 of " + b.name + ", password " + password + "\npinned by " + b.name + "\n"
	}
	answer := func(when string) {
		t.Helper()
		began := time.Now()
		for _, b := range boxes {
			for {
				got := get(b)
				if got == want(b) {
					break
				}
				if time.Since(began) > 2*time.Minute {
					t.Fatalf("%s, the boards of %s show\n%s\nnot\n%s", when, b.name, got, want(b))
				}
				time.Sleep(200 * time.Millisecond)
			}
		}
		t.Logf("%s: all boards show what they should after %s", when, time.Since(began).Round(100*time.Millisecond))
	}
	for _, b := range boxes {
		r.inLab("curl", "-sS", "--fail", "--data", "kept by "+b.name+"\n", "http://"+b.addr+":8088/")
		r.inLab("curl", "-sS", "--fail", "--data", "pinned by "+b.name+"\n", "http://"+b.addr+":8089/")
	}
	answer("ready")
	for _, b := range boxes {
		if out, err := b.try("sed s/PASSWORD=// /etc/board.env | grep -l -F -f - /proc/[0-9]*/cmdline"); err == nil {
			t.Errorf("on %s the password is on a command line: %s", b.name, out)
		}
	}
	// podman took from the compose file what it says.
	for what, want := range map[string]string{
		`{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.SecurityOpt}} {{.ImageDigest}}`: "65534 true [no-new-privileges] " + digest1,
		`{{.EffectiveCaps}}`: "[CAP_NET_BIND_SERVICE]",
	} {
		if got := last.sh("podman inspect board_web --format '" + what + "'"); got != want {
			t.Errorf("%s of board_web is %q, want %q", what, got, want)
		}
	}
	if got := last.sh(`podman inspect board_keeper --format '{{.Config.StopTimeout}} {{index .Config.Labels "org.example.what"}} {{.State.Health.Status}}'; podman exec board_keeper /board check http://web:8080/ && echo reached`); got != "2 a \"board\" healthy\nreached" {
		t.Errorf("board_keeper is %q", got)
	}

	for _, b := range boxes {
		b.off()
		b.on()
	}
	answer("after a power cut")
}

// containers lets podman run in the box: it cannot lay its own overlay on the
// box's, and there is no controller that counts processes.
func (b *box) containers(archives map[string][]byte) {
	b.r.t.Helper()
	b.r.run("mkdir", "-p", b.dir+"/containers", b.dir+"/root/var/lib/containers", b.dir+"/root/usr/share/platter/stack", b.dir+"/root/etc/containers")
	b.r.run("mount", "--bind", b.dir+"/containers", b.dir+"/root/var/lib/containers")
	if err := os.WriteFile(b.dir+"/root/etc/containers/containers.conf", []byte("[containers]\npids_limit = 0\n"), 0o644); err != nil {
		b.r.t.Fatal(err)
	}
	for name, content := range archives {
		b.archive(name, content)
	}
}

// archive makes a file of the image's own archives.
func (b *box) archive(name string, content []byte) {
	b.r.t.Helper()
	if err := os.WriteFile(b.dir+"/root/usr/share/platter/stack/"+name, content, 0o644); err != nil {
		b.r.t.Fatal(err)
	}
}
