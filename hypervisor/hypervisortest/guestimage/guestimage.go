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
	dir, err := filepath.EvalSymlinks(env(tb, EnvModules)) // a walk does not follow its root
	if err != nil {
		tb.Fatalf("%s: %v", EnvModules, err)
	}
	entries := []cpio.Entry{
		cpio.Dir("dev", 0o755), cpio.Dir("modules", 0o755), cpio.Dir("proc", 0o755),
		cpio.CharDevice("dev/console", 0o600, 5, 1),
		cpio.File("init", 0o755, buildInit(tb)),
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		tb.Fatalf("%s: %v", EnvModules, err)
	}
	builtin = bytes.ReplaceAll(builtin, []byte("-"), []byte("_"))
	for i, m := range modules {
		if !bytes.Contains(builtin, []byte("/"+m+".ko")) {
			entries = append(entries, cpio.File(fmt.Sprintf("modules/%02d-%s.ko", i, m), 0o644, readModule(tb, dir, m)))
		}
	}
	var b bytes.Buffer
	if err := cpio.Write(&b, entries); err != nil {
		tb.Fatal(err)
	}
	path := filepath.Join(tb.TempDir(), "initrd")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		tb.Fatal(err)
	}
	return path
}

func buildInit(tb testing.TB) []byte {
	tb.Helper()
	bin := filepath.Join(tb.TempDir(), "init")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", bin, initPackage)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", initPackage, err, out)
	}
	data, err := os.ReadFile(bin)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func readModule(tb testing.TB, dir, name string) []byte {
	tb.Helper()
	var path string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err == nil && strings.ReplaceAll(filepath.Base(p), "-", "_") == name+".ko" {
			path = p
			return fs.SkipAll
		}
		return err
	})
	if err != nil || path == "" {
		tb.Fatalf("module %s.ko below %s=%s: not found (%v)", name, EnvModules, dir, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}
