// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
)

// config is a machine that would be valid if kernel were one.
func config(t *testing.T) hypervisor.Config {
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, []byte("not a kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	return hypervisor.Config{ID: "t", Dir: t.TempDir(), Kernel: kernel, CPUs: 1, MemoryBytes: 64 << 20, Vsock: hypervisor.VsockVhostUser}
}

func TestStartNamesWhatIsWrong(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*hypervisor.Config)
		o      Options
		phase  string
		want   string
	}{
		"id":          {func(c *hypervisor.Config) { c.ID = "a,b" }, Options{}, "config", "comma"},
		"cpus":        {func(c *hypervisor.Config) { c.CPUs = 0 }, Options{}, "config", "CPUs is 0"},
		"memory":      {func(c *hypervisor.Config) { c.MemoryBytes = 1000 }, Options{}, "config", "MemoryBytes"},
		"no kernel":   {func(c *hypervisor.Config) { c.Kernel = "/nonexistent/vmlinux" }, Options{}, "config", "hypervisor.qemu.kernel"},
		"no initrd":   {func(c *hypervisor.Config) { c.Initrd = "/nonexistent/initrd" }, Options{}, "config", "hypervisor.qemu.initrd"},
		"no qemu":     {nil, Options{Path: "/nonexistent/qemu"}, "config", "hypervisor.qemu.path"},
		"accelerator": {nil, Options{Accelerator: "auto"}, "config", "accelerator"},
		"vsock":       {func(c *hypervisor.Config) { c.Vsock = "pigeon" }, Options{}, "vsock", "pigeon"},
		"netns":       {func(c *hypervisor.Config) { c.Network.Path = "/nonexistent/ns" }, Options{}, "exec", "/nonexistent/ns"},
		"machine":     {nil, Options{Machine: "no-such-machine"}, "qmp", "unsupported machine type"},
		"bad kernel":  {nil, Options{}, "qmp", "kernel"},
	} {
		t.Run(name, func(t *testing.T) {
			vc := config(t)
			if c.change != nil {
				c.change(&vc)
			}
			o := c.o
			if o.Path == "" {
				o.Path = "/usr/bin/qemu-system-x86_64"
			}
			if o.Accelerator == "" {
				o.Accelerator = TCG
			}
			vm, err := New(o).Start(context.Background(), vc)
			if err == nil {
				vm.Stop(context.Background())
				t.Fatal("started")
			}
			var se *hypervisor.StartError
			if !errors.As(err, &se) || se.Phase != c.phase || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v; want phase %q and %q", err, c.phase, c.want)
			}
		})
	}
}

func TestStartIsBoundedByItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := New(Options{Path: "/usr/bin/qemu-system-x86_64", Accelerator: TCG}).Start(ctx, config(t))
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}

// QEMU waits for the daemon behind a share; one that never answers is bounded by
// Start's context, and nothing of the machine is left.
func TestStartWithADaemonThatHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a guest kernel")
	}
	own, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	c := config(t)
	c.Kernel = guestimage.Kernel(t)
	c.Shares = []hypervisor.Share{{Tag: "t", Conn: theirs}}
	var pid int
	c.Started = func(_ string, p int) error { pid = p; return nil }
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	vm, err := New(Options{Path: "/usr/bin/qemu-system-x86_64", Accelerator: TCG}).Start(ctx, c)
	if err == nil {
		vm.Stop(context.Background())
		t.Fatal("started")
	}
	var se *hypervisor.StartError
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &se) || se.Phase != "qmp" {
		t.Errorf("got %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("QEMU (pid %d): %v", pid, err)
	}
	if _, err := io.Copy(io.Discard, own); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the share's connection is not closed: %v", err)
	}
}
