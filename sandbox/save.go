// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/internal/channel"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/storage"
	"github.com/kata-v2/kata/sandbox/template"
)

// parkTimeout bounds how long the guest may take to come to rest, and to go on.
const parkTimeout = 30 * time.Second

// savable is what is kept of a machine that can be saved.
type savable struct {
	key    template.Key
	ports  int // for devices, those of its disks included
	memory *os.File
}

// keyer is a hypervisor that says on what its machines depend.
type keyer interface {
	machineKey(ctx context.Context, vc hypervisor.Config) (template.Key, error)
}

// makeSavable makes the machine of vc one that can be saved, or that is restored
// from a checkpoint.
func (s *Sandbox) makeSavable(ctx context.Context, m *machine, vc *hypervisor.Config, from *restore) error {
	h, ok := s.o.Hypervisor.(keyer)
	if !ok || s.o.Config.QEMU.MachineType == qemu.MicroVM {
		return fmt.Errorf("runtime.enable_checkpoint (set in %s): machine type %q cannot be saved, q35 can: %w",
			s.o.Config.Origin("runtime.enable_checkpoint"), s.o.Config.QEMU.MachineType, errdefs.ErrInvalidArgument)
	}
	vc.Vsock, vc.ReadyParam = hypervisor.VsockSerial, ""
	vc.KernelParams = append(slices.Clone(vc.KernelParams), protocols.ParamChannel+"="+channel.PortName)
	key, err := h.machineKey(ctx, *vc)
	if err != nil {
		return err
	}
	if from == nil {
		vc.Memory, err = template.NewMemory(int64(vc.MemoryBytes))
	} else {
		err = from.into(m, vc, key)
	}
	if err != nil {
		return err
	}
	m.saves = &savable{key: key, ports: vc.HotplugPorts + len(vc.Disks), memory: vc.Memory}
	return nil
}

// Checkpoint saves the pod in a directory that is new or empty: the machine with
// everything that runs in it, and what was written to its disks. The pod goes on
// afterwards, or ends. Whatever fails, the pod goes on and nothing is left in the
// directory. It is bounded by checkpoint.Timeout. A pod that cannot be saved is
// FailedPrecondition.
func (s *Sandbox) Checkpoint(ctx context.Context, dir string, end bool) (err error) {
	m, err := s.running()
	if err != nil {
		return err
	}
	if !m.saving.CompareAndSwap(false, true) {
		return fmt.Errorf("checkpoint: another one is under way: %w", errdefs.ErrUnavailable)
	}
	defer m.saving.Store(false)
	// Not every caller has a deadline of its own, and the pod stands still.
	ctx, cancel := context.WithTimeout(ctx, checkpoint.Timeout)
	defer cancel()
	if err := s.clearGuest(ctx); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	p, err := s.parkable(m)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	w, err := checkpoint.Create(dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Abort())
		}
	}()
	began := time.Now()
	manifest, err := s.manifest(ctx, m, p, w)
	if err != nil {
		return err
	}
	stood, err := s.still(ctx, m, p.containers, end, func() error {
		manifest.Created = time.Now().UTC()
		return m.saves.write(ctx, m.vm, w, manifest, p.disks)
	})
	if err != nil {
		return err
	}
	if err := w.Finish(*manifest); err != nil {
		return err
	}
	s.o.Log.Info("checkpoint made", "sandbox", s.o.ID, "path", dir, "ends", end, "t_checkpoint", time.Since(began), "t_stood", stood)
	if end {
		m.stopping.Store(true)
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return m.vm.Stop(sctx)
	}
	return nil
}

// still brings the pod to rest, runs f, and lets it go on unless it is to end and
// f has succeeded.
func (s *Sandbox) still(ctx context.Context, m *machine, all []*Container, end bool, f func() error) (stood time.Duration, err error) {
	pctx, cancel := context.WithTimeout(ctx, parkTimeout)
	defer cancel()
	undo := context.WithoutCancel(ctx)
	for _, c := range all {
		if c.init.State() != Running {
			continue
		}
		if _, err := m.agent.PauseContainer(pctx, &agentpb.PauseContainerRequest{ContainerId: c.guest}); err != nil {
			return 0, fmt.Errorf("checkpoint: freeze container %s: %w", c.id, m.agent.Err(err))
		}
		defer func() {
			if end && err == nil {
				return
			}
			rctx, cancel := context.WithTimeout(undo, parkTimeout)
			defer cancel()
			if _, rerr := m.agent.ResumeContainer(rctx, &agentpb.ResumeContainerRequest{ContainerId: c.guest}); rerr != nil {
				err = errors.Join(err, fmt.Errorf("checkpoint: container %s stays frozen: %w", c.id, m.agent.Err(rerr)))
			}
		}()
	}
	p := m.vm.(hypervisor.Parker)
	if err := m.agent.Park(pctx); err != nil {
		rctx, cancel := context.WithTimeout(undo, parkTimeout)
		defer cancel()
		return 0, fmt.Errorf("checkpoint: %w", errors.Join(err, m.agent.Attach(rctx)))
	}
	began := time.Now()
	if err = p.Park(pctx); err == nil {
		err = f()
	}
	if end && err == nil {
		return time.Since(began), nil
	}
	rctx, cancel := context.WithTimeout(undo, parkTimeout)
	defer cancel()
	if cerr := p.Continue(rctx); cerr != nil {
		// Nothing in it can be reached any more.
		m.endHung(fmt.Errorf("after a checkpoint: %w", cerr))
		return 0, errors.Join(err, cerr)
	}
	stood = time.Since(began)
	return stood, errors.Join(err, m.agent.Attach(rctx))
}

// write saves the machine, which stands still afterwards.
func (v *savable) write(ctx context.Context, vm hypervisor.VM, w *checkpoint.Writer, m *checkpoint.Manifest, disks []storage.Kept) error {
	state, err := w.State()
	if err != nil {
		return err
	}
	defer state.Close()
	if err := vm.(hypervisor.Snapshotter).Save(ctx, state); err != nil {
		return err
	}
	if m.Memory, err = w.Memory(v.memory); err != nil {
		return err
	}
	for i, d := range disks {
		if d.ReadOnly {
			continue
		}
		f, err := reopen(d.Parts[0].File)
		if err != nil {
			return err
		}
		content, err := w.Disk(d.ID, f)
		f.Close()
		if err != nil {
			return err
		}
		m.Disks[i].Content = &content
	}
	return nil
}

// reopen opens a file once more, so that the place in it is our own: QEMU has the other one.
func reopen(f *os.File) (*os.File, error) { return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())) }

// keepPart copies a piece of a disk into the checkpoint.
func keepPart(disk string, i int, p hypervisor.DiskPart, w *checkpoint.Writer) (checkpoint.File, error) {
	f, err := reopen(p.File)
	if err != nil {
		return checkpoint.File{}, err
	}
	defer f.Close()
	return w.Part(disk, i, f)
}

// StandsForPod refuses the checkpoint of one container of several: the machine is
// saved as a whole. The pod's first container, whose id is the pod's, stands for all.
func (s *Sandbox) StandsForPod(container string) error {
	if container == s.o.ID {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.containers {
		if id != container && c.spec.Annotations[containerTypeKey] != "sandbox" {
			return unsavable("container %s shares its machine with container %s: what can be saved is the pod (kata-ctl checkpoint %s DIRECTORY)", container, id, s.o.ID)
		}
	}
	return nil
}

// parked is what is saved of a pod.
type parked struct {
	containers []*Container           // by id
	waiting    []checkpoint.Container // of the checkpoint that the pod began with
	disks      []storage.Kept
}

// unsavable is the reason why a pod cannot be saved.
func unsavable(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrFailedPrecondition)...)
}

// parkable is what is to be saved, or the reason why the pod cannot be.
func (s *Sandbox) parkable(m *machine) (*parked, error) {
	switch {
	case m.daemon.Load() != nil:
		return nil, unsavable("the pod shares files of the host by virtio-fs, whose device QEMU cannot save: use roots on disks (docs/storage.md), volumes that are synced, and runtime.enable_checkpoint")
	case m.saves == nil && m.vm.Info().Vsock == hypervisor.VsockVhostUser:
		return nil, unsavable("the pod has a vhost-user-vsock device, which QEMU cannot save: start it with runtime.enable_checkpoint")
	case m.saves == nil:
		return nil, unsavable("the pod was not started with runtime.enable_checkpoint, so its memory is not where it could be saved")
	}
	s.mu.Lock()
	p := &parked{waiting: s.restore.waiting()}
	var making, names []string
	for id, c := range s.containers {
		p.containers = append(p.containers, c)
		if names = append(names, c.name()); !c.published {
			making = append(making, id)
		}
	}
	left := len(s.leftInGuest)
	s.mu.Unlock()
	for _, w := range p.waiting {
		names = append(names, w.Name)
	}
	switch twice := duplicate(names); {
	case len(making) > 0:
		return nil, unsavable("container %s is being created", making[0])
	case left > 0:
		return nil, unsavable("a container that was deleted is still in the guest")
	case twice != "":
		return nil, unsavable("two containers have the name %s, by which a restored pod finds them", twice)
	}
	slices.SortFunc(p.containers, func(a, b *Container) int { return strings.Compare(a.id, b.id) })
	for _, c := range p.containers {
		if err := c.parkable(); err != nil {
			return nil, err
		}
	}
	var err error
	if p.disks, err = s.disks.Kept(); err != nil {
		return nil, err
	}
	for _, d := range p.disks {
		for _, part := range d.Parts {
			st, err := part.File.Stat()
			if err != nil {
				return nil, err
			}
			if !st.Mode().IsRegular() {
				return nil, unsavable("disk %s is the block device %s: only files are kept", d.ID, part.File.Name())
			}
		}
	}
	return p, nil
}

// parkable refuses a container that cannot be saved.
func (c *Container) parkable() error {
	if state := c.init.State(); state == Stopped || state == Deleted {
		return unsavable("container %s is %s: delete it first", c.id, state)
	}
	if len(c.direct) > 0 {
		return unsavable("container %s has a direct-assigned volume, whose content is not the pod's", c.id)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, p := range c.execs {
		if state := p.State(); state == Running {
			return unsavable("process %s, which was added to container %s, runs: its client would be lost; wait for its end", id, c.id)
		}
	}
	return nil
}
