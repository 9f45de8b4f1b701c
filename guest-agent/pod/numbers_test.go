// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// Two disks of which each has the number in the guest that the other has on the
// host: their rules and rates do not get mixed up, and a character device of the
// same number is another.
func TestNumbers(t *testing.T) {
	n := func(i int64) *int64 { return &i }
	rule := func(kind string, major, minor int64) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: n(major), Minor: n(minor)}
	}
	rate := func(major, minor int64) (d specs.LinuxThrottleDevice) {
		d.Major, d.Minor, d.Rate = major, minor, 7
		return d
	}
	s := &specs.Spec{Linux: &specs.Linux{
		Devices: []specs.LinuxDevice{{Path: "/dev/x", Type: "b", Major: 254, Minor: 0}, {Path: "/dev/y", Type: "b", Major: 254, Minor: 16}},
		Resources: &specs.LinuxResources{
			Devices: []specs.LinuxDeviceCgroup{rule("b", 254, 0), rule("a", 254, 16), rule("c", 254, 0), {Allow: false}},
			BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{rate(254, 0)}, ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{rate(254, 16)}},
		},
	}}
	moved := numbers{}
	moved.device(s, "/dev/x", number{"b", 254, 16})
	moved.device(s, "/dev/y", number{"b", 254, 0})
	moved.device(s, "/dev/z", number{"b", 254, 32})
	moved.limits(s.Linux.Resources)
	if d := s.Linux.Devices; len(d) != 3 || d[0].Minor != 16 || d[1].Minor != 0 || d[2].Path != "/dev/z" {
		t.Errorf("%+v", d)
	}
	var got []int64
	for _, r := range s.Linux.Resources.Devices[:3] {
		got = append(got, *r.Minor)
	}
	if !slices.Equal(got, []int64{16, 0, 0}) {
		t.Errorf("minor numbers of the rules: %v", got)
	}
	if b := s.Linux.Resources.BlockIO; b.ThrottleReadBpsDevice[0].Minor != 16 || b.ThrottleWriteIOPSDevice[0].Minor != 0 {
		t.Errorf("rates: %+v", b)
	}
	moved.limits(nil)
	numbers(nil).limits(s.Linux.Resources)
}

// Character devices are the guest's, or named in an error.
func TestCharDevices(t *testing.T) {
	dev, sys := t.TempDir(), t.TempDir()
	if err := unix.Mknod(filepath.Join(dev, "driver"), unix.S_IFCHR|0o600, int(unix.Mkdev(250, 3))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"1:3", "249:0"} {
		if err := os.Mkdir(filepath.Join(sys, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	with := func(every bool, d ...specs.LinuxDevice) *specs.Spec {
		s := &specs.Spec{Linux: &specs.Linux{Devices: d, Resources: &specs.LinuxResources{}}}
		if every {
			s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		}
		return s
	}
	char := func(path string, major, minor int64) specs.LinuxDevice {
		return specs.LinuxDevice{Path: path, Type: "c", Major: major, Minor: minor}
	}
	moved := numbers{}
	s := with(false, char("/dev/mine", 1, 3), char("/dev/driver", 240, 0), specs.LinuxDevice{Path: "/dev/disk", Type: "b", Major: 8})
	if err := charDevices(s, moved, dev, sys); err != nil {
		t.Fatal(err)
	}
	if d := s.Linux.Devices; len(d) != 3 || d[0].Major != 1 || d[1].Major != 250 || d[1].Minor != 3 || moved[number{"c", 240, 0}] != (number{"c", 250, 3}) {
		t.Errorf("%+v, %v", d, moved)
	}
	for _, d := range []specs.LinuxDevice{char("/dev/other", 249, 0), char("/dev/tool", 1, 99), char("/dev/../driver", 240, 0)} {
		err := charDevices(with(false, d), moved, dev, sys)
		if fault.KindOf(err) != fault.FailedPrecondition || !strings.Contains(err.Error(), d.Path) {
			t.Errorf("%s: %v", d.Path, err)
		}
	}
	s = with(true, char("/dev/other", 249, 0), char("/dev/mine", 1, 3))
	if err := charDevices(s, moved, dev, sys); err != nil || len(s.Linux.Devices) != 1 || s.Linux.Devices[0].Path != "/dev/mine" {
		t.Errorf("a container that may use every device: %+v, %v", s.Linux.Devices, err)
	}
}
