// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/internal/spawn"
	"github.com/kata-v2/kata/internal/tail"
)

// FakeAccelerator is what the fake's Info names.
const FakeAccelerator = "fake"

// consoleTail is how much of a fake guest's console is kept, in bytes.
const consoleTail = 4096

// Fake is a hypervisor.Hypervisor for unit tests: the vsock device is the real
// one, its guest is emulated in this process, and a process that only sleeps
// stands for the VMM, so that a pid can be recorded, looked up and killed, and
// has the network namespace that it was started for (which needs root). It
// passes Run.
type Fake struct {
	// Guest is what every machine's guest does. It is called in a goroutine of
	// its own and must return soon after its machine's Done is closed. A guest that
	// returns earlier leaves its machine running with nobody in it.
	Guest func(*Guest)
	// BeforeStart, when set, is asked before a machine's process starts; its error
	// is that of Start, with phase "exec".
	BeforeStart func(context.Context, hypervisor.Config) error
}

// FakeVM is one machine of a Fake.
type FakeVM struct {
	dev     *vsock.User
	driver  *vsocktest.Driver
	guest   *Guest
	cmd     *exec.Cmd
	info    hypervisor.Info
	disks   fakeDisks
	plugs   fakePlugs
	size    fakeSize
	console *tail.Buffer

	ready   chan struct{}
	done    chan struct{}
	workers sync.WaitGroup // the ready listener and the guest

	mu       sync.Mutex
	stopping bool   // guarded by mu
	crash    string // guarded by mu; the guest's last words
	err      error  // guarded by mu; set before done is closed
}

// fakeStart is one Start under way.
type fakeStart struct {
	f    *Fake
	c    hypervisor.Config
	vm   *FakeVM
	port uint32
	undo []func()
}

// Start implements hypervisor.Hypervisor.
func (f *Fake) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	s := &fakeStart{f: f, c: c, vm: &FakeVM{
		console: tail.New(consoleTail), ready: make(chan struct{}), done: make(chan struct{}),
	}}
	for _, step := range []struct {
		phase string
		run   func(context.Context) error
	}{{"config", s.config}, {"vsock", s.vsock}, {"exec", s.exec}, {"boot", s.boot}} {
		err := step.run(ctx)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			for i := len(s.undo) - 1; i >= 0; i-- {
				s.undo[i]()
			}
			closeShares(c)
			closeNICs(c)
			for _, d := range c.Disks {
				d.Close()
			}
			return nil, &hypervisor.StartError{Phase: step.phase, Err: err}
		}
	}
	return s.vm, nil
}

func closeShares(c hypervisor.Config) {
	for _, s := range c.Shares {
		_ = s.Conn.Close()
	}
}

func closeNICs(c hypervisor.Config) {
	for _, n := range c.NICs {
		n.Close()
	}
}

func (s *fakeStart) config(context.Context) error {
	switch c := s.c; {
	case c.ID == "" || strings.Contains(c.ID, ","):
		return fmt.Errorf("ID %q: must not be empty or hold a comma", c.ID)
	case c.CPUs < 1:
		return fmt.Errorf("CPUs is %d: must be at least 1", c.CPUs)
	case c.MemoryBytes == 0 || c.MemoryBytes%(1<<20) != 0:
		return fmt.Errorf("MemoryBytes is %d: must be a multiple of 1 MiB", c.MemoryBytes)
	}
	for _, path := range []string{s.c.Kernel, s.c.Initrd} {
		if _, err := os.Stat(path); err != nil && path != "" {
			return fmt.Errorf("guest image: %w", err)
		}
	}
	if s.c.Kernel == "" {
		return errors.New("no Kernel")
	}
	return nil
}

func (s *fakeStart) vsock(context.Context) (err error) {
	switch s.c.Vsock {
	case "", hypervisor.VsockAuto, hypervisor.VsockVhostUser:
	default:
		return fmt.Errorf("vsock backend is %q: the fake has %q only", s.c.Vsock, hypervisor.VsockVhostUser)
	}
	vm := s.vm
	if vm.dev, err = vsock.NewUser(vsock.UserConfig{Logger: slog.New(slog.DiscardHandler)}); err != nil {
		return err
	}
	// Waits for the ready listener too, which the device ends.
	s.undo = append(s.undo, func() { _ = vm.dev.Close(); vm.workers.Wait() })
	if s.c.ReadyParam == "" {
		return nil
	}
	l, err := vm.dev.Listen(0)
	if err != nil {
		return err
	}
	s.port = l.Addr().(vsock.Addr).Port
	vm.workers.Go(func() {
		defer l.Close()
		if c, err := l.Accept(); err == nil {
			_ = c.Close()
			close(vm.ready)
		}
	})
	return nil
}

func (s *fakeStart) exec(ctx context.Context) error {
	if s.f.BeforeStart != nil {
		if err := s.f.BeforeStart(ctx, s.c); err != nil {
			return err
		}
	}
	thread := spawn.NewThread()
	if n := s.c.Network; n.Path != "" || !n.Host {
		if err := thread.EnterNetNS(n.Path); err != nil {
			thread.Close()
			return err
		}
	}
	cmd := exec.Command("sleep", "infinity")
	for _, n := range s.c.NICs { // the process holds them, as a VMM does
		cmd.ExtraFiles = append(append(cmd.ExtraFiles, n.Taps...), n.Vhost...)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.c.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.c.UID, Gid: s.c.GID}
	}
	if err := thread.Start(cmd); err != nil {
		thread.Close()
		return err
	}
	closeNICs(s.c)
	vm := s.vm
	vm.cmd = cmd
	vm.plugs.ports = s.c.HotplugPorts
	vm.size.cpus, vm.size.memory = s.c.CPUs, s.c.MemoryBytes
	vm.info = hypervisor.Info{
		PID: cmd.Process.Pid, Accelerator: FakeAccelerator, CPUs: s.c.CPUs, Vsock: hypervisor.VsockVhostUser, ConsoleTail: vm.console.String,
	}
	vm.info.Disks = vm.disks.boot(s.c)
	for i := range s.c.NICs {
		vm.info.NICs = append(vm.info.NICs, fmt.Sprintf("f%x", i))
	}
	// Until boot has a guest, the process is this Start's to wait for.
	s.undo = append(s.undo, func() {
		if vm.guest != nil {
			vm.kill()
			<-vm.done
			return
		}
		vm.kill()
		_ = cmd.Wait()
		thread.Close()
	})
	if s.c.Started != nil {
		if err := s.c.Started("fake-vmm", cmd.Process.Pid); err != nil {
			return err
		}
	}
	driver, err := vsocktest.NewDriver(vm.dev.QEMUFile(), vsocktest.DriverConfig{Features: vsocktest.FeatEventIdx})
	if err != nil {
		return err
	}
	vm.driver = driver
	params := s.c.KernelParams
	if s.c.ReadyParam != "" {
		params = append(params[:len(params):len(params)], fmt.Sprintf("%s=%d", s.c.ReadyParam, s.port))
	}
	vm.guest = newGuest(vm, s.c, params)
	go vm.wait(thread, s.c)
	return nil
}

// boot lets the guest run.
func (s *fakeStart) boot(context.Context) error {
	if s.f.Guest != nil {
		s.vm.workers.Go(func() { s.f.Guest(s.vm.guest) })
	}
	return nil
}

// wait takes everything down when the process has ended.
func (vm *FakeVM) wait(thread *spawn.Thread, c hypervisor.Config) {
	werr := vm.cmd.Wait()
	thread.Close()
	vm.guest.end()
	_ = vm.dev.Close()
	vm.workers.Wait()
	vm.driver.Free()
	closeShares(c)
	vm.plugs.unplug(func(hypervisor.NIC) bool { return true })
	vm.mu.Lock()
	if !vm.stopping {
		vm.err = fmt.Errorf("the fake VMM ended: %w", werr)
		if vm.crash != "" {
			vm.err = fmt.Errorf("%w after guest-panic; guest console: %s", vm.err, vm.console.String())
		}
	}
	vm.mu.Unlock()
	close(vm.done)
}
