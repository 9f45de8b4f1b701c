// SPDX-License-Identifier: Apache-2.0

// Package guestimage builds what the tests' machines boot: the test kernel and
// an initrd with vsocktest/guestinit, which serves guestsvc.
package guestimage

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kata-v2/kata/images/cpio"
	"github.com/kata-v2/kata/images/modules"
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

// wants are what a guest needs for virtio-vsock and for memory that comes and goes.
var wants = []modules.Want{
	{Group: modules.Boot, Name: "virtio_pci"}, {Group: modules.Boot, Name: "vmw_vsock_virtio_transport"},
	{Group: modules.Boot, Name: "virtio_console"},
	{Group: modules.Boot, Name: "virtio_mem"}, {Group: modules.Boot, Name: "virtio_balloon"},
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
	init, err := buildInit()
	if err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	entries := []cpio.Entry{
		cpio.Dir("dev", 0o755), cpio.Dir("modules", 0o755), cpio.Dir("proc", 0o755), cpio.Dir("sys", 0o755),
		cpio.CharDevice("dev/console", 0o600, 5, 1),
		cpio.File("init", 0o755, init),
	}
	picked, err := pick(modulesDir)
	if err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	for i, m := range picked {
		entries = append(entries, cpio.File(fmt.Sprintf("modules/%02d-%s", i, m.File), 0o644, m.Data))
	}
	var b bytes.Buffer
	if err := cpio.Write(&b, entries); err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// BuiltIn tells whether the test kernel needs no module for vsock.
func BuiltIn(tb testing.TB) bool {
	tb.Helper()
	picked, err := pick(env(tb, EnvModules))
	if err != nil {
		tb.Fatal(err)
	}
	return len(picked) == 0
}

func pick(modulesDir string) ([]modules.Module, error) {
	dir, err := filepath.EvalSymlinks(modulesDir) // a walk does not follow its root
	if err != nil {
		return nil, err
	}
	return modules.Pick(dir, wants)
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
