// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"

	"github.com/containerd/ttrpc"

	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox"
)

// registerPod offers what kata-ctl asks about the pod's guest.
func registerPod(server *ttrpc.Server, sb *sandbox.Sandbox) {
	server.RegisterService(protocols.PodService, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		protocols.MethodGetIPTables: method(func(ctx context.Context, r *agentpb.GetIPTablesRequest) (*agentpb.GetIPTablesResponse, error) {
			return sb.IPTables(ctx, r)
		}),
		protocols.MethodSetIPTables: method(func(ctx context.Context, r *agentpb.SetIPTablesRequest) (*agentpb.SetIPTablesResponse, error) {
			return sb.SetIPTables(ctx, r)
		}),
	}})
}
