// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/internal/directvolume"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox"
)

// registerVolumes offers what kata-ctl asks about direct-assigned volumes. The
// messages are the agent's, with the volume's path on the host in the place of the
// guest's.
func registerVolumes(server *ttrpc.Server, sb *sandbox.Sandbox) {
	server.RegisterService(directvolume.Service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		directvolume.MethodStats: method(func(ctx context.Context, r *agentpb.VolumeStatsRequest) (*agentpb.VolumeStatsResponse, error) {
			return sb.VolumeStats(ctx, r.VolumeGuestPath)
		}),
		directvolume.MethodResize: method(func(ctx context.Context, r *agentpb.ResizeVolumeRequest) (*emptypb.Empty, error) {
			return &emptypb.Empty{}, sb.ResizeVolume(ctx, r.VolumeGuestPath, r.Size)
		}),
	}})
}
