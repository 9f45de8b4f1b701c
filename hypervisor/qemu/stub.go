// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A restored machine never runs its kernel's file: the kernel is in the memory.
// QEMU would read it all the same, and keep it, some tens of megabytes for each
// machine. What must be as in the saved machine is the firmware that QEMU takes
// for that kind of kernel, so a stub of the same kind stands for one.

// stubSize is how much of a kernel QEMU looks at to find out its kind.
const stubSize = 8192

// isELF tells whether a kernel is started through PVH, which ELF files are.
func isELF(f *os.File) (bool, error) {
	var magic [len(elf.ELFMAG)]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return string(magic[:]) == elf.ELFMAG, nil
}

// stubKernel is the least ELF file with a PVH entry point: Xen's note
// PHYS32_ENTRY (Xen public/elfnote.h, 18) and a segment of eight bytes.
func stubKernel() (*os.File, error) {
	const (
		entry   = 16 << 20
		notes   = 64 + 2*56 // after the header and two program headers
		segment = notes + 24
	)
	var b bytes.Buffer
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // into memory
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Entry: entry,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2,
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	put(h)
	put(elf.Prog64{Type: uint32(elf.PT_NOTE), Flags: uint32(elf.PF_R), Off: notes, Filesz: 24, Memsz: 24, Align: 4})
	put(elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Off: segment, Vaddr: entry, Paddr: entry, Filesz: 8, Memsz: 8, Align: 8})
	put([3]uint32{4, 8, 18}) // sizes of name and value, type
	b.WriteString("Xen\x00")
	put(uint64(entry))
	b.Write(make([]byte, stubSize-b.Len()))
	fd, err := unix.MemfdCreate("kernel", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("kernel's stub: %w", os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), "kernel")
	if _, err := f.WriteAt(b.Bytes(), 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("kernel's stub: %w", err)
	}
	return f, nil
}

// bootFiles passes on what the machine boots, or stubs of it.
func (s *start) bootFiles() error {
	kernel, err := os.Open(s.c.Kernel)
	if err != nil {
		return fmt.Errorf("guest kernel (hypervisor.qemu.kernel): %w", err)
	}
	if s.c.Restore != nil {
		if is, err := isELF(kernel); err != nil || is {
			kernel.Close()
			if err == nil {
				kernel, err = stubKernel()
			}
			if err != nil {
				return fmt.Errorf("guest kernel (hypervisor.qemu.kernel): %w", err)
			}
			s.l.KernelFD = s.inherit.add(kernel)
			return nil
		}
	}
	s.l.KernelFD = s.inherit.add(kernel)
	if s.c.Initrd == "" {
		return nil
	}
	initrd, err := os.Open(s.c.Initrd)
	if err != nil {
		return fmt.Errorf("guest initrd (hypervisor.qemu.initrd): %w", err)
	}
	s.l.InitrdFD = s.inherit.add(initrd)
	return nil
}
