// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	types "github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/kata-v2/kata/protocols/sandboxpb"
	"github.com/kata-v2/kata/protocols/taskpb"
)

// The messages of protocols/task.proto are containerd's: same numbers, names and types.
func TestTaskMessagesAreContainerds(t *testing.T) {
	pairs := [][2]proto.Message{
		{&taskpb.Mount{}, &types.Mount{}}, {&taskpb.ProcessInfo{}, &tasktypes.ProcessInfo{}},
		{&taskpb.CreateRequest{}, &task.CreateTaskRequest{}}, {&taskpb.CreateResponse{}, &task.CreateTaskResponse{}},
		{&taskpb.StartRequest{}, &task.StartRequest{}}, {&taskpb.StartResponse{}, &task.StartResponse{}},
		{&taskpb.DeleteRequest{}, &task.DeleteRequest{}}, {&taskpb.DeleteResponse{}, &task.DeleteResponse{}},
		{&taskpb.ExecRequest{}, &task.ExecProcessRequest{}}, {&taskpb.ResizePtyRequest{}, &task.ResizePtyRequest{}},
		{&taskpb.CloseIORequest{}, &task.CloseIORequest{}}, {&taskpb.StateRequest{}, &task.StateRequest{}},
		{&taskpb.StateResponse{}, &task.StateResponse{}}, {&taskpb.KillRequest{}, &task.KillRequest{}},
		{&taskpb.PidsRequest{}, &task.PidsRequest{}}, {&taskpb.PidsResponse{}, &task.PidsResponse{}},
		{&taskpb.PauseRequest{}, &task.PauseRequest{}}, {&taskpb.ResumeRequest{}, &task.ResumeRequest{}},
		{&taskpb.CheckpointRequest{}, &task.CheckpointTaskRequest{}}, {&taskpb.UpdateRequest{}, &task.UpdateTaskRequest{}},
		{&taskpb.WaitRequest{}, &task.WaitRequest{}}, {&taskpb.WaitResponse{}, &task.WaitResponse{}},
		{&taskpb.StatsRequest{}, &task.StatsRequest{}}, {&taskpb.StatsResponse{}, &task.StatsResponse{}},
		{&taskpb.ConnectRequest{}, &task.ConnectRequest{}}, {&taskpb.ConnectResponse{}, &task.ConnectResponse{}},
		{&taskpb.ShutdownRequest{}, &task.ShutdownRequest{}},
	}
	for _, p := range pairs {
		sameFields(t, p[0].ProtoReflect().Descriptor(), p[1].ProtoReflect().Descriptor())
	}
	ours, theirs := taskpb.File_protocols_task_proto.Messages(), len(pairs)
	if ours.Len() != theirs {
		t.Errorf("%d messages are declared, %d compared", ours.Len(), theirs)
	}
	a, b := taskpb.Status(0).Descriptor().Values(), tasktypes.Status(0).Descriptor().Values()
	for i := range max(a.Len(), b.Len()) {
		if a.Len() != b.Len() || a.Get(i).Number() != b.Get(i).Number() || a.Get(i).Name() != b.Get(i).Name() {
			t.Fatalf("the status values are not containerd's")
		}
	}
}

func sameFields(t *testing.T, ours, theirs protoreflect.MessageDescriptor) {
	t.Helper()
	if ours.Fields().Len() != theirs.Fields().Len() {
		t.Errorf("%s has %d fields, containerd's %d", ours.Name(), ours.Fields().Len(), theirs.Fields().Len())
	}
	for i := range ours.Fields().Len() {
		sameField(t, ours.Fields().Get(i), theirs)
	}
}

func sameField(t *testing.T, a protoreflect.FieldDescriptor, theirs protoreflect.MessageDescriptor) {
	t.Helper()
	b := theirs.Fields().ByNumber(a.Number())
	if b == nil || a.Name() != b.Name() || a.Kind() != b.Kind() || a.Cardinality() != b.Cardinality() {
		t.Errorf("field %v is %v in containerd", a.FullName(), b)
		return
	}
	// Messages of our own are compared by themselves; others must be the same.
	if m := a.Message(); m != nil && m.ParentFile().Package() != a.ParentFile().Package() && !m.IsMapEntry() && m.FullName() != b.Message().FullName() {
		t.Errorf("%s is a %s, containerd's a %s", a.FullName(), m.FullName(), b.Message().FullName())
	}
}

// The messages of protocols/sandbox.proto are parts of containerd's: what they
// declare is the same there.
func TestSandboxMessagesAreContainerds(t *testing.T) {
	theirs := (&sandboxapi.CreateSandboxRequest{}).ProtoReflect().Descriptor().ParentFile().Messages()
	ours := sandboxpb.File_protocols_sandbox_proto.Messages()
	for i := range ours.Len() {
		m := ours.Get(i)
		real := theirs.ByName(m.Name())
		switch m.Name() {
		case "Platform":
			real = (&types.Platform{}).ProtoReflect().Descriptor()
		case "Sandbox":
			real = (&types.Sandbox{}).ProtoReflect().Descriptor()
		case "Metric":
			real = (&types.Metric{}).ProtoReflect().Descriptor()
		}
		if real == nil {
			t.Errorf("%s is not a message of containerd's", m.Name())
			continue
		}
		for j := range m.Fields().Len() {
			sameField(t, m.Fields().Get(j), real)
		}
	}
}
