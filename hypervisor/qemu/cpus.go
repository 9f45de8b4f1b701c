// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// smp is the machine's vCPUs. Without KVM all that it can ever have are there from
// the start, and the guest is told how many to use at first: QEMU 7.2 aborts when
// one is plugged in while its translation buffer is full
// (tcg_region_initial_alloc__locked), and crashes at the next plug of any device
// after one was unplugged. One that the guest does not use costs a thread that sleeps.
func smp(c hypervisor.Config, all bool) string {
	most := max(c.CPUs, c.MaxCPUs)
	if all {
		return fmt.Sprintf("%d,maxcpus=%d", most, most)
	}
	return fmt.Sprintf("%d,maxcpus=%d", c.CPUs, most)
}

// bootCPUs is how many vCPUs the guest begins with. Without KVM that is one: its
// kernel changes its own code on the way, see rpc.Service.OneCPU of the agent.
func bootCPUs(c hypervisor.Config, all bool) int {
	if all {
		return 1
	}
	return c.CPUs
}

// cpuParams: see smp.
func cpuParams(c hypervisor.Config, all bool) []string {
	if !all || max(c.CPUs, c.MaxCPUs) == 1 {
		return nil
	}
	return []string{fmt.Sprintf("maxcpus=%d", bootCPUs(c, all))}
}

// sizes is how large a machine can be, and what waits for it to change.
type sizes struct {
	cpus, maxCPUs int           // at boot, at most
	memory, room  uint64        // bytes at boot, and beside them at most
	turn          chan struct{} // held by the one change that is under way
	allCPUs       bool          // are there from the start, see smp

	mu      sync.Mutex
	changed chan struct{}         // guarded by mu; closed when the size of memory changes
	leaving map[string]chan error // guarded by mu; vCPUs on their way out, by their slots
}

func newSizes(c hypervisor.Config, all bool) *sizes {
	return &sizes{
		cpus: c.CPUs, maxCPUs: max(c.CPUs, c.MaxCPUs), memory: c.MemoryBytes, room: room(c), allCPUs: all,
		turn: make(chan struct{}, 1), changed: make(chan struct{}), leaving: map[string]chan error{},
	}
}

// begin waits until no other change of size is under way; finish ends this one.
func (s *sizes) begin(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *sizes) finish() { <-s.turn }

// event takes QEMU's events that are about sizes.
func (s *sizes) event(e qmpEvent) {
	switch e.Name {
	case "MEMORY_DEVICE_SIZE_CHANGE":
		s.memoryEvent(e.Data)
	case "ACPI_DEVICE_OST":
		s.answered(e.Data)
	}
}

// answered takes a guest's answer to an eject request (qapi/acpi.json; ACPI 6.5
// §6.3.5: source 3 is the request, 0 success, 0x84 in progress). It is also how a
// success is known: QEMU's emulator may keep the vCPU's object, whose end is the
// DEVICE_DELETED event, for long.
func (s *sizes) answered(data json.RawMessage) {
	var d struct {
		Info struct {
			Slot           string
			SlotType       string `json:"slot-type"`
			Source, Status int
		} `json:"info"`
	}
	const ejectRequest, inProgress = 3, 0x84
	if json.Unmarshal(data, &d) != nil || d.Info.SlotType != "CPU" || d.Info.Source != ejectRequest || d.Info.Status == inProgress {
		return
	}
	var err error
	if d.Info.Status != 0 {
		err = fmt.Errorf("the guest does not let go of it (ACPI status %#x): %w", d.Info.Status, errdefs.ErrFailedPrecondition)
	}
	s.left(d.Info.Slot, err)
}

// left tells whoever waits for a vCPU's end.
func (s *sizes) left(slot string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch := s.leaving[slot]; ch != nil {
		ch <- err
		delete(s.leaving, slot)
	}
}

func (s *sizes) expectLeave(slot string) <-chan error {
	ch := make(chan error, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving[slot] = ch
	return ch
}

func (s *sizes) forget(slot string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.leaving, slot)
}

// cpuSlot is one of QEMU's query-hotpluggable-cpus (qapi/machine.json).
type cpuSlot struct {
	Type  string         `json:"type"`
	Path  string         `json:"qom-path"` // empty when nothing is in it
	Props map[string]int `json:"props"`
}

// id is what this backend names the vCPU in the slot.
func (c cpuSlot) id() string {
	return fmt.Sprintf("cpu-%d-%d-%d", c.Props["socket-id"], c.Props["core-id"], c.Props["thread-id"])
}

func (c cpuSlot) compare(o cpuSlot) int {
	for _, k := range []string{"socket-id", "core-id", "thread-id"} {
		if n := cmp.Compare(c.Props[k], o.Props[k]); n != 0 {
			return n
		}
	}
	return 0
}

func (vm *VM) cpuSlots(ctx context.Context) (slots []cpuSlot, present int, err error) {
	if err := vm.qmp.execute(ctx, "query-hotpluggable-cpus", nil, &slots); err != nil {
		return nil, 0, err
	}
	slices.SortFunc(slots, cpuSlot.compare)
	for _, c := range slots {
		if c.Path != "" {
			present++
		}
	}
	return slots, present, nil
}

// ResizeCPUs implements hypervisor.CPUResizer.
func (vm *VM) ResizeCPUs(ctx context.Context, n int) (have int, err error) {
	s := vm.sizes
	if n < s.cpus || n > s.maxCPUs {
		return 0, fmt.Errorf("%d vCPUs: this machine can have from %d to %d: %w", n, s.cpus, s.maxCPUs, errdefs.ErrInvalidArgument)
	}
	if s.allCPUs {
		return n, ctx.Err()
	}
	if err := s.begin(ctx); err != nil {
		return 0, fmt.Errorf("resize vCPUs: %w", err)
	}
	defer s.finish()
	slots, have, err := vm.cpuSlots(ctx)
	if err == nil && have < n {
		err = vm.plugCPUs(ctx, slots, n-have)
	} else if err == nil && have > n {
		err = vm.unplugCPUs(ctx, slots, have-n)
	}
	// Counted again: what a guest says of itself is no proof. Also when ctx is done.
	_, have, cerr := vm.cpuSlots(context.WithoutCancel(ctx))
	if err == nil && cerr == nil && have != n {
		cerr = fmt.Errorf("there are %d: %w", have, errdefs.ErrFailedPrecondition)
	}
	if err := errors.Join(err, cerr); err != nil {
		return have, fmt.Errorf("resize to %d vCPUs: %w", n, err)
	}
	return have, nil
}

func (vm *VM) plugCPUs(ctx context.Context, slots []cpuSlot, n int) error {
	for _, c := range slots {
		if n == 0 {
			break
		}
		if c.Path != "" {
			continue
		}
		if err := vm.plugCPU(ctx, c); err != nil {
			return err
		}
		n--
	}
	return nil
}

// unplugCPUs takes the last n out that were plugged in.
func (vm *VM) unplugCPUs(ctx context.Context, slots []cpuSlot, n int) error {
	for i, c := range slices.Backward(slots) {
		if n == 0 {
			break
		}
		if !strings.HasSuffix(c.Path, "/"+c.id()) {
			continue
		}
		if err := vm.unplugCPU(ctx, strconv.Itoa(i), c.id()); err != nil {
			return err
		}
		n--
	}
	return nil
}

func (vm *VM) plugCPU(ctx context.Context, c cpuSlot) error {
	args := map[string]any{"driver": c.Type, "id": c.id()}
	for k, v := range c.Props {
		args[k] = v
	}
	return vm.qmp.execute(ctx, "device_add", args, nil)
}

// unplugCPU takes the vCPU out of a slot, whose number is its place among all.
func (vm *VM) unplugCPU(ctx context.Context, slot, id string) error {
	left := vm.sizes.expectLeave(slot)
	defer vm.sizes.forget(slot)
	if err := vm.qmp.execute(ctx, "device_del", map[string]any{"id": id}, nil); err != nil {
		return err
	}
	select {
	case err := <-left:
		if err != nil {
			return fmt.Errorf("vCPU %s: %w", id, err)
		}
		return nil
	case <-vm.done:
		return vm.endErr()
	case <-ctx.Done():
		return fmt.Errorf("vCPU %s: %w", id, errors.Join(errors.New("the guest does not let go of it"), ctx.Err()))
	}
}
