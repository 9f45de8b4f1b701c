// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/sandbox/cgroup"
)

// A container's rates for block devices of the host are kept in two places: for
// devices that are its own by the guest, which translates their numbers, and for
// all others by the pod's cgroup on the host. Those hold shared files, and files
// that are disks of the machine: it is the virtio-fs daemon and the VMM that read
// and write them, for all containers of the pod.

// withRates is b with those of its rates that keep says.
func withRates(b *specs.LinuxBlockIO, keep func(specs.LinuxThrottleDevice) bool) *specs.LinuxBlockIO {
	if b == nil {
		return nil
	}
	some := func(rates []specs.LinuxThrottleDevice) (out []specs.LinuxThrottleDevice) {
		for _, r := range rates {
			if keep(r) {
				out = append(out, r)
			}
		}
		return out
	}
	return &specs.LinuxBlockIO{
		ThrottleReadBpsDevice: some(b.ThrottleReadBpsDevice), ThrottleWriteBpsDevice: some(b.ThrottleWriteBpsDevice),
		ThrottleReadIOPSDevice: some(b.ThrottleReadIOPSDevice), ThrottleWriteIOPSDevice: some(b.ThrottleWriteIOPSDevice),
	}
}

// isDisk tells whether a rate is for a block device among those of a container.
func isDisk(devices []specs.LinuxDevice) func(specs.LinuxThrottleDevice) bool {
	return func(r specs.LinuxThrottleDevice) bool {
		return slices.ContainsFunc(devices, func(d specs.LinuxDevice) bool { return d.Type == "b" && d.Major == r.Major && d.Minor == r.Minor })
	}
}

// diskRates are the I/O limits that the guest can keep: of the container's own
// block devices, and without a weight, which would be one among the guest's disks.
func diskRates(b *specs.LinuxBlockIO, devices []specs.LinuxDevice) *specs.LinuxBlockIO {
	g := withRates(b, isDisk(devices))
	if g == nil || len(g.ThrottleReadBpsDevice)+len(g.ThrottleWriteBpsDevice)+len(g.ThrottleReadIOPSDevice)+len(g.ThrottleWriteIOPSDevice) == 0 {
		return nil
	}
	return g
}

// hostPart are limits with the rates that the host is to keep.
func hostPart(r *specs.LinuxResources, devices []specs.LinuxDevice) *specs.LinuxResources {
	if r == nil || r.BlockIO == nil {
		return r
	}
	out, own := *r, isDisk(devices)
	out.BlockIO = withRates(r.BlockIO, func(d specs.LinuxThrottleDevice) bool { return !own(d) })
	return &out
}

// ioOnHost are the rates for the pod's cgroup: what its containers have together.
// One container without a rate leaves the pod without it.
func (z *sizer) ioOnHost() map[cgroup.IODevice]cgroup.IORate {
	z.mu.Lock()
	defer z.mu.Unlock()
	out, have := map[cgroup.IODevice]cgroup.IORate{}, map[cgroup.IODevice][4]int{}
	for _, r := range z.limits {
		if r == nil || r.BlockIO == nil {
			return nil
		}
		b := r.BlockIO
		for kind, rates := range [][]specs.LinuxThrottleDevice{b.ThrottleReadBpsDevice, b.ThrottleWriteBpsDevice, b.ThrottleReadIOPSDevice, b.ThrottleWriteIOPSDevice} {
			for _, d := range rates {
				if d.Rate == 0 {
					continue
				}
				dev := cgroup.IODevice{Major: d.Major, Minor: d.Minor}
				sum, n := out[dev], have[dev]
				*[]*uint64{&sum.ReadBytes, &sum.WriteBytes, &sum.ReadOps, &sum.WriteOps}[kind] += d.Rate
				n[kind]++
				out[dev], have[dev] = sum, n
			}
		}
	}
	for dev, sum := range out {
		for kind, p := range []*uint64{&sum.ReadBytes, &sum.WriteBytes, &sum.ReadOps, &sum.WriteOps} {
			if have[dev][kind] < len(z.limits) {
				*p = 0
			}
		}
		out[dev] = sum
	}
	return out
}
