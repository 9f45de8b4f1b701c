// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// box is one test's view of a node in one mode.
type box struct {
	*testing.T
	*node
	mode mode
}

// newBox begins a test; at its end nothing may be left: pods, containers, and
// whatever leak finds on the machine, CNI's state among it.
func newBox(t *testing.T, m mode) *box {
	t.Helper()
	b := &box{T: t, node: nodeOf(t, m.version), mode: m}
	c := b.c
	scope := leak.Scope{Patterns: append(c.CNIState(),
		filepath.Join(c.PodsDir(), "[^.]*"), filepath.Join(c.StateDir(), "*task*", "*", "*"),
		filepath.Join(c.StateDir(), "*sandbox*", "*", "*"), filepath.Join(c.StateDir(), "*cri*", "netns", "*"),
	)}
	before, err := scope.Take()
	if err != nil {
		t.Fatal(err)
	}
	logged := len(c.Log())
	t.Cleanup(func() {
		if pods := must(b.runtime.ListPodSandbox(b.ctx(), nil))(t); len(pods) > 0 {
			t.Errorf("%d pods are left, the first is %v", len(pods), pods[0])
		}
		left, err := scope.Settle(before, leak.SettleTime)
		if err != nil {
			t.Error(err)
		}
		left = slices.DeleteFunc(left, b.nodesOwn)
		if len(left) > 0 {
			t.Errorf("left behind on this machine:\n%s", leak.Format(left))
		}
		if t.Failed() {
			t.Logf("what was logged meanwhile:\n%s", strings.Join(notable(c.Log()[logged:]), "\n"))
		}
	})
	return b
}

// nodesOwn is what the first pod of a node makes and the node keeps, the bridges
// in the lab's own network, and containerd after a restart.
func (b *box) nodesOwn(l leak.Leak) bool {
	for _, bridge := range []string{"pods0 (bridge,", "lan0 (bridge,", "lan1 (bridge,", "lan2 (bridge,"} {
		if strings.Contains(l.What, " "+bridge) || strings.HasPrefix(l.What, bridge) {
			return true
		}
	}
	return strings.HasPrefix(l.What, fmt.Sprintf("%d (", b.c.PID()))
}

// notable picks the lines of a log that say why something failed.
func notable(lines []string) []string {
	var out []string
	for _, l := range lines {
		if strings.Contains(l, "sandbox=") || strings.Contains(l, "level=error") || strings.Contains(l, "level=warning") && !strings.Contains(l, "cgroup v1") {
			out = append(out, l)
		}
	}
	return out[max(0, len(out)-40):]
}

// must ends the test on an error: must(f(…))(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// ok ends the test on an error.
func (b *box) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// ctx bounds one call; it ends with the test, clean-up included.
func (b *box) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	b.Cleanup(cancel)
	return ctx
}

var serial atomic.Int64

// pod is a running pod.
type pod struct {
	*box
	id     string
	config *runtimeapi.PodSandboxConfig
}

// podConfig describes a pod with a name of its own.
func (b *box) podConfig() *runtimeapi.PodSandboxConfig {
	name := fmt.Sprintf("pod-%d", serial.Add(1))
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: "uid-" + name, Namespace: "default"},
		Hostname:     name,
		LogDirectory: b.TempDir(),
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			// What the kubelet says of an ordinary pod.
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

// run runs a pod, which is removed at the test's end; change may set parts of it.
func (b *box) run(change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	b.Helper()
	config := b.podConfig()
	for _, f := range change {
		f(config)
	}
	p := &pod{box: b, config: config}
	p.id = must(b.runtime.RunPodSandbox(b.ctx(), config, b.mode.handler))(b)
	b.Cleanup(p.remove)
	return p
}

// remove stops and removes the pod; it may be gone, which containerd 1.6 calls an error.
func (p *pod) remove() {
	p.Helper()
	if len(must(p.runtime.ListPodSandbox(p.ctx(), &runtimeapi.PodSandboxFilter{Id: p.id}))(p)) == 0 {
		return
	}
	if err := p.runtime.StopPodSandbox(p.ctx(), p.id); err != nil {
		p.Error(err)
	}
	if err := p.runtime.RemovePodSandbox(p.ctx(), p.id); err != nil {
		p.Error(err)
	}
}

// container is a container of a pod.
type container struct {
	*pod
	id, name string
}

// containerConfig describes a container of the busybox image.
func (p *pod) containerConfig(args ...string) *runtimeapi.ContainerConfig {
	name := fmt.Sprintf("c%d", serial.Add(1))
	pid := p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid()
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: lab.BusyboxImage},
		Command:  args, LogPath: name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: pid},
		}},
	}
}

// create makes a container.
func (p *pod) create(config *runtimeapi.ContainerConfig) *container {
	p.Helper()
	id := must(p.runtime.CreateContainer(p.ctx(), p.id, config, p.config))(p)
	return &container{pod: p, id: id, name: config.Metadata.Name}
}

// start makes and starts a container.
func (p *pod) start(config *runtimeapi.ContainerConfig) *container {
	p.Helper()
	c := p.create(config)
	p.ok(p.runtime.StartContainer(p.ctx(), c.id))
	return c
}

// sleeper is a container that does nothing for long.
func (p *pod) sleeper() *container {
	p.Helper()
	return p.start(p.containerConfig("sleep", "100000"))
}

// script is the configuration of a container that runs a shell script.
func (p *pod) script(text string) *runtimeapi.ContainerConfig {
	return p.containerConfig("sh", "-c", text)
}

// output runs a script in a container of its own to its end and returns what it wrote.
func (p *pod) output(config *runtimeapi.ContainerConfig) string {
	p.Helper()
	c := p.start(config)
	if s := c.wait(); s.ExitCode != 0 {
		p.Errorf("%v: exit code %d, %s: %s; output %q", config.Command, s.ExitCode, s.Reason, s.Message, c.log())
	}
	out := c.log()
	c.removeNow()
	return out
}

// status of the container.
func (c *container) status() *runtimeapi.ContainerStatus {
	c.Helper()
	return must(c.runtime.ContainerStatus(c.ctx(), c.id, false))(c).Status
}

// waitTime bounds the wait for the end of a container that should end by itself.
const waitTime = 30 * time.Second

// wait returns the status of a container that has ended. The CRI's events would
// tell of the end, but containerd has them behind its status as well.
func (c *container) wait() *runtimeapi.ContainerStatus {
	c.Helper()
	deadline := time.Now().Add(waitTime)
	for {
		s := c.status()
		if s.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return s
		}
		if time.Now().After(deadline) {
			c.Fatalf("%s does not end: %v", c.name, s)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (c *container) stop(grace int64) {
	c.Helper()
	c.ok(c.runtime.StopContainer(c.ctx(), c.id, grace))
}

func (c *container) removeNow() {
	c.Helper()
	c.ok(c.runtime.RemoveContainer(c.ctx(), c.id))
}

// log is what the container has written, stdout and stderr, without the stamps.
func (c *container) log() string {
	c.Helper()
	data, err := os.ReadFile(filepath.Join(c.config.LogDirectory, c.name+".log"))
	c.ok(err)
	var out strings.Builder
	for line := range strings.Lines(string(data)) {
		// time stream F|P text (k8s.io/cri-api, container log format)
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) < 4 {
			c.Errorf("log line %q", line)
			continue
		}
		out.WriteString(f[3])
		if f[2] == "F" {
			out.WriteByte('\n')
		}
	}
	return out.String()
}

// exec runs a command in the container and returns its output.
func (c *container) exec(args ...string) (stdout, stderr string, err error) {
	c.Helper()
	o, e, err := c.runtime.ExecSync(c.ctx(), c.id, args, callTimeout)
	return string(o), string(e), err
}

// shell runs a script that must succeed and returns its output, trimmed.
func (c *container) shell(text string) string {
	c.Helper()
	stdout, stderr, err := c.exec("sh", "-c", text)
	if err != nil {
		c.Fatalf("%s: %v; stderr %q", text, err, stderr)
	}
	return strings.TrimSpace(stdout)
}

// ip is the pod's address as the CRI has it.
func (p *pod) ip() string {
	p.Helper()
	return must(p.runtime.PodSandboxStatus(p.ctx(), p.id, false))(p).GetStatus().GetNetwork().GetIp()
}
