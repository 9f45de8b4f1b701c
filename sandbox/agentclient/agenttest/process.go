// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/kata-v2/kata/hypervisor/vsock"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// Program is what a process runs; it returns the exit status. It must return
// once Killed is closed.
type Program func(*Process) int32

// Process is a running one, as its program sees it.
type Process struct {
	// Args are its arguments, the program's name first.
	Args []string
	// Stdin ends at once where there is none; Stdout and Stderr swallow there.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Signals yields the signals sent to it except SIGKILL.
	Signals <-chan uint32
	// Killed is closed by SIGKILL and by the machine's end.
	Killed <-chan struct{}

	keep atomic.Bool
}

// KeepOutput leaves stdout and stderr open when the process ends, as a
// grandchild does that has inherited them.
func (p *Process) KeepOutput() { p.keep.Store(true) }

const sigkill = 9

// builtin are programs that tests often need.
var builtin = map[string]Program{
	"true": func(*Process) int32 { return 0 },
	"exit": func(p *Process) int32 { n, _ := strconv.Atoi(p.Args[1]); return int32(n) },
	"echo": func(p *Process) int32 { fmt.Fprintln(p.Stdout, p.Args[1]); return 0 },
	"cat":  func(p *Process) int32 { _, _ = io.Copy(p.Stdout, p.Stdin); return 0 },
	// sleep ends by a signal only.
	"sleep": func(p *Process) int32 {
		select {
		case s := <-p.Signals:
			return 128 + int32(s)
		case <-p.Killed:
			return 128 + sigkill
		}
	},
}

// process is the agent's side of a Process.
type process struct {
	p       *Process
	program Program
	stdin   net.Conn // or nil
	in      *io.PipeWriter
	out     [2]output
	written [2]atomic.Uint64 // bytes that the program wrote to out
	signals chan uint32
	killed  chan struct{}
	done    chan struct{}

	mu      sync.Mutex
	started bool
	ended   bool
	status  int32
	once    sync.Once // closes killed
}

// output is where stdout or stderr goes: a stream, a buffer to be polled, or nowhere.
type output interface {
	io.Writer
	io.Closer
}

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (nowhere) Close() error                { return nil }

// counted counts what is written.
type counted struct {
	io.Writer
	n *atomic.Uint64
}

func (c counted) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n.Add(uint64(n))
	return n, err
}

func newProcess(program Program, spec *agentpb.Process) *process {
	p := &process{
		program: program, signals: make(chan uint32, 64), killed: make(chan struct{}), done: make(chan struct{}),
		out: [2]output{nowhere{}, nowhere{}},
	}
	p.p = &Process{Args: spec.Args, Stdin: bytes.NewReader(nil), Signals: p.signals, Killed: p.killed}
	return p
}

// run starts the program; its end is the process's.
func (p *process) run() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.started = true
	p.p.Stdout, p.p.Stderr = counted{p.out[0], &p.written[0]}, counted{p.out[1], &p.written[1]}
	go func() { p.end(p.program(p.p)) }()
}

// end is the first of the program's return and SIGKILL.
func (p *process) end(status int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended, p.status = true, status
	if p.stdin != nil {
		_ = p.stdin.Close()
	}
	if !p.p.keep.Load() {
		for _, o := range p.out {
			_ = o.Close()
		}
	}
	close(p.done)
}

func (p *process) signal(s uint32) {
	p.mu.Lock()
	started := p.started
	p.mu.Unlock()
	if s == sigkill || !started {
		p.once.Do(func() { close(p.killed) })
		p.end(128 + int32(s))
		return
	}
	p.signals <- s
}

// streams pairs stdio connections with the requests that name them.
type streams struct {
	mu    sync.Mutex
	ports map[uint32]chan net.Conn // guarded by mu; made by whoever comes first
}

func (s *streams) port(n uint32) chan net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ports == nil {
		s.ports = map[uint32]chan net.Conn{}
	}
	if s.ports[n] == nil {
		s.ports[n] = make(chan net.Conn, 1)
	}
	return s.ports[n]
}

func (s *streams) forget(n uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ports, n)
}

func (s *streams) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s.port(c.RemoteAddr().(vsock.Addr).Port) <- c
	}
}

// buffer is polled output: Read waits for data or the end.
type buffer struct {
	mu    sync.Mutex
	cond  *sync.Cond
	data  []byte
	ended bool
}

func newBuffer() *buffer {
	b := &buffer{}
	b.cond = sync.NewCond(&b.mu)
	return b
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return 0, errors.New("the output is closed")
	}
	b.data = append(b.data, p...)
	b.cond.Broadcast()
	return len(p), nil
}

func (b *buffer) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	b.cond.Broadcast()
	return nil
}

// next is up to n bytes, empty at the end.
func (b *buffer) next(n uint32) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.data) == 0 && !b.ended {
		b.cond.Wait()
	}
	k := min(int(n), len(b.data))
	out := b.data[:k:k]
	b.data = b.data[k:]
	return out
}
