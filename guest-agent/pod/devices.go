// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// DeviceTypes lists the values of Device.type that are handled (agent-protocol
// facts of Kata Containers 4.1, part E).
func DeviceTypes() []string { return []string{"blk", "mmioblk", "nvdimm", "scsi"} }

// addDevices gives the container the guest's numbers of devices that the host
// has attached: the specification carries the host's. It returns what has become of
// those, for limits that are changed later.
func (p *Pod) addDevices(ctx context.Context, spec *specs.Spec, devs []*agentpb.Device) (numbers, error) {
	moved := numbers{}
	for _, d := range devs {
		if !slices.Contains(DeviceTypes(), d.Type) {
			return nil, fault.New(fault.InvalidArgument, "device %s: type %q: want one of %v", d.Id, d.Type, DeviceTypes())
		}
		if !filepath.IsAbs(d.ContainerPath) {
			return nil, fault.New(fault.InvalidArgument, "device %s: container_path %q: want an absolute path", d.Id, d.ContainerPath)
		}
		node, err := p.deviceNode(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.ContainerPath, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(node, &st); err != nil {
			return nil, fmt.Errorf("device %s: %s: %w", d.ContainerPath, node, err)
		}
		moved.device(spec, d.ContainerPath, numberOf("b", st.Rdev))
	}
	if err := charDevices(spec, moved, "/dev", "/sys/dev/char"); err != nil {
		return nil, err
	}
	moved.limits(spec.Linux.Resources)
	return moved, nil
}

func (p *Pod) deviceNode(ctx context.Context, d *agentpb.Device) (string, error) {
	if err := p.cfg.Modules.Ensure(boot.GroupBlock); err != nil {
		return "", err
	}
	switch {
	case d.Type == "scsi":
		return p.cfg.Finder.BlockBySCSI(ctx, d.Id)
	case d.Type == "blk" && !filepath.IsAbs(d.Id) && d.Id != "":
		return p.cfg.Finder.BlockByPCI(ctx, d.Id)
	case d.VmPath != "":
		return p.cfg.Finder.BlockByName(ctx, d.VmPath)
	}
	return p.cfg.Finder.BlockByName(ctx, d.Id)
}

// applyUser replaces the user by one given as numbers in text.
func applyUser(spec *specs.Spec, u *agentpb.StringUser) error {
	if u == nil || (u.Uid == "" && u.Gid == "" && len(u.AdditionalGids) == 0) {
		return nil
	}
	num := func(field, s string, dst *uint32) error {
		if s == "" {
			return nil
		}
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return fault.New(fault.InvalidArgument, "string_user.%s %q: want a number", field, s)
		}
		*dst = uint32(n)
		return nil
	}
	if err := num("uid", u.Uid, &spec.Process.User.UID); err != nil {
		return err
	}
	if err := num("gid", u.Gid, &spec.Process.User.GID); err != nil {
		return err
	}
	for _, g := range u.AdditionalGids {
		var n uint32
		if err := num("additionalGids", g, &n); err != nil {
			return err
		}
		spec.Process.User.AdditionalGids = append(spec.Process.User.AdditionalGids, n)
	}
	return nil
}
