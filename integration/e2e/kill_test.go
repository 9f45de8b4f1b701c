// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
)

// waitTask waits on the shim for the end of a task and returns its status.
func (b *box) waitTask(id string) uint32 {
	b.Helper()
	w, err := b.dialShim(id).Wait(calls(b.T), &task.WaitRequest{ID: id})
	if err != nil {
		b.Fatal(err)
	}
	return w.ExitStatus
}

// awaitFile waits until the file that a container writes holds content; the
// directory is shared with the guest and has no event that crosses it.
func (b *box) awaitFile(path, content string) {
	b.Helper()
	deadline := time.Now().Add(callTimeout)
	for {
		data, _ := os.ReadFile(path)
		if strings.Contains(string(data), content) {
			return
		}
		if time.Now().After(deadline) {
			b.Fatalf("%s holds %q, want %q", path, data, content)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// testSignals: a signal is what it is. TERM reaches a first process that
// handles it, is nothing to one that does not (process 1 of its namespace), and
// KILL ends it.
func testSignals(b *box) {
	dir := b.TempDir()
	s := script(b.T, "trap 'echo got TERM >/out/log; exit 3' TERM; trap 'echo got HUP >>/out/log' HUP; echo ready >/out/log; while :; do sleep 0.1; done").
		mount("bind", dir, "/out", "rbind", "rw")
	b.startSpec("signals", s)
	log := filepath.Join(dir, "log")
	b.awaitFile(log, "ready")
	b.ok("tasks", "kill", "--signal", "HUP", "signals")
	b.awaitFile(log, "got HUP")
	b.ok("tasks", "kill", "signals") // ctr's default is TERM
	if got := b.waitTask("signals"); got != 3 {
		b.Errorf("status %d after TERM, want the handler's 3", got)
	}
	b.awaitFile(log, "got TERM")
	if r := b.ctr("tasks", "kill", "signals"); r.Code == 0 {
		b.Error("a task that has ended took a signal")
	}
	// ctr says the status of a task that it removes.
	if r := b.ctr("tasks", "rm", "signals"); !strings.Contains(r.Stderr, "exit code 3") {
		b.Errorf("tasks rm: %+v", r)
	}
	b.remove("signals")

	b.startSpec("deaf", member(b.T, "sleep", "1000"))
	b.ok("tasks", "kill", "deaf")
	if out := b.ok("tasks", "ls"); !strings.Contains(stateOf(out, "deaf"), "RUNNING") {
		b.Errorf("process 1 without a handler ended on TERM: %s", out)
	}
	b.ok("tasks", "kill", "--signal", "KILL", "deaf")
	if got := b.waitTask("deaf"); got != 128+9 {
		b.Errorf("status %d after KILL, want 137", got)
	}
	b.remove("deaf")
}

// stateOf picks a task's state from the table of `ctr tasks ls`.
func stateOf(table, id string) string {
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == id {
			return f[2]
		}
	}
	return ""
}

// testKillExec: a signal to an exec reaches only it; KILL with --all reaches
// every process of the container.
func testKillExec(b *box) {
	ctx, s := calls(b.T), b.dialShim(podID)
	x, y := s.exec(ctx, podID, process("sleep", "1000"), pipes{}), s.exec(ctx, podID, process("sleep", "1001"), pipes{})
	for _, id := range []string{x, y} {
		if _, err := s.Start(ctx, &task.StartRequest{ID: podID, ExecID: id}); err != nil {
			b.Fatal(err)
		}
	}
	b.ok("tasks", "kill", "--exec-id", x, "--signal", "TERM", podID)
	if w, err := s.Wait(ctx, &task.WaitRequest{ID: podID, ExecID: x}); err != nil || w.ExitStatus != 128+15 {
		b.Errorf("the first exec: %v, %v; want status 143", w, err)
	}
	if st, err := s.State(ctx, &task.StateRequest{ID: podID, ExecID: y}); err != nil || !st.ExitedAt.AsTime().IsZero() {
		b.Errorf("the second exec: %v, %v; want it running", st, err)
	}
	b.ok("tasks", "kill", "--exec-id", y, "--signal", "KILL", podID)
	for _, id := range []string{x, y} {
		if _, err := s.Wait(ctx, &task.WaitRequest{ID: podID, ExecID: id}); err != nil {
			b.Error(err)
		}
		if _, err := s.Delete(ctx, &task.DeleteRequest{ID: podID, ExecID: id}); err != nil {
			b.Error(err)
		}
	}

	b.startSpec("all", member(b.T, "sleep", "1000"))
	s = b.dialShim("all")
	z := s.exec(ctx, "all", process("sh", "-c", "trap '' TERM; touch /trapped; sleep 1000"), pipes{})
	ends := s.exec(ctx, "all", process("sleep", "1000"), pipes{})
	for _, id := range []string{z, ends} {
		if _, err := s.Start(ctx, &task.StartRequest{ID: "all", ExecID: id}); err != nil {
			b.Fatal(err)
		}
	}
	b.shell("all", "until [ -e /trapped ]; do usleep 10000; done")
	b.ok("tasks", "kill", "--all", "--signal", "TERM", "all")
	if w, err := s.Wait(ctx, &task.WaitRequest{ID: "all", ExecID: ends}); err != nil || w.ExitStatus != 128+15 {
		b.Errorf("exec in a container whose processes got TERM: %v, %v; want status 143", w, err)
	}
	b.ok("tasks", "kill", "--all", "--signal", "KILL", "all")
	if w, err := s.Wait(ctx, &task.WaitRequest{ID: "all", ExecID: z}); err != nil || w.ExitStatus != 128+9 {
		b.Errorf("exec in a container that was killed: %v, %v; want status 137", w, err)
	}
	if got := b.waitTask("all"); got != 128+9 {
		b.Errorf("status %d, want 137", got)
	}
	b.remove("all")
}

// testDeleteWhileRunning: refused, and nothing happens to the container.
func testDeleteWhileRunning(b *box) {
	r := b.ctr("tasks", "rm", podID)
	if r.Code == 0 || !strings.Contains(r.Stderr, "unning") {
		b.Errorf("status %d, stderr %q; want a refusal that says that it is running", r.Code, r.Stderr)
	}
	if r := b.ctr("containers", "rm", podID); r.Code == 0 {
		b.Error("the container of a running task was removed")
	}
	b.want(b.exec(podID, "echo", "alive"), 0, "alive\n")
}

// testDeleteForce: kills first; running execs end with the container.
func testDeleteForce(b *box) {
	b.startSpec("force", member(b.T, "sleep", "1000"))
	s := b.dialShim("force")
	x := s.exec(calls(b.T), "force", process("sleep", "1000"), pipes{})
	if _, err := s.Start(calls(b.T), &task.StartRequest{ID: "force", ExecID: x}); err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	if r := b.ctr("tasks", "rm", "--force", "force"); r.Code != 0 {
		b.Errorf("status %d: %s", r.Code, r.Stderr)
	}
	if took := time.Since(began); took > 5*time.Second {
		b.Errorf("took %v", took)
	}
	b.ok("containers", "rm", "force")
	b.want(b.exec(podID, "echo", "alive"), 0, "alive\n")
}

// testPause: a paused container stands still, takes no exec, and goes on.
func testPause(b *box) {
	dir := b.TempDir()
	b.startSpec("paused", script(b.T, "while :; do date +%s%N >>/d/ticks; sleep 0.05; done").mount("bind", dir, "/d", "rbind", "rw"))
	ticks := filepath.Join(dir, "ticks")
	b.awaitFile(ticks, "\n")
	b.ok("tasks", "pause", "paused")
	if got := stateOf(b.ok("tasks", "ls"), "paused"); got != "PAUSED" {
		b.Errorf("state %q, want PAUSED", got)
	}
	before := readFile(b.T, ticks)
	if r := b.ctr("tasks", "rm", "paused"); r.Code == 0 {
		b.Error("a paused task was removed")
	}
	time.Sleep(300 * time.Millisecond) // six ticks of a container that runs
	if after := readFile(b.T, ticks); after != before {
		b.Errorf("the paused container went on: %d bytes, then %d", len(before), len(after))
	}
	b.ok("tasks", "resume", "paused")
	b.awaitFile(ticks, before+"1") // nanoseconds since 1970 begin with 1 for a while yet
	// KILL ends a paused one too.
	b.ok("tasks", "pause", "paused")
	b.ok("tasks", "kill", "--signal", "KILL", "paused")
	if got := b.waitTask("paused"); got != 137 {
		b.Errorf("status %d, want 137", got)
	}
	b.remove("paused")
}
