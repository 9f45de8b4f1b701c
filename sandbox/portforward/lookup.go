// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/bpf"
)

// Fields of struct bpf_sk_lookup (Linux include/uapi/linux/bpf.h), by offset.
const (
	ctxFamily   = 8
	ctxProtocol = 12
	ctxLocalIP4 = 40
	ctxLocalIP6 = 44
)

// Helper functions (Linux include/uapi/linux/bpf.h, enum bpf_func_id).
const (
	fnMapLookup = 1
	fnRelease   = 86
	fnAssign    = 124
)

// skPass lets the kernel go on, with the assigned socket if there is one.
const skPass = 1

// Places of the listeners in the map.
const (
	slotIPv4 = iota
	slotIPv6
	slots
)

// Registers: r1 to r5 are arguments, r6 to r9 survive calls, r10 is the frame.
const (
	r0 = iota
	r1
	r2
	r3
	_
	_
	r6
	r7
	r10 = 10
)

func insn(code, regs uint8, off int16, imm int32) bpf.Insn {
	return bpf.Insn{Code: code, Regs: regs, Off: off, Imm: imm}
}

// load reads 32 bits of what src points at; store writes them.
func load(dst, src uint8, off int16) bpf.Insn {
	return insn(unix.BPF_LDX|unix.BPF_W|unix.BPF_MEM, bpf.Pair(dst, src), off, 0)
}

func store(dst uint8, off int16, src uint8) bpf.Insn {
	return insn(unix.BPF_STX|unix.BPF_W|unix.BPF_MEM, bpf.Pair(dst, src), off, 0)
}

func move(dst, src uint8) bpf.Insn {
	return insn(unix.BPF_ALU64|unix.BPF_MOV|unix.BPF_X, bpf.Pair(dst, src), 0, 0)
}

func set(dst uint8, v int32) bpf.Insn {
	return insn(unix.BPF_ALU64|unix.BPF_MOV|unix.BPF_K, bpf.Pair(dst, 0), 0, v)
}

func call(fn int32) bpf.Insn { return insn(unix.BPF_JMP|unix.BPF_CALL, 0, 0, fn) }

// Jumps compare 32 bits and have their distance filled in by link.
const (
	toPass   = -1
	toIPv4   = -2
	toAssign = -3
)

func unless(r uint8, v int32, to int16) bpf.Insn {
	return insn(unix.BPF_JMP32|unix.BPF_JNE|unix.BPF_K, bpf.Pair(r, 0), to, v)
}

func when(r uint8, v int32, to int16) bpf.Insn {
	return insn(unix.BPF_JMP32|unix.BPF_JEQ|unix.BPF_K, bpf.Pair(r, 0), to, v)
}

// program is what the kernel runs for a connection; listeners is the map's descriptor.
func program(listeners int) []bpf.Insn {
	network := func(b ...byte) int32 { return int32(binary.NativeEndian.Uint32(b)) }
	head := []bpf.Insn{
		move(r6, r1),
		load(r2, r6, ctxProtocol),
		unless(r2, unix.IPPROTO_TCP, toPass),
		load(r2, r6, ctxFamily),
		set(r7, slotIPv4),
		when(r2, unix.AF_INET, toIPv4),
		set(r7, slotIPv6),
		unless(r2, unix.AF_INET6, toPass),
	}
	for i, want := range []int32{0, 0, 0, network(0, 0, 0, 1)} {
		head = append(head, load(r2, r6, ctxLocalIP6+4*int16(i)), unless(r2, want, toPass))
	}
	head = append(head, insn(unix.BPF_JMP|unix.BPF_JA, 0, toAssign, 0))
	ipv4 := []bpf.Insn{
		load(r2, r6, ctxLocalIP4),
		insn(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, bpf.Pair(r2, 0), 0, network(0xff, 0, 0, 0)),
		unless(r2, network(127, 0, 0, 0), toPass),
	}
	assign := []bpf.Insn{
		store(r10, -4, r7),
		// A map's descriptor is an immediate of 64 bits, two instructions long.
		insn(unix.BPF_LD|unix.BPF_DW|unix.BPF_IMM, bpf.Pair(r1, unix.BPF_PSEUDO_MAP_FD), 0, int32(listeners)), {},
		move(r2, r10),
		insn(unix.BPF_ALU64|unix.BPF_ADD|unix.BPF_K, bpf.Pair(r2, 0), 0, -4),
		call(fnMapLookup),
		insn(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, bpf.Pair(r0, 0), toPass, 0), // a pointer: all its bits
		move(r7, r0),
		move(r1, r6),
		move(r2, r0),
		set(r3, 0),
		call(fnAssign),
		move(r1, r7),
		call(fnRelease),
	}
	pass := []bpf.Insn{set(r0, skPass), insn(unix.BPF_JMP|unix.BPF_EXIT, 0, 0, 0)}
	places := map[int16]int{
		toIPv4: len(head), toAssign: len(head) + len(ipv4), toPass: len(head) + len(ipv4) + len(assign),
	}
	all := append(append(append(head, ipv4...), assign...), pass...)
	for i, in := range all {
		jump := in.Code&7 == unix.BPF_JMP || in.Code&7 == unix.BPF_JMP32
		if place, ok := places[in.Off]; ok && jump {
			all[i].Off = int16(place - i - 1)
		}
	}
	return all
}

// steer leads connections to the loopback addresses of the namespace to the
// listeners, until the returned file is closed. A nil listener is left out.
func steer(namespace *os.File, v4, v6 *net.TCPListener) (*os.File, error) {
	m, err := bpf.Call(unix.BPF_MAP_CREATE, &struct{ kind, key, value, entries, flags uint32 }{unix.BPF_MAP_TYPE_SOCKMAP, 4, 8, slots, 0})
	if err != nil {
		return nil, fmt.Errorf("bpf: map of listeners: %w", err)
	}
	defer unix.Close(m) // the program holds it
	for slot, l := range []*net.TCPListener{slotIPv4: v4, slotIPv6: v6} {
		if l == nil {
			continue
		}
		if err := enter(m, uint32(slot), l); err != nil {
			return nil, fmt.Errorf("bpf: listener %v: %w", l.Addr(), err)
		}
	}
	p, err := bpf.Load(unix.BPF_PROG_TYPE_SK_LOOKUP, unix.BPF_SK_LOOKUP, "kata_fwd", program(m))
	if err != nil {
		return nil, fmt.Errorf("bpf: program of the type sk_lookup (Linux 5.9): %w", err)
	}
	defer unix.Close(p) // the link holds it
	link, err := bpf.Call(unix.BPF_LINK_CREATE, &struct{ prog, target, kind, flags uint32 }{uint32(p), uint32(namespace.Fd()), unix.BPF_SK_LOOKUP, 0})
	if err != nil {
		return nil, fmt.Errorf("bpf: attach to the network namespace: %w", err)
	}
	return os.NewFile(uintptr(link), "sk_lookup"), nil
}

// enter puts a listener into the map.
func enter(m int, slot uint32, l *net.TCPListener) error {
	rc, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var berr error
	err = rc.Control(func(fd uintptr) {
		value := uint64(fd)
		var pin runtime.Pinner
		defer pin.Unpin()
		pin.Pin(&slot)
		pin.Pin(&value)
		_, berr = bpf.Call(unix.BPF_MAP_UPDATE_ELEM, &struct {
			m, _       uint32
			key, value unsafe.Pointer
			flags      uint64
		}{m: uint32(m), key: unsafe.Pointer(&slot), value: unsafe.Pointer(&value)})
	})
	return errors.Join(err, berr)
}
