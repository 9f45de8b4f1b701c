// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestOnHost(t *testing.T) {
	z := newSizer(testHost, bounds{}, demand{})
	z.set("a", limited(64*mib, 50_000, "0-1"))
	z.set("b", limited(32*mib, 25_000, "3"))
	r, _ := z.onHost()
	if *r.CPU.Quota != 75_000 || *r.Memory.Limit != 96*mib || r.CPU.Cpus != "0-1,3" {
		t.Errorf("two: %d, %d, %s", *r.CPU.Quota, *r.Memory.Limit, r.CPU.Cpus)
	}
	z.set("b", &specs.LinuxResources{})
	if r, _ = z.onHost(); r.CPU.Quota != nil || r.Memory.Limit != nil || r.CPU.Cpus != "" {
		t.Errorf("one of them has no limits: %+v %+v", r.CPU, r.Memory)
	}
	z.pod = limited(1, 0, "")
	if r, _ = z.onHost(); r != z.pod {
		t.Errorf("a pod with limits as a whole: %+v", r)
	}
}

// The limits of a pod as a whole change while it runs; those of its machine follow.
func TestResizePod(t *testing.T) {
	p := sized(t)
	if err := p.Resize(bounded(t), nil, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("before there is a machine: %v", err)
	}
	must(t, p.Prepare(PodConfig{Resources: limited(128*mib, 100_000, "")}, nil, nil))
	must(t, p.Start(bounded(t)))
	p.expect("started", 2, 384*mib, 0)
	must(t, p.Resize(bounded(t), limited(512*mib, 200_000, ""), nil))
	p.expect("grown", 3, 768*mib, 3)
	c, err := p.limited("c", limited(64*mib, 10_000, ""))
	must(t, err)
	must(t, c.Update(bounded(t), limited(32*mib, 0, "")))
	p.expect("what the pod says of itself stays", 3, 768*mib, 3)
	for name, r := range map[string]*specs.LinuxResources{
		"memory.limit": limited(4<<30, 0, ""), "cpu.quota": limited(0, -5, ""), "unified": {Unified: map[string]string{"io.max": "8:0 rbps=1"}},
	} {
		if err := p.Resize(bounded(t), r, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%v; want it to name %s", err, name)
		}
	}
	must(t, p.Resize(bounded(t), limited(128*mib, 100_000, ""), nil))
	p.expect("shrunk", 2, 384*mib, 2)
	must(t, p.Resize(bounded(t), nil, nil))
	p.expect("by its container alone", 2, 384*mib, 2)
}
