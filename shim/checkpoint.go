// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"cmp"
	"context"
	"fmt"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/taskpb"
	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/checkpoint"
)

// Checkpoint saves the pod of a task, its only one or its first, in a directory: that of the request, or the
// one that the options of runc name, whose "exit" ends the pod. What else these
// options say is about processes on a host and has no meaning for a machine.
func (s *service) Checkpoint(ctx context.Context, r *taskpb.CheckpointRequest) (*emptypb.Empty, error) {
	if _, err := s.task(r.Id); err != nil {
		return nil, err
	}
	if err := s.sb.StandsForPod(r.Id); err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	var o options.CheckpointOptions
	if r.Options != nil && r.Options.MessageIs(&o) {
		if err := proto.Unmarshal(r.Options.Value, &o); err != nil {
			return nil, fmt.Errorf("options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	path := cmp.Or(o.ImagePath, r.Path)
	if path == "" {
		return nil, fmt.Errorf("path: name the directory for the checkpoint: %w", errdefs.ErrInvalidArgument)
	}
	if err := s.sb.Checkpoint(ctx, path, o.Exit); err != nil {
		s.log.Error("checkpoint", "container", r.Id, "error", err)
		return nil, err
	}
	s.pub.publish(topicCheckpointed, &events.TaskCheckpointed{ContainerID: r.Id, Checkpoint: path})
	return empty, nil
}

// registerCheckpoint offers what kata-ctl asks for.
func registerCheckpoint(server *ttrpc.Server, sb *sandbox.Sandbox) {
	server.RegisterService(checkpoint.Service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		checkpoint.MethodSave: method(func(ctx context.Context, r *agentpb.SaveRequest) (*emptypb.Empty, error) {
			return empty, sb.Checkpoint(ctx, r.Path, r.End)
		}),
	}})
}
