// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"math"
	"testing"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox"
)

// counters are what a guest may answer, every part present.
func counters() *sandbox.Stats {
	io := []*agentpb.BlkioStatsEntry{{Major: 254, Minor: 1, Op: "Read", Value: 10}, {Major: 254, Minor: 1, Op: "Write", Value: 20}, {Major: 254, Op: "Write", Value: 5}}
	return &sandbox.Stats{
		CgroupStats: &agentpb.CgroupStats{
			CpuStats: &agentpb.CpuStats{
				CpuUsage:       &agentpb.CpuUsage{TotalUsage: 3_000_000, UsageInUsermode: 2_000_000, UsageInKernelmode: 1_000_000},
				ThrottlingData: &agentpb.ThrottlingData{Periods: 4, ThrottledPeriods: 2, ThrottledTime: 5000},
			},
			MemoryStats: &agentpb.MemoryStats{
				Usage:     &agentpb.MemoryData{Usage: 100, Limit: 200, MaxUsage: 150, Failcnt: 3},
				SwapUsage: &agentpb.MemoryData{Usage: 7, Limit: 8},
				Events:    map[string]uint64{"low": 1, "high": 2, "max": 3, "oom": 4, "oom_kill": 5},
				Stats:     map[string]uint64{"anon": 11, "file": 12, "inactive_file": 13, "pgfault": 14},
			},
			PidsStats:    &agentpb.PidsStats{Current: 6, Limit: 9},
			BlkioStats:   &agentpb.BlkioStats{IoServiceBytesRecursive: io, IoServicedRecursive: io[:1]},
			HugetlbStats: map[string]*agentpb.HugetlbStats{"2MB": {Usage: 1, MaxUsage: 2, Failcnt: 3, Limit: 4}, "1GB": {}},
			Pressure: map[string]*agentpb.Pressure{"memory": {
				Some: &agentpb.PressureLine{Avg10: 1, Avg60: 2, Avg300: 3, Total: 4}, Full: &agentpb.PressureLine{Total: 5},
			}},
		},
		NetworkStats: []*agentpb.NetworkStats{{Name: "eth0", RxBytes: 21, TxPackets: 22}},
	}
}

func TestMetricsOfCgroupV2(t *testing.T) {
	want := &v2.Metrics{
		CPU: &v2.CPUStat{UsageUsec: 3000, UserUsec: 2000, SystemUsec: 1000, NrPeriods: 4, NrThrottled: 2, ThrottledUsec: 5},
		Memory: &v2.MemoryStat{Usage: 100, UsageLimit: 200, MaxUsage: 150, SwapUsage: 7, SwapLimit: 8, Anon: 11, File: 12, InactiveFile: 13, Pgfault: 14,
			PSI: &v2.PSIStats{Some: &v2.PSIData{Avg10: 1, Avg60: 2, Avg300: 3, Total: 4}, Full: &v2.PSIData{Total: 5}}},
		MemoryEvents: &v2.MemoryEvents{Low: 1, High: 2, Max: 3, Oom: 4, OomKill: 5},
		Pids:         &v2.PidsStat{Current: 6, Limit: 9},
		Hugetlb:      []*v2.HugeTlbStat{{Pagesize: "1GB", Max: math.MaxUint64}, {Pagesize: "2MB", Current: 1, Max: 4, Failcnt: 3}},
		Io:           &v2.IOStat{Usage: []*v2.IOEntry{{Major: 254, Minor: 0, Wbytes: 5}, {Major: 254, Minor: 1, Rbytes: 10, Wbytes: 20, Rios: 10}}},
		Network:      []*v2.NetworkStat{{Name: "eth0", RxBytes: 21, TxPackets: 22}},
	}
	if got := metrics(counters()); !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestMetricsOfCgroupV1(t *testing.T) {
	got := metricsV1(counters())
	if u := got.CPU.Usage; u.Total != 3_000_000 || u.User != 2_000_000 || u.Kernel != 1_000_000 || got.CPU.Throttling.ThrottledTime != 5000 {
		t.Errorf("cpu %v", got.CPU)
	}
	m := got.Memory
	if m.RSS != 11 || m.TotalRSS != 11 || m.Cache != 12 || m.TotalInactiveFile != 13 || m.PgFault != 14 ||
		m.Usage.Usage != 100 || m.Usage.Limit != 200 || m.Usage.Max != 150 || m.Usage.Failcnt != 3 || m.Swap.Usage != 7 {
		t.Errorf("memory %v", m)
	}
	if b := got.Blkio.IoServiceBytesRecursive; len(b) != 3 || b[1].Op != "Write" || b[1].Value != 20 || b[1].Minor != 1 {
		t.Errorf("blkio %v", got.Blkio)
	}
	if got.Pids.Current != 6 || len(got.Hugetlb) != 2 || got.MemoryOomControl.OomKill != 5 || len(got.Network) != 1 || got.Network[0].RxBytes != 21 {
		t.Errorf("%v", got)
	}
}

// Readers take what is left below a limit from the number that they are given
// (containerd internal/cri/server, getAvailableBytes): one that is none must be huge.
func TestNoLimit(t *testing.T) {
	free := &sandbox.Stats{CgroupStats: &agentpb.CgroupStats{MemoryStats: &agentpb.MemoryStats{Usage: &agentpb.MemoryData{Usage: 100}}}}
	if m := metrics(free); m.Memory.UsageLimit != math.MaxUint64 || m.Memory.SwapLimit != math.MaxUint64 || m.Pids.Limit != math.MaxUint64 {
		t.Errorf("version 2: %v", m)
	}
	if m := metricsV1(free).Memory; m.Usage.Limit <= 1<<62 || m.Usage.Limit > math.MaxInt64 || m.HierarchicalMemoryLimit != m.Usage.Limit {
		t.Errorf("version 1: %v", m)
	}
	if m := sumMetrics([]*sandbox.Stats{counters(), free}); m.Memory.UsageLimit != math.MaxUint64 || m.Memory.Usage != 200 {
		t.Errorf("a pod with a container without limits: %v", m.Memory)
	}
	m := sumMetrics([]*sandbox.Stats{counters(), counters()})
	if m.Memory.UsageLimit != 400 || m.Pids.Limit != 18 || m.MemoryEvents.OomKill != 10 || len(m.Io.Usage) != 2 || m.Io.Usage[1].Wbytes != 40 {
		t.Errorf("a pod of two: %v", m)
	}
	if m := sumMetrics(nil); m.Memory.UsageLimit != math.MaxUint64 {
		t.Errorf("a pod without containers: %v", m.Memory)
	}
}

// A guest without a controller answers nothing of it.
func TestMetricsOfNothing(t *testing.T) {
	if got := metrics(&sandbox.Stats{}); got.CPU == nil || got.Memory == nil || got.Pids == nil || got.Io == nil {
		t.Errorf("%v: readers take the parts for granted", got)
	}
	if got := metricsV1(&sandbox.Stats{}); got.CPU.Usage == nil || got.Memory.Usage == nil || got.Pids == nil || got.Blkio == nil {
		t.Errorf("%v: readers take the parts for granted", got)
	}
}

// Stats answers the form of v1 to a containerd of 1.6, and else that of v2.
func TestFormOfStats(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	for _, old := range []bool{false, true} {
		p.svc.oldStats = old
		r, err := p.tasks().Stats(bounded(t), &task.StatsRequest{ID: "c1"})
		must(t, err)
		v, err := typeurl.UnmarshalAny(r.Stats)
		must(t, err)
		switch v := v.(type) {
		case *v1.Metrics:
			if !old || v.Pids.Current != 3 {
				t.Errorf("old %t: %v", old, v)
			}
		case *v2.Metrics:
			if old || v.Pids.Current != 3 {
				t.Errorf("old %t: %v", old, v)
			}
		default:
			t.Errorf("%T", v)
		}
	}
}
