// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"flag"
	"net"
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
		QMPFD: 7, ConsoleFD: 8, Vsock: hypervisor.VsockVhostUser, VsockFD: 9, ReadyPort: 1025, Sandbox: true, TSCKHz: 2_300_000,
	}
	kvm := fixed
	kvm.Accelerator, kvm.Vsock, kvm.CID, kvm.Firmware, kvm.InitrdFD, kvm.Sandbox = KVM, hypervisor.VsockVhost, 77, "", 0, false
	kvm.TSCKHz = 0
	sized := base
	sized.MaxMemoryBytes, sized.ReclaimFreed = 1<<30+1<<20, true
	huge, prealloc := sized, sized
	huge.HugePages, huge.ReclaimFreed = true, false
	prealloc.Prealloc, prealloc.ReclaimFreed = true, false
	// More disks and ports than there are slots: further functions of the slots.
	disks := base
	disks.HotplugPorts, disks.Disks = 7, []hypervisor.Disk{
		{ID: "disk0", ReadOnly: true, Parts: make([]hypervisor.DiskPart, 3)}, {ID: "disk1", Parts: make([]hypervisor.DiskPart, 1)},
	}
	withDisks := fixed
	withDisks.Disks = []diskFDs{{parts: []int{10, 11, 12}, descriptor: 14}, {parts: []int{13}}}
	micro := fixed
	micro.Machine, micro.ShareFDs = MicroVM, []int{3, 4}
	micro.NICs = []nicFDs{{taps: []int{10, 11}}}
	microKVM := kvm
	microKVM.Machine = MicroVM
	small := shared
	small.MaxCPUs = 1
	small.NICs = []hypervisor.NIC{{ID: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}}
	withShares := fixed
	withShares.ShareFDs = []int{3, 4}
	// A clone: NICs that have a port are plugged later, as disks and shares are.
	clone, restored := sized, fixed
	clone.ReadyParam, clone.Restore, clone.MemoryPrivate, clone.Vsock = "", os.Stdin, true, hypervisor.VsockSerial
	clone.HotplugPorts, clone.Disks, clone.NICs = 2, disks.Disks[1:], []hypervisor.NIC{{ID: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}}
	restored.Vsock, restored.ReadyPort, restored.MemoryFD = hypervisor.VsockSerial, 0, 14
	restored.Disks, restored.NICs = withDisks.Disks[1:], []nicFDs{{taps: []int{10}}}
	crowded := clone
	crowded.HotplugPorts = 0
	for name, c := range map[string]struct {
		c hypervisor.Config
		l layout
	}{
		"clone": {clone, restored}, "clone-crowded": {crowded, restored},
		"tcg": {base, fixed}, "kvm-vhost": {base, kvm}, "shares": {shared, withShares}, "sizes": {sized, fixed}, "huge": {huge, fixed}, "prealloc": {prealloc, fixed}, "disks": {disks, withDisks},
		"microvm": {small, micro}, "microvm-kvm": {base, microKVM},
	} {
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

func TestMicroVMRefusesWhatItHasNot(t *testing.T) {
	for want, c := range map[string]hypervisor.Config{
		"HotplugPorts is 1": {HotplugPorts: 1},
		"MaxCPUs is 2":      {CPUs: 1, MaxCPUs: 2},
		"MaxMemoryBytes is": {CPUs: 1, MaxCPUs: 1, MemoryBytes: 256 << 20, MaxMemoryBytes: 512 << 20},
		"1 disks":           {CPUs: 1, Disks: make([]hypervisor.Disk, 1)},
		"room for 8":        {CPUs: 1, ReclaimFreed: true, Shares: make([]hypervisor.Share, 3), NICs: make([]hypervisor.NIC, 4)},
	} {
		if err := checkMachine(&c, MicroVM); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v; want %q", err, want)
		}
		if err := checkMachine(&c, Q35); err != nil {
			t.Errorf("q35: %v", err)
		}
	}
}

// The disks of a restored machine are in the ports in which they were.
func TestDiskPlaces(t *testing.T) {
	c := hypervisor.Config{HotplugPorts: 2, Disks: []hypervisor.Disk{{ID: "disk0"}, {ID: "disk2", Place: portPlace(3)}}}
	if a, b := diskPort(c, 0), diskPort(c, 1); a != 0 || b != 3 {
		t.Errorf("disks are in the ports %d and %d", a, b)
	}
	if err := checkPlaces(c); err != nil {
		t.Error(err)
	}
	if p := newPlugs(c); strings.Join(p.ports, ",") != "disk0,,,disk2" {
		t.Errorf("ports: %q", p.ports)
	}
	for place, why := range map[string]string{portPlace(0): "disk disk2: disk disk0 is in its place", "77/00": "disk disk2: the machine has no place 77/00"} {
		c.Disks[1].Place = place
		if err := checkPlaces(c); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("place %s: %v; want %q", place, err, why)
		}
	}
}

func TestHugePagesMustBeThere(t *testing.T) {
	pools := t.TempDir()
	set := func(files map[string]string) {
		t.Helper()
		dir := filepath.Join(pools, "hugepages-2048kB")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f, n := range files {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(n+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := hypervisor.Config{MemoryBytes: 256 << 20, HugePages: true}
	refused := func(when, word string) {
		t.Helper()
		if err := checkHugePages(&c, pools); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v; want it to say %q", when, err, word)
		}
	}
	refused("no pool", "128 huge pages of 2048 kB, this host has 0")
	set(map[string]string{"free_hugepages": "130", "resv_hugepages": "3"})
	refused("promised to others", "this host has 127 to spare")
	set(map[string]string{"nr_overcommit_hugepages": "1"})
	if err := checkHugePages(&c, pools); err != nil {
		t.Error(err)
	}
	c.MemoryBytes += 1 << 20
	refused("an odd size", "MemoryBytes")
	c.HugePages = false
	if err := checkHugePages(&c, "/nonexistent"); err != nil {
		t.Errorf("without huge pages: %v", err)
	}
}
