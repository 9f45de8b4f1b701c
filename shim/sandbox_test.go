// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/protocols/cripb"
	"github.com/kata-v2/kata/protocols/sandboxpb"
)

func (p *pod) sandboxes() sandboxapi.TTRPCSandboxService {
	return sandboxapi.NewTTRPCSandboxClient(p.v3)
}

// criOptions are a pod's configuration as containerd passes it.
func criOptions(t *testing.T, c *cripb.PodSandboxConfig) *anypb.Any {
	t.Helper()
	data, err := proto.Marshal(c)
	must(t, err)
	return &anypb.Any{TypeUrl: typePodSandboxConfig, Value: data}
}

func (p *pod) createSandbox(c *cripb.PodSandboxConfig) error {
	p.t.Helper()
	_, err := p.sandboxes().CreateSandbox(bounded(p.t), &sandboxapi.CreateSandboxRequest{SandboxID: "pod", Options: criOptions(p.t, c)})
	return errgrpc.ToNative(err)
}

// sandboxCalls are the calls that name a sandbox, as functions of its id.
func (p *pod) sandboxCalls() map[string]func(string) error {
	s := p.sandboxes()
	return map[string]func(string) error{
		"Start": func(id string) error {
			_, err := s.StartSandbox(bounded(p.t), &sandboxapi.StartSandboxRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Platform": func(id string) error {
			_, err := s.Platform(bounded(p.t), &sandboxapi.PlatformRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Stop": func(id string) error {
			_, err := s.StopSandbox(bounded(p.t), &sandboxapi.StopSandboxRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Status": func(id string) error {
			_, err := s.SandboxStatus(bounded(p.t), &sandboxapi.SandboxStatusRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Ping": func(id string) error {
			_, err := s.PingSandbox(bounded(p.t), &sandboxapi.PingRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Metrics": func(id string) error {
			_, err := s.SandboxMetrics(bounded(p.t), &sandboxapi.SandboxMetricsRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Update": func(id string) error {
			_, err := s.UpdateSandbox(bounded(p.t), &sandboxapi.UpdateSandboxRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
		"Wait": func(id string) error {
			_, err := s.WaitSandbox(bounded(p.t), &sandboxapi.WaitSandboxRequest{SandboxID: id})
			return errgrpc.ToNative(err)
		},
	}
}

// check makes calls and compares the kinds of their errors; nil is success.
func (p *pod) check(when string, want map[string]func(error) bool) {
	p.t.Helper()
	calls := p.sandboxCalls()
	for name, kind := range want {
		err := calls[name]("pod")
		if kind == nil && err != nil || kind != nil && !kind(err) {
			p.t.Errorf("%s %s: %v", name, when, err)
		}
	}
}

func TestLifeOfASandbox(t *testing.T) {
	p := newPod(t)
	for name, call := range p.sandboxCalls() {
		if err := call("other"); !errdefs.IsNotFound(err) {
			t.Errorf("%s of another sandbox: %v", name, err)
		}
	}
	p.check("before create", map[string]func(error) bool{
		"Start": errdefs.IsFailedPrecondition, "Stop": errdefs.IsNotFound, "Status": errdefs.IsNotFound, "Ping": errdefs.IsNotFound,
		"Metrics": errdefs.IsNotFound, "Wait": errdefs.IsNotFound, "Platform": nil,
	})
	must(t, p.createSandbox(&cripb.PodSandboxConfig{Hostname: "web-0"}))
	if err := p.createSandbox(&cripb.PodSandboxConfig{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	_, err := p.tasks().Create(bounded(t), &task.CreateTaskRequest{ID: "early", Bundle: p.bundle("early", "true")})
	if err := errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container before the start: %v", err)
	}
	p.check("before start", map[string]func(error) bool{"Status": nil, "Ping": errdefs.IsFailedPrecondition})

	started, err := p.sandboxes().StartSandbox(bounded(t), &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	must(t, err)
	if started.Pid != uint32(p.sb.PID()) || started.CreatedAt == nil {
		t.Errorf("start %v", started)
	}
	p.check("of a running one", map[string]func(error) bool{"Start": errdefs.IsFailedPrecondition, "Ping": nil, "Metrics": nil, "Update": nil})
	st := p.sandboxStatus()
	if st.State != sandboxReady || st.Pid != started.Pid || !proto.Equal(st.CreatedAt, started.CreatedAt) || st.ExitedAt != nil {
		t.Errorf("status %v", st)
	}
	var info map[string]any
	if err := json.Unmarshal([]byte(st.Info["info"]), &info); err != nil || info["pid"] != float64(st.Pid) {
		t.Errorf("info %v: %v", st.Info, err)
	}

	// A container comes and goes; the task service's shutdown does not end the pod.
	p.create("c1", "sleep")
	p.start("c1", "")
	waited := make(chan *sandboxapi.WaitSandboxResponse, 1)
	go func() {
		r, _ := p.sandboxes().WaitSandbox(bounded(t), &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
		waited <- r
	}()
	_, err = p.tasks().Shutdown(bounded(t), &task.ShutdownRequest{ID: "c1"})
	must(t, err)
	p.check("with a container", map[string]func(error) bool{"Ping": nil})

	p.check("", map[string]func(error) bool{"Stop": nil})
	if r := <-waited; r.GetExitStatus() != 0 || r.GetExitedAt() == nil {
		t.Errorf("wait %v", r)
	}
	if w := p.wait("c1", ""); w.ExitStatus != killedStatus {
		t.Errorf("the container's end: %v", w)
	}
	p.delete("c1", "")
	p.check("of a stopped one", map[string]func(error) bool{
		"Stop": nil, "Wait": nil, "Status": nil, "Ping": errdefs.IsFailedPrecondition, "Start": errdefs.IsFailedPrecondition, "Metrics": nil,
	})
	if st := p.sandboxStatus(); st.State != sandboxNotReady || st.ExitedAt == nil {
		t.Errorf("status %v", st)
	}
	select {
	case <-p.svc.done:
		t.Error("the shim ends before ShutdownSandbox")
	default:
	}
	for range 2 {
		_, err = p.sandboxes().ShutdownSandbox(bounded(t), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"})
		must(t, err)
	}
	<-p.svc.done
}

func (p *pod) sandboxStatus() *sandboxapi.SandboxStatusResponse {
	p.t.Helper()
	st, err := p.sandboxes().SandboxStatus(bounded(p.t), &sandboxapi.SandboxStatusRequest{SandboxID: "pod", Verbose: true})
	must(p.t, err)
	return st
}

// A machine that ends by itself: the status says why.
func TestSandboxThatDies(t *testing.T) {
	p := newPod(t)
	must(t, p.createSandbox(&cripb.PodSandboxConfig{}))
	p.check("", map[string]func(error) bool{"Start": nil})
	proc, err := os.FindProcess(p.sb.PID())
	must(t, err)
	must(t, proc.Kill())
	r, err := p.sandboxes().WaitSandbox(bounded(t), &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
	must(t, err)
	if st := p.sandboxStatus(); r.ExitStatus != killedStatus || st.State != sandboxNotReady || !strings.Contains(st.Info["kata"], `"reason":"`) {
		t.Errorf("wait %v, status %v", r, st)
	}
}

// A pod that began with a container is not one of the Sandbox API.
func TestSandboxCallsOnAPodOfTasks(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	if err := p.createSandbox(&cripb.PodSandboxConfig{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create: %v", err)
	}
	p.check("of a pod of tasks", map[string]func(error) bool{"Start": errdefs.IsFailedPrecondition, "Status": errdefs.IsNotFound, "Stop": errdefs.IsNotFound})
}

func TestSandboxMetrics(t *testing.T) {
	p := newPod(t)
	must(t, p.createSandbox(&cripb.PodSandboxConfig{}))
	p.check("", map[string]func(error) bool{"Start": nil})
	for _, id := range []string{"c1", "c2"} {
		p.create(id, "sleep")
		p.start(id, "")
	}
	one, err := p.tasks().Stats(bounded(t), &task.StatsRequest{ID: "c1"})
	must(t, err)
	r, err := p.sandboxes().SandboxMetrics(bounded(t), &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"})
	must(t, err)
	single, err := typeurl.UnmarshalAny(one.Stats)
	must(t, err)
	sum, err := typeurl.UnmarshalAny(r.Metrics.Data)
	must(t, err)
	if got, want := sum.(*stats.Metrics).Pids.Current, 2*single.(*stats.Metrics).Pids.Current; got != want || want == 0 || r.Metrics.ID != "pod" || r.Metrics.Timestamp == nil {
		t.Errorf("%d processes; want %d: %v", got, want, r.Metrics)
	}
}

func TestPodConfig(t *testing.T) {
	c := &cripb.PodSandboxConfig{
		Hostname: "web-0", Annotations: map[string]string{"a": "pod", "b": "pod"},
		DnsConfig: &cripb.DNSConfig{Servers: []string{"192.0.2.53", "2001:db8::53"}, Searches: []string{"a.b", "b"}, Options: []string{"ndots:5"}},
		Linux: &cripb.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/pod1", Sysctls: map[string]string{"net.core.somaxconn": "99", "net.ipv4.ip_unprivileged_port_start": "1024"},
			Resources: &cripb.LinuxContainerResources{CpuQuota: 50000, CpuPeriod: 100000, MemoryLimitInBytes: 1 << 20, CpuShares: 512},
			Overhead:  &cripb.LinuxContainerResources{MemoryLimitInBytes: 2 << 20},
			SecurityContext: &cripb.LinuxSandboxSecurityContext{NamespaceOptions: &cripb.NamespaceOption{
				Pid: cripb.NamespaceMode_POD,
			}},
		},
	}
	r := &sandboxpb.CreateSandboxRequest{NetnsPath: "/run/ns", Annotations: map[string]string{"b": "request"}}
	if p, err := podConfig(r, &cripb.PodSandboxConfig{}, "/files"); err != nil || !p.SharePID {
		t.Errorf("one PID namespace is what the CRI means by nothing: %+v, %v", p, err)
	}
	if p, err := podConfig(r, c, "/files"); err != nil || p.Networked {
		t.Errorf("not by the CRI: networked %t, %v", p.Networked, err)
	}
	r.Options = criOptions(t, c)
	p, err := podConfig(r, c, "/files")
	must(t, err)
	if !p.Networked || p.NetNSPath != "/run/ns" || p.Hostname != "web-0" || !p.SharePID || p.CgroupParent != "/kubepods/pod1" || p.ShmBytes != 64<<20 {
		t.Errorf("%+v", p)
	}
	if p.Annotations["a"] != "pod" || p.Annotations["b"] != "request" {
		t.Errorf("annotations %v", p.Annotations)
	}
	if p.Sysctls["net.core.somaxconn"] != "99" || p.Sysctls["net.ipv4.ip_unprivileged_port_start"] != "1024" || p.Sysctls["net.ipv4.ping_group_range"] == "" {
		t.Errorf("sysctls %v", p.Sysctls)
	}
	if *p.Resources.CPU.Quota != 50000 || *p.Resources.CPU.Period != 100000 || *p.Resources.CPU.Shares != 512 || *p.Resources.Memory.Limit != 1<<20 || *p.Overhead.Memory.Limit != 2<<20 {
		t.Errorf("resources %+v, overhead %+v", p.Resources, p.Overhead)
	}
	if got := strings.Join(p.DNS, "|"); got != "search a.b b|nameserver 192.0.2.53|nameserver 2001:db8::53|options ndots:5" {
		t.Errorf("DNS %q", got)
	}
	if p.Files["/etc/hostname"] != "/files/hostname" || len(p.Files) != 3 {
		t.Errorf("files %v", p.Files)
	}
	dir := filepath.Join(t.TempDir(), "etc")
	must(t, writePodFiles(dir, c))
	for name, want := range map[string]string{"hostname": "web-0\n", "resolv.conf": strings.Join(p.DNS, "\n") + "\n"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, "hosts")); err != nil || !strings.Contains(string(got), "localhost") {
		t.Errorf("hosts: %q, %v", got, err)
	}
}

func TestPodConfigRefuses(t *testing.T) {
	for name, o := range map[string]*cripb.NamespaceOption{
		"network": {Network: cripb.NamespaceMode_NODE},
		"pid":     {Pid: cripb.NamespaceMode_NODE},
		"ipc":     {Ipc: cripb.NamespaceMode_NODE},
		"userns":  {UsernsOptions: &cripb.UserNamespace{Mode: cripb.NamespaceMode_POD}},
	} {
		c := &cripb.PodSandboxConfig{Linux: &cripb.LinuxPodSandboxConfig{SecurityContext: &cripb.LinuxSandboxSecurityContext{NamespaceOptions: o}}}
		if _, err := podConfig(&sandboxpb.CreateSandboxRequest{}, c, ""); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "namespace_options."+name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := podSandboxConfig(&anypb.Any{TypeUrl: "some.Thing", Value: []byte{8, 1}}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "some.Thing") {
		t.Errorf("other options: %v", err)
	}
	if _, err := podSandboxConfig(&anypb.Any{TypeUrl: "types.containerd.io/" + typePodSandboxConfig, Value: []byte{0xff}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("options that do not parse: %v", err)
	}
	if c, err := podSandboxConfig(nil); err != nil || c == nil {
		t.Errorf("no options: %v", err)
	}
}

// A sandbox of the Sandbox API is answered with version 3 in JSON, so that
// containerd 2.0 to 2.2 sends its containers here.
func TestAnswerForASandbox(t *testing.T) {
	t.Setenv(envMaxVersion, "2")
	for sandboxAPI, want := range map[bool]float64{false: 2, true: 3} {
		var b bytes.Buffer
		must(t, answer(&params{}, "unix:///run/x/shim.sock", sandboxAPI, mountCapabilities(&config.Config{}), &b))
		var got map[string]any
		must(t, json.Unmarshal(b.Bytes(), &got))
		if got["version"] != want || got["protocol"] != "ttrpc" {
			t.Errorf("sandbox %t: %v", sandboxAPI, got)
		}
	}
}

// TestUpdateSandbox: what containerd's CRI says of a pod's limits reaches its machine.
func TestUpdateSandbox(t *testing.T) {
	p := newPod(t)
	update := func(ext string, fields ...string) error {
		sb := &types.Sandbox{SandboxID: "pod", Extensions: map[string]*anypb.Any{"other": {Value: []byte("x")}}}
		if ext != "" {
			sb.Extensions["updated-resources"] = &anypb.Any{TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: []byte(ext)}
		}
		_, err := p.sandboxes().UpdateSandbox(bounded(t), &sandboxapi.UpdateSandboxRequest{SandboxID: "pod", Sandbox: sb, Fields: fields})
		return errgrpc.ToNative(err)
	}
	if err := update(""); !errdefs.IsNotFound(err) {
		t.Errorf("before create: %v", err)
	}
	must(t, p.createSandbox(&cripb.PodSandboxConfig{}))
	const grown = `{"Overhead":null,"Resources":{"cpu_period":100000,"cpu_quota":100000,"memory_limit_in_bytes":67108864}}`
	if err := update(grown, "extensions"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("before start: %v", err)
	}
	p.check("", map[string]func(error) bool{"Start": nil})
	must(t, update(""))            // nothing for the runtime
	must(t, update("{", "labels")) // which says that it is unchanged
	if err := update("{"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no JSON: %v", err)
	}
	must(t, update(grown, "extensions"))
	if r, _ := p.agent.Request("OnlineCPUMem").(*agentpb.OnlineCPUMemRequest); r == nil || r.CpuOnly {
		t.Errorf("the guest was told %v; want it to expect memory", r)
	}
	if err := update(`{"Resources":{"memory_limit_in_bytes":4611686018427387904}}`); !errdefs.IsInvalidArgument(err) {
		t.Errorf("more than the host has: %v", err)
	}
}
