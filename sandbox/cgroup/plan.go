// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Request is what a pod asks for.
type Request struct {
	// Pod is the sandbox id.
	Pod string
	// Path is linux.cgroupsPath of the pod's first container; Parent the CRI's
	// cgroup_parent of a pod that has none. Both may be empty.
	Path, Parent string
	// Resources are the pod's limits, Overhead what its machine may use beside them; either may be nil.
	Resources, Overhead *specs.LinuxResources
	// Split keeps everything but the vCPUs' threads out of the pod's cgroup.
	Split bool
}

// Plan is where everything goes, and within which limits.
type Plan struct {
	Location
	// Dirs are the pod's directories. On version 1 there is one for each hierarchy.
	Dirs []Dir
	// Overhead are the directories of what is not counted for the pod; with them
	// only threads go into Dirs.
	Overhead []Dir `json:",omitempty"`
	// Tracking are directories that systemd makes beside Dirs and removes with the unit.
	Tracking []Dir `json:",omitempty"`
	// Limits of the pod's directories.
	Limits Limits
}

// Dir is one directory of a plan.
type Dir struct {
	// Mount is the hierarchy's mount point, Path the directory below it, absolute.
	Mount, Path string
	// V2 tells the version; Controllers are those of version 1.
	V2          bool     `json:",omitempty"`
	Controllers []string `json:",omitempty"`
}

// has tells whether a controller can be found in the directory. Which ones version 2 has shows only when it is made.
func (d Dir) has(controller string) bool { return d.V2 || slices.Contains(d.Controllers, controller) }

// threaded are the controllers of version 1 that count threads rather than processes.
var threaded = []string{"cpu", "cpuacct", "cpuset"}

// Plan decides where a pod's processes go. It is a pure function.
func (h Host) Plan(r Request) (Plan, error) {
	l, err := locate("linux.cgroupsPath", r.Path, r.Pod)
	if r.Path == "" {
		l, err = locateParent("linux.cgroup_parent", r.Parent, r.Pod)
	}
	if err != nil {
		return Plan{}, err
	}
	p := Plan{Location: l, Limits: limits(r)}
	if h.V2 != nil {
		p.Dirs = []Dir{{Mount: h.V2.Mount, Path: filepath.Join(h.V2.Mount, l.Path), V2: true}}
	}
	p.Dirs = append(p.Dirs, dirs(h.V1, l.Path)...)
	if l.Unit != "" {
		p.Tracking = dirs(h.Tracking, l.Path)
	}
	if !r.Split {
		return p, nil
	}
	switch {
	case h.V2 != nil:
		return Plan{}, splitError("threads of one process cannot be in two cgroups of version 2, which this host has")
	case l.Unit != "":
		return Plan{}, splitError("systemd ends a scope that holds only threads, and linux.cgroupsPath names a scope")
	}
	p.Overhead = dirs(h.V1, path.Join(OverheadParent, r.Pod))
	p.Dirs = slices.DeleteFunc(p.Dirs, func(d Dir) bool { return !slices.ContainsFunc(threaded, d.has) })
	return p, nil
}

func splitError(why string) error {
	return fmt.Errorf("runtime.sandbox_cgroup_only must be true: %s: %w", why, errdefs.ErrInvalidArgument)
}

func dirs(in []Hierarchy, p string) (out []Dir) {
	for _, m := range in {
		out = append(out, Dir{Mount: m.Mount, Path: filepath.Join(m.Mount, p), Controllers: m.Controllers, V2: len(m.Controllers) == 0})
	}
	return out
}
