// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/sandbox/storage"
)

// mountPlan says how one mount of the specification reaches the guest.
type mountPlan int

const (
	mountInGuest mountPlan = iota // the guest makes it: proc, tmpfs, devpts …
	mountShared                   // a file or directory of the host, through the share
	mountSynced                   // a small volume or file that the guest gets a copy of
	mountPodShm                   // the pod's /dev/shm
)

// guestOwned are host directories whose like the guest has itself: sharing the
// host's would show the container the wrong machine.
var guestOwned = []string{"/proc", "/sys", "/dev"}

// planMount decides by type, source and destination only.
func planMount(m specs.Mount) mountPlan {
	isBind := m.Type == "bind" || m.Type == "rbind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
	if !isBind {
		return mountInGuest
	}
	if filepath.Clean(m.Destination) == "/dev/shm" {
		return mountPodShm
	}
	src := filepath.Clean(m.Source)
	for _, d := range guestOwned {
		if src == d || strings.HasPrefix(src, d+"/") {
			return mountInGuest
		}
	}
	if isSynced(m) {
		return mountSynced
	}
	return mountShared
}

// guestSpec is the specification as the guest gets it: a copy of spec in which
// root and sources name guest paths and everything that is numbered or owned by
// the host is gone. sources maps mount indexes to guest paths.
func guestSpec(spec *specs.Spec, root string, sources map[int]string, seccomp bool) *specs.Spec {
	g := *spec
	g.Hooks = nil // of the host; they have run there
	g.Root = &specs.Root{Path: root}
	if spec.Root != nil {
		g.Root.Readonly = spec.Root.Readonly
	}
	g.Process = guestProcess(spec.Process)
	g.Mounts = guestMounts(spec.Mounts, sources)
	g.Linux = guestLinux(spec.Linux, seccomp)
	g.Annotations = privateNamespaces(spec)
	if spec.Domainname != "" { // the wire has no field for it
		sysctl := maps.Clone(g.Linux.Sysctl)
		if sysctl == nil {
			sysctl = map[string]string{}
		}
		sysctl["kernel.domainname"] = spec.Domainname
		g.Linux.Sysctl = sysctl
	}
	return &g
}

// privateNamespaces are the annotations with the one that says which of the pod's
// namespaces the container has for itself: those listed without a path.
func privateNamespaces(spec *specs.Spec) map[string]string {
	if spec.Annotations[containerTypeKey] != "container" {
		return spec.Annotations // the guest gives it its own, or makes its own the pod's
	}
	var own []string
	for _, n := range spec.Linux.Namespaces {
		if n.Path == "" && (n.Type == specs.IPCNamespace || n.Type == specs.UTSNamespace) {
			own = append(own, string(n.Type))
		}
	}
	if len(own) == 0 && spec.Annotations[protocols.AnnotationPrivate] == "" {
		return spec.Annotations
	}
	out := maps.Clone(spec.Annotations)
	if out == nil {
		out = map[string]string{}
	}
	out[protocols.AnnotationPrivate] = strings.Join(own, ",")
	return out
}

// guestProcess is a copy without what the guest's kernel does not have.
func guestProcess(p *specs.Process) *specs.Process {
	g := *p
	g.ApparmorProfile, g.SelinuxLabel = "", ""
	return &g
}

func guestMounts(mounts []specs.Mount, sources map[int]string) []specs.Mount {
	out := make([]specs.Mount, 0, len(mounts))
	for i, m := range mounts {
		if src, ok := sources[i]; ok {
			m.Source = src
		} else if planMount(m) == mountPodShm {
			m.Source = protocols.GuestShmDir
		}
		out = append(out, m)
	}
	return out
}

func guestLinux(l *specs.Linux, seccomp bool) *specs.Linux {
	g := *l
	g.CgroupsPath, g.MountLabel, g.IntelRdt = "", "", nil
	if !seccomp {
		g.Seccomp = nil
	}
	g.Namespaces = nil
	for _, n := range l.Namespaces {
		// The guest is the pod's network; its cgroup tree is v2 and private to it.
		if n.Type == specs.NetworkNamespace || n.Type == specs.CgroupNamespace || n.Type == specs.TimeNamespace {
			continue
		}
		g.Namespaces = append(g.Namespaces, specs.LinuxNamespace{Type: n.Type})
	}
	g.Namespaces = append(g.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	if l.Resources != nil {
		r := *l.Resources
		r.Network, r.Rdma = nil, nil // numbered by the host
		r.BlockIO = diskRates(r.BlockIO, l.Devices)
		if r.CPU != nil {
			c := *r.CPU
			c.Cpus, c.Mems = "", ""
			r.CPU = &c
		}
		g.Resources = &r
	}
	return &g
}

// sharesPIDNamespace tells whether the container joins another's PID namespace:
// a path in the specification, which can only be that of the pod.
func sharesPIDNamespace(spec *specs.Spec) bool {
	return sharesNamespace(spec, specs.PIDNamespace)
}

// podShmSize is the size in bytes of the host's directory that a mount binds as
// the pod's /dev/shm, 0 when none does.
func podShmSize(spec *specs.Spec) int64 {
	for _, m := range spec.Mounts {
		if planMount(m) == mountPodShm {
			return tmpfsSize(m.Source)
		}
	}
	return 0
}

// isRecursive tells whether a bind mount takes the mounts below it along.
func isRecursive(m specs.Mount) bool {
	return m.Type == "rbind" || slices.Contains(m.Options, "rbind")
}

// bindOptions are those of a mount through the share. Without a word about
// propagation the mount follows its source, as with runc (rootfsPropagation rslave).
func bindOptions(m specs.Mount) storage.BindOptions {
	o := storage.BindOptions{Recursive: isRecursive(m), ReadOnly: readOnly(m.Options)}
	for _, word := range m.Options {
		switch word {
		case "private", "rprivate", "unbindable", "runbindable":
			o.Private = true
		case "slave", "rslave":
			o.Private = false
		}
	}
	return o
}

// readOnly tells whether a mount's options end in read-only.
func readOnly(options []string) bool {
	ro := false
	for _, o := range options {
		switch o {
		case "ro", "rro":
			ro = true
		case "rw":
			ro = false
		}
	}
	return ro
}

// tmpfsSize is the size in bytes of the file system at path, 0 when unknown.
func tmpfsSize(path string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return 0
	}
	return int64(st.Blocks) * st.Bsize
}
