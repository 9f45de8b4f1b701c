// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"

	"github.com/kata-v2/kata/hypervisor"
)

// The machine types of QEMU that this backend knows.
const (
	// Q35 has PCI and ACPI, and so takes devices, CPUs and memory while it runs.
	Q35 = "q35"
	// MicroVM has neither: virtio devices by memory-mapped registers, which the
	// kernel finds on its command line. It boots faster and never changes.
	MicroVM = "microvm"
)

// maxMMIO is how many virtio devices a microvm without ACPI has room for
// (QEMU docs/system/i386/microvm.rst).
const maxMMIO = 8

// device is the name of a virtio device on the machine's bus.
func (l layout) device(kind string) string {
	if l.Machine == MicroVM {
		return kind + "-device"
	}
	return kind + "-pci"
}

// machineOptions are the machine type and what it does without. A microvm's
// clocks are for what KVM gives the guest otherwise: without KVM the kernel needs the
// interval timer to measure the others by, and the clock chip for the time of day.
func machineOptions(l layout) string {
	if l.Machine != MicroVM {
		return l.Machine + ",memory-backend=mem,graphics=off,sata=off,smbus=off,hpet=off,vmport=off"
	}
	clocks := "off"
	if l.Accelerator == TCG {
		clocks = "on"
	}
	return MicroVM + ",memory-backend=mem,graphics=off,acpi=off,pcie=off,usb=off,x-option-roms=off,isa-serial=on," +
		"pic=" + clocks + ",pit=" + clocks + ",rtc=" + clocks
}

// machineArguments are what the machine type needs beside its options. The
// legacy form of virtio's registers, QEMU's default there, is not for vsock and virtio-fs.
func machineArguments(l layout) []string {
	if l.Machine != MicroVM {
		return nil
	}
	return []string{"-global", "virtio-mmio.force-legacy=false"}
}

// machineParams are the kernel's parameters for the machine type.
func machineParams(l layout) []string {
	if l.Machine != MicroVM {
		return []string{"pci=lastbus=0"}
	}
	return []string{"acpi=off", "pci=off"}
}

// checkMachine refuses what the machine type does not have.
func checkMachine(c *hypervisor.Config, machine string) error {
	if machine != MicroVM {
		return nil
	}
	const why = "machine type microvm (hypervisor.qemu.machine_type) has no hot-plug; q35 has"
	devices := 1 + len(c.Shares) + len(c.NICs) // one for vsock
	if c.ReclaimFreed {
		devices++
	}
	switch {
	case c.Vsock == hypervisor.VsockSerial || c.Restore != nil:
		return fmt.Errorf("a machine that is saved or restored: %s, and such a machine gets its shares by it", why)
	case c.HotplugPorts > 0:
		return fmt.Errorf("HotplugPorts is %d: %s", c.HotplugPorts, why)
	case c.MaxCPUs > c.CPUs:
		return fmt.Errorf("MaxCPUs is %d with %d CPUs: %s", c.MaxCPUs, c.CPUs, why)
	case room(*c) > 0:
		return fmt.Errorf("MaxMemoryBytes is %d with MemoryBytes %d: %s", c.MaxMemoryBytes, c.MemoryBytes, why)
	case len(c.Disks) > 0:
		return fmt.Errorf("%d disks: the guest finds disks by their place on the PCI bus, which machine type microvm (hypervisor.qemu.machine_type) has not; q35 has", len(c.Disks))
	case devices > maxMMIO:
		return fmt.Errorf("%d devices: machine type microvm (hypervisor.qemu.machine_type) has room for %d", devices, maxMMIO)
	}
	return nil
}
