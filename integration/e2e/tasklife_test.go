// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// TestTaskLife takes one task through every event that there is, in order:
// with an exec before its start, new limits, a pause and an out-of-memory kill.
func TestTaskLife(t *testing.T) {
	b := newBox(t)
	seen, address := serveEvents(t)
	ctx, id := calls(t), "life"
	s, bundle := b.startByHand(id, newSpec(t, "sleep", "100000"), address)
	var topics []string
	next := func(want ...string) {
		t.Helper()
		for _, w := range want {
			got := receive(t, "event after "+strings.Join(topics, ", "), seen.got)
			topics = append(topics, filepath.Base(got))
			if got != "/tasks/"+w {
				t.Errorf("events %v; want %s here", topics, w)
			}
		}
	}
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.Create(ctx, &task.CreateTaskRequest{ID: id, Bundle: bundle}))
	next("create")
	if got := s.output(ctx, id, "echo early"); got != "early\n" {
		t.Errorf("an exec before the start says %q", got)
	}
	next("exec-added", "exec-started", "exit")
	must(s.Start(ctx, &task.StartRequest{ID: id}))
	next("start")

	limits, err := json.Marshal(specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(48 << 20))}, Pids: &specs.LinuxPids{Limit: ptr(int64(30))},
		CPU: &specs.LinuxCPU{Quota: ptr(int64(80000)), Period: ptr(uint64(100000))},
	})
	must(nil, err)
	must(s.Update(ctx, &task.UpdateTaskRequest{ID: id, Resources: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: limits}}))
	got := strings.Fields(s.output(ctx, id, "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max"))
	if want := []string{"50331648", "30", "80000", "100000"}; !slices.Equal(got, want) {
		t.Errorf("limits after Update %q; want %q", got, want)
	}
	next("exec-added", "exec-started", "exit")

	must(s.Pause(ctx, &task.PauseRequest{ID: id}))
	next("paused")
	must(s.Resume(ctx, &task.ResumeRequest{ID: id}))
	next("resumed")

	x := s.exec(ctx, id, process("tail", "-c", "100000000", "/dev/zero"), pipes{})
	must(s.Start(ctx, &task.StartRequest{ID: id, ExecID: x}))
	next("exec-added", "exec-started")
	w, err := s.Wait(ctx, &task.WaitRequest{ID: id, ExecID: x})
	if err != nil || w.ExitStatus != 137 {
		t.Errorf("a process beyond the limit: %v, %v; want status 137", w, err)
	}
	// The kill and the exit that follows it are told by two ways.
	last := []string{receive(t, "event", seen.got), receive(t, "event", seen.got)}
	if slices.Sort(last); !slices.Equal(last, []string{"/tasks/exit", "/tasks/oom"}) {
		t.Errorf("events %q; want exit and oom", last)
	}
	must(s.Kill(ctx, &task.KillRequest{ID: id, Signal: 9}))
	next("exit")
	must(s.Delete(ctx, &task.DeleteRequest{ID: id}))
	next("delete")
	b.endByHand(ctx, s, id)
}

// output is what a shell script in a task prints.
func (s *shimClient) output(ctx context.Context, id, script string) string {
	s.Helper()
	io := newPipes(s.T)
	out := collect(s.T, io.stdout)
	x := s.exec(ctx, id, process("sh", "-c", script), pipes{stdout: io.stdout})
	if _, err := s.Start(ctx, &task.StartRequest{ID: id, ExecID: x}); err != nil {
		s.Fatal(err)
	}
	out.started()
	if w, err := s.Wait(ctx, &task.WaitRequest{ID: id, ExecID: x}); err != nil || w.ExitStatus != 0 {
		s.Errorf("%s: %v, %v", script, w, err)
	}
	if _, err := s.Delete(ctx, &task.DeleteRequest{ID: id, ExecID: x}); err != nil {
		s.Error(err)
	}
	return string(receive(s.T, "output", out.data))
}
