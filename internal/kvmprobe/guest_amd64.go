// SPDX-License-Identifier: Apache-2.0

package kvmprobe

import "encoding/binary"

// The micro-guest's memory, relative to its base.
const (
	memSize  = 0x10000
	pml4At   = 0x1000 // page tables: one entry each, one 2 MiB page
	pdptAt   = 0x2000
	pdAt     = 0x3000
	stepAt   = 0x5000 // one byte: how far the guest came
	pairAt   = 0x5010 // CMPXCHG16B's operand
	xsaveAt  = 0x6000 // XSAVE's area, 64-byte aligned
	codeAt   = 0x8000
	stackTop = 0xf000
)

// done is in RAX when the guest halts.
const done = 0x6b617461

// What CMPXCHG16B stores.
const (
	pairLow  = 0x11
	pairHigh = 0x22
)

// Control register bits (Intel SDM volume 3, 2.5).
const (
	cr0Bits = 1<<0 | 1<<1 | 1<<4 | 1<<5 | 1<<16 | 1<<31 // PE MP ET NE WP PG
	cr4Base = 1<<5 | 1<<9 | 1<<10                       // PAE OSFXSR OSXMMEXCPT
	cr4XSV  = 1 << 18                                   // OSXSAVE
	eferLM  = 1<<8 | 1<<10                              // LME LMA
)

// features are the instructions that KVM announces (CPUID leaf 1, ECX).
type features struct {
	cx16, xsave bool
}

// guest is a program under construction.
type guest struct {
	base  uint32
	code  []byte
	steps []string // names, in the order of the step byte from 1 on
}

// emit appends machine code.
func (g *guest) emit(b ...byte) { g.code = append(g.code, b...) }

// mem appends an instruction whose operand is the absolute address base+at: op
// is everything before the 32-bit displacement.
func (g *guest) mem(at uint32, op ...byte) {
	g.code = binary.LittleEndian.AppendUint32(append(g.code, op...), g.base+at)
}

// imm appends an instruction with a 32-bit immediate.
func (g *guest) imm(v uint32, op ...byte) {
	g.code = binary.LittleEndian.AppendUint32(append(g.code, op...), v)
}

// step marks that what comes next is called name.
func (g *guest) step(name string) {
	g.steps = append(g.steps, name)
	g.mem(stepAt, 0xc6, 0x04, 0x25)  // mov byte [step], …
	g.emit(byte(len(g.steps) & 127)) // … the step's number
}

// end leaves the marker in EAX and halts.
func (g *guest) end() {
	g.step("HLT")
	g.imm(done, 0xb8) // mov eax, done
	g.emit(0xf4)      // hlt
}

// program builds a micro-guest.
type program func(g *guest, f features)

// plain executes nothing that an emulator could not.
func plain(g *guest, _ features) { g.end() }

// kernelLike executes what a real kernel does while it boots.
func kernelLike(g *guest, f features) {
	if f.cx16 {
		g.cmpxchg16b()
	}
	if f.xsave {
		g.xstate()
	}
	g.end()
}

// cmpxchg16b swaps the zeroed pair for another one.
func (g *guest) cmpxchg16b() {
	g.step("CMPXCHG16B")
	g.emit(0x31, 0xc0)                                // xor eax, eax
	g.emit(0x31, 0xd2)                                // xor edx, edx
	g.imm(pairLow, 0xbb)                              // mov ebx, pairLow
	g.imm(pairHigh, 0xb9)                             // mov ecx, pairHigh
	g.mem(pairAt, 0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25) // lock cmpxchg16b [pair]
}

// xstate reads and writes XCR0 and saves and restores x87 and SSE state.
func (g *guest) xstate() {
	g.step("XGETBV")
	g.emit(0x31, 0xc9)       // xor ecx, ecx
	g.emit(0x0f, 0x01, 0xd0) // xgetbv
	g.step("XSETBV")
	g.emit(0x83, 0xc8, 0x03) // or eax, x87|SSE
	g.emit(0x0f, 0x01, 0xd1) // xsetbv
	g.step("XSAVE")
	g.imm(3, 0xb8)                         // mov eax, x87|SSE
	g.emit(0x31, 0xd2)                     // xor edx, edx
	g.mem(xsaveAt, 0x0f, 0xae, 0x24, 0x25) // xsave [area]
	g.step("XRSTOR")
	g.mem(xsaveAt, 0x0f, 0xae, 0x2c, 0x25) // xrstor [area]
}

// image lays the program and its page tables out for a base below 2 MiB.
func (g *guest) image() []byte {
	m := make([]byte, memSize)
	const presentWritable, large = 3, 0x80
	le := binary.LittleEndian
	le.PutUint64(m[pml4At:], uint64(g.base+pdptAt)|presentWritable)
	le.PutUint64(m[pdptAt:], uint64(g.base+pdAt)|presentWritable)
	le.PutUint64(m[pdAt:], presentWritable|large)
	copy(m[codeAt:stackTop], g.code)
	return m
}
