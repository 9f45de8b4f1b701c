// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// testPids: Pids lists the first process and the execs by their numbers in the guest, and `ctr` shows them.
func testPids(b *box) {
	ctx, s := calls(b.T), b.dialShim(podID)
	before := pidsOf(b, ctx, s, podID)
	x := s.exec(ctx, podID, process("sleep", "1000"), pipes{})
	if _, err := s.Start(ctx, &task.StartRequest{ID: podID, ExecID: x}); err != nil {
		b.Fatal(err)
	}
	after := pidsOf(b, ctx, s, podID)
	if len(before) != 1 || len(after) != 2 {
		b.Errorf("processes %v, then %v; want one, then two", before, after)
	}
	// The guest numbers them from its own first process on: the agent is 1.
	for _, p := range after {
		if p <= 1 || p > 100000 {
			b.Errorf("pid %d is not one of a container in the guest", p)
		}
	}
	endExec(ctx, b, s, x)
	if got := pidsOf(b, ctx, s, podID); len(got) != 1 {
		b.Errorf("processes %v after the end of the second", got)
	}
	out := b.ok("tasks", "ps", podID)
	if !strings.Contains(out, strconv.Itoa(int(before[0]))) {
		b.Errorf("ctr tasks ps: %q; want the pid %d", out, before[0])
	}
}

func pidsOf(b *box, ctx context.Context, s *shimClient, id string) []uint32 {
	b.Helper()
	r, err := s.Pids(ctx, &task.PidsRequest{ID: id})
	if err != nil {
		b.Fatal(err)
	}
	var pids []uint32
	for _, p := range r.Processes {
		pids = append(pids, p.Pid)
	}
	return pids
}

// testTaskAPI: State, Connect, Wait, CloseIO and errors with the right code.
func testTaskAPI(b *box) {
	ctx, s := calls(b.T), b.dialShim(podID)
	st, err := s.State(ctx, &task.StateRequest{ID: podID})
	if err != nil || st.Status != tasktypes.Status_RUNNING || st.ID != podID || st.Bundle != b.c.Bundle(podID) {
		b.Errorf("State: %v, %v; want running in %s", st, err, b.c.Bundle(podID))
	}
	con, err := s.Connect(ctx, &task.ConnectRequest{ID: podID})
	if err != nil || con.TaskPid != st.Pid || con.ShimPid == 0 {
		b.Errorf("Connect: %v, %v; want the task's pid %d", con, err, st.Pid)
	}
	// The task's pid is a live process of this machine, in another network namespace than ours.
	ours, _ := os.Readlink("/proc/self/ns/net")
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", st.Pid))
	if err != nil || theirs == ours {
		b.Errorf("the task's pid %d: network namespace %q, %v; want one of its own", st.Pid, theirs, err)
	}
	for _, c := range []struct {
		what string
		code codes.Code
		call func() error
	}{
		{"State of an unknown task", codes.NotFound, func() error { _, err := s.State(ctx, &task.StateRequest{ID: "nobody"}); return err }},
		{"Start of an unknown exec", codes.NotFound, func() error { _, err := s.Start(ctx, &task.StartRequest{ID: podID, ExecID: "nobody"}); return err }},
		{"Start of what runs", codes.FailedPrecondition, func() error { _, err := s.Start(ctx, &task.StartRequest{ID: podID}); return err }},
		{"Delete of what runs", codes.FailedPrecondition, func() error { _, err := s.Delete(ctx, &task.DeleteRequest{ID: podID}); return err }},
		{"Exec without a command", codes.InvalidArgument, func() error { _, err := s.Exec(ctx, &task.ExecProcessRequest{ID: podID, ExecID: "none"}); return err }},
		{"Create of what exists", codes.AlreadyExists, func() error {
			_, err := s.Create(ctx, &task.CreateTaskRequest{ID: podID, Bundle: b.c.Bundle(podID)})
			return err
		}},
		{"ResizePty without a terminal", codes.FailedPrecondition, func() error {
			_, err := s.ResizePty(ctx, &task.ResizePtyRequest{ID: podID, Width: 1, Height: 1})
			return err
		}},
	} {
		if err := c.call(); status.Code(err) != c.code {
			b.Errorf("%s: %v; want code %v", c.what, err, c.code)
		}
	}
	testCloseIO(b, ctx, s)
	testEarlyCloseIO(b, ctx, s)
}

// testEarlyCloseIO: clients copy from Exec on, so the end of an empty input can
// come before Start.
func testEarlyCloseIO(b *box, ctx context.Context, s *shimClient) {
	io := newPipes(b.T)
	x := s.exec(ctx, podID, process("cat"), pipes{stdin: io.stdin})
	if _, err := s.CloseIO(ctx, &task.CloseIORequest{ID: podID, ExecID: x, Stdin: true}); err != nil {
		b.Error(err)
	}
	if _, err := s.Start(ctx, &task.StartRequest{ID: podID, ExecID: x}); err != nil {
		b.Fatal(err)
	}
	limit, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if w, err := s.Wait(limit, &task.WaitRequest{ID: podID, ExecID: x}); err != nil || w.ExitStatus != 0 {
		b.Errorf("Wait: %v, %v; want the end of an empty input", w, err)
		if _, err := s.Kill(ctx, &task.KillRequest{ID: podID, ExecID: x, Signal: 9}); err != nil {
			b.Error(err)
		}
		if _, err := s.Wait(ctx, &task.WaitRequest{ID: podID, ExecID: x}); err != nil {
			b.Error(err)
		}
	}
	if _, err := s.Delete(ctx, &task.DeleteRequest{ID: podID, ExecID: x}); err != nil {
		b.Error(err)
	}
}

// testCloseIO: stdin stays open when its writer goes, and ends with CloseIO once
// everything before has been read; Delete at once after Wait loses nothing.
func testCloseIO(b *box, ctx context.Context, s *shimClient) {
	io := newPipes(b.T)
	out, errs := collect(b.T, io.stdout), collect(b.T, io.stderr)
	x := s.exec(ctx, podID, process("cat"), io)
	if _, err := s.Start(ctx, &task.StartRequest{ID: podID, ExecID: x}); err != nil {
		b.Fatal(err)
	}
	out.started()
	errs.started()
	data := randomBytes(300_000)
	for _, half := range [][]byte{data[:100_000], data[100_000:]} {
		w := open(b.T, io.stdin, os.O_WRONLY)
		if _, err := w.Write(half); err != nil {
			b.Fatal(err)
		}
		w.Close() // as a client does that goes away and comes back
	}
	if st, err := s.State(ctx, &task.StateRequest{ID: podID, ExecID: x}); err != nil || st.Status != tasktypes.Status_RUNNING {
		b.Errorf("State of the exec: %v, %v; want running: nobody has closed its stdin", st, err)
	}
	if _, err := s.CloseIO(ctx, &task.CloseIORequest{ID: podID, ExecID: x, Stdin: true}); err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	if w, err := s.Wait(ctx, &task.WaitRequest{ID: podID, ExecID: x}); err != nil || w.ExitStatus != 0 {
		b.Errorf("Wait: %v, %v", w, err)
	}
	d, err := s.Delete(ctx, &task.DeleteRequest{ID: podID, ExecID: x})
	if err != nil || d.ExitStatus != 0 || d.ExitedAt == nil {
		b.Errorf("Delete: %v, %v", d, err)
	}
	b.Logf("from CloseIO to the answer of Delete: %v", time.Since(began).Round(time.Millisecond))
	if got := receive(b.T, "stdout", out.data); !bytes.Equal(got, data) {
		b.Errorf("%d bytes came back, want the %d that were sent", len(got), len(data))
	}
	if got := receive(b.T, "stderr", errs.data); len(got) != 0 {
		b.Errorf("stderr %q", got)
	}
}
