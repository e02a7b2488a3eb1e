package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"platter/provision"
)

// ImportOptions say which foreign image to take into the store.
type ImportOptions struct {
	Store *Store
	// File is a qcow2 or raw disk image, a tar archive of a root file system, or
	// an OCI archive; what it is, is told by its content. All of them, and disk
	// images too, may be packed with gzip, xz, zstd, bzip2 or lz4.
	File string
	// Name of the image in the store; empty: made of its os-release, as rocky-9.
	Name string
	// Loader is the image in the store whose boot code and loaders are taken.
	Loader string
	// Stack are the components that are looked for in it.
	Stack []provision.Component
	// SecretKey is the file of a minisign key that the store trusts.
	SecretKey string
	// WorkDir is for scratch, at most two of these at a time: the decompressed
	// file, the raw disk, the unpacked tree, its file system. It is root's alone.
	WorkDir string
	// Check only looks: nothing is stored, and neither key nor loader is needed.
	Check bool
	// Out gets lines for people.
	Out io.Writer
}

// importName is what an imported image may be called: one word of a ref, and
// none that has a meaning of its own.
var importName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)

// Import makes an image of a system that was not built here and publishes it.
// It says all that it found, also in the error of a refused image, which is an
// *Unfit. It needs root, mkfs.ext4, e2fsck; for disks sfdisk, blkid, tar and a
// kernel that mounts their file systems; for qcow2 qemu-img. Disks are only read.
// When it is cut short the store is as it was.
func Import(ctx context.Context, o ImportOptions) (Foreign, error) {
	if os.Geteuid() != 0 {
		return Foreign{}, errors.New("an image can only be imported as root: its files belong to many users")
	}
	var key secretKey
	if !o.Check {
		var err error
		if key, err = o.Store.readSecretKey(o.SecretKey); err != nil {
			return Foreign{}, err
		}
		if _, _, err := o.Store.Image(o.Loader); err != nil {
			return Foreign{}, fmt.Errorf("the loaders are taken from the image %s, name another with --loader: %w", o.Loader, err)
		}
		if err := o.free(o.Name); o.Name != "" && err != nil {
			return Foreign{}, err
		}
	}
	start := time.Now()
	work, err := closedScratch(o.WorkDir)
	if err != nil {
		return Foreign{}, err
	}
	defer work.remove()
	x, err := unpackForeign(ctx, work, o.File, o.Out)
	if err != nil {
		var unfit *Unfit
		if errors.As(err, &unfit) {
			return unfit.Foreign, err
		}
		if ctx.Err() != nil {
			return Foreign{}, fmt.Errorf("the import of %s was interrupted, the store is as it was: %w", o.File, ctx.Err())
		}
		return Foreign{}, err
	}
	root := filepath.Join(work.dir, "root")
	j, err := openJail(root)
	if err != nil {
		return Foreign{}, err
	}
	defer j.Close()
	l := &look{jail: j, Foreign: Foreign{File: o.File, Kind: x.kind, Name: o.Name, Findings: x.findings}, scratch: work.dir, stack: o.Stack,
		disk: strings.HasPrefix(x.kind, kindRaw) || strings.HasPrefix(x.kind, kindQCOW2), labels: x.tree.labels}
	l.all()
	fit := l.fit()
	if len(l.Of(Refused)) > 0 {
		return l.Foreign, &Unfit{l.Foreign}
	}
	l.Findings = append(l.Findings, fit.findings...)
	if err := fit.apply(j); err != nil { // in the scratch folder: a check finds trouble too
		return l.Foreign, err
	}
	if !importName.MatchString(l.Name) {
		return l.Foreign, fmt.Errorf("the system has no name that can be used (%q): give it one with --name, of a-z, 0-9, '.', '_' and '-'", l.Name)
	}
	if o.Check {
		return l.Foreign, nil
	}
	if err := o.free(l.Name); err != nil {
		return l.Foreign, err
	}
	if err := o.publish(ctx, work, l.Foreign, x.tree.newest, key, start); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("the import of %s was interrupted, the store is as it was: %w", o.File, ctx.Err())
		}
		return l.Foreign, err
	}
	return l.Foreign, nil
}

// closedScratch is a scratch folder that other users of this machine do not get
// into: a foreign tree has setuid programs, device nodes, passwords and folders
// that everybody may write to, and what it holds is signed.
func closedScratch(workDir string) (*scratch, error) {
	if err := os.MkdirAll(workDir, 0o755); err != nil {
		return nil, fmt.Errorf("work folder cannot be made: %w", err)
	}
	st, err := os.Lstat(workDir)
	if err != nil {
		return nil, fmt.Errorf("work folder cannot be used: %w", err)
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; !st.IsDir() || int(owner) != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%s may be changed by other users (it is %s, of user %d): name a folder with --work that belongs to root and that nobody else can write to", workDir, st.Mode(), owner)
	}
	work, err := newScratch(workDir, "import")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(work.dir, 0o700); err != nil {
		work.remove()
		return nil, fmt.Errorf("work folder cannot be closed to other users: %w", err)
	}
	return work, nil
}

// free refuses a name that an image has which was not imported.
func (o ImportOptions) free(name string) error {
	if !importName.MatchString(name) || name == "stack" || name == "boot" {
		return fmt.Errorf("%q is no name for an image: use a-z, 0-9, '.', '_' and '-', and neither stack nor boot", name)
	}
	// A name is free that points to nothing, not one whose image is incomplete.
	if _, err := o.Store.readRef(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_, im, err := o.Store.Image(name)
	if err != nil {
		return fmt.Errorf("there is something called %s in the store, name the image otherwise with --name: %w", name, err)
	}
	if im.Origin == "" {
		return fmt.Errorf("the store has an image %s that was built here and is kept: name this one otherwise with --name", name)
	}
	return nil
}

// publish makes the parts and stores them. What the import wrote is as old as the
// newest file of the tree, so that equal files make equal images.
func (o ImportOptions) publish(ctx context.Context, work *scratch, f Foreign, newest time.Time, key secretKey, start time.Time) error {
	root := filepath.Join(work.dir, "root")
	used, _, inodes, err := treeBlocks(root)
	if err != nil {
		return err
	}
	// The file system beside the tree; the pack is smaller than the tree.
	if err := errors.Join(enoughRoom(work.dir, used+used/10+inodes*inodeSize+keepFree, "the work folder"), enoughRoom(o.Store.dir, used/2+keepFree, "the image store")); err != nil {
		return err
	}
	var sources []source
	for _, part := range []string{provision.PartBoot, provision.PartBIOS, provision.PartESP, provision.PartRoot} {
		file := filepath.Join(work.dir, part+".part")
		if part == provision.PartRoot {
			fmt.Fprintf(o.Out, "making the root file system of %s\n", mb(used))
			err = makeForeignRoot(ctx, root, file, newest)
		} else {
			err = o.Store.Export(ctx, o.Loader, part, file)
		}
		if err != nil {
			return fmt.Errorf("part %s of the image cannot be made: %w", part, err)
		}
		sources = append(sources, source{part, file})
	}
	im := &provision.Image{Format: provision.ImageFormat, Name: f.Name, Arch: f.Arch, Family: f.Family, Kernel: f.Kernel,
		Packages: f.Packages, Origin: filepath.Base(o.File)}
	if f.extra {
		im.Extras = []string{provision.ExtraEjabberd}
	}
	if im.Pack, im.Parts, err = o.Store.pack(ctx, sources, progress(o.Out, "packing")); err != nil {
		return err
	}
	im.Version = strings.TrimPrefix(f.Version+"-"+im.Pack.Hash[:8], "-")
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := o.Store.publish(f.Name, im, "", key); err != nil {
		return err
	}
	fmt.Fprintf(o.Out, "image %s %s, kernel %s: %s packed, imported in %s\n", im.Name, im.Version, im.Kernel, mb(im.Pack.Size), time.Since(start).Round(time.Second))
	return nil
}

// maxFilled is the largest file, in bytes, that makeRoot puts into a file system for
// sure: it knows four runs of blocks, each of which may end where something lies.
const maxFilled = 256 << 20

// makeForeignRoot is makeRoot for trees that may also hold very large files, or
// files that are mostly holes. With one of them mkfs.ext4 alone makes the file
// system; a second one of the same tree differs then in the times of its inodes.
func makeForeignRoot(ctx context.Context, root, to string, date time.Time) error {
	used, largest, inodes, err := treeBlocks(root)
	if err != nil {
		return err
	}
	if largest <= maxFilled {
		return makeRoot(ctx, root, to, date)
	}
	if err := mkfs(ctx, root, to, used, inodes, date); err != nil {
		return err
	}
	return tool(ctx, "e2fsck", "-f", "-n", to)
}

// treeBlocks is the space that a tree takes, holes taking none, the size of its
// largest file, holes and all, and the number of its inodes.
func treeBlocks(root string) (used, largest, inodes int64, err error) {
	seen := map[uint64]bool{} // hard links
	err = filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if seen[st.Ino] {
			return nil
		}
		seen[st.Ino] = true
		used += max(st.Blocks*512, blockSize)
		if d.Type().IsRegular() {
			largest = max(largest, st.Size)
		}
		return nil
	})
	return used, largest, int64(len(seen)), err
}

// fitting is what an import changes in a tree, and says.
type fitting struct {
	findings []Finding
	steps    []func(*jail) error
}

func (f *fitting) add(what, why string, step func(*jail) error) {
	f.findings = append(f.findings, Finding{Degree: Changed, What: what, Why: why})
	f.steps = append(f.steps, step)
}

func (f *fitting) apply(j *jail) error {
	for i, step := range f.steps {
		if err := step(j); err != nil {
			return fmt.Errorf("%s of the image cannot be changed: %w", f.findings[i].What, err)
		}
	}
	return nil
}

// fit decides what has to change in the tree so that our loader boots it, the
// installer's files count, and no two nodes are the same machine.
func (l *look) fit() *fitting {
	f := &fitting{}
	if l.Kernel != "" {
		kernel := "boot/vmlinuz-" + l.Kernel
		if l.readlink("vmlinuz") != kernel || l.readlink("initrd.img") != l.initramfs {
			f.add("/vmlinuz, /initrd.img", fmt.Sprintf("links to the kernel %s and its initramfs, which the loader starts", l.Kernel), func(j *jail) error {
				return errors.Join(j.link(kernel, "vmlinuz"), j.link(l.initramfs, "initrd.img"))
			})
		}
	}
	f.add("/boot/grub/grub.cfg", "the loader's configuration is Platter's; one that was there is kept as grub.cfg.before-platter", func(j *jail) error {
		if old := j.text("boot/grub/grub.cfg"); old != "" {
			if err := j.put("boot/grub/grub.cfg.before-platter", old, 0o600); err != nil {
				return err
			}
		}
		for _, name := range []string{"grub.cfg", "platter.cfg"} {
			b, err := fs.ReadFile(recipes, "recipe/debian-13/overlay/boot/grub/"+name)
			if err != nil {
				return err
			}
			if err := j.put("boot/grub/"+name, string(b), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	f.add("/etc/fstab", "emptied: the installer writes it", func(j *jail) error {
		return j.put("etc/fstab", "# Empty: the installer writes it.\n", 0o644)
	})
	identity := []string{"var/lib/dbus/machine-id", "var/lib/systemd/random-seed", "var/lib/systemd/credential.secret",
		"etc/openvswitch/conf.db", "etc/openvswitch/system-id.conf", "etc/hostname"}
	identity = append(identity, l.glob("etc/ssh", "ssh_host_")...)
	f.add("identity", "machine-id, SSH host keys, random seed and host name of the machine that it was made on are taken out: each node gets its own", func(j *jail) error {
		for _, name := range identity {
			if _, err := j.remove(name); err != nil {
				return fmt.Errorf("/%s: %w", name, err)
			}
		}
		return j.put("etc/machine-id", "", 0o444)
	})
	if l.usesNetworkd() && l.readlink(networkdWanted) == "" {
		unit := "/usr/lib/systemd/system/systemd-networkd.service"
		if !l.has(unit) {
			unit = "/lib/systemd/system/systemd-networkd.service"
		}
		f.add("systemd-networkd", "enabled: the installer configures the node's address with it", func(j *jail) error { return j.link(unit, networkdWanted) })
	}
	if l.has("etc/cloud") && !l.has("etc/cloud/cloud-init.disabled") {
		f.add("cloud-init", "disabled (/etc/cloud/cloud-init.disabled): it would set network, host name and keys anew", func(j *jail) error {
			return j.put("etc/cloud/cloud-init.disabled", "Written by Platter, which configures this system.\n", 0o644)
		})
	}
	if interfaces := l.text("etc/network/interfaces"); l.has("usr/sbin/ifup") && interfaces != "" && interfaces != loopback {
		f.add("/etc/network/interfaces", "kept as interfaces.before-platter: ifupdown would configure the network beside the installer's", func(j *jail) error {
			return errors.Join(j.put("etc/network/interfaces.before-platter", interfaces, 0o600), j.put("etc/network/interfaces", loopback, 0o644))
		})
	}
	f.putAside("netplan", l.glob("etc/netplan", ""), func(name string) bool { return path.Ext(name) == ".yaml" })
	// networkd takes for an interface the first file that matches it. A link to
	// /dev/null only hides a file of the distribution, and goes on doing so.
	f.putAside("systemd-networkd's files", l.glob("etc/systemd/network", ""), func(name string) bool {
		ext := path.Ext(name)
		return (ext == ".network" || ext == ".netdev") && path.Base(name) < networkFile && l.readlink(name) != "/dev/null"
	})
	if config := l.text("etc/selinux/config"); selinux(config) == "enforcing" {
		f.add("SELinux", "set to permissive in /etc/selinux/config", func(j *jail) error {
			return j.put("etc/selinux/config", selinuxLine.ReplaceAllString(config, "SELINUX=permissive"), 0o644)
		})
	}
	return f
}

// networkFile is what the installer calls its file in /etc/systemd/network.
const networkFile = "10-platter.network"

// putAside renames those of files that would win over the installer's.
func (f *fitting) putAside(what string, files []string, wins func(name string) bool) {
	files = slices.DeleteFunc(files, func(name string) bool { return !wins(name) })
	if len(files) == 0 {
		return
	}
	why := fmt.Sprintf("renamed to .before-platter, they would win over the installer's: /%s", strings.Join(files, ", /"))
	f.add(what, why, func(j *jail) error {
		for _, name := range files {
			if err := j.rename(name, path.Base(name)+".before-platter"); err != nil {
				return err
			}
		}
		return nil
	})
}

const loopback = "# Platter's network is systemd-networkd's.\nauto lo\niface lo inet loopback\n"

var selinuxLine = regexp.MustCompile(`(?m)^\s*SELINUX=.*$`)
