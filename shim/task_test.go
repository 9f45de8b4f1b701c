// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/protocols/taskpb"
	"github.com/kata-v2/kata/sandbox/agentclient/agenttest"
)

// jsonAny is a specification as containerd's clients pass it.
func jsonAny(t *testing.T, v any) *anypb.Any {
	t.Helper()
	data, err := json.Marshal(v)
	must(t, err)
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: data}
}

func (p *pod) exec(id, exec string, paths stdioPaths, args ...string) {
	p.t.Helper()
	_, err := p.tasks().Exec(bounded(p.t), &task.ExecProcessRequest{
		ID: id, ExecID: exec, Spec: jsonAny(p.t, specs.Process{Args: args, Cwd: "/"}),
		Stdin: paths.stdin, Stdout: paths.stdout, Stderr: paths.stderr, Terminal: paths.terminal,
	})
	must(p.t, err)
}

// topics reads n events and returns their topics, with the exec's id or the exit status.
func (p *pod) topics(n int) (out []string) {
	p.t.Helper()
	for range n {
		e := p.containerd.next()
		if e.Namespace != "ns" || e.Timestamp == nil {
			p.t.Errorf("envelope %v", e)
		}
		out = append(out, e.Topic)
	}
	return out
}

func (p *pod) noMoreEvents() {
	p.t.Helper()
	select {
	case e := <-p.containerd.got:
		p.t.Errorf("another event: %v", e)
	case <-time.After(50 * time.Millisecond): // that nothing comes shows in time only
	}
}

func (p *pod) state(id, exec string) *task.StateResponse {
	p.t.Helper()
	r, err := p.tasks().State(bounded(p.t), &task.StateRequest{ID: id, ExecID: exec})
	must(p.t, err)
	return r
}

func TestLifeOfATask(t *testing.T) {
	p := newPod(t)
	paths := fifos(t)
	bundle := p.bundle("c1", "cat")
	c, err := p.tasks().Create(bounded(t), &task.CreateTaskRequest{
		ID: "c1", Bundle: bundle, Stdin: paths.stdin, Stdout: paths.stdout, Stderr: paths.stderr,
	})
	must(t, err)
	if err := syscall.Kill(int(c.Pid), 0); err != nil {
		t.Errorf("the task's pid %d: %v", c.Pid, err)
	}
	s := p.state("c1", "")
	if s.Status != tasktypes.Status_CREATED || s.Bundle != bundle || s.Pid != c.Pid || s.Stdin != paths.stdin || s.Stdout != paths.stdout || !s.ExitedAt.AsTime().IsZero() {
		t.Errorf("state %v", s)
	}
	p.start("c1", "")
	if s := p.state("c1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("state %v", s)
	}
	r, err := p.tasks().Connect(bounded(t), &task.ConnectRequest{ID: "c1"})
	must(t, err)
	if r.TaskPid != c.Pid || r.ShimPid != uint32(os.Getpid()) {
		t.Errorf("connect %v", r)
	}
	in, out := client(t, paths.stdin, os.O_WRONLY), client(t, paths.stdout, os.O_RDONLY)
	_, err = in.WriteString("hello")
	must(t, err)
	in.Close()
	_, err = p.tasks().CloseIO(bounded(t), &task.CloseIORequest{ID: "c1", Stdin: true})
	must(t, err)
	if w := p.wait("c1", ""); w.ExitStatus != 0 || w.ExitedAt == nil {
		t.Errorf("wait %v", w)
	}
	if s := p.state("c1", ""); s.Status != tasktypes.Status_STOPPED || s.ExitedAt == nil {
		t.Errorf("state %v", s)
	}
	if d := p.delete("c1", ""); d.Pid != c.Pid || d.ExitStatus != 0 || d.ExitedAt == nil {
		t.Errorf("delete %v", d)
	}
	if got := readN(t, out, 5); got != "hello" { // Delete has returned, and all is in the pipe
		t.Errorf("stdout %q", got)
	}
	if got, want := p.topics(4), []string{topicCreate, topicStart, topicExit, topicDelete}; !slices.Equal(got, want) {
		t.Errorf("events %q", got)
	}
	_, err = p.tasks().Shutdown(bounded(t), &task.ShutdownRequest{ID: "c1"})
	must(t, err)
	select {
	case <-p.svc.done:
	default:
		t.Error("Shutdown of an empty pod does not end it")
	}
	p.noMoreEvents()
}

// A process that exits at once: its events come in the order containerd insists on.
func TestEventsOfShortLives(t *testing.T) {
	p := newPod(t)
	p.create("base", "sleep")
	p.start("base", "")
	p.topics(2)
	for i := range 20 {
		id := "c" + string(rune('a'+i))
		p.create(id, "exit", "7")
		p.start(id, "")
		if w := p.wait(id, ""); w.ExitStatus != 7 {
			t.Errorf("exit %v", w)
		}
		if d := p.delete(id, ""); d.ExitStatus != 7 {
			t.Errorf("delete %v", d)
		}
		if got, want := p.topics(4), []string{topicCreate, topicStart, topicExit, topicDelete}; !slices.Equal(got, want) {
			t.Fatalf("events %q", got)
		}
		p.exec("base", "e1", stdioPaths{}, "exit", "3")
		p.start("base", "e1")
		if w := p.wait("base", "e1"); w.ExitStatus != 3 {
			t.Errorf("exit %v", w)
		}
		p.delete("base", "e1")
		if got, want := p.topics(3), []string{topicExecAdded, topicExecStarted, topicExit}; !slices.Equal(got, want) {
			t.Fatalf("events %q", got)
		}
	}
}

func TestExitEventSaysWho(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	p.start("c1", "")
	p.exec("c1", "e1", stdioPaths{}, "exit", "3")
	p.start("c1", "e1")
	p.wait("c1", "e1")
	_, err := p.tasks().Kill(bounded(t), &task.KillRequest{ID: "c1", Signal: 15})
	must(t, err)
	p.wait("c1", "")
	got := map[string]uint32{}
	for range 6 {
		e := p.containerd.next()
		if e.Topic != topicExit {
			continue
		}
		v, err := typeurl.UnmarshalAny(e.Event)
		must(t, err)
		x := v.(*events.TaskExit)
		if x.ContainerID != "c1" || x.Pid == 0 || x.ExitedAt == nil {
			t.Errorf("exit event %v", x)
		}
		got[x.ID] = x.ExitStatus
	}
	if len(got) != 2 || got["e1"] != 3 || got["c1"] != 143 {
		t.Errorf("exit events %v", got)
	}
}

// TestExecsEndFirst: execs end with their container, and are told before it.
func TestExecsEndFirst(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	p.start("c1", "")
	const execs = 20
	for i := range execs {
		id := "e" + strconv.Itoa(i)
		p.exec("c1", id, stdioPaths{}, "sleep")
		p.start("c1", id)
	}
	p.topics(2 + 2*execs)
	_, err := p.tasks().Kill(bounded(t), &task.KillRequest{ID: "c1", Signal: 15})
	must(t, err)
	for i := range execs + 1 {
		v, err := typeurl.UnmarshalAny(p.containerd.next().Event)
		must(t, err)
		if x := v.(*events.TaskExit); (x.ID == "c1") != (i == execs) {
			t.Errorf("exit %d is that of %s", i, x.ID)
		}
	}
}

// A task that was killed between Create and Start has an exit event and no start event.
func TestKilledBeforeStart(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	_, err := p.tasks().Kill(bounded(t), &task.KillRequest{ID: "c1", Signal: 9})
	must(t, err)
	if w := p.wait("c1", ""); w.ExitStatus != 137 {
		t.Errorf("wait %v", w)
	}
	_, err = p.tasks().Start(bounded(t), &task.StartRequest{ID: "c1"})
	if err == nil {
		t.Error("it started")
	}
	p.delete("c1", "")
	if got, want := p.topics(3), []string{topicCreate, topicExit, topicDelete}; !slices.Equal(got, want) {
		t.Errorf("events %q", got)
	}
}

// An exec's stdin may be closed before the exec starts.
func TestCloseIOBeforeStart(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	p.start("c1", "")
	paths := fifos(t)
	p.exec("c1", "e1", paths, "cat")
	_, err := p.tasks().CloseIO(bounded(t), &task.CloseIORequest{ID: "c1", ExecID: "e1", Stdin: true})
	must(t, err)
	p.start("c1", "e1")
	if w := p.wait("c1", "e1"); w.ExitStatus != 0 {
		t.Errorf("wait %v", w)
	}
	p.delete("c1", "e1")
}

// All output of a process that has ended is in the pipe when Delete returns,
// although the client reads late.
func TestOutputBeforeDelete(t *testing.T) {
	p := newPod(t)
	const total = 40_000 // less than a pipe holds
	p.agent.Programs["print"] = func(x *agenttest.Process) int32 {
		_, _ = x.Stdout.Write([]byte(strings.Repeat("p", total)))
		return 0
	}
	paths := fifos(t)
	_, err := p.tasks().Create(bounded(t), &task.CreateTaskRequest{ID: "c1", Bundle: p.bundle("c1", "print"), Stdout: paths.stdout})
	must(t, err)
	out := client(t, paths.stdout, os.O_RDONLY|syscall.O_NONBLOCK)
	p.start("c1", "")
	p.wait("c1", "")
	p.delete("c1", "")
	if got := readN(t, out, total); got != strings.Repeat("p", total) {
		t.Errorf("%d bytes", len(got))
	}
}

// The exit event does not wait for output that a grandchild holds open.
func TestHeldOutputDelaysNoExit(t *testing.T) {
	p := newPod(t)
	p.agent.Programs["daemonize"] = func(x *agenttest.Process) int32 { x.KeepOutput(); return 0 }
	paths := fifos(t)
	_, err := p.tasks().Create(bounded(t), &task.CreateTaskRequest{ID: "c1", Bundle: p.bundle("c1", "daemonize"), Stdout: paths.stdout})
	must(t, err)
	begin := time.Now()
	p.start("c1", "")
	p.wait("c1", "")
	if got := p.topics(3); got[2] != topicExit {
		t.Errorf("events %q", got)
	}
	if d := time.Since(begin); d > time.Second {
		t.Errorf("the exit took %v", d)
	}
}

// The machine's end ends every task with 137, in order.
func TestMachineEndsTasks(t *testing.T) {
	p := newPod(t)
	r := p.create("c1", "sleep")
	p.start("c1", "")
	must(t, syscall.Kill(int(r.Pid), syscall.SIGKILL))
	if w := p.wait("c1", ""); w.ExitStatus != 137 {
		t.Errorf("wait %v", w)
	}
	if d := p.delete("c1", ""); d.ExitStatus != 137 {
		t.Errorf("delete %v", d)
	}
	if got, want := p.topics(4), []string{topicCreate, topicStart, topicExit, topicDelete}; !slices.Equal(got, want) {
		t.Errorf("events %q", got)
	}
}

func TestShutdownLeavesABusyPod(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	_, err := p.tasks().Shutdown(bounded(t), &task.ShutdownRequest{ID: "c1"})
	must(t, err)
	select {
	case <-p.svc.done:
		t.Fatal("the pod ended under its container")
	default:
	}
	_, err = p.tasks().Shutdown(bounded(t), &task.ShutdownRequest{ID: "c1", Now: true})
	must(t, err)
	<-p.svc.done
}

// A failing Create leaves no task, and what it opened is closed.
func TestCreateWithAMissingPipe(t *testing.T) {
	p := newPod(t)
	_, err := p.tasks().Create(bounded(t), &task.CreateTaskRequest{ID: "c1", Bundle: p.bundle("c1", "sleep"), Stdout: "/nonexistent/out"})
	if err == nil || !strings.Contains(err.Error(), "stdout") {
		t.Errorf("%v", err)
	}
	if got := p.agent.Containers(); len(got) > 0 {
		t.Errorf("the guest holds %q", got)
	}
	p.create("c1", "sleep")
	if got := p.topics(1); got[0] != topicCreate {
		t.Errorf("events %q", got)
	}
}

// Pids needs no guest: it lists what the shim has started, and never nothing.
func TestPidsNeedNoGuest(t *testing.T) {
	p := newPod(t)
	c := p.create("c1", "sleep")
	p.start("c1", "")
	p.exec("c1", "e1", stdioPaths{}, "sleep")
	p.exec("c1", "e2", stdioPaths{}, "sleep")
	p.start("c1", "e2")
	list := func() (out []string) {
		t.Helper()
		r, err := p.tasks().Pids(bounded(t), &task.PidsRequest{ID: "c1"})
		must(t, err)
		for _, x := range r.Processes {
			exec := ""
			if x.Info != nil {
				v, err := typeurl.UnmarshalAny(x.Info)
				must(t, err)
				exec = " " + v.(*options.ProcessDetails).ExecID
			}
			out = append(out, fmt.Sprint(x.Pid)+exec)
		}
		return out
	}
	// What goes on beside: the wait for each process, and the clock.
	asked := func() []string {
		return slices.DeleteFunc(p.agent.Calls(), func(s string) bool {
			return strings.HasPrefix(s, "WaitProcess") || s == "SetGuestDateTime"
		})
	}
	before := len(asked())
	if got, want := list(), []string{"11", "12 e2"}; !slices.Equal(got, want) { // e1 has not started
		t.Errorf("processes %q; want %q", got, want)
	}
	p.state("c1", "")
	_, err := p.tasks().Connect(bounded(t), &task.ConnectRequest{ID: "c1"})
	must(t, err)
	if after := asked(); len(after) != before {
		t.Errorf("the guest was asked: %q", after[before:])
	}
	must(t, syscall.Kill(int(c.Pid), syscall.SIGKILL))
	p.wait("c1", "")
	p.wait("c1", "e2")
	if got, want := list(), []string{"11"}; !slices.Equal(got, want) {
		t.Errorf("processes of an ended task %q; want %q", got, want)
	}
}

func TestPauseEvents(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	p.start("c1", "")
	_, err := p.tasks().Pause(bounded(t), &task.PauseRequest{ID: "c1"})
	must(t, err)
	if s := p.state("c1", ""); s.Status != tasktypes.Status_PAUSED {
		t.Errorf("state %v", s)
	}
	_, err = p.tasks().Resume(bounded(t), &task.ResumeRequest{ID: "c1"})
	must(t, err)
	if got, want := p.topics(4), []string{topicCreate, topicStart, topicPaused, topicResumed}; !slices.Equal(got, want) {
		t.Errorf("events %q", got)
	}
}

// Wait ends with its caller's patience and leaves the task alone.
func TestWaitIsBoundedByItsCaller(t *testing.T) {
	p := newPod(t)
	p.create("c1", "sleep")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := p.tasks().Wait(ctx, &task.WaitRequest{ID: "c1"}); err == nil {
		t.Error("Wait has returned")
	}
	if s := p.state("c1", ""); s.Status != tasktypes.Status_CREATED {
		t.Errorf("state %v", s)
	}
}

// A daemon without a container that lost its containerd ends; one that was told
// of an error stays for containerd to end it.
func TestAbandonedCreate(t *testing.T) {
	p := newPod(t)
	ctx, cancel := context.WithCancel(bounded(t))
	if _, err := p.svc.Create(ctx, &taskpb.CreateRequest{Id: "c1", Bundle: t.TempDir()}); err == nil {
		t.Fatal("a bundle without a specification is accepted")
	}
	select {
	case <-p.svc.done:
		t.Fatal("the daemon ends after an ordinary error")
	default:
	}
	cancel()
	if _, err := p.svc.Create(ctx, &taskpb.CreateRequest{Id: "c1", Bundle: p.bundle("c1", "sleep")}); err == nil {
		t.Fatal("Create succeeds for nobody")
	}
	select {
	case <-p.svc.done:
	case <-bounded(t).Done():
		t.Error("the daemon does not end")
	}
}
