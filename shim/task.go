// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-v2/kata/protocols/taskpb"
	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/storage"
)

var empty = &emptypb.Empty{}

// Create makes a container, and the machine with the first one.
func (s *service) Create(ctx context.Context, r *taskpb.CreateRequest) (_ *taskpb.CreateResponse, err error) {
	defer func() {
		if err != nil {
			s.endIfAbandoned(ctx)
		}
	}()
	spec, err := readSpec(r.Bundle)
	if err != nil {
		return nil, err
	}
	paths := stdioPaths{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal}
	if err := paths.check(); err != nil {
		return nil, err
	}
	if spec.Process != nil {
		spec.Process.Terminal = r.Terminal
	}
	io, err := s.stdio.openStdio(r.Id, paths)
	if err != nil {
		return nil, err
	}
	c, err := s.sb.CreateContainer(ctx, sandbox.ContainerConfig{
		ID: r.Id, Bundle: r.Bundle, Spec: spec, Rootfs: rootfsMounts(r), Stdio: paths.wants(), Checkpoint: r.Checkpoint,
	})
	if err != nil {
		io.abort()
		s.log.Error("create", "container", r.Id, "error", err)
		return nil, err
	}
	if err := io.ready(ctx); err != nil { // it had the time of the machine's start
		io.abort()
		if derr := c.Delete(ctx); derr != nil {
			s.log.Error("undo create", "container", r.Id, "error", derr)
		}
		return nil, err
	}
	p := &procState{p: c.Init(), paths: paths}
	t := &taskState{c: c, bundle: r.Bundle, pid: uint32(s.sb.PID()), procs: map[string]*procState{"": p}}
	p.attach(io)
	s.mu.Lock()
	s.tasks[r.Id] = t
	s.mu.Unlock()
	s.pub.publish(topicCreate, &events.TaskCreate{
		ContainerID: r.Id, Bundle: r.Bundle, Rootfs: eventMounts(r.Rootfs), Pid: t.pid, Checkpoint: r.Checkpoint,
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	s.watch(t, p)
	return &taskpb.CreateResponse{Pid: t.pid}, nil
}

func eventMounts(from []*taskpb.Mount) []*types.Mount {
	var out []*types.Mount
	for _, m := range from {
		out = append(out, &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	return out
}

func rootfsMounts(r *taskpb.CreateRequest) []storage.Mount {
	var out []storage.Mount
	for _, m := range r.Rootfs {
		out = append(out, storage.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	return out
}

// Start runs a container's first process, or one that Exec added.
func (s *service) Start(ctx context.Context, r *taskpb.StartRequest) (*taskpb.StartResponse, error) {
	t, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	done := p.beginStart()
	defer done()
	if r.ExecId == "" {
		if err := t.c.Start(ctx); err != nil {
			return nil, err
		}
		s.pub.publish(topicStart, &events.TaskStart{ContainerID: r.Id, Pid: t.pid})
		return &taskpb.StartResponse{Pid: t.pid}, nil
	}
	io, err := s.stdio.openStdio(r.ExecId, p.paths)
	if err != nil {
		return nil, err
	}
	if err = io.ready(ctx); err == nil {
		err = t.c.StartExec(ctx, p.p)
	}
	if err != nil {
		io.abort()
		return nil, err
	}
	p.attach(io)
	s.pub.publish(topicExecStarted, &events.TaskExecStarted{ContainerID: r.Id, ExecID: r.ExecId, Pid: t.pid})
	s.watch(t, p)
	return &taskpb.StartResponse{Pid: t.pid}, nil
}

// Exec adds a process, which Start runs.
func (s *service) Exec(_ context.Context, r *taskpb.ExecRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	var spec specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("spec: not an OCI process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(spec.Args) == 0 {
		return nil, fmt.Errorf("spec.args: no command: %w", errdefs.ErrInvalidArgument)
	}
	spec.Terminal = r.Terminal
	paths := stdioPaths{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal}
	if err := paths.check(); err != nil {
		return nil, err
	}
	p, err := t.c.Exec(r.ExecId, &spec, paths.wants())
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	t.procs[r.ExecId] = &procState{p: p, id: r.ExecId, paths: paths}
	t.mu.Unlock()
	s.pub.publish(topicExecAdded, &events.TaskExecAdded{ContainerID: r.Id, ExecID: r.ExecId})
	return empty, nil
}

// Wait returns when the process has ended.
func (s *service) Wait(ctx context.Context, r *taskpb.WaitRequest) (*taskpb.WaitResponse, error) {
	_, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.p.Done():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.exitTold(ctx) // what the caller does next comes after it
	e := p.p.Exit()
	return &taskpb.WaitResponse{ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}, nil
}

// Kill sends a signal to a process, or to all of a container.
func (s *service) Kill(ctx context.Context, r *taskpb.KillRequest) (*emptypb.Empty, error) {
	_, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	return empty, p.p.Signal(ctx, r.Signal, r.All && r.ExecId == "")
}

// Delete removes a process that has ended; the first one takes the container along.
func (s *service) Delete(ctx context.Context, r *taskpb.DeleteRequest) (*taskpb.DeleteResponse, error) {
	begin := time.Now()
	t, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if r.ExecId != "" {
		err = t.c.DeleteExec(p.p)
	} else {
		// The guest must not be asked to remove the container while bytes are under way.
		if p.p.State() == sandbox.Stopped {
			p.finishIO(ctx, s.log)
		}
		err = t.c.Delete(ctx)
	}
	if err != nil {
		return nil, err
	}
	p.finishIO(ctx, s.log)
	p.exitTold(context.WithoutCancel(ctx)) // comes before the event of the delete
	e := p.p.Exit()
	if r.ExecId != "" {
		t.mu.Lock()
		delete(t.procs, r.ExecId)
		t.mu.Unlock()
	} else {
		s.mu.Lock()
		delete(s.tasks, r.Id)
		s.mu.Unlock()
		s.log.Info("container deleted", "container", r.Id, "status", e.Status, "exited", e.At.Format(time.RFC3339Nano), "t_delete", time.Since(begin))
		s.pub.publish(topicDelete, &events.TaskDelete{
			ContainerID: r.Id, ID: r.Id, Pid: t.pid, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At),
		})
	}
	return &taskpb.DeleteResponse{Pid: t.pid, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}, nil
}

// State describes a process without asking the guest.
func (s *service) State(_ context.Context, r *taskpb.StateRequest) (*taskpb.StateResponse, error) {
	t, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	resp := &taskpb.StateResponse{
		Id: r.Id, ExecId: r.ExecId, Bundle: t.bundle, Pid: t.pid, Status: status(p.p.State()),
		Stdin: p.paths.stdin, Stdout: p.paths.stdout, Stderr: p.paths.stderr, Terminal: p.paths.terminal,
	}
	// Without an end it is Go's zero time, as of runc's shim: a client asks for that, and would read 1970 of no time.
	e := p.p.Exit()
	resp.ExitStatus, resp.ExitedAt = e.Status, timestamppb.New(e.At)
	return resp, nil
}

func status(s sandbox.State) taskpb.Status {
	switch s {
	case sandbox.Created:
		return taskpb.Status_CREATED
	case sandbox.Running:
		return taskpb.Status_RUNNING
	case sandbox.Paused:
		return taskpb.Status_PAUSED
	}
	return taskpb.Status_STOPPED
}

// Pids lists the container's first process and those that Exec added and that
// run, as the guest numbers them; what they have forked is not known here, and
// the guest is not asked. A guest whose agent tells no numbers has the task's.
//
// The first process is there until the task is deleted: containerd throws a task
// without processes away when it starts again, and its exit status with it
// (containerd core/runtime/v2/shim_load.go).
func (s *service) Pids(_ context.Context, r *taskpb.PidsRequest) (*taskpb.PidsResponse, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	resp := &taskpb.PidsResponse{}
	for _, p := range t.live() {
		info := &taskpb.ProcessInfo{Pid: cmp.Or(p.p.GuestPID(), t.pid)}
		if p.id != "" {
			if info.Info, err = typeurl.MarshalAnyToProto(&options.ProcessDetails{ExecID: p.id}); err != nil {
				return nil, fmt.Errorf("pids: %w", err)
			}
		}
		resp.Processes = append(resp.Processes, info)
	}
	return resp, nil
}

// Pause freezes a container.
func (s *service) Pause(ctx context.Context, r *taskpb.PauseRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.Id)
	if err == nil {
		err = t.c.Pause(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.pub.publish(topicPaused, &events.TaskPaused{ContainerID: r.Id})
	return empty, nil
}

// Resume undoes Pause.
func (s *service) Resume(ctx context.Context, r *taskpb.ResumeRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.Id)
	if err == nil {
		err = t.c.Resume(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.pub.publish(topicResumed, &events.TaskResumed{ContainerID: r.Id})
	return empty, nil
}

// ResizePty sets the size of a process's terminal.
func (s *service) ResizePty(ctx context.Context, r *taskpb.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	return empty, p.p.Resize(ctx, r.Width, r.Height)
}

// CloseIO ends a process's stdin once its client has closed it.
func (s *service) CloseIO(_ context.Context, r *taskpb.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.closeStdin()
	}
	return empty, nil
}

// Update changes a container's limits.
func (s *service) Update(ctx context.Context, r *taskpb.UpdateRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &res); err != nil {
		return nil, fmt.Errorf("resources: not OCI Linux resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return empty, t.c.Update(ctx, &res)
}

// Stats reads a container's counters.
func (s *service) Stats(ctx context.Context, r *taskpb.StatsRequest) (*taskpb.StatsResponse, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	st, err := t.c.Stats(ctx)
	if err != nil {
		return nil, err
	}
	form := any(metrics(st))
	if s.oldStats {
		form = metricsV1(st)
	}
	a, err := typeurl.MarshalAnyToProto(form)
	if err != nil {
		return nil, fmt.Errorf("stats: %w", err)
	}
	return &taskpb.StatsResponse{Stats: a}, nil
}

// Connect names the shim's and the task's host processes.
func (s *service) Connect(_ context.Context, r *taskpb.ConnectRequest) (*taskpb.ConnectResponse, error) {
	resp := &taskpb.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: "v3"}
	if t, err := s.task(r.Id); err == nil {
		resp.TaskPid = t.pid
	}
	return resp, nil
}

// Shutdown ends the pod when its last container is gone, and then this process.
func (s *service) Shutdown(ctx context.Context, r *taskpb.ShutdownRequest) (*emptypb.Empty, error) {
	if !s.sb.Idle() && !r.Now {
		return empty, nil
	}
	err := s.sb.Stop(ctx)
	s.once.Do(func() { close(s.done) })
	return empty, err
}
