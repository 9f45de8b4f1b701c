// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"debug/elf"
	"os"
	"path/filepath"
	"testing"
)

// The stub is what QEMU takes for a PVH kernel: an ELF file for the machine with
// Xen's note and an entry point in its only segment.
func TestStubKernel(t *testing.T) {
	f, err := stubKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if is, err := isELF(f); err != nil || !is {
		t.Errorf("isELF: %v, %v", is, err)
	}
	e, err := elf.NewFile(f)
	if err != nil {
		t.Fatal(err)
	}
	if e.Machine != elf.EM_X86_64 || len(e.Progs) != 2 || e.Progs[0].Type != elf.PT_NOTE || e.Progs[1].Type != elf.PT_LOAD {
		t.Fatalf("%v, programs %v", e.FileHeader, e.Progs)
	}
	note := make([]byte, e.Progs[0].Filesz)
	if _, err := e.Progs[0].ReadAt(note, 0); err != nil {
		t.Fatal(err)
	}
	if typ, name := e.ByteOrder.Uint32(note[8:]), string(note[12:15]); typ != 18 || name != "Xen" || e.ByteOrder.Uint64(note[16:]) != e.Entry {
		t.Errorf("note %x of %s: %x", typ, name, note)
	}
	if p := e.Progs[1]; e.Entry < p.Paddr || e.Entry >= p.Paddr+p.Filesz {
		t.Errorf("entry %#x is not in the segment at %#x", e.Entry, p.Paddr)
	}
	bz := filepath.Join(t.TempDir(), "bzImage")
	if err := os.WriteFile(bz, []byte("MZ"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := os.Open(bz)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if is, err := isELF(b); err != nil || is {
		t.Errorf("isELF of another file: %v, %v", is, err)
	}
}
