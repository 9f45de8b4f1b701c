// SPDX-License-Identifier: Apache-2.0

package guestagent

import (
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/kata-v2/kata/protocols/agentpb"
)

// What is warmed reaches every message in a request, and a type that is not linked is an error.
func TestWarm(t *testing.T) {
	if err := warm(); err != nil {
		t.Fatal(err)
	}
	seen := map[protoreflect.FullName]bool{}
	if err := warmMessage((&agentpb.CreateContainerRequest{}).ProtoReflect().Descriptor(), seen); err != nil {
		t.Fatal(err)
	}
	for _, m := range []interface{ ProtoReflect() protoreflect.Message }{
		&agentpb.Storage{}, &agentpb.Device{}, &agentpb.Spec{}, &agentpb.Process{}, &agentpb.LinuxResources{}, &agentpb.LinuxSeccomp{},
	} {
		if name := m.ProtoReflect().Descriptor().FullName(); !seen[name] {
			t.Errorf("%s is not warmed", name)
		}
	}
}
