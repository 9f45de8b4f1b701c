// SPDX-License-Identifier: Apache-2.0

package house

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/protocols/cripb"
)

// TestCRISubset compares protocols/cri.proto with the real CRI: every message,
// field and enumeration value that we declare is there, and is the same on the wire.
func TestCRISubset(t *testing.T) {
	ours, theirs := cripb.File_protocols_cri_proto, (&runtimeapi.PodSandboxConfig{}).ProtoReflect().Descriptor().ParentFile()
	for i := range ours.Messages().Len() {
		m := ours.Messages().Get(i)
		real := theirs.Messages().ByName(m.Name())
		if real == nil {
			t.Errorf("message %s is not in the CRI", m.Name())
			continue
		}
		for j := range m.Fields().Len() {
			f := m.Fields().Get(j)
			if r := real.Fields().ByName(f.Name()); r == nil || !sameField(f, r) {
				t.Errorf("%s.%s = %d is not that of the CRI: %v", m.Name(), f.Name(), f.Number(), r)
			}
		}
	}
	for i := range ours.Enums().Len() {
		e := ours.Enums().Get(i)
		real := theirs.Enums().ByName(e.Name())
		for j := range e.Values().Len() {
			v := e.Values().Get(j)
			if r := real.Values().ByName(v.Name()); r == nil || r.Number() != v.Number() {
				t.Errorf("%s.%s = %d is not that of the CRI", e.Name(), v.Name(), v.Number())
			}
		}
	}
	if ours.Messages().Len() == 0 {
		t.Error("no messages were compared")
	}
}

func sameField(a, b protoreflect.FieldDescriptor) bool {
	if a.Number() != b.Number() || a.Kind() != b.Kind() || a.Cardinality() != b.Cardinality() || a.IsMap() != b.IsMap() {
		return false
	}
	if a.IsMap() {
		return sameField(a.MapKey(), b.MapKey()) && sameField(a.MapValue(), b.MapValue())
	}
	if a.Message() != nil {
		return a.Message().Name() == b.Message().Name()
	}
	return true
}

// TestCRIRoundTrip reads with our messages what the real ones wrote.
func TestCRIRoundTrip(t *testing.T) {
	data, err := proto.Marshal(&runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u"}, Hostname: "web-0",
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}},
		PortMappings: []*runtimeapi.PortMapping{{HostPort: 80}}, // unknown to us
		Annotations:  map[string]string{"a": "b"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/kubepods",
			Overhead:        &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 7},
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	var c cripb.PodSandboxConfig
	if err := proto.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	if c.Metadata.GetUid() != "u" || c.Hostname != "web-0" || c.DnsConfig.Servers[0] != "192.0.2.53" || c.Annotations["a"] != "b" ||
		c.Linux.GetCgroupParent() != "/kubepods" || c.Linux.GetOverhead().GetMemoryLimitInBytes() != 7 ||
		c.Linux.GetSecurityContext().GetNamespaceOptions().GetPid() != cripb.NamespaceMode_CONTAINER {
		t.Errorf("read %v", &c)
	}
}
