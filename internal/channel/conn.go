// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"
	"golang.org/x/sys/unix"
)

// Conn is one stream. It can be half-closed, as a vsock's.
type Conn struct {
	m             *Mux
	st            *yamux.Stream
	local, remote net.Addr

	reading chan struct{} // one token: who reads holds it
	gone    chan struct{} // closed by Close

	mu     sync.Mutex
	closed bool // guarded by mu
}

func newConn(m *Mux, st *yamux.Stream, local, remote net.Addr) *Conn {
	return &Conn{m: m, st: st, local: local, remote: remote, reading: make(chan struct{}, 1), gone: make(chan struct{})}
}

var _ net.Conn = (*Conn)(nil)

// LocalAddr is what Config.Addr makes of this end's port.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr is what Config.Addr makes of the other end's port.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// Read reads what the other end has written, io.EOF after its last byte.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	select {
	case c.reading <- struct{}{}:
		defer func() { <-c.reading }()
	case <-c.gone:
	}
	if c.isClosed() {
		return 0, c.opError("read", net.ErrClosed)
	}
	n, err := c.st.Read(b)
	return n, c.fail("read", err)
}

// Write returns when the bytes are under way.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.st.Write(b)
	return n, c.fail("write", err)
}

// CloseWrite ends the outgoing direction; the other end reads EOF.
func (c *Conn) CloseWrite() error {
	if c.isClosed() {
		return c.opError("shutdown", net.ErrClosed)
	}
	return c.fail("shutdown", c.st.CloseWrite())
}

// Close ends both directions. What was written still arrives, unless the other
// end goes on writing: then the stream is reset, and its next write fails.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	close(c.gone)
	_ = c.st.SetReadDeadline(time.Unix(1, 0)) // wakes a reader
	c.mu.Unlock()
	_ = c.st.CloseWrite()
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.m.err == nil {
		c.m.wg.Go(c.drain)
	}
	return nil
}

// drain waits for the other end's end of a stream that was closed here.
func (c *Conn) drain() {
	c.reading <- struct{}{} // the reader that was woken gives it back
	defer func() { <-c.reading }()
	_ = c.st.SetReadDeadline(time.Time{})
	var b [1]byte
	if _, err := c.st.Read(b[:]); err == nil {
		_ = c.st.Reset()
	}
	_ = c.st.CloseRead()
}

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// SetDeadline bounds reads and writes.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline bounds reads.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	return c.st.SetReadDeadline(t)
}

// SetWriteDeadline bounds writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.st.SetWriteDeadline(t) }

// fail says what an error of yamux means.
func (c *Conn) fail(op string, err error) error {
	switch {
	case err == nil || err == io.EOF: //nolint:errorlint // readers compare it
		return err
	case c.isClosed():
		err = net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		err = os.ErrDeadlineExceeded
	case op == "write" && errors.Is(err, yamux.ErrStreamClosed):
		err = unix.EPIPE
	default:
		err = lost(err)
	}
	return c.opError(op, err)
}

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: c.local.Network(), Source: c.local, Addr: c.remote, Err: err}
}

// listener is one port of this end.
type listener struct {
	m      *Mux
	port   uint32
	addr   net.Addr
	queue  chan *Conn
	room   chan struct{} // as many as are queued or about to be
	once   sync.Once
	closed chan struct{}
}

// put queues a stream that has taken room.
func (l *listener) put(c *Conn) {
	select {
	case <-l.closed:
		_ = c.Close()
		return
	default:
	}
	l.queue <- c // has room
	select {
	case <-l.closed: // maybe after shut has looked
		l.drop()
	default:
	}
}

// Accept returns the next stream.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
	default:
		select {
		case c := <-l.queue:
			<-l.room
			return c, nil
		case <-l.closed:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: l.addr.Network(), Addr: l.addr, Err: net.ErrClosed}
}

// Addr is the port's.
func (l *listener) Addr() net.Addr { return l.addr }

// Close refuses the other end from now on and ends what nobody has accepted.
func (l *listener) Close() error {
	l.m.mu.Lock()
	if l.m.listeners[l.port] == l {
		delete(l.m.listeners, l.port)
	}
	l.m.mu.Unlock()
	if !l.shut() {
		return &net.OpError{Op: "close", Net: l.addr.Network(), Addr: l.addr, Err: net.ErrClosed}
	}
	return nil
}

// shut is false when the listener was closed before.
func (l *listener) shut() (first bool) {
	l.once.Do(func() { close(l.closed); first = true })
	l.drop()
	return first
}

func (l *listener) drop() {
	for {
		select {
		case c := <-l.queue:
			<-l.room
			_ = c.Close()
		default:
			return
		}
	}
}
