// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/checkpoint"
	"github.com/kata-v2/kata/sandbox/storage"
	"github.com/kata-v2/kata/sandbox/template"
)

// restore is a pod that goes on from a checkpoint. Its containers are frozen until
// one of that name is created, which takes the saved one over, and started.
type restore struct {
	c *checkpoint.Checkpoint

	mu    sync.Mutex
	left  map[string]checkpoint.Container // guarded by mu; by name: nobody has taken them over
	parts map[string][]os.FileInfo        // guarded by mu; the files of read-only disks, by ID
}

// takeover is a saved container with which one of this pod goes on.
type takeover struct {
	*restore
	saved checkpoint.Container
	wants agentclient.StdioWants
	done  bool // the container has it; of the one that creates
}

// pauseName is the name of a pause container, which its engine gives none. A
// container's own cannot have parentheses.
const pauseName = "(pause)"

// containerNameKey is where containerd's CRI has the name of a container
// (pkg/cri/annotations), which is the same in the pod that is restored; its id is not.
const containerNameKey = "io.kubernetes.cri.container-name"

// savedName is the name by which a container finds the one that was saved.
func savedName(id string, annotations map[string]string) string {
	if annotations[containerTypeKey] == "sandbox" {
		return pauseName
	}
	if name := annotations[containerNameKey]; name != "" {
		return name
	}
	return id
}

// openRestore reads the checkpoint with which the pod is to begin.
func (s *Sandbox) openRestore(dir string) (*restore, error) {
	if !s.o.Config.Runtime.EnableCheckpoint {
		return nil, fmt.Errorf("restore: runtime.enable_checkpoint is not set: %w", errdefs.ErrFailedPrecondition)
	}
	c, err := checkpoint.Open(dir)
	if err != nil {
		return nil, err
	}
	share, err := s.share()
	if err != nil {
		return nil, err
	}
	share.ContinueSynced(c.Synced)
	r := &restore{c: c, left: map[string]checkpoint.Container{}, parts: map[string][]os.FileInfo{}}
	for _, x := range c.Containers {
		r.left[x.Name] = x
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.restore == nil {
		s.restore = r
	}
	return s.restore, nil
}

// restorePod is the checkpoint of a pod that starts without a container, nil for none.
func (s *Sandbox) restorePod() (*restore, error) {
	if dir := s.o.Config.Runtime.Restore; dir != "" {
		return s.openRestore(dir)
	}
	return nil, nil
}

// restoreFor is the checkpoint of the pod of a container that is created, nil for
// none, and whether the container is its first.
func (s *Sandbox) restoreFor(cc ContainerConfig) (r *restore, first bool, err error) {
	s.mu.Lock()
	r, first = s.restore, s.pod == nil && len(s.containers) == 0 && s.state == Created
	s.mu.Unlock()
	dir := cc.Checkpoint
	switch {
	case r != nil && (dir == "" || dir == r.c.Dir()):
		return r, first, nil
	case dir != "" && !first:
		return nil, false, fmt.Errorf("checkpoint %s: the pod has a machine already, which did not begin with it: %w", dir, errdefs.ErrFailedPrecondition)
	case dir == "" && first:
		dir = s.o.Config.Runtime.Restore
	}
	if dir == "" {
		return nil, first, nil
	}
	r, err = s.openRestore(dir)
	return r, first, err
}

// takeoverOf is the saved container that one that is created goes on with, nil for
// a new one.
func (s *Sandbox) takeoverOf(cc ContainerConfig) (*takeover, error) {
	r, first, err := s.restoreFor(cc)
	if r == nil || err != nil {
		return nil, err
	}
	name := savedName(cc.ID, cc.Spec.Annotations)
	r.mu.Lock()
	defer r.mu.Unlock()
	saved, ok := r.left[name]
	switch {
	case !ok && (first || cc.Checkpoint != ""):
		return nil, fmt.Errorf("checkpoint %s is of pod %s with the containers %s: there is no %s: %w",
			r.c.Dir(), r.c.Sandbox, strings.Join(slices.Sorted(maps.Keys(r.left)), ", "), name, errdefs.ErrInvalidArgument)
	case !ok:
		return nil, nil
	case saved.Terminal != cc.Spec.Process.Terminal:
		return nil, fmt.Errorf("checkpoint %s: container %s: terminal is %t, %t is wanted: %w", r.c.Dir(), name, saved.Terminal, cc.Spec.Process.Terminal, errdefs.ErrInvalidArgument)
	}
	delete(r.left, name)
	return &takeover{restore: r, saved: saved, wants: agentclient.StdioWants{
		Stdin: cc.Stdio.Stdin && saved.Stdin, Stdout: cc.Stdio.Stdout && saved.Stdout, Stderr: cc.Stdio.Stderr && saved.Stderr,
	}}, nil
}

// giveUp undoes takeoverOf, unless the container has taken over what it is of.
func (s *Sandbox) giveUp(t *takeover) {
	if t == nil || t.done {
		return
	}
	t.mu.Lock()
	t.left[t.saved.Name] = t.saved
	t.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod == nil && len(s.containers) == 0 && s.state == Created {
		s.restore = nil // the next one may begin otherwise
	}
}

// waiting are the containers that nobody has taken over.
func (r *restore) waiting() (out []checkpoint.Container) {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(r.left)) {
		out = append(out, r.left[name])
	}
	return out
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
	return m.net.Move(ctx, m.vm.Info().NICs, m.agent)
}

// savedUser holds the disks of a saved container until it is taken over.
func savedUser(guestID string) string { return "saved/" + guestID }

// takeOver is what is left of a container's creation in a machine that has gone on with it.
func (c *Container) takeOver(ctx context.Context, disks *containerDisks) error {
	defer disks.close() // of the first one those are the machine's
	m, err := c.s.running()
	if err != nil {
		return err
	}
	t := c.restored
	stdio, err := m.agent.Adopt(ctx, agentclient.Adopted{Container: c.guest, Exec: c.guest, Stdio: t.wants})
	if err != nil {
		return err
	}
	c.init.made(stdio, t.saved.PID)
	c.placeDisks(m, disks)
	c.s.disks.Pass(savedUser(c.guest), c.id)
	t.done = true
	if c.spec.Annotations[containerTypeKey] != "sandbox" {
		m.sizer.set(c.id, merge(nil, c.spec.Linux.Resources))
	}
	if !m.work(func() { c.init.wait(m) }) {
		return fmt.Errorf("%w while the container was restored", ErrStopped)
	}
	return nil
}

// placeDisks makes the disks that the restored container writes to the files of its
// snapshot, which are new and empty. Those of the first container are so already. One
// for which it cannot be done is a copy without a name, whose content nobody finds again.
func (c *Container) placeDisks(m *machine, disks *containerDisks) {
	for i, src := range disks.sources() {
		if src.ReadOnly {
			continue
		}
		if err := c.s.disks.Place(c.restored.saved.Disks[i], src.Parts[0].File.Name()); err != nil {
			m.log.Warn("what a restored container writes is not in its snapshot", "container", c.id, "error", err)
		}
	}
}

// goOn is Start for a container that was restored.
func (c *Container) goOn(ctx context.Context, m *machine) error {
	if c.restored.saved.State == Created.String() {
		_, err := m.agent.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: c.guest})
		return err
	}
	_, err := m.agent.ResumeContainer(ctx, &agentpb.ResumeContainerRequest{ContainerId: c.guest})
	return err
}

// idOf is the id of the container that has that one in the guest.
func (s *Sandbox) idOf(guest string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.containers {
		if c.guest == guest {
			return id
		}
	}
	return guest
}

// savedCopy is the copy that the restored guest has of what a mount at that place
// shows; nil for a container that is new.
func (c *Container) savedCopy(destination string) (*storage.SyncedCopy, error) {
	if c.restored == nil {
		return nil, nil
	}
	if was, ok := c.restored.saved.Volumes[destination]; ok {
		return &was, nil
	}
	return nil, errors.New("the saved container has no such mount")
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
	return c.restored.fits(d.sources())
}
