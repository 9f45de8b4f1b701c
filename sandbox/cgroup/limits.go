// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"path/filepath"
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

// setting is one value for one file of a cgroup; field is what it comes from, for errors.
type setting struct{ controller, file, value, field string }

// settings are the files of a version that hold the limits.
func (l Limits) settings(v2 bool) (out []setting) {
	add := func(controller, file, value, field string) {
		if value != "" {
			out = append(out, setting{controller, file, value, "linux.resources." + field})
		}
	}
	add("cpuset", "cpuset.cpus", l.CPUs, "cpu.cpus")
	add("cpuset", "cpuset.mems", l.Mems, "cpu.mems")
	memory, quota := positive(l.MemoryBytes), positive(l.CPUQuota)
	if !v2 { // where the period of a new group is this package's
		add("memory", "memory.limit_in_bytes", memory, "memory.limit")
		add("cpu", "cpu.cfs_quota_us", quota, "cpu.quota")
		return out
	}
	add("memory", "memory.max", memory, "memory.limit")
	if quota != "" {
		add("cpu", "cpu.max", fmt.Sprintf("%s %d", quota, period), "cpu.quota")
	}
	return out
}

// notAbove takes out the limits that the directory above d sets already: whoever
// made that one, as kubelet does, changes its limits while the pod runs. Below a
// pod's directory of kubelet's none of memory and CPU time are set at all: it has
// those that the pod has. One without limits is meant so, for a container without
// any is in the pod, and the pod's stated resources are the sum of the others'.
func (l Limits) notAbove(d Dir) Limits {
	if ofKubelet(filepath.Dir(d.Path)) {
		l.MemoryBytes, l.CPUQuota = 0, 0
		return l
	}
	memory, quota, unlimited, endless := "memory.limit_in_bytes", "cpu.cfs_quota_us", isHuge, isNegative
	if d.V2 {
		memory, quota, unlimited, endless = "memory.max", "cpu.max", isMax, isMax
	}
	if s, err := readFile(filepath.Dir(d.Path), memory); err == nil && !unlimited(s) {
		l.MemoryBytes = 0
	}
	if s, err := readFile(filepath.Dir(d.Path), quota); err == nil && !endless(s) {
		l.CPUQuota = 0
	}
	return l
}

// ofKubelet tells whether kubelet made a directory for a pod: kubepods[/<class>]/pod<uid>
// with its cgroupfs driver, kubepods[-<class>]-pod<uid>.slice with systemd's.
func ofKubelet(dir string) bool {
	name := filepath.Base(dir)
	if strings.HasPrefix(name, "kubepods-") {
		return strings.Contains(name, "-pod") && strings.HasSuffix(name, ".slice")
	}
	return strings.HasPrefix(name, "pod") && strings.Contains(dir, "/kubepods/")
}

// positive writes a number, and nothing for none.
func positive(n int64) string {
	if n <= 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func isMax(s string) bool      { return strings.HasPrefix(s, "max") }
func isNegative(s string) bool { return strings.HasPrefix(s, "-") }

// isHuge: version 1 shows the greatest multiple of a page that fits into 63 bits for "no limit".
func isHuge(s string) bool {
	n, err := strconv.ParseUint(s, 10, 64)
	return err == nil && n >= 1<<62
}
