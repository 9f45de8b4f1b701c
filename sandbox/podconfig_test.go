// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/hypervisor"
)

// A pod of its own: the machine comes before the containers and outlives them.
func TestPodWithoutContainers(t *testing.T) {
	p := newPod(t)
	is(t, "start before prepare", p.Start(bounded(t)), errdefs.IsFailedPrecondition)
	must(t, p.Prepare(PodConfig{Hostname: "web-0", SharePID: true}, nil, nil))
	is(t, "second prepare", p.Prepare(PodConfig{}, nil, nil), errdefs.IsAlreadyExists)
	_, err := p.CreateContainer(bounded(t), p.container("early", "true"))
	is(t, "container before start", err, errdefs.IsFailedPrecondition)
	must(t, p.Start(bounded(t)))
	is(t, "second start", p.Start(bounded(t)), errdefs.IsFailedPrecondition)
	is(t, "prepare after start", p.Prepare(PodConfig{}, nil, nil), errdefs.IsAlreadyExists)
	if p.PID() == 0 || p.State() != Running || !p.Empty() || p.Idle() {
		t.Errorf("pid %d, %v, empty %t", p.PID(), p.State(), p.Empty())
	}
	for range 2 { // the machine stays when the last container goes, and the guest forgets it before the next
		c := p.start("c1", "true")
		exit(t, c.Init())
		must(t, c.Delete(bounded(t)))
	}
	if n := p.boots.Load(); n != 1 {
		t.Errorf("%d boots", n)
	}
	if calls := p.agent.Calls(); !slices.Contains(calls, "RemoveContainer c1") {
		t.Errorf("calls %q", calls)
	}
	must(t, p.Stop(bounded(t)))
	must(t, p.Stop(bounded(t)))
	is(t, "start of a stopped pod", p.Start(bounded(t)), errdefs.IsFailedPrecondition)
	is(t, "prepare of a stopped pod", p.Prepare(PodConfig{}, nil, nil), errdefs.IsFailedPrecondition)
	if err := p.Reason(); err != nil {
		t.Errorf("reason of an end that was asked for: %v", err)
	}
}

func TestPodWithoutContainersThatDoesNotStart(t *testing.T) {
	p := newPod(t, func(p *pod) {
		p.fake.BeforeStart = func(context.Context, hypervisor.Config) error { return errTest }
	})
	must(t, p.Prepare(PodConfig{}, nil, nil))
	if err := p.Start(bounded(t)); !errors.Is(err, errTest) {
		t.Errorf("got %v", err)
	}
	if !errors.Is(p.Reason(), errTest) || p.State() != Stopped {
		t.Errorf("reason %v, state %v", p.Reason(), p.State())
	}
}

func TestPrepareAfterAContainer(t *testing.T) {
	p := newPod(t)
	p.create("c1", "true")
	is(t, "prepare", p.Prepare(PodConfig{}, nil, nil), errdefs.IsAlreadyExists)
}

// The pod's PID namespace is joined only where the pod has one.
func TestPIDNamespaceOfAPod(t *testing.T) {
	for _, share := range []bool{false, true} {
		p := newPod(t)
		must(t, p.Prepare(PodConfig{SharePID: share}, nil, nil))
		must(t, p.Start(bounded(t)))
		cc := p.container("c1", "true")
		cc.Spec.Linux.Namespaces[1].Path = "/proc/7/ns/pid"
		_, err := p.CreateContainer(bounded(t), cc)
		is(t, "join", err, map[bool]func(error) bool{false: errdefs.IsNotImplemented}[share])
	}
}

func TestPrepareRefusesTheHostsNetwork(t *testing.T) {
	p := newPod(t)
	err := p.Prepare(PodConfig{NetNSPath: "/proc/self/ns/net"}, nil, nil)
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "netns_path") {
		t.Errorf("got %v", err)
	}
}

func TestJoinPod(t *testing.T) {
	hosts := filepath.Join(t.TempDir(), "hosts")
	must(t, os.WriteFile(hosts, nil, 0o644))
	pod := &PodConfig{Sysctls: map[string]string{"a": "pod", "b": "pod"}, Files: map[string]string{"/etc/hosts": hosts, "/etc/hostname": "/h"}}
	spec := &specs.Spec{
		Root: &specs.Root{Readonly: true},
		Mounts: []specs.Mount{
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm"},
			{Destination: "/etc/hosts", Type: "bind", Source: "/mine"},
		},
		Linux: &specs.Linux{
			Sysctl:     map[string]string{"b": "own"},
			Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: "/proc/7/ns/ipc"}},
		},
	}
	got := joinPod(spec, pod)
	if planMount(got.Mounts[0]) != mountPodShm {
		t.Errorf("/dev/shm of a sharer: %+v", got.Mounts[0])
	}
	if len(got.Mounts) != 3 || got.Mounts[1].Source != "/mine" || got.Mounts[2].Source != "/h" || !readOnly(got.Mounts[2].Options) {
		t.Errorf("mounts %+v", got.Mounts)
	}
	if s := got.Linux.Sysctl; s["a"] != "pod" || s["b"] != "own" {
		t.Errorf("sysctls %v", s)
	}
	if len(spec.Mounts) != 2 || spec.Mounts[0].Type != "tmpfs" || len(spec.Linux.Sysctl) != 1 {
		t.Errorf("the original was changed: %+v", spec)
	}
	spec.Linux.Namespaces[0].Path = ""
	if m := joinPod(spec, pod).Mounts[0]; planMount(m) != mountInGuest {
		t.Errorf("/dev/shm of one with an IPC namespace of its own: %+v", m)
	}
}
