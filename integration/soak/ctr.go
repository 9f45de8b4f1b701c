// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
)

// runtimeName is the shim under test.
const runtimeName = "io.containerd.kata.v2"

// ctr runs ctr; the error is that it did not end, or that it failed without a reason.
func (p *life) ctr(kind string, args ...string) (r lab.Result, ok bool) {
	ok = p.do(kind, func(ctx context.Context) error {
		cmd := p.c.CtrCmd(ctx, args...)
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGQUIT) } // it says where it hangs
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		r = lab.Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
		var exit *exec.ExitError
		if errors.As(err, &exit) && ctx.Err() == nil && !strings.Contains(r.Stderr, "ctr: ") {
			return nil // the program's
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(r.Stderr))
		}
		return nil
	})
	return r, ok
}

// byCtr is the life of a pod of one container, or of two in one group.
func (p *life) byCtr(ctx context.Context) {
	from := len(p.c.Log())
	p.id = p.name
	defer p.explain(from)
	if p.r.IntN(2) == 0 {
		p.tell("run")
		defer p.killLater(ctx)()
		r, ok := p.ctr("ctr run", p.c.RunArgs(runtimeName, p.id, []string{"--rm"}, "sh", "-c", "echo hello; exit 9")...)
		if ok && !p.excuse() && (r.Code != 9 || r.Stdout != "hello\n") {
			p.bad("ctr run: %+v", r)
		}
		if !ok || p.excuse() {
			p.clear(p.id)
		}
		return
	}
	p.tell("detached")
	group := []string{"--detach", "--null-io", "--annotation", "io.containerd.runc.v2.group=" + p.id}
	second := p.id + "-b"
	if _, ok := p.ctr("ctr run -d", p.c.RunArgs(runtimeName, p.id, group, "sleep", "1000")...); ok {
		killed := p.killLater(ctx)
		p.ctr("ctr run -d", p.c.RunArgs(runtimeName, second, group, "sleep", "1000")...)
		for i := range p.r.IntN(20) {
			if p.excuse() {
				break
			}
			r, ok := p.ctr("ctr exec", "tasks", "exec", "--exec-id", fmt.Sprintf("e%d", i), "--fifo-dir", p.c.FIFODir(), pick(p.r, p.id, second), "sh", "-c", "echo hi; exit 2")
			if ok && !p.excuse() && (r.Code != 2 || r.Stdout != "hi\n") {
				p.bad("ctr exec: %+v", r)
			}
		}
		if p.r.IntN(2) == 0 && !p.excuse() {
			p.ctr("ctr pause", "tasks", "pause", p.id)
			p.ctr("ctr resume", "tasks", "resume", p.id)
		}
		killed()
	}
	p.clear(second)
	p.clear(p.id)
}

// clear removes a container as an operator would.
func (p *life) clear(id string) {
	p.beginEnd()
	p.tell("clear")
	for range 3 { // a task whose shim was killed a moment ago is found, and is gone
		p.ctr("ctr task rm", "tasks", "rm", "--force", id)
		p.ctr("ctr rm", "containers", "rm", id)
		if r, ok := p.ctr("ctr ls", "containers", "ls", "-q"); ok && !strings.Contains("\n"+r.Stdout, "\n"+id+"\n") {
			return
		}
	}
	p.bad("%s cannot be removed", id)
}
