// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// newerEnv names a QEMU of version 10 or later; scripts/qemu.sh unpacks one.
const newerEnv = "KATA_TEST_QEMU"

// TestPlugCPUs plugs vCPUs into a real guest and out of it as with KVM, which the
// QEMU of Debian 12 does not survive when it emulates. That of version 10 does as
// long as no more are plugged in, ever, than it was told to expect: it keeps what
// it translates with of each (tcg_max_ctxs), and ends itself at one too many.
func TestPlugCPUs(t *testing.T) {
	path := os.Getenv(newerEnv)
	if path == "" {
		t.Logf("%s names no newer QEMU; resize_test.go has the same with a script in its place", newerEnv)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	vm, err := New(Options{Path: path, Accelerator: TCG, PlugCPUs: true}).Start(ctx, hypervisor.Config{
		ID: "plug", Dir: t.TempDir(), Kernel: guestimage.Kernel(t), Initrd: guestimage.Initrd(t),
		CPUs: 1, MaxCPUs: 12, MemoryBytes: 128 << 20, MaxMemoryBytes: 256 << 20,
		Vsock: hypervisor.VsockVhostUser, ReadyParam: guestsvc.ReadyParam,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := vm.Stop(ctx); err != nil {
			t.Error(err)
		}
	}()
	if err := vm.(hypervisor.ReadyWaiter).WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	r := vm.(hypervisor.CPUResizer)
	for _, n := range []int{3, 2, 1, 4, 2, 3, 1, 2, 1} {
		if have, err := r.ResizeCPUs(ctx, n); err != nil || have != n {
			t.Fatalf("%d vCPUs: have %d, %v; guest console:\n%s", n, have, err, vm.Info().ConsoleTail())
		}
		if tids, err := vm.(hypervisor.CPUThreader).CPUThreads(ctx); err != nil || len(tids) != n {
			t.Errorf("%d vCPUs: threads %v, %v", n, tids, err)
		}
	}
	if have, err := vm.(hypervisor.MemoryResizer).ResizeMemory(ctx, 256<<20); err != nil || have != 256<<20 {
		t.Errorf("memory after that: %d, %v", have, err)
	}
}
