// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// life is one pod's.
type life struct {
	*soak
	name string
	id   string // of the sandbox, or the container of ctr
	r    *rand.Rand

	mu     sync.Mutex
	did    []string // guarded by mu
	victim string   // guarded by mu; which part was killed
	ending bool     // guarded by mu; the pod is being stopped, so calls for containers may fail
	wrong  bool     // guarded by mu
}

// pick is one of several.
func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// tell notes what happens to the pod.
func (p *life) tell(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.did = append(p.did, what)
}

// story is what has happened.
func (p *life) story() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.did, " ")
}

// excuse says whether calls of this pod may fail.
func (p *life) excuse() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.victim != "" || p.ending
}

// do makes a call; it says whether it succeeded. An error without a reason is a fault.
func (p *life) do(kind string, f func(context.Context) error) bool {
	err := p.call(p.name+" ("+p.story()+")", kind, f)
	switch {
	case err == nil:
		return true
	case p.excuse():
		p.excused(kind, err)
	default:
		p.bad("%s: %v", kind, err)
	}
	return false
}

// bad is a fault of this pod.
func (p *life) bad(format string, args ...any) {
	p.mu.Lock()
	p.wrong = true
	p.mu.Unlock()
	p.fault("%s (%s): %s", p.name, p.story(), fmt.Sprintf(format, args...))
}

// beginEnd says that the pod is being ended.
func (p *life) beginEnd() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ending = true
}

// explain shows what was logged of a pod with a fault.
func (p *life) explain(from int) {
	p.mu.Lock()
	wrong := p.wrong
	p.mu.Unlock()
	if !wrong {
		return
	}
	for _, l := range p.c.Log()[from:] {
		if p.id != "" && strings.Contains(l, p.id) || strings.Contains(l, p.name) || strings.Contains(l, "level=error") {
			p.o.Say("  %s", l[:min(len(l), 600)])
		}
	}
}

// killLater kills one part of the pod in a while. Its end is waited for by done.
func (p *life) killLater(ctx context.Context) (done func()) {
	if !p.o.Kill || p.r.IntN(3) > 0 {
		return func() {}
	}
	part, after := pick(p.r, "qemu-system", "virtiofsd", "containerd-shim-kata-v2"), time.Duration(p.r.IntN(4000))*time.Millisecond
	var wg sync.WaitGroup
	wg.Go(func() {
		timer := time.NewTimer(after)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		pid := p.part(part)
		if pid == 0 {
			return
		}
		p.mu.Lock()
		p.victim = part
		p.mu.Unlock()
		p.tell("kill:" + part)
		_ = unix.Kill(pid, unix.SIGKILL)
	})
	return wg.Wait
}

// part finds a process of the pod: its shim by its arguments, others as that one's children.
func (p *life) part(name string) int {
	shim := 0
	var children []int
	parents := map[int]int{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		cmd, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		args := strings.Split(string(cmd), "\x00")
		if strings.HasSuffix(args[0], "containerd-shim-kata-v2") && slices.Contains(args, p.id) && !slices.Contains(args, "delete") {
			shim = pid
		}
		if strings.Contains(string(cmd), name) {
			children = append(children, pid)
		}
		// proc_pid_stat(5): pid (name) state parent …
		stat, _ := os.ReadFile(filepath.Join(dir, "stat"))
		if _, tail, ok := strings.Cut(string(stat), ") "); ok {
			parents[pid], _ = strconv.Atoi(strings.Fields(tail)[1])
		}
	}
	if shim == 0 || strings.HasPrefix(name, "containerd-shim") {
		return shim
	}
	for _, pid := range children {
		if parents[pid] == shim {
			return pid
		}
	}
	return 0
}
