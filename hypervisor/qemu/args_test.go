// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-v2/kata/hypervisor"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestArguments(t *testing.T) {
	base := hypervisor.Config{
		ID: "pod1", CPUs: 1, MaxCPUs: 4, MemoryBytes: 256 << 20,
		KernelParams: []string{"agent.log=debug", "quiet2"}, ReadyParam: "agent.ready_port",
	}
	shared := base
	shared.Shares = []hypervisor.Share{{Tag: "kataShared"}, {Tag: "second"}}
	fixed := layout{
		Accelerator: TCG, Machine: "q35", Firmware: "/usr/share/qemu/qboot.rom", KernelFD: 5, InitrdFD: 6,
		QMPFD: 7, ConsoleFD: 8, Vsock: hypervisor.VsockVhostUser, VsockFD: 9, ReadyPort: 1025, Sandbox: true,
	}
	kvm := fixed
	kvm.Accelerator, kvm.Vsock, kvm.CID, kvm.Firmware, kvm.InitrdFD, kvm.Sandbox = KVM, hypervisor.VsockVhost, 77, "", 0, false
	sized := base
	sized.MaxMemoryBytes, sized.ReclaimFreed = 1<<30+1<<20, true
	// More disks and ports than there are slots: further functions of the slots.
	disks := base
	disks.HotplugPorts, disks.Disks = 7, []hypervisor.Disk{
		{ID: "disk0", ReadOnly: true, Parts: make([]hypervisor.DiskPart, 3)}, {ID: "disk1", Parts: make([]hypervisor.DiskPart, 1)},
	}
	withDisks := fixed
	withDisks.Disks = []diskFDs{{parts: []int{10, 11, 12}, descriptor: 14}, {parts: []int{13}}}
	withShares := fixed
	withShares.ShareFDs = []int{3, 4}
	for name, c := range map[string]struct {
		c hypervisor.Config
		l layout
	}{"tcg": {base, fixed}, "kvm-vhost": {base, kvm}, "shares": {shared, withShares}, "sizes": {sized, fixed}, "disks": {disks, withDisks}} {
		t.Run(name, func(t *testing.T) {
			got := strings.Join(arguments(c.c, c.l), "\n") + "\n"
			golden := filepath.Join("testdata", name+".args")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("arguments differ from %s (go test -update rewrites it):\n%s", golden, got)
			}
		})
	}
}
