// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/channel"
)

// The accelerators of QEMU that this backend uses.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// firstExtraFD is the number of the first inherited descriptor after stdio.
const firstExtraFD = 3

// tcgBufferMiB bounds TCG's code cache, QEMU's largest private memory without KVM.
// Boot, agent and one container that runs make 63 MiB of code; when the cache is
// full all of it is dropped and made again, so 64 MiB would have the first exec pay
// for that (docs/decisions.md). Only what is used becomes memory.
const tcgBufferMiB = 128

// guestCID is the guest's address on the vhost-user device, which serves one
// machine only; the least that is not reserved (virtio 1.3 §5.10.4).
const guestCID = 3

// The host paths of a machine's fixed files are passed as inherited
// descriptors, so the unprivileged QEMU needs no access to their directories.
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// fds collects the descriptors that QEMU inherits.
type fds struct{ files []*os.File }

// add takes ownership of f and returns its number in QEMU.
func (f *fds) add(file *os.File) int {
	f.files = append(f.files, file)
	return firstExtraFD + len(f.files) - 1
}

func (f *fds) close() {
	for _, file := range f.files {
		file.Close()
	}
	f.files = nil
}

// layout is what the command line depends on beside the machine's Config: a
// pure input, so that golden tests cover every form of it.
type layout struct {
	Accelerator string // KVM or TCG
	PlugCPUs    bool   // see Options
	Machine     string // machine type, Q35 or MicroVM
	Firmware    string // path of the firmware, empty for QEMU's own
	CPUModel    string // overrides the accelerator's default when set
	KernelFD    int
	InitrdFD    int // 0 without initrd
	QMPFD       int
	ConsoleFD   int
	Vsock       hypervisor.VsockBackend
	VsockFD     int
	CID         uint32
	ReadyPort   uint32
	ShareFDs    []int     // in the order of Config.Shares
	NICs        []nicFDs  // in the order of Config.NICs
	Disks       []diskFDs // in the order of Config.Disks
	Sandbox     bool      // QEMU's own seccomp filter
	MemoryFD    int       // of Config.Memory, 0 without
	TSCKHz      uint64    // rate of the host's time stamp counter, 0 if the guest is to find it
}

// allCPUs: see smp.
func (l layout) allCPUs() bool { return l.Accelerator == TCG && !l.PlugCPUs }

// CPUModel is what the accelerator offers the guest. Under TCG, CMPXCHG16B is
// hidden: with it a 6.12 guest double-faulted on QEMU 7.2. So are the fast string
// instructions: TCG runs "rep movsb" byte by byte, and a guest that is told it is
// fast copies everything that way.
func CPUModel(accel string) string {
	if accel == TCG {
		return "max,-cx16,-erms,-fsrm"
	}
	return "host"
}

// arguments is QEMU's command line for a machine.
func arguments(c hypervisor.Config, l layout) []string {
	mib := strconv.FormatUint(c.MemoryBytes>>20, 10) + "M"
	cpu := l.CPUModel
	if cpu == "" {
		cpu = CPUModel(l.Accelerator)
	}
	accel := KVM
	if l.Accelerator == TCG {
		accel = "tcg,thread=multi,tb-size=" + strconv.Itoa(tcgBufferMiB)
	}
	a := []string{
		"-name", "sandbox-" + c.ID + ",debug-threads=on",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none",
		"-machine", machineOptions(l),
		"-accel", accel,
		"-cpu", cpu,
		"-smp", smp(c, l.allCPUs()),
		"-m", mib + maxMemory(c),
		"-object", memoryObject(c, l, mib),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", l.QMPFD),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", l.ConsoleFD),
		"-serial", "chardev:console",
	}
	if l.Firmware != "" {
		a = append(a, "-bios", l.Firmware)
	}
	a = append(a, machineArguments(l)...)
	a = append(a, vsockArguments(l)...)
	for i, s := range c.Shares {
		a = append(a, "-chardev", fmt.Sprintf("socket,id=fs%d,fd=%d", i, l.ShareFDs[i]))
		if c.Restore == nil { // a machine that has one takes no saved state
			a = append(a, "-device", fmt.Sprintf("%s,chardev=fs%d,tag=%s,queue-size=%d", l.device("vhost-user-fs"), i, s.Tag, shareQueue))
		}
	}
	a = append(a, memoryArguments(c, l)...)
	for i, n := range c.NICs {
		args := nicArguments(n, l, i)
		if plugsNICs(c) {
			args = args[:2] // without the device
		}
		a = append(a, args...)
	}
	a = append(a, portArguments(ports(c)+sharePorts(c))...)
	for i, d := range c.Disks {
		a = append(a, diskArguments(d, l.Disks[i], diskPort(c, i), c.Restore != nil && !c.Whole)...)
	}
	if l.Sandbox {
		a = append(a, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	a = append(a, "-kernel", fdPath(l.KernelFD))
	if l.InitrdFD != 0 {
		a = append(a, "-initrd", fdPath(l.InitrdFD))
	}
	if c.Restore != nil {
		a = append(a, "-incoming", "defer", "-S") // devices are plugged before it goes on
	}
	return append(a, "-append", kernelCommandLine(c, l))
}

// shareQueue is the length of a virtio-fs device's queues.
const shareQueue = 1024

// sharePorts is how many root ports, after all others, are for the shares of a
// machine to which they are plugged.
func sharePorts(c hypervisor.Config) int {
	if c.Vsock == hypervisor.VsockSerial {
		return maxPluggedShares
	}
	return 0
}

// maxPluggedShares is how many Shares a restored machine can have.
const maxPluggedShares = 1

// memoryObject is where the guest's memory is. Devices in other processes see
// only what is shared.
func memoryObject(c hypervisor.Config, l layout, size string) string {
	if l.MemoryFD == 0 {
		return "memory-backend-memfd,id=mem,size=" + size + ",share=on" + backing(c, false)
	}
	share := "on"
	if c.MemoryPrivate {
		share = "off"
	}
	return "memory-backend-file,id=mem,size=" + size + ",mem-path=" + fdPath(l.MemoryFD) + ",share=" + share
}

func vsockArguments(l layout) []string {
	if l.Vsock == hypervisor.VsockSerial {
		return []string{
			"-chardev", fmt.Sprintf("socket,id=agent,fd=%d", l.VsockFD),
			"-device", "virtio-serial-pci,id=serial,max_ports=2,disable-legacy=on",
			"-device", "virtserialport,bus=serial.0,nr=1,chardev=agent,name=" + channel.PortName,
		}
	}
	if l.Vsock == hypervisor.VsockVhost {
		return []string{"-device", fmt.Sprintf("%s,guest-cid=%d,vhostfd=%d", l.device("vhost-vsock"), l.CID, l.VsockFD)}
	}
	return []string{
		"-chardev", fmt.Sprintf("socket,id=vsock,fd=%d", l.VsockFD),
		"-device", l.device("vhost-user-vsock") + ",chardev=vsock",
	}
}

// kernelCommandLine is what every guest gets, then the caller's parameters.
// panic=-1 (reboot at once) and reboot=t turn a guest's end into QEMU's (with -no-reboot),
// and oops=panic each fault of its kernel: else the task that had it is dead for
// good, but never reaped, and its pod can neither go on nor be deleted.
// noreplace-smp keeps a kernel that starts with one CPU from patching itself for
// one, and back when a second comes: without KVM that is a seventh of the boot.
// A dummy driver that is built in makes no device that nobody asked for.
func kernelCommandLine(c hypervisor.Config, l layout) string {
	p := []string{
		"console=ttyS0", "quiet", "panic=-1", "oops=panic", "reboot=t", "tsc=reliable", "no_timer_check", "noreplace-smp",
		"rcupdate.rcu_expedited=1", "random.trust_cpu=on", "cryptomgr.notests", "cgroup_no_v1=all",
		"i8042.noaux", "i8042.nopnp", "net.ifnames=0", "dummy.numdummies=0",
	}
	if l.TSCKHz != 0 {
		p = append(p, "tsc_early_khz="+strconv.FormatUint(l.TSCKHz, 10))
	}
	p = append(p, machineParams(l)...)
	p = append(p, memoryParams(c)...)
	p = append(p, cpuParams(c, l.allCPUs())...)
	p = append(p, emulatorParams(l.Accelerator)...)
	p = append(p, c.KernelParams...)
	if c.ReadyParam != "" && l.ReadyPort != 0 {
		p = append(p, fmt.Sprintf("%s=%d", c.ReadyParam, l.ReadyPort))
	}
	return strings.Join(p, " ")
}

// emulatorParams are what a guest needs whose CPU is QEMU's emulator. That keeps
// what it has translated of a page of memory until the CPU writes to the page, and
// does not see what a device in another process writes there (vhost-user: the
// shared file system, vsock). So a page that held a program, was freed, and then
// got another program's text from the file system would still run as the first
// one. init_on_alloc=1 has the CPU write to every page before it is used again
// (docs/decisions.md, "Wrong code after a device's write").
func emulatorParams(accel string) []string {
	if accel != TCG {
		return nil
	}
	return []string{"init_on_alloc=1"}
}
