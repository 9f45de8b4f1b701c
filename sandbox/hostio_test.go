// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"maps"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/sandbox/cgroup"
)

func throttle(major, minor int64, rate uint64) (d specs.LinuxThrottleDevice) {
	d.Major, d.Minor, d.Rate = major, minor, rate
	return d
}

// Rates of the container's own block devices are for the guest, the rest for the host.
func TestDiskRates(t *testing.T) {
	weight := uint16(500)
	devices := []specs.LinuxDevice{{Path: "/dev/x", Type: "b", Major: 7, Minor: 1}, {Path: "/dev/c", Type: "c", Major: 8, Minor: 0}}
	all := &specs.LinuxBlockIO{
		Weight:                &weight,
		ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttle(8, 0, 5), throttle(7, 1, 6)}, ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{throttle(7, 0, 7)},
	}
	got := diskRates(all, devices)
	if got == nil || got.Weight != nil || len(got.ThrottleReadBpsDevice) != 1 || got.ThrottleReadBpsDevice[0].Minor != 1 || got.ThrottleWriteIOPSDevice != nil {
		t.Errorf("%+v", got)
	}
	r := wireResources(&specs.LinuxResources{BlockIO: got})
	if d := r.BlockIO.ThrottleReadBpsDevice; len(d) != 1 || d[0].Major != 7 || d[0].Minor != 1 || d[0].Rate != 6 {
		t.Errorf("on the wire: %+v", r.BlockIO)
	}
	for _, b := range []*specs.LinuxBlockIO{nil, {Weight: &weight}, {ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttle(8, 0, 1)}}} {
		if got := diskRates(b, devices); got != nil {
			t.Errorf("%+v: %+v", b, got)
		}
	}
	host := hostPart(&specs.LinuxResources{BlockIO: all}, devices).BlockIO
	if len(host.ThrottleReadBpsDevice) != 1 || host.ThrottleReadBpsDevice[0].Major != 8 || len(host.ThrottleWriteIOPSDevice) != 1 {
		t.Errorf("for the host: %+v", host)
	}
}

// The pod has the sum of what its containers have, as long as all have a rate.
func TestIOOnHost(t *testing.T) {
	read := func(rates ...specs.LinuxThrottleDevice) *specs.LinuxResources {
		return &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: rates}}
	}
	writes := read(throttle(8, 0, 10))
	writes.BlockIO.ThrottleWriteIOPSDevice = []specs.LinuxThrottleDevice{throttle(8, 0, 3)}
	for name, c := range map[string]struct {
		limits map[string]*specs.LinuxResources
		want   map[cgroup.IODevice]cgroup.IORate
	}{
		"one":               {map[string]*specs.LinuxResources{"a": writes}, map[cgroup.IODevice]cgroup.IORate{{Major: 8}: {ReadBytes: 10, WriteOps: 3}}},
		"two":               {map[string]*specs.LinuxResources{"a": writes, "b": read(throttle(8, 0, 5))}, map[cgroup.IODevice]cgroup.IORate{{Major: 8}: {ReadBytes: 15}}},
		"one without":       {map[string]*specs.LinuxResources{"a": writes, "b": {}}, nil},
		"of other devices":  {map[string]*specs.LinuxResources{"a": read(throttle(8, 0, 5)), "b": read(throttle(8, 16, 5))}, map[cgroup.IODevice]cgroup.IORate{{Major: 8}: {}, {Major: 8, Minor: 16}: {}}},
		"no container":      {nil, map[cgroup.IODevice]cgroup.IORate{}},
		"a rate of nothing": {map[string]*specs.LinuxResources{"a": read(throttle(8, 0, 0))}, map[cgroup.IODevice]cgroup.IORate{}},
	} {
		if got := (&sizer{limits: c.limits}).ioOnHost(); !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if got := merge(writes, &specs.LinuxResources{}); got.BlockIO != writes.BlockIO {
		t.Errorf("an update that says nothing of rates leaves %+v", got.BlockIO)
	}
}
