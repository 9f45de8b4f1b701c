// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/reaper"
)

// namespaces are the pod's own, made when the first container joins and bound to
// files so that they outlive every process.
type namespaces struct {
	dir  string
	mu   sync.Mutex                          // held while one is made: a second container must wait for it anyway
	made map[specs.LinuxNamespaceType]string // guarded by mu
}

var cloneFlags = map[specs.LinuxNamespaceType]int{
	specs.IPCNamespace: unix.CLONE_NEWIPC,
	specs.UTSNamespace: unix.CLONE_NEWUTS,
}

// path returns the file of the pod's namespace of type t.
func (n *namespaces) path(t specs.LinuxNamespaceType) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, ok := n.made[t]; ok {
		return p, nil
	}
	p := filepath.Join(n.dir, string(t))
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return "", fmt.Errorf("pod's %s namespace: %w", t, err)
	}
	f, err := os.OpenFile(p, os.O_CREATE|os.O_RDONLY|os.O_EXCL, 0o600)
	if err != nil {
		return "", fmt.Errorf("pod's %s namespace: %w", t, err)
	}
	f.Close()
	result := make(chan error)
	go func() {
		// This thread changes its namespace and must never run anything else:
		// it stays locked, so it ends with the goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(cloneFlags[t])
		if err == nil {
			err = unix.Mount(fmt.Sprintf("/proc/thread-self/ns/%s", t), p, "", unix.MS_BIND, "")
		}
		result <- err
	}()
	if err := <-result; err != nil {
		return "", errors.Join(fmt.Errorf("pod's %s namespace: %w", t, err), os.Remove(p))
	}
	n.made[t] = p
	return p, nil
}

// pidns is the PID namespace that containers of the pod share: that of the pause
// container where there is one, else of a process that is there for nothing else.
// It is never that of an ordinary container, which may end before the others.
type pidns struct {
	ready chan struct{}        // closed when path is known or making it failed
	path  string               // empty: failed
	gone  <-chan reaper.Status // yields when the process that is there for it ended; nil with a pause container
	over  bool                 // guarded by the pod's mu; gone has yielded
}

// sharedPID returns the path of the pod's PID namespace, which the first caller makes.
func (p *Pod) sharedPID(ctx context.Context) (string, error) {
	for {
		p.mu.Lock()
		ns := p.pidns
		mine := ns == nil || ns.ended()
		if mine {
			ns = &pidns{ready: make(chan struct{})}
			p.pidns = ns
		}
		p.mu.Unlock()
		if mine {
			return p.makePIDNS(ctx, ns)
		}
		select {
		case <-ns.ready:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
		if ns.path != "" {
			return ns.path, nil
		}
	}
}

// ended tells whether the namespace was made and has ended with its first
// process. The caller holds the pod's mu.
func (n *pidns) ended() bool {
	select {
	case <-n.ready:
	default:
		return false
	}
	select {
	case <-n.gone:
		n.over = true
	default:
	}
	return n.over
}

// makePIDNS starts the process that holds the namespace, and tells those who wait.
func (p *Pod) makePIDNS(ctx context.Context, ns *pidns) (string, error) {
	pid, gone, err := p.cfg.PIDHolder(ctx)
	if err != nil {
		p.forgetPIDNS(ns)
		err = fmt.Errorf("pod's pid namespace: %w", err)
	} else {
		ns.path, ns.gone = pidNSPath(pid), gone
	}
	close(ns.ready)
	return ns.path, err
}

func pidNSPath(pid int) string { return fmt.Sprintf("/proc/%d/ns/pid", pid) }

// holdPIDNS makes the namespace of a pause container the pod's, unless there is one.
func (p *Pod) holdPIDNS(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidns == nil {
		p.pidns = &pidns{ready: make(chan struct{}), path: pidNSPath(pid)}
		close(p.pidns.ready)
	}
}

func (p *Pod) forgetPIDNS(ns *pidns) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidns == ns {
		p.pidns = nil
	}
}

// dropPIDNS forgets the shared namespace when the pause container that holds it goes.
func (p *Pod) dropPIDNS(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidns != nil && p.pidns.gone == nil && p.pidns.path == pidNSPath(pid) {
		p.pidns = nil
	}
}

// cgroupOf is the directory of a process's cgroup; cgroup v2 has one line, "0::/path".
func cgroupOf(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	_, path, ok := strings.Cut(strings.TrimSpace(string(b)), "0::")
	if !ok {
		return "", fmt.Errorf("no cgroup v2 line in %q", b)
	}
	return filepath.Join("/sys/fs/cgroup", path), nil
}
