// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/sandbox/storage"
)

// blockMounts is the specification with its bind mounts of block devices as
// devices: what is mounted is the node, and the guest's has another number.
func blockMounts(spec *specs.Spec) *specs.Spec {
	var mounts []specs.Mount
	var devices []specs.LinuxDevice
	var rules []specs.LinuxDeviceCgroup
	for _, m := range spec.Mounts {
		st, err := os.Stat(m.Source)
		if m.Type != "bind" && m.Type != "rbind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") ||
			err != nil || st.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
			mounts = append(mounts, m)
			continue
		}
		sys := st.Sys().(*syscall.Stat_t)
		mode, major, minor, access := st.Mode().Perm(), int64(unix.Major(sys.Rdev)), int64(unix.Minor(sys.Rdev)), "rwm"
		if readOnly(m.Options) {
			access = "rm"
		}
		devices = append(devices, specs.LinuxDevice{Path: m.Destination, Type: "b", Major: major, Minor: minor, FileMode: &mode, UID: &sys.Uid, GID: &sys.Gid})
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: access})
	}
	if len(devices) == 0 || spec.Linux == nil {
		return spec
	}
	g, l, r := *spec, *spec.Linux, specs.LinuxResources{}
	if l.Resources != nil {
		r = *l.Resources
	}
	r.Devices = append(slices.Clone(r.Devices), rules...)
	l.Devices, l.Resources = append(slices.Clone(l.Devices), devices...), &r
	g.Mounts, g.Linux = mounts, &l
	return &g
}

// withoutHostDisks is the specification of a container that may use every device,
// as a privileged one may, without the disks of the host. containerd lists them
// all for it by the host's own names, unless privileged_without_host_devices is
// set; a volume has a name that the pod chose.
func (s *Sandbox) withoutHostDisks(container string, spec *specs.Spec) *specs.Spec {
	if spec.Linux == nil || !everyDevice(spec.Linux.Resources) {
		return spec
	}
	var left []string
	devices := slices.DeleteFunc(slices.Clone(spec.Linux.Devices), func(d specs.LinuxDevice) bool {
		var st unix.Stat_t
		if d.Type != "b" || unix.Lstat(d.Path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != unix.Mkdev(uint32(d.Major), uint32(d.Minor)) {
			return false
		}
		left = append(left, d.Path)
		return true
	})
	if len(left) == 0 {
		return spec
	}
	s.o.Log.Warn("disks of the host are left out of a container that may use every device; set privileged_without_host_devices", "container", container, "devices", left)
	g, l := *spec, *spec.Linux
	l.Devices = devices
	g.Linux = &l
	return &g
}

// everyDevice tells whether one rule allows all devices.
func everyDevice(r *specs.LinuxResources) bool {
	return r != nil && slices.ContainsFunc(r.Devices, func(rule specs.LinuxDeviceCgroup) bool {
		return rule.Allow && (rule.Type == "" || rule.Type == "a") && rule.Major == nil && rule.Minor == nil && strings.Contains(rule.Access, "w")
	})
}

// device is a block device of the specification, open.
type device struct {
	path   string // in the container
	source *storage.Source
}

// openDevices opens the block devices of a specification.
func (s *Sandbox) openDevices(spec *specs.Spec) (out []device, err error) {
	defer func() {
		if err != nil {
			for _, d := range out {
				d.source.Close()
			}
			out = nil
		}
	}()
	for i, d := range spec.Linux.Devices {
		if d.Type != "b" {
			continue
		}
		src, err := s.openDevice(spec.Linux.Resources, d)
		if err != nil {
			return out, fmt.Errorf("linux.devices[%d] (%s): %w", i, d.Path, err)
		}
		out = append(out, device{d.Path, src})
	}
	return out, nil
}

func (s *Sandbox) openDevice(r *specs.LinuxResources, d specs.LinuxDevice) (*storage.Source, error) {
	path, err := hostDevice(d.Major, d.Minor)
	if err != nil {
		return nil, err
	}
	return s.disks.OpenSource(path, !writable(r, d))
}

// sysBlock lists block devices by number.
const sysBlock = "/sys/dev/block"

// hostDevice is the node of a block device of the host (kernel
// Documentation/ABI/stable/sysfs-dev; its uevent file names it below /dev).
func hostDevice(major, minor int64) (string, error) {
	data, err := os.ReadFile(filepath.Join(sysBlock, fmt.Sprintf("%d:%d", major, minor), "uevent"))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("the host has no block device %d:%d: %w", major, minor, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME=")
		if !ok {
			continue
		}
		path := filepath.Join("/dev", name)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return "", fmt.Errorf("block device %d:%d: %s: %w", major, minor, path, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != unix.Mkdev(uint32(major), uint32(minor)) {
			return "", fmt.Errorf("%s is not the block device %d:%d: %w", path, major, minor, errdefs.ErrFailedPrecondition)
		}
		return path, nil
	}
	return "", fmt.Errorf("block device %d:%d has no name: %w", major, minor, errdefs.ErrNotFound)
}

// writable tells whether the container may write a device: the last rule about its
// number says so, and without one it may.
func writable(r *specs.LinuxResources, d specs.LinuxDevice) bool {
	may := true
	if r == nil {
		return may
	}
	for _, rule := range r.Devices {
		if rule.Allow && rule.Type != "c" && rule.Major != nil && rule.Minor != nil && *rule.Major == d.Major && *rule.Minor == d.Minor {
			may = strings.Contains(rule.Access, "w")
		}
	}
	return may
}
