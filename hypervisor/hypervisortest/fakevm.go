// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest"
	"github.com/kata-v2/kata/hypervisor/vsock/vsocktest/guestsvc"
)

// Dial implements hypervisor.VM.
func (vm *FakeVM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return vm.dev.Dial(ctx, port)
}

// Listen implements hypervisor.VM.
func (vm *FakeVM) Listen(port uint32) (net.Listener, error) { return vm.dev.Listen(port) }

// Stop implements hypervisor.VM.
func (vm *FakeVM) Stop(context.Context) error {
	vm.mu.Lock()
	vm.stopping = true
	vm.mu.Unlock()
	vm.kill()
	<-vm.done
	return nil
}

func (vm *FakeVM) kill() { _ = vm.cmd.Process.Kill() } // gone already is fine

// Done implements hypervisor.VM.
func (vm *FakeVM) Done() <-chan struct{} { return vm.done }

// Err implements hypervisor.VM.
func (vm *FakeVM) Err() error {
	select {
	case <-vm.done:
	default:
		return nil
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.err
}

// Info implements hypervisor.VM.
func (vm *FakeVM) Info() hypervisor.Info { return vm.info }

// WaitReady implements hypervisor.ReadyWaiter.
func (vm *FakeVM) WaitReady(ctx context.Context) error {
	select {
	case <-vm.ready:
		return nil
	case <-vm.done:
		return fmt.Errorf("the fake VMM ended: %w", net.ErrClosed)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Guest is what a fake machine's guest has: its network, console and kernel
// command line. It can listen before Boot; nothing reaches it until then.
type Guest struct {
	// Config is what the machine was started with.
	Config hypervisor.Config
	// Console is the guest's console.
	Console io.Writer

	vm     *FakeVM
	net    *vsocktest.Guest
	params []string
	gone   chan struct{} // closed when the machine has ended

	mu    sync.Mutex // held while the guest boots, so that it does not end half way
	ended bool       // guarded by mu
}

func newGuest(vm *FakeVM, c hypervisor.Config, params []string) *Guest {
	return &Guest{
		Config: c, Console: vm.console, vm: vm, params: params, gone: make(chan struct{}),
		net: vsocktest.NewGuest(vm.driver, vsock.DefaultGuestCID, 2),
	}
}

func (g *Guest) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	g.net.Close()
	close(g.gone)
}

// Boot brings the guest's vsock driver up: what the host has dialled meanwhile arrives.
func (g *Guest) Boot() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return net.ErrClosed
	}
	return g.net.Boot()
}

// Done is closed when the machine has ended.
func (g *Guest) Done() <-chan struct{} { return g.gone }

// Listen accepts streams to a guest port.
func (g *Guest) Listen(port uint32) (net.Listener, error) { return g.net.Listen(port) }

// Dial opens a stream to a host port.
func (g *Guest) Dial(hostPort uint32) (net.Conn, error) { return g.net.Dial(hostPort) }

// CommandLine is the kernel's.
func (g *Guest) CommandLine() string { return strings.Join(g.params, " ") }

// Param is the last value of a parameter of the kernel command line.
func (g *Guest) Param(name string) (value string, ok bool) {
	for _, p := range g.params {
		for _, f := range strings.Fields(p) {
			if v, found := strings.CutPrefix(f, name+"="); found {
				value, ok = v, true
			}
		}
	}
	return value, ok
}

// Crash ends the machine as a guest that panics does; why goes to the console.
func (g *Guest) Crash(why string) {
	fmt.Fprintln(g.Console, why)
	g.vm.mu.Lock()
	g.vm.crash = why
	g.vm.mu.Unlock()
	g.vm.kill()
}

// ServeTestPorts is a Fake's Guest for Run: it serves guestsvc and dials the ready port.
func ServeTestPorts(g *Guest) {
	if slices.Contains(g.params, guestsvc.StuckParam) {
		return
	}
	n := guestsvc.Net{Listen: g.Listen, Dial: g.Dial, Exit: func() { g.Crash("guestinit: told to end") }}
	s, err := guestsvc.Start(n)
	if err != nil {
		return // the machine has ended
	}
	defer s.Close()
	if err := g.Boot(); err != nil {
		return
	}
	fmt.Fprintln(g.Console, "guestinit: ready")
	if err := guestsvc.Ready(n, g.CommandLine()); err != nil {
		fmt.Fprintln(g.Console, "guestinit:", err)
	}
	<-g.Done()
}
