// SPDX-License-Identifier: Apache-2.0

// Package reaper collects every dead child of the agent, which as PID 1 is also
// the parent of every orphan in the guest, and hands each exit status to whoever
// is waiting for that pid. It is the only caller of wait4 in the agent: os/exec
// and os.Process.Wait would race with it.
//
// A process that an OCI engine leaves behind may be dead and reaped before its
// pid is known here. So whoever starts one opens a Launch first: while any is
// open, statuses nobody has claimed are kept.
package reaper

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Status is how a process ended.
type Status struct {
	// Code is the exit code, or 128 plus the number of the signal that ended it.
	Code int
	// Signaled says that it was a signal.
	Signaled bool
}

// Reaper collects children. The zero value is not usable; see New.
type Reaper struct {
	mu       sync.Mutex
	waiters  map[int]chan Status // guarded by mu; channels have room for their one status
	early    map[int]Status      // guarded by mu; unclaimed, kept while launches > 0
	launches int                 // guarded by mu
}

// New makes a Reaper; nothing is collected before Run.
func New() *Reaper {
	return &Reaper{waiters: map[int]chan Status{}, early: map[int]Status{}}
}

// Run collects until ctx is done.
func (r *Reaper) Run(ctx context.Context) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGCHLD)
	defer signal.Stop(ch)
	for {
		r.reap() // children may have died before Notify
		select {
		case <-ch:
		case <-ctx.Done():
			return
		}
	}
}

func (r *Reaper) reap() {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil || pid <= 0:
			return
		case ws.Exited():
			r.deliver(pid, Status{Code: ws.ExitStatus()})
		case ws.Signaled():
			r.deliver(pid, Status{Code: 128 + int(ws.Signal()), Signaled: true})
		}
	}
}

func (r *Reaper) deliver(pid int, st Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ch, ok := r.waiters[pid]; ok {
		delete(r.waiters, pid)
		ch <- st
		return
	}
	if r.launches > 0 {
		r.early[pid] = st
	}
}

// Launch is a span of time in which the exit of a process that is not known yet
// is remembered.
type Launch struct {
	r    *Reaper
	once sync.Once
}

// Launch opens one; it must precede the start of the process, and Done must follow.
func (r *Reaper) Launch() *Launch {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.launches++
	return &Launch{r: r}
}

// Claim registers for the exit of pid, which may have happened since the launch
// began. The channel receives one status.
func (l *Launch) Claim(pid int) <-chan Status {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	ch := make(chan Status, 1)
	if st, ok := l.r.early[pid]; ok {
		delete(l.r.early, pid)
		ch <- st
		return ch
	}
	l.r.waiters[pid] = ch
	return ch
}

// Done ends the launch. It is idempotent.
func (l *Launch) Done() {
	l.once.Do(func() {
		l.r.mu.Lock()
		defer l.r.mu.Unlock()
		if l.r.launches--; l.r.launches == 0 {
			clear(l.r.early)
		}
	})
}

// Start runs path with argv as a child; the channel receives its status.
func (r *Reaper) Start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan Status, error) {
	l := r.Launch()
	defer l.Done()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", path, err)
	}
	return pid, l.Claim(pid), nil
}
