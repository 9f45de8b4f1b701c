// SPDX-License-Identifier: Apache-2.0

package vsock_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Where the Makefile says that the test kernel and its modules are.
const (
	envKernel  = "KATA_TEST_KERNEL"  // an uncompressed vmlinux
	envModules = "KATA_TEST_MODULES" // lib/modules/<version> of the same build
)

// guestModules are what a guest needs for virtio-vsock on PCI, in dependency order.
var guestModules = []string{
	"virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
	"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport",
}

// testCPU is for TCG: CMPXCHG16B is unsafe there with QEMU 7.2, and a guest that
// is told of fast "rep movsb" copies every byte by an iteration of its own.
const testCPU = "max,-cx16,-erms,-fsrm"

type guestVM struct {
	cmd  *exec.Cmd
	out  *lockedBuffer
	dead chan struct{}
}

func (v *guestVM) console() string { return v.out.String() }

func (v *guestVM) kill() {
	_ = v.cmd.Process.Kill()
	<-v.dead
}

// startGuest boots a machine whose vsock is f, which it closes here.
func startGuest(t *testing.T, f *os.File) *guestVM {
	t.Helper()
	kernel := os.Getenv(envKernel)
	if kernel == "" {
		t.Fatalf("%s is not set: run by make, or with -short", envKernel)
	}
	initrd := buildInitrd(t)
	v := &guestVM{out: &lockedBuffer{}, dead: make(chan struct{})}
	v.cmd = exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=mem", "-accel", "tcg", "-cpu", testCPU, "-bios", "qboot.rom",
		"-m", "256", "-object", "memory-backend-memfd,id=mem,size=256M,share=on",
		"-chardev", "socket,id=vsock0,fd=3", "-device", "vhost-user-vsock-pci,chardev=vsock0",
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=1")
	v.cmd.ExtraFiles = []*os.File{f}
	v.cmd.Stdout, v.cmd.Stderr = v.out, v.out
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	go func() {
		_ = v.cmd.Wait()
		close(v.dead)
	}()
	t.Cleanup(v.kill)
	return v
}

// buildInitrd packs guestinit and the modules.
func buildInitrd(t *testing.T) string {
	t.Helper()
	modules := os.Getenv(envModules)
	if modules == "" {
		t.Fatalf("%s is not set: run by make, or with -short", envModules)
	}
	bin := filepath.Join(t.TempDir(), "init")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", bin, "./vsocktest/guestinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build guestinit: %v\n%s", err, out)
	}
	var a archive
	a.dir("dev")
	a.node("dev/console", 5, 1)
	a.dir("modules")
	a.file(t, "init", bin)
	builtin, err := os.ReadFile(filepath.Join(modules, "modules.builtin"))
	if err != nil {
		t.Fatalf("%s: %v", envModules, err)
	}
	for i, m := range guestModules {
		if !bytes.Contains(bytes.ReplaceAll(builtin, []byte("-"), []byte("_")), []byte("/"+m+".ko")) {
			a.file(t, fmt.Sprintf("modules/%02d-%s.ko", i, m), findModule(t, modules, m))
		}
	}
	path := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, a.end(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func findModule(t *testing.T, dir, name string) (path string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err == nil && strings.ReplaceAll(filepath.Base(p), "-", "_") == name+".ko" {
			path = p
			return fs.SkipAll
		}
		return err
	})
	if err != nil || path == "" {
		t.Fatalf("module %s.ko below %s=%s: not found (%v)", name, envModules, dir, err)
	}
	return path
}

// archive is a cpio archive in the kernel's "newc" format: a header of hex
// numbers, the name and the data, each padded to 4 bytes.
type archive struct {
	b   bytes.Buffer
	ino int
}

func (a *archive) entry(name string, mode, major, minor int, data []byte) {
	a.ino++
	fmt.Fprintf(&a.b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	a.b.WriteString(name + "\x00")
	a.pad()
	a.b.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.b.Len()%4 != 0 {
		a.b.WriteByte(0)
	}
}

func (a *archive) dir(name string) { a.entry(name, syscall.S_IFDIR|0o755, 0, 0, nil) }
func (a *archive) node(name string, maj, min int) {
	a.entry(name, syscall.S_IFCHR|0o600, maj, min, nil)
}

func (a *archive) file(t *testing.T, name, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	a.entry(name, syscall.S_IFREG|0o755, 0, 0, b)
}

func (a *archive) end() []byte {
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	return a.b.Bytes()
}
