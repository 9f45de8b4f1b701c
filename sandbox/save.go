// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/hypervisor/qemu"
	"github.com/kata-v2/kata/internal/channel"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/template"
)

// parkTimeout bounds how long the guest may take to come to rest, and to go on.
const parkTimeout = 30 * time.Second

// savable is what is kept of a machine that can be saved.
type savable struct {
	key    template.Key
	memory *os.File
	disks  []hypervisor.Disk // their files are ours
}

func (v *savable) close() {
	v.memory.Close()
	for _, d := range v.disks {
		d.Close()
	}
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
	own, err := hypervisor.Config{Disks: vc.Disks}.Dup()
	if err != nil {
		vc.Memory.Close()
		return err
	}
	m.saves = &savable{key: key, memory: vc.Memory, disks: own.Disks}
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
	c, err := s.checkpointed(m)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	// Not every caller has a deadline of its own, and the pod stands still.
	ctx, cancel := context.WithTimeout(ctx, checkpoint.Timeout)
	defer cancel()
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
	manifest, err := c.manifest(ctx, m)
	if err != nil {
		return err
	}
	stood, err := s.still(ctx, m, c, end, func() error {
		manifest.Created = time.Now().UTC()
		return m.saves.write(ctx, m.vm, w, manifest)
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
func (s *Sandbox) still(ctx context.Context, m *machine, c *Container, end bool, f func() error) (stood time.Duration, err error) {
	pctx, cancel := context.WithTimeout(ctx, parkTimeout)
	defer cancel()
	undo := context.WithoutCancel(ctx)
	if c.init.State() == Running {
		req := &agentpb.PauseContainerRequest{ContainerId: c.id}
		if _, err := m.agent.PauseContainer(pctx, req); err != nil {
			return 0, fmt.Errorf("checkpoint: freeze container %s: %w", c.id, m.agent.Err(err))
		}
		defer func() {
			if end && err == nil {
				return
			}
			rctx, cancel := context.WithTimeout(undo, parkTimeout)
			defer cancel()
			if _, rerr := m.agent.ResumeContainer(rctx, &agentpb.ResumeContainerRequest{ContainerId: c.id}); rerr != nil {
				err = errors.Join(err, fmt.Errorf("checkpoint: the container stays frozen: %w", m.agent.Err(rerr)))
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
func (v *savable) write(ctx context.Context, vm hypervisor.VM, w *checkpoint.Writer, m *checkpoint.Manifest) error {
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
	for i, d := range v.disks {
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

// checkpointed is the container of a pod that can be saved, or the reason why it cannot.
func (s *Sandbox) checkpointed(m *machine) (*Container, error) {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrFailedPrecondition)...)
	}
	switch {
	case m.daemon.Load() != nil:
		return nil, refuse("the pod shares files of the host by virtio-fs, whose device QEMU cannot save: use roots on disks (docs/storage.md), volumes that are synced, and runtime.enable_checkpoint")
	case m.saves == nil && m.vm.Info().Vsock == hypervisor.VsockVhostUser:
		return nil, refuse("the pod has a vhost-user-vsock device, which QEMU cannot save: start it with runtime.enable_checkpoint")
	case m.saves == nil:
		return nil, refuse("the pod was not started with runtime.enable_checkpoint, so its memory is not where it could be saved")
	}
	s.mu.Lock()
	pod := s.pod
	var all []*Container
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	if pod != nil || len(all) != 1 || all[0].id != s.o.ID {
		return nil, refuse("the pod has %d containers, or began without any: only one that is a single container can be saved", len(all))
	}
	c := all[0]
	if state := c.init.State(); state == Stopped || state == Deleted {
		return nil, refuse("container %s is %s", c.id, state)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, p := range c.execs {
		if state := p.State(); state == Running {
			return nil, refuse("process %s, which was added to container %s, runs: its client would be lost; wait for its end", id, c.id)
		}
	}
	if n := s.disks.Attached(); n != len(m.saves.disks) {
		return nil, refuse("%d of the pod's %d disks were attached while it ran", n-len(m.saves.disks), n)
	}
	for _, d := range m.saves.disks {
		st, err := d.Parts[0].File.Stat()
		if err != nil {
			return nil, err
		}
		if !d.ReadOnly && !st.Mode().IsRegular() {
			return nil, refuse("disk %s is the block device %s: only files are kept", d.ID, d.Parts[0].File.Name())
		}
	}
	return c, nil
}

// manifest says what the checkpoint of a pod of one container is, but for what is
// only known when it stands still.
func (c *Container) manifest(ctx context.Context, m *machine) (*checkpoint.Manifest, error) {
	spec, err := json.Marshal(c.spec)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: specification: %w", err)
	}
	w := c.init.wants
	out := &checkpoint.Manifest{
		Sandbox: c.s.o.ID, Machine: m.saves.key,
		Containers: []checkpoint.Container{{
			ID: c.id, Bundle: c.bundle, State: c.init.State().String(), PID: c.init.GuestPID(),
			Terminal: c.init.Terminal(), Stdin: w.Stdin, Stdout: w.Stdout, Stderr: w.Stderr, Spec: spec,
		}},
	}
	if out.Disks, err = describeDisks(m.saves.disks); err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	interfaces, routes, err := m.net.Guest(ctx)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: network: %w", err)
	}
	if out.Interfaces, err = wireJSON(interfaces); err == nil {
		out.Routes, err = wireJSON(routes)
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint: network: %w", err)
	}
	return out, nil
}

// describeDisks are the disks without the content of those that are written.
func describeDisks(disks []hypervisor.Disk) (out []checkpoint.Disk, err error) {
	for _, d := range disks {
		o := checkpoint.Disk{ID: d.ID, ReadOnly: d.ReadOnly}
		for i, p := range d.Parts {
			if !d.ReadOnly {
				break
			}
			f, err := reopen(p.File)
			if err != nil {
				return nil, err
			}
			sum, err := checkpoint.DigestOf(f)
			f.Close()
			if err != nil {
				return nil, fmt.Errorf("disk %s: part %d (%s): %w", d.ID, i, filepath.Base(p.File.Name()), err)
			}
			o.Parts = append(o.Parts, sum)
		}
		out = append(out, o)
	}
	return out, nil
}

func wireJSON[M proto.Message](all []M) (out []json.RawMessage, err error) {
	for _, m := range all {
		b, err := protojson.Marshal(m)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// sameWire tells whether messages are those that were written.
func sameWire[M proto.Message](saved []json.RawMessage, now []M) bool {
	if len(saved) != len(now) {
		return false
	}
	for i, m := range now {
		was := m.ProtoReflect().New().Interface()
		if protojson.Unmarshal(saved[i], was) != nil || !proto.Equal(was, m) {
			return false
		}
	}
	return true
}
