// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/cgroup"
	"github.com/kata-v2/kata/sandbox/ledger"
	"github.com/kata-v2/kata/sandbox/network"
	"github.com/kata-v2/kata/sandbox/storage"
)

// Bounds of the orderly end; past them the machine is killed.
const (
	destroyTimeout = 2 * time.Second // the guest syncs
	stopTimeout    = 3 * time.Second // the VMM flushes and quits
)

// ErrStopped is what a sandbox answers that has ended, and an ended one does not start again.
var ErrStopped = fmt.Errorf("the sandbox is stopped: %w", errdefs.ErrFailedPrecondition)

// Options are what a sandbox is made of. All fields are needed unless they say otherwise.
type Options struct {
	// ID is the pod's id.
	ID string
	// Key names the pod on this host; see ledger.Key.
	Key string
	// Config is the effective configuration.
	Config *config.Config
	// Hypervisor starts the machine.
	Hypervisor hypervisor.Hypervisor
	// Ledger holds what must be reaped when this process is killed; its directory is the pod's.
	Ledger *ledger.Ledger
	// HostCPUs is the number of CPUs of the host.
	HostCPUs int
	// HostMemory is the host's memory in bytes; 0 asks its kernel.
	HostMemory uint64
	// Cgroups are the host's; nil keeps the pod's processes where they are.
	Cgroups *cgroup.Host
	// HostMounts is the mount namespace that paths of specifications are in; nil for
	// this process's own. It stays open as long as the sandbox.
	HostMounts *os.File
	// DirectVolumes is the register of direct-assigned volumes, directvolume.Root; empty for none.
	DirectVolumes string
	// Log gets one line per event.
	Log *slog.Logger
	// OOM is told the id of a container in which the guest's kernel killed a
	// process for want of memory; nil if nobody wants to know.
	OOM func(container string)
	// MakeTemplate makes the template for pods of a configuration, of one container
	// when alone is set, in another process: that does nothing before place, which is told
	// its pid, has put it where its memory and time do not count against this pod. It
	// ends with ctx. Nil makes none.
	MakeTemplate func(ctx context.Context, c *config.Config, alone bool, place func(pid int) error) error
}

// Sandbox is one pod.
type Sandbox struct {
	o     Options
	ended chan struct{} // closed when the machine, if ever started, is gone and all was released
	wg    sync.WaitGroup

	boot  sync.Once // the first container starts the machine
	up    chan struct{}
	wish  context.Context // that there be a machine; a boot under way ends with it
	leave context.CancelFunc
	share func() (*storage.Share, error) // made once, before the machine
	made  atomic.Pointer[storage.Share]  // what share returned; nil before
	disks *storage.Disks

	mu         sync.Mutex
	state      State                 // guarded by mu
	containers map[string]*Container // guarded by mu
	reason     error                 // guarded by mu; why the machine ended or did not start
	pod        *PodConfig            // guarded by mu; of a pod that starts without a container
	starting   bool                  // guarded by mu; Start was called
	restore    *restore              // guarded by mu; what the pod goes on from, nil for a new one

	leftInGuest []*Container // guarded by mu; deleted ones that the guest still holds
	endOnce     sync.Once

	// Written once by start before up is closed, read after it.
	bootErr error
	m       *machine
}

// New returns a sandbox without a machine; the first CreateContainer starts it.
func New(o Options) *Sandbox {
	wish, leave := context.WithCancel(context.Background())
	s := &Sandbox{
		o: o, ended: make(chan struct{}), up: make(chan struct{}), containers: map[string]*Container{},
		wish: wish, leave: leave, disks: storage.NewDisks(),
	}
	s.share = sync.OnceValues(func() (*storage.Share, error) {
		share, err := storage.NewShare(filepath.Join(o.Ledger.Dir(), "shared"), o.HostMounts, o.Log)
		s.made.Store(share)
		return share, err
	})
	return s
}

// ID is the pod's id.
func (s *Sandbox) ID() string { return s.o.ID }

// State is the pod's state.
func (s *Sandbox) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Ended is closed when the machine is gone and everything it held on the host is released.
func (s *Sandbox) Ended() <-chan struct{} { return s.ended }

// PID is the live host process that stands for the pod's tasks: the VMM, in the
// pod's network namespace. 0 before the machine runs.
func (s *Sandbox) PID() int {
	select {
	case <-s.up:
	default:
		return 0
	}
	if s.bootErr != nil {
		return 0
	}
	return s.m.vm.Info().PID
}

// running returns the machine, or why there is none.
func (s *Sandbox) running() (*machine, error) {
	s.mu.Lock()
	state, reason := s.state, s.reason
	s.mu.Unlock()
	switch {
	case state == Running:
		return s.m, nil
	case reason != nil:
		return nil, fmt.Errorf("%w: %w", ErrStopped, reason)
	case state == Stopped:
		return nil, ErrStopped
	}
	return nil, fmt.Errorf("the sandbox has not started: %w", errdefs.ErrFailedPrecondition)
}

// start boots the machine once; every caller waits for the same result.
func (s *Sandbox) start(ctx context.Context, share *storage.Share, pod PodConfig, f first, t *timings) error {
	s.boot.Do(func() {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(s.wish, cancel)()
		m, err := s.startMachine(ctx, share, pod, f, t)
		err = m.outOfMemory(err)
		s.mu.Lock()
		if err == nil && s.state == Stopped {
			err = ErrStopped
		}
		if err == nil {
			s.m, s.state = m, Running
		} else {
			s.bootErr, s.reason, s.state = err, err, Stopped
		}
		s.mu.Unlock()
		close(s.up)
		if err == nil {
			s.wg.Go(s.watch)
			return
		}
		m.release(share)
		s.endOnce.Do(func() { close(s.ended) })
	})
	select {
	case <-s.up:
		return s.bootErr
	case <-ctx.Done():
		return ctx.Err()
	}
}

// watch ends everything when the machine, or what it cannot live without, ends.
func (s *Sandbox) watch() {
	var daemonDone <-chan struct{}
	if d := s.m.daemon.Load(); d != nil {
		daemonDone = d.Done()
	}
	select {
	case <-s.m.vm.Done():
	case <-daemonDone:
	case <-s.m.lost:
	}
	s.finish(s.m.cause())
}

// finish is the one way a started machine ends: processes are told first, then
// the host's side is released.
func (s *Sandbox) finish(reason error) {
	s.mu.Lock()
	s.state = Stopped
	if s.reason == nil {
		s.reason = reason
	}
	all := make([]*Container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	if reason != nil {
		s.o.Log.Error("machine ended", "sandbox", s.o.ID, "reason", reason)
	}
	for _, c := range all {
		c.machineEnded()
	}
	share, _ := s.share() // exists, since the machine ran
	s.m.release(share)
	if h, ok := s.o.Hypervisor.(interface{ released() }); ok {
		h.released()
	}
	s.endOnce.Do(func() { close(s.ended) })
}

// Stop ends the pod: the guest syncs, the machine ends, both within bounds and
// never longer than ctx. It is idempotent; a sandbox that never started just
// becomes stopped.
func (s *Sandbox) Stop(ctx context.Context) error {
	s.mu.Lock()
	state := s.state
	if state == Created {
		s.state = Stopped
	}
	s.mu.Unlock()
	s.leave()
	if state == Created {
		started := true
		s.boot.Do(func() { // nobody has begun to start it, and nobody can any more
			s.bootErr, started = ErrStopped, false
			close(s.up)
		})
		if !started {
			s.endOnce.Do(func() {
				if share := s.made.Load(); share != nil { // by a creation that failed before the machine's start
					if err := share.Close(); err != nil {
						s.o.Log.Error("release", "error", err)
					}
				}
				close(s.ended)
			})
		}
	}
	if state == Running {
		s.m.stop(ctx, end{disks: s.disks.Attached() > 0, containers: !s.Empty()}, s.o.Log)
	}
	select {
	case <-s.ended:
		s.wg.Wait()
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop sandbox: %w", ctx.Err())
	}
}

// Container finds a container.
func (s *Sandbox) Container(id string) (*Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.containers[id]; ok && c.published {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// Idle tells whether no container is left and nobody prepared the pod, so that
// nothing is lost with it.
func (s *Sandbox) Idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.containers) == 0 && s.pod == nil
}

// Empty tells whether no container is left.
func (s *Sandbox) Empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.containers) == 0
}

// machine is what a running pod holds on the host and in the guest.
type machine struct {
	vm     hypervisor.VM
	agent  *agentclient.Client
	daemon atomic.Pointer[storage.Daemon] // nil as long as nothing is shared
	net    *network.Network               // nil before it is connected
	cgroup *cgroup.Group                  // nil before it is joined, and without cgroups
	sizer  *sizer                         // nil before the size is known
	disks  *storage.Disks
	saves  *savable    // nil for a machine that cannot be saved
	saving atomic.Bool // a checkpoint is under way
	// restored is the state that the machine was restored from, nil for one that
	// was booted.
	restored *os.File
	log      *slog.Logger
	forget   func(ledger.Token) error
	// forgetting: the guest is about to be asked to forget files, see forgetShare.
	forgetting atomic.Bool

	ctx       context.Context // ends with the machine
	cancel    context.CancelFunc
	workers   sync.WaitGroup
	watchOnce sync.Once // what is read of the guest for its whole life

	alone    bool          // nobody has said that the pod will have several containers
	late     bool          // nothing was shared at the machine's start
	plugging chan struct{} // holds one while a share is plugged in
	lost     chan struct{} // closed when the daemon of such a share has ended by itself

	stopping atomic.Bool // the end has begun, so lost connections mean nothing

	mu     sync.Mutex
	tokens []ledger.Token // guarded by mu; processes in the ledger
	closed bool           // guarded by mu; no more workers
	hung   error          // guarded by mu; why the machine was ended though nobody asked
}

// work runs f beside, which ends with m.ctx; false says that the machine has
// ended and f does not run.
func (m *machine) work(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.workers.Go(f)
	}
	return !m.closed
}

// cause says why the machine ends, nil when it was asked to.
func (m *machine) cause() error {
	m.mu.Lock()
	hung := m.hung
	m.mu.Unlock()
	if hung != nil {
		return hung
	}
	err := m.vm.Err()
	if d := m.daemon.Load(); d != nil {
		if derr := d.Err(); derr != nil {
			err = derr
		}
	}
	return m.outOfMemory(err)
}

// endHung ends a machine whose guest does nothing any more.
func (m *machine) endHung(reason error) {
	m.mu.Lock()
	if m.hung == nil {
		m.hung = reason
	}
	m.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()       // no orderly way
	m.vm.Stop(ctx) //nolint:errcheck // ends in any case
}

// end is what an orderly end has to mind.
type end struct {
	disks      bool // attached ones, which the VMM flushes when it quits
	containers bool // there are some, whose connections the guest still closes
}

// stop lets the guest sync, then ends the VMM. One without disks has nothing to flush
// then, and so is not asked to end. Meanwhile this process leaves the pod's cgroup and
// disconnects its network, for both of which the host's kernel takes 10 to 20 ms. The
// watcher does the rest.
func (m *machine) stop(ctx context.Context, e end, log *slog.Logger) {
	if d := m.daemon.Load(); d != nil {
		d.Expect() // it ends when the VMM does
	}
	m.stopping.Store(true)
	if m.cgroup != nil {
		m.work(func() {
			if err := m.cgroup.SendHome(os.Getpid()); err != nil {
				log.Debug("leave the cgroup early", "error", err) // it is left later
			}
		})
	}
	if !e.containers {
		m.work(func() {
			if err := m.net.Close(); err != nil {
				log.Error("release", "error", err)
			}
		})
	}
	begin := time.Now()
	dctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	_, err := m.agent.DestroySandbox(dctx, &agentpb.DestroySandboxRequest{})
	if err != nil {
		log.Warn("the guest did not end in order", "error", m.agent.Err(err))
	}
	cancel()
	synced := time.Now()
	sctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err == nil && !e.disks {
		cancel()
	}
	m.vm.Stop(sctx) //nolint:errcheck // ends in any case
	log.Info("machine stopped", "t_sync", synced.Sub(begin), "t_vmm", time.Since(synced))
}

// ending tells whether the machine ends or has ended.
func (m *machine) ending() bool {
	select {
	case <-m.vm.Done():
		return true
	default:
		return m.stopping.Load() || m.ctx.Err() != nil
	}
}

// release frees the host's side; it needs no guest. It is called once.
func (m *machine) release(share *storage.Share) {
	if d := m.daemon.Load(); d != nil {
		d.Expect()
	}
	m.cancel()
	if m.vm != nil {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()       // no orderly way any more: whatever still runs is killed
		m.vm.Stop(ctx) //nolint:errcheck // ends in any case
	}
	if d := m.daemon.Load(); d != nil {
		d.Stop()
	}
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.workers.Wait()
	if m.saves != nil {
		m.saves.memory.Close()
	}
	m.disks.LetGo()
	if m.restored != nil {
		m.restored.Close()
	}
	errs := []error{share.Close()}
	if m.net != nil {
		errs = append(errs, m.net.Close())
	}
	if m.cgroup != nil { // nothing but this process is in it now
		errs = append(errs, m.cgroup.Close(context.Background()))
	}
	m.mu.Lock()
	tokens := m.tokens
	m.mu.Unlock()
	for _, t := range tokens {
		errs = append(errs, m.forget(t))
	}
	if err := errors.Join(errs...); err != nil {
		m.log.Error("release", "error", err)
	}
}
