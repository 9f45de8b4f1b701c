// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/storage"
)

// daemon is a virtio-fs daemon that start runs, and the VMM's end of its connection.
// guest is the most memory that the guest can have, in bytes.
func (s *Sandbox) daemon(dir string, guest uint64, started func(name string, pid int) error) (start func(context.Context) (*storage.Daemon, error), share hypervisor.Share, err error) {
	path, err := s.o.Config.Virtiofsd()
	if err != nil {
		return nil, share, err
	}
	listener, client, err := storage.Listen(filepath.Join(s.o.Ledger.Dir(), "fs.sock"))
	if err != nil {
		return nil, share, err
	}
	start = func(ctx context.Context) (*storage.Daemon, error) {
		return storage.StartDaemon(ctx, storage.DaemonOptions{
			Path: path, Cache: s.o.Config.QEMU.VirtioFSCache, ExtraArgs: s.o.Config.QEMU.VirtioFSExtraArgs,
			FileHandles: s.o.Config.QEMU.VirtioFSInodeFileHandles, GuestBytes: guest, Dir: dir, Started: started,
		}, listener)
	}
	return start, hypervisor.Share{Tag: protocols.SharedTag, Conn: client}, nil
}

// shareStorage has the guest mount the pod's share, once.
func shareStorage() *agentpb.Storage {
	return &agentpb.Storage{
		Driver: "virtio-fs", Source: protocols.SharedTag, Fstype: "virtiofs", MountPoint: protocols.GuestSharedDir + "/", Shared: true,
	}
}

// plugShare gives a machine that was started without a share one, when the first
// container needs it. What it returns is for the guest, and for each such
// container: the guest mounts the share for the first of them.
func (s *Sandbox) plugShare(ctx context.Context, m *machine, disks *containerDisks, c *Container) ([]*agentpb.Storage, error) {
	if !m.late || disks.root != nil && len(c.shared) == 0 {
		return nil, nil
	}
	if s.o.Config.QEMU.SharedFS == "none" {
		return nil, fmt.Errorf("the container needs a shared filesystem, and hypervisor.qemu.shared_fs is \"none\" (set in %s): %w",
			s.o.Config.Origin("hypervisor.qemu.shared_fs"), errdefs.ErrFailedPrecondition)
	}
	if s.o.Config.Runtime.EnableCheckpoint {
		return nil, fmt.Errorf("the container needs a shared filesystem, with which a machine cannot be saved, and runtime.enable_checkpoint is set (in %s): give it a root filesystem on disks (erofs or blockfile snapshotter) and no host directories: %w",
			s.o.Config.Origin("runtime.enable_checkpoint"), errdefs.ErrFailedPrecondition)
	}
	select {
	case m.plugging <- struct{}{}:
		defer func() { <-m.plugging }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if m.daemon.Load() == nil {
		if err := s.startLateDaemon(ctx, m); err != nil {
			return nil, fmt.Errorf("share files with the running machine: %w", err)
		}
	}
	return []*agentpb.Storage{shareStorage()}, nil
}

// startLateDaemon starts virtiofsd and plugs its device in.
func (s *Sandbox) startLateDaemon(ctx context.Context, m *machine) error {
	p, ok := m.vm.(hypervisor.SharePlugger)
	if !ok {
		return fmt.Errorf("its hypervisor cannot do so: %w", errdefs.ErrNotImplemented)
	}
	share, err := s.share()
	if err != nil {
		return err
	}
	begin := time.Now()
	start, device, err := s.daemon(share.Dir(), m.sizer.bounds.most.memory, func(name string, pid int) error { return s.recordProcess(m, name, pid) })
	if err != nil {
		return err
	}
	d, err := start(ctx)
	if err != nil {
		device.Conn.Close()
		return err
	}
	if err := p.PlugShare(ctx, device); err != nil {
		d.Expect()
		d.Stop()
		return err
	}
	m.daemon.Store(d)
	if !m.work(func() { m.keepDaemon(d) }) {
		d.Expect()
		d.Stop()
		return ErrStopped
	}
	m.work(func() { m.keepKnown(d) })
	s.o.Log.Info("share plugged", "sandbox", s.o.ID, "t_share", time.Since(begin))
	return nil
}

// keepDaemon ends the machine with the daemon, and the daemon with the machine.
func (m *machine) keepDaemon(d *storage.Daemon) {
	select {
	case <-d.Done():
		close(m.lost)
	case <-m.ctx.Done():
		d.Expect()
		d.Stop()
	}
}
