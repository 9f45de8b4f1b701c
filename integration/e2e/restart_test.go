// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
)

// TestContainerdRestart: a pod lives on without containerd, however that ended.
// The new one finds its tasks and can exec; output goes on; exits that happened
// meanwhile arrive with status, time and events; a start that was under way
// leaves nothing.
func TestContainerdRestart(t *testing.T) {
	for _, version := range []string{"2.4", "1.6"} {
		for _, how := range []string{"killed", "ended"} {
			t.Run(version+"/"+how, func(t *testing.T) {
				o := labOptions(t)
				o.Version, o.LogLevel = version, "trace"
				testRestart(newOwnBox(t, o), how == "killed")
			})
		}
	}
}

// down ends containerd in either way.
func (b *box) down(killed bool) {
	b.Helper()
	end := b.c.Terminate
	if killed {
		end = b.c.Kill
	}
	if err := end(); err != nil {
		b.Fatal(err)
	}
}

// up starts containerd again.
func (b *box) up() {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if err := b.c.Restart(ctx); err != nil {
		b.Fatal(err)
	}
}

func testRestart(b *box, killed bool) {
	dir := b.TempDir()
	lines := b.startTalking("stays", newSpec(b.T, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done").group("stays").mount("bind", dir, "/d", "rbind", "rw"))
	b.startSpec("ends", newSpec(b.T, "sh", "-c", "while ! test -e /d/go; do sleep 0.05; done; exit 3").group("stays").mount("bind", dir, "/d", "rbind", "rw"))
	boot := b.bootID("stays")
	ctx, s := calls(b.T), b.dialShim("stays")
	x := s.exec(ctx, "stays", process("sh", "-c", "while ! test -e /d/x; do sleep 0.05; done; exit 4"), pipes{})
	if _, err := s.Start(ctx, &task.StartRequest{ID: "stays", ExecID: x}); err != nil {
		b.Fatal(err)
	}
	// A start under way: the machine boots when containerd goes.
	begun := b.background(b.runArgs("begun", []string{"--detach", "--null-io"}, []string{"sleep", "1000"})...)
	if _, err := b.c.WaitLog(ctx, func(l string) bool {
		return strings.Contains(l, "accelerator chosen") && strings.Contains(l, "sandbox=begun ")
	}); err != nil {
		b.Fatal(err)
	}
	b.down(killed)
	logged := len(b.c.Log())
	receive(b.T, "the end of a client whose containerd is gone", begun)

	// While it is down: an exec and a container end, and one more exec comes and goes.
	told := map[string]time.Time{}
	for _, e := range []struct{ name, id, exec string }{{"x", "stays", x}, {"go", "ends", ""}} {
		told[e.name] = time.Now()
		writeFile(b.T, "", dir, e.name)
		if _, err := s.Wait(ctx, &task.WaitRequest{ID: e.id, ExecID: e.exec}); err != nil {
			b.Fatal(err)
		}
	}
	y := s.exec(ctx, "stays", process("true"), pipes{})
	if _, err := s.Start(ctx, &task.StartRequest{ID: "stays", ExecID: y}); err != nil {
		b.Fatal(err)
	}
	if _, err := s.Wait(ctx, &task.WaitRequest{ID: "stays", ExecID: y}); err != nil {
		b.Fatal(err)
	}
	over := time.Now()
	lines.goOn(b.T)
	b.up()
	lines.goOn(b.T)
	if got := b.bootID("stays"); got != boot {
		b.Errorf("after the restart the container runs in boot %s, before in %s", got, boot)
	}
	table := b.ok("tasks", "ls")
	if stateOf(table, "stays") != "RUNNING" || stateOf(table, "ends") != "STOPPED" {
		b.Errorf("after the restart:\n%s", table)
	}
	tasks := b.tasks()
	for _, e := range []struct {
		name, id, exec string
		status         uint32
	}{{"x", "stays", x, 4}, {"go", "ends", "", 3}} {
		r, err := tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: e.id, ExecID: e.exec})
		if err != nil {
			b.Fatal(err)
		}
		at := r.Process.ExitedAt.AsTime()
		if r.Process.Status != tasktypes.Status_STOPPED || r.Process.ExitStatus != e.status || at.Before(told[e.name]) || at.After(over) {
			b.Errorf("%s %s: %v; want stopped with status %d between %v and %v", e.id, e.exec, r.Process, e.status, told[e.name], over)
		}
	}
	b.forwarded(ctx, logged, "/tasks/exit", "/tasks/exit", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit")
	if r := b.ctr("tasks", "rm", "ends"); !strings.Contains(r.Stderr, "exit code 3") {
		b.Errorf("removal of the task that ended meanwhile: %+v; want its status 3", r)
	}
	for _, id := range []string{"ends", "begun", "stays"} {
		b.remove(id)
	}
}

// forwarded compares the topics of the first events that containerd took from
// shims after the first n lines of its log. (Of another shim none is expected.)
func (b *box) forwarded(ctx context.Context, n int, want ...string) {
	b.Helper()
	var got []string
	topics := func(lines []string) (out []string) {
		for _, l := range lines {
			if _, topic, ok := strings.Cut(l, " topic="); ok && strings.Contains(l, `msg="event forwarded"`) {
				topic, _, _ = strings.Cut(topic, " ")
				out = append(out, strings.Trim(topic, `"`))
			}
		}
		return out
	}
	if _, err := b.c.WaitLog(ctx, func(string) bool {
		got = topics(b.c.Log()[n:])
		return len(got) >= len(want)
	}); err != nil {
		b.Errorf("events after the restart: %v: %v", got, err)
		return
	}
	if !slices.Equal(got[:len(want)], want) {
		b.Errorf("events after the restart: %v, want %v", got, want)
	}
}

// talk is the standard output of a container that counts.
type talk struct {
	lines *bufio.Scanner
	next  int
}

// startTalking starts a container through containerd whose output this test
// reads itself, so that the reader outlives containerd.
func (b *box) startTalking(id string, s *spec) *talk {
	b.Helper()
	b.Cleanup(func() { b.remove(id) })
	io := newPipes(b.T)
	// Both ways, as containerd's own clients do: otherwise it would end with the first writer.
	f, err := os.OpenFile(io.stdout, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	b.ok("containers", "create", "--runtime", runtimeName, "--config", s.file(b.T), id)
	ctx, tasks := calls(b.T), b.tasks()
	if _, err := tasks.Create(ctx, &tasksapi.CreateTaskRequest{ContainerID: id, Stdout: io.stdout}); err != nil {
		b.Fatal(err)
	}
	if _, err := tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: id}); err != nil {
		b.Fatal(err)
	}
	return &talk{lines: bufio.NewScanner(f)}
}

// goOn reads what was written since, and ten lines more, none of which may be missing.
func (l *talk) goOn(t *testing.T) {
	t.Helper()
	for range 10 {
		if !l.lines.Scan() {
			t.Fatalf("the output ended after %d lines: %v", l.next, l.lines.Err())
		}
		if got := l.lines.Text(); got != fmt.Sprint(l.next) {
			t.Fatalf("line %d of the output is %q", l.next, got)
		}
		l.next++
	}
}
