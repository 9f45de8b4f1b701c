// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/template"
)

// restore is a container that goes on from a checkpoint.
type restore struct {
	c     *checkpoint.Checkpoint
	saved checkpoint.Container
	wants agentclient.StdioWants
	stdio *agentclient.Stdio // of its process, once the machine runs
}

// restoreFrom is the checkpoint that a container is to go on from, nil for none.
func (s *Sandbox) restoreFrom(cc ContainerConfig) (*restore, error) {
	s.mu.Lock()
	fresh := s.pod == nil && len(s.containers) == 0 && s.state == Created
	s.mu.Unlock()
	dir := cc.Checkpoint
	if dir == "" && fresh {
		dir = s.o.Config.Runtime.Restore
	}
	if dir == "" {
		return nil, nil
	}
	if !s.o.Config.Runtime.EnableCheckpoint {
		return nil, fmt.Errorf("restore: runtime.enable_checkpoint is not set: %w", errdefs.ErrFailedPrecondition)
	}
	c, err := checkpoint.Open(dir)
	if err != nil {
		return nil, err
	}
	if len(c.Containers) != 1 {
		return nil, fmt.Errorf("checkpoint %s has %d containers: a pod of one can be restored: %w", dir, len(c.Containers), errdefs.ErrNotImplemented)
	}
	r := &restore{c: c, saved: c.Containers[0]}
	switch {
	case r.saved.ID != cc.ID || c.Sandbox != s.o.ID:
		return nil, fmt.Errorf("checkpoint %s is of container %s in pod %s: name them so: %w", dir, r.saved.ID, c.Sandbox, errdefs.ErrInvalidArgument)
	case r.saved.Terminal != cc.Spec.Process.Terminal:
		return nil, fmt.Errorf("checkpoint %s: terminal is %t, %t is wanted: %w", dir, r.saved.Terminal, cc.Spec.Process.Terminal, errdefs.ErrInvalidArgument)
	}
	r.wants = agentclient.StdioWants{
		Stdin: cc.Stdio.Stdin && r.saved.Stdin, Stdout: cc.Stdio.Stdout && r.saved.Stdout, Stderr: cc.Stdio.Stderr && r.saved.Stderr,
	}
	if !fresh {
		return nil, fmt.Errorf("checkpoint %s: the pod has a machine already: %w", dir, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

// disks makes the container's disks what they were: read-only ones must be, and
// the others get the content that was saved.
func (r *restore) disks(d *containerDisks) error {
	sources := d.sources()
	if len(sources) != len(r.c.Disks) {
		return fmt.Errorf("checkpoint: the pod had %d disks, the container has %d: %w", len(r.c.Disks), len(sources), errdefs.ErrInvalidArgument)
	}
	for i, src := range sources {
		was := r.c.Disks[i]
		if was.ReadOnly != src.ReadOnly {
			return fmt.Errorf("checkpoint: disk %s: read-only was %t and is %t: %w", was.ID, was.ReadOnly, src.ReadOnly, errdefs.ErrInvalidArgument)
		}
		if !src.ReadOnly {
			if err := r.c.LoadDisk(was, src.Parts[0].File); err != nil {
				return err
			}
			continue
		}
		now, err := describeDisks([]hypervisor.Disk{{ID: was.ID, Parts: src.Parts, ReadOnly: true}})
		if err != nil {
			return fmt.Errorf("checkpoint: %w", err)
		}
		for k, p := range now[0].Parts {
			if k >= len(was.Parts) || p != was.Parts[k] {
				return fmt.Errorf("checkpoint: disk %s: part %d (%s) is not what the pod had: it needs the same image: %w",
					was.ID, k, src.Parts[k].File.Name(), errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

// into makes a machine go on with the checkpoint.
func (r *restore) into(m *machine, vc *hypervisor.Config, key template.Key) (err error) {
	if d := r.c.Machine.Differs(key); len(d) > 0 {
		return fmt.Errorf("checkpoint of another machine: %s: %w", strings.Join(d, "; "), errdefs.ErrFailedPrecondition)
	}
	if vc.Restore, err = r.c.OpenState(); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	m.restored = vc.Restore
	vc.Memory, err = r.c.LoadMemory()
	vc.Whole = true
	return err
}

// adopt connects to the guest that has gone on, and to the container's process.
func (r *restore) adopt(ctx context.Context, m *machine, vm hypervisor.VM) (err error) {
	var all []*agentclient.Stdio
	m.agent, all, err = agentclient.Adopt(ctx, vm, []agentclient.Adopted{{Container: r.saved.ID, Exec: r.saved.ID, Stdio: r.wants}})
	if err != nil {
		return &hypervisor.StartError{Phase: "restore", Err: err, Console: vm.Info().ConsoleTail()}
	}
	r.stdio = all[0]
	return nil
}

// network tells the guest what is not in its namespace as it was.
func (r *restore) network(ctx context.Context, m *machine) error {
	interfaces, routes, err := m.net.Guest(ctx)
	if err != nil {
		return err
	}
	if sameWire(r.c.Interfaces, interfaces) && sameWire(r.c.Routes, routes) {
		return nil // connections go on
	}
	for i, now := range interfaces {
		var was typespb.Interface
		if i < len(r.c.Interfaces) && protojson.Unmarshal(r.c.Interfaces[i], &was) == nil {
			m.log.Info("the pod's network is not the saved one", "device", now.Name, "was", was.String(), "is", now.String())
		}
	}
	return m.net.Configure(ctx, m.vm.Info().NICs, m.agent)
}

// takeOver is what is left of a container's creation when its machine has gone on
// with it.
func (c *Container) takeOver(r *restore) error {
	m, err := c.s.running()
	if err != nil {
		return err
	}
	c.restored = r
	c.init.made(r.stdio, r.saved.PID)
	m.sizer.set(c.id, merge(nil, c.spec.Linux.Resources))
	if !m.work(func() { c.init.wait(m) }) {
		return fmt.Errorf("%w while the container was restored", ErrStopped)
	}
	return nil
}

// goOn is Start for a container that was restored.
func (c *Container) goOn(ctx context.Context, m *machine) error {
	if c.restored.saved.State == Created.String() {
		_, err := m.agent.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: c.id})
		return err
	}
	_, err := m.agent.ResumeContainer(ctx, &agentpb.ResumeContainerRequest{ContainerId: c.id})
	return err
}

// checkRestorable refuses what a restored container cannot have.
func (c *Container) checkRestorable(d *containerDisks) error {
	var errs []error
	if d.root == nil || len(c.shared) > 0 {
		errs = append(errs, errors.New("the container needs a shared filesystem, which a restored machine does not have"))
	}
	if len(d.devices) > 0 || len(c.direct) > 0 {
		errs = append(errs, errors.New("block devices are not restored"))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("restore: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}
