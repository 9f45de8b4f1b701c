// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/sandbox/cgroup"
)

// A cgroup that cannot be joined fails the start before there is a process, and
// leaves nothing (which newPod checks).
func TestCgroupFails(t *testing.T) {
	for _, c := range []struct {
		name, path, word string
		split            bool
		kind             func(error) bool
	}{
		{"path", "/a/../b", "linux.cgroupsPath", false, errdefs.IsInvalidArgument},
		{"split", "/a/b", "runtime.sandbox_cgroup_only", true, errdefs.IsInvalidArgument},
		{"hierarchy gone", "/a/b", "cgroup /a/kata_pod", false, func(err error) bool { return err != nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPod(t)
			p.Sandbox.o.Cgroups = &cgroup.Host{V2: &cgroup.Hierarchy{Mount: filepath.Join(t.TempDir(), "gone"), Root: "/"}}
			p.config.Runtime.SandboxCgroupOnly = !c.split
			cc := p.container("c", "sleep")
			cc.Spec.Linux.CgroupsPath = c.path
			_, err := p.CreateContainer(bounded(t), cc)
			if !c.kind(err) || !strings.Contains(err.Error(), c.word) {
				t.Errorf("CreateContainer: %v; want it to name %s", err, c.word)
			}
			if n := p.boots.Load(); n != 0 {
				t.Errorf("%d machines were started", n)
			}
		})
	}
}

// A host without any cgroup runs pods all the same.
func TestNoCgroups(t *testing.T) {
	p := newPod(t)
	p.Sandbox.o.Cgroups = &cgroup.Host{}
	exit(t, p.start("c", "echo", "hello").Init())
}
