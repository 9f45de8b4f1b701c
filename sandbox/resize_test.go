// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// sized is a pod on a host of four CPUs and 2 GiB.
func sized(t *testing.T, change ...func(*pod)) *pod {
	p := newPod(t, change...)
	p.o.HostCPUs, p.o.HostMemory = testHost.CPUs, testHost.MemoryBytes
	return p
}

func (p *pod) limited(id string, r *specs.LinuxResources) (*Container, error) {
	cc := p.container(id, "sleep")
	cc.Spec.Linux.Resources = r
	return p.CreateContainer(bounded(p.t), cc)
}

// expect checks the machine's size and what the guest was last told of its CPUs.
func (p *pod) expect(when string, cpus int, memory uint64, online uint32) {
	p.t.Helper()
	c, m := p.m.vm.(*hypervisortest.FakeVM).Size()
	if c != cpus || m != memory {
		p.t.Errorf("%s: the machine has %d vCPUs and %d MiB; want %d, %d MiB", when, c, m/mib, cpus, memory/mib)
	}
	r, _ := p.agent.Request("OnlineCPUMem").(*agentpb.OnlineCPUMemRequest)
	if got := r.GetOnlineCpus(); got != online {
		p.t.Errorf("%s: the guest was told of %d CPUs; want %d", when, got, online)
	}
}

func TestMachineFollowsItsContainers(t *testing.T) {
	p := sized(t)
	one, err := p.limited("one", limited(64*mib, 50_000, ""))
	must(t, err)
	p.expect("one container", 2, 320*mib, 0) // known before the boot
	two, err := p.limited("two", limited(64*mib, 100_000, ""))
	must(t, err)
	p.expect("two", 3, 384*mib, 3)
	must(t, two.Update(bounded(t), limited(512*mib, 250_000, "")))
	p.expect("two has grown", 4, 832*mib, 4)
	must(t, two.Update(bounded(t), limited(128*mib, 0, ""))) // the quota stays
	p.expect("its memory shrinks", 4, 448*mib, 4)
	must(t, two.Update(bounded(t), limited(0, 10_000, "")))
	p.expect("its time shrinks", 2, 448*mib, 2)
	must(t, one.Update(bounded(t), limited(4*mib, 10_000, "")))
	p.expect("below the size at boot", 2, 388*mib, 2)

	for name, r := range map[string]*specs.LinuxResources{
		"memory.limit": limited(4<<30, 0, ""), "cpu.quota": limited(0, -5, ""), "cpu.cpus": limited(0, 0, "9"),
	} {
		if err := two.Update(bounded(t), r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("update: %v; want it to name %s", err, name)
		}
		if _, err := p.limited("bad", r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("create: %v; want it to name %s", err, name)
		}
	}
	p.expect("after what is refused", 2, 388*mib, 2)

	must(t, two.Delete(bounded(t)))
	m, err := p.running()
	must(t, err)
	must(t, m.sizer.begin(bounded(t))) // what shrinks beside has its turn before or after
	m.sizer.finish()
	m.shrink(bounded(t))
	p.expect("two is gone", 2, 320*mib, 2)
}

// A machine of a pod whose sum is stated is never smaller than that, until a limit changes.
func TestStatedSum(t *testing.T) {
	p := sized(t)
	cc := p.container("pause", "sleep")
	cc.Spec.Annotations = map[string]string{containerTypeKey: "sandbox", annotationPodMemory: "268435456", annotationPodQuota: "100000"}
	cc.Spec.Linux.Namespaces = append(cc.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.IPCNamespace})
	_, err := p.CreateContainer(bounded(t), cc)
	must(t, err)
	p.expect("pause", 2, 512*mib, 0)
	c, err := p.limited("c", limited(128*mib, 0, ""))
	must(t, err)
	p.expect("within the sum", 2, 512*mib, 0)
	must(t, c.Update(bounded(t), limited(512*mib, 0, "")))
	p.expect("changed", 2, 768*mib, 1) // those of the boot stay, one idle
}

func TestStaticSize(t *testing.T) {
	p := sized(t, func(p *pod) { p.config.Runtime.StaticSandboxResourceMgmt = true })
	_, err := p.limited("one", limited(64*mib, 50_000, ""))
	must(t, err)
	two, err := p.limited("two", limited(64*mib, 100_000, ""))
	must(t, err)
	must(t, two.Update(bounded(t), limited(512*mib, 0, "")))
	p.expect("static", 2, 320*mib, 0)
}

// A size that the machine cannot have fails what asked for it, and nothing else.
func TestResizeFails(t *testing.T) {
	p := sized(t)
	one, err := p.limited("one", nil)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := one.Update(ctx, limited(64*mib, 0, "")); err == nil {
		t.Error("an update with a cancelled context")
	}
	p.expect("failed", 1, 256*mib, 0)
	must(t, one.Update(bounded(t), limited(64*mib, 0, "")))
	p.expect("again", 1, 320*mib, 1)
}
