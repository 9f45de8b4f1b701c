// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/agentclient"
)

// Bounds on the waits for output after the process has ended.
const (
	// drainQuiet, of Delete: no byte has moved for this long since the exit. A grandchild holds
	// the stream open, or nobody reads it.
	drainQuiet = 5 * time.Second
	// drainMax bounds the wait for a reader that goes on reading, but slowly.
	drainMax = 30 * time.Second
	// drainBytes is more than a stream has under way between a process and the
	// reader: two pipes of 256 KiB at most, the connection's credit, and the buffers
	// of both sides. What comes after as many was written after the exit.
	drainBytes = 4 << 20
	// settleQuiet and settleMax bound the wait before the exit is told in the same way.
	// Only a client that does not read comes to them.
	settleQuiet = time.Second
	settleMax   = 10 * time.Second
	// drainReader: of an ended stream bytes are left in the pipe, and nobody has it
	// open for reading. A containerd that has come back opens it before it deletes.
	drainReader = time.Second
)

var (
	errHeldOpen = errors.New("output is still held open after the process has ended")
	errNoReader = errors.New("nobody reads the output's pipe")
)

// stdio copies between a process's streams and containerd's pipes. Pipes are
// held open both ways, so that a client or containerd itself can come and go.
//
//	openStdio ──> opened ──connect──> copying ──drain──> drained
//	                └──────────close──────┴────close────────┴──> closed
type stdio struct {
	host    *stdioHost
	out     [2]*os.File // of stdout and stderr, nil where there is none
	drivers []*logDriver

	mu       sync.Mutex
	streams  *agentclient.Stdio // guarded by mu; nil before connect
	copies   []*outCopy         // guarded by mu
	stdin    *os.File           // guarded by mu; our read end
	keepOpen *os.File           // guarded by mu; our write end of stdin's pipe, until CloseIO
	workers  sync.WaitGroup     // every goroutine of connect
}

// stdioHost is what the streams of all processes need of their shim.
type stdioHost struct {
	// namespace is containerd's, which log drivers are told.
	namespace string
	log       *slog.Logger
	// record writes a child into the ledger; forget strikes it out again.
	record func(name string, pid int) (forget func(), err error)

	mu      sync.Mutex
	drivers map[*logDriver]bool // guarded by mu; those that run
}

// openStdio opens the host's side of a process's streams and starts its log
// drivers; id is the exec id, or the container's for its first process.
func (h *stdioHost) openStdio(id string, paths stdioPaths) (_ *stdio, err error) {
	t, err := paths.targets()
	if err != nil {
		return nil, err
	}
	s := &stdio{host: h}
	defer func() {
		if err != nil {
			s.abort()
		}
	}()
	if t[0].scheme != "" {
		if s.stdin, s.keepOpen, err = openInput(t[0]); err != nil {
			return nil, fmt.Errorf("stdin: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	for i, name := range [2]string{"stdout", "stderr"} {
		to := t[i+1]
		switch {
		case to.scheme == "", i == 1 && to.scheme == schemeBinary && to.same(t[1]): // has one already
		case to.scheme == schemeBinary:
			err = s.addDriver(id, to, [2]bool{to.same(t[1]), to.same(t[2])})
		default:
			s.out[i], err = openOutput(to)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
	}
	return s, nil
}

func (s *stdio) addDriver(id string, t target, carries [2]bool) error {
	d, err := s.host.startDriver(id, t, carries)
	if err != nil {
		return err
	}
	s.drivers = append(s.drivers, d)
	for i, w := range d.pipes {
		if w != nil {
			s.out[i] = w
		}
	}
	return nil
}

// ready waits until the log drivers are.
func (s *stdio) ready(ctx context.Context) error {
	for _, d := range s.drivers {
		if err := d.waitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// connect starts copying; the streams are this stdio's from here on. The log
// drivers are ready.
func (s *stdio) connect(streams *agentclient.Stdio) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams = streams
	for i, from := range [2]io.ReadCloser{streams.Stdout, streams.Stderr} {
		if from == nil || s.out[i] == nil {
			continue
		}
		c := newOutCopy(s.out[i], from)
		c.stream = i
		s.copies = append(s.copies, c)
		s.workers.Go(func() {
			if err := c.run(); err != nil && s.host.log != nil {
				s.host.log.Warn("output is dropped from here on", "stream", [2]string{"stdout", "stderr"}[i], "error", err)
			}
		})
	}
	if streams.Stdin != nil && s.stdin != nil {
		from := s.stdin
		s.workers.Go(func() { s.copyIn(from, streams.Stdin) })
	}
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// closeStdin lets the process read end of file once the client has closed its
// end and everything before is read.
func (s *stdio) closeStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.keepOpen)
}

// drain waits until everything that an ended process wrote was handed on: until
// its streams end, or as long as drainQuiet, drainMax and drainBytes allow.
func (s *stdio) drain(ctx context.Context, exited time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, laterOf(exited.Add(drainMax), time.Now().Add(drainQuiet)))
	defer cancel()
	s.mu.Lock()
	copies := s.copies
	s.mu.Unlock()
	for _, c := range copies {
		c.lastBytes(drainBytes)
	}
	var held error
	for _, c := range copies {
		if err := c.wait(ctx, c.done, exited, drainQuiet); err != nil {
			held = err
		}
	}
	ctx, cancelReader := context.WithTimeout(ctx, drainReader)
	defer cancelReader()
	for _, c := range copies {
		r := c.kept()
		if r == nil || r.empty || held != nil {
			continue // a client that waits for the end of a silent stream has not called Delete
		}
		select {
		case <-r.taken:
		case <-ctx.Done():
			held = errNoReader
		}
	}
	return held
}

// settle waits until what a process had written to its stdout and stderr when it ended
// is in the pipes, as long as settleQuiet and settleMax allow. It comes before the exit
// is told: containerd's client closes its ends when it hears of that and has no more
// (pkg/cio/io_unix.go, copyIO's cancel, which client.Task.Delete calls before the shim
// hears of the delete). What grandchildren write later delays nothing.
func (s *stdio) settle(e sandbox.Exit) {
	ctx, cancel := context.WithTimeout(context.Background(), settleMax)
	defer cancel()
	s.mu.Lock()
	copies := s.copies
	s.mu.Unlock()
	for _, c := range copies {
		_ = c.wait(ctx, c.await(e.Written[c.stream]), e.At, settleQuiet) // Delete says what was cut
	}
}

func laterOf(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// close drops what is left – what no client reads would wait in its pipe for
// ever –, and ends the log drivers, which get time for what they have. It returns
// when no goroutine and no process is left.
func (s *stdio) close() { s.end(driverEndTimeout) }

// abort is close for a process that does not come to be.
func (s *stdio) abort() { s.end(0) }

func (s *stdio) end(patience time.Duration) {
	s.mu.Lock()
	closeAll(s.stdin, s.keepOpen)
	streams, copies := s.streams, s.copies
	s.mu.Unlock()
	for _, c := range copies {
		c.drop()
	}
	closeAll(s.out[:]...)
	if streams != nil {
		streams.Close()
	}
	s.workers.Wait()
	for _, d := range s.drivers {
		d.end(patience)
	}
}
