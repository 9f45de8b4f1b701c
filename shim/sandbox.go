// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-v2/kata/hypervisor"
	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols/cripb"
	"github.com/kata-v2/kata/protocols/sandboxpb"
	"github.com/kata-v2/kata/sandbox"
)

// sandboxV1 is the Sandbox service (containerd api/runtime/sandbox/v1).
const sandboxV1 = "containerd.runtime.sandbox.v1.Sandbox"

// The states of a sandbox as the CRI spells them (k8s.io/cri-api PodSandboxState);
// containerd compares the text.
const (
	sandboxReady    = "SANDBOX_READY"
	sandboxNotReady = "SANDBOX_NOTREADY"
)

// sandboxService is the Sandbox API over the same sandbox that the Task API has
// its containers in: containerd's CRI with sandboxer = "shim" makes the pod here
// and the containers there.
//
//	(none) ──CreateSandbox──▶ created ──StartSandbox──▶ ready ──StopSandbox, or the
//	machine ends──▶ not ready ──ShutdownSandbox──▶ (the shim has ended)
type sandboxService struct {
	svc  *service
	sb   *sandbox.Sandbox
	log  *slog.Logger
	load config.LoadOptions
	// hypervisor makes one of a configuration; files is where the pod's files go.
	hypervisor func(*config.Config) hypervisor.Hypervisor
	files      string

	mu      sync.Mutex
	created time.Time // guarded by mu; when CreateSandbox or the machine's start succeeded
	exited  time.Time // guarded by mu
}

// registerSandbox offers the Sandbox service.
func registerSandbox(server *ttrpc.Server, s *sandboxService) {
	server.RegisterService(sandboxV1, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox": method(s.CreateSandbox), "StartSandbox": method(s.StartSandbox), "Platform": method(s.Platform),
		"StopSandbox": method(s.StopSandbox), "WaitSandbox": method(s.WaitSandbox), "SandboxStatus": method(s.SandboxStatus),
		"PingSandbox": method(s.PingSandbox), "ShutdownSandbox": method(s.ShutdownSandbox),
		"SandboxMetrics": method(s.SandboxMetrics), "UpdateSandbox": method(s.UpdateSandbox),
	}})
}

// mine refuses a call about another sandbox.
func (s *sandboxService) mine(id string) error {
	if id != s.sb.ID() {
		return fmt.Errorf("sandbox %s: this shim has sandbox %s: %w", id, s.sb.ID(), errdefs.ErrNotFound)
	}
	return nil
}

// known is mine for calls that need CreateSandbox to have come before.
func (s *sandboxService) known(id string) error {
	if err := s.mine(id); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.created.IsZero() {
		return fmt.Errorf("sandbox %s was not created: %w", id, errdefs.ErrNotFound)
	}
	return nil
}

// CreateSandbox plans the pod; nothing runs yet.
func (s *sandboxService) CreateSandbox(_ context.Context, r *sandboxpb.CreateSandboxRequest) (*sandboxpb.CreateSandboxResponse, error) {
	if r.SandboxId != s.sb.ID() {
		return nil, fmt.Errorf("sandbox_id %q: this shim was started for %s: %w", r.SandboxId, s.sb.ID(), errdefs.ErrInvalidArgument)
	}
	if err := s.create(r); err != nil {
		s.log.Error("create sandbox", "sandbox", r.SandboxId, "error", err)
		return nil, err
	}
	return &sandboxpb.CreateSandboxResponse{}, nil
}

func (s *sandboxService) create(r *sandboxpb.CreateSandboxRequest) error {
	cri, err := podSandboxConfig(r.Options)
	if err != nil {
		return err
	}
	pod, err := podConfig(r, cri, s.files)
	if err != nil {
		return err
	}
	// The pod's annotations come only now; they may choose among the settings.
	lo := s.load
	lo.Annotations = pod.Annotations
	cfg, warnings, err := config.Load(lo)
	if err != nil {
		return err
	}
	if err := sandbox.CheckConfig(cfg); err != nil {
		return err
	}
	if err := s.sb.Prepare(pod, cfg, s.hypervisor(cfg)); err != nil {
		return err
	}
	for _, w := range warnings {
		s.log.Warn(w.String())
	}
	if err := writePodFiles(s.files, cri); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.created = time.Now()
	return nil
}

// StartSandbox starts the machine.
func (s *sandboxService) StartSandbox(ctx context.Context, r *sandboxpb.StartSandboxRequest) (*sandboxpb.StartSandboxResponse, error) {
	if err := s.mine(r.SandboxId); err != nil {
		return nil, err
	}
	if err := s.sb.Start(ctx); err != nil {
		s.log.Error("start sandbox", "sandbox", r.SandboxId, "error", err)
		return nil, err
	}
	s.mu.Lock()
	s.created = time.Now()
	created := s.created
	s.mu.Unlock()
	s.svc.exit.Go(func() {
		<-s.sb.Ended()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.exited = time.Now()
	})
	return &sandboxpb.StartSandboxResponse{Pid: uint32(s.sb.PID()), CreatedAt: timestamppb.New(created)}, nil
}

// Platform is the guest's.
func (s *sandboxService) Platform(_ context.Context, r *sandboxpb.PlatformRequest) (*sandboxpb.PlatformResponse, error) {
	if err := s.mine(r.SandboxId); err != nil {
		return nil, err
	}
	return &sandboxpb.PlatformResponse{Platform: &sandboxpb.Platform{Os: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the machine and whatever still runs in it. A sandbox that has
// ended is left as it is.
func (s *sandboxService) StopSandbox(ctx context.Context, r *sandboxpb.StopSandboxRequest) (*sandboxpb.StopSandboxResponse, error) {
	if err := s.known(r.SandboxId); err != nil {
		return nil, err
	}
	if r.TimeoutSecs > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.TimeoutSecs)*time.Second)
		defer cancel()
	}
	return &sandboxpb.StopSandboxResponse{}, s.sb.Stop(ctx)
}

// WaitSandbox returns when the machine has ended: status 0 when it was asked to,
// 137 when it ended by itself.
func (s *sandboxService) WaitSandbox(ctx context.Context, r *sandboxpb.WaitSandboxRequest) (*sandboxpb.WaitSandboxResponse, error) {
	if err := s.known(r.SandboxId); err != nil {
		return nil, err
	}
	select {
	case <-s.sb.Ended():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	resp := &sandboxpb.WaitSandboxResponse{ExitedAt: timestamppb.New(s.exitedAt())}
	if s.sb.Reason() != nil {
		resp.ExitStatus = killedStatus
	}
	return resp, nil
}

// exitedAt is when the end of the machine was noticed.
func (s *sandboxService) exitedAt() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exited.IsZero() {
		s.exited = time.Now()
	}
	return s.exited
}

// SandboxStatus describes the pod without asking the guest.
func (s *sandboxService) SandboxStatus(_ context.Context, r *sandboxpb.SandboxStatusRequest) (*sandboxpb.SandboxStatusResponse, error) {
	if err := s.known(r.SandboxId); err != nil {
		return nil, err
	}
	s.mu.Lock()
	created := s.created
	s.mu.Unlock()
	resp := &sandboxpb.SandboxStatusResponse{
		SandboxId: r.SandboxId, Pid: uint32(s.sb.PID()), State: sandboxNotReady, CreatedAt: timestamppb.New(created),
	}
	state := s.sb.State()
	if state == sandbox.Running {
		resp.State = sandboxReady
	}
	select {
	case <-s.sb.Ended():
		resp.ExitedAt = timestamppb.New(s.exitedAt())
	default:
	}
	if r.Verbose {
		var err error
		if resp.Info, err = s.info(state, resp.Pid); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// info is what a verbose status adds: "info" in the form that containerd's CRI
// reads and completes (internal/cri/server/podsandbox/types, SandboxInfo), and our own.
func (s *sandboxService) info(state sandbox.State, pid uint32) (map[string]string, error) {
	reason := ""
	if err := s.sb.Reason(); err != nil {
		reason = err.Error()
	}
	out := map[string]string{}
	for key, v := range map[string]any{
		"info": map[string]any{"pid": pid, "runtimeType": Name},
		"kata": map[string]any{"vmmPid": pid, "state": state.String(), "reason": reason},
	} {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("info: %w", err)
		}
		out[key] = string(data)
	}
	return out, nil
}

// PingSandbox tells whether the machine runs.
func (s *sandboxService) PingSandbox(_ context.Context, r *sandboxpb.PingRequest) (*sandboxpb.PingResponse, error) {
	if err := s.known(r.SandboxId); err != nil {
		return nil, err
	}
	if state := s.sb.State(); state != sandbox.Running {
		return nil, errors.Join(fmt.Errorf("sandbox %s is %s: %w", r.SandboxId, state, errdefs.ErrFailedPrecondition), s.sb.Reason())
	}
	return &sandboxpb.PingResponse{}, nil
}

// ShutdownSandbox ends the pod if it has not ended, and then this process.
func (s *sandboxService) ShutdownSandbox(ctx context.Context, r *sandboxpb.ShutdownSandboxRequest) (*sandboxpb.ShutdownSandboxResponse, error) {
	if err := s.mine(r.SandboxId); err != nil {
		return nil, err
	}
	err := s.sb.Stop(ctx)
	s.svc.once.Do(func() { close(s.svc.done) })
	return &sandboxpb.ShutdownSandboxResponse{}, err
}

// updatedResources is the extension of a sandbox in which containerd's CRI keeps what
// UpdatePodSandboxResources has set (internal/cri/server/podsandbox, UpdatedResourcesKey): JSON.
const updatedResources = "updated-resources"

// UpdateSandbox changes the limits of the pod as a whole. Updates of anything else
// are none of the runtime's business.
func (s *sandboxService) UpdateSandbox(ctx context.Context, r *sandboxpb.UpdateSandboxRequest) (*sandboxpb.UpdateSandboxResponse, error) {
	if err := s.known(r.SandboxId); err != nil {
		return nil, err
	}
	ext := r.GetSandbox().GetExtensions()[updatedResources]
	if ext == nil || len(r.Fields) > 0 && !slices.ContainsFunc(r.Fields, func(f string) bool { return strings.HasPrefix(f, "extensions") }) {
		return &sandboxpb.UpdateSandboxResponse{}, nil
	}
	var u struct {
		Overhead, Resources *cripb.LinuxContainerResources
	}
	if err := json.Unmarshal(ext.Value, &u); err != nil {
		return nil, fmt.Errorf("extension %s (%s): %w: %w", updatedResources, ext.TypeUrl, err, errdefs.ErrInvalidArgument)
	}
	if err := s.sb.Resize(ctx, ociResources(u.Resources), ociResources(u.Overhead)); err != nil {
		return nil, fmt.Errorf("update of sandbox %s: %w", r.SandboxId, err)
	}
	return &sandboxpb.UpdateSandboxResponse{}, nil
}
