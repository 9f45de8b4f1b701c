// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab"
)

// refused asserts that a pod is refused with an error that has all the words.
// What it leaves behind is the box's to find.
func (b *box) refused(handler string, change func(*runtimeapi.PodSandboxConfig), words ...string) error {
	b.Helper()
	config := b.podConfig()
	change(config)
	id, err := b.runtime.RunPodSandbox(b.ctx(), config, handler)
	if err == nil {
		(&pod{box: b, id: id, config: config}).remove()
		b.Errorf("%s: a pod runs that should be refused for %q", handler, words)
		return nil
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			b.Errorf("%s: %v; want an error that names %s", handler, err, w)
		}
	}
	return err
}

// TestBadAnnotations: values that a setting does not take, settings that do not
// exist and those that the operator has not allowed.
func TestBadAnnotations(t *testing.T) { each(t, testBadAnnotations, pauseMode) }

func testBadAnnotations(b *box) {
	const prefix = "io.katacontainers.config."
	for _, c := range []struct{ name, value, want string }{
		{prefix + "hypervisor.default_vcpus", "many", "many"},
		{prefix + "hypervisor.default_vcpu", "2", "the nearest is " + prefix + "hypervisor.default_vcpus"},
		{prefix + "hypervisor.kernel_params", "init=/bin/sh", "not allowed"},
		{prefix + "nonsense", "1", "unknown"},
		{"io.katacontainers.config_path", "/etc/passwd", "refused"},
	} {
		err := b.refused(b.mode.handler, func(p *runtimeapi.PodSandboxConfig) { p.Annotations = map[string]string{c.name: c.value} }, c.name, c.want)
		// Of a pause container the configuration is read by `start`, whose error is text.
		if b.mode.handler == lab.HandlerSandbox && status.Code(err) != codes.InvalidArgument {
			b.Errorf("%s: code %v", c.name, status.Code(err))
		}
	}
}

// lanSubnet is that of the networks below.
const lanSubnet = "10.88.78.0/24"

// networks are CNI networks of which pods are made, or cannot be, by the end of their handlers' names.
var networks = map[string]string{
	"nothing": `{"type": "loopback"}`,
	"empty":   `{"type": "empty"}`,
	"mtu":     bridge(`"mtu": 65535, `),
	"overlap": bridge("") + `, {"type": "overlap"}`,
	"several": severalNetworks,
}

func bridge(more string) string {
	return fmt.Sprintf(`{"type": "bridge", "bridge": "lan0", %s"ipam": {"type": "host-local", "dataDir": "@DATA@", "ranges": [[{"subnet": %q}]]}}`, more, lanSubnet)
}

// plugins are CNI plugins of our own. empty says that the pod has an address and
// does nothing; overlap adds a device with an address of the same network: two
// routes to it that only differ in the device. libcni writes the keys of what a
// plugin reads in order, so prevResult comes before type.
var plugins = map[string]string{"empty": `#!/bin/sh
echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"], "ips": [{"address": "` + strings.Replace(lanSubnet, ".0/", ".9/", 1) + `"}]}'
`, "overlap": `#!/bin/sh
case $CNI_COMMAND in
ADD)
	nsenter --net="$CNI_NETNS" ip link add net1 type veth peer name net2 || exit 1
	nsenter --net="$CNI_NETNS" ip address add ` + strings.Replace(lanSubnet, ".0/", ".254/", 1) + ` dev net1
	nsenter --net="$CNI_NETNS" ip link set net2 up
	nsenter --net="$CNI_NETNS" ip link set net1 up
	sed -n 's/.*"prevResult":\(.*\),"type":.*/\1/p' ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' ;;
esac
`, "more": morePlugin}

// TestBadNetworks: a CNI result without an interface, one whose interface is not
// there, an MTU that no tap takes, routes that only their order tells apart.
func TestBadNetworks(t *testing.T) { each(t, testBadNetworks, pauseMode) }

func testBadNetworks(b *box) {
	if b.mode.version < "2" {
		return // whose labs have one network
	}
	keep := func(*runtimeapi.PodSandboxConfig) {}
	b.refused(b.mode.handler+"-nothing", keep, "network")
	for _, c := range []struct {
		name  string
		code  codes.Code
		words []string
	}{
		{"empty", codes.FailedPrecondition, []string{"no network device", "netns"}},
		{"mtu", codes.InvalidArgument, []string{"eth0", "MTU 65535", "65521"}},
		{"overlap", codes.InvalidArgument, []string{"overlapping routes", lanSubnet, "eth0", "net1"}},
	} {
		if err := b.refused(b.mode.handler+"-"+c.name, keep, c.words...); status.Code(err) != c.code {
			b.Errorf("%s: code %v; want %v", c.name, status.Code(err), c.code)
		}
	}
}

// TestUnknownSandbox: calls about a pod that is not there, to containerd and to a
// shim that has another one; a container for a pod that has stopped.
func TestUnknownSandbox(t *testing.T) {
	b := newBox(t, sandboxMode)
	const nobody = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	p := b.run()
	if _, err := b.runtime.CreateContainer(b.ctx(), nobody, p.containerConfig("true"), p.config); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), nobody) {
		b.Errorf("a container for no pod: %v", err)
	}
	s := p.sandboxClient()
	for name, call := range map[string]func() error{
		"start": func() error {
			_, err := s.StartSandbox(b.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: nobody})
			return err
		},
		"stop": func() error {
			_, err := s.StopSandbox(b.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: nobody})
			return err
		},
		"wait": func() error {
			_, err := s.WaitSandbox(b.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: nobody})
			return err
		},
		"status": func() error {
			_, err := s.SandboxStatus(b.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: nobody})
			return err
		},
		"ping": func() error { _, err := s.PingSandbox(b.ctx(), &sandboxapi.PingRequest{SandboxID: nobody}); return err },
		"metrics": func() error {
			_, err := s.SandboxMetrics(b.ctx(), &sandboxapi.SandboxMetricsRequest{SandboxID: nobody})
			return err
		},
		"platform": func() error {
			_, err := s.Platform(b.ctx(), &sandboxapi.PlatformRequest{SandboxID: nobody})
			return err
		},
		"update": func() error {
			_, err := s.UpdateSandbox(b.ctx(), &sandboxapi.UpdateSandboxRequest{SandboxID: nobody})
			return err
		},
		"shutdown": func() error {
			_, err := s.ShutdownSandbox(b.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: nobody})
			return err
		},
	} {
		if err := errgrpc.ToNative(call()); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), nobody) {
			b.Errorf("%s of another sandbox: %v", name, err)
		}
	}
	_, err := s.CreateSandbox(b.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: nobody})
	if err := errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), nobody) {
		b.Errorf("create of another sandbox: %v", err)
	}
	c := p.sleeper()
	bundle := b.TempDir() // containerd removes the container's own when that ends
	b.ok(os.Mkdir(filepath.Join(bundle, "rootfs"), 0o755))
	spec := must(os.ReadFile(filepath.Join(b.c.Bundle(c.id), "config.json")))(b)
	b.ok(os.WriteFile(filepath.Join(bundle, "config.json"), spec, 0o600))
	must(s.StopSandbox(b.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: p.id}))(b)
	_, err = p.taskClient().Create(b.ctx(), &task.CreateTaskRequest{ID: c.id + "-more", Bundle: bundle})
	if err := errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "stopped") {
		b.Errorf("a container for a stopped sandbox: %v", err)
	}
	c.wait()
}

// taskClient is the shim's Task service.
func (p *pod) taskClient() task.TTRPCTaskService { return task.NewTTRPCTaskClient(p.dialShim()) }
