// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/vhost/inner"
)

// programs of this machine, which bring their libraries along; the accelerator
// is a module of Debian's QEMU.
var programs = []string{
	"/usr/bin/qemu-system-x86_64", "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so", "/usr/lib/qemu/virtiofsd", "/bin/busybox", "/usr/sbin/ip",
}

// firmware is what QEMU reads to boot a kernel.
var firmware = []string{"qboot.rom", "bios-microvm.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"}

// diskSize in bytes; the file is sparse.
const diskSize = 2 << 30

// tree is a directory that becomes the disk.
type tree struct{ root string }

func makeDisk(ctx context.Context, o options, disk string) error {
	t := tree{root: filepath.Join(o.dir, "root")}
	if err := os.RemoveAll(t.root); err != nil {
		return err
	}
	defer os.RemoveAll(t.root)
	for _, step := range []func() error{
		t.skeleton, t.system, t.labFiles,
		func() error { return t.copyTree(o.bin, inner.BuildDir+"/bin") },
		func() error { return t.copyTree(o.images, inner.BuildDir+"/images") },
		func() error { return guestimage.Write(t.path(inner.GuestInitrd), o.modules) },
		func() error {
			return command(ctx, "go", "test", "-c", "-o", t.path(inner.Program), "github.com/kata-v2/kata/integration/vhost/inner")
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(disk); err != nil {
		return err
	}
	return command(ctx, "mkfs.ext4", "-q", "-F", "-O", "^has_journal,^metadata_csum", "-E", "root_owner=0:0,lazy_itable_init=1",
		"-m", "0", "-d", t.root, disk, fmt.Sprintf("%dk", diskSize>>10))
}

// command runs a tool of this machine and gives its output when it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

func (t tree) path(p string) string { return filepath.Join(t.root, p) }

// skeleton makes the directories and links of a merged /usr.
func (t tree) skeleton() error {
	for _, d := range []string{"usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "usr/share/qemu", "dev", "proc", "sys", "run", "tmp", "etc", "root", "var/lib", "test"} {
		if err := os.MkdirAll(t.path(d), 0o755); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/bin/sh": "busybox", "var/run": "../run"} {
		if err := os.Symlink(target, t.path(name)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(t.path("etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"), 0o644); err != nil {
		return err
	}
	return os.WriteFile(t.path("etc/group"), []byte("root:x:0:\nnogroup:x:65534:\n"), 0o644)
}

// system copies programs, their libraries, and QEMU's firmware.
func (t tree) system() error {
	for _, p := range programs {
		if err := t.copyFile(p, p); err != nil {
			return err
		}
		libs, err := libraries(p)
		if err != nil {
			return err
		}
		for _, l := range libs {
			if err := t.copyFile(l, l); err != nil {
				return err
			}
		}
	}
	for _, f := range firmware {
		p := filepath.Join("/usr/share/qemu", f)
		if _, err := os.Stat(p); err != nil {
			if p = filepath.Join("/usr/share/seabios", f); f == "qboot.rom" {
				return err
			}
		}
		if err := t.copyFile(p, filepath.Join("/usr/share/qemu", f)); err != nil {
			return err
		}
	}
	return nil
}

// libraries lists the files that the loader would map for a program, the loader
// itself included; none for a static one.
func libraries(program string) ([]string, error) {
	out, err := exec.Command("ldd", program).CombinedOutput()
	if bytes.Contains(out, []byte("not a dynamic executable")) {
		return nil, nil
	}
	if err != nil || bytes.Contains(out, []byte("not found")) {
		return nil, fmt.Errorf("ldd %s: %w\n%s", program, err, out)
	}
	var list []string
	for line := range strings.Lines(string(out)) {
		for _, f := range strings.Fields(line) {
			if filepath.IsAbs(f) {
				list = append(list, f)
			}
		}
	}
	return list, nil
}

// labFiles copies containerd 2.4 and the busybox image.
func (t tree) labFiles() error {
	dir, err := lab.Dir()
	if err != nil {
		return err
	}
	if _, err := lab.BusyboxTar(); err != nil { // made there when it is missing
		return err
	}
	for _, sub := range []string{"containerd-2.4", "images"} {
		if err := t.copyTree(filepath.Join(dir, sub), filepath.Join(inner.LabDir, sub)); err != nil {
			return err
		}
	}
	return nil
}

func (t tree) copyTree(from, to string) error {
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		return t.copyFile(p, filepath.Join(to, rel))
	})
}

// copyFile copies what from leads to.
func (t tree) copyFile(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(t.path(to)), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(t.path(to), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, info.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
