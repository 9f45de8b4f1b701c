// SPDX-License-Identifier: Apache-2.0

package kvmprobe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// grace is how long a guest that is told to stop may take. KVM that does not come
// back within it is stuck in the kernel.
const grace = time.Second

// errStopped says that the run was ended from outside.
var errStopped = errors.New("stopped")

// vm is a virtual machine with one vCPU.
type vm struct {
	vm, vcpu *os.File
	mem, run []byte
	g        guest

	// stop asks the run loop to end; tid is the thread that is in KVM_RUN.
	stop atomic.Bool
	tid  atomic.Int64
}

func probe(ctx context.Context, path string, p program, timeout time.Duration) (Verdict, error) {
	start := time.Now()
	ok, reason, err := try(ctx, path, p, timeout)
	return Verdict{Usable: ok, Reason: reason, Took: time.Since(start)}, err
}

func try(ctx context.Context, path string, p program, timeout time.Duration) (bool, string, error) {
	if err := ctx.Err(); err != nil {
		return false, "", err
	}
	kvm, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false, err.Error(), nil
	}
	defer kvm.Close()
	m, err := newVM(kvm, p)
	if err != nil {
		return false, path + ": " + err.Error(), nil
	}
	ended := make(chan error, 1)
	go func() { ended <- m.loop() }()

	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case err := <-ended:
		defer m.close()
		if err != nil {
			return false, path + ": " + err.Error(), nil
		}
		ok, reason := m.judge()
		return ok, reason, nil
	case <-timer.C:
	case <-ctx.Done():
	}
	m.kick()
	timer.Reset(grace)
	select {
	case <-ended:
		defer m.close()
	case <-timer.C:
		// The thread is lost in the kernel; unmapping its memory would be worse
		// than keeping it.
		return false, "KVM did not come back from the micro-guest at " + m.where(), nil
	}
	if err := ctx.Err(); err != nil {
		return false, "", err
	}
	return false, fmt.Sprintf("the micro-guest did not end within %v; it was at %s", timeout, m.where()), nil
}

func newVM(kvm *os.File, p program) (*vm, error) {
	v, err := ioctl(kvm, "KVM_GET_API_VERSION", kvmGetAPIVersion, 0)
	if err != nil {
		return nil, err
	}
	if v != apiVersion {
		return nil, fmt.Errorf("KVM API version %d, not %d", v, apiVersion)
	}
	m := &vm{}
	if err := m.build(kvm, p); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *vm) build(kvm *os.File, p program) error {
	ids := &cpuid{}
	ids.N = uint32(len(ids.Entries))
	if err := ioctlPtr(kvm, "KVM_GET_SUPPORTED_CPUID", kvmGetSupportedCPUID, ids); err != nil {
		return err
	}
	f := ids.features()
	p(&m.g, f)

	fd, err := ioctl(kvm, "KVM_CREATE_VM", kvmCreateVM, 0)
	if err != nil {
		return err
	}
	m.vm = os.NewFile(uintptr(fd), "kvm-vm")
	if err := m.addMemory(); err != nil {
		return err
	}
	if fd, err = ioctl(m.vm, "KVM_CREATE_VCPU", kvmCreateVCPU, 0); err != nil {
		return err
	}
	m.vcpu = os.NewFile(uintptr(fd), "kvm-vcpu")
	size, err := ioctl(kvm, "KVM_GET_VCPU_MMAP_SIZE", kvmGetVCPUMmapSize, 0)
	if err != nil {
		return err
	}
	if m.run, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map vCPU: %w", err)
	}
	// Before the control registers: KVM checks CR4 against CPUID.
	if err := ioctlPtr(m.vcpu, "KVM_SET_CPUID2", kvmSetCPUID2, ids); err != nil {
		return err
	}
	return m.setRegisters(f)
}

func (m *vm) addMemory() (err error) {
	// Intel CPUs without "unrestricted guest" need three pages outside the memory.
	if _, err := ioctl(m.vm, "KVM_SET_TSS_ADDR", kvmSetTSSAddr, 0xfffbd000); err != nil {
		return err
	}
	if m.mem, err = unix.Mmap(-1, 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS); err != nil {
		return fmt.Errorf("map guest memory: %w", err)
	}
	copy(m.mem, m.g.image())
	r := &memoryRegion{Size: memSize, User: uint64(uintptr(unsafe.Pointer(&m.mem[0])))}
	return ioctlPtr(m.vm, "KVM_SET_USER_MEMORY_REGION", kvmSetUserMemoryRegion, r)
}

func (m *vm) setRegisters(f features) error {
	s := &sregs{}
	if err := ioctlPtr(m.vcpu, "KVM_GET_SREGS", kvmGetSregs, s); err != nil {
		return err
	}
	// Flat 64-bit code (type 11) and data (type 3) segments.
	s.CS = segment{Limit: 0xffffffff, Selector: 8, Type: 11, Present: 1, S: 1, L: 1, G: 1}
	data := segment{Limit: 0xffffffff, Selector: 16, Type: 3, Present: 1, DB: 1, S: 1, G: 1}
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.CR0, s.CR3, s.CR4, s.EFER = cr0Bits, uint64(m.g.base+pml4At), cr4Base, eferLM
	if f.xsave {
		s.CR4 |= cr4XSV
	}
	if err := ioctlPtr(m.vcpu, "KVM_SET_SREGS", kvmSetSregs, s); err != nil {
		return err
	}
	r := &regs{RIP: uint64(m.g.base + codeAt), RSP: uint64(m.g.base + stackTop), RFlags: 2}
	return ioctlPtr(m.vcpu, "KVM_SET_REGS", kvmSetRegs, r)
}

// features reads CPUID leaf 1 (Intel SDM volume 2, CPUID).
func (c *cpuid) features() (f features) {
	for _, e := range c.Entries[:min(int(c.N), len(c.Entries))] {
		if e.Function == 1 {
			f.cx16, f.xsave = e.ECX&(1<<13) != 0, e.ECX&(1<<26) != 0
		}
	}
	return f
}

// loop runs the vCPU until it exits for a reason of its own.
func (m *vm) loop() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m.tid.Store(int64(unix.Gettid()))
	for {
		_, err := ioctl(m.vcpu, "KVM_RUN", kvmRun, 0)
		switch {
		case m.stop.Load():
			return errStopped
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			// A signal for the Go runtime; go on.
		default:
			return err
		}
	}
}

// kick ends loop. A thread on its way into KVM_RUN sees immediate_exit, one that
// is inside gets the signal; the Go runtime takes SIGURG for nothing.
func (m *vm) kick() {
	m.stop.Store(true)
	m.run[runImmediateExit] = 1
	if tid := m.tid.Load(); tid != 0 {
		// It fails only when the thread has left already.
		_ = unix.Tgkill(unix.Getpid(), int(tid), unix.SIGURG)
	}
}

// where names the last step that the guest announced.
func (m *vm) where() string {
	n := int(m.mem[stepAt])
	if n == 0 || n > len(m.g.steps) {
		return "its first instruction"
	}
	return m.g.steps[n-1]
}

// judge reads why the vCPU exited and what the guest left behind.
func (m *vm) judge() (bool, string) {
	switch reason := u32(m.run, runExitReason); reason {
	case exitHLT:
		return m.judgeHalted()
	case exitShutdown:
		return false, "the micro-guest crashed at " + m.where()
	case exitInternalError:
		return false, fmt.Sprintf("KVM cannot execute %s (KVM_EXIT_INTERNAL_ERROR, suberror %d)", m.where(), u32(m.run, runUnion))
	case exitFailEntry:
		hw := binary.LittleEndian.Uint64(m.run[runUnion:])
		return false, fmt.Sprintf("the CPU refused to enter the micro-guest (hardware reason %#x)", hw)
	default:
		return false, fmt.Sprintf("the micro-guest ended with KVM exit reason %d at %s", reason, m.where())
	}
}

func (m *vm) judgeHalted() (bool, string) {
	r := &regs{}
	if err := ioctlPtr(m.vcpu, "KVM_GET_REGS", kvmGetRegs, r); err != nil {
		return false, err.Error()
	}
	if uint32(r.RAX) != done {
		return false, fmt.Sprintf("the micro-guest halted with %#x in RAX, not %#x, after %s", r.RAX, uint32(done), m.where())
	}
	le := binary.LittleEndian
	if lo, hi := le.Uint64(m.mem[pairAt:]), le.Uint64(m.mem[pairAt+8:]); m.g.steps[0] == "CMPXCHG16B" && (lo != pairLow || hi != pairHigh) {
		return false, fmt.Sprintf("CMPXCHG16B stored %#x:%#x, not %#x:%#x", hi, lo, uint64(pairHigh), uint64(pairLow))
	}
	return true, "KVM ran a micro-guest with " + strings.Join(m.g.steps, ", ")
}

func (m *vm) close() {
	// Unmapping and closing what was mapped and opened here cannot fail.
	if m.run != nil {
		_ = unix.Munmap(m.run)
	}
	for _, f := range []*os.File{m.vcpu, m.vm} {
		if f != nil {
			f.Close()
		}
	}
	if m.mem != nil {
		_ = unix.Munmap(m.mem)
	}
}
