// SPDX-License-Identifier: Apache-2.0

// Package guestimage builds what the tests' machines boot: the test kernel and
// an initrd with vsocktest/guestinit, which serves guestsvc.
package guestimage

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/images/cpio"
)

// Where the Makefile says that the test kernel and its modules are.
const (
	EnvKernel  = "KATA_TEST_KERNEL"  // an uncompressed vmlinux
	EnvModules = "KATA_TEST_MODULES" // lib/modules/<version> of the same build
)

// CPU is the model for TCG: CMPXCHG16B is unsafe there with QEMU 7.2, and a guest
// that is told of fast "rep movsb" copies every byte by an iteration of its own.
const CPU = "max,-cx16,-erms,-fsrm"

// initPackage is the guest's first process.
const initPackage = "github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestinit"

// modules are what a guest needs for virtio-vsock on PCI, in dependency order.
var modules = []string{
	"virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
	"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport",
}

// Kernel is the path of the test kernel.
func Kernel(tb testing.TB) string {
	tb.Helper()
	return env(tb, EnvKernel)
}

func env(tb testing.TB, name string) string {
	tb.Helper()
	v := os.Getenv(name)
	if v == "" {
		tb.Fatalf("%s is not set: run by make, or with -short", name)
	}
	return v
}

// Initrd builds the guest's root and returns its path; it is gone after the test.
func Initrd(tb testing.TB) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "initrd")
	if err := Write(path, env(tb, EnvModules)); err != nil {
		tb.Fatal(err)
	}
	return path
}

// Write builds the guest's root at path. modulesDir is lib/modules/<version> of
// the kernel that it is for. It runs go build, so below this module's root only.
func Write(path, modulesDir string) error {
	dir, err := filepath.EvalSymlinks(modulesDir) // a walk does not follow its root
	if err != nil {
		return fmt.Errorf("guest image: modules: %w", err)
	}
	init, err := buildInit()
	if err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	entries := []cpio.Entry{
		cpio.Dir("dev", 0o755), cpio.Dir("modules", 0o755), cpio.Dir("proc", 0o755),
		cpio.CharDevice("dev/console", 0o600, 5, 1),
		cpio.File("init", 0o755, init),
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return fmt.Errorf("guest image: modules: %w", err)
	}
	builtin = bytes.ReplaceAll(builtin, []byte("-"), []byte("_"))
	for i, m := range modules {
		if bytes.Contains(builtin, []byte("/"+m+".ko")) {
			continue
		}
		data, err := readModule(dir, m)
		if err != nil {
			return fmt.Errorf("guest image: %w", err)
		}
		entries = append(entries, cpio.File(fmt.Sprintf("modules/%02d-%s.ko", i, m), 0o644, data))
	}
	var b bytes.Buffer
	if err := cpio.Write(&b, entries); err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

func buildInit() ([]byte, error) {
	dir, err := os.MkdirTemp("", "guestinit-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", bin, initPackage)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", initPackage, err, out)
	}
	return os.ReadFile(bin)
}

func readModule(dir, name string) ([]byte, error) {
	var path string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err == nil && strings.ReplaceAll(filepath.Base(p), "-", "_") == name+".ko" {
			path = p
			return fs.SkipAll
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if path == "" {
		return nil, fmt.Errorf("module %s.ko below %s: %w", name, dir, fs.ErrNotExist)
	}
	return os.ReadFile(path)
}
