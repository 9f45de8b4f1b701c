// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/internal/directvolume"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
	"github.com/kata-v2/kata/sandbox/storage"
)

// directMount is a mount of a container whose source is a direct-assigned volume,
// or one that the host has mounted read-only.
type directMount struct {
	index   int
	volume  string // its path on the host
	info    *directvolume.MountInfo
	mounted bool // on the host, and so not in the register
}

// planDirect finds the mount's volume in the host's register; its place in the
// guest is "" when it is not there.
func (c *Container) planDirect(i int, m specs.Mount) (string, error) {
	volume := filepath.Clean(m.Source)
	info, err := directvolume.Load(c.s.o.DirectVolumes, volume)
	if info == nil || err != nil {
		return "", err
	}
	c.direct = append(c.direct, directMount{index: i, volume: volume, info: info})
	return guestVolume(volume), nil
}

// planMounted makes a disk of a volume that is a file system on a block device of
// its own, read-only on the host as in the container; its place in the guest is
// "" for any other, which is shared.
func (c *Container) planMounted(share *storage.Share, i int, m specs.Mount) (string, error) {
	q := &c.s.o.Config.QEMU
	o := bindOptions(m)
	if !o.ReadOnly || !o.Private || q.DisableBlockDeviceUse || q.MachineType == qemu.MicroVM {
		return "", nil
	}
	d, reason, err := share.MountedDisk(m.Source, o.Recursive)
	if err != nil {
		return "", err
	}
	var device string
	if d != nil {
		if device, err = hostDevice(d.Major, d.Minor); err != nil {
			reason = err.Error()
		} else if c.s.disks.Attached()+len(c.direct) >= diskPorts/2 {
			reason = "the machine has many disks already"
		}
	}
	if reason != "" {
		c.s.o.Log.Info("volume shared", "container", c.id, "destination", m.Destination, "reason", reason)
	}
	if d == nil || reason != "" {
		return "", nil
	}
	volume := filepath.Clean(m.Source)
	c.direct = append(c.direct, directMount{index: i, volume: volume, mounted: true,
		info: &directvolume.MountInfo{VolumeType: directvolume.TypeBlock, Device: device, FSType: d.FSType, Options: d.Options}})
	c.s.o.Log.Info("volume on a disk", "container", c.id, "destination", m.Destination, "device", device, "type", d.FSType)
	return guestVolume(volume), nil
}

// guestVolume is where a direct-assigned volume is mounted in the guest
// (agent-protocol facts, part F).
func guestVolume(volume string) string {
	return filepath.Join(protocols.GuestSandboxDir, "storage", directvolume.Name(volume))
}

// attachDirect makes the container's direct-assigned volumes disks of the machine
// and says how the guest is to mount them. Disks.Release and leaveDirect undo it.
func (c *Container) attachDirect(ctx context.Context, m *machine) ([]*agentpb.Storage, error) {
	var out []*agentpb.Storage
	for _, d := range c.direct {
		wrong := func(err error) error {
			mount := c.spec.Mounts[d.index]
			what := "direct-assigned volume"
			if d.mounted {
				what = "disk of volume"
			}
			return fmt.Errorf("mounts[%d] (%s): %s %s: %w", d.index, mount.Destination, what, d.volume, err)
		}
		place, err := c.s.disks.AttachPath(ctx, m.vm, c.id, d.info.Device, slices.Contains(d.info.Options, "ro"))
		if err != nil {
			return nil, wrong(err)
		}
		if !d.mounted {
			if err := directvolume.Use(c.s.o.DirectVolumes, d.volume, c.s.o.ID); err != nil {
				return nil, wrong(err)
			}
		}
		out = append(out, &agentpb.Storage{
			Driver: "blk", Source: place, Fstype: d.info.FSType, Options: d.info.Options,
			MountPoint: guestVolume(d.volume), FsGroup: fsGroup(d.info),
		})
	}
	return out, nil
}

// fsGroup is the group that the guest gives the volume's files to.
func fsGroup(info *directvolume.MountInfo) *agentpb.FSGroup {
	gid, err := strconv.ParseUint(info.Metadata[directvolume.KeyFSGroup], 10, 31)
	if err != nil {
		return nil // Load has checked what is there
	}
	g := &agentpb.FSGroup{GroupId: uint32(gid)}
	if info.Metadata[directvolume.KeyFSGroupPolicy] == directvolume.PolicyOnRootMismatch {
		g.GroupChangePolicy = typespb.FSGroupChangePolicy_OnRootMismatch
	}
	return g
}

// leaveDirect takes the pod's notes out of the register, those of volumes that no
// other container of it has.
func (c *Container) leaveDirect() {
	for _, d := range c.direct {
		if _, err := c.s.directVolume(d.volume, c); err == nil || d.mounted {
			continue
		}
		if err := directvolume.Leave(c.s.o.DirectVolumes, d.volume, c.s.o.ID); err != nil {
			c.s.o.Log.Warn("register of direct-assigned volumes", "error", err)
		}
	}
}

// directVolume finds a volume that a container of the pod has, except but.
func (s *Sandbox) directVolume(volume string, but *Container) (*directvolume.MountInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		if c == but || !c.published {
			continue
		}
		for _, d := range c.direct {
			if d.volume == volume && !d.mounted {
				return d.info, nil
			}
		}
	}
	return nil, fmt.Errorf("no container of the pod has the direct-assigned volume %s: %w", volume, errdefs.ErrNotFound)
}

// VolumeStats measures a direct-assigned volume, by its path on the host.
func (s *Sandbox) VolumeStats(ctx context.Context, volume string) (*agentpb.VolumeStatsResponse, error) {
	m, err := s.running()
	if err != nil {
		return nil, err
	}
	volume = filepath.Clean(volume)
	if _, err := s.directVolume(volume, nil); err != nil {
		return nil, err
	}
	resp, err := m.agent.GetVolumeStats(ctx, &agentpb.VolumeStatsRequest{VolumeGuestPath: guestVolume(volume)})
	return resp, m.agent.Err(err)
}

// ResizeVolume grows a direct-assigned volume, by its path on the host: the disk,
// whose device must have grown already, then the file system on it.
func (s *Sandbox) ResizeVolume(ctx context.Context, volume string, bytes uint64) error {
	m, err := s.running()
	if err != nil {
		return err
	}
	volume = filepath.Clean(volume)
	info, err := s.directVolume(volume, nil)
	if err != nil {
		return err
	}
	if bytes == 0 || bytes%512 != 0 {
		return fmt.Errorf("size %d of volume %s: want a positive multiple of 512 bytes: %w", bytes, volume, errdefs.ErrInvalidArgument)
	}
	now, err := s.VolumeStats(ctx, volume)
	if err != nil {
		return err
	}
	for _, u := range now.Usage {
		if u.Unit == agentpb.VolumeUsage_BYTES && bytes < u.Total {
			return fmt.Errorf("size %d of volume %s: it has %d bytes now, and volumes do not shrink: %w", bytes, volume, u.Total, errdefs.ErrInvalidArgument)
		}
	}
	if err := s.disks.Resize(ctx, m.vm, info.Device, bytes); err != nil {
		return fmt.Errorf("volume %s: %w", volume, err)
	}
	_, err = m.agent.ResizeVolume(ctx, &agentpb.ResizeVolumeRequest{VolumeGuestPath: guestVolume(volume), Size: bytes})
	return m.agent.Err(err)
}
