// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRestart: containerd is killed and started while a pod runs. The pod and its
// containers are the same afterwards, logs go on, an exit that happened meanwhile
// is known with its code, and the pod takes execs and containers again.
func TestRestart(t *testing.T) { each(t, testRestart, pauseMode, oldMode) }

func testRestart(b *box) {
	p := b.run()
	dir := b.TempDir()
	mounted := func(text string) *runtimeapi.ContainerConfig {
		config := p.script(text)
		config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/d", HostPath: dir}}
		return config
	}
	stays := p.start(mounted("echo up; until [ -e /d/more ]; do sleep 0.1; done; echo more; exec sleep 1000"))
	ends := p.start(mounted("until [ -e /d/end ]; do sleep 0.1; done; echo over; exit 3"))
	stays.awaitLog("up\n")
	boot := stays.shell("cat /proc/sys/kernel/random/boot_id")
	shim := p.taskClient()

	b.ok(b.c.Kill())
	b.touch(dir, "end")
	// The shim of an old containerd speaks version 2 as well: the messages are the same.
	if r := must(shim.Wait(b.ctx(), &task.WaitRequest{ID: ends.id}))(b); r.ExitStatus != 3 {
		b.Errorf("exit status %d while containerd is down", r.ExitStatus)
	}
	b.ok(b.c.Restart(b.ctx()))
	b.reconnect()

	if got := p.state(); got != runtimeapi.PodSandboxState_SANDBOX_READY {
		b.Errorf("the pod is %v", got)
	}
	if s := ends.wait(); s.ExitCode != 3 {
		b.Errorf("ended meanwhile: %v", s)
	}
	// What it wrote last waits in its pipe (the shim's TestLastWords), but containerd
	// does not read it for certain: it cancels the opening of the pipe before it deletes.
	b.touch(dir, "more")
	stays.awaitLog("more\n")
	if got := stays.shell("cat /proc/sys/kernel/random/boot_id"); got != boot {
		b.Error("the machine is another one")
	}
	if got := p.output(p.script("echo new")); got != "new\n" {
		b.Errorf("a new container writes %q", got)
	}
	stays.stop(0)
	if s := stays.status(); s.ExitCode != 137 {
		b.Errorf("exit code %d", s.ExitCode)
	}
}

// touch makes a file.
func (b *box) touch(dir, name string) {
	b.Helper()
	b.ok(os.WriteFile(filepath.Join(dir, name), nil, 0o644))
}

// reconnect makes a new connection to the CRI, once that has read what the one
// before it left, which it does beside announcing that it serves.
func (b *box) reconnect() {
	b.Helper()
	b.ok(b.runtime.Close(b.ctx()))
	ctx := b.ctx()
	for {
		err := b.dial(ctx)
		if err == nil {
			_, err = b.runtime.ListPodSandbox(ctx, nil)
		}
		if err == nil {
			return
		}
		if !strings.Contains(err.Error(), "not initialized") {
			b.Fatal(err)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			b.Fatal(err)
		}
	}
}
