// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/pod"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// CreateContainer makes a container whose init waits for StartContainer.
func (s *Service) CreateContainer(ctx context.Context, req *agentpb.CreateContainerRequest) (*agentpb.ProcessMade, error) {
	c, err := s.Pod.CreateContainer(ctx, req)
	if err != nil {
		return nil, err
	}
	return &agentpb.ProcessMade{Pid: uint32(c.Init().PID())}, nil
}

// StartContainer lets the init run its program.
func (s *Service) StartContainer(ctx context.Context, req *agentpb.StartContainerRequest) (*emptypb.Empty, error) {
	err := s.with(req.ContainerId, func(c *pod.Container) error { return c.Start(ctx) })
	if err == nil {
		s.started()
	}
	return empty, err
}

// with runs f on a container.
func (s *Service) with(id string, f func(*pod.Container) error) error {
	c, err := s.Pod.Container(id)
	if err != nil {
		return err
	}
	return f(c)
}

// RemoveContainer kills and forgets a container. A timeout of 0 leaves the bound
// to the caller's deadline.
func (s *Service) RemoveContainer(ctx context.Context, req *agentpb.RemoveContainerRequest) (*emptypb.Empty, error) {
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(req.Timeout)*time.Second)
		defer cancel()
	}
	return empty, s.Pod.RemoveContainer(ctx, req.ContainerId)
}

// ExecProcess makes and starts one more process in a container.
func (s *Service) ExecProcess(ctx context.Context, req *agentpb.ExecProcessRequest) (*agentpb.ProcessMade, error) {
	resp := &agentpb.ProcessMade{}
	ports := pod.Ports{Stdin: req.StdinPort, Stdout: req.StdoutPort, Stderr: req.StderrPort}
	err := s.with(req.ContainerId, func(c *pod.Container) error {
		pr, err := c.Exec(ctx, req.ExecId, req.Process, ports)
		if err == nil {
			resp.Pid = uint32(pr.PID())
		}
		return err
	})
	return resp, err
}

// SignalProcess sends a signal: to one process, or with an empty exec_id to all.
func (s *Service) SignalProcess(_ context.Context, req *agentpb.SignalProcessRequest) (*emptypb.Empty, error) {
	return empty, s.with(req.ContainerId, func(c *pod.Container) error { return c.Signal(req.ExecId, unix.Signal(req.Signal)) })
}

// WaitProcess answers when the process is gone: exit code, or 128 plus signal.
func (s *Service) WaitProcess(ctx context.Context, req *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	var (
		code    int
		written [2]uint64
	)
	err := s.with(req.ContainerId, func(c *pod.Container) (err error) {
		code, written, err = c.Wait(ctx, req.ExecId)
		return err
	})
	return &agentpb.WaitProcessResponse{Status: int32(code), StdoutBytes: written[0], StderrBytes: written[1]}, err
}

// UpdateContainer changes limits.
func (s *Service) UpdateContainer(_ context.Context, req *agentpb.UpdateContainerRequest) (*emptypb.Empty, error) {
	return empty, s.with(req.ContainerId, func(c *pod.Container) error { return c.Update(req.Resources) })
}

// StatsContainer reads the container's cgroup and the guest's interfaces.
func (s *Service) StatsContainer(_ context.Context, req *agentpb.StatsContainerRequest) (*agentpb.StatsContainerResponse, error) {
	resp := &agentpb.StatsContainerResponse{}
	err := s.with(req.ContainerId, func(c *pod.Container) (err error) {
		if resp.CgroupStats, err = c.Stats(); err != nil {
			return err
		}
		resp.NetworkStats, err = s.Network.Stats()
		return err
	})
	return resp, err
}

// PauseContainer stops every process of a container.
func (s *Service) PauseContainer(ctx context.Context, req *agentpb.PauseContainerRequest) (*emptypb.Empty, error) {
	return empty, s.with(req.ContainerId, func(c *pod.Container) error { return c.Pause(ctx) })
}

// ResumeContainer is the opposite of PauseContainer.
func (s *Service) ResumeContainer(ctx context.Context, req *agentpb.ResumeContainerRequest) (*emptypb.Empty, error) {
	return empty, s.with(req.ContainerId, func(c *pod.Container) error { return c.Resume(ctx) })
}

// process finds a process of a container.
func (s *Service) process(cid, execID string) (*pod.Process, error) {
	c, err := s.Pod.Container(cid)
	if err != nil {
		return nil, err
	}
	return c.Process(execID)
}

// WriteStdin is for hosts without stdio connections. Empty data is the end of file.
func (s *Service) WriteStdin(ctx context.Context, req *agentpb.WriteStreamRequest) (*agentpb.WriteStreamResponse, error) {
	p, err := s.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	if len(req.Data) == 0 {
		p.IO.CloseStdin()
		return &agentpb.WriteStreamResponse{}, nil
	}
	n, err := p.IO.Write(ctx, req.Data)
	return &agentpb.WriteStreamResponse{Len: uint32(n)}, err
}

// ReadStdout waits for output and returns some; empty data is its end.
func (s *Service) ReadStdout(ctx context.Context, req *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return s.read(ctx, req, false)
}

// ReadStderr is ReadStdout for stderr.
func (s *Service) ReadStderr(ctx context.Context, req *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return s.read(ctx, req, true)
}

func (s *Service) read(ctx context.Context, req *agentpb.ReadStreamRequest, stderr bool) (*agentpb.ReadStreamResponse, error) {
	p, err := s.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	b, err := p.IO.Read(ctx, stderr, int(min(req.Len, 1<<20)))
	return &agentpb.ReadStreamResponse{Data: b}, err
}

// CloseStdin is the end of file on stdin.
func (s *Service) CloseStdin(_ context.Context, req *agentpb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := s.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	p.IO.CloseStdin()
	return empty, nil
}

// TtyWinResize sets the size of a process's terminal.
func (s *Service) TtyWinResize(_ context.Context, req *agentpb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	p, err := s.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return empty, p.IO.Resize(req.Row, req.Column)
}

// GetOOMEvent waits for the next OOM kill and names its container.
func (s *Service) GetOOMEvent(ctx context.Context, _ *agentpb.GetOOMEventRequest) (*agentpb.OOMEvent, error) {
	id, err := s.Pod.NextOOM(ctx)
	return &agentpb.OOMEvent{ContainerId: id}, err
}

// GetDiagnosticData answers log_type "agent-log" with the agent's last log lines.
func (s *Service) GetDiagnosticData(_ context.Context, req *agentpb.GetDiagnosticDataRequest) (*agentpb.GetDiagnosticDataResponse, error) {
	if req.LogType != "agent-log" {
		return nil, fault.New(fault.InvalidArgument, "log_type %q: want agent-log", req.LogType)
	}
	return &agentpb.GetDiagnosticDataResponse{Data: string(s.Sink.Kept())}, nil
}

// UpdateEphemeralMounts changes the options of guest memory mounts.
func (s *Service) UpdateEphemeralMounts(_ context.Context, req *agentpb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	var errs []error
	for _, st := range req.Storages {
		errs = append(errs, s.Storage.Remount(st))
	}
	return empty, errors.Join(errs...)
}
