// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-v2/kata/protocols/sandboxpb"
	"github.com/kata-v2/kata/sandbox"
)

// SandboxMetrics is the sum of what the pod's containers use. What the machine
// itself takes on the host is the pod's overhead and not in it.
func (s *sandboxService) SandboxMetrics(ctx context.Context, r *sandboxpb.SandboxMetricsRequest) (*sandboxpb.SandboxMetricsResponse, error) {
	if err := s.known(r.SandboxId); err != nil {
		return nil, err
	}
	all, err := s.svc.allStats(ctx)
	if err != nil {
		return nil, err
	}
	a, err := typeurl.MarshalAnyToProto(sumMetrics(all))
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return &sandboxpb.SandboxMetricsResponse{Metrics: &sandboxpb.Metric{
		Id: r.SandboxId, Timestamp: timestamppb.Now(), Data: &anypb.Any{TypeUrl: a.TypeUrl, Value: a.Value},
	}}, nil
}

// allStats asks the guest for the counters of all running containers at once.
// One that ends meanwhile is left out.
func (s *service) allStats(ctx context.Context) ([]*sandbox.Stats, error) {
	s.mu.Lock()
	tasks := slices.Collect(maps.Values(s.tasks))
	s.mu.Unlock()
	out, errs := make([]*sandbox.Stats, len(tasks)), make([]error, len(tasks))
	var wg sync.WaitGroup
	for i, t := range tasks {
		if t.c.Init().State() == sandbox.Stopped {
			continue
		}
		wg.Go(func() { out[i], errs[i] = t.c.Stats(ctx) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("metrics of container %s: %w", tasks[i].c.ID(), err)
		}
	}
	return slices.DeleteFunc(out, func(st *sandbox.Stats) bool { return st == nil }), nil
}

// sumMetrics adds up what containerd and the kubelet read of a pod: CPU time,
// memory, processes. The network is one for all containers, so any container's
// counters are the pod's.
func sumMetrics(all []*sandbox.Stats) *stats.Metrics {
	sum := metrics(nil)
	if len(all) > 0 {
		sum.Memory.UsageLimit, sum.Memory.SwapLimit, sum.Pids.Limit = 0, 0, 0
		sum.MemoryEvents = &stats.MemoryEvents{}
	}
	for _, st := range all {
		m := metrics(st)
		sum.CPU.UsageUsec += m.CPU.UsageUsec
		sum.CPU.UserUsec += m.CPU.UserUsec
		sum.CPU.SystemUsec += m.CPU.SystemUsec
		sum.CPU.NrPeriods += m.CPU.NrPeriods
		sum.CPU.NrThrottled += m.CPU.NrThrottled
		sum.CPU.ThrottledUsec += m.CPU.ThrottledUsec
		sum.Memory.Usage += m.Memory.Usage
		sum.Memory.Anon += m.Memory.Anon
		sum.Memory.File += m.Memory.File
		sum.Memory.InactiveFile += m.Memory.InactiveFile
		sum.Memory.ActiveFile += m.Memory.ActiveFile
		sum.Memory.Pgfault += m.Memory.Pgfault
		sum.Memory.Pgmajfault += m.Memory.Pgmajfault
		sum.Memory.SwapUsage += m.Memory.SwapUsage
		sum.Memory.KernelStack += m.Memory.KernelStack
		sum.Memory.FileMapped += m.Memory.FileMapped
		sum.Memory.Shmem += m.Memory.Shmem
		sum.Memory.Slab += m.Memory.Slab
		sum.Memory.UsageLimit = addLimits(sum.Memory.UsageLimit, m.Memory.UsageLimit)
		sum.Memory.SwapLimit = addLimits(sum.Memory.SwapLimit, m.Memory.SwapLimit)
		sum.MemoryEvents.Max += m.GetMemoryEvents().GetMax()
		sum.MemoryEvents.Oom += m.GetMemoryEvents().GetOom()
		sum.MemoryEvents.OomKill += m.GetMemoryEvents().GetOomKill()
		sum.Pids.Current += m.Pids.Current
		sum.Pids.Limit = addLimits(sum.Pids.Limit, m.Pids.Limit)
		sum.Io.Usage = addIO(sum.Io.Usage, m.Io.Usage)
		sum.Network = m.Network
	}
	return sum
}

// addLimits is the limit of two together: none if one of them has none.
func addLimits(a, b uint64) uint64 {
	if a == math.MaxUint64 || b == math.MaxUint64 {
		return math.MaxUint64
	}
	return a + b
}

// addIO adds counters of devices to those of the same ones.
func addIO(sum, more []*stats.IOEntry) []*stats.IOEntry {
	for _, m := range more {
		i := slices.IndexFunc(sum, func(e *stats.IOEntry) bool { return e.Major == m.Major && e.Minor == m.Minor })
		if i < 0 {
			sum = append(sum, &stats.IOEntry{Major: m.Major, Minor: m.Minor})
			i = len(sum) - 1
		}
		e := sum[i]
		e.Rbytes, e.Wbytes, e.Rios, e.Wios = e.Rbytes+m.Rbytes, e.Wbytes+m.Wbytes, e.Rios+m.Rios, e.Wios+m.Wios
	}
	return sum
}
