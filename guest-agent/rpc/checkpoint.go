// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/guest-agent/pod"
	"github.com/kata-v2/kata/protocols/agentpb"
)

var _ agentpb.CheckpointService = (*Service)(nil)

// BeginPark says that Park follows.
func (s *Service) BeginPark(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	s.Pod.BeginPark()
	return empty, nil
}

// Park brings the streams of all processes to rest.
func (s *Service) Park(ctx context.Context, _ *emptypb.Empty) (*emptypb.Empty, error) {
	return empty, s.Pod.Park(ctx)
}

// Attach gives processes new streams after Park.
func (s *Service) Attach(ctx context.Context, req *agentpb.AttachRequest) (*emptypb.Empty, error) {
	for _, p := range req.Processes {
		if err := s.Pod.Attach(ctx, p.ContainerId, p.ExecId, pod.Ports{Stdin: p.StdinPort, Stdout: p.StdoutPort, Stderr: p.StderrPort}); err != nil {
			return nil, err
		}
	}
	return empty, nil
}
