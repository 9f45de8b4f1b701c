// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// number is that of a device: kind is "b" or "c".
type number struct {
	kind         string
	major, minor int64
}

func numberOf(kind string, dev uint64) number {
	return number{kind, int64(unix.Major(dev)), int64(unix.Minor(dev))}
}

// numbers are the host's numbers of devices of a container, and the guest's.
type numbers map[number]number

// device gives the device at path in the container the guest's number, adding it
// when the specification has none.
func (n numbers) device(spec *specs.Spec, path string, to number) {
	i := slices.IndexFunc(spec.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
	if i < 0 {
		spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: path, Type: to.kind, Major: to.major, Minor: to.minor})
		return
	}
	d := &spec.Linux.Devices[i]
	n[number{to.kind, d.Major, d.Minor}] = to
	d.Type, d.Major, d.Minor = to.kind, to.major, to.minor
}

// limits renumbers rules and rates, all at once: one device may have the number in
// the guest that another has on the host.
func (n numbers) limits(r *specs.LinuxResources) {
	if r == nil {
		return
	}
	for i := range r.Devices {
		rule := &r.Devices[i]
		if rule.Major == nil || rule.Minor == nil {
			continue
		}
		for _, kind := range []string{"b", "c"} {
			to, ok := n[number{kind, *rule.Major, *rule.Minor}]
			if ok && (rule.Type == kind || rule.Type == "a" || rule.Type == "") {
				rule.Major, rule.Minor = &to.major, &to.minor
				break
			}
		}
	}
	if b := r.BlockIO; b != nil {
		for _, rates := range [][]specs.LinuxThrottleDevice{b.ThrottleReadBpsDevice, b.ThrottleWriteBpsDevice, b.ThrottleReadIOPSDevice, b.ThrottleWriteIOPSDevice} {
			for i := range rates {
				if to, ok := n[number{"b", rates[i].Major, rates[i].Minor}]; ok {
					rates[i].Major, rates[i].Minor = to.major, to.minor
				}
			}
		}
	}
}

// assigned tells whether a character device's number means the same on every
// machine (kernel Documentation/admin-guide/devices.txt; majors from 234 on and some
// minors of misc devices are handed out as drivers come).
func (n number) assigned() bool {
	const misc = 10
	return n.major < 234 && (n.major != misc || n.minor >= 128 && n.minor < 255)
}

// charDevices finds the character devices of a specification in the guest: by a
// number that means the same everywhere, or by the name that the guest's kernel
// gave it. Of a container that may use every device, which is given all of the
// host's, others are left out. dev and sys are "/dev" and "/sys/dev/char".
func charDevices(spec *specs.Spec, moved numbers, dev, sys string) error {
	every := everyDevice(spec.Linux.Resources)
	var kept []specs.LinuxDevice
	for _, d := range spec.Linux.Devices {
		has := number{"c", d.Major, d.Minor}
		var st unix.Stat_t
		name, inDev := strings.CutPrefix(filepath.Clean(d.Path), "/dev/")
		switch {
		case d.Type != "c" && d.Type != "u":
		case has.assigned() && unix.Stat(filepath.Join(sys, fmt.Sprintf("%d:%d", d.Major, d.Minor)), &st) == nil:
		case inDev && unix.Stat(filepath.Join(dev, name), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR:
			to := numberOf("c", st.Rdev)
			moved[has] = to
			d.Major, d.Minor = to.major, to.minor
		case every:
			continue
		default:
			return fault.New(fault.FailedPrecondition, "linux.devices (%s): the guest has no character device of that name or number (%d:%d), and those of the host do not reach it", d.Path, d.Major, d.Minor)
		}
		kept = append(kept, d)
	}
	spec.Linux.Devices = kept
	return nil
}

// everyDevice tells whether one rule allows all devices.
func everyDevice(r *specs.LinuxResources) bool {
	return r != nil && slices.ContainsFunc(r.Devices, func(rule specs.LinuxDeviceCgroup) bool {
		return rule.Allow && (rule.Type == "" || rule.Type == "a") && rule.Major == nil && rule.Minor == nil && strings.Contains(rule.Access, "w")
	})
}
