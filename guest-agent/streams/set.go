// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// Config says where a process's stdio goes.
type Config struct {
	// Stdin, Stdout and Stderr are connections; the Set owns them. Nil: none.
	Stdin, Stdout, Stderr net.Conn
	// Terminal gives the process a terminal: stderr is then unused.
	Terminal bool
	// Poll keeps the streams for Read and Write; the connections are nil then.
	Poll bool
	// PipeSize is the capacity of pipes in bytes; 0 keeps the kernel's default.
	PipeSize int
}

// Set is the stdio of one process. The order of calls is New, then Started or
// Close; Exited when the process is gone; Close in the end.
type Set struct {
	cfg   Config
	child [3]int      // descriptors for the process; -1 once closed
	conns [3]net.Conn // guarded by park.mu; the host's ends
	flows [3]bool     // guarded by park.mu; there is, and will be, something to carry
	park  parking
	// The agent's ends, nil where there is none. With a terminal all are the
	// master. Set by New and Started, before anybody else has the Set.
	in       *os.File
	out      [2]*os.File
	console  *os.File
	taken    [2]tally
	reading  [2]chan struct{} // one token each: one reader at a time
	writing  chan struct{}
	pumps    sync.WaitGroup
	drained  chan struct{}  // closed when every output has ended
	ended    [2]atomic.Bool // of a polled Set: the end was read
	drainOne sync.Once
	stdinEnd sync.Once
	closing  sync.Once
}

// New makes the pipes. On an error nothing is left open but the connections.
func New(cfg Config) (*Set, error) {
	s := &Set{cfg: cfg, child: [3]int{-1, -1, -1}, conns: [3]net.Conn{cfg.Stdin, cfg.Stdout, cfg.Stderr}, park: newParking(), drained: make(chan struct{}), writing: make(chan struct{}, 1)}
	for i := range s.reading {
		s.reading[i] = make(chan struct{}, 1)
	}
	var err error
	s.in, err = s.open(0, cfg.Stdin)
	if err == nil {
		s.out[0], err = s.open(1, cfg.Stdout)
	}
	if err == nil {
		s.out[1], err = s.open(2, cfg.Stderr)
	}
	if err != nil {
		s.closeChild()
		s.closeAgent()
		return nil, fmt.Errorf("stdio pipes: %w", err)
	}
	return s, nil
}

// open makes the process's descriptor i and returns the agent's end.
func (s *Set) open(i int, c net.Conn) (*os.File, error) {
	if s.cfg.Terminal || (c == nil && !s.cfg.Poll) {
		fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
		s.child[i] = fd
		return nil, err
	}
	var p [2]int
	// The ends are separate file descriptions: only the agent's is non-blocking.
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	ours, theirs, name := p[0], p[1], "output"
	if i == 0 {
		ours, theirs, name = p[1], p[0], "stdin"
	}
	s.child[i] = theirs
	err := unix.SetNonblock(ours, true)
	if err == nil && s.cfg.PipeSize > 0 {
		_, err = unix.FcntlInt(uintptr(ours), unix.F_SETPIPE_SZ, s.cfg.PipeSize)
	}
	return os.NewFile(uintptr(ours), name), err
}

// Child is what the process's descriptors 0, 1 and 2 are to be. With a terminal
// they lead nowhere: the OCI engine replaces them by the terminal.
func (s *Set) Child() []uintptr {
	return []uintptr{uintptr(s.child[0]), uintptr(s.child[1]), uintptr(s.child[2])}
}

// Started begins to move data. console is the master of the process's terminal,
// nil without one; the Set owns it.
func (s *Set) Started(console *os.File) {
	s.closeChild()
	if console != nil {
		s.console, s.in, s.out[0] = console, console, console
	}
	if s.cfg.Poll {
		return
	}
	var outputs sync.WaitGroup
	for i := range s.out {
		if s.out[i] == nil {
			continue
		}
		outputs.Add(1)
		s.pump(1+i, func() {
			defer outputs.Done()
			s.pumpOut(1+i, s.out[i])
		})
	}
	s.pumps.Add(1)
	go func() {
		defer s.pumps.Done()
		outputs.Wait()
		close(s.drained)
	}()
	if s.in != nil && s.cfg.Stdin != nil {
		s.pump(0, func() {
			s.pumpIn()
			if s.console == nil {
				s.endStdin()
			}
			// A terminal has no end of file of its own; the copying just stops.
		})
	}
}

// pump runs the carrying of stream i.
func (s *Set) pump(i int, f func()) {
	s.park.mu.Lock()
	s.flows[i] = true
	s.park.mu.Unlock()
	s.park.begin()
	s.pumps.Add(1)
	go func() {
		defer s.pumps.Done()
		defer s.park.end()
		f()
	}()
}

func (s *Set) endStdin() {
	s.stdinEnd.Do(func() {
		if s.in != nil && s.console == nil {
			s.in.Close()
		}
		s.ends(0)
	})
}

// Exited ends stdin, whose reader is gone. Output goes on for as long as a
// descendant holds it open.
func (s *Set) Exited() {
	if !s.cfg.Poll {
		s.endStdin()
	}
}

// Written is how many bytes have been written to stdout and stderr so far, whether
// they have reached the host or not; all ones for a terminal, which cannot tell: what
// is written last may still be on its way through the kernel (tty_buffer.c), and it
// ends with its first process. A polled Set, of a host that asks for each byte, says 0.
func (s *Set) Written() (n [2]uint64) {
	switch {
	case s.cfg.Poll:
	case s.console != nil:
		n[0] = math.MaxUint64
	default:
		for i, f := range s.out {
			if f != nil {
				n[i] = s.taken[i].written(f)
			}
		}
	}
	return n
}

// Drained is closed when all output has been handed to the host, its end included.
func (s *Set) Drained() <-chan struct{} { return s.drained }

// Polled says whether Read and Write are the way to this process's stdio.
func (s *Set) Polled() bool { return s.cfg.Poll }

// Read returns at least one and at most n bytes of stdout (or stderr); none and
// no error at the end. The pipe itself is the buffer, so nothing is lost and a
// process that writes too much waits.
func (s *Set) Read(ctx context.Context, stderr bool, n int) ([]byte, error) {
	i := 0
	if stderr {
		i = 1
	}
	f := s.out[i]
	if !s.cfg.Poll {
		return nil, fault.New(fault.FailedPrecondition, "output of this process goes to a stream connection")
	}
	if f == nil {
		return nil, nil
	}
	if err := acquire(ctx, s.reading[i]); err != nil {
		return nil, err
	}
	defer release(s.reading[i])
	// Never more than a pipe holds: the length is the host's word.
	buf := make([]byte, min(max(n, 1), bufSize))
	restore := interrupt(ctx, f.SetReadDeadline)
	k, err := f.Read(buf)
	restore()
	switch {
	case k > 0:
		return buf[:k], nil
	case errors.Is(err, io.EOF), errors.Is(err, unix.EIO), errors.Is(err, os.ErrClosed):
		s.ended[i].Store(true)
		if s.ended[0].Load() && (s.console != nil || s.ended[1].Load()) {
			s.drainOne.Do(func() { close(s.drained) })
		}
		return nil, nil
	}
	return nil, fmt.Errorf("read output: %w", err)
}

// Write gives data to the process's stdin, waiting while it does not read.
func (s *Set) Write(ctx context.Context, data []byte) (int, error) {
	if !s.cfg.Poll || s.in == nil {
		return 0, fault.New(fault.FailedPrecondition, "stdin of this process is not written by request")
	}
	if err := acquire(ctx, s.writing); err != nil {
		return 0, err
	}
	defer release(s.writing)
	restore := interrupt(ctx, s.in.SetWriteDeadline)
	n, err := s.in.Write(data)
	restore()
	if err != nil {
		return n, fault.New(fault.FailedPrecondition, "write stdin: %w", err)
	}
	return n, nil
}

// interrupt makes a blocked call of a file return when ctx is done, by a deadline
// in the past. restore takes that back once it can no longer happen, so that the
// next caller does not meet this one's deadline.
func interrupt(ctx context.Context, setDeadline func(time.Time) error) (restore func()) {
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		_ = setDeadline(time.Unix(1, 0)) // a closed file needs none
	})
	return func() {
		if !stop() {
			<-fired
			_ = setDeadline(time.Time{})
		}
	}
}

func acquire(ctx context.Context, token chan struct{}) error {
	select {
	case token <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func release(token chan struct{}) { <-token }

// CloseStdin is the end of file for the process; on a terminal it does nothing,
// as its end of file is a character that the user types.
func (s *Set) CloseStdin() {
	if s.console == nil {
		s.endStdin()
	}
}

// Resize sets the size of the terminal in characters.
func (s *Set) Resize(rows, cols uint32) error {
	if s.console == nil {
		return fault.New(fault.FailedPrecondition, "the process has no terminal")
	}
	rc, err := s.console.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = rc.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(rows), Col: uint16(cols)})
	})
	if err = errors.Join(err, ierr); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// Close ends everything. It first gives output that is on its way until ctx is
// done to reach the host, and returns when no goroutine is left.
func (s *Set) Close(ctx context.Context) {
	s.closing.Do(func() {
		close(s.park.gone)
		s.closeChild()
		s.endStdin()
		if !s.cfg.Poll {
			select {
			case <-s.drained:
			case <-ctx.Done():
			}
		}
		s.ends(1)
		s.ends(2)
		s.closeAgent()
	})
	s.pumps.Wait()
}

// Abort is Close for a process that never started.
func (s *Set) Abort() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.Close(ctx)
}

func (s *Set) closeChild() {
	for i, fd := range s.child {
		if fd >= 0 {
			unix.Close(fd)
			s.child[i] = -1
		}
	}
}

func (s *Set) closeAgent() {
	for _, f := range []*os.File{s.in, s.out[0], s.out[1]} {
		if f != nil {
			f.Close() // the console is listed twice; the second time is refused harmlessly
		}
	}
}
