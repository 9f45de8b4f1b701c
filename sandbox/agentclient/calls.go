// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/typespb"
)

// The agent's calls, over whichever connection there is.

var _ agentpb.AgentServiceService = (*link)(nil)

func (l *link) CreateContainer(ctx context.Context, r *agentpb.CreateContainerRequest) (*agentpb.ProcessMade, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.CreateContainer)
}

func (l *link) StartContainer(ctx context.Context, r *agentpb.StartContainerRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.StartContainer)
}

func (l *link) RemoveContainer(ctx context.Context, r *agentpb.RemoveContainerRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.RemoveContainer)
}

func (l *link) ExecProcess(ctx context.Context, r *agentpb.ExecProcessRequest) (*agentpb.ProcessMade, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ExecProcess)
}

func (l *link) SignalProcess(ctx context.Context, r *agentpb.SignalProcessRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.SignalProcess)
}

func (l *link) WaitProcess(ctx context.Context, r *agentpb.WaitProcessRequest) (*agentpb.WaitProcessResponse, error) {
	return long(ctx, l, agentOf, r, agentpb.AgentServiceService.WaitProcess)
}

func (l *link) UpdateContainer(ctx context.Context, r *agentpb.UpdateContainerRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.UpdateContainer)
}

func (l *link) UpdateEphemeralMounts(ctx context.Context, r *agentpb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.UpdateEphemeralMounts)
}

func (l *link) StatsContainer(ctx context.Context, r *agentpb.StatsContainerRequest) (*agentpb.StatsContainerResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.StatsContainer)
}

func (l *link) PauseContainer(ctx context.Context, r *agentpb.PauseContainerRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.PauseContainer)
}

func (l *link) ResumeContainer(ctx context.Context, r *agentpb.ResumeContainerRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ResumeContainer)
}

func (l *link) RemoveStaleVirtiofsShareMounts(ctx context.Context, r *agentpb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.RemoveStaleVirtiofsShareMounts)
}

func (l *link) GetDiagnosticData(ctx context.Context, r *agentpb.GetDiagnosticDataRequest) (*agentpb.GetDiagnosticDataResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.GetDiagnosticData)
}

func (l *link) WriteStdin(ctx context.Context, r *agentpb.WriteStreamRequest) (*agentpb.WriteStreamResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.WriteStdin)
}

func (l *link) ReadStdout(ctx context.Context, r *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ReadStdout)
}

func (l *link) ReadStderr(ctx context.Context, r *agentpb.ReadStreamRequest) (*agentpb.ReadStreamResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ReadStderr)
}

func (l *link) CloseStdin(ctx context.Context, r *agentpb.CloseStdinRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.CloseStdin)
}

func (l *link) TtyWinResize(ctx context.Context, r *agentpb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.TtyWinResize)
}

func (l *link) UpdateInterface(ctx context.Context, r *agentpb.UpdateInterfaceRequest) (*typespb.Interface, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.UpdateInterface)
}

func (l *link) UpdateRoutes(ctx context.Context, r *agentpb.UpdateRoutesRequest) (*agentpb.Routes, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.UpdateRoutes)
}

func (l *link) ListInterfaces(ctx context.Context, r *agentpb.ListInterfacesRequest) (*agentpb.Interfaces, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ListInterfaces)
}

func (l *link) ListRoutes(ctx context.Context, r *agentpb.ListRoutesRequest) (*agentpb.Routes, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ListRoutes)
}

func (l *link) AddARPNeighbors(ctx context.Context, r *agentpb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.AddARPNeighbors)
}

func (l *link) GetIPTables(ctx context.Context, r *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.GetIPTables)
}

func (l *link) SetIPTables(ctx context.Context, r *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.SetIPTables)
}

func (l *link) GetMetrics(ctx context.Context, r *agentpb.GetMetricsRequest) (*agentpb.Metrics, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.GetMetrics)
}

func (l *link) MemAgentMemcgSet(ctx context.Context, r *agentpb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.MemAgentMemcgSet)
}

func (l *link) MemAgentCompactSet(ctx context.Context, r *agentpb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.MemAgentCompactSet)
}

func (l *link) CreateSandbox(ctx context.Context, r *agentpb.CreateSandboxRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.CreateSandbox)
}

func (l *link) DestroySandbox(ctx context.Context, r *agentpb.DestroySandboxRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.DestroySandbox)
}

func (l *link) OnlineCPUMem(ctx context.Context, r *agentpb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.OnlineCPUMem)
}

func (l *link) ReseedRandomDev(ctx context.Context, r *agentpb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ReseedRandomDev)
}

func (l *link) GetGuestDetails(ctx context.Context, r *agentpb.GuestDetailsRequest) (*agentpb.GuestDetailsResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.GetGuestDetails)
}

func (l *link) MemHotplugByProbe(ctx context.Context, r *agentpb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.MemHotplugByProbe)
}

func (l *link) SetGuestDateTime(ctx context.Context, r *agentpb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.SetGuestDateTime)
}

func (l *link) CopyFile(ctx context.Context, r *agentpb.CopyFileRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.CopyFile)
}

func (l *link) GetOOMEvent(ctx context.Context, r *agentpb.GetOOMEventRequest) (*agentpb.OOMEvent, error) {
	return long(ctx, l, agentOf, r, agentpb.AgentServiceService.GetOOMEvent)
}

func (l *link) AddSwap(ctx context.Context, r *agentpb.AddSwapRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.AddSwap)
}

func (l *link) AddSwapPath(ctx context.Context, r *agentpb.AddSwapPathRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.AddSwapPath)
}

func (l *link) GetVolumeStats(ctx context.Context, r *agentpb.VolumeStatsRequest) (*agentpb.VolumeStatsResponse, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.GetVolumeStats)
}

func (l *link) ResizeVolume(ctx context.Context, r *agentpb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.ResizeVolume)
}

func (l *link) SetPolicy(ctx context.Context, r *agentpb.SetPolicyRequest) (*emptypb.Empty, error) {
	return short(ctx, l, agentOf, r, agentpb.AgentServiceService.SetPolicy)
}

var _ agentpb.FilesService = (*link)(nil)

func (l *link) Sync(ctx context.Context, r *agentpb.SyncFilesRequest) (*emptypb.Empty, error) {
	return short(ctx, l, filesOf, r, agentpb.FilesService.Sync)
}

func (l *link) Written(ctx context.Context, r *agentpb.WrittenRequest) (*agentpb.WrittenResponse, error) {
	return long(ctx, l, filesOf, r, agentpb.FilesService.Written)
}

func (l *link) Forget(ctx context.Context, r *emptypb.Empty) (*emptypb.Empty, error) {
	return short(ctx, l, filesOf, r, agentpb.FilesService.Forget)
}
