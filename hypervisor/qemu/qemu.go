// SPDX-License-Identifier: Apache-2.0

// Package qemu runs machines with QEMU 7.2 or newer, driven over QMP.
//
// Everything that QEMU needs reaches it as an inherited descriptor: the kernel
// and initrd, the control and console sockets, the vsock and virtio-fs
// back-ends. So no socket of a machine has a name that outlives it, and QEMU
// can run as a user that owns nothing.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
	"github.com/kata-v2/kata/internal/tsc"
)

// Bytes of QEMU's stderr and of the guest's console that an error may carry.
const (
	stderrTail  = 2048
	consoleTail = 4096
)

// firmwares are where distributions ship qboot, the smallest firmware that
// starts a PVH kernel; without it QEMU's own SeaBIOS is used.
var firmwares = []string{"/usr/share/qemu/qboot.rom", "/usr/share/qemu/bios-microvm.bin"}

// Options are what all machines of an operator share.
type Options struct {
	// Path of the QEMU binary.
	Path string
	// Accelerator is KVM or TCG; "auto" is resolved by the caller.
	Accelerator string
	// Machine type, Q35 or MicroVM; Q35 when empty.
	Machine string
	// Firmware path; empty picks qboot where it is installed.
	Firmware string
	// CPUModel overrides "host" (KVM) or "max,-cx16" (TCG).
	CPUModel string
	// PlugCPUs plugs vCPUs in and out also under TCG, which QEMU 7.2 does not survive.
	PlugCPUs bool
	// NoSeccomp turns QEMU's own seccomp filter off.
	NoSeccomp bool
	// Log receives one line per event; nil drops them.
	Log *slog.Logger
}

// New returns a backend.
func New(o Options) *Hypervisor {
	if o.Machine == "" {
		o.Machine = Q35
	}
	if o.Firmware == "" {
		for _, f := range firmwares {
			if _, err := os.Stat(f); err == nil {
				o.Firmware = f
				break
			}
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Hypervisor{o: o}
}

// Hypervisor is QEMU as a hypervisor.Hypervisor.
type Hypervisor struct{ o Options }

// start is one Start under way: what it has acquired is undone by fail.
type start struct {
	h       *Hypervisor
	c       hypervisor.Config
	l       layout
	inherit fds
	vm      *VM
	undo    []func()
}

// Start implements hypervisor.Hypervisor.
func (h *Hypervisor) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	s := &start{h: h, c: c, vm: &VM{
		log:     h.o.Log,
		console: tail.New(consoleTail),
		stderr:  tail.New(stderrTail),
		done:    make(chan struct{}),
		ready:   make(chan struct{}),
		plugs:   newPlugs(c),
		private: c.MemoryPrivate,
		sizes:   newSizes(c, h.o.Accelerator == TCG && !h.o.PlugCPUs),
	}}
	// The shares belong to the backend from now on, also when Start fails.
	for _, sh := range c.Shares {
		s.l.ShareFDs = append(s.l.ShareFDs, s.inherit.add(sh.Conn))
	}
	s.inheritNICs()
	s.inheritDisks()
	defer s.inherit.close()
	for _, step := range []struct {
		phase string
		run   func(context.Context) error
	}{
		{"config", s.config}, {"vsock", s.vsock}, {"exec", s.exec}, {"qmp", s.qmp}, {"restore", s.restore},
	} {
		err := step.run(ctx)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, s.fail(step.phase, err)
		}
	}
	return s.vm, nil
}

func (s *start) fail(phase string, err error) error {
	for i := len(s.undo) - 1; i >= 0; i-- {
		s.undo[i]()
	}
	return &hypervisor.StartError{Phase: phase, Err: err, Stderr: s.vm.stderr.String(), Console: s.vm.console.String()}
}

// config checks what the caller asked for and opens the fixed files.
func (s *start) config(context.Context) error {
	c, o := &s.c, s.h.o
	switch {
	case c.ID == "" || strings.ContainsAny(c.ID, ",\x00"):
		return fmt.Errorf("ID %q: must not be empty or hold a comma", c.ID)
	case c.CPUs < 1:
		return fmt.Errorf("CPUs is %d: must be at least 1", c.CPUs)
	case c.MemoryBytes < 64<<20 || c.MemoryBytes%(1<<20) != 0:
		return fmt.Errorf("MemoryBytes is %d: must be a multiple of 1 MiB and at least 64 MiB", c.MemoryBytes)
	case o.Accelerator != KVM && o.Accelerator != TCG:
		return fmt.Errorf("accelerator is %q: must be %q or %q", o.Accelerator, KVM, TCG)
	}
	if err := checkHugePages(c, hugePools); err != nil {
		return err
	}
	if err := checkMachine(c, o.Machine); err != nil {
		return err
	}
	if err := checkNICs(c.NICs); err != nil {
		return err
	}
	if n := ports(*c) + sharePorts(*c); c.HotplugPorts < 0 || n > maxPorts {
		return fmt.Errorf("HotplugPorts is %d beside %d disks: must be from 0 to %d", c.HotplugPorts, len(c.Disks), maxPorts-n+c.HotplugPorts)
	}
	if err := checkDisks(c.Disks); err != nil {
		return err
	}
	if err := checkPlaces(*c); err != nil {
		return err
	}
	if err := s.describeDisks(); err != nil {
		return err
	}
	if err := s.memory(); err != nil {
		return err
	}
	if _, err := exec.LookPath(o.Path); err != nil {
		return fmt.Errorf("QEMU binary (hypervisor.qemu.path): %w", err)
	}
	if err := s.bootFiles(); err != nil {
		return err
	}
	s.l.Accelerator, s.l.Machine, s.l.Firmware, s.l.PlugCPUs = o.Accelerator, o.Machine, o.Firmware, o.PlugCPUs
	s.l.CPUModel, s.l.Sandbox = o.CPUModel, !o.NoSeccomp
	if o.Accelerator == TCG { // a guest of KVM is told by KVM
		s.l.TSCKHz = tsc.KHz()
	}
	return nil
}

// vsock makes the device and, before the guest runs, the ready listener.
func (s *start) vsock(context.Context) error {
	d, err := openVsock(s.c, s.h.o.Log)
	if err != nil {
		return err
	}
	s.vm.vsock = d
	s.undo = append(s.undo, func() { d.Close() })
	s.l.Vsock, s.l.CID = d.backend, d.cid
	s.l.VsockFD = s.inherit.add(d.file)
	if d.serial != nil {
		go s.vm.awaitReady(d.serial)
		return nil
	}
	if s.c.ReadyParam == "" {
		return nil
	}
	l, err := d.Listen(0)
	if err != nil {
		return fmt.Errorf("ready listener: %w", err)
	}
	s.l.ReadyPort = portOf(l.Addr())
	go s.vm.acceptReady(l)
	return nil
}

// exec starts the process, with its thread, its sockets and its console reader.
func (s *start) exec(context.Context) error {
	vm := s.vm
	qmpConn, err := s.socket(&s.l.QMPFD)
	if err != nil {
		return err
	}
	console, err := s.socket(&s.l.ConsoleFD)
	if err != nil {
		qmpConn.Close()
		return err
	}
	vm.qmp = newQMP(qmpConn, vm.qmpEvent)
	vm.copyConsole(console)
	s.undo = append(s.undo, func() { vm.qmp.close(); console.Close() })

	thread := spawn.NewThread()
	if n := s.c.Network; n.Path != "" || !n.Host {
		if err := thread.EnterNetNS(n.Path); err != nil {
			thread.Close()
			return err
		}
	}
	s.smallPages()
	cmd := exec.Command(s.h.o.Path, arguments(s.c, s.l)...)
	cmd.ExtraFiles = s.inherit.files
	cmd.Stderr = vm.stderr
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.c.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.c.UID, Gid: s.c.GID, Groups: kvmGroups(s.l.Accelerator)}
	}
	if err := thread.Start(cmd); err != nil {
		thread.Close()
		return fmt.Errorf("start %s: %w", s.h.o.Path, err)
	}
	s.inherit.close() // or QEMU's end would not end what reads from it
	vm.run(cmd, thread, console)
	s.undo = append(s.undo, func() { vm.kill(); <-vm.done })
	if s.c.Started != nil {
		if err := s.c.Started("qemu", cmd.Process.Pid); err != nil {
			return err
		}
	}
	return nil
}

// socket makes a pair, one end for QEMU whose number is stored in fd.
func (s *start) socket(fd *int) (*os.File, error) {
	own, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	*fd = s.inherit.add(theirs)
	return own, nil
}

// qmp ends the machine's start-up: QEMU has parsed its command line, made its
// devices and runs the guest when it answers.
func (s *start) qmp(ctx context.Context) error {
	err := s.vm.qmp.execute(ctx, "qmp_capabilities", nil, nil)
	if errors.Is(err, errQMPClosed) || errors.Is(err, syscall.EPIPE) {
		// QEMU has gone; its own words on stderr are complete once it was waited for.
		<-s.vm.done
		err = s.vm.endErr()
	}
	if err != nil {
		return err
	}
	s.vm.info = hypervisor.Info{
		PID: s.vm.pid, Accelerator: s.l.Accelerator, CPUs: bootCPUs(s.c, s.l.allCPUs()), Vsock: s.l.Vsock, ConsoleTail: s.vm.console.String,
	}
	for i := range s.c.NICs {
		place := fmt.Sprintf("%02x", firstNICSlot+i)
		switch {
		case s.l.Machine == MicroVM:
			place = "" // the guest finds it by its hardware address
		case plugsNICs(s.c):
			place = portPlace(len(s.c.Disks) + i)
		}
		s.vm.info.NICs = append(s.vm.info.NICs, place)
	}
	for i := range s.c.Disks {
		s.vm.info.Disks = append(s.vm.info.Disks, portPlace(diskPort(s.c, i)))
	}
	return nil
}

// socketPair returns two connected non-blocking stream sockets; the second one
// is blocking, as QEMU expects of what it inherits.
func socketPair() (own, theirs *os.File, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	if err := unix.SetNonblock(p[0], true); err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	return os.NewFile(uintptr(p[0]), "vmm"), os.NewFile(uintptr(p[1]), "vmm-peer"), nil
}

// kvmGroups lets an unprivileged QEMU open /dev/kvm through its group.
func kvmGroups(accel string) []uint32 {
	var st unix.Stat_t
	if accel != KVM || unix.Stat("/dev/kvm", &st) != nil || st.Mode&0o060 != 0o060 || st.Gid == 0 {
		return nil
	}
	return []uint32{st.Gid}
}

// KVMNeedsRoot tells whether only root can open /dev/kvm on this host, so that
// QEMU cannot run as another user.
func KVMNeedsRoot() bool {
	var st unix.Stat_t
	if unix.Stat("/dev/kvm", &st) != nil {
		return false
	}
	return st.Mode&0o006 != 0o006 && (st.Mode&0o060 != 0o060 || st.Gid == 0)
}
