// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"fmt"
	"os"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (p *pod) state() runtimeapi.PodSandboxState {
	p.Helper()
	return must(p.runtime.PodSandboxStatus(p.ctx(), p.id, false))(p).Status.State
}

// TestPodLife: a pod is ready, stops in short time, stays known until it is
// removed; stopping and removing twice is no error.
func TestPodLife(t *testing.T) { each(t, testPodLife, pauseMode, oldMode) }

func testPodLife(b *box) {
	before := time.Now()
	p := b.run()
	s := must(b.runtime.PodSandboxStatus(b.ctx(), p.id, false))(b).Status
	if s.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.Metadata.Name != p.config.Metadata.Name || s.RuntimeHandler != b.mode.handler {
		b.Errorf("status %v", s)
	}
	if at := time.Unix(0, s.CreatedAt); at.Before(before) || at.After(time.Now()) {
		b.Errorf("created at %v; the pod was made between %v and now", at, before)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", p.pid())); err != nil {
		b.Errorf("the pod's process: %v", err)
	}
	p.sleeper()
	began := time.Now()
	b.ok(b.runtime.StopPodSandbox(b.ctx(), p.id))
	if took := time.Since(began); took > 10*time.Second {
		b.Errorf("the stop took %v", took)
	}
	if got := p.state(); got != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		b.Errorf("state %v after the stop", got)
	}
	b.ok(b.runtime.StopPodSandbox(b.ctx(), p.id))
	if _, err := b.runtime.CreateContainer(b.ctx(), p.id, p.containerConfig("true"), p.config); err == nil {
		b.Error("a stopped pod takes a container")
	}
	b.ok(b.runtime.RemovePodSandbox(b.ctx(), p.id))
	b.ok(b.runtime.RemovePodSandbox(b.ctx(), p.id))
	if _, err := b.runtime.PodSandboxStatus(b.ctx(), p.id, false); err == nil {
		b.Error("a removed pod has a status")
	}
}
