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

// pidns is the pid namespace that containers of the pod share: that of the first
// one which asked for it (the pause container of Kubernetes).
type pidns struct {
	ready chan struct{} // closed when path is known or making it failed
	path  string        // empty: failed
}

// sharedPID returns the path to join, or an empty one to the container that is to
// make the namespace; that one must call made.
func (p *Pod) sharedPID(ctx context.Context) (path string, made func(pid int), err error) {
	for {
		p.mu.Lock()
		ns := p.pidns
		if ns == nil {
			ns = &pidns{ready: make(chan struct{})}
			p.pidns = ns
			p.mu.Unlock()
			return "", func(pid int) { p.pidMade(ns, pid) }, nil
		}
		p.mu.Unlock()
		select {
		case <-ns.ready:
		case <-ctx.Done():
			return "", nil, context.Cause(ctx)
		}
		if ns.path != "" {
			return ns.path, func(int) {}, nil
		}
	}
}

// pidMade records the namespace of process pid; 0 says that it was not made.
func (p *Pod) pidMade(ns *pidns, pid int) {
	p.mu.Lock()
	if pid > 0 {
		ns.path = fmt.Sprintf("/proc/%d/ns/pid", pid)
	} else if p.pidns == ns {
		p.pidns = nil
	}
	p.mu.Unlock()
	close(ns.ready)
}

// dropPIDNS forgets the shared namespace when the container that holds it goes.
func (p *Pod) dropPIDNS(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidns != nil && p.pidns.path == fmt.Sprintf("/proc/%d/ns/pid", pid) {
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
