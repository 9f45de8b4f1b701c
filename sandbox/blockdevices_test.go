// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"log/slog"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestHostDisks: what a privileged container lists of the host's disks is left
// out, a volume stays, and so does what an ordinary container names.
func TestHostDisks(t *testing.T) {
	node := filepath.Join(t.TempDir(), "disk")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(240, 7))); err != nil { // for local use (devices.txt)
		t.Fatal(err)
	}
	s := &Sandbox{o: Options{Log: slog.New(slog.DiscardHandler)}}
	number := int64(240)
	all := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	one := specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &number, Access: "rwm"}
	for name, c := range map[string]struct {
		rule specs.LinuxDeviceCgroup
		path string
		kept int
	}{
		"host's disk":             {all, node, 1},
		"volume":                  {all, "/dev/xvda", 2},
		"not privileged":          {one, node, 2},
		"other number":            {all, filepath.Dir(node), 2},
		"all types, by that word": {specs.LinuxDeviceCgroup{Allow: true, Type: "a", Access: "rwm"}, node, 1},
	} {
		t.Run(name, func(t *testing.T) {
			spec := &specs.Spec{Linux: &specs.Linux{
				Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, c.rule}},
				Devices:   []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: c.path, Type: "b", Major: 240, Minor: 7}},
			}}
			got := s.withoutHostDisks("c", spec)
			if n := len(got.Linux.Devices); n != c.kept {
				t.Errorf("%d devices are kept: %v; want %d", n, got.Linux.Devices, c.kept)
			}
			if len(spec.Linux.Devices) != 2 {
				t.Error("the caller's specification was changed")
			}
		})
	}
}

// Only rates of the container's own block devices are for the guest.
func TestDiskRates(t *testing.T) {
	rate := func(major, minor int64) (d specs.LinuxThrottleDevice) {
		d.Major, d.Minor, d.Rate = major, minor, 7
		return d
	}
	weight := uint16(500)
	devices := []specs.LinuxDevice{{Path: "/dev/x", Type: "b", Major: 7, Minor: 1}, {Path: "/dev/c", Type: "c", Major: 8, Minor: 0}}
	got := diskRates(&specs.LinuxBlockIO{
		Weight:                &weight,
		ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{rate(8, 0), rate(7, 1)}, ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{rate(7, 0)},
	}, devices)
	if got == nil || got.Weight != nil || len(got.ThrottleReadBpsDevice) != 1 || got.ThrottleReadBpsDevice[0].Minor != 1 || got.ThrottleWriteIOPSDevice != nil {
		t.Errorf("%+v", got)
	}
	r := wireResources(&specs.LinuxResources{BlockIO: got})
	if d := r.BlockIO.ThrottleReadBpsDevice; len(d) != 1 || d[0].Major != 7 || d[0].Minor != 1 || d[0].Rate != 7 {
		t.Errorf("on the wire: %+v", r.BlockIO)
	}
	for _, b := range []*specs.LinuxBlockIO{nil, {Weight: &weight}, {ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{rate(8, 0)}}} {
		if got := diskRates(b, devices); got != nil {
			t.Errorf("%+v: %+v", b, got)
		}
	}
}
