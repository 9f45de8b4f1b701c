// SPDX-License-Identifier: Apache-2.0

// Package engine makes containers and processes in them, through an OCI engine.
// What needs no engine (signals, limits, statistics, pausing) is not here: the
// agent does that itself through cgroup and process files.
package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/reaper"
)

// Engine is an OCI engine. It is safe for concurrent use.
type Engine interface {
	// Create makes a container whose init waits for Start.
	Create(ctx context.Context, c Create) (*Process, error)
	// Start lets the init of a created container execute its program. hooks says
	// that poststart hooks are to be run.
	Start(ctx context.Context, id string, hooks bool) error
	// Exec runs one more process in a started container.
	Exec(ctx context.Context, e Exec) (*Process, error)
	// Delete forgets a container whose processes are gone. hooks says that
	// poststop hooks are to be run. It is idempotent.
	Delete(ctx context.Context, id string, hooks bool) error
}

// Create describes a container.
type Create struct {
	ID     string
	Bundle string // directory of the container's own; config.json is written there
	Spec   *specs.Spec
	Cgroup *os.File // directory of the cgroup that it is born in
	Stdio  []uintptr
}

// Exec describes a process to run in a container.
type Exec struct {
	ID     string
	Bundle string
	Name   string // file name prefix, unique in the bundle
	Spec   *specs.Process
	Cgroup *os.File
	Stdio  []uintptr
}

// Process is a process that an engine left running. Exit receives its status
// once; Console is the master of its terminal, nil without one.
type Process struct {
	PID     int
	Exit    <-chan reaper.Status
	Console *os.File

	mu    sync.RWMutex // a signal is in flight while it is read-locked
	pidfd int          // guarded by mu; -1: dead before it could be opened, or released
}

// NewProcess describes the process pid, which must be a child claimed in an open
// launch, so that pid cannot mean another one.
func NewProcess(pid int, exit <-chan reaper.Status, console *os.File) *Process {
	p := &Process{PID: pid, Exit: exit, Console: console, pidfd: -1}
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		p.pidfd = fd
	}
	return p
}

// Signal sends a signal to this process and to no other that has its number
// since. A process that is gone is NotFound.
func (p *Process) Signal(sig unix.Signal) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	err := error(unix.ESRCH)
	if p.pidfd >= 0 {
		err = unix.PidfdSendSignal(p.pidfd, sig, nil, 0)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ESRCH):
		return fault.New(fault.NotFound, "process %d has finished: %w", p.PID, err)
	case errors.Is(err, unix.EINVAL):
		return fault.New(fault.InvalidArgument, "signal %d: %w", int(sig), err)
	}
	return fmt.Errorf("signal %d to process %d: %w", int(sig), p.PID, err)
}

// Release closes the handle of a process that is gone. Signal answers NotFound afterwards.
func (p *Process) Release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
		p.pidfd = -1
	}
}
