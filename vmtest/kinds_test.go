//go:build e2e

package vmtest_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
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

// kinds is the built-in stack with two more components: board, of kind compose,
// and pinboard, of kind kube.
type kinds struct {
	t       *testing.T
	dir     string // of the stack file
	program []byte
	images  map[string][]byte // archives by the digest of the image
	one     string            // the image of board
	two     string            // and of pinboard
}

func newKinds(t *testing.T) *kinds {
	t.Helper()
	k := &kinds{t: t, dir: filepath.Join(t.TempDir(), "stack"), images: map[string][]byte{}}
	must := func(cmd *exec.Cmd) {
		t.Helper()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	program := filepath.Join(t.TempDir(), "board")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./testdata/board")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	must(build)
	must(exec.Command("../bin/platter", "stack", "export", k.dir))
	must(exec.Command("cp", "testdata/kinds/compose.yaml", "testdata/kinds/pod.yaml", "testdata/kinds/board.env", k.dir))
	var err error
	if k.program, err = os.ReadFile(program); err != nil {
		t.Fatal(err)
	}
	k.one, k.two = k.image("OF=1"), k.image("OF=2")
	text, err1 := os.ReadFile(filepath.Join(k.dir, "stack.yaml"))
	more, err2 := os.ReadFile("testdata/kinds/components.yaml")
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("\nsecrets:\n"), []byte("\nsecrets:\n  board: {length: 32}\n"), 1)
	k.put("stack.yaml", append(text, strings.NewReplacer("@DIGEST1@", k.one, "@DIGEST2@", k.two).Replace(string(more))...))
	k.put("board-1.oci.tar", k.images[k.one])
	k.put("board-2.oci.tar", k.images[k.two])
	return k
}

func (k *kinds) put(name string, b []byte) {
	k.t.Helper()
	if err := os.WriteFile(filepath.Join(k.dir, name), b, 0o644); err != nil {
		k.t.Fatal(err)
	}
}

// image makes an image and returns its digest.
func (k *kinds) image(env ...string) string {
	archive, digest := ociArchive(k.t, k.program, env...)
	k.images[digest] = archive
	return digest
}

// serve is a rack with these components, whose operating system image brings
// the container images along.
func (k *kinds) serve(n int) (*rig, []*box) {
	k.t.Helper()
	r, boxes := servedRack(k.t, "../build/store", n, nil, "--stack", k.dir)
	for _, b := range boxes {
		b.containers(map[string][]byte{"board-1.oci.tar": k.images[k.one], "board-2.oci.tar": k.images[k.two]})
	}
	return r, boxes
}

// post writes a line on both boards of every box.
func (r *rig) post(boxes []*box, line string) {
	r.t.Helper()
	for _, b := range boxes {
		for _, port := range []string{"8088", "8089"} {
			r.inLab("curl", "-sS", "--fail", "--max-time", "20", "--data", line+" on "+b.name+"\n", "http://"+b.addr+":"+port+"/")
		}
	}
}

// shows waits until both boards of every box are in these versions, and show
// these lines.
func (r *rig) shows(when string, boxes []*box, board, pinboard string, lines ...string) {
	r.t.Helper()
	began := time.Now()
	for _, b := range boxes {
		env, err := os.ReadFile(b.dir + "/root/etc/board.env")
		password := strings.TrimSpace(strings.TrimPrefix(string(env), "PASSWORD="))
		if err != nil || len(password) != 32 {
			r.t.Fatalf("the password is %q: %v", password, err)
		}
		kept := ""
		for _, l := range lines {
			kept += l + " on " + b.name + "\n"
		}
		want := "board " + board + " of " + b.name + ", $5 or 5%, password " + password + "\n" + kept +
			"board " + pinboard + " of " + b.name + ", password " + password + "\n" + kept
		for {
			out, _ := exec.Command(r.bin(), "lab", "exec", "--state", r.lab, "--", "curl", "-sS", "--fail", "--max-time", "5", "http://"+b.addr+":8088/", "http://"+b.addr+":8089/").CombinedOutput()
			if string(out) == want {
				break
			}
			if time.Since(began) > 5*time.Minute {
				r.t.Fatalf("%s, the boards of %s show\n%s\nnot\n%s\n%s", when, b.name, out, want,
					b.sh("podman ps -a; systemctl status --no-pager 'board*' 'pinboard*' | cut -c1-200; journalctl -b --no-pager -u 'board*' -u 'pinboard*' | tail -40"))
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	r.t.Logf("%s: all boards show what they should after %s", when, time.Since(began).Round(100*time.Millisecond))
}

// TestStackKinds: components that come as container images, as a compose file
// and as a Kubernetes manifest, run beside packages and survive a loss of power
// with what was written. An archive that is damaged is named, a store of images
// that is damaged is mended.
func TestStackKinds(t *testing.T) {
	k := newKinds(t)
	damaged := bytes.Clone(k.images[k.one])
	damaged[len(damaged)/3] ^= 1
	r, boxes := k.serve(1)
	b := boxes[0]
	b.archive("board-1.oci.tar", damaged)
	b.on()
	failed := r.await("it says which image is damaged", func(s map[string]provision.State) bool { return s[b.name].Stage == provision.StageFailed }, b.name)
	if f := failed[b.name].Failure; f.Code != "stack-image" || !strings.Contains(f.Message, "the image localhost/board:1 of the component board cannot be imported on node node1") {
		t.Errorf("it says %+v", f)
	}
	b.archive("board-1.oci.tar", k.images[k.one])
	r.await("it is ready", allReady, b.name)
	r.post(boxes, "kept")
	r.shows("ready", boxes, "1", "2", "kept")
	if out, err := b.try("sed s/PASSWORD=// /etc/board.env | grep -l -F -f - /proc/[0-9]*/cmdline"); err == nil {
		t.Errorf("the password is on a command line: %s", out)
	}
	// podman took from the compose file what it says.
	for what, want := range map[string]string{
		`{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.SecurityOpt}} {{.ImageDigest}}`: "65534 true [no-new-privileges] " + k.one,
		`{{.EffectiveCaps}}`: "[CAP_NET_BIND_SERVICE]",
	} {
		if got := b.sh("podman inspect board_web --format '" + what + "'"); got != want {
			t.Errorf("%s of board_web is %q, want %q", what, got, want)
		}
	}
	if got := b.sh(`podman inspect board_keeper --format '{{.Config.StopTimeout}} {{index .Config.Labels "org.example.what"}} {{.State.Health.Status}}'; podman exec board_keeper /board check http://web:8080/ && echo reached`); got != "2 a \"board\" healthy\nreached" {
		t.Errorf("board_keeper is %q", got)
	}

	b.off()
	b.on()
	r.shows("after a power cut", boxes, "1", "2", "kept")

	b.off()
	files, err := filepath.Glob(b.dir + "/containers/storage/overlay/*/diff/board")
	if err != nil || len(files) == 0 {
		t.Fatalf("the store has no board: %v", err)
	}
	for _, f := range files {
		text := bytes.Clone(k.program)
		text[len(text)/2] ^= 1
		if err := os.WriteFile(f, text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.on()
	r.await("it has mended its store", func(s map[string]provision.State) bool {
		return strings.Contains(b.said("the store of container images is damaged"), "damaged") && allReady(s)
	}, b.name)
	r.shows("after its store was damaged", boxes, "1", "2", "kept")
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && !bytes.Equal(text, k.program) {
			t.Errorf("%s is still damaged", f)
		}
	}
}

// said is what the box's agent has said since its boot with that in it.
func (b *box) said(what string) string {
	out, _ := b.try("journalctl -b --no-pager -u platter-agent --grep '" + what + "'")
	return out
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
