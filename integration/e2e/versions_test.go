// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
)

// TestVersions: every release line of containerd starts the shim in its own way
// and gets the same container: run, start, exec, exit, kill, delete, the events
// of all that, and a task that outlives the daemon.
func TestVersions(t *testing.T) {
	for _, version := range lab.Versions() {
		t.Run(version, func(t *testing.T) {
			o := labOptions(t)
			o.Version = version
			b := newOwnBox(t, o)
			testLife(b)
			testOutlives(b)
		})
	}
}

// testLife: a container from its start to its end.
func testLife(b *box) {
	events := b.subscribe()
	r := b.run("run", nil, "sh", "-c", "cat /proc/sys/kernel/random/boot_id; echo err >&2; exit 7")
	if r.Code != 7 || len(r.Stdout) != 37 || r.Stderr != "err\n" {
		b.Errorf("run: %+v; want status 7, a boot id, err", r)
	}
	events.want("run", "/tasks/create", "/tasks/start", "/tasks/exit init 7", "/tasks/delete")

	b.start("life", nil, "sleep", "1000")
	if got := b.bootID("life"); got == strings.TrimSpace(r.Stdout) {
		b.Errorf("two containers run in one boot, %s", got)
	}
	b.want(b.ctrWith(strings.NewReader("in\n"), b.execArgs("life", nil, []string{"sh", "-c", "cat; exit 5"})...), 5, "in\n")
	if got := stateOf(b.ok("tasks", "ls"), "life"); got != "RUNNING" {
		b.Errorf("state %q, want RUNNING", got)
	}
	if r := b.ctr("tasks", "rm", "life"); r.Code == 0 {
		b.Error("a running task was removed")
	}
	b.ok("tasks", "kill", "--signal", "KILL", "life")
	if got := b.waitTask("life"); got != 137 {
		b.Errorf("status %d, want 137", got)
	}
	if r := b.ctr("tasks", "rm", "life"); !strings.Contains(r.Stderr, "exit code 137") {
		b.Errorf("tasks rm: %+v; want its status 137", r)
	}
	events.want("life", "/tasks/create", "/tasks/start",
		"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit exec 0",
		"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit exec 5",
		"/tasks/exit init 137", "/tasks/delete")
	b.remove("life")
}

// testOutlives: the daemon is killed and started again; it finds its task.
func testOutlives(b *box) {
	b.start("outlives", nil, "sleep", "1000")
	boot := b.bootID("outlives")
	if err := b.c.Kill(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if err := b.c.Restart(ctx); err != nil {
		b.Fatal(err)
	}
	if got := b.bootID("outlives"); got != boot {
		b.Errorf("after the restart the container runs in boot %s, before in %s", got, boot)
	}
	b.remove("outlives")
}
