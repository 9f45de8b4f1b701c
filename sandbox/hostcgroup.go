// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/sandbox/cgroup"
)

// joinCgroup moves this process into the pod's cgroup on the host before it
// starts any other, so that all of them are born there.
func (s *Sandbox) joinCgroup(ctx context.Context, m *machine, pod PodConfig) error {
	if s.o.Cgroups == nil {
		return nil
	}
	plan, err := s.o.Cgroups.Plan(cgroup.Request{
		Pod: s.o.ID, Path: pod.CgroupsPath, Parent: pod.CgroupParent,
		Resources: pod.Resources, Overhead: pod.Overhead,
		Split: !s.o.Config.Runtime.SandboxCgroupOnly,
	})
	if err != nil {
		return err
	}
	m.cgroup, err = s.o.Cgroups.Open(ctx, plan, cgroup.Options{Ledger: s.o.Ledger, Log: s.o.Log})
	return err
}

// placeCPUs moves the vCPUs' threads into the pod's cgroup when the rest of the
// machine is in another one.
func (m *machine) placeCPUs(ctx context.Context) error {
	if m.cgroup == nil || !m.cgroup.Split() {
		return nil
	}
	vm, ok := m.vm.(hypervisor.CPUThreader)
	if !ok {
		return fmt.Errorf("runtime.sandbox_cgroup_only must be true with this hypervisor, whose vCPUs are not threads of the host: %w", errdefs.ErrInvalidArgument)
	}
	tids, err := vm.CPUThreads(ctx)
	if err != nil {
		return fmt.Errorf("threads of the vCPUs: %w", err)
	}
	return m.cgroup.AddThreads(tids)
}

// outOfMemory puts the host's want of memory, if it has killed any of the pod's
// processes, in front of what followed from it. An orderly end stays one.
func (m *machine) outOfMemory(err error) error {
	if err == nil || m.cgroup == nil {
		return err
	}
	if oom := m.cgroup.OOM(); oom != nil {
		return fmt.Errorf("%w: %w", oom, err)
	}
	return err
}

// limitHost has the pod's cgroup follow the containers' limits, or those of the pod
// where it has any as a whole; with grow only upwards. The turn is the caller's.
func (m *machine) limitHost(ctx context.Context, grow bool) error {
	if m.cgroup == nil {
		return nil
	}
	r, beside := m.sizer.onHost()
	if err := m.cgroup.Update(ctx, r, beside, grow); err != nil {
		return err
	}
	return m.cgroup.SetIO(m.sizer.ioOnHost())
}

// onHost are the limits for the pod's cgroup, and those of the machine beside its
// containers. One container without a limit leaves the pod without it.
func (z *sizer) onHost() (all, beside *specs.LinuxResources) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.pod != nil {
		return z.pod, z.beside
	}
	var quota, memory int64
	var cpus []string
	noQuota, noMemory, noCPUs := false, false, false
	for _, r := range z.limits {
		d, err := demandOf(r, z.host)
		if err != nil { // they were checked before they were noted
			continue
		}
		if d.milliCPUs > 0 {
			quota += *r.CPU.Quota * defaultPeriod / int64(cmp.Or(value(r.CPU.Period), defaultPeriod))
		}
		memory += int64(d.memory)
		noQuota, noMemory, noCPUs = noQuota || d.milliCPUs == 0, noMemory || d.memory == 0, noCPUs || len(d.cpus) == 0
		if len(d.cpus) > 0 {
			cpus = append(cpus, r.CPU.Cpus)
		}
	}
	all = &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}
	if !noQuota {
		all.CPU.Quota = &quota
	}
	if !noMemory {
		all.Memory.Limit = &memory
	}
	if !noCPUs {
		slices.Sort(cpus) // so that the same ones are no change
		all.CPU.Cpus = strings.Join(slices.Compact(cpus), ",")
	}
	return all, z.beside
}

// Resize gives the pod as a whole other limits, and other ones for what its machine
// may use beside the containers (the CRI's UpdatePodSandboxResources); nil for none.
// From then on the machine is as large as these say, also when the sum of the
// containers' is less.
func (s *Sandbox) Resize(ctx context.Context, r, overhead *specs.LinuxResources) error {
	m, err := s.running()
	if err != nil {
		return err
	}
	if r, err = plainLimits(r); err != nil {
		return err
	}
	return m.restate(ctx, r, overhead)
}
