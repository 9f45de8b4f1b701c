// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// life is one machine from its start to its orderly end.
func (s *suite) life() {
	c := s.config("life")
	c.NICs = []hypervisor.NIC{s.nic("fixed", 2)}
	c.ReclaimFreed = true
	if !s.NoHotplug {
		c.HotplugPorts, c.MaxCPUs, c.MaxMemoryBytes = 1, c.CPUs+moreCPUs, c.MemoryBytes+moreMemory
	}
	vm := s.start(c)
	early := wait("a dial made before the guest was up", func() error { return s.dialEcho(vm, 1) })
	s.info(vm)
	s.ready(vm)
	if err := <-early.err; err != nil && !(s.EarlyDriver && errors.Is(err, syscall.ECONNREFUSED)) {
		s.Errorf("%s: %v", early.what, err)
	}
	s.ready(vm) // again: it stays so
	if c := vm.Info().ConsoleTail(); !strings.Contains(c, "guestinit: ready") {
		s.Errorf("console of a ready guest: %q", c)
	}
	if err := vm.Err(); err != nil {
		s.Errorf("Err of a live machine: %v", err)
	}
	s.dials(vm)
	s.listens(vm)
	s.plugging(vm)
	s.disks(vm)
	if !s.NoHotplug {
		s.resizing(vm, c)
	}

	waiting := s.load(vm)
	s.stillWaiting(waiting)
	var wg sync.WaitGroup
	for range 3 { // at once, and again below
		wg.Go(func() { s.stop(vm) })
	}
	wg.Wait()
	select {
	case <-vm.Done():
	default:
		s.Error("Stop has returned and Done is open")
	}
	s.allFail(waiting)
	if err := vm.Err(); err != nil {
		s.Errorf("Err after an orderly Stop: %v", err)
	}
	s.afterwards(vm)
}

// info checks what can be known of a machine as soon as Start has returned.
func (s *suite) info(vm hypervisor.VM) {
	i := vm.Info()
	if i.Accelerator != s.Accelerator || i.Vsock == hypervisor.VsockAuto || i.Vsock == "" || i.ConsoleTail == nil {
		s.Errorf("Info %+v", i)
	}
	if err := syscall.Kill(i.PID, 0); err != nil {
		s.Fatalf("Info names process %d: %v", i.PID, err)
	}
	s.mu.Lock()
	if len(s.pids) == 0 || s.pids[len(s.pids)-1] != i.PID {
		s.Errorf("Started was told of %v, Info names %d", s.pids, i.PID)
	}
	s.mu.Unlock()
	dir := "/proc/" + strconv.Itoa(i.PID)
	status, err := os.ReadFile(dir + "/status")
	s.must(err)
	uid := strconv.FormatUint(uint64(s.Machine.UID), 10)
	if want := "\nUid:\t" + strings.Repeat(uid+"\t", 3) + uid + "\n"; s.Machine.UID != 0 && !strings.Contains(string(status), want) {
		s.Errorf("the VMM does not run as user %s:\n%s", uid, status)
	}
	theirs, err := os.Readlink(dir + "/ns/net")
	s.must(err)
	ours, err := os.Readlink("/proc/self/ns/net")
	s.must(err)
	if theirs == ours {
		s.Error("the VMM runs in our network namespace; Config.Network asks for a new one")
	}
}

func (s *suite) dials(vm hypervisor.VM) {
	a, b := s.dial(vm, guestsvc.EchoPort), s.dial(vm, guestsvc.EchoPort)
	s.must(echo(a, 1))
	s.must(echo(b, 2))
	la, ok := a.LocalAddr().(vsock.Addr)
	lb, ok2 := b.LocalAddr().(vsock.Addr)
	if !ok || !ok2 || la.Port == 0 || la.Port == lb.Port {
		s.Errorf("local addresses %v and %v: want vsock.Addr with two ports", a.LocalAddr(), b.LocalAddr())
	}
	_, err := vm.Dial(s.context(), guestsvc.ClosedPort)
	var op *net.OpError
	if !errors.Is(err, syscall.ECONNREFUSED) || !errors.As(err, &op) {
		s.Errorf("dial of a port without a listener: %v; want ECONNREFUSED in a *net.OpError", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := vm.Dial(ctx, guestsvc.EchoPort); !errors.Is(err, context.Canceled) {
		s.Errorf("dial with a cancelled context: %v", err)
	}
	h, ok := a.(vsock.HalfCloser)
	if !ok {
		s.Fatalf("%T is no vsock.HalfCloser", a)
	}
	s.must(h.CloseWrite())
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		s.Errorf("read after both sides have ended: %v", err)
	}
}

func (s *suite) listens(vm hypervisor.VM) {
	l, port := s.listen(vm, 0)
	if l2, err := vm.Listen(port); !errors.Is(err, syscall.EADDRINUSE) {
		s.Errorf("second listener on a port: %v, %v", l2, err)
	}
	for i := range 2 {
		if _, answer := s.dialBack(vm, port); answer != guestsvc.DialOK {
			s.Fatalf("dial %d by the guest: answer %q", i, answer)
		}
		s.must(s.accept(l, 3))
	}
	s.must(l.Close())
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		s.Errorf("Accept of a closed listener: %v", err)
	}
	if _, answer := s.dialBack(vm, port); answer != guestsvc.DialRefused {
		s.Errorf("dial of a closed listener by the guest: answer %q", answer)
	}
}

// load makes streams of every kind that wait for a running guest.
func (s *suite) load(vm hypervisor.VM) []pending {
	reader, writer := s.dial(vm, guestsvc.EchoPort), s.dial(vm, guestsvc.HoldPort)
	_, err := writer.Write([]byte{1})
	s.must(err)
	_, err = io.ReadFull(writer, make([]byte, 1))
	s.must(err)
	l, _ := s.listen(vm, 0)
	return []pending{
		wait("Read", func() error { _, err := reader.Read(make([]byte, 1)); return notTimeout(err) }),
		wait("Write", func() error { _, err := writer.Write(make([]byte, 32<<20)); return notTimeout(err) }),
		wait("Accept", func() error { _, err := l.Accept(); return err }),
	}
}

// notTimeout hides an end by the deadline, which is not the machine's.
func notTimeout(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// afterwards checks what an ended machine answers: errors, at once.
func (s *suite) afterwards(vm hypervisor.VM) {
	s.Helper()
	reason := vm.Err()
	s.allFail([]pending{
		wait("Dial", func() error { _, err := vm.Dial(s.context(), guestsvc.EchoPort); return err }),
		wait("Listen", func() error {
			l, err := vm.Listen(0)
			if err != nil {
				return err
			}
			defer l.Close()
			_, err = l.Accept() // what was opened too late must end too
			return err
		}),
	})
	s.stop(vm)
	if err := vm.Err(); !sameError(err, reason) {
		s.Errorf("Err was %v and is %v after another Stop", reason, err)
	}
}

func sameError(a, b error) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Error() == b.Error()
}

// twoMachines boots two at the same time, which listen on the same port if they
// can; the guest of one crashes, the other one's VMM is killed.
func (s *suite) twoMachines() {
	ports := [2]uint32{7777, 7777}
	var vms [2]hypervisor.VM
	var waiting [2][]pending
	configs := [2]hypervisor.Config{s.config("first"), s.config("second")}
	for i := range vms {
		vms[i] = s.start(configs[i])
	}
	var listeners [2]net.Listener
	for i, vm := range vms {
		s.ready(vm)
		if i > 0 && s.SharedPorts {
			if _, err := vm.Listen(ports[i]); !errors.Is(err, syscall.EADDRINUSE) {
				s.Errorf("listener on the other machine's port: %v", err)
			}
			ports[i] = 0
		}
		listeners[i], ports[i] = s.listen(vm, ports[i])
	}
	var accepted [2]pending
	for i, l := range listeners {
		accepted[i] = wait("Accept", func() error { return s.accept(l, uint32(i+1)) })
	}
	for i, vm := range vms {
		if _, answer := s.dialBack(vm, ports[i]); answer != guestsvc.DialOK {
			s.Fatalf("dial by guest %d: answer %q", i, answer)
		}
		if err := <-accepted[i].err; err != nil {
			s.Fatalf("stream of guest %d: %v", i, err)
		}
		if i == 0 {
			s.stillWaiting(accepted[1:]) // the other machine's listener has seen nothing
		}
	}
	for i, vm := range vms {
		waiting[i] = s.load(vm)
	}

	// The first one's guest ends by itself.
	_, err := s.dial(vms[0], guestsvc.ExitPort).Write([]byte{0})
	s.must(err)
	s.done(vms[0])
	s.allFail(waiting[0])
	err = vms[0].Err()
	if err == nil || !strings.Contains(err.Error(), "guestinit: told to end") {
		s.Errorf("Err after the guest has ended by itself: %v; want its last words", err)
	}
	s.afterwards(vms[0])

	s.stillWaiting(waiting[1])
	s.must(s.dialEcho(vms[1], 9))
	s.killed(vms[1], waiting[1])
}

// killed kills a machine's VMM and checks that everyone learns of it.
func (s *suite) killed(vm hypervisor.VM, waiting []pending) {
	s.Helper()
	begin := time.Now()
	s.must(syscall.Kill(vm.Info().PID, syscall.SIGKILL))
	s.done(vm)
	s.allFail(waiting)
	s.Logf("everyone knew of the kill after %v", time.Since(begin).Round(100*time.Microsecond))
	if err := vm.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		s.Errorf("Err after the VMM was killed: %v", err)
	}
	s.afterwards(vm)
}

// boot lists what waits for a guest that is not up yet.
func (s *suite) boot(vm hypervisor.VM) []pending {
	l, _ := s.listen(vm, 0)
	return []pending{
		wait("WaitReady", func() error { return vm.(hypervisor.ReadyWaiter).WaitReady(context.Background()) }),
		wait("Dial", func() error { _, err := vm.Dial(context.Background(), guestsvc.EchoPort); return err }),
		wait("Accept", func() error { _, err := l.Accept(); return err }),
	}
}
