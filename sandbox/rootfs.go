// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/qemu"
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
	disks, err := root.Open(s.disks)
	if err != nil {
		return nil, err
	}
	s.o.Log.Info("root filesystem", "container", cc.ID, "path", rootBlock, "reason", why, "disks", len(disks.Sources()))
	return disks, nil
}

// containerDisks are the open disks of a container.
type containerDisks struct {
	root    *storage.RootDisks // nil for a root in the share
	devices []device
}

// openDisks opens and checks all disks of a container, before anything is started
// for it.
func (s *Sandbox) openDisks(cc ContainerConfig) (_ *containerDisks, err error) {
	d := &containerDisks{}
	if d.root, err = s.openRoot(cc); err != nil {
		return nil, err
	}
	if d.devices, err = s.openDevices(cc.Spec); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// sources are all of them.
func (d *containerDisks) sources() (out []*storage.Source) {
	if d.root != nil {
		out = d.root.Sources()
	}
	for _, dev := range d.devices {
		out = append(out, dev.source)
	}
	return out
}

// close closes what is in no machine.
func (d *containerDisks) close() {
	for _, s := range d.sources() {
		s.Close()
	}
}

// first is what the machine is to have of the container that boots it.
type first struct {
	container string
	disks     []*storage.Source
	alone     bool // nobody has said that other containers will come
	// noShare: nothing of the host is shared with the guest at its start; shareLater:
	// other containers may need that.
	noShare, shareLater bool
	restore             *restore  // of the pod, nil for one that boots
	takeover            *takeover // of the container, not nil then; nil in a pod that starts without
}

// groupKey is set by clients of containerd on a container that others are to join.
const groupKey = "io.containerd.runc.v2.group"

// firstOf is that container's part of the machine.
func (s *Sandbox) firstOf(c *Container, disks *containerDisks) first {
	alone := c.id == s.o.ID && c.spec.Annotations[containerTypeKey] == ""
	f := first{container: c.id, disks: disks.sources(), alone: alone && c.spec.Annotations[groupKey] == ""}
	switch {
	case s.o.Config.QEMU.SharedFS == "none", s.o.Config.Runtime.EnableCheckpoint: // one with a share cannot be saved
		f.noShare = true
	case disks.root != nil && len(c.shared) == 0:
		f.noShare = f.alone || s.plugsShares()
		f.shareLater = f.noShare && !f.alone
	}
	return f
}

// firstOfPod is that of a pod that begins without a container.
func (s *Sandbox) firstOfPod() first {
	if s.o.Config.QEMU.SharedFS == "none" || s.o.Config.Runtime.EnableCheckpoint {
		return first{noShare: true}
	}
	later := s.o.Config.QEMU.VirtioFSWhenNeeded && s.plugsShares()
	return first{noShare: later, shareLater: later}
}

// plugsShares tells whether a running machine can be given a share.
func (s *Sandbox) plugsShares() bool { return s.o.Config.QEMU.MachineType != qemu.MicroVM }

// bootDisks adds the first container's disks to the machine.
func (s *Sandbox) bootDisks(vc *hypervisor.Config, f first) {
	vc.Disks = s.disks.Boot(f.container, f.disks)
}

// attach makes a container's disks disks of the machine, those that it does not
// have yet, and says what the guest is to do with them. s.detach undoes it. The
// files belong to the machine or are closed.
func (c *Container) attach(ctx context.Context, m *machine, d *containerDisks) (storages []*agentpb.Storage, devices []*agentpb.Device, err error) {
	defer d.close()
	places := map[*storage.Source]string{}
	for _, src := range d.sources() {
		if places[src], err = c.s.disks.Attach(ctx, m.vm, c.id, src); err != nil {
			return nil, nil, err
		}
	}
	if d.root != nil {
		storages = d.root.Storages(c.id, places[d.root.Layers], places[d.root.Upper])
	}
	for _, dev := range d.devices {
		devices = append(devices, &agentpb.Device{Id: places[dev.source], Type: "blk", ContainerPath: dev.path})
	}
	return storages, devices, nil
}

// detach gives back the disks of a container that the guest does not have any more.
func (s *Sandbox) detach(ctx context.Context, id string) error {
	m, err := s.running()
	if err != nil {
		return nil //nolint:nilerr // they went with the machine
	}
	if err := s.disks.Release(ctx, m.vm, id); err != nil && !m.ending() {
		return fmt.Errorf("container %s: %w", id, err)
	}
	return nil
}
