// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/config"
)

// PodConfig is what the machine is made from: everything about the pod that is
// not about one container. It comes from the specification of the first container
// (PodFromSpec), which is the pause container of Kubernetes where there is one, or
// from a caller that describes a pod without containers (Sandbox.Start).
type PodConfig struct {
	// NetNSPath is the pod's network namespace; empty makes a new one.
	NetNSPath string
	// Networked says that the caller has made a network in NetNSPath: a namespace
	// without a device is a mistake then.
	Networked bool
	// Hostname is the guest's; empty: the host's.
	Hostname string
	// DNS are lines of the guest's resolv.conf.
	DNS []string
	// SharePID puts containers that ask for the pod's PID namespace into one.
	SharePID bool
	// Sysctls are set for every container of the pod.
	Sysctls map[string]string
	// ShmBytes is the size of the pod's /dev/shm; 0 leaves it to the guest (half of its memory).
	ShmBytes int64
	// Resources are the pod's limits, Overhead what the machine may use beside
	// them; nil when nobody set any.
	Resources, Overhead *specs.LinuxResources
	// CgroupsPath is linux.cgroupsPath of the pod's first container: a path on the
	// host or "slice:prefix:name". CgroupParent is the CRI's cgroup_parent, for a pod
	// that starts without a container.
	CgroupsPath, CgroupParent string
	// Annotations of the pod.
	Annotations map[string]string
	// Files are of the pod and appear in its containers: path in the container →
	// file on the host. A mount of the specification at the same path wins.
	Files map[string]string
}

// PodFromSpec reads the pod out of the specification of its first container.
func PodFromSpec(spec *specs.Spec) PodConfig {
	p := PodConfig{
		NetNSPath:   networkPath(spec),
		Networked:   spec.Annotations[containerTypeKey] == "sandbox",
		Hostname:    spec.Hostname,
		SharePID:    sharesPIDNamespace(spec),
		ShmBytes:    podShmSize(spec),
		Annotations: spec.Annotations,
	}
	if spec.Linux != nil {
		p.Resources, p.CgroupsPath = spec.Linux.Resources, spec.Linux.CgroupsPath
	}
	return p
}

// Prepare makes this the pod of a caller that starts it by Start, before and
// without any container; containers are refused until then. With a configuration,
// that and the hypervisor replace what New was given: a pod's annotations, which
// choose among the settings, may come after the shim has started. It fails with
// AlreadyExists when the pod was prepared or started before.
func (s *Sandbox) Prepare(p PodConfig, c *config.Config, h hypervisor.Hypervisor) error {
	if p.NetNSPath != "" {
		if err := validateNetNS("netns_path", p.NetNSPath, ""); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.state == Stopped:
		return s.stoppedLocked()
	case s.pod != nil, s.state != Created, len(s.containers) > 0:
		return fmt.Errorf("sandbox %s: %w", s.o.ID, errdefs.ErrAlreadyExists)
	}
	if c != nil {
		s.o.Config, s.o.Hypervisor = c, h
	}
	s.pod = &p
	return nil
}

// Start starts the machine of a prepared pod. Its deadline is that of a
// container's creation; when it fails the pod is stopped.
func (s *Sandbox) Start(ctx context.Context) error {
	s.mu.Lock()
	pod, state, stopped := s.pod, s.state, s.stoppedLocked()
	starting := s.starting
	s.starting = s.starting || pod != nil && state == Created
	s.mu.Unlock()
	switch {
	case state == Stopped:
		return stopped
	case pod == nil:
		return fmt.Errorf("sandbox %s was not created: %w", s.o.ID, errdefs.ErrFailedPrecondition)
	case starting || state != Created:
		return fmt.Errorf("sandbox %s was started already: %w", s.o.ID, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, s.o.Config.Runtime.CreateContainerTimeout)
	defer cancel()
	share, err := s.share()
	if err != nil {
		return err
	}
	t, f := newTimings(), s.firstOfPod()
	if f.restore, err = s.restorePod(); err != nil {
		return fmt.Errorf("start sandbox: %w", err)
	}
	if err := s.start(ctx, share, *pod, f, t); err != nil {
		return fmt.Errorf("start sandbox: %w", err)
	}
	s.o.Log.Info("sandbox started", append([]any{"sandbox", s.o.ID}, t.pairs...)...)
	return nil
}

// stoppedLocked is why a stopped sandbox takes nothing any more. The caller holds mu.
func (s *Sandbox) stoppedLocked() error {
	if s.reason != nil {
		return fmt.Errorf("%w: %w", ErrStopped, s.reason)
	}
	return ErrStopped
}

// Reason is why the machine ended by itself or did not start; nil while it runs
// and when it ended because it was asked to.
func (s *Sandbox) Reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reason
}

// prepared is the description of a pod that exists without containers, nil for one that began with a container.
func (s *Sandbox) prepared() *PodConfig {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pod
}

// joinPod gives a container what its prepared pod has and an engine with a pause
// container would have written into the specification: the pod's files, its
// /dev/shm in the place of a private one, its sysctls. The specification is a copy.
func joinPod(spec *specs.Spec, p *PodConfig) *specs.Spec {
	out := *spec
	linux := *spec.Linux
	out.Linux = &linux
	out.Mounts = slices.Clone(spec.Mounts)
	if sharesNamespace(spec, specs.IPCNamespace) {
		for i, m := range out.Mounts {
			if m.Destination == "/dev/shm" && m.Type == "tmpfs" {
				out.Mounts[i] = specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Destination, Options: []string{"rbind", "rw", "nosuid", "nodev", "noexec"}}
			}
		}
	}
	for _, dst := range slices.Sorted(maps.Keys(p.Files)) {
		if slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == dst }) {
			continue
		}
		mode := "rw"
		if spec.Root != nil && spec.Root.Readonly {
			mode = "ro"
		}
		out.Mounts = append(out.Mounts, specs.Mount{Destination: dst, Type: "bind", Source: p.Files[dst], Options: []string{"rbind", "rprivate", mode}})
	}
	if len(p.Sysctls) > 0 {
		linux.Sysctl = maps.Clone(p.Sysctls)
		maps.Copy(linux.Sysctl, spec.Linux.Sysctl)
	}
	return &out
}

// sharesNamespace tells whether a container joins a namespace of the pod: one
// with a path, which can only be the pod's.
func sharesNamespace(spec *specs.Spec, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t && n.Path != "" })
}
