// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got)+"\n" != string(want) {
		t.Errorf("differs from %s (go test -update rewrites it):\n%s", path, got)
	}
}

func readSpec(t *testing.T, name string) *specs.Spec {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

func TestGuestSpec(t *testing.T) {
	s := readSpec(t, "spec.json")
	before, _ := json.Marshal(s)
	g := guestSpec(s, "/run/kata-containers/shared/containers/c1/rootfs", map[int]string{3: "/run/kata-containers/shared/containers/c1-3-data"}, true)
	golden(t, "spec.guest.json", g)
	golden(t, "spec.wire.json", wireSpec(g))
	if after, _ := json.Marshal(s); string(after) != string(before) {
		t.Error("the host's specification was changed")
	}
}

func TestPrivateNamespaces(t *testing.T) {
	ns := func(ipc, uts string) []specs.LinuxNamespace {
		return []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: ipc}, {Type: specs.UTSNamespace, Path: uts}, {Type: specs.PIDNamespace}}
	}
	for name, c := range map[string]struct {
		namespaces []specs.LinuxNamespace
		kind, said string
		want       string
	}{
		"shared":   {ns("/proc/1/ns/ipc", "/proc/1/ns/uts"), "container", "", ""},
		"own":      {ns("", ""), "container", "", "ipc,uts"},
		"own name": {ns("/proc/1/ns/ipc", ""), "container", "", "uts"},
		"pause":    {ns("", ""), "sandbox", "", ""},
		"pretends": {ns("/proc/1/ns/ipc", "/proc/1/ns/uts"), "container", "ipc", ""},
	} {
		s := &specs.Spec{Linux: &specs.Linux{Namespaces: c.namespaces}, Annotations: map[string]string{"io.kubernetes.cri.container-type": c.kind}}
		if c.said != "" {
			s.Annotations[protocols.AnnotationPrivate] = c.said
		}
		if got := privateNamespaces(s)[protocols.AnnotationPrivate]; got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestPlanMount(t *testing.T) {
	for _, c := range []struct {
		m    specs.Mount
		want mountPlan
	}{
		{specs.Mount{Type: "proc", Source: "proc", Destination: "/proc"}, mountInGuest},
		{specs.Mount{Type: "tmpfs", Source: "shm", Destination: "/dev/shm"}, mountInGuest},
		{specs.Mount{Type: "bind", Source: "/run/pod/shm", Destination: "/dev/shm"}, mountPodShm},
		{specs.Mount{Type: "bind", Source: "/data", Destination: "/d"}, mountShared},
		{specs.Mount{Source: "/data", Destination: "/d", Options: []string{"rbind", "ro"}}, mountShared},
		{specs.Mount{Type: "bind", Source: "/devices", Destination: "/d"}, mountShared},
		{specs.Mount{Type: "bind", Source: "/dev/null", Destination: "/d"}, mountInGuest},
		{specs.Mount{Type: "bind", Source: "/sys/../sys/fs", Destination: "/d"}, mountInGuest},
	} {
		if got := planMount(c.m); got != c.want {
			t.Errorf("%+v: plan %d, want %d", c.m, got, c.want)
		}
	}
}

func TestValidateSpec(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"no linux":   {func(s *specs.Spec) { s.Linux = nil }, "linux: "},
		"no process": {func(s *specs.Spec) { s.Process = nil }, "process.args"},
		"no args":    {func(s *specs.Spec) { s.Process.Args = nil }, "process.args"},
		"host network": {func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace}}
		}, "host's network"},
		"host network by path": {func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/proc/self/ns/net"}}
		}, "host's network"},
		"missing network": {func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/nonexistent"}}
		}, "linux.namespaces[0].path"},
		"host processes": {func(s *specs.Spec) {
			s.Annotations = map[string]string{containerTypeKey: "sandbox"}
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace}}
		}, "no pid namespace"},
		"host IPC": {func(s *specs.Spec) {
			s.Annotations = map[string]string{containerTypeKey: "sandbox"}
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.NetworkNamespace}, {Type: specs.PIDNamespace}}
		}, "no ipc namespace"},
		"user namespace": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, "(user): user namespaces are not supported"},
		"user mappings": {func(s *specs.Spec) {
			s.Linux.GIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 1}}
		}, "linux.gidMappings"},
		"mapped mount": {func(s *specs.Spec) {
			s.Mounts[0].UIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 1}}
		}, "mounts[0]"},
		"idmap": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/x", Destination: "/y", Options: []string{"rbind", "ridmap"}})
		}, "mapped user ids"},
		"bidirectional": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/x", Destination: "/y", Options: []string{"rbind", "rshared"}})
		}, "Bidirectional"},
		"seccomp default": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_PERHAPS"}
		}, `linux.seccomp.defaultAction: "SCMP_ACT_PERHAPS"`},
		"seccomp action": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}}}}
		}, `linux.seccomp.syscalls[0].action: ""`},
		"seccomp without calls": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Action: specs.ActErrno}}}
		}, "linux.seccomp.syscalls[0].names"},
		"seccomp operator": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
				{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: specs.OpEqualTo}, {Op: "SCMP_CMP_ISH"}}}}}
		}, `linux.seccomp.syscalls[0].args[1].op: "SCMP_CMP_ISH"`},
		"seccomp argument": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
				{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}}}
		}, "linux.seccomp.syscalls[0].args[0].index"},
	} {
		t.Run(name, func(t *testing.T) {
			s := readSpec(t, "spec.json")
			if err := validateSpec(s, ""); err != nil {
				t.Fatalf("valid one: %v", err)
			}
			c.change(s)
			err := validateSpec(s, "")
			if err == nil || !strings.Contains(err.Error(), c.want) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v; want an invalid argument that names %q", err, c.want)
			}
		})
	}
}

func TestPlanVM(t *testing.T) {
	c, _, err := config.Load(config.LoadOptions{Body: []byte("[hypervisor.qemu]\nkernel_params = \"last=1\"\n[factory]\nenable_template = false\n[agent.kata]\nenable_debug = true\ncontainer_pipe_size = 4096\n")})
	if err != nil {
		t.Fatal(err)
	}
	h := Host{CPUs: 8, MemoryBytes: 4 << 30}
	vc := planVM(c, "pod1", "0123456789abcdef", "/run/netns/x", newSizer(h, boundsOf(c, h), demand{milliCPUs: 1500, memory: 100<<20 + 1}))
	vc.Started = nil
	golden(t, "plan.json", struct {
		ID, Kernel, Initrd, Netns, Ready string
		Params                           []string
		CPUs, Max                        int
		Memory, MaxMemory                uint64
		UID                              uint32
	}{vc.ID, vc.Kernel, vc.Initrd, vc.Network.Path, vc.ReadyParam, vc.KernelParams, vc.CPUs, vc.MaxCPUs, vc.MemoryBytes, vc.MaxMemoryBytes, vc.UID})
}

func TestVMMUserIsInTheFreeRange(t *testing.T) {
	seen := map[uint32]bool{}
	for i := range 1000 {
		u := VMMUser(fmt.Sprint(i))
		if u < 0x70000000 || u > 0x7ffffffe {
			t.Fatalf("uid %#x", u)
		}
		seen[u] = true
	}
	if len(seen) < 990 {
		t.Errorf("%d different users for 1000 pods", len(seen))
	}
}

func TestTransitions(t *testing.T) {
	for from := Created; from <= Deleted; from++ {
		for to := Created; to <= Deleted; to++ {
			err := checkTransition("x", from, to)
			if err != nil && !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("%v to %v: %v", from, to, err)
			}
			if (from == Stopped || from == Deleted) && to == Running && err == nil {
				t.Errorf("%v may become running", from)
			}
		}
	}
}
