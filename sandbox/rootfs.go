// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/storage"
)

// The ways of a container's root filesystem into the guest, as they are logged.
const (
	rootBlock = "block"
	rootShare = "virtio-fs"
)

// diskPorts is how many disks a running machine can get, two for each container
// with a root of its own.
const diskPorts = 12

// MountsBlock tells whether root filesystems that the guest can mount from disks
// are to be handed over unmounted.
func MountsBlock(c *config.Config) bool { return !c.QEMU.DisableBlockDeviceUse }

// openRoot decides how the container's root filesystem reaches the guest and
// opens its disks; nil means the share.
func (s *Sandbox) openRoot(cc ContainerConfig) (*storage.RootDisks, error) {
	root, reason, err := storage.PlanRoot(cc.Rootfs)
	if err != nil {
		return nil, err
	}
	why := reason
	if root != nil && !MountsBlock(s.o.Config) {
		if len(root.Lowers) > 0 {
			return nil, fmt.Errorf("rootfs: %s, which containerd has not mounted because the runtime's general configuration takes disks, and %s forbids them here: set hypervisor.qemu.disable_block_device_use there: %w",
				reason, s.o.Config.Origin("hypervisor.qemu.disable_block_device_use"), errdefs.ErrFailedPrecondition)
		}
		root, why = nil, reason+", and disable_block_device_use is set"
	}
	if root == nil {
		if s.o.Config.QEMU.SharedFS == "none" {
			return nil, fmt.Errorf("rootfs: %s, which needs a shared filesystem, and hypervisor.qemu.shared_fs is \"none\" (set in %s): use the erofs or blockfile snapshotter: %w",
				why, s.o.Config.Origin("hypervisor.qemu.shared_fs"), errdefs.ErrFailedPrecondition)
		}
		s.o.Log.Info("root filesystem", "container", cc.ID, "path", rootShare, "reason", why)
		return nil, nil
	}
	disks, err := root.Open()
	if err != nil {
		return nil, err
	}
	s.o.Log.Info("root filesystem", "container", cc.ID, "path", rootBlock, "reason", why, "disks", len(disks.Sources()))
	return disks, nil
}

// first is what the machine is to have of the container that boots it.
type first struct {
	container string
	disks     *storage.RootDisks // nil for a root in the share
	noShare   bool               // nothing of the host is shared with the guest
}

// firstOf is that container's part of the machine.
func (s *Sandbox) firstOf(c *Container, disks *storage.RootDisks) first {
	alone := c.id == s.o.ID && c.spec.Annotations[containerTypeKey] == ""
	return first{container: c.id, disks: disks, noShare: s.o.Config.QEMU.SharedFS == "none" || alone && disks != nil && len(c.shared) == 0}
}

// needsShare refuses a container that the pod's machine, without a share, cannot have.
func (m *machine) needsShare(disks *storage.RootDisks, c *Container) error {
	if m.daemon != nil || disks != nil && len(c.shared) == 0 {
		return nil
	}
	return fmt.Errorf("the pod's machine was started without a shared filesystem, which this container needs: name the pod's id in the first container too, or set shared_fs to \"virtio-fs\": %w", errdefs.ErrFailedPrecondition)
}

// bootDisks adds the first container's disks to the machine.
func (s *Sandbox) bootDisks(vc *hypervisor.Config, f first) {
	if f.disks != nil {
		vc.Disks = s.disks.Boot(f.container, f.disks.Sources())
	}
}

// closeDisks closes what was opened and is in no machine.
func closeDisks(d *storage.RootDisks) {
	if d != nil {
		d.Close()
	}
}

// attachRoot makes the root's disks disks of the machine, unless it has them, and
// says how the guest is to mount them. Release undoes it.
func (c *Container) attachRoot(ctx context.Context, m *machine, d *storage.RootDisks) ([]*agentpb.Storage, error) {
	if d == nil {
		return nil, nil
	}
	places := map[*storage.Source]string{}
	for i, src := range d.Sources() {
		place, err := c.s.disks.Attach(ctx, m.vm, c.id, src)
		if err != nil {
			for _, rest := range d.Sources()[i+1:] {
				rest.Close()
			}
			return nil, fmt.Errorf("rootfs: %w", err)
		}
		places[src] = place
	}
	return d.Storages(c.id, places[d.Layers], places[d.Upper]), nil
}

// detach gives back the disks of a container that the guest does not have any more.
func (s *Sandbox) detach(ctx context.Context, id string) error {
	m, err := s.running()
	if err != nil {
		return nil //nolint:nilerr // they went with the machine
	}
	if err := s.disks.Release(ctx, m.vm, id); err != nil && !m.ending() {
		return errors.Join(fmt.Errorf("container %s", id), err)
	}
	return nil
}
