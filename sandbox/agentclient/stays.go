// SPDX-License-Identifier: Apache-2.0

package agentclient

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
)

// stays are the stdio streams of a machine that can be saved: they outlive their
// connections. What the guest has sent before a connection ends is kept here, at
// most a stream's window, until it is read.
type stays struct {
	mu  sync.Mutex
	all map[*Stdio]bool // guarded by mu
}

// add gives a process's streams their first connections; nil is no stream.
func (s *stays) add(st *Stdio, conns [3]net.Conn) {
	if conns[0] != nil {
		st.Stdin = &inStream{stay: newStay(conns[0])}
	}
	if conns[1] != nil {
		st.Stdout = &outStream{stay: newStay(conns[1])}
	}
	if conns[2] != nil {
		st.Stderr = &outStream{stay: newStay(conns[2])}
	}
	s.keep(st)
}

// expect makes streams that wait for their connections.
func (s *stays) expect(st *Stdio, w StdioWants) {
	if w.Stdin {
		st.Stdin = &inStream{stay: newStay(nil)}
	}
	if w.Stdout {
		st.Stdout = &outStream{stay: newStay(nil)}
	}
	if w.Stderr {
		st.Stderr = &outStream{stay: newStay(nil)}
	}
	s.keep(st)
}

func (s *stays) keep(st *Stdio) {
	st.stays = s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all[st] = true
}

func (s *stays) remove(st *Stdio) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, st)
}

// end is the end of streams whose next connection will never come.
func (s *stays) end() {
	for _, st := range s.list() {
		if in := st.in(); in != nil && in.parking() {
			in.drop()
		}
		for _, o := range st.outs() {
			if o.parking() {
				o.drop()
			}
		}
	}
}

func (s *stays) list() (out []*Stdio) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.all {
		out = append(out, st)
	}
	return out
}

// in and outs are the streams, those that there are.
func (s *Stdio) in() *inStream { in, _ := s.Stdin.(*inStream); return in }

func (s *Stdio) outs() (out []*outStream) {
	for _, r := range []io.ReadCloser{s.Stdout, s.Stderr} {
		if o, ok := r.(*outStream); ok {
			out = append(out, o)
		}
	}
	return out
}

// stay is one stream.
type stay struct {
	turn chan struct{} // one token: who uses the connection holds it
	gone chan struct{} // closed by Close

	mu     sync.Mutex
	conn   net.Conn      // guarded by mu; nil while there is none
	resume chan struct{} // guarded by mu; closed when there is one again; nil while flowing
	closed bool          // guarded by mu
}

func newStay(c net.Conn) *stay {
	s := &stay{turn: make(chan struct{}, 1), gone: make(chan struct{}), conn: c}
	if c == nil {
		s.resume = make(chan struct{})
	}
	return s
}

// take waits for the turn and the connection.
func (s *stay) take(ctx context.Context) (net.Conn, error) {
	for {
		select {
		case s.turn <- struct{}{}:
		case <-s.gone:
			return nil, net.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		s.mu.Lock()
		c, resume, closed := s.conn, s.resume, s.closed
		s.mu.Unlock()
		if closed {
			s.give()
			return nil, net.ErrClosed
		}
		if c != nil {
			return c, nil
		}
		s.give()
		select {
		case <-resume:
		case <-s.gone:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *stay) give() { <-s.turn }

// park says that the connection will end and another one come.
func (s *stay) park() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.resume == nil {
		s.resume = make(chan struct{})
	}
}

func (s *stay) parking() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.resume != nil
}

// leave forgets the connection. The turn is the caller's.
func (s *stay) leave() {
	s.mu.Lock()
	c := s.conn
	s.conn = nil
	s.mu.Unlock()
	if c != nil {
		c.Close()
	}
}

// attach gives the stream a connection, which is its own from now on. Without one,
// or while it was not parked, only the waiting ends.
func (s *stay) attach(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed && c != nil {
		c.Close()
		return
	}
	if c != nil {
		s.conn = c
	}
	if s.resume != nil {
		close(s.resume)
		s.resume = nil
	}
}

// drop ends the stream.
func (s *stay) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	close(s.gone)
	if s.conn != nil {
		s.conn.Close()
	}
}

// outStream is what a process writes.
type outStream struct {
	*stay
	kept []byte // read and not asked for yet; of who has the turn
}

// Read implements io.Reader.
func (o *outStream) Read(b []byte) (int, error) {
	for {
		if n, ok := o.old(b); ok {
			return n, nil
		}
		c, err := o.take(context.Background())
		if err != nil {
			return 0, err
		}
		if len(o.kept) > 0 {
			o.give()
			continue
		}
		n, err := c.Read(b)
		if n == 0 && errors.Is(err, io.EOF) && o.parking() {
			o.leave()
			o.give()
			continue
		}
		o.give()
		if n > 0 {
			return n, nil
		}
		return 0, err
	}
}

// old reads what was kept.
func (o *outStream) old(b []byte) (int, bool) {
	select {
	case o.turn <- struct{}{}:
		defer o.give()
	default:
		return 0, false
	}
	if len(o.kept) == 0 {
		return 0, false
	}
	n := copy(b, o.kept)
	o.kept = o.kept[n:]
	return n, true
}

// maxKept is more than a stream has under way: its window, and what a guest reads
// of a process at a time.
const maxKept = 4 << 20

var errTooMuch = errors.New("the guest does not stop to send output")

// collect reads a parked stream's connection to its end.
func (o *outStream) collect(ctx context.Context) error {
	select {
	case o.turn <- struct{}{}:
	case <-o.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	defer o.give()
	o.mu.Lock()
	c := o.conn
	o.mu.Unlock()
	if c == nil { // the reader has met the end
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	rest, err := io.ReadAll(io.LimitReader(c, maxKept+1))
	if len(rest) > maxKept {
		err = errTooMuch
	}
	o.kept = append(o.kept, rest...)
	if !stop() {
		_ = c.SetReadDeadline(time.Time{})
		return ctx.Err()
	}
	o.leave()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Close implements io.Closer.
func (o *outStream) Close() error { o.drop(); return nil }

// inStream is what a process reads.
type inStream struct {
	*stay
	over bool // guarded by stay.mu; there is nothing more to come
}

// Write implements io.Writer.
func (i *inStream) Write(b []byte) (int, error) {
	c, err := i.take(context.Background())
	if err != nil {
		return 0, err
	}
	defer i.give()
	return c.Write(b)
}

// Close is the end of file for the process.
func (i *inStream) Close() error {
	i.mu.Lock()
	i.over = true
	c := i.conn
	i.mu.Unlock()
	if c == nil {
		return nil // the guest is told when it has a connection again
	}
	return closeWrite(c)
}

func closeWrite(c net.Conn) error {
	if h, ok := c.(vsock.HalfCloser); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// wanted tells whether the process is to have a connection again.
func (i *inStream) wanted() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return !i.over && !i.closed
}

// end ends a parked stream's connection once nobody writes to it.
func (i *inStream) end(ctx context.Context) error {
	select {
	case i.turn <- struct{}{}:
	case <-i.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
	defer i.give()
	i.mu.Lock()
	c := i.conn
	i.mu.Unlock()
	if c == nil {
		return nil
	}
	return closeWrite(c)
}
