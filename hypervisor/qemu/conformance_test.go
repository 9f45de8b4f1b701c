// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/hypervisor/hypervisortest/guestimage"
)

// testUser is an unprivileged user of no one's, as a pod's VMM has in production.
const testUser = 0x70ffffff

// TestConformance boots real machines: QEMU as an unprivileged user, under its
// seccomp filter, with a Linux guest.
func TestConformance(t *testing.T) {
	if testing.Short() {
		t.Skip("boots machines")
	}
	machines := []string{Q35}
	if guestimage.BuiltIn(t) {
		machines = append(machines, MicroVM) // the distribution's kernel finds no device there
	}
	for _, machine := range machines {
		t.Run(machine, func(t *testing.T) { conformance(t, machine) })
	}
}

func conformance(t *testing.T, machine string) {
	hypervisortest.Run(t, hypervisortest.Harness{
		Hypervisor: New(Options{Path: "/usr/bin/qemu-system-x86_64", Accelerator: TCG, Machine: machine}),
		Machine: hypervisor.Config{
			Kernel: guestimage.Kernel(t), Initrd: guestimage.Initrd(t), CPUs: 1, MemoryBytes: 128 << 20,
			Vsock: hypervisor.VsockVhostUser, UID: testUser, GID: testUser,
		},
		EarlyDriver: guestimage.BuiltIn(t),
		NoHotplug:   machine == MicroVM,
		Saves:       machine == Q35,
		Accelerator: TCG,
		Timeout:     60 * time.Second,
	})
}
