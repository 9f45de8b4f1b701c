// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"bytes"
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

var update = flag.Bool("update", false, "write the golden files")

// full has a value in every field that the guest honours.
func full() *agentpb.Spec {
	return &agentpb.Spec{
		Version: "1.1.0",
		Process: &agentpb.Process{
			Terminal: true, ConsoleSize: &agentpb.Box{Height: 24, Width: 80},
			User: &agentpb.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}, Username: "x"},
			Args: []string{"sh", "-c", "true"}, Env: []string{"A=b"}, Cwd: "/w",
			Capabilities:    &agentpb.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Effective: []string{"CAP_KILL"}, Permitted: []string{"CAP_KILL"}, Inheritable: []string{"CAP_CHOWN"}, Ambient: []string{"CAP_CHOWN"}},
			Rlimits:         []*agentpb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 2, Soft: 1}},
			NoNewPrivileges: true, ApparmorProfile: "host-profile", OOMScoreAdj: -5, SelinuxLabel: "host-label",
		},
		Root: &agentpb.Root{Path: "/r", Readonly: true}, Hostname: "h",
		Mounts:      []*agentpb.Mount{{Destination: "/d", Source: "/s", Type: "bind", Options: []string{"rbind", "ro"}}},
		Hooks:       &agentpb.Hooks{Prestart: []*agentpb.Hook{{Path: "/h1"}}, Poststop: []*agentpb.Hook{{Path: "/h2", Args: []string{"h2"}, Env: []string{"E=f"}, Timeout: 3}}},
		Annotations: map[string]string{"k": "v"},
		Linux: &agentpb.Linux{
			UIDMappings: []*agentpb.LinuxIDMapping{{ContainerID: 0, HostID: 100, Size: 10}},
			Sysctl:      map[string]string{"kernel.shmmax": "1"},
			Resources: &agentpb.LinuxResources{
				Devices:        []*agentpb.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "c", Major: 136, Minor: -1, Access: "rwm"}, {Allow: true, Type: "b", Major: 8, Minor: 0, Access: "r"}},
				Memory:         &agentpb.LinuxMemory{Limit: 100},
				CPU:            &agentpb.LinuxCPU{Shares: 2, Cpus: "0"},
				Pids:           &agentpb.LinuxPids{Limit: 9},
				BlockIO:        &agentpb.LinuxBlockIO{Weight: 10, ThrottleReadBpsDevice: []*agentpb.LinuxThrottleDevice{{Major: 8, Minor: 1, Rate: 7}}},
				HugepageLimits: []*agentpb.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4}},
			},
			CgroupsPath: "/host/path",
			Namespaces:  []*agentpb.LinuxNamespace{{Type: "pid"}, {Type: "mount"}},
			Devices:     []*agentpb.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 2, FileMode: 0o600, UID: 3, GID: 4}},
			Seccomp: &agentpb.LinuxSeccomp{DefaultAction: "SCMP_ACT_ERRNO", Architectures: []string{"SCMP_ARCH_X86_64"}, Flags: []string{"SECCOMP_FILTER_FLAG_LOG"},
				Syscalls: []*agentpb.LinuxSyscall{{Names: []string{"read"}, Action: "SCMP_ACT_ALLOW", Errnoret: 1, Args: []*agentpb.LinuxSeccompArg{{Index: 1, Value: 2, ValueTwo: 3, Op: "SCMP_CMP_EQ"}}}}},
			RootfsPropagation: "rslave", MaskedPaths: []string{"/m"}, ReadonlyPaths: []string{"/ro"}, MountLabel: "l",
		},
	}
}

func TestConvertGolden(t *testing.T) {
	s, err := Convert(full())
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "full.json")
	if *update {
		if err := os.WriteFile(path, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytes.TrimSpace(want), got) {
		t.Errorf("differs from %s (go test -update writes it):\n%s", path, got)
	}
}

func TestConvertRefuses(t *testing.T) {
	for name, breakIt := range map[string]func(*agentpb.Spec){
		"no process": func(s *agentpb.Spec) { s.Process = nil },
		"no args":    func(s *agentpb.Spec) { s.Process.Args = nil },
		"empty arg":  func(s *agentpb.Spec) { s.Process.Args = []string{""} },
		"no root":    func(s *agentpb.Spec) { s.Root = nil },
		"no linux":   func(s *agentpb.Spec) { s.Linux = nil },
	} {
		s := full()
		breakIt(s)
		if _, err := Convert(s); fault.KindOf(err) != fault.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Convert(nil); fault.KindOf(err) != fault.InvalidArgument {
		t.Errorf("nothing: %v", err)
	}
}

func TestAbsentStaysAbsent(t *testing.T) {
	s, err := Convert(&agentpb.Spec{Process: &agentpb.Process{Args: []string{"a"}}, Root: &agentpb.Root{Path: "/"}, Linux: &agentpb.Linux{
		Resources: &agentpb.LinuxResources{Memory: &agentpb.LinuxMemory{}, CPU: &agentpb.LinuxCPU{}, Devices: []*agentpb.LinuxDeviceCgroup{{Type: "c", Access: "m"}}}}})
	if err != nil {
		t.Fatal(err)
	}
	r := s.Linux.Resources
	if r.Memory.Limit != nil || r.CPU.Quota != nil || r.Pids != nil || s.Process.OOMScoreAdj != nil || s.Process.Cwd != "/" {
		t.Errorf("%+v", s)
	}
	if r.Devices[0].Major != nil || r.Devices[0].Minor != nil {
		t.Error("major 0 is not any device")
	}
}

func ns(ts ...specs.LinuxNamespaceType) *specs.Spec {
	s := &specs.Spec{Linux: &specs.Linux{}}
	for _, t := range ts {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: t})
	}
	return s
}

func paths(s *specs.Spec) map[specs.LinuxNamespaceType]string {
	out := map[specs.LinuxNamespaceType]string{}
	for _, n := range s.Linux.Namespaces {
		out[n.Type] = n.Path
	}
	return out
}

func TestNamespaces(t *testing.T) {
	type m = map[specs.LinuxNamespaceType]string
	for _, c := range []struct {
		name string
		spec *specs.Spec
		p    Placement
		want m
	}{
		{"own", ns("pid", "ipc", "uts", "mount"), Placement{}, m{"pid": "", "ipc": "", "uts": "", "mount": ""}},
		{"time goes", ns("mount", "time"), Placement{}, m{"mount": ""}},
		{"pod", ns("pid", "ipc", "uts"), Placement{IPC: "/i", UTS: "/u"}, m{"pid": "", "ipc": "/i", "uts": "/u"}},
		{"not listed, not joined", ns("mount"), Placement{IPC: "/i", UTS: "/u"}, m{"mount": ""}},
		{"first of a shared pid", ns("mount"), Placement{SharedPID: true}, m{"mount": "", "pid": ""}},
		{"next of a shared pid", ns("pid"), Placement{SharedPID: true, PID: "/p"}, m{"pid": "/p"}},
	} {
		Adapt(c.spec, c.p)
		if got := paths(c.spec); !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestPrivate(t *testing.T) {
	s := ns("ipc", "uts")
	for _, list := range []string{"", "uts", "ipc,uts"} {
		s.Annotations = map[string]string{protocols.AnnotationPrivate: list}
		for _, n := range []specs.LinuxNamespaceType{specs.IPCNamespace, specs.UTSNamespace} {
			if got := Private(s, n); got != strings.Contains(list, string(n)) {
				t.Errorf("%q: %s private: %v", list, n, got)
			}
		}
	}
}

func TestCgroupIsPrivate(t *testing.T) {
	s := ns("mount")
	s.Mounts = []specs.Mount{{Type: "cgroup"}}
	Adapt(s, Placement{})
	if _, ok := paths(s)["cgroup"]; !ok {
		t.Error("a container with cgroups mounted sees those of its neighbours")
	}
}

func TestHostname(t *testing.T) {
	for _, c := range []struct {
		spec *specs.Spec
		p    Placement
		want string
	}{{ns("uts"), Placement{}, "h"}, {ns("uts"), Placement{UTS: "/u"}, ""}, {ns(), Placement{}, ""}} {
		c.spec.Hostname = "h"
		if Adapt(c.spec, c.p); c.spec.Hostname != c.want {
			t.Errorf("%v: %q, want %q", c.spec.Linux.Namespaces, c.spec.Hostname, c.want)
		}
	}
}

func TestSysctlsAreSplit(t *testing.T) {
	s := ns("ipc")
	s.Linux.Sysctl = map[string]string{"kernel.shmmax": "1", "fs.mqueue.msg_max": "2", "net.core.somaxconn": "3", "vm.max_map_count": "4"}
	s.Linux.Resources, s.Linux.CgroupsPath = &specs.LinuxResources{}, "/x"
	res, guest := Adapt(s, Placement{})
	if !maps.Equal(guest, map[string]string{"net.core.somaxconn": "3", "vm.max_map_count": "4"}) || len(s.Linux.Sysctl) != 2 {
		t.Errorf("guest %v, container %v", guest, s.Linux.Sysctl)
	}
	if res == nil || s.Linux.Resources != nil || s.Linux.CgroupsPath != "" {
		t.Error("resources are the agent's business")
	}
	s = ns("network")
	s.Linux.Sysctl = map[string]string{"net.core.somaxconn": "3"}
	if _, guest := Adapt(s, Placement{}); len(guest) != 0 {
		t.Errorf("a network namespace of its own: %v", guest)
	}
}

func TestInPod(t *testing.T) {
	for kind, want := range map[string]bool{"sandbox": true, "container": true, "pod_container": true, "pod_sandbox": true, "single_container": false, "": false} {
		s := &specs.Spec{Annotations: map[string]string{annotationCRIType: kind}}
		if InPod(s) != want {
			t.Errorf("%q: not %v", kind, want)
		}
	}
}
