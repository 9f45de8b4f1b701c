// SPDX-License-Identifier: Apache-2.0

package guestagent

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// firstMessages are what a pod's start sends and answers, and what every pod is asked while it runs and as it ends.
var firstMessages = []proto.Message{
	&ttrpc.Request{}, &ttrpc.Response{}, &emptypb.Empty{},
	&agentpb.CreateSandboxRequest{}, &agentpb.UpdateInterfaceRequest{}, &agentpb.UpdateRoutesRequest{}, &agentpb.AddARPNeighborsRequest{},
	&agentpb.SetGuestDateTimeRequest{}, &agentpb.OnlineCPUMemRequest{}, &agentpb.SyncFilesRequest{},
	&agentpb.CreateContainerRequest{}, &agentpb.ProcessMade{}, &agentpb.StartContainerRequest{}, &agentpb.WaitProcessRequest{},
	&agentpb.WaitProcessResponse{}, &agentpb.ExecProcessRequest{}, &agentpb.SignalProcessRequest{}, &agentpb.RemoveContainerRequest{},
	&agentpb.Routes{}, &agentpb.DestroySandboxRequest{},
	&agentpb.WrittenRequest{}, &agentpb.WrittenResponse{}, &agentpb.GetOOMEventRequest{}, &agentpb.OOMEvent{},
	&agentpb.StatsContainerRequest{}, &agentpb.StatsContainerResponse{},
}

// warm makes the encoders and decoders that a pod's start needs: protobuf's of its
// messages, and JSON's of an OCI specification. Both libraries make them at the
// first use, by reflection, with code that has no other use, so a machine that is
// restored does not run it at all.
func warm() error {
	seen := map[protoreflect.FullName]bool{}
	for _, m := range firstMessages {
		if err := warmMessage(m.ProtoReflect().Descriptor(), seen); err != nil {
			return err
		}
	}
	if _, err := json.Marshal(&specs.Spec{}); err != nil {
		return fmt.Errorf("encoder of specifications: %w", err)
	}
	return nil
}

// warmMessage makes the coder of a message and of those in it.
func warmMessage(d protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) error {
	if seen[d.FullName()] {
		return nil
	}
	seen[d.FullName()] = true
	if !d.IsMapEntry() {
		t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
		if err != nil {
			return fmt.Errorf("coder of %s: %w", d.FullName(), err)
		}
		proto.Size(t.New().Interface())
	}
	for i := range d.Fields().Len() {
		if m := d.Fields().Get(i).Message(); m != nil {
			if err := warmMessage(m, seen); err != nil {
				return err
			}
		}
	}
	return nil
}
