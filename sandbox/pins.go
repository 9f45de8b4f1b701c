// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// pins is how CPUs of the host that containers are bound to become the guest's.
type pins struct {
	// vcpus are the host's CPUs that each vCPU runs on; nil for any.
	vcpus [][]int
	// guest are the guest's CPUs of each container that is bound.
	guest map[string]string
}

// planPins binds the first vCPUs to the CPUs that containers name, one to one as
// far as there are vCPUs, and gives each container those that are bound to its
// own. vCPUs beyond serve the machine itself and containers that are not bound:
// they run anywhere, or if there is no such container where the others do.
func planPins(sets map[string][]int, vcpus int) pins {
	p := pins{vcpus: make([][]int, vcpus), guest: map[string]string{}}
	var union []int
	free := false
	for _, set := range sets {
		union = append(union, set...)
		free = free || len(set) == 0
	}
	slices.Sort(union)
	union = slices.Compact(union)
	if len(union) == 0 {
		return p
	}
	for i := range p.vcpus {
		if i >= len(union) && !free {
			p.vcpus[i] = union
		}
	}
	for i, cpu := range union {
		v := i % vcpus
		p.vcpus[v] = append(p.vcpus[v], cpu)
	}
	for id, set := range sets {
		if len(set) == 0 {
			continue
		}
		var own []string
		for v := range min(vcpus, len(union)) {
			if slices.ContainsFunc(p.vcpus[v], func(cpu int) bool { return slices.Contains(set, cpu) }) {
				own = append(own, strconv.Itoa(v))
			}
		}
		p.guest[id] = strings.Join(own, ",")
	}
	return p
}

// sets are the CPUs that each container names. The pause container, which has no
// limits, is not in them.
func (z *sizer) sets() (map[string][]int, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	out := map[string][]int{}
	for id, r := range z.limits {
		d, err := demandOf(r, z.host)
		if err != nil {
			return nil, err
		}
		out[id] = d.cpus
	}
	return out, nil
}

// pin binds the vCPUs' threads as the containers' CPUs ask, and moves containers
// whose CPUs have other numbers in the guest now. The turn is the caller's.
func (m *machine) pin(ctx context.Context) error {
	z := m.sizer
	sets, err := z.sets()
	if err != nil {
		return err
	}
	p := planPins(sets, z.now.cpus)
	if len(p.guest) == 0 && !z.pinned {
		return nil
	}
	t, ok := m.vm.(hypervisor.CPUThreader)
	if !ok {
		return fmt.Errorf("linux.resources.cpu.cpus: this hypervisor's vCPUs are not threads of the host and cannot be bound to its CPUs: %w", errdefs.ErrFailedPrecondition)
	}
	tids, err := t.CPUThreads(ctx)
	if err != nil {
		return fmt.Errorf("linux.resources.cpu.cpus: threads of the vCPUs: %w", err)
	}
	z.pinned = true
	for i, tid := range tids {
		var on []int
		if i < len(p.vcpus) {
			on = p.vcpus[i]
		}
		if err := bind(tid, on); err != nil {
			return fmt.Errorf("linux.resources.cpu.cpus: bind vCPU %d to CPUs %v: %w", i, on, err)
		}
	}
	return m.moveContainers(ctx, p.guest)
}

// bind lets a thread run on some CPUs, or with none named wherever this process may.
func bind(tid int, cpus []int) error {
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	if len(cpus) == 0 {
		if err := unix.SchedGetaffinity(0, &set); err != nil {
			return err
		}
	}
	err := unix.SchedSetaffinity(tid, &set)
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: the pod's cgroup does not have them: %w", errdefs.ErrInvalidArgument, err)
	}
	return err
}

// moveContainers tells the guest where containers belong that it has already.
func (m *machine) moveContainers(ctx context.Context, guest map[string]string) error {
	z := m.sizer
	for _, id := range slices.Sorted(maps.Keys(guest)) {
		z.mu.Lock()
		was, known := z.cpusets[id]
		z.cpusets[id] = guest[id]
		z.mu.Unlock()
		if !known || was == guest[id] {
			continue // it gets them with its own request
		}
		req := &agentpb.UpdateContainerRequest{ContainerId: id, Resources: &agentpb.LinuxResources{CPU: &agentpb.LinuxCPU{Cpus: guest[id]}}}
		if _, err := m.agent.UpdateContainer(ctx, req); err != nil && !errdefs.IsNotFound(m.agent.Err(err)) {
			return fmt.Errorf("container %s on CPUs %s of the guest: %w", id, guest[id], m.agent.Err(err))
		}
	}
	return nil
}

// guestCPUs are a container's CPUs in the guest, empty for all.
func (z *sizer) guestCPUs(id string) string {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.cpusets[id]
}

// setCPUs puts a container's CPUs in the guest into its limits.
func setCPUs(r *specs.LinuxResources, cpus string) {
	if r != nil && r.CPU != nil {
		r.CPU.Cpus = cpus
	}
}
