// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/agentclient"
)

// killedStatus is the exit status of a process whose machine ended: 128 + SIGKILL.
const killedStatus = 137

// neverRanStatus is what containerd reports of an exec that never ran.
const neverRanStatus = 255

// Exit is how a process ended.
type Exit struct {
	// Status is the exit code, or 128 plus the signal's number.
	Status uint32
	// At is when the host learnt of it.
	At time.Time
	// Written is how many bytes of its stdout and stderr are from before its end, as
	// far as the guest tells: 0 for none or not known, all ones for all until the end.
	Written [2]uint64
}

// Process is a container's first process, or one that was added by Exec.
type Process struct {
	c *Container
	// id is the exec id; the container's id for its first process.
	id    string
	spec  *specs.Process
	wants agentclient.StdioWants

	done chan struct{} // closed when the process has ended

	mu    sync.Mutex
	state State              // guarded by mu
	exit  Exit               // guarded by mu; valid once done is closed
	stdio *agentclient.Stdio // guarded by mu; nil until the guest has the process
	pid   uint32             // guarded by mu; its number in the guest, 0 if that is not known
	// launching is set while the guest is asked to run an added process; killed,
	// when somebody has killed it meanwhile.
	launching, killed bool // guarded by mu
}

func newProcess(c *Container, id string, spec *specs.Process, wants agentclient.StdioWants) *Process {
	if spec.Terminal {
		wants.Stderr = false // a terminal has one output
	}
	return &Process{c: c, id: id, spec: spec, wants: wants, done: make(chan struct{})}
}

// guestID is its exec id in the guest.
func (p *Process) guestID() string {
	if p == p.c.init {
		return p.c.guest
	}
	return p.id
}

// Terminal tells whether the process has one.
func (p *Process) Terminal() bool { return p.spec.Terminal }

// Stdio are the process's streams; nil before the guest has the process.
func (p *Process) Stdio() *agentclient.Stdio {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stdio
}

// GuestPID is the process's number in the guest, 0 before the guest has the
// process and with an agent that does not tell (see protocols.FeaturePIDs).
func (p *Process) GuestPID() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid
}

// made records what the guest has made of the process.
func (p *Process) made(stdio *agentclient.Stdio, pid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stdio, p.pid = stdio, pid
}

// State of the process.
func (p *Process) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// Done is closed when the process has ended; Exit is valid then.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit is how the process ended, the zero value before.
func (p *Process) Exit() Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// to makes a transition of the table in state.go.
func (p *Process) to(s State) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := checkTransition("process "+p.id, p.state, s); err != nil {
		return err
	}
	p.state = s
	return nil
}

// ended records the first end that is reported.
func (p *Process) ended(status uint32, written ...uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == Stopped || p.state == Deleted {
		return
	}
	p.state = Stopped
	p.exit = Exit{Status: status, At: time.Now()}
	copy(p.exit.Written[:], written)
	close(p.done)
}

// wait holds the one outstanding WaitProcess of the process. It ends with the
// process or the machine.
func (p *Process) wait(m *machine) {
	resp, err := m.agent.WaitProcess(m.ctx, &agentpb.WaitProcessRequest{ContainerId: p.c.guest, ExecId: p.guestID()})
	if err != nil {
		if !m.ending() {
			p.c.s.o.Log.Error("wait for process", "container", p.c.id, "exec", p.id, "error", m.agent.Err(err))
		}
		p.ended(killedStatus)
		return
	}
	if p == p.c.init {
		p.c.collect(m)
	}
	p.ended(uint32(resp.Status), resp.StdoutBytes, resp.StderrBytes)
}

// Signal sends a signal. all reaches every process of the container and is
// valid for its first process only.
func (p *Process) Signal(ctx context.Context, signal uint32, all bool) error {
	switch p.State() {
	case Stopped, Deleted:
		return fmt.Errorf("process %s has finished: %w", p.id, errdefs.ErrNotFound)
	case Created:
		if p != p.c.init {
			return fmt.Errorf("process %s has not started: %w", p.id, errdefs.ErrFailedPrecondition)
		}
	}
	m, err := p.c.s.running()
	if err != nil {
		return err
	}
	// Noted before the guest is told: it may hear of the signal before the process.
	killed := signal == uint32(unix.SIGKILL) && p.killLaunch()
	req := &agentpb.SignalProcessRequest{ContainerId: p.c.guest, ExecId: p.guestID(), Signal: signal}
	if all {
		req.ExecId = "" // agent-protocol facts, part A: the whole container
	}
	if err = m.signal(ctx, req); killed && errdefs.IsNotFound(err) {
		return nil // it will be killed as soon as it runs
	}
	return err
}

// killAnswer is how long a guest may take to answer a KILL, which it passes on to
// its kernel. One that does not hangs, and nothing in it would ever end: the pod
// could not be removed.
var killAnswer = 30 * time.Second

var errKillAnswer = errors.New("the guest hangs")

// signal sends a signal; a guest that does not take a KILL is ended with all its processes.
func (m *machine) signal(ctx context.Context, req *agentpb.SignalProcessRequest) error {
	if req.Signal != uint32(unix.SIGKILL) {
		_, err := m.agent.SignalProcess(ctx, req)
		return m.agent.Err(err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, killAnswer, errKillAnswer)
	defer cancel()
	_, err := m.agent.SignalProcess(ctx, req)
	if err != nil && errors.Is(context.Cause(ctx), errKillAnswer) {
		m.endHung(fmt.Errorf("%w: it has not answered a KILL for %v", errKillAnswer, killAnswer))
		return nil
	}
	return m.agent.Err(err)
}

// killLaunch notes that an added process that is being launched is not wanted any more.
func (p *Process) killLaunch() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = p.killed || p.launching
	return p.launching
}

// Resize sets the size of the process's terminal, in characters.
func (p *Process) Resize(ctx context.Context, width, height uint32) error {
	if !p.spec.Terminal {
		return fmt.Errorf("process %s has no terminal: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	if state := p.State(); state == Stopped || state == Deleted {
		return fmt.Errorf("process %s is %s and has no terminal any more: %w", p.id, state, errdefs.ErrFailedPrecondition)
	}
	if p.Stdio() == nil { // an exec that has not started: its terminal begins with this size
		p.mu.Lock()
		defer p.mu.Unlock()
		p.spec.ConsoleSize = &specs.Box{Width: uint(width), Height: uint(height)}
		return nil
	}
	m, err := p.c.s.running()
	if err != nil {
		return err
	}
	_, err = m.agent.TtyWinResize(ctx, &agentpb.TtyWinResizeRequest{ContainerId: p.c.guest, ExecId: p.guestID(), Row: height, Column: width})
	return m.agent.Err(err)
}

// startExec runs an added process.
func (p *Process) startExec(ctx context.Context) error {
	m, err := p.c.s.running()
	if err == nil {
		err = p.c.takesExec()
	}
	if err != nil {
		p.ended(neverRanStatus)
		return err
	}
	if err := p.toLaunching(); err != nil {
		return err
	}
	err = p.launch(ctx, m)
	killed := p.launched()
	switch {
	case err != nil && killed:
		p.ended(killedStatus)
		return err
	case err != nil:
		p.ended(neverRanStatus)
		return err
	case killed:
		p.killLate(ctx, m)
	}
	if !m.work(func() { p.wait(m) }) {
		p.ended(killedStatus) // the machine has ended meanwhile
	}
	return nil
}

func (p *Process) launch(ctx context.Context, m *machine) error {
	stdio, err := m.agent.OpenStdio(ctx, p.c.guest, p.guestID(), p.wants)
	if err != nil {
		return err
	}
	in, out, errp := stdio.Ports()
	resp, err := m.agent.ExecProcess(ctx, &agentpb.ExecProcessRequest{
		ContainerId: p.c.guest, ExecId: p.guestID(), Process: wireProcess(guestProcess(p.spec)), StdinPort: in, StdoutPort: out, StderrPort: errp,
	})
	if err != nil {
		stdio.Close()
		if ctx.Err() != nil { // only this side has given up
			m.work(func() { p.abandon(m) })
		}
		return m.agent.Err(err)
	}
	p.made(stdio, resp.GetPid())
	return nil
}

// toLaunching makes the process Running, and a KILL from here on one of a launch.
func (p *Process) toLaunching() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := checkTransition("process "+p.id, p.state, Running); err != nil {
		return err
	}
	p.state, p.launching = Running, true
	return nil
}

// launched ends what toLaunching began and tells whether the process was killed meanwhile.
func (p *Process) launched() (killed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.launching = false
	return p.killed
}

// killLate kills a process that was killed before the guest knew it.
func (p *Process) killLate(ctx context.Context, m *machine) {
	err := m.signal(ctx, &agentpb.SignalProcessRequest{ContainerId: p.c.guest, ExecId: p.guestID(), Signal: uint32(unix.SIGKILL)})
	if err != nil && !errdefs.IsNotFound(err) {
		p.c.s.o.Log.Warn("kill a process that was killed before it ran", "container", p.c.id, "exec", p.id, "error", err)
	}
}

// abandon ends, in the guest, a process whose launch was not waited for, and
// takes its status, so that the guest forgets it. It ends with the process or the machine.
func (p *Process) abandon(m *machine) {
	_, err := m.agent.SignalProcess(m.ctx, &agentpb.SignalProcessRequest{ContainerId: p.c.guest, ExecId: p.guestID(), Signal: uint32(unix.SIGKILL)})
	if err == nil {
		_, _ = m.agent.WaitProcess(m.ctx, &agentpb.WaitProcessRequest{ContainerId: p.c.guest, ExecId: p.guestID()}) // an error: it never ran
	}
}
