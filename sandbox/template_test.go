// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/sandbox/cgroup"
)

// A pod that has a limit of memory does not make a template: it would count.
func TestWhoMakesTemplates(t *testing.T) {
	for name, c := range map[string]struct {
		r    *specs.LinuxResources
		want bool
	}{
		"no limits":       {&specs.LinuxResources{}, true},
		"a limit of CPUs": {limited(0, 50_000, ""), true},
		"of memory":       {limited(64*mib, 0, ""), false},
	} {
		cfg, _, err := configOf("")
		must(t, err)
		m := &machine{ctx: context.Background(), sizer: newSizer(testHost, boundsOf(cfg, testHost), demand{}), cgroup: &cgroup.Group{}}
		m.sizer.set("a", c.r)
		if got := m.mayMakeTemplate(); got != c.want {
			t.Errorf("%s: %v; want %v", name, got, c.want)
		}
	}
}
