// SPDX-License-Identifier: Apache-2.0

package kvmprobe

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// device returns the machine's KVM device; without one, every test would show
// nothing but that, so those that need it say so and fail.
func device(t *testing.T) string {
	t.Helper()
	if _, err := os.Stat(Device); err != nil {
		t.Fatalf("these tests need %s, broken or not: %v", Device, err)
	}
	return Device
}

func run(t *testing.T, p program, timeout time.Duration) Verdict {
	t.Helper()
	v, err := probe(t.Context(), device(t), p, timeout)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", v)
	return v
}

func TestLayouts(t *testing.T) {
	for name, x := range map[string][2]uintptr{
		"regs":   {unsafe.Sizeof(regs{}), 0x90},
		"sregs":  {unsafe.Sizeof(sregs{}), 0x138},
		"region": {unsafe.Sizeof(memoryRegion{}), 0x20},
		"cpuid":  {unsafe.Offsetof(cpuid{}.Entries), 8},
		"entry":  {unsafe.Sizeof(cpuidEntry{}), 40},
	} {
		if x[0] != x[1] {
			t.Errorf("%s is %d bytes, the kernel's %d", name, x[0], x[1])
		}
	}
}

// The verdict "usable": plain code runs to its end on any KVM, real or not.
func TestPlainGuestRuns(t *testing.T) {
	if v := run(t, plain, Timeout); !v.Usable {
		t.Errorf("plain code failed: %s", v.Reason)
	}
}

// The verdict of the real probe. Which one it is depends on the machine; that it
// is one of the two, in time, and that its reason names an instruction does not.
func TestKernelLikeGuest(t *testing.T) {
	v, err := Probe(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("this machine: %+v", v)
	if v.Took > Timeout+2*grace {
		t.Errorf("took %v", v.Took)
	}
	want := "KVM ran a micro-guest with "
	if !v.Usable {
		want = ""
		for _, s := range []string{"CMPXCHG16B", "XGETBV", "XSETBV", "XSAVE", "XRSTOR"} {
			if strings.Contains(v.Reason, s) {
				want = s
			}
		}
		if want == "" {
			t.Errorf("the reason names no instruction: %s", v.Reason)
		}
	}
	if !strings.Contains(v.Reason, want) {
		t.Errorf("reason %q, want %q in it", v.Reason, want)
	}
	accel, reason, err := ChooseAccelerator(t.Context(), "auto")
	if err != nil || (accel == "kvm") != v.Usable {
		t.Errorf("auto chose %q (%s), %v, with verdict %+v", accel, reason, err, v)
	}
}

// Each instruction on its own, for the log: what this KVM can and cannot do.
func TestEachInstruction(t *testing.T) {
	for name, p := range map[string]program{
		"CMPXCHG16B": func(g *guest, f features) { g.cmpxchg16b(); g.end() },
		"XGETBV": func(g *guest, f features) {
			g.step("XGETBV")
			g.emit(0x31, 0xc9, 0x0f, 0x01, 0xd0)
			g.end()
		},
		"XSAVE": func(g *guest, f features) {
			g.step("XSAVE")
			g.imm(3, 0xb8)
			g.emit(0x31, 0xd2)
			g.mem(xsaveAt, 0x0f, 0xae, 0x24, 0x25)
			g.end()
		},
	} {
		t.Run(name, func(t *testing.T) {
			if v := run(t, p, Timeout); !v.Usable && !strings.Contains(v.Reason, name) {
				t.Errorf("reason %q does not name %s", v.Reason, name)
			}
		})
	}
}

// The verdict "unusable", on any machine: an invalid opcode without a handler is a triple fault.
func TestCrashIsAVerdict(t *testing.T) {
	crash := func(g *guest, _ features) {
		g.step("UD2")
		g.emit(0x0f, 0x0b)
		g.end()
	}
	if v := run(t, crash, Timeout); v.Usable || !strings.Contains(v.Reason, "UD2") {
		t.Errorf("verdict %+v", v)
	}
}

// A guest that halts without having done its work is not usable either.
func TestWrongResultIsAVerdict(t *testing.T) {
	early := func(g *guest, _ features) {
		g.step("nothing")
		g.emit(0x31, 0xc0, 0xf4) // xor eax, eax; hlt
	}
	if v := run(t, early, Timeout); v.Usable || !strings.Contains(v.Reason, "RAX") {
		t.Errorf("verdict %+v", v)
	}
}

// A guest that spins is stopped when its time is up, and so is it with the context.
func TestSpinningGuestIsStopped(t *testing.T) {
	spin := func(g *guest, _ features) {
		g.step("JMP")
		g.emit(0xeb, 0xfe)
	}
	v := run(t, spin, 100*time.Millisecond)
	if v.Usable || !strings.Contains(v.Reason, "did not end within 100ms; it was at JMP") || v.Took > time.Second {
		t.Errorf("verdict %+v", v)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := probe(ctx, device(t), spin, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestDeviceThatIsNone(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "kvm")
	v, err := Probe(t.Context(), missing)
	if err != nil || v.Usable || !strings.Contains(v.Reason, missing) {
		t.Errorf("missing device: %+v, %v", v, err)
	}
	if v, err := Probe(t.Context(), "/dev/null"); err != nil || v.Usable || !strings.Contains(v.Reason, "KVM_GET_API_VERSION") {
		t.Errorf("/dev/null: %+v, %v", v, err)
	}
	for mode, want := range map[string]string{"tcg": "tcg", "auto": "tcg"} {
		if accel, reason, err := choose(t.Context(), mode, missing); accel != want || reason == "" || err != nil {
			t.Errorf("%s: %q, %q, %v", mode, accel, reason, err)
		}
	}
	if _, _, err := choose(t.Context(), "kvm", missing); err == nil || !strings.Contains(err.Error(), `accelerator = "kvm"`) || !strings.Contains(err.Error(), "[hypervisor.qemu]") {
		t.Errorf("kvm: %v", err)
	}
	if _, _, err := choose(t.Context(), "xen", missing); err == nil {
		t.Error("mode xen was accepted")
	}
}

// The micro-guest itself is right: under QEMU's emulator, which executes all of
// it, it comes to its end. Without this, a mistake in the program would look
// like broken KVM.
func TestProgramUnderEmulation(t *testing.T) {
	g := &guest{base: 0x100000}
	kernelLike(g, features{cx16: true, xsave: true})
	g.code = g.code[:len(g.code)-1] // no HLT but:
	g.emit(0xba, 0xf4, 0, 0, 0)     // mov edx, 0xf4
	g.mem(stepAt, 0x8a, 0x04, 0x25) // mov al, [step]
	g.emit(0xee)                    // out dx, al
	g.emit(0xf4)
	file := filepath.Join(t.TempDir(), "guest")
	if err := os.WriteFile(file, multiboot(g), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "16",
		"-nodefaults", "-display", "none", "-no-reboot", "-kernel", file, "-device", "isa-debug-exit,iobase=0xf4").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("QEMU: %v\n%s", err, out)
	}
	// isa-debug-exit ends QEMU with 2n+1.
	if got, want := exit.ExitCode(), 2*len(g.steps)+1; got != want {
		t.Errorf("exit code %d, want %d (all %d steps)\n%s", got, want, len(g.steps), out)
	}
}

// multiboot wraps the guest into an image for QEMU's -kernel: a header (Multiboot
// 0.6.96 §3.1, with load addresses) and 32-bit code that does what KVM_SET_SREGS does.
func multiboot(g *guest) []byte {
	img := g.image()
	le := binary.LittleEndian
	const entryAt, gdtAt, gdtrAt = 0x100, 0x4000, 0x4100
	const magic, flags = 0x1badb002, 1 << 16
	for i, v := range []uint32{magic, flags, 0xffffffff &^ (magic + flags - 1), g.base, g.base, g.base + memSize, 0, g.base + entryAt} {
		le.PutUint32(img[4*i:], v)
	}
	le.PutUint64(img[gdtAt+8:], 0x00af9a000000ffff)  // 64-bit code
	le.PutUint64(img[gdtAt+16:], 0x00cf92000000ffff) // data
	le.PutUint16(img[gdtrAt:], 23)
	le.PutUint32(img[gdtrAt+2:], g.base+gdtAt)
	s := &guest{base: g.base}
	s.mem(gdtrAt, 0x0f, 0x01, 0x15) // lgdt
	s.imm(g.base+pml4At, 0xb8)
	s.emit(0x0f, 0x22, 0xd8) // mov cr3, eax
	s.imm(cr4Base|cr4XSV, 0xb8)
	s.emit(0x0f, 0x22, 0xe0)   // mov cr4, eax
	s.imm(0xc0000080, 0xb9)    // mov ecx, EFER
	s.imm(1<<8, 0xb8)          // mov eax, LME
	s.emit(0x31, 0xd2)         // xor edx, edx
	s.emit(0x0f, 0x30)         // wrmsr
	s.imm(cr0Bits, 0xb8)       //
	s.emit(0x0f, 0x22, 0xc0)   // mov cr0, eax
	s.imm(g.base+codeAt, 0xea) // jmp 8:code
	s.emit(8, 0)
	copy(img[entryAt:], s.code)
	return img
}

func BenchmarkProbe(b *testing.B) {
	for b.Loop() {
		if _, err := Probe(b.Context(), ""); err != nil {
			b.Fatal(err)
		}
	}
}
