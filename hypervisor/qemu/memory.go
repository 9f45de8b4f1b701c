// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
)

// vmemID names the device whose memory grows and shrinks (virtio spec 1.3 §5.15).
const vmemID = "vmem"

// movableRatio is how much of the memory that a guest is given may be of the kind
// that can always be taken back, in percent of what its kernel has for itself
// (kernel Documentation/admin-guide/mm/memory-hotplug.rst, auto_movable_ratio). So
// that 256 MiB can become 1 GiB and be 256 MiB again; beyond, every fifth part
// serves the kernel's own needs, which grow with the memory.
const movableRatio = 400

// room is how much memory the machine can be given while it runs, in bytes.
func room(c hypervisor.Config) uint64 {
	if c.MaxMemoryBytes <= c.MemoryBytes {
		return 0
	}
	return (c.MaxMemoryBytes - c.MemoryBytes) / hypervisor.MemoryBlock * hypervisor.MemoryBlock
}

// maxMemory is what -m says of memory that comes later.
func maxMemory(c hypervisor.Config) string {
	if room(c) == 0 {
		return ""
	}
	return fmt.Sprintf(",maxmem=%dM", (c.MemoryBytes+room(c))>>20)
}

// memoryArguments are the devices by which memory comes and goes. The back-end is
// a file like that of the memory at boot, so that daemons see it; what the guest
// does not have takes nothing.
func memoryArguments(c hypervisor.Config, l layout) (a []string) {
	if n := room(c); n > 0 {
		later := backing(c, true)
		device := fmt.Sprintf("virtio-mem-pci,id=%s,memdev=mem1,requested-size=0,block-size=%dM", vmemID, hypervisor.MemoryBlock>>20)
		if later != "" {
			device += ",prealloc=on"
		}
		a = append(a, "-object", fmt.Sprintf("memory-backend-memfd,id=mem1,size=%dM,share=on%s", n>>20, later), "-device", device)
	}
	if c.ReclaimFreed {
		a = append(a, "-device", l.device("virtio-balloon")+",id=balloon,free-page-reporting=on")
	}
	return a
}

// memoryParams let the guest's kernel use new memory at once, most of it so that
// it can be taken back. A machine that may have memory above 4 GiB would otherwise
// set 64 MiB aside for devices that cannot reach it (swiotlb); it has none.
func memoryParams(c hypervisor.Config) []string {
	if room(c) == 0 {
		return nil
	}
	return []string{
		"swiotlb=noforce", "memhp_default_state=online", "memory_hotplug.online_policy=auto-movable",
		fmt.Sprintf("memory_hotplug.auto_movable_ratio=%d", movableRatio),
	}
}

// ResizeMemory implements hypervisor.MemoryResizer.
func (vm *VM) ResizeMemory(ctx context.Context, bytes uint64) (have uint64, err error) {
	s := vm.sizes
	if bytes < s.memory || bytes > s.memory+s.room {
		return 0, fmt.Errorf("memory of %d bytes: this machine can have from %d to %d: %w", bytes, s.memory, s.memory+s.room, errdefs.ErrInvalidArgument)
	}
	if s.room == 0 {
		return s.memory, nil
	}
	if err := s.begin(ctx); err != nil {
		return 0, fmt.Errorf("resize memory: %w", err)
	}
	defer s.finish()
	want := (bytes - s.memory + hypervisor.MemoryBlock - 1) / hypervisor.MemoryBlock * hypervisor.MemoryBlock
	if want > s.room {
		want = s.room
	}
	plugged, err := vm.plugMemory(ctx, want)
	if err != nil {
		err = fmt.Errorf("resize memory to %d bytes: the guest has %d: %w", s.memory+want, s.memory+plugged, err)
	}
	return s.memory + plugged, err
}

// plugMemory asks the guest to have that much of the device's memory and waits until it has.
func (vm *VM) plugMemory(ctx context.Context, want uint64) (have uint64, err error) {
	path := "/machine/peripheral/" + vmemID
	set := map[string]any{"path": path, "property": "requested-size", "value": want}
	if err := vm.qmp.execute(ctx, "qom-set", set, nil); err != nil {
		return 0, err
	}
	for {
		changed := vm.sizes.memoryChanged() // before the look, so that no change is missed
		// Also when ctx is done: the caller is told what there is.
		if err := vm.qmp.execute(context.WithoutCancel(ctx), "qom-get", map[string]any{"path": path, "property": "size"}, &have); err != nil {
			return have, err
		}
		if have == want {
			return have, nil
		}
		if err := ctx.Err(); err != nil {
			return have, err
		}
		select {
		case <-changed:
		case <-vm.done:
			return have, vm.endErr()
		case <-ctx.Done():
		}
	}
}

// memoryEvent takes QEMU's MEMORY_DEVICE_SIZE_CHANGE (qapi/machine.json).
func (s *sizes) memoryEvent(data json.RawMessage) {
	var d struct {
		ID string `json:"id"`
	}
	if json.Unmarshal(data, &d) != nil || d.ID != vmemID {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *sizes) memoryChanged() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}
