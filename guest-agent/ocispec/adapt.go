// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/protocols"
)

// Annotations by which a caller says what role a container has in its pod.
const (
	annotationKataType = "io.katacontainers.pkg.oci.container_type"
	annotationCRIType  = "io.kubernetes.cri.container-type"
)

// InPod says whether the container belongs to a pod, so that it shares the
// sandbox's ipc and uts namespaces with its neighbours. A single container gets
// new ones of its own, which is cheaper.
func InPod(s *specs.Spec) bool {
	for _, key := range []string{annotationKataType, annotationCRIType} {
		switch s.Annotations[key] {
		case "pod_container", "container", "pod_sandbox", "sandbox":
			return true
		}
	}
	return false
}

// Private says whether the container has a namespace of type t for itself that
// the others of its pod share.
func Private(s *specs.Spec, t specs.LinuxNamespaceType) bool {
	return slices.Contains(strings.Split(s.Annotations[protocols.AnnotationPrivate], ","), string(t))
}

// IsPause says whether the container is the pod's pause container, which exists
// for the namespaces that the others join.
func IsPause(s *specs.Spec) bool {
	return s.Annotations[annotationKataType] == "pod_sandbox" || s.Annotations[annotationCRIType] == "sandbox"
}

// MayNeedModules says whether the container's programs may set rules of the packet
// filter or mount file systems, for which the kernel may need modules.
func MayNeedModules(s *specs.Spec) bool {
	return s.Process != nil && s.Process.Capabilities != nil && slices.ContainsFunc(s.Process.Capabilities.Bounding, func(c string) bool {
		return c == "CAP_NET_ADMIN" || c == "CAP_SYS_ADMIN"
	})
}

// Wants says whether s lists a namespace of type t without a path, that is a new
// one or the pod's.
func Wants(s *specs.Spec, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t && n.Path == "" })
}

// Placement is where a container goes in the guest.
type Placement struct {
	// IPC, UTS and PID are paths of namespaces to join; empty means a new one
	// where the specification lists it.
	IPC, UTS, PID string
	// SharedPID makes the container live in the pod's pid namespace even when
	// the specification lists none; an empty PID then makes it the first one there.
	SharedPID bool
	// GuestHooks are appended to the specification's own.
	GuestHooks specs.Hooks
}

// Adapt edits s in place for the guest and returns what it took out because the
// engine does not do it: the resources, and the sysctls that are the guest's own.
func Adapt(s *specs.Spec, p Placement) (*specs.LinuxResources, map[string]string) {
	resources := s.Linux.Resources
	// The agent owns the cgroup. The host's path means nothing in here.
	s.Linux.Resources, s.Linux.CgroupsPath = nil, ""
	adaptNamespaces(s, p)
	if !has(s, specs.UTSNamespace) || p.UTS != "" {
		// Without a namespace of its own a container must not rename the pod.
		s.Hostname = ""
	}
	addHooks(s, p.GuestHooks)
	return resources, takeSysctls(s)
}

func adaptNamespaces(s *specs.Spec, p Placement) {
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		// Clocks belong to the guest; pid is put back below when it is the pod's.
		return n.Type == specs.TimeNamespace || (p.SharedPID && n.Type == specs.PIDNamespace)
	})
	if p.SharedPID {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: p.PID})
	}
	for i := range s.Linux.Namespaces {
		n := &s.Linux.Namespaces[i]
		if n.Path != "" {
			continue
		}
		switch n.Type {
		case specs.IPCNamespace:
			n.Path = p.IPC
		case specs.UTSNamespace:
			n.Path = p.UTS
		}
	}
	// A container that sees cgroups sees only its own: the guest's hierarchy
	// holds its neighbours.
	mountsCgroup := slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" || m.Type == "cgroup2" })
	if mountsCgroup && !has(s, specs.CgroupNamespace) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
}

func has(s *specs.Spec, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
}

func addHooks(s *specs.Spec, h specs.Hooks) {
	if len(h.CreateRuntime)+len(h.Poststart)+len(h.Poststop) == 0 {
		return
	}
	if s.Hooks == nil {
		s.Hooks = &specs.Hooks{}
	}
	s.Hooks.CreateRuntime = append(s.Hooks.CreateRuntime, h.CreateRuntime...)
	s.Hooks.Poststart = append(s.Hooks.Poststart, h.Poststart...)
	s.Hooks.Poststop = append(s.Hooks.Poststop, h.Poststop...)
}

// ipcSysctls are those that live in an ipc namespace (sysctl(5), ipc_namespaces(7)).
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
	"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// takeSysctls splits off the sysctls that act on the guest as a whole: those of
// no namespace, and those of the network, which the container shares with the
// guest. The guest is this pod's alone, so they are not anyone else's business.
func takeSysctls(s *specs.Spec) map[string]string {
	guest := map[string]string{}
	own := map[string]string{}
	for k, v := range s.Linux.Sysctl {
		name := strings.ReplaceAll(k, "/", ".")
		switch {
		case slices.Contains(ipcSysctls, name), strings.HasPrefix(name, "fs.mqueue."),
			name == "kernel.domainname", name == "kernel.hostname":
			own[k] = v
		case strings.HasPrefix(name, "net.") && has(s, specs.NetworkNamespace):
			own[k] = v
		default:
			guest[k] = v
		}
	}
	s.Linux.Sysctl = own
	return guest
}
