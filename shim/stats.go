// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"cmp"
	"maps"
	"math"
	"slices"

	"github.com/containerd/cgroups/v3/cgroup2/stats"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox"
)

// metrics puts a container's counters, which the guest keeps in cgroup v2, into
// containerd's message for it. The protocol's message has the fields of v1; the
// guest's agent puts memory.stat, under the kernel's names, into Stats.
func metrics(s *sandbox.Stats) *stats.Metrics {
	m := &stats.Metrics{CPU: &stats.CPUStat{}, Memory: &stats.MemoryStat{}, Pids: &stats.PidsStat{}}
	cg := s.GetCgroupStats()
	u, t := cg.GetCpuStats().GetCpuUsage(), cg.GetCpuStats().GetThrottlingData()
	m.CPU.UsageUsec = u.GetTotalUsage() / 1000
	m.CPU.UserUsec = u.GetUsageInUsermode() / 1000
	m.CPU.SystemUsec = u.GetUsageInKernelmode() / 1000
	m.CPU.NrPeriods, m.CPU.NrThrottled, m.CPU.ThrottledUsec = t.GetPeriods(), t.GetThrottledPeriods(), t.GetThrottledTime()/1000
	memory(m.Memory, cg.GetMemoryStats().GetStats())
	mem, swap := cg.GetMemoryStats().GetUsage(), cg.GetMemoryStats().GetSwapUsage()
	m.Memory.Usage, m.Memory.UsageLimit, m.Memory.MaxUsage = mem.GetUsage(), limitOr(mem.GetLimit(), math.MaxUint64), mem.GetMaxUsage()
	m.Memory.SwapUsage, m.Memory.SwapLimit = swap.GetUsage(), limitOr(swap.GetLimit(), math.MaxUint64)
	if e := cg.GetMemoryStats().GetEvents(); e != nil {
		m.MemoryEvents = &stats.MemoryEvents{Low: e["low"], High: e["high"], Max: e["max"], Oom: e["oom"], OomKill: e["oom_kill"]}
	}
	m.Pids.Current, m.Pids.Limit = cg.GetPidsStats().GetCurrent(), limitOr(cg.GetPidsStats().GetLimit(), math.MaxUint64)
	for _, size := range slices.Sorted(maps.Keys(cg.GetHugetlbStats())) {
		h := cg.GetHugetlbStats()[size]
		m.Hugetlb = append(m.Hugetlb, &stats.HugeTlbStat{Pagesize: size, Current: h.GetUsage(), Max: limitOr(h.GetLimit(), math.MaxUint64), Failcnt: h.GetFailcnt()})
	}
	m.Io = &stats.IOStat{Usage: ioEntries(cg.GetBlkioStats())}
	waits := cg.GetPressure()
	m.CPU.PSI, m.Memory.PSI, m.Io.PSI = pressure(waits["cpu"]), pressure(waits["memory"]), pressure(waits["io"])
	for _, n := range s.GetNetworkStats() {
		m.Network = append(m.Network, &stats.NetworkStat{
			Name: n.Name, RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		})
	}
	return m
}

// limitOr is a limit as its readers know it, who take what is left below it from the
// number: the protocol's 0 is none, whose word in the version is given.
func limitOr(n, none uint64) uint64 {
	if n == 0 {
		return none
	}
	return n
}

func pressure(p *agentpb.Pressure) *stats.PSIStats {
	if p == nil {
		return nil
	}
	line := func(l *agentpb.PressureLine) *stats.PSIData {
		if l == nil {
			return nil
		}
		return &stats.PSIData{Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300, Total: l.Total}
	}
	return &stats.PSIStats{Some: line(p.Some), Full: line(p.Full)}
}

// ioEntries joins what the protocol has one by one, in the order of the devices' numbers.
func ioEntries(b *agentpb.BlkioStats) []*stats.IOEntry {
	type device struct{ major, minor uint64 }
	of := map[device]*stats.IOEntry{}
	add := func(from []*agentpb.BlkioStatsEntry, read, write func(*stats.IOEntry) *uint64) {
		for _, e := range from {
			d := device{e.Major, e.Minor}
			if of[d] == nil {
				of[d] = &stats.IOEntry{Major: e.Major, Minor: e.Minor}
			}
			switch e.Op {
			case "Read":
				*read(of[d]) += e.Value
			case "Write":
				*write(of[d]) += e.Value
			}
		}
	}
	add(b.GetIoServiceBytesRecursive(), func(e *stats.IOEntry) *uint64 { return &e.Rbytes }, func(e *stats.IOEntry) *uint64 { return &e.Wbytes })
	add(b.GetIoServicedRecursive(), func(e *stats.IOEntry) *uint64 { return &e.Rios }, func(e *stats.IOEntry) *uint64 { return &e.Wios })
	return slices.SortedFunc(maps.Values(of), func(a, b *stats.IOEntry) int {
		return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor))
	})
}

// memory copies the keys of memory.stat (kernel Documentation/admin-guide/cgroup-v2.rst).
func memory(m *stats.MemoryStat, from map[string]uint64) {
	for key, to := range map[string]*uint64{
		"anon": &m.Anon, "file": &m.File, "kernel_stack": &m.KernelStack, "slab": &m.Slab, "sock": &m.Sock,
		"shmem": &m.Shmem, "file_mapped": &m.FileMapped, "file_dirty": &m.FileDirty, "file_writeback": &m.FileWriteback,
		"anon_thp": &m.AnonThp, "inactive_anon": &m.InactiveAnon, "active_anon": &m.ActiveAnon,
		"inactive_file": &m.InactiveFile, "active_file": &m.ActiveFile, "unevictable": &m.Unevictable,
		"slab_reclaimable": &m.SlabReclaimable, "slab_unreclaimable": &m.SlabUnreclaimable, "pgfault": &m.Pgfault,
		"pgmajfault": &m.Pgmajfault, "workingset_refault": &m.WorkingsetRefault,
		"workingset_activate": &m.WorkingsetActivate, "workingset_nodereclaim": &m.WorkingsetNodereclaim,
		"pgrefill": &m.Pgrefill, "pgscan": &m.Pgscan, "pgsteal": &m.Pgsteal, "pgactivate": &m.Pgactivate,
		"pgdeactivate": &m.Pgdeactivate, "pglazyfree": &m.Pglazyfree, "pglazyfreed": &m.Pglazyfreed,
		"thp_fault_alloc": &m.ThpFaultAlloc, "thp_collapse_alloc": &m.ThpCollapseAlloc,
	} {
		*to = from[key]
	}
}
