// SPDX-License-Identifier: Apache-2.0

// Package rpc is the thin edge of the agent: grpc.AgentService and grpc.Health
// of the Kata Containers 4.1 agent protocol over ttrpc. It translates messages
// and errors; what they mean is in package pod and its neighbours.
package rpc

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/devices"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/network"
	"github.com/kata-v2/kata/guest-agent/pod"
	"github.com/kata-v2/kata/guest-agent/reaper"
	"github.com/kata-v2/kata/guest-agent/storage"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Service answers every RPC.
type Service struct {
	// AgentVersion is this agent's version.
	AgentVersion string
	Pod          *pod.Pod
	Storage      *storage.Manager
	Modules      *boot.Modules
	Finder       *devices.Finder
	Network      network.Config
	Reaper       *reaper.Reaper
	Sink         *agentlog.Sink
	Log          *slog.Logger
	// SharedDir is where CopyFile may write, protocols.GuestSharedDir.
	SharedDir string
	// SyncedDir is where Sync keeps its volumes, protocols.GuestSyncedDir.
	SyncedDir string
	// Streams says whether stdio connections are accepted.
	Streams bool
	// Started, when set, is called once, when the first container has started.
	Started func()
	// OneCPU, when set, is called before CPUs come up, for what is safer to do while
	// there is one. QEMU's emulator may keep what it has translated of code that one
	// CPU changes while another runs it. A breakpoint that the kernel puts there for
	// the time of its change (arch/x86/kernel/alternative.c, text_poke_bp_batch) is
	// then met again and again after it is gone: the guest hangs.
	OneCPU func() error

	startedOnce sync.Once
	netMu       sync.Mutex // serialises changes of the network: each is several netlink requests
}

func (s *Service) started() {
	s.startedOnce.Do(func() {
		if s.Started != nil {
			s.Started()
		}
	})
}

var _ agentpb.AgentServiceService = (*Service)(nil)
var _ agentpb.HealthService = (*Service)(nil)
var _ agentpb.FilesService = (*Service)(nil)

// NewServer makes a ttrpc server that answers for s.
func NewServer(s *Service) (*ttrpc.Server, error) {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(s.intercept))
	if err != nil {
		return nil, err
	}
	agentpb.RegisterAgentServiceService(srv, s)
	agentpb.RegisterHealthService(srv, s)
	agentpb.RegisterFilesService(srv, s)
	agentpb.RegisterCheckpointService(srv, s)
	return srv, nil
}

// intercept is the one place where errors become statuses and calls are logged.
func (s *Service) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	start := time.Now()
	resp, err := method(ctx, unmarshal)
	ms := float64(time.Since(start).Microseconds()) / 1000
	if err != nil {
		level := slog.LevelWarn
		if errors.Is(ctx.Err(), context.Canceled) || errors.Is(err, errWatchOver) { // nobody waits for it any more
			level = slog.LevelDebug
		}
		s.Log.Log(ctx, level, "call failed", agentlog.KeyMethod, info.FullMethod, agentlog.KeyError, err.Error(), agentlog.KeyDuration, ms)
		return nil, toStatus(err)
	}
	s.Log.Debug("call", agentlog.KeyMethod, info.FullMethod, agentlog.KeyDuration, ms)
	return resp, nil
}

var kindCodes = map[fault.Kind]codes.Code{
	fault.Internal: codes.Internal, fault.NotFound: codes.NotFound, fault.AlreadyExists: codes.AlreadyExists,
	fault.InvalidArgument: codes.InvalidArgument, fault.FailedPrecondition: codes.FailedPrecondition,
	fault.Unimplemented: codes.Unimplemented, fault.Unavailable: codes.Unavailable,
}

func toStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err // ttrpc's own, such as a request that does not decode
	}
	return status.Error(kindCodes[fault.KindOf(err)], err.Error())
}

var empty = &emptypb.Empty{}

// Check says that the agent serves.
func (s *Service) Check(context.Context, *agentpb.CheckRequest) (*agentpb.HealthCheckResponse, error) {
	return &agentpb.HealthCheckResponse{Status: agentpb.HealthCheckResponse_SERVING}, nil
}

// protocolVersion is what the Kata 4.1 agent answers in VersionCheckResponse.grpc_version.
const protocolVersion = "0.0.1"

// Version names the protocol's and the agent's version.
func (s *Service) Version(context.Context, *agentpb.CheckRequest) (*agentpb.VersionCheckResponse, error) {
	return &agentpb.VersionCheckResponse{GrpcVersion: protocolVersion, AgentVersion: s.AgentVersion}, nil
}
