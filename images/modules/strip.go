// SPDX-License-Identifier: Apache-2.0

package modules

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Sections that only tools read which this guest does not have. Each costs time
// when the module is loaded, without KVM more than the module's own work.
var (
	// The unwinder's tables are sorted at load. Without them a stack trace marks
	// the module's frames as uncertain ("?"); nothing else changes.
	unwindTables = []string{".orc_unwind", ".orc_unwind_ip", ".rela.orc_unwind_ip"}
	// The list of the calls that function tracing patches at load, and again
	// whenever a tracer comes and goes.
	traceSites = []string{"__mcount_loc", ".rela__mcount_loc"}
)

// traceCall is what the compiler puts at the start of a function for function
// tracing, before relocation; nop5 is what the kernel replaces it with at load
// while nothing is traced (Intel SDM volume 2, NOP: the 5-byte form).
var (
	traceCall = []byte{0xe8, 0, 0, 0, 0}
	nop5      = []byte{0x0f, 0x1f, 0x44, 0, 0}
)

// traceSymbol is the target of those calls.
const traceSymbol = "__fentry__"

// strip removes what the guest does not need. objcopy also drops what follows
// the ELF file, which is the signature.
func strip(module []byte, keepBTF bool) ([]byte, error) {
	dir, err := os.MkdirTemp("", "kata-module-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	remove := append([]string{".comment"}, unwindTables...)
	if !keepBTF {
		remove = append(remove, ".BTF")
	}
	module, untraced, err := untrace(module)
	if err != nil {
		return nil, err
	}
	if untraced {
		remove = append(remove, traceSites...)
	}
	args := []string{"--strip-debug"}
	for _, section := range remove {
		args = append(args, "-R", section)
	}
	file := filepath.Join(dir, "module.ko")
	if err := os.WriteFile(file, module, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command("objcopy", append(args, file)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("objcopy: %w: %s", err, bytes.TrimSpace(out))
	}
	return os.ReadFile(file)
}

// untrace returns the module with its calls for function tracing replaced by
// what the kernel would patch in at load. A module with a site of another form,
// or of another architecture, is returned as it is, and false.
func untrace(module []byte) ([]byte, bool, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, false, err
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_REL {
		return module, false, nil
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, false, fmt.Errorf("symbols: %w", err)
	}
	out := bytes.Clone(module)
	for _, rel := range f.Sections {
		if rel.Type != elf.SHT_RELA || int(rel.Info) >= len(f.Sections) {
			continue
		}
		code := f.Sections[rel.Info]
		if code.Flags&elf.SHF_EXECINSTR == 0 {
			continue
		}
		if !untraceSection(out, symbols, rel, code) {
			return module, false, nil
		}
	}
	return out, true, nil
}

// relaSize is the size of an Elf64_Rela: r_offset, r_info, r_addend.
const relaSize = 24

// untraceSection replaces the calls of one section and makes their relocations
// R_X86_64_NONE. It is false when a site is not what is expected.
func untraceSection(out []byte, symbols []elf.Symbol, rel, code *elf.Section) bool {
	le := binary.LittleEndian
	if rel.Offset+rel.Size > uint64(len(out)) || code.Offset+code.Size > uint64(len(out)) {
		return false
	}
	for at := rel.Offset; at+relaSize <= rel.Offset+rel.Size; at += relaSize {
		entry := out[at : at+relaSize]
		offset, info := le.Uint64(entry), le.Uint64(entry[8:])
		// debug/elf leaves out the null symbol, number 0.
		n := elf.R_SYM64(info)
		if n == 0 || int(n) > len(symbols) || symbols[n-1].Name != traceSymbol {
			continue
		}
		kind := elf.R_X86_64(elf.R_TYPE64(info))
		if kind != elf.R_X86_64_PLT32 && kind != elf.R_X86_64_PC32 {
			return false
		}
		if offset == 0 || offset+4 > code.Size {
			return false
		}
		site := out[code.Offset+offset-1 : code.Offset+offset+4]
		if !bytes.Equal(site, traceCall) {
			return false
		}
		copy(site, nop5)
		clear(entry[8:])
	}
	return true
}
