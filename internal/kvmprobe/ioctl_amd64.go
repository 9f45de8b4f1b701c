// SPDX-License-Identifier: Apache-2.0

package kvmprobe

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl numbers and layouts of <linux/kvm.h>, Documentation/virt/kvm/api.rst.
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmGetSupportedCPUID   = 0xc008ae05
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmRun                 = 0xae80
	kvmGetRegs             = 0x8090ae81
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84
	kvmSetCPUID2           = 0x4008ae90

	apiVersion = 12
)

// Reasons for which KVM_RUN returns.
const (
	exitHLT           = 5
	exitShutdown      = 8
	exitFailEntry     = 9
	exitInternalError = 17
)

// Offsets in struct kvm_run.
const (
	runImmediateExit = 1
	runExitReason    = 8
	runUnion         = 32
)

// The fields are the kernel's; they are capitalised because most are here for
// their place only.

type memoryRegion struct {
	Slot, Flags           uint32
	GuestPhys, Size, User uint64
}

type regs struct {
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8to15                                 [8]uint64
	RIP, RFlags                            uint64
}

type segment struct {
	Base                            uint64
	Limit                           uint32
	Selector                        uint16
	Type, Present, DPL, DB, S, L, G uint8
	Avl, Unusable, Pad              uint8
}

type dtable struct {
	Base  uint64
	Limit uint16
	Pad   [3]uint16
}

type sregs struct {
	CS, DS, ES, FS, GS, SS, TR, LDT         segment
	GDT, IDT                                dtable
	CR0, CR2, CR3, CR4, CR8, EFER, APICBase uint64
	Interrupts                              [4]uint64
}

type cpuidEntry struct {
	Function, Index, Flags, EAX, EBX, ECX, EDX uint32
	Pad                                        [3]uint32
}

// cpuid is struct kvm_cpuid2 with room for more entries than KVM has (api.rst:
// KVM_MAX_CPUID_ENTRIES is 256).
type cpuid struct {
	N, Pad  uint32
	Entries [256]cpuidEntry
}

// ioctl passes an integer argument.
func ioctl(f *os.File, name string, req, arg uintptr) (int, error) {
	r, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, arg)
	if e != 0 {
		return 0, fmt.Errorf("%s: %w", name, e)
	}
	return int(r), nil
}

// ioctlPtr passes a pointer; the conversion must stand in the call (unsafe rule 4).
func ioctlPtr[T any](f *os.File, name string, req uintptr, p *T) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(p)))
	if e != 0 {
		return fmt.Errorf("%s: %w", name, e)
	}
	return nil
}

func u32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
