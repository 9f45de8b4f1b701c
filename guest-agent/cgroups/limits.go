// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// Setting is one value of one file of a group.
type Setting struct {
	File, Value string
	// Optional: a kernel without the file means the limit holds anyway or is only a hint.
	Optional bool
}

// Plan translates OCI resources, which speak cgroup v1, into the files of cgroup
// v2. It only computes. Device rules are not files; see Group.SetDevices.
func Plan(r *specs.LinuxResources) ([]Setting, error) {
	if r == nil {
		return nil, nil
	}
	var out []Setting
	add := func(file, val string) { out = append(out, Setting{File: file, Value: val}) }
	hint := func(file, val string) { out = append(out, Setting{File: file, Value: val, Optional: true}) }
	if _, ok := r.Unified[burst]; ok {
		add(burst, "0")
	}
	if c := r.CPU; c != nil {
		planCPU(c, add)
	}
	if m := r.Memory; m != nil {
		if err := planMemory(m, add, hint); err != nil {
			return nil, err
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		add("pids.max", limitText(*p.Limit))
	}
	if b := r.BlockIO; b != nil {
		planIO(b, add, hint)
	}
	for _, h := range r.HugepageLimits {
		planHuge(h, &out)
	}
	if err := planUnified(r.Unified, add); err != nil {
		return nil, err
	}
	return out, nil
}

// planHuge limits what is used and, where the kernel can, what is reserved: a
// program is then refused the mapping, rather than killed at its first use of a
// page. A limit of 0 holds by itself for pages of a size that the kernel does not
// have; engines set one for each size of theirs.
func planHuge(h specs.LinuxHugepageLimit, out *[]Setting) {
	val := strconv.FormatUint(h.Limit, 10)
	*out = append(*out,
		Setting{File: "hugetlb." + h.Pagesize + ".max", Value: val, Optional: h.Limit == 0},
		Setting{File: "hugetlb." + h.Pagesize + ".rsvd.max", Value: val, Optional: true})
}

// burst may be at most the quota (kernel Documentation/scheduler/sched-bwc.rst),
// so it is taken away before that is set.
const burst = "cpu.max.burst"

// planUnified sets files of version 2 as they are named, after all others.
func planUnified(files map[string]string, add func(file, val string)) error {
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if strings.ContainsRune(file, '/') || !strings.ContainsRune(file, '.') || strings.HasPrefix(file, "cgroup.") {
			return fault.New(fault.InvalidArgument, "unified limit %q: must be a file of a cgroup controller, such as memory.high", file)
		}
		add(file, files[file])
	}
	return nil
}

func planCPU(c *specs.LinuxCPU, add func(file, val string)) {
	if c.Shares != nil && *c.Shares != 0 {
		add("cpu.weight", strconv.FormatUint(weightOfShares(*c.Shares), 10))
	}
	if c.Quota != nil || c.Period != nil {
		val := "max"
		if c.Quota != nil && *c.Quota > 0 {
			val = strconv.FormatInt(*c.Quota, 10)
		}
		if c.Period != nil && *c.Period != 0 {
			val += " " + strconv.FormatUint(*c.Period, 10)
		}
		add("cpu.max", val)
	}
	if c.Cpus != "" {
		add("cpuset.cpus", c.Cpus)
	}
	if c.Mems != "" {
		add("cpuset.mems", c.Mems)
	}
}

// weightOfShares maps v1's 2..262144 linearly on v2's 1..10000, as the OCI
// runtime specification's conversion table does.
func weightOfShares(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

func planMemory(m *specs.LinuxMemory, add, hint func(file, val string)) error {
	// The order matters when both shrink: swap.max first would leave the rest
	// of the old sum to memory for a moment, and a raised memory.max never hurts.
	if m.Limit != nil && *m.Limit != 0 {
		add("memory.max", limitText(*m.Limit))
	}
	if m.Swap != nil && *m.Swap != 0 {
		swap := *m.Swap
		if swap > 0 {
			if m.Limit == nil || *m.Limit <= 0 {
				return fault.New(fault.InvalidArgument, "memory.swap is %d but memory.limit is not set: v1 counts memory and swap together", swap)
			}
			if swap -= *m.Limit; swap < 0 {
				return fault.New(fault.InvalidArgument, "memory.swap %d is below memory.limit %d", *m.Swap, *m.Limit)
			}
		}
		val := "max"
		if swap >= 0 {
			val = strconv.FormatInt(swap, 10)
		}
		// No file: the kernel has no swap accounting, so there is no swap to limit.
		hint("memory.swap.max", val)
	}
	if m.Reservation != nil && *m.Reservation != 0 {
		add("memory.low", limitText(*m.Reservation))
	}
	return nil
}

func planIO(b *specs.LinuxBlockIO, add, hint func(file, val string)) {
	if b.Weight != nil && *b.Weight != 0 {
		// v1: 10..1000; v2: 1..10000. A hint: only some I/O schedulers have it.
		w := uint64(min(max(*b.Weight, 10), 1000))
		hint("io.weight", strconv.FormatUint(1+(w-10)*9999/990, 10))
	}
	for _, l := range []struct {
		key  string
		devs []specs.LinuxThrottleDevice
	}{
		{"rbps", b.ThrottleReadBpsDevice}, {"wbps", b.ThrottleWriteBpsDevice},
		{"riops", b.ThrottleReadIOPSDevice}, {"wiops", b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range l.devs {
			val := "max"
			if d.Rate != 0 {
				val = strconv.FormatUint(d.Rate, 10)
			}
			add("io.max", fmt.Sprintf("%d:%d %s=%s", d.Major, d.Minor, l.key, val))
		}
	}
}

// limitText is a v1 limit in v2's words: negative or zero means none.
func limitText(n int64) string {
	if n <= 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

// Apply sets the limits of r. On an error those before it are set.
func (g *Group) Apply(r *specs.LinuxResources) error {
	plan, err := Plan(r)
	if err != nil {
		return err
	}
	for _, s := range plan {
		err := write(g.dir, s.File, s.Value)
		if s.Optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, fs.ErrNotExist) {
			return fault.New(fault.FailedPrecondition, "the guest kernel has no %s, so this limit cannot hold: %w", s.File, err)
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) {
			return fault.New(fault.InvalidArgument, "the guest kernel refuses %s = %q: %w", s.File, s.Value, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
