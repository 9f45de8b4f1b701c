// SPDX-License-Identifier: Apache-2.0

package shim

import (
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
				Stats:     map[string]uint64{"anon": 11, "file": 12, "inactive_file": 13, "pgfault": 14},
			},
			PidsStats:    &agentpb.PidsStats{Current: 6, Limit: 9},
			BlkioStats:   &agentpb.BlkioStats{IoServiceBytesRecursive: io, IoServicedRecursive: io[:1]},
			HugetlbStats: map[string]*agentpb.HugetlbStats{"2MB": {Usage: 1, MaxUsage: 2, Failcnt: 3}},
		},
		NetworkStats: []*agentpb.NetworkStats{{Name: "eth0", RxBytes: 21, TxPackets: 22}},
	}
}

func TestMetricsOfCgroupV2(t *testing.T) {
	want := &v2.Metrics{
		CPU:     &v2.CPUStat{UsageUsec: 3000, UserUsec: 2000, SystemUsec: 1000, NrPeriods: 4, NrThrottled: 2, ThrottledUsec: 5},
		Memory:  &v2.MemoryStat{Usage: 100, UsageLimit: 200, MaxUsage: 150, SwapUsage: 7, SwapLimit: 8, Anon: 11, File: 12, InactiveFile: 13, Pgfault: 14},
		Pids:    &v2.PidsStat{Current: 6, Limit: 9},
		Hugetlb: []*v2.HugeTlbStat{{Pagesize: "2MB", Current: 1, Max: 2, Failcnt: 3}},
		Io:      &v2.IOStat{Usage: []*v2.IOEntry{{Major: 254, Minor: 0, Wbytes: 5}, {Major: 254, Minor: 1, Rbytes: 10, Wbytes: 20, Rios: 10}}},
		Network: []*v2.NetworkStat{{Name: "eth0", RxBytes: 21, TxPackets: 22}},
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
	if got.Pids.Current != 6 || len(got.Hugetlb) != 1 || got.Hugetlb[0].Pagesize != "2MB" || len(got.Network) != 1 || got.Network[0].RxBytes != 21 {
		t.Errorf("%v", got)
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
