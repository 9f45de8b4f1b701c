// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// box is one test's view of a containerd.
type box struct {
	*testing.T
	c *lab.Containerd
}

// begin takes the snapshot that the test's end is compared with: the whole
// machine, and this containerd's pods, bundles, pipes, containers and tasks.
func begin(t *testing.T, c *lab.Containerd) *box {
	t.Helper()
	b := boxOf(t, c)
	scope := leak.Scope{Patterns: []string{
		filepath.Join(c.PodsDir(), "[^.]*"), filepath.Join(c.StateDir(), "*task*", "*", "*"),
		filepath.Join(b.fifoDir(), "*"),
	}}
	before, err := scope.Take()
	if err != nil {
		t.Fatal(err)
	}
	known := b.known()
	t.Cleanup(func() {
		if now := b.known(); now != known {
			t.Errorf("containers and tasks changed from %q to %q", known, now)
		}
		left, err := scope.Settle(before, leak.SettleTime)
		if err != nil {
			t.Error(err)
		}
		if len(left) > 0 {
			t.Errorf("left behind on this machine:\n%s", leak.Format(left))
		}
	})
	return b
}

// boxOf shows the log of a failed test.
func boxOf(t *testing.T, c *lab.Containerd) *box {
	t.Helper()
	b := &box{t, c}
	// Made once and kept: the first test must not be blamed for it.
	if err := os.MkdirAll(b.fifoDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	logged := len(c.Log())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("what was logged meanwhile:\n%s", strings.Join(notable(c.Log()[logged:]), "\n"))
		}
	})
	return b
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

func (b *box) fifoDir() string { return b.c.FIFODir() }

// known are the containers and tasks that containerd has.
func (b *box) known() string {
	return fmt.Sprintf("containers %v, tasks %v",
		strings.Fields(b.ok("containers", "ls", "-q")), strings.Fields(b.ok("tasks", "ls", "-q")))
}

// ctrWith runs ctr with a standard input, nil for none.
func (b *box) ctrWith(stdin io.Reader, args ...string) lab.Result {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	cmd := b.c.CtrCmd(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil || cmd.ProcessState == nil {
		// No Fatal: tests call this from goroutines too.
		b.Errorf("ctr %s: %v, %v; stdout %q, stderr %q", strings.Join(args, " "), err, ctx.Err(), head(stdout.String()), stderr.String())
		return lab.Result{Code: -1}
	}
	return lab.Result{Stdout: stdout.String(), Stderr: ownWords(stderr.String()), Code: cmd.ProcessState.ExitCode()}
}

// head is the beginning of what may be long.
func head(s string) string { return s[:min(len(s), 500)] }

// ownWords takes containerd's own advice about the host out of ctr's stderr.
func ownWords(s string) string {
	var out strings.Builder
	for line := range strings.Lines(s) {
		if !strings.Contains(line, "DEPRECATION") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// ctr runs ctr to its end; its exit status is in the result.
func (b *box) ctr(args ...string) lab.Result {
	b.Helper()
	return b.ctrWith(nil, args...)
}

// ok is ctr for what must succeed; it returns the standard output.
func (b *box) ok(args ...string) string {
	b.Helper()
	r := b.ctr(args...)
	if r.Code != 0 {
		b.Fatalf("ctr %s: exit status %d: %s", strings.Join(args, " "), r.Code, r.Stderr)
	}
	return r.Stdout
}

func (b *box) runArgs(id string, flags []string, args []string) []string {
	return b.c.RunArgs(runtimeName, id, append([]string{"--fifo-dir", b.fifoDir()}, flags...), args...)
}

// run runs a container of the busybox image to its end and removes it.
func (b *box) run(id string, flags []string, args ...string) lab.Result {
	b.Helper()
	return b.ctr(b.runArgs(id, append([]string{"--rm"}, flags...), args)...)
}

// runSpec runs a container of a written specification to its end and removes it.
func (b *box) runSpec(id string, s *spec) lab.Result {
	b.Helper()
	return b.ctr("run", "--rm", "--fifo-dir", b.fifoDir(), "--runtime", runtimeName, "--config", s.file(b.T), id)
}

// start starts a container in the background, without standard streams, and
// removes it at the test's end if it is still there.
func (b *box) start(id string, flags []string, args ...string) {
	b.Helper()
	// Registered first: a start that failed halfway must be cleaned up too.
	b.Cleanup(func() { b.remove(id) })
	b.ok(b.runArgs(id, append([]string{"--detach", "--null-io"}, flags...), args)...)
}

// startSpec is start with a written specification.
func (b *box) startSpec(id string, s *spec) {
	b.Helper()
	b.Cleanup(func() { b.remove(id) })
	b.ok("run", "--detach", "--null-io", "--runtime", runtimeName, "--config", s.file(b.T), id)
}

// remove removes a container and its task as an operator would, if it is there.
func (b *box) remove(id string) {
	b.Helper()
	for _, what := range []string{"tasks", "containers"} {
		for _, have := range strings.Fields(b.ok(what, "ls", "-q")) {
			if have != id {
				continue
			}
			args := []string{what, "rm", id}
			if what == "tasks" {
				args = []string{what, "rm", "--force", id}
			}
			if r := b.ctr(args...); r.Code != 0 {
				b.Errorf("ctr %s: exit status %d: %s", strings.Join(args, " "), r.Code, r.Stderr)
			}
		}
	}
}

var execs atomic.Int64

// execID is an id that no other exec of this run has.
func execID() string { return fmt.Sprintf("x%d", execs.Add(1)) }

func (b *box) execArgs(id string, flags []string, args []string) []string {
	all := append([]string{"tasks", "exec", "--exec-id", execID(), "--fifo-dir", b.fifoDir()}, flags...)
	return append(append(all, id), args...)
}

// exec runs a command in a running container.
func (b *box) exec(id string, args ...string) lab.Result {
	b.Helper()
	return b.ctr(b.execArgs(id, nil, args)...)
}

// shell runs a script in a running container that must succeed, and returns its
// output without the white space around it.
func (b *box) shell(id, script string) string {
	b.Helper()
	r := b.exec(id, "sh", "-c", script)
	if r.Code != 0 {
		b.Fatalf("in %s: %s: exit status %d: %s", id, script, r.Code, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// want fails the test when a result is not as expected.
func (b *box) want(r lab.Result, code int, stdout string) {
	b.Helper()
	if r.Code != code || r.Stdout != stdout {
		b.Errorf("got status %d, stdout %q, stderr %q; want status %d, stdout %q", r.Code, head(r.Stdout), r.Stderr, code, stdout)
	}
}
