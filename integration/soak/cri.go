// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kata-v2/kata/integration/lab"
)

// exitTime bounds the wait for the end of a container that ends by itself.
const exitTime = 60 * time.Second

// byCRI is the life of a pod of Kubernetes.
func (p *life) byCRI(ctx context.Context) {
	logs, err := os.MkdirTemp("", "kata-soak-log-")
	if err != nil {
		p.bad("%v", err)
		return
	}
	defer os.RemoveAll(logs)
	from := len(p.c.Log())
	config := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: p.name, Uid: "uid-" + p.name, Namespace: "default"}, Hostname: p.name, LogDirectory: logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: pick(p.r, runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_POD)},
		}},
	}
	made := p.do("RunPodSandbox", func(ctx context.Context) (err error) {
		p.id, err = p.cri.RunPodSandbox(ctx, config, p.o.Handler)
		return err
	})
	if !made {
		p.explain(from)
		return
	}
	killed := p.killLater(ctx)
	var all sync.WaitGroup
	for i := range 1 + p.r.IntN(3) {
		c := &container{life: p, config: config, name: fmt.Sprintf("c%d", i), r: p.r.Uint64()}
		all.Go(func() { c.live(ctx) })
	}
	early := p.r.IntN(4) == 0
	if !early {
		all.Wait()
	} else {
		time.Sleep(time.Duration(p.r.IntN(3000)) * time.Millisecond)
		p.tell("early")
		p.beginEnd()
	}
	p.endCRI(early)
	all.Wait()
	killed()
	p.explain(from)
}

// endCRI stops and removes the pod. One whose part was killed while it is stopped, or
// whose containers start meanwhile (containerd: "container is still running"), may need
// a second try, as the kubelet makes it; the third must succeed.
func (p *life) endCRI(early bool) {
	try := func(kind string, f func(context.Context) error) {
		for i := range 3 {
			err := p.call(p.name+" ("+p.story()+")", kind, f)
			if err == nil {
				return
			}
			p.mu.Lock()
			victim := p.victim
			p.mu.Unlock()
			if victim == "" && !early || i == 2 || errors.Is(err, errHung) {
				p.bad("%s, try %d: %v", kind, i+1, err)
				return
			}
			p.excused(kind+" again", err)
		}
	}
	if p.r.IntN(4) > 0 {
		p.tell("stop")
		p.beginEnd()
		try("StopPodSandbox", func(ctx context.Context) error { return p.cri.StopPodSandbox(ctx, p.id) })
	}
	p.tell("remove")
	p.beginEnd()
	try("RemovePodSandbox", func(ctx context.Context) error { return p.cri.RemovePodSandbox(ctx, p.id) })
}

// kinds are the programs of containers, with the exit code that they make; -1: they do not end.
var kinds = map[string]struct {
	script string
	code   int32
}{
	"exit":   {"echo out $0; echo err $0 >&2; exit 3", 3},
	"reader": {"cat /host/below/* | wc -c; cat /host/below/1 >/dev/null & cat /host/below/2 >/dev/null; exit 4", 4},
	"writer": {"dd if=/dev/zero of=/file bs=64k count=100 2>/dev/null; rm /file; echo out $0; exit 5", 5},
	"stays":  {"trap 'exit 7' TERM; echo out $0; while :; do sleep 0.1; done", -1},
	"deaf":   {"trap '' TERM; echo out $0; while :; do sleep 1; done", -1},
}

// container is one of a pod.
type container struct {
	*life
	config *runtimeapi.PodSandboxConfig
	name   string
	id     string
	r      uint64 // of its own: containers of a pod act at once
}

// roll is a number below n.
func (c *container) roll(n int) int {
	c.r = c.r*6364136223846793005 + 1442695040888963407
	return int(c.r>>33) % n
}

func (c *container) live(ctx context.Context) {
	names := []string{"exit", "reader", "writer", "stays", "stays", "deaf", "missing"}
	for i := range 1 + c.roll(3) {
		if ctx.Err() != nil || c.excuse() {
			return
		}
		kind := names[c.roll(len(names))]
		c.tell(c.name + ":" + kind)
		c.one(kind, uint32(i))
	}
}

// one is the life of one container.
func (c *container) one(kind string, attempt uint32) {
	k := kinds[kind]
	log := fmt.Sprintf("%s-%d.log", c.name, attempt)
	word := c.life.name + "-" + c.name
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: c.name, Attempt: attempt}, Image: &runtimeapi.ImageSpec{Image: lab.BusyboxImage},
		Command: []string{"sh", "-c", k.script, word}, LogPath: log,
		Mounts: []*runtimeapi.Mount{{HostPath: c.dir, ContainerPath: "/host", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 100},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: c.config.Linux.SecurityContext.NamespaceOptions},
		},
	}
	if kind == "missing" {
		config.Command = []string{"/no/such/program"}
	}
	made := c.do("CreateContainer", func(ctx context.Context) (err error) {
		c.id, err = c.cri.CreateContainer(ctx, c.life.id, config, c.config)
		return err
	})
	if !made {
		return
	}
	start := func(ctx context.Context) error { return c.cri.StartContainer(ctx, c.id) }
	if kind == "missing" {
		err := c.call(c.life.name, "StartContainer", start)
		if err == nil || !c.excuse() && !strings.Contains(err.Error(), "/no/such/program") {
			c.bad("a program that does not exist: %v", err)
		} else if err != nil {
			c.excused("missing program", err)
		}
	} else if c.do("StartContainer", start) {
		if k.code >= 0 {
			c.exits(k.code)
		} else {
			c.used()
			c.says(filepath.Join(c.config.LogDirectory, log), "out "+word)
			c.stopped(kind)
		}
		c.output(filepath.Join(c.config.LogDirectory, log), word, kind)
	}
	c.do("RemoveContainer", func(ctx context.Context) error { return c.cri.RemoveContainer(ctx, c.id) })
}

// exits waits for an end by itself.
func (c *container) exits(code int32) {
	deadline := time.Now().Add(exitTime)
	for {
		var s *runtimeapi.ContainerStatus
		ok := c.do("ContainerStatus", func(ctx context.Context) error {
			r, err := c.cri.ContainerStatus(ctx, c.id, false)
			s = r.GetStatus()
			return err
		})
		switch {
		case !ok:
			return
		case s.State == runtimeapi.ContainerState_CONTAINER_EXITED && s.ExitCode == code:
			return
		case s.State == runtimeapi.ContainerState_CONTAINER_EXITED:
			if !c.excuse() {
				c.bad("exit code %d (%s %s), want %d", s.ExitCode, s.Reason, s.Message, code)
			}
			return
		case time.Now().After(deadline):
			c.bad("no end after %v: %v", exitTime, s)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// used asks a running container for this and that.
func (c *container) used() {
	for range c.roll(5) {
		if c.excuse() {
			return
		}
		switch c.roll(5) {
		case 0, 1:
			c.asks()
		case 2:
			c.do("ContainerStats", func(ctx context.Context) error {
				_, err := c.cri.ContainerStats(ctx, c.id)
				return err
			})
		case 3:
			c.do("UpdateContainerResources", func(ctx context.Context) error {
				return c.cri.UpdateContainerResources(ctx, c.id, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{
					MemoryLimitInBytes: int64(64+64*c.roll(3)) << 20, CpuQuota: int64(50000 * (1 + c.roll(2))), CpuPeriod: 100000}})
			})
		case 4: // longer than it may: it is killed, and the call returns
			err := c.call(c.life.name, "ExecSync too long", func(ctx context.Context) error {
				_, _, err := c.cri.ExecSync(ctx, c.id, []string{"sleep", "1000"}, time.Second)
				return err
			})
			if err == nil {
				c.bad("an exec of 1000 s ended within one")
			} else {
				c.excused("ExecSync too long", err)
			}
		}
	}
}

// asks runs a command, with its code and its output.
func (c *container) asks() {
	code := c.roll(3)
	var out []byte
	err := c.call(c.life.name, "ExecSync", func(ctx context.Context) (err error) {
		out, _, err = c.cri.ExecSync(ctx, c.id, []string{"sh", "-c", fmt.Sprintf("echo answer; exit %d", code)}, callLimit)
		return err
	})
	switch {
	case c.excuse():
	case code == 0 && err != nil, code != 0 && (err == nil || !strings.Contains(err.Error(), fmt.Sprint(code))), string(out) != "answer\n":
		c.bad("exec that ends with %d: %v, output %q", code, err, out)
	}
}

// stopped stops a container, unless it is to be removed as it runs.
func (c *container) stopped(kind string) {
	if c.roll(4) == 0 {
		c.tell("force")
		return
	}
	grace := int64(c.roll(3))
	if kind == "stays" {
		grace *= 30 // enough for a trap, or none
	}
	c.do("StopContainer", func(ctx context.Context) error { return c.cri.StopContainer(ctx, c.id, grace) })
	c.do("ContainerStatus", func(ctx context.Context) error {
		r, err := c.cri.ContainerStatus(ctx, c.id, false)
		if s := r.GetStatus(); err == nil && !c.excuse() {
			want := int32(137)
			if kind == "stays" && grace > 0 {
				want = 7
			}
			if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != want {
				c.bad("after a stop with %d s: %v, exit code %d (%s), want %d", grace, s.State, s.ExitCode, s.Message, want)
			}
		}
		return err
	})
}

// says waits for a line of the log: before that a shell may not have set its traps.
func (c *container) says(path, line string) {
	for deadline := time.Now().Add(exitTime); !c.excuse(); time.Sleep(50 * time.Millisecond) {
		data, err := os.ReadFile(path)
		switch {
		case err == nil && strings.Contains(string(data), line):
			return
		case time.Now().After(deadline):
			c.bad("no %q in its log after %v: %q, %v", line, exitTime, data, err)
			return
		}
	}
}

// output checks that what a container wrote before its end has arrived.
func (c *container) output(path, word, kind string) {
	data, err := os.ReadFile(path)
	want := "out " + word
	if kind == "reader" {
		want = fmt.Sprint(20 * 200 << 10)
	}
	if !c.excuse() && kind != "stays" && kind != "deaf" && (err != nil || !strings.Contains(string(data), want)) {
		c.bad("the log of a %s: %q, %v; want %q", kind, data, err, want)
	}
}
