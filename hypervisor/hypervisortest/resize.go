// SPDX-License-Identifier: Apache-2.0

package hypervisortest

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// fakeSize is how large a fake machine is.
type fakeSize struct {
	mu     sync.Mutex
	cpus   int    // guarded by mu
	memory uint64 // guarded by mu
}

// Size is what the machine has now: vCPUs and bytes of memory.
func (vm *FakeVM) Size() (cpus int, memory uint64) {
	vm.size.mu.Lock()
	defer vm.size.mu.Unlock()
	return vm.size.cpus, vm.size.memory
}

// ResizeCPUs implements hypervisor.CPUResizer.
func (vm *FakeVM) ResizeCPUs(ctx context.Context, n int) (int, error) {
	vm.size.mu.Lock()
	defer vm.size.mu.Unlock()
	c := vm.guest.Config
	if n < c.CPUs || n > max(c.CPUs, c.MaxCPUs) {
		return 0, fmt.Errorf("%d vCPUs, of %d to %d: %w", n, c.CPUs, c.MaxCPUs, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return vm.size.cpus, err
	}
	vm.size.cpus = n
	return n, nil
}

// ResizeMemory implements hypervisor.MemoryResizer.
func (vm *FakeVM) ResizeMemory(ctx context.Context, bytes uint64) (uint64, error) {
	vm.size.mu.Lock()
	defer vm.size.mu.Unlock()
	c := vm.guest.Config
	if bytes < c.MemoryBytes || bytes > max(c.MemoryBytes, c.MaxMemoryBytes) {
		return 0, fmt.Errorf("%d bytes, of %d to %d: %w", bytes, c.MemoryBytes, c.MaxMemoryBytes, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return vm.size.memory, err
	}
	vm.size.memory = c.MemoryBytes + (bytes-c.MemoryBytes+hypervisor.MemoryBlock-1)/hypervisor.MemoryBlock*hypervisor.MemoryBlock
	return vm.size.memory, nil
}

// Growth of the machine in Life.
const (
	moreCPUs   = 2
	moreMemory = 256 << 20
)

// resizing is what is expected of a machine whose size can change while it runs.
func (s *suite) resizing(vm hypervisor.VM, c hypervisor.Config) {
	if r, ok := vm.(hypervisor.CPUResizer); ok {
		for _, n := range []int{c.MaxCPUs, c.CPUs + 1, c.CPUs, c.MaxCPUs, c.CPUs} {
			if have, err := r.ResizeCPUs(s.context(), n); err != nil || have != n {
				s.Errorf("%d vCPUs: have %d, %v", n, have, err)
			}
		}
		for _, n := range []int{-1, 0, c.CPUs - 1, c.MaxCPUs + 1} {
			if _, err := r.ResizeCPUs(s.context(), n); !errdefs.IsInvalidArgument(err) {
				s.Errorf("%d vCPUs: %v; want invalid argument", n, err)
			}
		}
	}
	if r, ok := vm.(hypervisor.MemoryResizer); ok {
		s.resizeMemory(r, c)
	}
}

func (s *suite) resizeMemory(r hypervisor.MemoryResizer, c hypervisor.Config) {
	for _, n := range []uint64{c.MemoryBytes + 1, c.MaxMemoryBytes, c.MemoryBytes} {
		want := c.MemoryBytes + (n-c.MemoryBytes+hypervisor.MemoryBlock-1)/hypervisor.MemoryBlock*hypervisor.MemoryBlock
		have, err := r.ResizeMemory(s.context(), n)
		if err != nil || have != want {
			s.Errorf("%d bytes of memory: have %d, %v; want %d", n, have, err, want)
		}
	}
	for _, n := range []uint64{0, c.MemoryBytes - 1, c.MaxMemoryBytes + 1} {
		if _, err := r.ResizeMemory(s.context(), n); !errdefs.IsInvalidArgument(err) {
			s.Errorf("%d bytes of memory: %v; want invalid argument", n, err)
		}
	}
}
