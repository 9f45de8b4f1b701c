// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	grpcstatus "google.golang.org/grpc/status"
)

// The Task services; the two versions differ in name only (containerd api/runtime/task).
const (
	taskV2 = "containerd.task.v2.Task"
	taskV3 = "containerd.task.v3.Task"
)

// method wraps one call: decode, run, and the one place where an error becomes
// a gRPC status.
func method[Req, Resp any](f func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, decode func(any) error) (any, error) {
		req := new(Req)
		if err := decode(req); err != nil {
			return nil, err
		}
		resp, err := f(ctx, req)
		if err != nil {
			// The code is all that a class needs. In the details that ToGRPC adds, a client finds
			// the class of each error that was joined, and writes it behind the text once more.
			return nil, grpcstatus.Error(grpcstatus.Code(errgrpc.ToGRPC(err)), err.Error())
		}
		return resp, nil
	}
}

// register offers the Task service under both of its names.
func register(server *ttrpc.Server, s *service) {
	desc := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State": method(s.State), "Create": method(s.Create), "Start": method(s.Start), "Delete": method(s.Delete),
		"Pids": method(s.Pids), "Pause": method(s.Pause), "Resume": method(s.Resume), "Checkpoint": method(s.Checkpoint),
		"Kill": method(s.Kill), "Exec": method(s.Exec), "ResizePty": method(s.ResizePty), "CloseIO": method(s.CloseIO),
		"Update": method(s.Update), "Wait": method(s.Wait), "Stats": method(s.Stats), "Connect": method(s.Connect),
		"Shutdown": method(s.Shutdown),
	}}
	server.RegisterService(taskV2, desc)
	server.RegisterService(taskV3, desc)
}
