// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/ledger"
	"github.com/kata-v2/kata/sandbox/storage"
	"github.com/kata-v2/kata/sandbox/template"
)

// timings collects the phases of a start, for one log line.
type timings struct {
	begin time.Time
	last  time.Time
	pairs []any
}

func newTimings() *timings { now := time.Now(); return &timings{begin: now, last: now} }

// mark ends a phase.
func (t *timings) mark(phase string) {
	now := time.Now()
	t.add(phase, now.Sub(t.last))
	t.last = now
}

func (t *timings) add(phase string, d time.Duration) {
	t.pairs = append(t.pairs, phase, d.Round(time.Microsecond).String())
}

// startMachine plans and acquires: daemon and VMM start at the same time, since
// the VMM waits for the daemon by itself, and the guest boots meanwhile. On
// error what was acquired is in the returned machine, for release.
func (s *Sandbox) startMachine(ctx context.Context, share *storage.Share, pod PodConfig, f first, t *timings) (_ *machine, err error) {
	m := &machine{log: s.o.Log, disks: s.disks, forget: s.o.Ledger.Forget, late: f.noShare, alone: f.alone, plugging: make(chan struct{}, 1), lost: make(chan struct{})}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	host, err := s.host()
	if err != nil {
		return m, err
	}
	stated, err := pod.stated(host)
	if err != nil {
		return m, err
	}
	m.sizer = newSizer(host, boundsOf(s.o.Config, host), stated)
	m.sizer.beside = pod.Overhead
	if s.prepared() != nil || pod.Annotations[containerTypeKey] == "sandbox" {
		m.sizer.pod = &specs.LinuxResources{} // none, not the sum of its containers'
		if pod.Resources != nil {
			m.sizer.pod = pod.Resources
		}
	}
	vc := planVM(s.o.Config, s.o.ID, s.o.Key, pod.NetNSPath, m.sizer)
	vc.Dir = s.o.Ledger.Dir()
	vc.Started = func(name string, pid int) error { return s.recordProcess(m, name, pid) }
	if err := s.joinCgroup(ctx, m, pod); err != nil {
		return m, err
	}
	if err := s.connectNetwork(ctx, m, &vc, pod); err != nil {
		return m, err
	}
	if s.o.Config.Runtime.EnableCheckpoint {
		s.disks.Keep()
	}
	if f.restore != nil {
		if err := s.restoreDisks(&vc, f); err != nil {
			vc.CloseDevices()
			return m, err
		}
	} else {
		s.bootDisks(&vc, f)
		vc.HotplugPorts = portsBeside(&vc, f.alone)
	}
	vc.ShareLater = f.shareLater
	if s.o.Config.Runtime.EnableCheckpoint {
		if err := s.makeSavable(ctx, m, &vc, f.restore); err != nil {
			vc.CloseDevices()
			s.disks.Booted(nil, err)
			return m, err
		}
	}
	vm, err := s.startVMM(ctx, m, share, vc, f.noShare)
	if err != nil {
		s.disks.Booted(nil, err)
		return m, err
	}
	s.disks.Booted(vm.Info().Disks, nil)
	if err := m.placeCPUs(ctx); err != nil {
		return m, err
	}
	t.mark("t_vmm")
	m.forwardPorts(pod.NetNSPath) // while the guest boots
	dctx, cancel := context.WithTimeout(ctx, s.o.Config.Agent.DialTimeout)
	defer cancel()
	if f.restore != nil {
		return m, s.goOn(dctx, m, f.restore, t)
	}
	if m.agent, err = agentclient.Connect(dctx, vm); err != nil {
		return m, &hypervisor.StartError{Phase: "boot", Err: err, Console: vm.Info().ConsoleTail()}
	}
	t.mark("t_boot")
	m.work(func() { m.agent.Wait(m.ctx) })
	// One does not need the other.
	configured := make(chan error, 2)
	go func() { configured <- m.net.Configure(ctx, vm.Info().NICs, m.agent) }()
	go func() { configured <- m.bringUpCPUs(ctx, vm.Info().CPUs) }()
	err = s.createInGuest(ctx, m, pod)
	if err := errors.Join(err, <-configured, <-configured); err != nil {
		return m, err
	}
	if err := m.watchNetwork(); err != nil {
		return m, err
	}
	if d := m.daemon.Load(); d != nil {
		m.work(func() { m.keepKnown(d) })
	}
	t.mark("t_sandbox")
	return m, nil
}

// goOn is what is left of the start of a machine that was restored.
func (s *Sandbox) goOn(ctx context.Context, m *machine, r *restore, t *timings) error {
	var err error
	if m.agent, err = agentclient.ConnectRestored(ctx, m.vm); err != nil {
		return &hypervisor.StartError{Phase: "restore", Err: err, Console: m.vm.Info().ConsoleTail()}
	}
	m.work(func() { m.agent.Wait(m.ctx) })
	if err := r.network(ctx, m); err != nil {
		return err
	}
	m.work(m.keepClock)
	t.mark("t_restore")
	return m.watchNetwork()
}

// startVMM starts daemon and VMM, again when the first start was from a template
// that turned out to be of no use.
func (s *Sandbox) startVMM(ctx context.Context, m *machine, share *storage.Share, vc hypervisor.Config, noShare bool) (hypervisor.VM, error) {
	var again hypervisor.Config // in case of a second start
	if s.o.Config.Factory.EnableTemplate {
		var err error
		if again, err = vc.Dup(); err != nil {
			vc.CloseDevices()
			return nil, err
		}
	}
	err := s.startOnce(ctx, m, share, vc, noShare)
	// What the host's kernel has killed for want of memory would not fit when it boots either.
	if !errors.Is(err, template.ErrRestore) || m.cgroup != nil && m.cgroup.OOM() != nil {
		again.CloseDevices()
		return m.vm, err
	}
	s.o.Log.Warn("booting instead", "error", err)
	if d := m.daemon.Load(); d != nil { // it has lost its VMM
		d.Expect()
		d.Stop()
		m.daemon.Store(nil)
	}
	err = s.startOnce(ctx, m, share, again, noShare)
	return m.vm, err
}

func (s *Sandbox) startOnce(ctx context.Context, m *machine, share *storage.Share, vc hypervisor.Config, noShare bool) error {
	daemon, err := s.startDaemon(ctx, m, share.Dir(), &vc, noShare)
	if err != nil {
		vc.CloseDevices()
		return err
	}
	vm, err := s.o.Hypervisor.Start(ctx, vc)
	if err == nil {
		m.vm = vm
	}
	// A VMM that lost its daemon fails too; the daemon's own words say more.
	return errors.Join(<-daemon, err)
}

// startDaemon starts virtiofsd in the background: its socket exists already,
// which is all that the VMM needs. The channel yields once.
func (s *Sandbox) startDaemon(ctx context.Context, m *machine, dir string, vc *hypervisor.Config, none bool) (<-chan error, error) {
	done := make(chan error, 1)
	if none {
		done <- nil
		return done, nil
	}
	start, share, err := s.daemon(dir, m.sizer.bounds.most.memory, vc.Started)
	if err != nil {
		return nil, err
	}
	vc.Shares = []hypervisor.Share{share}
	go func() {
		d, err := start(ctx)
		if err == nil {
			m.daemon.Store(d)
		}
		done <- err
	}()
	return done, nil
}

// recordProcess writes a child into the ledger; it dies with this process in
// any case, and delete makes sure of it.
func (s *Sandbox) recordProcess(m *machine, name string, pid int) error {
	e, err := ledger.Process(name, pid)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	token, err := s.o.Ledger.Record(e)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.tokens = append(m.tokens, token)
	m.mu.Unlock()
	return nil
}

// createInGuest makes the pod known to the agent.
func (s *Sandbox) createInGuest(ctx context.Context, m *machine, pod PodConfig) error {
	name := pod.Hostname
	if name == "" { // what a new namespace on the host would begin with
		name, _ = os.Hostname()
	}
	req := &agentpb.CreateSandboxRequest{
		Hostname:      name,
		Dns:           pod.DNS,
		GuestHookPath: s.o.Config.QEMU.GuestHookPath,
		SandboxId:     s.o.ID,
		SandboxPidns:  pod.SharePID,
	}
	if !m.late {
		req.Storages = append(req.Storages, shareStorage())
	}
	// Any container of the pod may bind it, so it is there whether the first one does or not.
	shm := &agentpb.Storage{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: protocols.GuestShmDir,
		Options: []string{"noexec", "nosuid", "nodev", "mode=1777"}}
	if size := pod.ShmBytes; size > 0 {
		shm.Options = append(shm.Options, fmt.Sprintf("size=%d", size))
	}
	req.Storages = append(req.Storages, shm)
	for _, line := range s.o.Config.Agent.KernelModules {
		req.KernelModules = append(req.KernelModules, kernelModule(line))
	}
	if _, err := m.agent.CreateSandbox(ctx, req); err != nil {
		return fmt.Errorf("create sandbox in the guest: %w", m.agent.Err(err))
	}
	m.work(m.keepClock)
	return nil
}

// kernelModule parses "name parameter…".
func kernelModule(line string) *agentpb.KernelModule {
	f := strings.Fields(line)
	if len(f) == 0 {
		return &agentpb.KernelModule{}
	}
	return &agentpb.KernelModule{Name: f[0], Parameters: f[1:]}
}
