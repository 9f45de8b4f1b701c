// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Bounds of a change of size. A guest returns memory as fast as it finds it: what
// it still has when the time is over it may return later.
const (
	growTimeout   = 60 * time.Second
	shrinkTimeout = 10 * time.Second
)

// sizer gives the machine the size that its containers need. One change is under
// way at a time; whoever makes it holds turn.
type sizer struct {
	host   Host
	bounds bounds
	base   size          // at boot
	turn   chan struct{} // of one place
	now    size          // guarded by turn

	mu      sync.Mutex
	stated  demand                           // guarded by mu; of the pod, until a container's limits are changed
	limits  map[string]*specs.LinuxResources // guarded by mu; of each container
	told    bool                             // guarded by mu; stated is from an update of the pod, and stays
	pod     *specs.LinuxResources            // guarded by mu; limits of the pod as a whole, nil when its containers' count
	beside  *specs.LinuxResources            // guarded by mu; what the machine may use beside them on the host
	cpusets map[string]string                // guarded by mu; what each container's CPUs are in the guest
	pinned  bool                             // guarded by turn; vCPUs are bound to CPUs
}

func newSizer(h Host, b bounds, stated demand) *sizer {
	base := b.start(stated)
	return &sizer{
		host: h, bounds: b, base: base, now: base, stated: stated, turn: make(chan struct{}, 1),
		limits: map[string]*specs.LinuxResources{}, cpusets: map[string]string{},
	}
}

// set notes a container's limits, nil for one that is gone, and returns those that it had.
func (z *sizer) set(id string, r *specs.LinuxResources) (was *specs.LinuxResources) {
	z.mu.Lock()
	defer z.mu.Unlock()
	was = z.limits[id]
	if z.limits[id] = r; r == nil {
		delete(z.limits, id)
		delete(z.cpusets, id)
	}
	return was
}

// get returns the limits of a container, and whether they are to be changed: then
// what the pod stated before is obsolete.
func (z *sizer) get(id string) *specs.LinuxResources {
	z.mu.Lock()
	defer z.mu.Unlock()
	r := z.limits[id]
	if r != nil && !z.told {
		z.stated, z.pod = demand{}, nil
	}
	return r
}

// want is the size that the containers need now.
func (z *sizer) want() (size, error) {
	z.mu.Lock()
	all, d := maps.Clone(z.limits), demand{}
	stated := z.stated
	z.mu.Unlock()
	for _, r := range all {
		one, err := demandOf(r, z.host)
		if err != nil {
			return size{}, err
		}
		d = d.plus(one)
	}
	return z.bounds.fit(d.atLeast(stated)), nil
}

// host is what this host can give.
func (s *Sandbox) host() (Host, error) { return hostOf(s.o.HostCPUs, s.o.HostMemory) }

// hostOf is a host of so many CPUs and bytes of memory, 0 for what the kernel says.
func hostOf(cpus int, memory uint64) (Host, error) {
	h := Host{CPUs: cpus, MemoryBytes: memory}
	if memory > 0 {
		return h, nil
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return h, fmt.Errorf("memory of this host: %w", err)
	}
	h.MemoryBytes = si.Totalram * uint64(si.Unit)
	return h, nil
}

// begin waits for the turn.
func (z *sizer) begin(ctx context.Context) error {
	select {
	case z.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("resize: %w", ctx.Err())
	}
}

func (z *sizer) finish() { <-z.turn }

// grow makes room for a container's limits, before they are set in the guest;
// limits makes them of those that it had, if any, which are returned. On error
// they are as they were.
func (m *machine) grow(ctx context.Context, id string, limits func(was *specs.LinuxResources) *specs.LinuxResources) (was *specs.LinuxResources, err error) {
	z := m.sizer
	if err := z.begin(ctx); err != nil {
		return nil, err
	}
	defer z.finish()
	was = z.get(id)
	r := limits(was)
	if _, err := demandOf(r, z.host); err != nil {
		return was, err
	}
	z.set(id, r)
	if err := m.enlarge(ctx); err != nil {
		z.set(id, was)
		return was, err
	}
	return was, nil
}

// enlarge gives the machine what it lacks of what its containers need, and its
// cgroup on the host before. The turn is the caller's.
func (m *machine) enlarge(ctx context.Context) error {
	z := m.sizer
	want, err := z.want()
	if err == nil {
		err = m.limitHost(ctx, true)
	}
	if err == nil {
		err = m.resize(ctx, size{max(want.cpus, z.now.cpus), max(want.memory, z.now.memory)})
	}
	if err == nil {
		err = m.pin(ctx)
	}
	return err
}

// restate gives the pod as a whole other limits, and the machine the size for them.
func (m *machine) restate(ctx context.Context, r, overhead *specs.LinuxResources) error {
	z := m.sizer
	stated, err := demandOf(r, z.host)
	if err != nil {
		return err
	}
	if err := z.begin(ctx); err != nil {
		return err
	}
	z.mu.Lock()
	was, pod, beside, told := z.stated, z.pod, z.beside, z.told
	z.stated, z.pod, z.beside, z.told = stated, r, overhead, true
	z.mu.Unlock()
	if err = m.enlarge(ctx); err != nil {
		z.mu.Lock()
		z.stated, z.pod, z.beside, z.told = was, pod, beside, told
		z.mu.Unlock()
	}
	z.finish()
	m.shrink(ctx)
	return err
}

// shrink takes away what the containers do not need any more, after they have
// their new limits. What cannot be taken is logged, and may come later.
func (m *machine) shrink(ctx context.Context) {
	z := m.sizer
	if err := z.begin(ctx); err != nil {
		return
	}
	defer z.finish()
	want, err := z.want()
	if err == nil {
		err = m.resize(ctx, want)
	}
	if err == nil { // other CPUs of the cgroup undo what its threads were bound to
		err = errors.Join(m.limitHost(ctx, false), m.pin(ctx))
	}
	if err != nil && !m.ending() {
		m.log.Warn("the machine stays larger than its containers need", "error", err)
	}
}

// resize gives the machine a size. Nothing else does so meanwhile.
func (m *machine) resize(ctx context.Context, to size) error {
	z := m.sizer
	from := z.now
	to.memory = max(to.memory, z.base.memory) // what it has had from its start stays
	if z.bounds.fixedMemory {
		to.memory = from.memory
	}
	if z.bounds.fixed || to == from {
		return nil
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, growTimeout)
	defer cancel()
	err := m.resizeCPUs(ctx, to.cpus, to.memory > from.memory)
	if err == nil {
		err = m.resizeMemory(ctx, to.memory)
	}
	if z.now != from {
		m.log.Info("machine resized", "cpus", z.now.cpus, "memory", z.now.memory, "wanted_cpus", to.cpus, "wanted_memory", to.memory, "t_resize", time.Since(begin))
	}
	return err
}

// bringUpCPUs has the guest use all vCPUs that the machine was started with; it began with n.
func (m *machine) bringUpCPUs(ctx context.Context, n int) error {
	all := m.sizer.base.cpus
	if n >= all {
		return nil
	}
	_, err := m.agent.OnlineCPUMem(ctx, &agentpb.OnlineCPUMemRequest{Wait: true, OnlineCpus: uint32(all), NbCpus: uint32(all - n), CpuOnly: true})
	if err = m.agent.Err(err); err != nil {
		return fmt.Errorf("%d vCPUs in the guest: %w", all, err)
	}
	return nil
}

// resizeCPUs changes how many vCPUs the guest uses. The machine may keep one that
// the guest has taken down: it costs nothing. With memory, the guest is told to
// expect some.
func (m *machine) resizeCPUs(ctx context.Context, n int, memory bool) error {
	z := m.sizer
	if n == z.now.cpus && !memory {
		return nil
	}
	online := func() error {
		req := &agentpb.OnlineCPUMemRequest{Wait: true, OnlineCpus: uint32(n), NbCpus: uint32(max(0, n-z.now.cpus)), CpuOnly: !memory}
		_, err := m.agent.OnlineCPUMem(ctx, req)
		return m.agent.Err(err)
	}
	r, ok := m.vm.(hypervisor.CPUResizer)
	if !ok && n != z.now.cpus {
		return fmt.Errorf("%d vCPUs: this machine has %d and takes no others while it runs: %w", n, z.now.cpus, errdefs.ErrFailedPrecondition)
	}
	if n > z.now.cpus {
		if _, err := r.ResizeCPUs(ctx, max(n, z.base.cpus)); err != nil && !errdefs.IsFailedPrecondition(err) {
			return err // one that was not given back before is there already
		}
	}
	if err := online(); err != nil {
		return fmt.Errorf("%d vCPUs in the guest: %w", n, err)
	}
	shrinks := n < z.now.cpus
	z.now.cpus = n
	if shrinks {
		if _, err := r.ResizeCPUs(ctx, max(n, z.base.cpus)); err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return nil
}

func (m *machine) resizeMemory(ctx context.Context, bytes uint64) error {
	z := m.sizer
	if bytes == z.now.memory {
		return nil
	}
	r, ok := m.vm.(hypervisor.MemoryResizer)
	if !ok {
		return fmt.Errorf("%d bytes of memory: this machine has %d and takes no others while it runs: %w", bytes, z.now.memory, errdefs.ErrFailedPrecondition)
	}
	shrinks := bytes < z.now.memory
	if shrinks {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, shrinkTimeout)
		defer cancel()
	}
	have, err := r.ResizeMemory(ctx, bytes)
	if have > 0 {
		z.now.memory = have
	}
	if shrinks && errors.Is(err, context.DeadlineExceeded) {
		m.log.Warn("the guest keeps memory that it was to return", "wanted", bytes, "kept", have-bytes)
		return nil
	}
	return err
}

// merge is limits changed by an update, which names only what it changes.
func merge(was, update *specs.LinuxResources) *specs.LinuxResources {
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}
	for _, r := range []*specs.LinuxResources{was, update} {
		if r == nil {
			continue
		}
		if c := r.CPU; c != nil {
			set(&out.CPU.Quota, c.Quota)
			set(&out.CPU.Period, c.Period)
			if c.Cpus != "" {
				out.CPU.Cpus = c.Cpus
			}
		}
		if r.BlockIO != nil {
			out.BlockIO = r.BlockIO
		}
		if mem := r.Memory; mem != nil {
			set(&out.Memory.Limit, mem.Limit)
			set(&out.Memory.Reservation, mem.Reservation)
			set(&out.Memory.Swap, mem.Swap)
		}
	}
	return out
}

// complete is an update with those of the former limits that the guest needs to
// set its own: a period says nothing without its quota, since both are one file of
// version 2, and memory with swap, which is their sum, nothing without that of memory.
func complete(was, update *specs.LinuxResources) *specs.LinuxResources {
	if update == nil || was == nil {
		return update
	}
	out, all := *update, merge(was, update)
	if c := update.CPU; c != nil && (value(c.Quota) != 0 || value(c.Period) != 0) {
		cpu := *c
		cpu.Quota, cpu.Period = all.CPU.Quota, all.CPU.Period
		out.CPU = &cpu
	}
	if m := update.Memory; m != nil && value(m.Swap) != 0 {
		memory := *m
		memory.Limit = all.Memory.Limit
		out.Memory = &memory
	}
	return &out
}

// set copies a value that is there.
func set[T comparable](to **T, from *T) {
	var zero T
	if from != nil && *from != zero {
		*to = from
	}
}

// shrinkLater gives back what a container needed that is gone, beside what follows.
func (m *machine) shrinkLater() {
	if !m.ending() {
		m.work(func() { m.shrink(m.ctx) })
	}
}
