package install

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"aead.dev/minisign"
	"golang.org/x/sys/unix"
)

const (
	discDir     = "/run/platter/disc" // where the disc is mounted
	discProgram = "/run/platter/platter"
	// discWait is how long the drive that the machine booted from may take to
	// show up: USB sticks and BMCs' virtual drives are slow.
	discWait = 90 * time.Second
)

// startDiscHost is the life of a machine that was booted from a disc: it finds
// the disc, checks the program platter on it, and becomes that. It returns only
// with an error.
func startDiscHost(ctx context.Context, c Cmdline, devices *Devices, modules *Modules, log func(string, ...any)) error {
	for _, m := range []string{"sr_mod", "isofs", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859-1", "nls_utf8", "ext4", "loop"} {
		if err := modules.Load(m); err != nil {
			log("warning: %v", err)
		}
	}
	keys, err := ReadKeys(KeysPath)
	if err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, discWait)
	defer cancel()
	found := ""
	var seen []error // why each drive is not the one
	look := func() bool {
		seen = nil
		dirs, _ := filepath.Glob("/sys/class/block/*")
		for _, dir := range dirs {
			dev := "/dev/" + filepath.Base(dir)
			if err := mountDisc(dev); err != nil {
				seen = append(seen, fmt.Errorf("%s: no disc: %w", dev, err))
				continue
			}
			if err := takeProgram(discDir, discProgram, keys); err != nil {
				seen = append(seen, fmt.Errorf("%s: %w", dev, err))
				unix.Unmount(discDir, 0)
				continue
			}
			found = dev
			return true
		}
		return false
	}
	if err := devices.Wait(limit, look); err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	// A drive that is there may still be spinning up: no event tells when it is done.
	for found == "" && limit.Err() == nil && !look() {
		time.Sleep(time.Second)
	}
	if found == "" {
		return errors.Join(fmt.Errorf("the disc that this machine booted from has not appeared within %s: insert volume 1 and start the machine again; the drives here are", discWait), errors.Join(seen...))
	}
	log("the disc is in %s", found)
	args := []string{"platter", "disc", "host", "--disc", discDir, "--device", found}
	if c.Do != "" {
		args = []string{"platter", "disc", c.Do, discDir}
	}
	env := []string{"PATH=/bin:/run/platter", "HOME=/root", "TERM=linux"}
	return fmt.Errorf("%s cannot be started: %w", discProgram, unix.Exec(discProgram, args, env))
}

// mountDisc mounts an ISO 9660 file system, to be read.
func mountDisc(dev string) error {
	if err := os.MkdirAll(discDir, 0o755); err != nil {
		return err
	}
	return unix.Mount(dev, discDir, "iso9660", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

// takeProgram copies the program of the disc that is mounted at dir to a file,
// if one of keys has signed the disc's manifest and the manifest the program.
// The error is os.ErrNotExist where dir is no first volume of a set.
func takeProgram(dir, to string, keys []minisign.PublicKey) error {
	manifest, err := os.ReadFile(filepath.Join(dir, "platter/set.json"))
	if err != nil {
		return err
	}
	const path = "bin/platter"
	if _, err := os.Stat(filepath.Join(dir, path)); err != nil {
		return err
	}
	signature, err := os.ReadFile(filepath.Join(dir, "platter/set.json.minisig"))
	if err != nil {
		return fmt.Errorf("the signature of the disc: %w", err)
	}
	signed := false
	for _, k := range keys {
		signed = signed || minisign.Verify(k, manifest, signature)
	}
	if !signed {
		return errors.New("no trusted key has signed the disc, or its manifest is damaged: check it with 'platter disc verify' on another machine")
	}
	want := ""
	var set struct {
		Volumes []struct {
			Files []struct{ Path, SHA256 string }
		}
	}
	if err := json.Unmarshal(manifest, &set); err != nil {
		return fmt.Errorf("the disc's manifest cannot be read: %w", err)
	}
	for _, v := range set.Volumes {
		for _, f := range v.Files {
			if f.Path == path {
				want = f.SHA256
			}
		}
	}
	from, err := os.Open(filepath.Join(dir, path))
	if err != nil {
		return err
	}
	defer from.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, sum), from); err != nil {
		return fmt.Errorf("%s of the disc cannot be read: %w: clean the disc and start the machine again", path, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != strings.ToLower(want) {
		os.Remove(to)
		return fmt.Errorf("%s of the disc is damaged: it hashes to %s and not to %s. Clean the disc, or use another copy, and start the machine again", path, got, want)
	}
	return f.Close()
}
