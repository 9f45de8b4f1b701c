// SPDX-License-Identifier: Apache-2.0

// Package bpf loads small eBPF programs with bpf(2).
package bpf

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Insn is one instruction (RFC 9669, section 3).
type Insn struct {
	Code uint8
	Regs uint8 // see Pair
	Off  int16
	Imm  int32
}

// Pair is the field of a destination and a source register.
func Pair(dst, src uint8) uint8 {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return dst | src<<4
	}
	return dst<<4 | src // the two are bit fields of the kernel's struct
}

// Call is bpf(2); attr points at the member of union bpf_attr that belongs to
// cmd (Linux include/uapi/linux/bpf.h). What attr points at must be pinned. It
// returns a descriptor, for the commands that have one.
func Call[T any](cmd uintptr, attr *T) (int, error) {
	n, _, e := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if e != 0 {
		return -1, e
	}
	return int(n), nil
}

// Load loads a program and returns its descriptor, which the caller closes. kind
// is one of BPF_PROG_TYPE, attach the BPF_... kind of its later attachment (0:
// the kind of program has only one), name at most 15 bytes.
func Load(kind, attach uint32, name string, prog []Insn) (int, error) {
	license := []byte("Apache-2.0\x00")
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&prog[0])
	pin.Pin(&license[0])
	attr := struct {
		kind, count        uint32
		insns, license     unsafe.Pointer
		logLevel, logSize  uint32
		logBuffer          uint64
		kernel, flags      uint32
		name               [unix.BPF_OBJ_NAME_LEN]byte
		device, attachKind uint32
	}{
		kind: kind, count: uint32(len(prog)), attachKind: attach,
		insns: unsafe.Pointer(&prog[0]), license: unsafe.Pointer(&license[0]),
	}
	if n := copy(attr.name[:len(attr.name)-1], name); n < len(name) {
		return -1, fmt.Errorf("bpf: name %q: want at most %d bytes", name, n)
	}
	fd := -1
	err := undisturbed(func() (err error) {
		fd, err = Call(unix.BPF_PROG_LOAD, &attr)
		return err
	})
	return fd, err
}

// undisturbed runs f on a thread that takes no signals: the verifier gives up
// with EAGAIN when one is pending (Linux kernel/bpf/verifier.c, do_check), and
// Go's scheduler sends them to its threads at any time.
func undisturbed(f func() error) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var every, before unix.Sigset_t
	for i := range every.Val {
		every.Val[i] = ^every.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &every, &before); err != nil {
		return fmt.Errorf("bpf: hold signals back: %w", err)
	}
	err = f()
	if merr := unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil); err == nil && merr != nil {
		err = fmt.Errorf("bpf: let signals in again: %w", merr)
	}
	return err
}
