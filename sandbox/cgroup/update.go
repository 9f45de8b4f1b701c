// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Update gives the pod limits in the place of those that it was opened with, by the
// same rules; what limits it above stays its owner's. With grow nothing becomes less:
// that is for before the machine grows, and Update without it for after it has
// shrunk. A limit of memory below what is used already is FailedPrecondition and
// changes nothing. Memory nodes stay as they are. Calls must not overlap.
func (g *Group) Update(ctx context.Context, resources, overhead *specs.LinuxResources, grow bool) error {
	want := limits(Request{Resources: resources, Overhead: overhead, Split: g.Split()})
	for _, d := range g.plan.Dirs {
		want = want.notAbove(d)
	}
	want.Mems = g.limits.Mems
	if grow {
		want = want.atLeast(g.limits)
	}
	if want == g.limits || len(g.plan.Dirs) == 0 {
		return nil
	}
	if err := g.rewrite(want); err != nil {
		return fmt.Errorf("cgroup %s: %w", g.plan.Path, err)
	}
	was := g.limits
	g.limits = want
	g.o.Log.Info("cgroup limits changed", "path", g.plan.Path, "memory", want.MemoryBytes, "cpu_quota", want.CPUQuota, "cpus", want.CPUs)
	if !g.started || was == want {
		return nil
	}
	conn, err := g.o.Dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.SetLimits(ctx, Scope{Name: g.plan.Unit, Limits: want, V2: g.plan.Dirs[0].V2})
}

// rewrite writes what differs from the limits that hold.
func (g *Group) rewrite(want Limits) error {
	for _, d := range g.plan.Dirs {
		for _, s := range want.changes(g.limits, d) {
			if !d.has(s.controller) {
				continue
			}
			if s.controller == "memory" {
				if err := roomFor(d, want.MemoryBytes); err != nil {
					return err
				}
			}
			if err := g.set(d, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// roomFor refuses a limit below what is used: version 2 would kill for it.
func roomFor(d Dir, limit int64) error {
	file := "memory.usage_in_bytes"
	if d.V2 {
		file = "memory.current"
	}
	text, err := readFile(d.Path, file)
	used, err2 := strconv.ParseInt(text, 10, 64)
	if limit == 0 || err != nil || err2 != nil || used <= limit {
		return nil //nolint:nilerr // no controller, whose absence was said
	}
	return fmt.Errorf("linux.resources.memory.limit: %d bytes with the overhead, %d are in use: %w", limit, used, errdefs.ErrFailedPrecondition)
}

// atLeast is the larger of each limit; 0 or empty is none, and so the largest.
func (l Limits) atLeast(o Limits) Limits {
	larger := func(a, b int64) int64 {
		if a == 0 || b == 0 {
			return 0
		}
		return max(a, b)
	}
	l.MemoryBytes, l.CPUQuota = larger(l.MemoryBytes, o.MemoryBytes), larger(l.CPUQuota, o.CPUQuota)
	switch {
	case l.CPUs == "" || o.CPUs == "":
		l.CPUs = ""
	case l.CPUs != o.CPUs:
		l.CPUs = union(l.CPUs, o.CPUs)
	}
	return l
}

// union is a list of the CPUs of two, each once, so that growing again is no change.
func union(a, b string) string {
	set, err := parseList(a + "," + b)
	if err != nil {
		return a + "," + b // the kernel says what is wrong with it
	}
	var out []string
	for i := range 8 * len(set) {
		if set[i/8]&(1<<(i%8)) != 0 {
			out = append(out, strconv.Itoa(i))
		}
	}
	return strings.Join(out, ",")
}

// changes are the settings by which the limits was become l in a directory; one that
// is gone takes the value that a new group has.
func (l Limits) changes(was Limits, d Dir) (out []setting) {
	if l.CPUs != was.CPUs {
		value := l.CPUs
		if value == "" && d.V2 {
			value = "\n"
		} else if value == "" {
			value, _ = readFile(filepath.Dir(d.Path), "cpuset.cpus")
		}
		out = append(out, setting{"cpuset", "cpuset.cpus", value, "linux.resources.cpu.cpus"})
	}
	for _, s := range l.settings(d.V2) {
		if s.controller == "memory" && l.MemoryBytes != was.MemoryBytes || s.controller == "cpu" && l.CPUQuota != was.CPUQuota {
			out = append(out, s)
		}
	}
	memory, quota, none := "memory.limit_in_bytes", "cpu.cfs_quota_us", "-1"
	if d.V2 {
		memory, quota, none = "memory.max", "cpu.max", "max"
	}
	if l.MemoryBytes == 0 && was.MemoryBytes != 0 {
		out = append(out, setting{"memory", memory, none, "linux.resources.memory.limit"})
	}
	if l.CPUQuota == 0 && was.CPUQuota != 0 {
		out = append(out, setting{"cpu", quota, none, "linux.resources.cpu.quota"})
	}
	return out
}
