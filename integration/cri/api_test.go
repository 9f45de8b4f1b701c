// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// dialShim connects to the shim of the only pod, beside containerd.
func (p *pod) dialShim() *ttrpc.Client {
	p.Helper()
	sockets, err := filepath.Glob(filepath.Join(p.c.PodsDir(), "[^.]*", "shim.sock"))
	if err != nil || len(sockets) != 1 {
		p.Fatalf("sockets %v, %v; want one", sockets, err)
	}
	conn, err := net.Dial("unix", sockets[0])
	p.ok(err)
	client := ttrpc.NewClient(conn)
	p.Cleanup(func() { client.Close() })
	return client
}

// sandboxClient is the shim's Sandbox service.
func (p *pod) sandboxClient() sandboxapi.TTRPCSandboxService {
	p.Helper()
	return sandboxapi.NewTTRPCSandboxClient(p.dialShim())
}

// TestSandboxStates: the Sandbox service itself, on the shim's socket, with a real
// machine behind it.
func TestSandboxStates(t *testing.T) {
	b := newBox(t, sandboxMode)
	p := b.run()
	s := p.sandboxClient()
	_, err := s.CreateSandbox(b.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: p.id})
	if err := errgrpc.ToNative(err); !errdefs.IsAlreadyExists(err) {
		b.Errorf("second create: %v", err)
	}
	_, err = s.StartSandbox(b.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: p.id})
	if err := errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) {
		b.Errorf("second start: %v", err)
	}
	st := must(s.SandboxStatus(b.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: p.id, Verbose: true}))(b)
	if st.State != "SANDBOX_READY" || st.Pid == 0 || st.CreatedAt == nil || st.Info["info"] == "" {
		b.Errorf("status %v", st)
	}
	platform := must(s.Platform(b.ctx(), &sandboxapi.PlatformRequest{SandboxID: p.id}))(b)
	if platform.Platform.OS != "linux" || platform.Platform.Architecture == "" {
		b.Errorf("platform %v", platform)
	}
	must(s.PingSandbox(b.ctx(), &sandboxapi.PingRequest{SandboxID: p.id}))(b)
	must(s.SandboxMetrics(b.ctx(), &sandboxapi.SandboxMetricsRequest{SandboxID: p.id}))(b)

	c := p.sleeper()
	began := time.Now()
	waited := make(chan *sandboxapi.WaitSandboxResponse, 1)
	ctx := b.ctx()
	go func() {
		r, err := s.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: p.id})
		if err != nil {
			b.Error(err)
		}
		waited <- r
	}()
	for range 2 {
		must(s.StopSandbox(b.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: p.id}))(b)
	}
	if r := <-waited; r.GetExitStatus() != 0 || time.Since(began) > 10*time.Second {
		b.Errorf("wait %v after %v", r, time.Since(began))
	}
	_, err = s.PingSandbox(b.ctx(), &sandboxapi.PingRequest{SandboxID: p.id})
	if err := errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) {
		b.Errorf("ping of a stopped sandbox: %v", err)
	}
	// The CRI sees both ends.
	if s := c.wait(); s.ExitCode != 137 {
		b.Errorf("the container's exit code is %d", s.ExitCode)
	}
}
