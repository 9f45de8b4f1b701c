// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/internal/config"
)

// Annotations in which the CRI states the sum of a pod's limits, on its pause
// container (containerd internal/cri/annotations).
const (
	annotationPodQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	annotationPodPeriod = "io.kubernetes.cri.sandbox-cpu-period"
	annotationPodMemory = "io.kubernetes.cri.sandbox-memory"
)

// Host is what a host can give its machines.
type Host struct {
	// CPUs is their number, MemoryBytes the memory in bytes.
	CPUs        int
	MemoryBytes uint64
}

// demand is what containers need of a machine beside its own.
type demand struct {
	milliCPUs int64
	memory    uint64 // bytes
	cpus      []int  // of the host, that containers are bound to; sorted
}

// plus is what two need.
func (d demand) plus(o demand) demand {
	cpus := slices.Concat(d.cpus, o.cpus)
	slices.Sort(cpus)
	return demand{d.milliCPUs + o.milliCPUs, d.memory + o.memory, slices.Compact(cpus)}
}

// atLeast is the larger of each.
func (d demand) atLeast(o demand) demand {
	all := d.plus(o)
	return demand{max(d.milliCPUs, o.milliCPUs), max(d.memory, o.memory), all.cpus}
}

// demandOf reads limits, which must be such as this host can give.
func demandOf(r *specs.LinuxResources, h Host) (d demand, err error) {
	if r == nil {
		return d, nil
	}
	if m := r.Memory; m != nil {
		if d.memory, err = memoryLimit("linux.resources.memory.limit", m.Limit, h); err != nil {
			return d, err
		}
		if _, err = memoryLimit("linux.resources.memory.reservation", m.Reservation, h); err != nil {
			return d, err
		}
	}
	if c := r.CPU; c != nil {
		if d.milliCPUs, err = milliCPUs("linux.resources.cpu.quota", c.Quota, c.Period); err != nil {
			return d, err
		}
		if d.cpus, err = parseCPUs(c.Cpus, h.CPUs); err != nil {
			return d, fmt.Errorf("linux.resources.cpu.cpus: %w", err)
		}
	}
	return d, nil
}

// memoryLimit is a limit in bytes, 0 for none: unset, 0 and -1 are none.
func memoryLimit(field string, limit *int64, h Host) (uint64, error) {
	switch {
	case limit == nil || *limit == 0 || *limit == -1:
		return 0, nil
	case *limit < 0:
		return 0, fmt.Errorf("%s is %d: must be a number of bytes, or -1 for no limit: %w", field, *limit, errdefs.ErrInvalidArgument)
	case uint64(*limit) > h.MemoryBytes:
		return 0, fmt.Errorf("%s is %d: this host has %d bytes of memory; leave it out for no limit: %w", field, *limit, h.MemoryBytes, errdefs.ErrInvalidArgument)
	}
	return uint64(*limit), nil
}

// defaultPeriod is the kernel's, in microseconds.
const defaultPeriod = 100_000

// milliCPUs is a quota in thousandths of a CPU, 0 for none.
func milliCPUs(field string, quota *int64, period *uint64) (int64, error) {
	if quota == nil || *quota == 0 || *quota == -1 {
		return 0, nil
	}
	if *quota < 0 {
		return 0, fmt.Errorf("%s is %d: must be a number of microseconds, or -1 for no limit: %w", field, *quota, errdefs.ErrInvalidArgument)
	}
	p := uint64(defaultPeriod)
	if period != nil && *period != 0 {
		p = *period
	}
	return max(1, int64(float64(*quota)*1000/float64(p))), nil
}

// parseCPUs reads a list like "0-3,7" of a host with n CPUs (cpuset(7), list format).
func parseCPUs(list string, n int) (out []int, err error) {
	bad := func() ([]int, error) {
		return nil, fmt.Errorf("%q: must be a list of this host's CPUs, such as \"0-%d\": %w", list, max(n-1, 0), errdefs.ErrInvalidArgument)
	}
	if list = strings.TrimSpace(list); list == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		a, err := strconv.Atoi(from)
		b := a
		if err == nil && isRange {
			b, err = strconv.Atoi(to)
		}
		if err != nil || a < 0 || b < a || b >= n {
			return bad()
		}
		for i := a; i <= b; i++ {
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// stated is what a pod says of itself before its containers are known.
func (p PodConfig) stated(h Host) (demand, error) {
	number := func(key string) (*int64, error) {
		s := p.Annotations[key]
		if s == "" {
			return nil, nil
		}
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("annotation %s is %q: must be a whole number: %w", key, s, errdefs.ErrInvalidArgument)
		}
		return &n, nil
	}
	own, err := demandOf(p.Resources, h)
	if err != nil {
		return own, err
	}
	quota, err := number(annotationPodQuota)
	if err != nil {
		return own, err
	}
	period, err := number(annotationPodPeriod)
	if err != nil {
		return own, err
	}
	memory, err := number(annotationPodMemory)
	if err != nil {
		return own, err
	}
	var sum demand
	var p64 *uint64
	if period != nil && *period > 0 {
		p := uint64(*period)
		p64 = &p
	}
	if sum.milliCPUs, err = milliCPUs("annotation "+annotationPodQuota, quota, p64); err != nil {
		return own, err
	}
	if sum.memory, err = memoryLimit("annotation "+annotationPodMemory, memory, h); err != nil {
		return own, err
	}
	return own.atLeast(sum), nil
}

// size is a machine's: vCPUs that are up, bytes of memory.
type size struct {
	cpus   int
	memory uint64
}

// bounds are the sizes that a machine can have, and its own needs in it.
type bounds struct {
	own, most          size
	fixed, fixedMemory bool   // all, or memory, is as it was at boot
	alike              bool   // machines start with their own needs alone, as far as they can grow: they are clones of one
	unit               uint64 // of memory, in bytes
}

const mib = 1 << 20

// maxCPUs is how many a PC has without an interrupt remapping unit (8-bit APIC ids,
// of which some are taken).
const maxCPUs = 240

func boundsOf(c *config.Config, h Host) bounds {
	boot, most := c.QEMU.CPUs(h.CPUs)
	most = max(boot, min(most, maxCPUs))
	b := bounds{unit: mib}
	if c.QEMU.EnableHugePages {
		b.unit = hypervisor.HugePage
	}
	b.own = size{boot, roundUp(c.QEMU.MemoryBytes(), b.unit)}
	b.most = size{most, c.QEMU.MaxMemoryBytes(h.MemoryBytes) / b.unit * b.unit}
	b.most.memory = max(b.most.memory, b.own.memory)
	b.fixed = c.Runtime.StaticSandboxResourceMgmt || c.Runtime.EnableCheckpoint || c.QEMU.MachineType == qemu.MicroVM // which takes nothing at run time
	b.fixedMemory = b.fixed || !c.QEMU.EnableVirtioMem
	b.alike = c.Factory.EnableTemplate
	return b
}

// start is the size with which a machine starts whose containers are known to
// need d. Machines that are alike grow to what they need as soon as they answer.
func (b bounds) start(d demand) size {
	full, own := b.fit(d), b.fit(demand{})
	if b.alike && !b.fixed {
		full.cpus = own.cpus
	}
	if b.alike && !b.fixedMemory {
		full.memory = own.memory
	}
	return full
}

// fit is the size of a machine whose containers need d: its own, and theirs, up
// to the most. Fractions of a CPU are rounded up; the rest of it is held by quotas.
func (b bounds) fit(d demand) size {
	cpus := max(b.own.cpus+int((d.milliCPUs+999)/1000), len(d.cpus))
	memory := b.own.memory + roundUp(d.memory, max(b.unit, mib))
	return size{min(cpus, b.most.cpus), min(memory, b.most.memory)}
}

func roundUp(n, unit uint64) uint64 { return (n + unit - 1) / unit * unit }
