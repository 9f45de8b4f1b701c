// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/storage"
)

// ContainerConfig describes a container to create.
type ContainerConfig struct {
	// ID of the container.
	ID string
	// Bundle is the OCI bundle's directory.
	Bundle string
	// Spec is the bundle's specification.
	Spec *specs.Spec
	// Rootfs are the mounts of the root filesystem; empty binds Spec.Root.Path.
	Rootfs []storage.Mount
	// Stdio says which streams the first process has.
	Stdio agentclient.StdioWants
	// Checkpoint is the directory of one that the container goes on from; empty for
	// what runtime.restore says.
	Checkpoint string
}

// Container is one container of the pod.
type Container struct {
	s      *Sandbox
	id     string
	guest  string // its id in the guest: another one for a container that goes on from a checkpoint
	bundle string
	spec   *specs.Spec
	init   *Process
	// Of the one that creates: indexes of the mounts that the guest gets copies of
	// and of those in the share, and the places of all of them in the guest.
	synced, shared []int
	sources        map[int]string
	volumes        []*agentpb.Storage // what the guest makes or mounts for them
	direct         []directMount      // written before the container is published
	restored       *takeover          // what it goes on from, nil for a new one

	timings *timings // written before the container is published, then by the one Start

	published bool // guarded by s.mu; false while being created
	deleted   atomic.Bool

	mu    sync.Mutex
	execs map[string]*Process // guarded by mu
}

// CreateContainer makes a container, and the machine before it for the first
// one. On error nothing of the container is left.
func (s *Sandbox) CreateContainer(ctx context.Context, cc ContainerConfig) (_ *Container, err error) {
	t := newTimings()
	cc.Spec = blockMounts(s.withoutHostDisks(cc.ID, cc.Spec))
	if err := s.notStopped(); err != nil {
		return nil, err
	}
	if err := validateSpec(cc.Spec, s.podNetNS()); err != nil {
		return nil, err
	}
	if cc.Spec, err = plainSpec(cc.Spec); err != nil {
		return nil, err
	}
	pod := s.prepared()
	if pod != nil {
		if _, err := s.running(); err != nil {
			return nil, err
		}
		if !pod.SharePID && sharesPIDNamespace(cc.Spec) {
			return nil, fmt.Errorf("linux.namespaces (pid): the pod shares no PID namespace, and joining that of one container is not implemented; share it in the pod (shareProcessNamespace): %w", errdefs.ErrNotImplemented)
		}
		cc.Spec = joinPod(cc.Spec, pod)
	} else {
		p := PodFromSpec(cc.Spec)
		pod = &p
	}
	from, err := s.takeoverOf(cc)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.giveUp(from)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, s.o.Config.Runtime.CreateContainerTimeout)
	defer cancel()
	c := &Container{s: s, id: cc.ID, guest: cc.ID, bundle: cc.Bundle, spec: cc.Spec, restored: from, execs: map[string]*Process{}}
	if from != nil {
		c.guest = from.saved.ID
	}
	c.init = newProcess(c, cc.ID, cc.Spec.Process, cc.Stdio)
	if err := s.reserve(c); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.forget(c)
		}
	}()
	if m, err := s.running(); err == nil && m.saving.Load() { // or the checkpoint finds the container, and is refused
		return nil, fmt.Errorf("a checkpoint of the pod is being made: %w", errdefs.ErrUnavailable)
	}
	share, err := s.share()
	if err != nil {
		return nil, err
	}
	if err := c.syncVolumes(share); err != nil {
		share.Unsync(c.id)
		return nil, err
	}
	disks, err := s.openDisks(cc)
	if err == nil && from != nil {
		if err = c.checkRestorable(disks); err != nil {
			disks.close()
		}
	}
	if err != nil {
		share.Unsync(c.id)
		return nil, err
	}
	// The machine boots while the host's side of the container is mounted.
	booted := make(chan error, 1)
	f := s.firstOf(c, disks)
	if from != nil {
		f.restore, f.takeover = from.restore, from
	}
	go func() { booted <- s.start(ctx, share, *pod, f, t) }()
	spec, err := c.prepare(share, cc, disks.root != nil)
	if err := errors.Join(err, <-booted); err != nil {
		disks.close()
		return nil, errors.Join(err, s.detach(ctx, c.id), c.unshare(share))
	}
	t.mark("t_prepare")
	if err := c.pushVolumes(ctx, share, spec); err != nil {
		disks.close()
		return nil, errors.Join(fmt.Errorf("create container: %w", err), s.detach(context.WithoutCancel(ctx), c.id), c.unshare(share))
	}
	defer func() {
		if err != nil {
			c.leaveDirect()
		}
	}()
	create := func() error { return c.create(ctx, spec, disks) }
	if from != nil {
		create = func() error { return c.takeOver(ctx, disks) }
	}
	if err := create(); err != nil {
		return nil, errors.Join(fmt.Errorf("create container: %w", err), s.detach(context.WithoutCancel(ctx), c.id), c.unshare(share))
	}
	if err := c.createHooks(ctx); err != nil {
		return nil, errors.Join(err, s.removeInGuest(ctx, c), c.unshare(share))
	}
	t.mark("t_container")
	s.mu.Lock()
	c.published = true
	s.mu.Unlock()
	c.timings = t
	return c, nil
}

// podNetNS is the network namespace of the running machine.
func (s *Sandbox) podNetNS() string {
	if pid := s.PID(); pid > 0 {
		return fmt.Sprintf("/proc/%d/ns/net", pid)
	}
	return ""
}

// notStopped comes before a look at the specification, which names things of the
// pod that are gone with it.
func (s *Sandbox) notStopped() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == Stopped {
		return s.stoppedLocked()
	}
	return nil
}

func (s *Sandbox) reserve(c *Container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == Stopped {
		return s.stoppedLocked()
	}
	if _, ok := s.containers[c.id]; ok {
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrAlreadyExists)
	}
	s.containers[c.id] = c
	return nil
}

func (s *Sandbox) forget(c *Container) {
	s.mu.Lock()
	mine := s.containers[c.id] == c // the id may be in use again
	if mine {
		delete(s.containers, c.id)
	}
	last := len(s.containers) == 0 && s.pod == nil
	s.mu.Unlock()
	if m, err := s.running(); err == nil && mine {
		m.sizer.set(c.id, nil)
		if !last { // or the machine is about to end
			m.shrinkLater()
		}
	}
}

// prepare mounts what the container needs of the host and returns its
// specification in the guest.
func (c *Container) prepare(share *storage.Share, cc ContainerConfig, onDisks bool) (_ *specs.Spec, err error) {
	bundleRoot := filepath.Join(cc.Bundle, "rootfs")
	if cc.Spec.Root != nil && cc.Spec.Root.Path != "" {
		bundleRoot = cc.Spec.Root.Path
		if !filepath.IsAbs(bundleRoot) {
			bundleRoot = filepath.Join(cc.Bundle, bundleRoot)
		}
	}
	root := storage.GuestRoot(c.id)
	if !onDisks {
		if root, err = share.Rootfs(c.id, cc.Rootfs, bundleRoot); err != nil {
			return nil, err
		}
	}
	if err := c.shareVolumes(share); err != nil {
		return nil, err
	}
	if cc.Spec.Process.User.Umask != nil {
		c.s.o.Log.Warn("process.user.umask has no effect: the guest protocol has no field for it", "container", c.id)
	}
	return guestSpec(keepFlags(cc.Spec, share.Flags), root, c.sources, !c.s.o.Config.Runtime.DisableGuestSeccomp), nil
}

// create makes the container in the guest, blocked until Start.
func (c *Container) create(ctx context.Context, spec *specs.Spec, disks *containerDisks) error {
	m, err := c.s.running()
	var storages []*agentpb.Storage
	if err == nil {
		storages, err = c.s.plugShare(ctx, m, disks, c)
	}
	if err == nil {
		err = c.s.clearGuest(ctx)
	}
	if err != nil {
		disks.close()
		return err
	}
	attached, devices, err := c.attach(ctx, m, disks)
	if err != nil {
		return err
	}
	direct, err := c.attachDirect(ctx, m)
	if err != nil {
		return err
	}
	storages = append(append(append(storages, attached...), c.volumes...), direct...)
	if err := c.fit(ctx, m, spec); err != nil {
		return err
	}
	stdio, err := m.agent.OpenStdio(ctx, c.id, c.id, c.init.wants)
	if err != nil {
		return err
	}
	in, out, errp := stdio.Ports()
	resp, err := m.agent.CreateContainer(ctx, &agentpb.CreateContainerRequest{
		ContainerId: c.id, ExecId: c.id, OCI: wireSpec(spec), SandboxPidns: sharesPIDNamespace(c.spec),
		Storages: storages, Devices: devices,
		StdinPort: in, StdoutPort: out, StderrPort: errp,
	})
	if err != nil {
		stdio.Close()
		return m.agent.Err(err)
	}
	c.init.made(stdio, resp.GetPid())
	if !m.work(func() { c.init.wait(m) }) {
		return fmt.Errorf("%w while the container was created", ErrStopped)
	}
	return nil
}

// createHooks runs those that belong between the container's creation and its
// start; prestart is the old name of createRuntime (runtime-spec config.md).
func (c *Container) createHooks(ctx context.Context) error {
	//lint:ignore SA1019 specifications of Docker still have them
	if err := c.runHooks(ctx, "prestart", c.hooks().Prestart, specs.StateCreating); err != nil {
		return err
	}
	return c.runHooks(ctx, "createRuntime", c.hooks().CreateRuntime, specs.StateCreating)
}

// machineEnded ends every process that still runs.
func (c *Container) machineEnded() {
	c.init.ended(killedStatus)
	c.mu.Lock()
	execs := make([]*Process, 0, len(c.execs))
	for _, p := range c.execs {
		execs = append(execs, p)
	}
	c.mu.Unlock()
	for _, p := range execs {
		p.ended(killedStatus)
	}
}

// ID of the container.
func (c *Container) ID() string { return c.id }

// Bundle is the OCI bundle's directory.
func (c *Container) Bundle() string { return c.bundle }

// Init is the container's first process.
func (c *Container) Init() *Process { return c.init }

// Process finds a process: the first one by an empty id, an added one by its exec id.
func (c *Container) Process(exec string) (*Process, error) {
	if exec == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, ok := c.execs[exec]; ok {
		return p, nil
	}
	return nil, fmt.Errorf("exec %s in container %s: %w", exec, c.id, errdefs.ErrNotFound)
}

// Start lets the container's first process run.
func (c *Container) Start(ctx context.Context) error {
	m, err := c.s.running()
	if err != nil {
		return err
	}
	if s := c.init.State(); s != Created { // Paused may become Running too, by Resume
		return fmt.Errorf("container %s is %s and cannot be started: %w", c.id, s, errdefs.ErrFailedPrecondition)
	}
	// What was wired since the container was created is there when its process begins.
	if err := m.net.Sync(ctx, m.vm, m.agent); err != nil {
		return fmt.Errorf("start container: %w", err)
	}
	if err := c.init.to(Running); err != nil {
		return err
	}
	begin := time.Now()
	if c.restored != nil {
		err = c.goOn(ctx, m)
	} else {
		_, err = m.agent.StartContainer(ctx, &agentpb.StartContainerRequest{ContainerId: c.guest})
	}
	if err != nil {
		return fmt.Errorf("start container: %w", m.agent.Err(err))
	}
	c.timings.add("t_start", time.Since(begin))
	if err := c.runHooks(ctx, "poststart", c.hooks().Poststart, specs.StateRunning); err != nil {
		c.s.o.Log.Warn("hook", "container", c.id, "error", err) // no reason to stop it (runtime-spec runtime.md)
	}
	c.s.o.Log.Info("container started", append([]any{"container", c.id}, c.timings.pairs...)...)
	m.watchOnce.Do(func() { // not before: the first start is not to wait for it
		m.work(m.copyGuestLog)
		m.work(func() { c.s.makeTemplate(m) })
		if told := c.s.o.OOM; told != nil {
			m.work(func() { m.watchOOM(func(guest string) { told(c.s.idOf(guest)) }) })
		}
	})
	return nil
}

// Exec adds a process, which StartExec runs.
func (c *Container) Exec(id string, spec *specs.Process, wants agentclient.StdioWants) (*Process, error) {
	if err := c.takesExec(); err != nil {
		return nil, err
	}
	p := newProcess(c, id, spec, wants)
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.execs[id]; ok || id == c.id || id == c.guest {
		return nil, fmt.Errorf("exec %s: %w", id, errdefs.ErrAlreadyExists)
	}
	c.execs[id] = p
	return p, nil
}

// takesExec tells whether a process can be added now. A paused one would hang.
func (c *Container) takesExec() error {
	if s := c.init.State(); s != Created && s != Running {
		return fmt.Errorf("container %s is %s, exec needs it created or running: %w", c.id, s, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// StartExec runs a process that Exec added.
func (c *Container) StartExec(ctx context.Context, p *Process) error { return p.startExec(ctx) }

// DeleteExec forgets an added process that does not run.
func (c *Container) DeleteExec(p *Process) error {
	if err := p.to(Deleted); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, p.id)
	return nil
}

// Pause freezes the container's processes.
func (c *Container) Pause(ctx context.Context) error {
	return c.freeze(Paused, func(m *machine) error {
		_, err := m.agent.PauseContainer(ctx, &agentpb.PauseContainerRequest{ContainerId: c.guest})
		return err
	})
}

// Resume undoes Pause.
func (c *Container) Resume(ctx context.Context) error {
	if s := c.init.State(); s != Paused {
		return fmt.Errorf("container %s is %s, not paused: %w", c.id, s, errdefs.ErrFailedPrecondition)
	}
	return c.freeze(Running, func(m *machine) error {
		_, err := m.agent.ResumeContainer(ctx, &agentpb.ResumeContainerRequest{ContainerId: c.guest})
		return err
	})
}

func (c *Container) freeze(to State, call func(*machine) error) error {
	m, err := c.s.running()
	if err != nil {
		return err
	}
	from := c.init.State()
	if err := c.init.to(to); err != nil {
		return err
	}
	if err := call(m); err != nil {
		c.init.mu.Lock()
		if c.init.state == to {
			c.init.state = from
		}
		c.init.mu.Unlock()
		return m.agent.Err(err)
	}
	return nil
}

// Stats are a container's cgroup and network counters, in the protocol's form.
type Stats = agentpb.StatsContainerResponse

// Stats reads the container's counters.
func (c *Container) Stats(ctx context.Context) (*Stats, error) {
	m, err := c.s.running()
	if err != nil {
		return nil, err
	}
	resp, err := m.agent.StatsContainer(ctx, &agentpb.StatsContainerRequest{ContainerId: c.guest})
	return resp, m.agent.Err(err)
}

// Update changes the container's limits, and the machine's size with them: it
// grows before they hold, and shrinks after.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	m, err := c.s.running()
	if err != nil {
		return err
	}
	if s := c.init.State(); s == Stopped || s == Deleted {
		return fmt.Errorf("container %s is %s, update needs it live: %w", c.id, s, errdefs.ErrFailedPrecondition)
	}
	if r, err = plainLimits(r); err != nil {
		return err
	}
	if err := holdsLimits(m.agent, r); err != nil {
		return err
	}
	if _, err := demandOf(r, m.sizer.host); err != nil { // before it is merged, so that the field is the caller's
		return err
	}
	was, err := m.grow(ctx, c.id, func(was *specs.LinuxResources) *specs.LinuxResources {
		return merge(was, hostPart(r, c.spec.Linux.Devices))
	})
	if err != nil {
		return err
	}
	g := guestLinux(&specs.Linux{Resources: complete(was, r), Devices: c.spec.Linux.Devices}, false)
	setCPUs(g.Resources, m.sizer.guestCPUs(c.id))
	if _, err = m.agent.UpdateContainer(ctx, &agentpb.UpdateContainerRequest{ContainerId: c.guest, Resources: wireResources(g.Resources)}); err != nil {
		m.sizer.set(c.id, was)
		err = m.agent.Err(err)
	}
	m.shrink(ctx)
	return err
}

// fit makes room for a container that is about to be made.
func (c *Container) fit(ctx context.Context, m *machine, spec *specs.Spec) error {
	if c.spec.Annotations[containerTypeKey] == "sandbox" { // the pause container needs nothing, and is bound to nothing
		return nil
	}
	if err := holdsLimits(m.agent, c.spec.Linux.Resources); err != nil {
		return err
	}
	r := merge(nil, hostPart(c.spec.Linux.Resources, c.spec.Linux.Devices))
	if _, err := m.grow(ctx, c.id, func(*specs.LinuxResources) *specs.LinuxResources { return r }); err != nil {
		return err
	}
	setCPUs(spec.Linux.Resources, m.sizer.guestCPUs(c.id))
	return nil
}

// Delete removes a container whose first process does not run; one that never
// started is killed first. It is complete when it returns, also with a dead machine.
//
// Where deferRemoval says so the guest is not asked to clean up: most often its
// machine is about to end, and if it is not, the next container does so first.
func (c *Container) Delete(ctx context.Context) error {
	state := c.init.State()
	if state == Running || state == Paused {
		return fmt.Errorf("container %s is %s, delete needs it stopped: %w", c.id, state, errdefs.ErrFailedPrecondition)
	}
	if !c.deleted.CompareAndSwap(false, true) {
		return fmt.Errorf("container %s is deleted already: %w", c.id, errdefs.ErrNotFound)
	}
	if state == Stopped && c.s.deferRemoval(c) {
		return c.release()
	}
	if err := c.s.removeInGuest(ctx, c); err != nil {
		c.deleted.Store(false) // to be tried again
		return err
	}
	c.init.ended(killedStatus)
	return c.release()
}

// release gives back what the container holds on the host.
func (c *Container) release() error {
	if err := c.runHooks(context.Background(), "poststop", c.hooks().Poststop, specs.StateStopped); err != nil {
		c.s.o.Log.Warn("hook", "container", c.id, "error", err)
	}
	c.leaveDirect()
	share, err := c.s.share()
	if err == nil {
		err = c.unshare(share)
	}
	c.s.forget(c)
	return err
}
