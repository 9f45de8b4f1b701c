// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"math"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox"
)

// metricsV1 puts a container's counters into the message of cgroup v1, the only
// one that the metrics of containerd 1.6 on a v1 host take (containerd
// metrics/cgroups/v1). A guest's group has no other level below it that is
// counted apart, so a total equals its part.
func metricsV1(s *sandbox.Stats) *v1.Metrics {
	cg := s.GetCgroupStats()
	u, t := cg.GetCpuStats().GetCpuUsage(), cg.GetCpuStats().GetThrottlingData()
	m := &v1.Metrics{
		CPU: &v1.CPUStat{
			Usage:      &v1.CPUUsage{Total: u.GetTotalUsage(), Kernel: u.GetUsageInKernelmode(), User: u.GetUsageInUsermode(), PerCPU: u.GetPercpuUsage()},
			Throttling: &v1.Throttle{Periods: t.GetPeriods(), ThrottledPeriods: t.GetThrottledPeriods(), ThrottledTime: t.GetThrottledTime()},
		},
		Memory: memoryV1(cg.GetMemoryStats()),
		Pids:   &v1.PidsStat{Current: cg.GetPidsStats().GetCurrent(), Limit: cg.GetPidsStats().GetLimit()},
		Blkio: &v1.BlkIOStat{
			IoServiceBytesRecursive: blkioV1(cg.GetBlkioStats().GetIoServiceBytesRecursive()),
			IoServicedRecursive:     blkioV1(cg.GetBlkioStats().GetIoServicedRecursive()),
		},
	}
	if e := cg.GetMemoryStats().GetEvents(); e != nil {
		m.MemoryOomControl = &v1.MemoryOomControl{OomKill: e["oom_kill"]}
	}
	for size, h := range cg.GetHugetlbStats() {
		m.Hugetlb = append(m.Hugetlb, &v1.HugetlbStat{Pagesize: size, Usage: h.GetUsage(), Max: h.GetMaxUsage(), Failcnt: h.GetFailcnt()})
	}
	for _, n := range s.GetNetworkStats() {
		m.Network = append(m.Network, &v1.NetworkStat{
			Name: n.Name, RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		})
	}
	return m
}

// memoryV1 reads memory.stat of v2 under the names of v1 (kernel
// Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst).
func memoryV1(s *agentpb.MemoryStats) *v1.MemoryStat {
	of := s.GetStats()
	m := &v1.MemoryStat{
		Cache: of["file"], RSS: of["anon"], RSSHuge: of["anon_thp"], MappedFile: of["file_mapped"],
		Dirty: of["file_dirty"], Writeback: of["file_writeback"], PgFault: of["pgfault"], PgMajFault: of["pgmajfault"],
		InactiveAnon: of["inactive_anon"], ActiveAnon: of["active_anon"],
		InactiveFile: of["inactive_file"], ActiveFile: of["active_file"], Unevictable: of["unevictable"],
		HierarchicalMemoryLimit: limitOr(s.GetUsage().GetLimit(), noLimitV1), HierarchicalSwapLimit: limitOr(s.GetSwapUsage().GetLimit(), noLimitV1),
		Usage: entryV1(s.GetUsage()), Swap: entryV1(s.GetSwapUsage()), Kernel: entryV1(s.GetKernelUsage()),
	}
	m.TotalCache, m.TotalRSS, m.TotalRSSHuge, m.TotalMappedFile = m.Cache, m.RSS, m.RSSHuge, m.MappedFile
	m.TotalDirty, m.TotalWriteback, m.TotalPgFault, m.TotalPgMajFault = m.Dirty, m.Writeback, m.PgFault, m.PgMajFault
	m.TotalInactiveAnon, m.TotalActiveAnon = m.InactiveAnon, m.ActiveAnon
	m.TotalInactiveFile, m.TotalActiveFile, m.TotalUnevictable = m.InactiveFile, m.ActiveFile, m.Unevictable
	return m
}

// noLimitV1 is what version 1 shows where there is no limit of memory: the most
// pages of 4 KiB that fit into 63 bits of bytes (kernel mm/page_counter.c).
const noLimitV1 = math.MaxInt64 &^ 4095

func entryV1(d *agentpb.MemoryData) *v1.MemoryEntry {
	return &v1.MemoryEntry{Limit: limitOr(d.GetLimit(), noLimitV1), Usage: d.GetUsage(), Max: d.GetMaxUsage(), Failcnt: d.GetFailcnt()}
}

func blkioV1(from []*agentpb.BlkioStatsEntry) []*v1.BlkIOEntry {
	var out []*v1.BlkIOEntry
	for _, e := range from {
		out = append(out, &v1.BlkIOEntry{Op: e.Op, Major: e.Major, Minor: e.Minor, Value: e.Value})
	}
	return out
}
