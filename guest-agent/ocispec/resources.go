// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// Resources translates limits, of a specification or of UpdateContainer.
func Resources(in *agentpb.LinuxResources) *specs.LinuxResources {
	if in == nil {
		return nil
	}
	out := &specs.LinuxResources{Memory: memory(in.Memory), CPU: cpu(in.CPU), BlockIO: blockIO(in.BlockIO), Unified: in.Unified}
	for _, d := range in.Devices {
		out.Devices = append(out.Devices, deviceRule(d))
	}
	if in.Pids != nil {
		out.Pids = &specs.LinuxPids{Limit: ptr(in.Pids.Limit)}
	}
	for _, h := range in.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	return out
}

// deviceRule reads a negative number as "any". Major 0 belongs to no device, and
// runtimes send it for "any" as well; a minor of 0 then means the same.
func deviceRule(d *agentpb.LinuxDeviceCgroup) specs.LinuxDeviceCgroup {
	out := specs.LinuxDeviceCgroup{Allow: d.Allow, Type: d.Type, Access: d.Access}
	if d.Major > 0 {
		out.Major = ptr(d.Major)
	}
	if d.Minor > 0 || (d.Minor == 0 && d.Major > 0) {
		out.Minor = ptr(d.Minor)
	}
	return out
}

func memory(in *agentpb.LinuxMemory) *specs.LinuxMemory {
	if in == nil {
		return nil
	}
	return &specs.LinuxMemory{
		Limit: nonZero(in.Limit), Reservation: nonZero(in.Reservation), Swap: nonZero(in.Swap),
		Swappiness: nonZero(in.Swappiness), DisableOOMKiller: nonZero(in.DisableOOMKiller),
	}
}

func cpu(in *agentpb.LinuxCPU) *specs.LinuxCPU {
	if in == nil {
		return nil
	}
	return &specs.LinuxCPU{
		Shares: nonZero(in.Shares), Quota: nonZero(in.Quota), Period: nonZero(in.Period), Cpus: in.Cpus, Mems: in.Mems,
	}
}

func blockIO(in *agentpb.LinuxBlockIO) *specs.LinuxBlockIO {
	if in == nil {
		return nil
	}
	throttle := func(ds []*agentpb.LinuxThrottleDevice) []specs.LinuxThrottleDevice {
		var out []specs.LinuxThrottleDevice
		for _, d := range ds {
			t := specs.LinuxThrottleDevice{Rate: d.Rate}
			t.Major, t.Minor = d.Major, d.Minor
			out = append(out, t)
		}
		return out
	}
	return &specs.LinuxBlockIO{
		Weight:                  nonZero(uint16(in.Weight)),
		ThrottleReadBpsDevice:   throttle(in.ThrottleReadBpsDevice),
		ThrottleWriteBpsDevice:  throttle(in.ThrottleWriteBpsDevice),
		ThrottleReadIOPSDevice:  throttle(in.ThrottleReadIOPSDevice),
		ThrottleWriteIOPSDevice: throttle(in.ThrottleWriteIOPSDevice),
	}
}
