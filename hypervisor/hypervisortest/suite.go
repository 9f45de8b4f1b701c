// SPDX-License-Identifier: Apache-2.0

// Package hypervisortest is the conformance suite of hypervisor.Hypervisor:
// every backend passes Run with a guest that serves guestsvc. It also holds Fake,
// a hypervisor for unit tests without a machine, which passes it too.
package hypervisortest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// Harness is a hypervisor under test.
type Harness struct {
	// Hypervisor under test. No test of the same process may run beside the suite,
	// which looks at the process's descriptors and children.
	Hypervisor hypervisor.Hypervisor
	// Machine is what to boot: Kernel, Initrd, CPUs, MemoryBytes, Vsock, UID and GID.
	// Its guest runs a guestsvc.Server with Exit, calls guestsvc.Ready, writes
	// "guestinit: ready" to the console before, and knows guestsvc.StuckParam.
	Machine hypervisor.Config
	// SharedPorts says that all machines of the host share its ports, as with the
	// kernel's vhost-vsock: a port that one listens on is EADDRINUSE for the others.
	SharedPorts bool
	// EarlyDriver says that the guest's vsock driver is up before its first process,
	// as one that is built into the kernel is: a dial made before that is refused.
	EarlyDriver bool
	// NoHotplug says that the machine takes nothing while it runs: it refuses
	// Config.HotplugPorts and MaxCPUs, and says why.
	NoHotplug bool
	// Saves says that machines can be saved (Snapshotter) and restored.
	Saves bool
	// Accelerator is what Info must name.
	Accelerator string
	// Timeout bounds every step, a boot included.
	Timeout time.Duration
}

type suite struct {
	*testing.T
	Harness
	pids []int // of processes that the last configuration's Started was told of
	mu   sync.Mutex
}

// Run runs the whole suite as subtests of t: three machines, four where they can be saved, are booted, and a few
// more are started and ended before they have.
func Run(t *testing.T, h Harness) {
	for _, tt := range []struct {
		name string
		f    func(*suite)
	}{
		{"StartErrors", (*suite).startErrors},
		{"CancelledStart", (*suite).cancelledStart},
		{"KilledDuringBoot", (*suite).killedDuringBoot},
		{"StoppedDuringBoot", (*suite).stoppedDuringBoot},
		{"Life", (*suite).life},
		{"TwoMachines", (*suite).twoMachines},
		{"Clones", (*suite).clones},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &suite{T: t, Harness: h}
			before := snapshot(t)
			tt.f(s)
			s.nothingLeft(before)
		})
	}
}

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// config is a machine's complete configuration.
func (s *suite) config(id string) hypervisor.Config {
	c := s.Machine
	c.ID = id
	c.Dir = filepath.Join(s.TempDir(), id)
	s.must(os.Mkdir(c.Dir, 0o755))
	s.Cleanup(func() {
		if left, err := os.ReadDir(c.Dir); err != nil || len(left) > 0 {
			s.Errorf("left in Config.Dir: %v, %v", left, err)
		}
	})
	c.ReadyParam = guestsvc.ReadyParam
	c.Started = func(name string, pid int) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if name == "" || pid <= 0 {
			s.Errorf("Started was told of %q, %d", name, pid)
		}
		s.pids = append(s.pids, pid)
		return nil
	}
	return c
}

func (s *suite) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), s.Timeout)
	s.Cleanup(cancel)
	return ctx
}

// start boots a machine that the subtest ends.
func (s *suite) start(c hypervisor.Config) hypervisor.VM {
	s.Helper()
	vm, err := s.Hypervisor.Start(s.context(), c)
	s.must(err)
	s.Cleanup(func() {
		s.stop(vm)
		if s.Failed() {
			s.Logf("console of %s:\n%s", c.ID, vm.Info().ConsoleTail())
		}
	})
	return vm
}

func (s *suite) stop(vm hypervisor.VM) {
	if err := vm.Stop(s.stopContext()); err != nil {
		s.Errorf("Stop: %v", err)
	}
}

func (s *suite) stopContext() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	s.Cleanup(cancel)
	return ctx
}

// ready waits for the guest by the optional interface, which every backend
// that is given a ReadyParam has to have.
func (s *suite) ready(vm hypervisor.VM) {
	s.Helper()
	w, ok := vm.(hypervisor.ReadyWaiter)
	if !ok {
		s.Fatalf("%T was started with a ReadyParam and is no ReadyWaiter", vm)
	}
	if err := w.WaitReady(s.context()); err != nil {
		s.Fatalf("WaitReady: %v; console:\n%s", err, vm.Info().ConsoleTail())
	}
}

// pending is something that waits on a machine; its result arrives once.
type pending struct {
	what string
	err  chan error
}

func wait(what string, f func() error) pending {
	p := pending{what, make(chan error, 1)}
	go func() { p.err <- f() }()
	return p
}

// allFail checks that everything that waits on an ended machine ends with an error.
func (s *suite) allFail(all []pending) {
	s.Helper()
	limit := time.After(s.Timeout)
	for _, p := range all {
		select {
		case err := <-p.err:
			if err == nil {
				s.Errorf("%s ended without an error although the machine has ended", p.what)
			}
		case <-limit:
			s.Fatalf("%s still waits although the machine has ended", p.what)
		}
	}
}

// stillWaiting checks that nothing has ended yet.
func (s *suite) stillWaiting(all []pending) {
	s.Helper()
	for _, p := range all {
		select {
		case err := <-p.err:
			s.Fatalf("%s ended although the machine lives: %v", p.what, err)
		default:
		}
	}
}

// done waits for the machine's end.
func (s *suite) done(vm hypervisor.VM) {
	s.Helper()
	select {
	case <-vm.Done():
	case <-time.After(s.Timeout):
		s.Fatal("Done is not closed although the machine has ended")
	}
}

func (s *suite) dial(vm hypervisor.VM, port uint32) net.Conn {
	s.Helper()
	c, err := vm.Dial(s.context(), port)
	s.must(err)
	s.Cleanup(func() { _ = c.Close() })
	s.must(c.SetDeadline(time.Now().Add(s.Timeout)))
	return c
}

// echo sends a pattern and reads it back.
func echo(c net.Conn, seed uint32) error {
	want := make([]byte, 10_000)
	guestsvc.NewPattern(seed).Fill(want)
	got := make([]byte, len(want))
	if _, err := c.Write(want); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("echo differs")
	}
	return nil
}

func (s *suite) dialEcho(vm hypervisor.VM, seed uint32) error {
	c, err := vm.Dial(s.context(), guestsvc.EchoPort)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(s.Timeout)); err != nil {
		return err
	}
	return echo(c, seed)
}

// dialBack has the guest dial a host port and returns the control stream and its answer.
func (s *suite) dialBack(vm hypervisor.VM, port uint32) (net.Conn, byte) {
	s.Helper()
	c := s.dial(vm, guestsvc.DialPort)
	s.must(binary.Write(c, binary.LittleEndian, port))
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	s.must(err)
	return c, b[0]
}

func (s *suite) listen(vm hypervisor.VM, port uint32) (net.Listener, uint32) {
	s.Helper()
	l, err := vm.Listen(port)
	s.must(err)
	s.Cleanup(func() { _ = l.Close() })
	a, ok := l.Addr().(vsock.Addr)
	if !ok || a.Port == 0 || (port != 0 && a.Port != port) {
		s.Fatalf("listener on %d has address %v; want a vsock.Addr of that port", port, l.Addr())
	}
	return l, a.Port
}

// accept takes the guest's stream and checks that the guest at its other end echoes.
func (s *suite) accept(l net.Listener, seed uint32) error {
	c, err := l.Accept()
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(s.Timeout)); err != nil {
		return err
	}
	return echo(c, seed)
}
