// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"slices"
	"sync"
	"testing"

	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// late is a pod that begins without a share, though its containers need one.
func late(t *testing.T) *pod {
	p := newPod(t, func(p *pod) { p.config.QEMU.VirtioFSWhenNeeded = true })
	must(t, p.Prepare(PodConfig{}, nil, nil))
	must(t, p.Start(bounded(t)))
	if d := p.m.daemon.Load(); d != nil {
		t.Errorf("daemon %d in a pod without containers", d.PID())
	}
	return p
}

// Containers that are created at once plug one share, which the guest is told of
// with each.
func TestShareWhenNeeded(t *testing.T) {
	p := late(t)
	for _, s := range p.agent.Request("CreateSandbox").(*agentpb.CreateSandboxRequest).Storages {
		if s.Driver == "virtio-fs" {
			t.Errorf("the guest mounts %v before it is there", s)
		}
	}
	var wg sync.WaitGroup
	for _, id := range []string{"c1", "c2", "c3"} {
		wg.Go(func() {
			if _, err := p.CreateContainer(bounded(t), p.container(id, "sleep")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := p.m.vm.(*hypervisortest.FakeVM).Shares(); !slices.Equal(got, []string{"kataShared"}) {
		t.Errorf("shares %q; want one", got)
	}
	if s := p.agent.Request("CreateContainer").(*agentpb.CreateContainerRequest).Storages; len(s) != 1 || s[0].Driver != "virtio-fs" || !s[0].Shared {
		t.Errorf("the guest is told of %v; want the share, which stays", s)
	}
	if p.m.daemon.Load() == nil {
		t.Error("no daemon")
	}
}

// A daemon that was started later ends the pod with it, too.
func TestLateDaemonKilled(t *testing.T) {
	p := late(t)
	c := p.start("c1", "sleep")
	kill(t, p.m.daemon.Load().PID())
	exit(t, c.Init())
	<-p.Ended()
	if err := p.Reason(); err == nil || err.Error() != "virtiofsd ended: signal: killed" {
		t.Errorf("reason %v", err)
	}
}
