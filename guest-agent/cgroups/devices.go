// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/internal/bpf"
)

// SetDevices restricts which device nodes the group may make, read and write.
// cgroup v2 has no file for it: a BPF program of type CGROUP_DEVICE answers for
// every access (Linux include/uapi/linux/bpf.h, struct bpf_cgroup_dev_ctx). No
// rules leave the group unrestricted. The last rule that matches decides.
func (g *Group) SetDevices(rules []specs.LinuxDeviceCgroup) error {
	if len(rules) == 0 {
		return nil
	}
	prog, err := deviceProgram(withUsual(rules))
	if err != nil {
		return err
	}
	dir, err := os.Open(g.dir)
	if err != nil {
		return fmt.Errorf("device rules: %w", err)
	}
	defer dir.Close()
	fd, release, err := g.devices.program(prog)
	if err != nil {
		return err
	}
	defer release() // the attachment keeps it
	attr := struct{ target, prog, kind, flags uint32 }{uint32(dir.Fd()), uint32(fd), unix.BPF_CGROUP_DEVICE, 0}
	if _, err := bpf.Call(unix.BPF_PROG_ATTACH, &attr); err != nil {
		return fmt.Errorf("device rules: attach BPF program: %w", err)
	}
	return nil
}

// programs are device programs that the kernel has, for the life of the guest.
type programs struct {
	load func(text []bpf.Insn) (fd int, err error)

	mu     sync.Mutex
	loaded []program // guarded by mu
}

type program struct {
	text []bpf.Insn
	fd   int
}

func loadDevices(text []bpf.Insn) (int, error) {
	return bpf.Load(unix.BPF_PROG_TYPE_CGROUP_DEVICE, 0, "kata_dev", text)
}

// program returns a descriptor of a program, and what gives it back.
func (p *programs) program(text []bpf.Insn) (fd int, release func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.loaded {
		if slices.Equal(l.text, text) {
			return l.fd, func() {}, nil
		}
	}
	if fd, err = p.load(text); err != nil {
		return -1, nil, fmt.Errorf("device rules: load BPF program: %w", err)
	}
	return fd, func() { unix.Close(fd) }, nil
}

// PrepareDevices loads the programs of the rules that containers have unless
// somebody asks for more: those of the CRI, and those of ctr, which has the console
// too. A machine that is restored then does not check and compile them.
func (m *Manager) PrepareDevices() error {
	none := specs.LinuxDeviceCgroup{Access: "rwm"}
	major, minor := int64(5), int64(1)
	console := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rwm"}
	for _, rules := range [][]specs.LinuxDeviceCgroup{{none}, {none, console}} {
		text, err := deviceProgram(withUsual(rules))
		if err != nil {
			return err
		}
		fd, _, err := m.devices.program(text)
		if err != nil {
			return err
		}
		m.devices.mu.Lock()
		m.devices.loaded = append(m.devices.loaded, program{text, fd})
		m.devices.mu.Unlock()
	}
	return nil
}

// heldGroup has no processes; no container's id begins with a dot.
const heldGroup = ".held"

// HoldSwitches keeps on, for the life of the guest, what the kernel switches on when
// the first group has a limit of CPU time or device rules, and off with the last. It
// does so by changing its own code (Linux static keys, kernel/sched/fair.c,
// cfs_bandwidth_used, and kernel/bpf/cgroup.c, cgroup_bpf_enabled_key), which a
// guest without KVM survives for certain only on one CPU: see rpc.Service.OneCPU.
func (m *Manager) HoldSwitches() error {
	g, err := m.Create(heldGroup)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = write(g.dir, "cpu.max", "100000")
	}
	if err == nil {
		err = g.SetDevices([]specs.LinuxDeviceCgroup{{Access: "rwm"}})
	}
	if err != nil && g != nil {
		err = errors.Join(err, g.Remove()) // its being there says that it holds
	}
	return err
}

// usualDevices are the character devices that every container has (runtime-spec
// config-linux.md, "Default Devices"), and ptmx and the terminals behind it.
// -1 is any minor.
var usualDevices = [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, -1}}

// withUsual lets the usual devices be used, and any node be made (using it is
// another matter), right after the last rule for all devices: a rule that names
// one of them stays the stronger one, and one that says the same again is left
// out, where nothing is denied: containers that differ in nothing else have one program.
func withUsual(rules []specs.LinuxDeviceCgroup) []specs.LinuxDeviceCgroup {
	at := 0
	for i, r := range rules {
		if r.Type == "" || r.Type == "a" {
			at = i + 1
		}
	}
	rest := rules[at:]
	if !slices.ContainsFunc(rest, func(r specs.LinuxDeviceCgroup) bool { return !r.Allow }) {
		rest = slices.DeleteFunc(slices.Clone(rest), isUsual)
	}
	usual := []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Access: "m"}, {Allow: true, Type: "b", Access: "m"}}
	for _, d := range usualDevices {
		r := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d[0], Access: "rwm"}
		if d[1] >= 0 {
			r.Minor = &d[1]
		}
		usual = append(usual, r)
	}
	return slices.Concat(rules[:at], usual, rest)
}

// isUsual tells whether a rule says what withUsual says of a device.
func isUsual(r specs.LinuxDeviceCgroup) bool {
	return r.Type == "c" && r.Access == "rwm" && r.Major != nil && slices.ContainsFunc(usualDevices, func(d [2]int64) bool {
		return *r.Major == d[0] && (d[1] < 0 || r.Minor != nil && *r.Minor == d[1])
	})
}

const (
	opLoadW  = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
	opAnd    = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	opRsh    = unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K
	opMovReg = unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X
	opMovImm = unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K
	opJne    = unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K
	opJneReg = unix.BPF_JMP | unix.BPF_JNE | unix.BPF_X
	opExit   = unix.BPF_JMP | unix.BPF_EXIT

	regRet, regTmp, regCtx                      = 0, 1, 1
	regType, regAccess, regMajor, regMinor byte = 2, 3, 4, 5
)

var accessBits = map[rune]int32{'m': unix.BPF_DEVCG_ACC_MKNOD, 'r': unix.BPF_DEVCG_ACC_READ, 'w': unix.BPF_DEVCG_ACC_WRITE}

// deviceProgram compiles rules: the last one is asked first; none matching means refused.
func deviceProgram(rules []specs.LinuxDeviceCgroup) ([]bpf.Insn, error) {
	prog := []bpf.Insn{
		{Code: opLoadW, Regs: bpf.Pair(regType, regCtx)}, // access_type: access << 16 | type
		{Code: opMovReg, Regs: bpf.Pair(regAccess, regType)},
		{Code: opAnd, Regs: bpf.Pair(regType, 0), Imm: 0xffff},
		{Code: opRsh, Regs: bpf.Pair(regAccess, 0), Imm: 16},
		{Code: opLoadW, Regs: bpf.Pair(regMajor, regCtx), Off: 4},
		{Code: opLoadW, Regs: bpf.Pair(regMinor, regCtx), Off: 8},
	}
	for i := len(rules) - 1; i >= 0; i-- {
		block, all, err := ruleBlock(rules[i])
		if err != nil {
			return nil, fmt.Errorf("device rule %d: %w", i, err)
		}
		prog = append(prog, block...)
		if all {
			return prog, nil // nothing gets past it
		}
	}
	return append(prog, verdict(false)...), nil
}

func verdict(allow bool) []bpf.Insn {
	v := bpf.Insn{Code: opMovImm, Regs: bpf.Pair(regRet, 0)}
	if allow {
		v.Imm = 1
	}
	return []bpf.Insn{v, {Code: opExit}}
}

// ruleBlock checks one rule and answers when it matches; all says that it always does.
func ruleBlock(r specs.LinuxDeviceCgroup) (block []bpf.Insn, all bool, err error) {
	var conds []bpf.Insn
	switch r.Type {
	case "a", "":
		// "a" names every device, whatever the numbers and the access say.
		return verdict(r.Allow), true, nil
	case "b":
		conds = append(conds, bpf.Insn{Code: opJne, Regs: bpf.Pair(regType, 0), Imm: unix.BPF_DEVCG_DEV_BLOCK})
	case "c", "u":
		conds = append(conds, bpf.Insn{Code: opJne, Regs: bpf.Pair(regType, 0), Imm: unix.BPF_DEVCG_DEV_CHAR})
	default:
		return nil, false, fault.New(fault.InvalidArgument, "type %q: want a, b, c or u", r.Type)
	}
	var access int32
	for _, c := range r.Access {
		bit, ok := accessBits[c]
		if !ok {
			return nil, false, fault.New(fault.InvalidArgument, "access %q: want letters of rwm", r.Access)
		}
		access |= bit
	}
	if access == 0 {
		return nil, false, fault.New(fault.InvalidArgument, "access is empty: want letters of rwm")
	}
	const every = unix.BPF_DEVCG_ACC_MKNOD | unix.BPF_DEVCG_ACC_READ | unix.BPF_DEVCG_ACC_WRITE
	if access != every {
		// Allow: every wanted bit must be in the rule. Deny: any bit suffices.
		conds = append(conds, accessCond(access, r.Allow)...)
	}
	if r.Major != nil && *r.Major >= 0 {
		conds = append(conds, bpf.Insn{Code: opJne, Regs: bpf.Pair(regMajor, 0), Imm: int32(*r.Major)})
	}
	if r.Minor != nil && *r.Minor >= 0 {
		conds = append(conds, bpf.Insn{Code: opJne, Regs: bpf.Pair(regMinor, 0), Imm: int32(*r.Minor)})
	}
	block = append(conds, verdict(r.Allow)...)
	for i := range conds {
		if op := block[i].Code; op == opJne || op == opJneReg || op == opJeqZero {
			block[i].Off = int16(len(block) - i - 1) // past this rule
		}
	}
	return block, false, nil
}

const opJeqZero = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K

func accessCond(access int32, allow bool) []bpf.Insn {
	mask := []bpf.Insn{
		{Code: unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X, Regs: bpf.Pair(regTmp, regAccess)},
		{Code: opAnd, Regs: bpf.Pair(regTmp, 0), Imm: access},
	}
	if allow {
		return append(mask, bpf.Insn{Code: opJneReg, Regs: bpf.Pair(regTmp, regAccess)})
	}
	return append(mask, bpf.Insn{Code: opJeqZero, Regs: bpf.Pair(regTmp, 0)})
}
