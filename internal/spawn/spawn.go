// SPDX-License-Identifier: Apache-2.0

// Package spawn starts child processes that die with their parent.
//
// The kernel ties a parent-death signal to the thread that forked the child
// (prctl(2), PR_SET_PDEATHSIG), and a network namespace to a thread as well. So
// children are forked by one thread that lives as long as they do: a Thread.
package spawn

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrClosed is returned by a Thread that was closed.
var ErrClosed = errors.New("spawn: thread is closed")

// Thread is an OS thread that forks children for others. The zero value is not
// usable; see NewThread.
type Thread struct {
	work chan func()
	done chan struct{}
}

// NewThread starts a thread. It ends with Close, and every child that it
// started with Start receives SIGKILL then.
func NewThread() *Thread {
	t := &Thread{work: make(chan func()), done: make(chan struct{})}
	go t.loop()
	return t
}

// loop never unlocks the thread, so the runtime ends it when loop returns and
// no other goroutine inherits its namespaces. The process's first thread is an
// exception: it outlives the goroutine locked to it, and the parent-death signal
// with it. So a goroutine that finds itself there keeps the place and lets
// another one, which then is on another thread, do the work.
func (t *Thread) loop() {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		go t.loop()
		<-t.done
		runtime.UnlockOSThread()
		return
	}
	for {
		select {
		case f := <-t.work:
			f()
		case <-t.done:
			return
		}
	}
}

// Do runs f on the thread and returns its error.
func (t *Thread) Do(f func() error) error {
	res := make(chan error, 1)
	select {
	case t.work <- func() { res <- f() }:
		return <-res
	case <-t.done:
		return ErrClosed
	}
}

// EnterNetNS moves the thread, and so every child that it starts afterwards,
// into the network namespace bound at path, or into a new one when path is
// empty. A new one lives as long as the thread or one of its children.
func (t *Thread) EnterNetNS(path string) error {
	return t.Do(func() error {
		if path == "" {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("new network namespace: %w", err)
			}
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return nil
	})
}

// Start starts cmd so that it is killed when the thread, and so when this
// process, ends. It overwrites Pdeathsig in cmd.SysProcAttr and keeps the rest.
// The signal survives a change of credentials because it is set after it.
func (t *Thread) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return t.Do(cmd.Start)
}

// Close ends the thread; children that still run are killed by the kernel.
// Calling it twice is a mistake and panics, as for a channel.
func (t *Thread) Close() { close(t.done) }
