// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// container is one in the guest.
type container struct {
	procs  map[string]*process // exec id → process; the container's id is its first process
	paused bool
}

var empty = &emptypb.Empty{}

// CreateSandbox implements the service.
func (a *Agent) CreateSandbox(context.Context, *agentpb.CreateSandboxRequest) (*emptypb.Empty, error) {
	return empty, nil
}

// DestroySandbox implements the service.
func (a *Agent) DestroySandbox(context.Context, *agentpb.DestroySandboxRequest) (*emptypb.Empty, error) {
	return empty, nil
}

// SetGuestDateTime implements the service.
func (a *Agent) SetGuestDateTime(context.Context, *agentpb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if a.ClockSet != nil {
		a.ClockSet()
	}
	return empty, nil
}

// GetGuestDetails implements the service.
func (a *Agent) GetGuestDetails(context.Context, *agentpb.GuestDetailsRequest) (*agentpb.GuestDetailsResponse, error) {
	d := &agentpb.AgentDetails{Version: "test"}
	if !a.NoStreams {
		d.ExtraFeatures = append(d.ExtraFeatures, protocols.FeatureStdioStreams)
	}
	return &agentpb.GuestDetailsResponse{AgentDetails: d}, nil
}

func (a *Agent) container(id string) (*container, error) {
	if c, ok := a.containers[id]; ok {
		return c, nil
	}
	return nil, status.Errorf(codes.NotFound, "container %s", id)
}

func (a *Agent) process(id, exec string) (*process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	if exec == "" {
		exec = id
	}
	if p, ok := c.procs[exec]; ok {
		return p, nil
	}
	return nil, status.Errorf(codes.NotFound, "process %s in container %s", exec, id)
}

// CreateContainer implements the service.
func (a *Agent) CreateContainer(ctx context.Context, r *agentpb.CreateContainerRequest) (*agentpb.ProcessMade, error) {
	p, err := a.newProcess(ctx, r.OCI.GetProcess(), r.StdinPort, r.StdoutPort, r.StderrPort)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.containers[r.ContainerId]; ok {
		return nil, status.Errorf(codes.AlreadyExists, "container %s", r.ContainerId)
	}
	c := &container{procs: map[string]*process{r.ContainerId: p}}
	a.containers[r.ContainerId] = c
	go a.endWith(p, c)
	return a.number(), nil
}

// number gives a new process its pid.
//
// a.mu is held.
func (a *Agent) number() *agentpb.ProcessMade {
	a.lastPID++
	return &agentpb.ProcessMade{Pid: firstPID + a.lastPID}
}

// firstPID is the number before that of the first process.
const firstPID = 10

// newProcess finds the program and claims its streams.
func (a *Agent) newProcess(ctx context.Context, spec *agentpb.Process, ports ...uint32) (*process, error) {
	program := builtin[spec.Args[0]]
	if p, ok := a.Programs[spec.Args[0]]; ok {
		program = p
	}
	if program == nil {
		return nil, status.Errorf(codes.InvalidArgument, "exec: %q: executable file not found in $PATH", spec.Args[0])
	}
	p := newProcess(program, spec)
	if a.NoStreams {
		in, w := io.Pipe()
		p.p.Stdin, p.in = in, w
		p.out = [2]output{newBuffer(), newBuffer()}
		return p, nil
	}
	for i, port := range ports {
		if port == 0 {
			continue
		}
		select {
		case c := <-a.streams.port(port):
			a.streams.forget(port)
			p.claim(i, c)
		case <-ctx.Done():
			return nil, status.Errorf(codes.InvalidArgument, "no stream from port %d", port)
		}
	}
	return p, nil
}

func (p *process) claim(i int, c net.Conn) {
	if i == 0 {
		p.stdin, p.p.Stdin = c, c
		return
	}
	p.out[i-1] = c
}

// StartContainer implements the service.
func (a *Agent) StartContainer(_ context.Context, r *agentpb.StartContainerRequest) (*emptypb.Empty, error) {
	p, err := a.process(r.ContainerId, "")
	if err != nil {
		return nil, err
	}
	p.run()
	return empty, nil
}

// ExecProcess implements the service.
func (a *Agent) ExecProcess(ctx context.Context, r *agentpb.ExecProcessRequest) (*agentpb.ProcessMade, error) {
	if _, err := a.process(r.ContainerId, ""); err != nil {
		return nil, err
	}
	p, err := a.newProcess(ctx, r.Process, r.StdinPort, r.StdoutPort, r.StderrPort)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c, err := a.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	c.procs[r.ExecId] = p
	p.run()
	return a.number(), nil
}

// SignalProcess implements the service.
func (a *Agent) SignalProcess(_ context.Context, r *agentpb.SignalProcessRequest) (*emptypb.Empty, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	p.signal(r.Signal)
	return empty, nil
}

// WaitProcess implements the service.
func (a *Agent) WaitProcess(ctx context.Context, r *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
		return &agentpb.WaitProcessResponse{Status: p.status, StdoutBytes: p.written[0].Load(), StderrBytes: p.written[1].Load()}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// RemoveContainer implements the service.
func (a *Agent) RemoveContainer(_ context.Context, r *agentpb.RemoveContainerRequest) (*emptypb.Empty, error) {
	a.mu.Lock()
	c, err := a.container(r.ContainerId)
	delete(a.containers, r.ContainerId)
	a.mu.Unlock()
	if err != nil {
		return nil, err
	}
	c.kill()
	return empty, nil
}

// endWith kills a container's execs when its first process has ended, as a PID
// namespace does.
func (a *Agent) endWith(first *process, c *container) {
	<-first.done
	a.mu.Lock()
	all := slices.Collect(maps.Values(c.procs))
	a.mu.Unlock()
	for _, p := range all {
		if p != first {
			p.signal(sigkill)
		}
	}
}

// RemoveStaleVirtiofsShareMounts implements the service.
func (a *Agent) RemoveStaleVirtiofsShareMounts(context.Context, *agentpb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return empty, nil
}

func (c *container) kill() {
	for _, p := range c.procs {
		p.signal(sigkill)
		for _, o := range p.out { // also what a grandchild holds
			_ = o.Close()
		}
	}
}

// killAll ends what runs when the machine does.
func (a *Agent) killAll() {
	a.mu.Lock()
	all := a.containers
	a.containers = map[string]*container{}
	a.mu.Unlock()
	for _, c := range all {
		c.kill()
	}
}

func (a *Agent) pause(id string, to bool) (*emptypb.Empty, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	if c.paused == to {
		return nil, status.Errorf(codes.FailedPrecondition, "paused is %v already", to)
	}
	c.paused = to
	return empty, nil
}

// GetOOMEvent implements the service.
func (a *Agent) GetOOMEvent(ctx context.Context, _ *agentpb.GetOOMEventRequest) (*agentpb.OOMEvent, error) {
	select {
	case id := <-a.OOM:
		return &agentpb.OOMEvent{ContainerId: id}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// PauseContainer implements the service.
func (a *Agent) PauseContainer(_ context.Context, r *agentpb.PauseContainerRequest) (*emptypb.Empty, error) {
	return a.pause(r.ContainerId, true)
}

// ResumeContainer implements the service.
func (a *Agent) ResumeContainer(_ context.Context, r *agentpb.ResumeContainerRequest) (*emptypb.Empty, error) {
	return a.pause(r.ContainerId, false)
}

// UpdateContainer implements the service.
func (a *Agent) UpdateContainer(_ context.Context, r *agentpb.UpdateContainerRequest) (*emptypb.Empty, error) {
	_, err := a.process(r.ContainerId, "")
	return empty, err
}

// OnlineCPUMem implements the service.
func (a *Agent) OnlineCPUMem(context.Context, *agentpb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return empty, nil
}

// StatsContainer implements the service.
func (a *Agent) StatsContainer(_ context.Context, r *agentpb.StatsContainerRequest) (*agentpb.StatsContainerResponse, error) {
	if _, err := a.process(r.ContainerId, ""); err != nil {
		return nil, err
	}
	return &agentpb.StatsContainerResponse{CgroupStats: &agentpb.CgroupStats{PidsStats: &agentpb.PidsStats{Current: 3}}}, nil
}

// TtyWinResize implements the service.
func (a *Agent) TtyWinResize(_ context.Context, r *agentpb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	_, err := a.process(r.ContainerId, r.ExecId)
	return empty, err
}

// GetDiagnosticData implements the service: there are no data.
func (a *Agent) GetDiagnosticData(context.Context, *agentpb.GetDiagnosticDataRequest) (*agentpb.GetDiagnosticDataResponse, error) {
	return &agentpb.GetDiagnosticDataResponse{}, nil
}

// ReadStdout implements the service.
func (a *Agent) ReadStdout(_ context.Context, r *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return a.read(r, 0)
}

// ReadStderr implements the service.
func (a *Agent) ReadStderr(_ context.Context, r *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return a.read(r, 1)
}

func (a *Agent) read(r *agentpb.ReadStreamRequest, i int) (*agentpb.ReadStreamResponse, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	b, ok := p.out[i].(*buffer)
	if !ok {
		return nil, status.Error(codes.FailedPrecondition, "the process has streams")
	}
	return &agentpb.ReadStreamResponse{Data: b.next(r.Len)}, nil
}

// WriteStdin implements the service.
func (a *Agent) WriteStdin(_ context.Context, r *agentpb.WriteStreamRequest) (*agentpb.WriteStreamResponse, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	n, err := p.in.Write(r.Data)
	if err != nil {
		return nil, fmt.Errorf("stdin: %w", err)
	}
	return &agentpb.WriteStreamResponse{Len: uint32(n)}, nil
}

// CloseStdin implements the service.
func (a *Agent) CloseStdin(_ context.Context, r *agentpb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	return empty, p.in.Close()
}
