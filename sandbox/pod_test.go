// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
	"github.com/kata-v2/kata/sandbox/storage"
)

func TestLifeOfAContainer(t *testing.T) {
	p := newPod(t)
	if p.PID() != 0 || p.State() != Created || !p.Empty() {
		t.Errorf("a new sandbox: pid %d, %v", p.PID(), p.State())
	}
	c := p.create("c1", "echo", "hello")
	if s := c.Init().State(); s != Created || p.State() != Running || p.Empty() {
		t.Errorf("after create: container %v, sandbox %v", s, p.State())
	}
	if err := syscall.Kill(p.PID(), 0); err != nil {
		t.Errorf("the pod's process %d: %v", p.PID(), err)
	}
	must(t, c.Start(bounded(t)))
	if e := exit(t, c.Init()); e.Status != 0 || e.At.IsZero() {
		t.Errorf("exit %+v", e)
	}
	// Output that was written before the exit is there after it.
	if got := output(t, c.Init().Stdio().Stdout); got != "hello\n" {
		t.Errorf("stdout %q", got)
	}
	if got := output(t, c.Init().Stdio().Stderr); got != "" {
		t.Errorf("stderr %q", got)
	}
	must(t, c.Delete(bounded(t)))
	_, err := p.Container("c1")
	is(t, "deleted container", err, errdefs.IsNotFound)
	if !p.Empty() {
		t.Error("the sandbox is not empty after the last delete")
	}
	must(t, p.Stop(bounded(t)))
	calls := slices.DeleteFunc(p.agent.Calls(), func(s string) bool { return s == "SetGuestDateTime" || s == "WaitProcess c1" })
	if want := []string{"CreateSandbox", "CreateContainer c1", "StartContainer c1", "DestroySandbox"}; !slices.Equal(calls, want) {
		t.Errorf("calls %q; want %q", calls, want)
	}
}

func TestStdinAndItsEnd(t *testing.T) {
	p := newPod(t)
	c := p.start("c1", "cat")
	io := c.Init().Stdio()
	_, err := io.Stdin.Write([]byte("through"))
	must(t, err)
	must(t, io.Stdin.Close())
	if got := output(t, io.Stdout); got != "through" {
		t.Errorf("stdout %q", got)
	}
	if e := exit(t, c.Init()); e.Status != 0 {
		t.Errorf("exit %+v", e)
	}
}

// Every operation in every state of a container: nil is success.
func TestStates(t *testing.T) {
	type kind = func(error) bool
	precondition, missing := errdefs.IsFailedPrecondition, errdefs.IsNotFound
	ctx := context.Background()
	ops := map[string]func(*Container) error{
		"start":  func(c *Container) error { return c.Start(ctx) },
		"exec":   func(c *Container) error { _, err := c.Exec("e", process("true"), agentclient.StdioWants{}); return err },
		"pause":  func(c *Container) error { return c.Pause(ctx) },
		"resume": func(c *Container) error { return c.Resume(ctx) },
		"signal": func(c *Container) error { return c.Init().Signal(ctx, 15, false) },
		"resize": func(c *Container) error { return c.Init().Resize(ctx, 80, 25) }, // it has no terminal
		"update": func(c *Container) error { return c.Update(ctx, &specs.LinuxResources{}) },
		"stats":  func(c *Container) error { _, err := c.Stats(ctx); return err },
		"delete": func(c *Container) error { return c.Delete(ctx) },
	}
	p := newPod(t)
	for state, want := range map[string]map[string]kind{
		"created": {"start": nil, "exec": nil, "pause": precondition, "resume": precondition, "signal": nil,
			"resize": precondition, "update": nil, "stats": nil, "delete": nil},
		"running": {"start": precondition, "exec": nil, "pause": nil, "resume": precondition, "signal": nil,
			"resize": precondition, "update": nil, "stats": nil, "delete": precondition},
		"paused": {"start": precondition, "exec": precondition, "pause": precondition, "resume": nil, "signal": nil,
			"resize": precondition, "update": nil, "stats": nil, "delete": precondition},
		"stopped": {"start": precondition, "exec": precondition, "pause": precondition, "resume": precondition, "signal": missing,
			"resize": precondition, "update": precondition, "stats": nil, "delete": nil},
	} {
		for name, op := range ops {
			c := p.create(state+"-"+name, "sleep")
			if state != "created" {
				must(t, c.Start(ctx))
			}
			switch state {
			case "paused":
				must(t, c.Pause(ctx))
			case "stopped":
				must(t, c.Init().Signal(ctx, 9, false))
				exit(t, c.Init())
			}
			if got := c.Init().State().String(); got != state {
				t.Fatalf("state %s; want %s", got, state)
			}
			is(t, name+" when "+state, op(c), want[name])
		}
	}
}

func TestPauseAndResume(t *testing.T) {
	p := newPod(t)
	c := p.start("c1", "sleep")
	must(t, c.Pause(bounded(t)))
	if s := c.Init().State(); s != Paused {
		t.Errorf("state %v", s)
	}
	must(t, c.Resume(bounded(t)))
	if s := c.Init().State(); s != Running {
		t.Errorf("state %v", s)
	}
	must(t, c.Pause(bounded(t)))
	must(t, c.Init().Signal(bounded(t), 9, true)) // a paused container can be killed
	if e := exit(t, c.Init()); e.Status != 137 || c.Init().State() != Stopped {
		t.Errorf("%+v, %v", e, c.Init().State())
	}
}

// A guest that refuses to freeze leaves the state as it was.
func TestPauseRefusedByTheGuest(t *testing.T) {
	p := newPod(t, func(p *pod) {
		p.agent.Before = func(_ context.Context, call string) error {
			if call == "PauseContainer" {
				return errTest
			}
			return nil
		}
	})
	c := p.start("c1", "sleep")
	if err := c.Pause(bounded(t)); err == nil || !strings.Contains(err.Error(), errTest.Error()) {
		t.Errorf("%v", err)
	}
	if s := c.Init().State(); s != Running {
		t.Errorf("state %v", s)
	}
}

func TestSignals(t *testing.T) {
	p := newPod(t)
	ctx := bounded(t)
	for signal, status := range map[uint32]uint32{15: 143, 2: 130, 9: 137} {
		c := p.start("c", "sleep")
		must(t, c.Init().Signal(ctx, signal, false))
		if e := exit(t, c.Init()); e.Status != status {
			t.Errorf("signal %d: exit %d, want %d", signal, e.Status, status)
		}
		if got := p.agent.Request("SignalProcess").(*agentpb.SignalProcessRequest); got.Signal != signal || got.ExecId != "c" {
			t.Errorf("the guest was told %v", got)
		}
		must(t, c.Delete(ctx))
	}
	c := p.start("c", "sleep")
	must(t, c.Init().Signal(ctx, 9, true))
	if got := p.agent.Request("SignalProcess").(*agentpb.SignalProcessRequest); got.ExecId != "" {
		t.Errorf("a signal to all names exec %q", got.ExecId)
	}
	exit(t, c.Init())
	// Killed between create and start: it ends too.
	d := p.create("d", "sleep")
	must(t, d.Init().Signal(ctx, 9, false))
	if e := exit(t, d.Init()); e.Status != 137 {
		t.Errorf("exit %+v", e)
	}
	is(t, "start after kill", d.Start(ctx), errdefs.IsFailedPrecondition)
	must(t, d.Delete(ctx))
}

func TestExec(t *testing.T) {
	p := newPod(t)
	ctx := bounded(t)
	c := p.start("c1", "sleep")
	e := p.exec(c, "e1", "cat")
	is(t, "signal before start", e.Signal(ctx, 15, false), errdefs.IsFailedPrecondition)
	_, err := c.Exec("e1", process("true"), agentclient.StdioWants{})
	is(t, "id in use", err, errdefs.IsAlreadyExists)
	_, err = c.Exec("c1", process("true"), agentclient.StdioWants{})
	is(t, "the container's own id", err, errdefs.IsAlreadyExists)
	_, err = c.Process("e2")
	is(t, "unknown exec", err, errdefs.IsNotFound)

	must(t, c.StartExec(ctx, e))
	is(t, "second start", c.StartExec(ctx, e), errdefs.IsFailedPrecondition)
	is(t, "delete while running", c.DeleteExec(e), errdefs.IsFailedPrecondition)
	_, err = e.Stdio().Stdin.Write([]byte("x"))
	must(t, err)
	must(t, e.Stdio().Stdin.Close())
	if got := output(t, e.Stdio().Stdout); got != "x" {
		t.Errorf("stdout %q", got)
	}
	if x := exit(t, e); x.Status != 0 {
		t.Errorf("exit %+v", x)
	}
	is(t, "signal after the end", e.Signal(ctx, 15, false), errdefs.IsNotFound)
	is(t, "start after the end", c.StartExec(ctx, e), errdefs.IsFailedPrecondition)
	must(t, c.DeleteExec(e))
	is(t, "second delete", c.DeleteExec(e), errdefs.IsFailedPrecondition)

	e = p.exec(c, "e1", "exit", "42") // the id is free again
	must(t, c.StartExec(ctx, e))
	if x := exit(t, e); x.Status != 42 {
		t.Errorf("exit %+v", x)
	}
	never := p.exec(c, "e3", "true")
	must(t, c.DeleteExec(never)) // one that never started
	if s := c.Init().State(); s != Running {
		t.Errorf("the container is %v after its execs", s)
	}
}

func TestExecThatCannotRun(t *testing.T) {
	p := newPod(t)
	c := p.start("c1", "sleep")
	e := p.exec(c, "e1", "no-such-program")
	if err := c.StartExec(bounded(t), e); err == nil || !strings.Contains(err.Error(), "executable file not found") {
		t.Errorf("%v", err)
	}
	if x := exit(t, e); x.Status != 255 {
		t.Errorf("exit %+v", x)
	}
	must(t, c.DeleteExec(e))
}

func TestResize(t *testing.T) {
	p := newPod(t)
	c := p.start("c1", "sleep")
	spec := process("sleep")
	spec.Terminal = true
	e, err := c.Exec("e1", spec, agentclient.StdioWants{Stdin: true, Stdout: true, Stderr: true})
	must(t, err)
	must(t, e.Resize(bounded(t), 100, 40)) // before start: the terminal begins with it
	must(t, c.StartExec(bounded(t), e))
	r := p.agent.Request("ExecProcess").(*agentpb.ExecProcessRequest)
	if b := r.Process.ConsoleSize; b.GetWidth() != 100 || b.GetHeight() != 40 || r.StderrPort != 0 || r.StdinPort == 0 || r.StdoutPort == 0 {
		t.Errorf("exec request %v", r)
	}
	must(t, e.Resize(bounded(t), 80, 25))
	if w := p.agent.Request("TtyWinResize").(*agentpb.TtyWinResizeRequest); w.Row != 25 || w.Column != 80 || w.ExecId != "e1" {
		t.Errorf("resize request %v", w)
	}
}

func TestGuestPIDsAndStats(t *testing.T) {
	p := newPod(t)
	c := p.start("c1", "sleep")
	e := p.exec(c, "e1", "sleep")
	if pid := e.GuestPID(); pid != 0 {
		t.Errorf("an exec that has not started is process %d", pid)
	}
	must(t, c.StartExec(bounded(t), e))
	if a, b := c.Init().GuestPID(), e.GuestPID(); a == 0 || b == 0 || a == b {
		t.Errorf("processes %d and %d", a, b)
	}
	s, err := c.Stats(bounded(t))
	must(t, err)
	if s.CgroupStats.PidsStats.Current != 3 {
		t.Errorf("stats %v", s)
	}
}

// What leaves little in the guest is left to the machine's end, or to the next container.
func TestDeferredRemoval(t *testing.T) {
	p := newPod(t)
	ctx := bounded(t)
	a, b := p.start("a", "exit", "3"), p.start("b", "true")
	exit(t, a.Init())
	exit(t, b.Init())
	must(t, a.Delete(ctx))
	must(t, b.Delete(ctx))
	if got := p.agent.Containers(); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("the guest holds %q", got)
	}
	b = p.start("b", "exit", "5") // the same id
	if e := exit(t, b.Init()); e.Status != 5 {
		t.Errorf("exit %+v", e)
	}
	calls := p.agent.Calls()
	if i, j := slices.Index(calls, "RemoveContainer b"), len(calls)-1-slices.Index(reversed(calls), "CreateContainer b"); i < 0 || i > j {
		t.Errorf("the former b was not removed before the new one: %q", calls)
	}
	if got := p.agent.Containers(); !slices.Equal(got, []string{"b"}) {
		t.Errorf("the guest holds %q", got)
	}
	must(t, b.Delete(ctx))
}

// One whose end the guest has hooks for is removed when it is deleted.
func TestRemovalNotDeferred(t *testing.T) {
	p := newPod(t, func(p *pod) { p.config.QEMU.GuestHookPath = "/hooks" })
	a, b := p.start("a", "true"), p.start("b", "true")
	exit(t, a.Init())
	exit(t, b.Init())
	must(t, a.Delete(bounded(t)))
	if got := p.agent.Containers(); !slices.Equal(got, []string{"b"}) {
		t.Errorf("the guest holds %q", got)
	}
	must(t, b.Delete(bounded(t))) // the last one
	if got := p.agent.Containers(); !slices.Equal(got, []string{"b"}) {
		t.Errorf("the guest holds %q", got)
	}
}

func reversed(s []string) []string {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}

func TestContainerIDs(t *testing.T) {
	p := newPod(t)
	p.create("c1", "true")
	_, err := p.CreateContainer(bounded(t), p.container("c1", "true"))
	is(t, "id in use", err, errdefs.IsAlreadyExists)
	_, err = p.Container("c2")
	is(t, "unknown id", err, errdefs.IsNotFound)
	if c, err := p.Container("c1"); err != nil || c.ID() != "c1" {
		t.Errorf("%v, %v", c, err)
	}
}

// What of a container cannot be made leaves nothing, and its id is free again.
func TestCreateFailures(t *testing.T) {
	p := newPod(t)
	p.create("first", "true")
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, []byte("x"), 0o644))
	bound := specs.Mount{Type: "bind", Source: file, Destination: "/f"}
	for name, c := range map[string]struct {
		change func(*ContainerConfig)
		kind   func(error) bool
		want   string
	}{
		"spec":    {func(c *ContainerConfig) { c.Spec.Linux = nil }, errdefs.IsInvalidArgument, "linux"},
		"program": {func(c *ContainerConfig) { c.Spec.Process.Args = []string{"nope"} }, nil, "executable file not found"},
		"mount": {func(c *ContainerConfig) {
			c.Spec.Mounts = []specs.Mount{bound, {Type: "bind", Source: "/nonexistent", Destination: "/d"}}
		},
			errdefs.IsInvalidArgument, "mounts[1] (/d)"},
		"rootfs": {func(c *ContainerConfig) { c.Rootfs = []storage.Mount{{Type: "nosuchfs"}} }, nil, "nosuchfs"},
		"hook": {func(c *ContainerConfig) {
			c.Spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}}
		}, nil, "hooks.createRuntime[0]"},
	} {
		t.Run(name, func(t *testing.T) {
			cc := p.container("c", "true")
			cc.Spec.Mounts = []specs.Mount{bound}
			c.change(&cc)
			_, err := p.CreateContainer(bounded(t), cc)
			if err == nil || !strings.Contains(err.Error(), c.want) || (c.kind != nil && !c.kind(err)) {
				t.Errorf("%v; want %q", err, c.want)
			}
			if left, _ := filepath.Glob(filepath.Join(p.state, "key", "shared", "c*")); len(left) > 0 {
				t.Errorf("left in the share: %v", left)
			}
			if slices.Contains(p.agent.Containers(), "c") {
				t.Error("left in the guest")
			}
		})
	}
	cc := p.container("c", "true")
	cc.Spec.Mounts = []specs.Mount{bound}
	c, err := p.CreateContainer(bounded(t), cc)
	must(t, err)
	must(t, c.Delete(bounded(t)))
}
