// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/engine"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/ocispec"
	"github.com/kata-v2/kata/guest-agent/storage"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// undo is a stack of what takes a half-made container apart again.
type undo []func() error

func (u *undo) add(f func() error) { *u = append(*u, f) }

func (u undo) run() error {
	var errs []error
	for i := len(u) - 1; i >= 0; i-- {
		errs = append(errs, u[i]())
	}
	return errors.Join(errs...)
}

// validID refuses ids that would leave their directory.
func validID(id string) error {
	if id == "" || len(id) > 255 || id[0] == '.' || id[0] == '-' || strings.ContainsAny(id, "/\x00\n") {
		return fault.New(fault.InvalidArgument, "container_id %q: want 1 to 255 characters, no slash, not starting with a dot or a dash", id)
	}
	return nil
}

// reservedIDs are names in RunDir that are not containers.
var reservedIDs = []string{"shared", "sandbox", "virtual-volumes", "image"}

// CreateContainer makes a container whose init waits for Start. On an error
// nothing of it is left, and its id is free again.
func (p *Pod) CreateContainer(ctx context.Context, req *agentpb.CreateContainerRequest) (*Container, error) {
	id := req.GetContainerId()
	if err := validID(id); err != nil {
		return nil, err
	}
	for _, r := range reservedIDs {
		if id == r {
			return nil, fault.New(fault.InvalidArgument, "container_id %q is reserved", id)
		}
	}
	spec, err := ocispec.Convert(req.OCI)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	_, taken := p.containers[id]
	if !taken {
		p.containers[id] = nil
	}
	p.mu.Unlock()
	if taken {
		return nil, fault.New(fault.AlreadyExists, "container %q exists already", id)
	}
	var undo undo
	c, err := p.create(ctx, req, spec, &undo)
	if err != nil {
		if c != nil { // a program that could not be read is reported as one that could not be run
			err = errors.Join(err, p.cfg.Storage.Corruption(c.storages))
		}
		if uerr := undo.run(); uerr != nil {
			p.cfg.Log.Warn("container not cleanly undone", agentlog.KeyContainer, id, agentlog.KeyError, uerr.Error())
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		delete(p.containers, id)
		return nil, fmt.Errorf("create container %s: %w", id, err)
	}
	p.containers[id] = c
	return c, nil
}

func (p *Pod) create(ctx context.Context, req *agentpb.CreateContainerRequest, spec *specs.Spec, undo *undo) (*Container, error) {
	c := &Container{
		ID: req.ContainerId, pod: p, bundle: filepath.Join(p.cfg.RunDir, req.ContainerId),
		execs: map[string]*Process{},
	}
	c.open, c.shut = context.WithCancel(context.Background())
	c.life, c.end = context.WithCancel(context.Background())
	if err := os.MkdirAll(c.bundle, 0o711); err != nil {
		return nil, err
	}
	undo.add(func() error { return os.RemoveAll(c.bundle) })
	if err := p.addStorages(ctx, c, req.Storages, undo); err != nil {
		return nil, err
	}
	moved, err := p.addDevices(ctx, spec, req.Devices)
	if err != nil {
		return nil, err
	}
	c.numbers = moved
	if err := applyUser(spec, req.StringUser); err != nil {
		return nil, err
	}
	undo.add(c.leaveShare)
	if err := c.enterShare(protocols.GuestSharedDir, spec); err != nil {
		return nil, err
	}
	if err := prepareTargets(spec); err != nil {
		return nil, err
	}
	root, passwd := passwdOf(spec)
	addHome(spec.Process, root, passwd)
	place, err := p.placement(ctx, spec, req.SandboxPidns)
	if err != nil {
		return nil, err
	}
	pause := ocispec.IsPause(spec)
	resources, sysctls := ocispec.Adapt(spec, place)
	if err := p.setSysctls(sysctls); err != nil {
		return nil, err
	}
	if ocispec.MayNeedModules(spec) {
		if err := p.cfg.Modules.OnDemand(); err != nil {
			return nil, err
		}
	}
	c.sharedPID = place.SharedPID
	c.poststart = spec.Hooks != nil && len(spec.Hooks.Poststart) > 0
	c.poststop = spec.Hooks != nil && len(spec.Hooks.Poststop) > 0
	if err := p.makeInit(ctx, c, req, spec, resources, undo); err != nil {
		return c, err
	}
	if pause {
		p.holdPIDNS(c.init.PID())
	}
	return c, nil
}

// addStorages mounts what the container needs. Those that are layers of one root
// filesystem are one mount.
func (p *Pod) addStorages(ctx context.Context, c *Container, all []*agentpb.Storage, undo *undo) error {
	done := func(mp string, err error) error {
		if err != nil {
			return err
		}
		c.storages = append(c.storages, mp)
		undo.add(func() error { return p.cfg.Storage.Remove(mp) })
		return nil
	}
	var layers []*agentpb.Storage
	for _, s := range all {
		if storage.IsLayer(s) {
			layers = append(layers, s)
			continue
		}
		if err := done(p.cfg.Storage.Add(ctx, s, c.ID)); err != nil {
			return err
		}
	}
	if len(layers) == 0 {
		return nil
	}
	return done(p.cfg.Storage.AddLayers(ctx, layers, c.ID))
}

// makeInit makes the cgroup, the stdio and the first process.
func (p *Pod) makeInit(ctx context.Context, c *Container, req *agentpb.CreateContainerRequest, spec *specs.Spec, resources *specs.LinuxResources, undo *undo) error {
	var err error
	if c.group, err = p.cfg.Group(c.ID); err != nil {
		return err
	}
	undo.add(func() error { return emptyAndRemove(c.group) })
	dir, err := c.group.Open()
	if err != nil {
		return err
	}
	defer dir.Close()
	set, err := p.openStreams(ctx, Ports{req.StdinPort, req.StdoutPort, req.StderrPort}, spec.Process.Terminal)
	if err != nil {
		return err
	}
	undo.add(func() error { set.Abort(); return nil })
	undo.add(func() error { return p.cfg.Engine.Delete(context.WithoutCancel(ctx), c.ID, false) })
	lctx, cancel := p.launchContext(ctx)
	defer cancel()
	ep, err := p.cfg.Engine.Create(lctx, engine.Create{ID: c.ID, Bundle: c.bundle, Spec: spec, Cgroup: dir, Stdio: set.Child()})
	if err != nil {
		return err
	}
	// Limits come after the engine has done its own work in the group (it makes
	// device nodes, needs a second process and some memory), before the program runs.
	err = applyLimits(c.group, resources)
	if err == nil {
		err = c.holdMounts(ep.PID)
	}
	if err != nil {
		_ = ep.Signal(unix.SIGKILL)
		<-ep.Exit
		ep.Release()
		if ep.Console != nil {
			ep.Console.Close()
		}
		return err
	}
	c.adopt("", ep, set, func(pr *Process) { c.init = pr })
	c.watchOOM()
	return nil
}

// launchContext bounds the start of a process. Its cause tells the limit from the
// caller's own deadline.
func (p *Pod) launchContext(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := p.cfg.Params.LaunchTimeout
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s=%v is over: %w", protocols.ParamLaunchTimeout, limit, context.DeadlineExceeded))
}

func applyLimits(g Group, r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	if err := g.Apply(r); err != nil {
		return fmt.Errorf("limits: %w", err)
	}
	return g.SetDevices(r.Devices)
}

func emptyAndRemove(g Group) error {
	if err := g.Kill(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	if err := g.WaitEmpty(ctx); err != nil {
		return err
	}
	return g.Remove()
}

func (c *Container) watchOOM() {
	c.watchers.Add(1)
	go func() {
		defer c.watchers.Done()
		if err := c.group.WatchOOM(c.life, func() { c.pod.reportOOM(c.ID) }); err != nil {
			c.pod.cfg.Log.Warn("OOM events", agentlog.KeyContainer, c.ID, agentlog.KeyError, err.Error())
		}
	}()
}

// placement finds the namespaces that the container joins.
func (p *Pod) placement(ctx context.Context, spec *specs.Spec, sharedPID bool) (ocispec.Placement, error) {
	var place ocispec.Placement
	var err error
	if ocispec.InPod(spec) {
		for t, dst := range map[specs.LinuxNamespaceType]*string{specs.IPCNamespace: &place.IPC, specs.UTSNamespace: &place.UTS} {
			if !ocispec.Wants(spec, t) || ocispec.Private(spec, t) {
				continue
			}
			if *dst, err = p.ns.path(t); err != nil {
				return place, err
			}
		}
	}
	p.mu.Lock()
	place.GuestHooks = p.hooks
	p.mu.Unlock()
	if sharedPID {
		place.SharedPID = true
		if place.PID, err = p.sharedPID(ctx); err != nil {
			return place, err
		}
	}
	return place, nil
}

// setSysctls writes the parameters that act on the guest as a whole.
func (p *Pod) setSysctls(sysctls map[string]string) error {
	for k, v := range sysctls {
		name := k
		if !strings.Contains(k, "/") {
			name = strings.ReplaceAll(k, ".", "/")
		}
		if !filepath.IsLocal(name) {
			return fault.New(fault.InvalidArgument, "sysctl %q: not a name", k)
		}
		if err := os.WriteFile(filepath.Join(p.cfg.SysctlDir, name), []byte(v), 0); err != nil {
			return fault.New(fault.FailedPrecondition, "sysctl %s=%s: %w", k, v, err)
		}
	}
	return nil
}
