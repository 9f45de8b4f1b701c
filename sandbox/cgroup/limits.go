// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// period is that of CPU quotas, in microseconds: the kernel's own default.
const period = 100_000

// Limits of a pod's cgroup; zero values set none.
type Limits struct {
	// MemoryBytes is the most memory, in bytes.
	MemoryBytes int64 `json:",omitempty"`
	// CPUQuota is the CPU time in each tenth of a second, in microseconds.
	CPUQuota int64 `json:",omitempty"`
	// CPUs and Mems are lists of CPUs and memory nodes, as in "0-3,7".
	CPUs string `json:",omitempty"`
	Mems string `json:",omitempty"`
}

// limits are those that the shim sets itself. A pod whose overhead nobody stated
// gets none of memory and CPU time: how much its machine needs beside the
// containers is not known then, and those have their limits in the guest. With
// Split only vCPUs are limited, which have no overhead.
func limits(r Request) (l Limits) {
	if r.Resources == nil {
		return l
	}
	if c := r.Resources.CPU; c != nil {
		l.CPUs, l.Mems = c.Cpus, c.Mems
	}
	quota := perPeriod(r.Resources)
	switch {
	case r.Split:
		l.CPUQuota = quota
	case r.Overhead != nil:
		if quota > 0 {
			l.CPUQuota = quota + perPeriod(r.Overhead)
		}
		if pod, own := memory(r.Resources), memory(r.Overhead); pod > 0 && own > 0 {
			l.MemoryBytes = pod + own
		}
	}
	return l
}

func memory(r *specs.LinuxResources) int64 {
	if r.Memory == nil || r.Memory.Limit == nil {
		return 0
	}
	return max(0, *r.Memory.Limit)
}

// perPeriod is the quota for this package's period; 0 for none.
func perPeriod(r *specs.LinuxResources) int64 {
	c := r.CPU
	if c == nil || c.Quota == nil || *c.Quota <= 0 {
		return 0
	}
	if c.Period == nil || *c.Period == 0 {
		return *c.Quota
	}
	return int64(float64(*c.Quota) / float64(*c.Period) * period)
}

// setting is one value for one file of a cgroup.
type setting struct {
	controller, file, value string
	// probe is a file that tells whether such a limit is set, by not being
	// unlimited; empty for what is no limit of this kind.
	probe     string
	unlimited func(string) bool
	// field is what the value comes from, for errors.
	field string
}

// settings are the files of a version that hold the limits.
func (l Limits) settings(v2 bool) (out []setting) {
	add := func(s setting) { out = append(out, s) }
	if l.CPUs != "" {
		add(setting{controller: "cpuset", file: "cpuset.cpus", value: l.CPUs, field: "linux.resources.cpu.cpus"})
	}
	if l.Mems != "" {
		add(setting{controller: "cpuset", file: "cpuset.mems", value: l.Mems, field: "linux.resources.cpu.mems"})
	}
	if l.MemoryBytes > 0 {
		s := setting{controller: "memory", file: "memory.limit_in_bytes", unlimited: isHuge, field: "linux.resources.memory.limit"}
		if v2 {
			s.file, s.unlimited = "memory.max", isMax
		}
		s.probe, s.value = s.file, strconv.FormatInt(l.MemoryBytes, 10)
		add(s)
	}
	const quotaField = "linux.resources.cpu.quota"
	switch quota := strconv.FormatInt(l.CPUQuota, 10); {
	case l.CPUQuota <= 0:
	case v2:
		add(setting{controller: "cpu", file: "cpu.max", value: fmt.Sprintf("%s %d", quota, period), probe: "cpu.max", unlimited: isMax, field: quotaField})
	default:
		add(setting{controller: "cpu", file: "cpu.cfs_period_us", value: strconv.Itoa(period), probe: "cpu.cfs_quota_us", unlimited: isNegative, field: quotaField})
		add(setting{controller: "cpu", file: "cpu.cfs_quota_us", value: quota, probe: "cpu.cfs_quota_us", unlimited: isNegative, field: quotaField})
	}
	return out
}

func isMax(s string) bool      { return strings.HasPrefix(s, "max") }
func isNegative(s string) bool { return strings.HasPrefix(s, "-") }

// isHuge: version 1 shows the greatest multiple of a page that fits into 63 bits for "no limit".
func isHuge(s string) bool {
	n, err := strconv.ParseUint(s, 10, 64)
	return err == nil && n >= 1<<62
}
