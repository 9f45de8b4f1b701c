// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/pod"
	"github.com/kata-v2/kata/guest-agent/storage"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

// CreateSandbox sets the pod up.
func (s *Service) CreateSandbox(ctx context.Context, req *agentpb.CreateSandboxRequest) (*emptypb.Empty, error) {
	return empty, s.Pod.CreateSandbox(ctx, req)
}

// destroyTimeout bounds DestroySandbox when the caller set no deadline.
const destroyTimeout = 30 * time.Second

// DestroySandbox removes every container, unmounts and syncs. The host ends the machine.
func (s *Service) DestroySandbox(ctx context.Context, _ *agentpb.DestroySandboxRequest) (*emptypb.Empty, error) {
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	return empty, s.Pod.Destroy(ctx)
}

// GetGuestDetails says what this agent and its kernel can do.
func (s *Service) GetGuestDetails(_ context.Context, req *agentpb.GuestDetailsRequest) (*agentpb.GuestDetailsResponse, error) {
	resp := &agentpb.GuestDetailsResponse{AgentDetails: &agentpb.AgentDetails{
		Version: s.AgentVersion, InitDaemon: os.Getpid() == 1, DeviceHandlers: pod.DeviceTypes(),
		StorageHandlers: storage.Drivers(), SupportsSeccomp: true,
		ExtraFeatures: []string{protocols.FeatureReadyDial, protocols.FeaturePIDs, protocols.FeatureTCPForward, protocols.FeatureSyncedFiles, protocols.FeatureUnified, protocols.FeatureCheckpoint},
	}}
	if s.Streams {
		resp.AgentDetails.ExtraFeatures = append(resp.AgentDetails.ExtraFeatures, protocols.FeatureStdioStreams)
	}
	const memory = "/sys/devices/system/memory/"
	if req.MemBlockSize {
		// Absent without memory hot-plug: 0 says so.
		if b, err := os.ReadFile(memory + "block_size_bytes"); err == nil {
			resp.MemBlockSizeBytes, _ = strconv.ParseUint(strings.TrimSpace(string(b)), 16, 64)
		}
	}
	if req.MemHotplugProbe {
		_, err := os.Stat(memory + "probe")
		resp.SupportMemHotplugProbe = err == nil
	}
	return resp, nil
}

// network runs f with the driver loaded and no other change under way.
func (s *Service) network(f func() error) error {
	if err := s.Modules.Ensure(boot.GroupNet); err != nil {
		return err
	}
	s.netMu.Lock()
	defer s.netMu.Unlock()
	return f()
}

// UpdateInterface configures one interface.
func (s *Service) UpdateInterface(ctx context.Context, req *agentpb.UpdateInterfaceRequest) (out *typespb.Interface, err error) {
	err = s.network(func() error {
		out, err = s.Network.UpdateInterface(ctx, req.GetInterface())
		if err == nil {
			s.spreadQueues()
		}
		return err
	})
	return out, err
}

// spreadQueues is called with netMu held. A network works without it, only slower.
func (s *Service) spreadQueues() {
	if err := s.Network.SpreadQueues(); err != nil && s.Log != nil {
		s.Log.Warn("network", agentlog.KeyError, err.Error())
	}
}

// UpdateRoutes replaces the routes.
func (s *Service) UpdateRoutes(_ context.Context, req *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error) {
	out := &agentpb.Routes{}
	err := s.network(func() (err error) {
		out.Routes, err = s.Network.UpdateRoutes(req.GetRoutes().GetRoutes())
		return err
	})
	return out, err
}

// ListInterfaces describes every interface.
func (s *Service) ListInterfaces(context.Context, *agentpb.ListInterfacesRequest) (*agentpb.Interfaces, error) {
	list, err := s.Network.ListInterfaces()
	return &agentpb.Interfaces{Interfaces: list}, err
}

// ListRoutes returns the main table.
func (s *Service) ListRoutes(context.Context, *agentpb.ListRoutesRequest) (*agentpb.Routes, error) {
	list, err := s.Network.ListRoutes()
	return &agentpb.Routes{Routes: list}, err
}

// AddARPNeighbors adds entries to the neighbour tables.
func (s *Service) AddARPNeighbors(_ context.Context, req *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return empty, s.network(func() error { return s.Network.AddNeighbors(req.GetNeighbors().GetARPNeighbors()) })
}

// slewLimit is the most that the clock is off to be led to the right time
// smoothly, so that workloads see no jump for the usual drift.
const slewLimit = 5 * time.Millisecond

// SetGuestDateTime sets the clock, or leads it there when it is hardly off.
func (s *Service) SetGuestDateTime(_ context.Context, req *agentpb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if req.Usec < 0 || req.Usec >= 1e6 {
		return nil, fault.New(fault.InvalidArgument, "Usec %d: want 0 to 999999", req.Usec)
	}
	want := time.Unix(req.Sec, req.Usec*1000)
	off := time.Until(want)
	slew := unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT} // of 0: ends one under way
	smooth := off.Abs() <= slewLimit
	if smooth {
		slew.Offset = off.Microseconds()
	}
	if _, err := unix.Adjtimex(&slew); err != nil {
		return nil, fmt.Errorf("lead the clock: %w", err)
	}
	if smooth {
		return empty, nil
	}
	ts := unix.NsecToTimespec(want.UnixNano())
	return empty, unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// RemoveStaleVirtiofsShareMounts lets go of what the host has taken out of the share.
func (s *Service) RemoveStaleVirtiofsShareMounts(ctx context.Context, _ *agentpb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return empty, s.Pod.LeaveShare(ctx)
}

// GetVolumeStats measures a mounted volume.
func (s *Service) GetVolumeStats(_ context.Context, req *agentpb.VolumeStatsRequest) (*agentpb.VolumeStatsResponse, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(req.VolumeGuestPath, &st); err != nil {
		return nil, fault.New(fault.NotFound, "volume_guest_path %s: %w", req.VolumeGuestPath, err)
	}
	bs := uint64(st.Bsize)
	return &agentpb.VolumeStatsResponse{
		Usage: []*agentpb.VolumeUsage{
			{Unit: agentpb.VolumeUsage_BYTES, Total: st.Blocks * bs, Used: (st.Blocks - st.Bfree) * bs, Available: st.Bavail * bs},
			{Unit: agentpb.VolumeUsage_INODES, Total: st.Files, Used: st.Files - st.Ffree, Available: st.Ffree},
		},
		VolumeCondition: &agentpb.VolumeCondition{},
	}, nil
}
