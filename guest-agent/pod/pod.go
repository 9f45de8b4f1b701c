// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"log/slog"
	"os"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/devices"
	"github.com/kata-v2/kata/guest-agent/engine"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/reaper"
	"github.com/kata-v2/kata/guest-agent/storage"
	"github.com/kata-v2/kata/guest-agent/streams"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Group is the cgroup of one container; *cgroups.Group is one. It is as wide as
// the set of things that a cgroup does for a container: each method is one file.
type Group interface {
	Open() (*os.File, error)
	Procs() ([]int, error)
	Kill() error
	Freeze(ctx context.Context, on bool) error
	WaitEmpty(ctx context.Context) error
	WatchOOM(ctx context.Context, f func()) error
	Apply(r *specs.LinuxResources) error
	SetDevices(rules []specs.LinuxDeviceCgroup) error
	Stats() (*agentpb.CgroupStats, error)
	Remove() error
}

// Config is what a Pod is made of.
type Config struct {
	Engine  engine.Engine
	Group   func(id string) (Group, error) // makes a cgroup
	Storage *storage.Manager
	Finder  *devices.Finder
	Hub     *streams.Hub
	Modules *boot.Modules
	Params  boot.Params
	Log     *slog.Logger
	// PIDHolder starts a process in a new PID namespace that does nothing but
	// hold it, and returns its pid and the channel that tells its end.
	PIDHolder func(context.Context) (int, <-chan reaper.Status, error)
	// RunDir is protocols.GuestRunDir, NSDir where the pod's namespaces are bound,
	// SysctlDir is /proc/sys; tests have others.
	RunDir, NSDir, SysctlDir string
}

// Pod is the sandbox. There is one in a guest.
type Pod struct {
	cfg Config
	ns  namespaces
	oom chan string

	mu         sync.Mutex
	active     bool                   // guarded by mu; CreateSandbox succeeded
	containers map[string]*Container  // guarded by mu; nil value: being created
	hooks      specs.Hooks            // guarded by mu; of guest_hook_path
	pidns      *pidns                 // guarded by mu; the shared one
	shared     map[string]*sharedName // guarded by mu; names in the share that containers use
	stale      map[string]string      // guarded by mu; names that containers have left → the share they are in
}

// maxOOMEvents bounds what is kept while nobody asks for OOM events.
const maxOOMEvents = 256

// New makes an empty pod.
func New(cfg Config) *Pod {
	return &Pod{
		cfg: cfg, containers: map[string]*Container{}, oom: make(chan string, maxOOMEvents),
		ns: namespaces{dir: cfg.NSDir, made: map[specs.LinuxNamespaceType]string{}},
	}
}

// Container finds one by its id.
func (p *Pod) Container(id string) (*Container, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.containers[id]; c != nil {
		return c, nil
	}
	return nil, fault.New(fault.NotFound, "no container %q", id)
}

// Containers lists all.
func (p *Pod) Containers() []*Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*Container
	for _, c := range p.containers {
		if c != nil {
			out = append(out, c)
		}
	}
	return out
}

// NextOOM waits until the kernel's OOM killer strikes in a container, and names it.
func (p *Pod) NextOOM(ctx context.Context) (string, error) {
	select {
	case id := <-p.oom:
		return id, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func (p *Pod) reportOOM(id string) {
	select {
	case p.oom <- id:
	default:
		p.cfg.Log.Warn("OOM event dropped: nobody asks for them", agentlog.KeyContainer, id)
	}
}
