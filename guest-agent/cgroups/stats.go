// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// Stats reads the group's counters. A controller that the kernel lacks leaves
// its part nil. Units are the protocol's: nanoseconds and bytes.
func (g *Group) Stats() (*agentpb.CgroupStats, error) {
	cpu, err := readFlat(filepath.Join(g.dir, "cpu.stat"))
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	const usec = 1000
	s := &agentpb.CgroupStats{CpuStats: &agentpb.CpuStats{
		CpuUsage: &agentpb.CpuUsage{
			TotalUsage:        cpu["usage_usec"] * usec,
			UsageInUsermode:   cpu["user_usec"] * usec,
			UsageInKernelmode: cpu["system_usec"] * usec,
		},
		ThrottlingData: &agentpb.ThrottlingData{
			Periods: cpu["nr_periods"], ThrottledPeriods: cpu["nr_throttled"], ThrottledTime: cpu["throttled_usec"] * usec,
		},
	}}
	if n, ok := g.number("pids.current"); ok {
		s.PidsStats = &agentpb.PidsStats{Current: n}
		s.PidsStats.Limit, _ = g.number("pids.max")
	}
	if s.MemoryStats, err = g.memoryStats(); err != nil {
		return nil, err
	}
	if s.BlkioStats, err = g.ioStats(); err != nil {
		return nil, err
	}
	s.HugetlbStats = g.hugetlbStats()
	s.Pressure = g.pressure()
	return s, nil
}

// pressure reads what waits for the controllers' resources. A kernel without the
// figures, or with psi=0, tells nothing.
func (g *Group) pressure() map[string]*agentpb.Pressure {
	out := map[string]*agentpb.Pressure{}
	for _, what := range []string{"cpu", "memory", "io"} {
		b, err := os.ReadFile(filepath.Join(g.dir, what+".pressure"))
		if p := parsePressure(string(b)); err == nil && p != nil {
			out[what] = p
		}
	}
	return out
}

// parsePressure reads "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" and the line of "full".
func parsePressure(text string) *agentpb.Pressure {
	p := &agentpb.Pressure{}
	for text := range strings.Lines(text) {
		f := strings.Fields(text)
		if len(f) == 0 {
			continue
		}
		line := &agentpb.PressureLine{}
		switch f[0] {
		case "some":
			p.Some = line
		case "full":
			p.Full = line
		}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			if k == "total" {
				line.Total, _ = strconv.ParseUint(v, 10, 64)
				continue
			}
			if to := map[string]*float64{"avg10": &line.Avg10, "avg60": &line.Avg60, "avg300": &line.Avg300}[k]; to != nil {
				*to, _ = strconv.ParseFloat(v, 64)
			}
		}
	}
	if p.Some == nil {
		return nil
	}
	return p
}

func (g *Group) memoryStats() (*agentpb.MemoryStats, error) {
	usage, ok := g.number("memory.current")
	if !ok {
		return nil, nil
	}
	stat, err := readFlat(filepath.Join(g.dir, "memory.stat"))
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	events, err := readFlat(filepath.Join(g.dir, "memory.events"))
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	m := &agentpb.MemoryStats{
		Cache:        stat["file"],
		Usage:        &agentpb.MemoryData{Usage: usage, Failcnt: events["max"]},
		SwapUsage:    &agentpb.MemoryData{},
		KernelUsage:  &agentpb.MemoryData{Usage: stat["kernel"]},
		UseHierarchy: true, // v2 has no other
		Stats:        stat,
		Events:       events,
	}
	m.Usage.Limit, _ = g.number("memory.max")
	m.Usage.MaxUsage, _ = g.number("memory.peak") // Linux 5.19 and later
	m.SwapUsage.Usage, _ = g.number("memory.swap.current")
	m.SwapUsage.Limit, _ = g.number("memory.swap.max")
	return m, nil
}

// ioStats reads io.stat: "major:minor rbytes=n wbytes=n rios=n wios=n dbytes=n dios=n".
func (g *Group) ioStats() (*agentpb.BlkioStats, error) {
	b, err := os.ReadFile(filepath.Join(g.dir, "io.stat"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	s := &agentpb.BlkioStats{}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		maj, min, ok := strings.Cut(f[0], ":")
		major, err1 := strconv.ParseUint(maj, 10, 32)
		minor, err2 := strconv.ParseUint(min, 10, 32)
		if !ok || err1 != nil || err2 != nil {
			continue
		}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				continue
			}
			e := &agentpb.BlkioStatsEntry{Major: major, Minor: minor, Value: n}
			switch k {
			case "rbytes", "wbytes", "dbytes":
				e.Op = ioOps[k[:1]]
				s.IoServiceBytesRecursive = append(s.IoServiceBytesRecursive, e)
			case "rios", "wios", "dios":
				e.Op = ioOps[k[:1]]
				s.IoServicedRecursive = append(s.IoServicedRecursive, e)
			}
		}
	}
	return s, nil
}

// ioOps are the operation names that cgroup v1 used, by the first letter of v2's.
var ioOps = map[string]string{"r": "Read", "w": "Write", "d": "Discard"}

func (g *Group) hugetlbStats() map[string]*agentpb.HugetlbStats {
	files, _ := filepath.Glob(filepath.Join(g.dir, "hugetlb.*.current"))
	if len(files) == 0 {
		return nil
	}
	out := map[string]*agentpb.HugetlbStats{}
	for _, f := range files {
		size := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), "hugetlb."), ".current")
		if strings.Contains(size, ".") {
			continue // hugetlb.<size>.rsvd.current
		}
		h := &agentpb.HugetlbStats{}
		h.Usage, _ = g.number("hugetlb." + size + ".current")
		h.Limit, _ = g.number("hugetlb." + size + ".max")
		if ev, err := readFlat(filepath.Join(g.dir, "hugetlb."+size+".events")); err == nil {
			h.Failcnt = ev["max"]
		}
		out[size] = h
	}
	return out
}

// number reads a file that holds one number; a limit of "max" reads as 0, the
// protocol's only word for none.
func (g *Group) number(file string) (uint64, bool) {
	b, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}
