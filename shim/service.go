// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-v2/kata/sandbox"
)

// service is the Task API over a sandbox. Calls are in task.go.
type service struct {
	sb    *sandbox.Sandbox
	pub   *publisher
	log   *slog.Logger
	stdio *stdioHost
	done  chan struct{} // closed by Shutdown

	// oldStats makes Stats answer in the form of cgroup v1; set before serving.
	oldStats bool

	once sync.Once
	exit sync.WaitGroup // the watchers of processes

	mu    sync.Mutex
	tasks map[string]*taskState // guarded by mu; container id → its task
}

func newService(sb *sandbox.Sandbox, pub *publisher, log *slog.Logger) *service {
	return &service{sb: sb, pub: pub, log: log, stdio: &stdioHost{log: log}, done: make(chan struct{}), tasks: map[string]*taskState{}}
}

// taskState is what containerd's view of a container adds to the sandbox's.
type taskState struct {
	c      *sandbox.Container
	bundle string
	pid    uint32

	mu    sync.Mutex
	procs map[string]*procState // guarded by mu; exec id, "" for the first process
}

// procState is one process of a task.
type procState struct {
	p     *sandbox.Process
	id    string // exec id, "" for the first process
	paths stdioPaths

	mu       sync.Mutex
	io       *stdio        // guarded by mu; nil before the guest has the process
	ended    bool          // guarded by mu; CloseIO came, maybe before io
	starting chan struct{} // guarded by mu; closed when a Start under way has published its event
	told     chan struct{} // guarded by mu; closed when the exit was published, nil before watch
}

func (s *service) task(id string) (*taskState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.tasks[id]; ok {
		return t, nil
	}
	return nil, fmt.Errorf("task %s: %w", id, errdefs.ErrNotFound)
}

// proc finds a process of a task.
func (s *service) proc(id, exec string) (*taskState, *procState, error) {
	t, err := s.task(id)
	if err != nil {
		return nil, nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.procs[exec]; ok {
		return t, p, nil
	}
	return nil, nil, fmt.Errorf("exec %s in task %s: %w", exec, id, errdefs.ErrNotFound)
}

// live are the task's first process and the added ones that run, in the order of
// their exec ids.
func (t *taskState) live() []*procState {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := []*procState{t.procs[""]}
	for _, id := range slices.Sorted(maps.Keys(t.procs)) {
		if p := t.procs[id]; id != "" && p.p.State() == sandbox.Running {
			out = append(out, p)
		}
	}
	return out
}

// watch publishes a process's end, after the event of its start if that is under way.
func (s *service) watch(t *taskState, p *procState) {
	told := make(chan struct{})
	p.mu.Lock()
	p.told = told
	p.mu.Unlock()
	s.exit.Go(func() {
		defer close(told)
		<-p.p.Done()
		p.mu.Lock()
		starting := p.starting
		p.mu.Unlock()
		if starting != nil {
			<-starting
		}
		if p.id == "" {
			t.execsTold()
		}
		e := p.p.Exit()
		if io := p.stdio(); io != nil {
			io.settle(e)
		}
		id := p.id
		if id == "" {
			id = t.c.ID()
		}
		s.pub.publish(topicExit, &events.TaskExit{
			ContainerID: t.c.ID(), ID: id, Pid: t.pid, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At),
		})
	})
}

// execEnds bounds the wait of a container's exit for those of its execs.
const execEnds = 2 * time.Second

// execsTold waits until the ends of the execs were published. They end with the first
// process, by the guest's kernel or its agent, and their clients would lose them with
// the task (containerd cmd/containerd-shim-runc-v2/task, handleInitExit).
func (t *taskState) execsTold() {
	t.mu.Lock()
	execs := slices.Collect(maps.Values(t.procs))
	t.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), execEnds)
	defer cancel()
	for _, p := range execs {
		if p.id != "" {
			p.exitTold(ctx)
		}
	}
}

// exitTold waits until the end of an ended process was published, or ctx is done.
func (p *procState) exitTold(ctx context.Context) {
	p.mu.Lock()
	told := p.told
	p.mu.Unlock()
	if told == nil {
		return
	}
	select {
	case <-told:
	case <-ctx.Done():
	}
}

// beginStart marks a Start under way; the returned function ends it.
func (p *procState) beginStart() func() {
	ch := make(chan struct{})
	p.mu.Lock()
	p.starting = ch
	p.mu.Unlock()
	return func() { close(ch) }
}

// attach connects the process's streams to containerd's pipes; it takes over io.
func (p *procState) attach(io *stdio) {
	streams := p.p.Stdio()
	if streams == nil {
		io.abort()
		return
	}
	io.connect(streams)
	p.mu.Lock()
	p.io = io
	ended := p.ended
	p.mu.Unlock()
	if ended {
		io.closeStdin()
	}
}

// closeStdin may come before the process starts: a client copies its input from
// Exec on.
func (p *procState) closeStdin() {
	p.mu.Lock()
	p.ended = true
	io := p.io
	p.mu.Unlock()
	if io != nil {
		io.closeStdin()
	}
}

func (p *procState) stdio() *stdio {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.io
}

// finishIO waits for the output of an ended process and drops its pipes.
func (p *procState) finishIO(ctx context.Context, log *slog.Logger) {
	io := p.stdio()
	if io == nil {
		return
	}
	if err := io.drain(ctx, p.p.Exit().At); err != nil {
		log.Warn("output was cut", "exec", p.id, "error", err)
	}
	io.close()
}

// endIfAbandoned ends the daemon when containerd's connection closed while it made
// the pod's first container: nobody may ever ask for its end. (After a restart,
// containerd 1.6 keeps such a shim for ever; later ones end it, and find it gone.)
func (s *service) endIfAbandoned(ctx context.Context) {
	if !errors.Is(ctx.Err(), context.Canceled) || !s.sb.Idle() {
		return
	}
	s.log.Info("ending: containerd went away before there was a container")
	s.once.Do(func() { close(s.done) })
}

// close ends what the service holds once the sandbox has ended.
func (s *service) close(ctx context.Context) error {
	ended := make(chan struct{})
	go func() { s.exit.Wait(); close(ended) }()
	s.stdio.close(ctx)
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("exit events: %w", ctx.Err())
	}
}
