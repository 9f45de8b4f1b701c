// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// IODevice is the number of a whole block device of the host.
type IODevice struct{ Major, Minor int64 }

// IORate bounds what is read from and written to one device, in bytes and in
// operations a second; 0 does not.
type IORate struct{ ReadBytes, WriteBytes, ReadOps, WriteOps uint64 }

// SetIO makes these the pod's only rates: of its machine and its virtio-fs daemon,
// which read and write for the containers. Calls must not overlap.
func (g *Group) SetIO(rates map[IODevice]IORate) error {
	all := maps.Clone(rates)
	if all == nil {
		all = map[IODevice]IORate{}
	}
	for dev := range g.io {
		all[dev] = rates[dev] // no rate for what is not there any more
	}
	devices := slices.SortedFunc(maps.Keys(all), func(a, b IODevice) int {
		return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor))
	})
	for _, dev := range devices {
		rate := all[dev]
		if rate == g.io[dev] {
			continue
		}
		for _, d := range append(slices.Clone(g.plan.Dirs), g.plan.Overhead...) {
			for _, s := range ioSettings(dev, rate, d) {
				if err := g.set(d, s); err != nil {
					return fmt.Errorf("cgroup %s: %w", g.plan.Path, err)
				}
			}
		}
		if g.io == nil {
			g.io = map[IODevice]IORate{}
		}
		g.io[dev] = rate
	}
	return nil
}

// ioSettings are the files that hold a device's rate (kernel
// Documentation/admin-guide/cgroup-v1/blkio-controller.rst, cgroup-v2.rst "io.max").
func ioSettings(dev IODevice, r IORate, d Dir) (out []setting) {
	text := func(n uint64) string {
		if n == 0 && d.V2 {
			return "max"
		}
		return strconv.FormatUint(n, 10)
	}
	number := fmt.Sprintf("%d:%d ", dev.Major, dev.Minor)
	if d.V2 {
		value := number + "rbps=" + text(r.ReadBytes) + " wbps=" + text(r.WriteBytes) + " riops=" + text(r.ReadOps) + " wiops=" + text(r.WriteOps)
		return []setting{{"io", "io.max", value, "linux.resources.blockIO"}}
	}
	if !d.has("blkio") {
		return nil
	}
	for _, f := range []struct {
		file, field string
		n           uint64
	}{
		{"read_bps", "throttleReadBpsDevice", r.ReadBytes}, {"write_bps", "throttleWriteBpsDevice", r.WriteBytes},
		{"read_iops", "throttleReadIOPSDevice", r.ReadOps}, {"write_iops", "throttleWriteIOPSDevice", r.WriteOps},
	} {
		out = append(out, setting{"blkio", "blkio.throttle." + f.file + "_device", number + text(f.n), "linux.resources.blockIO." + f.field})
	}
	return out
}
