// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

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
