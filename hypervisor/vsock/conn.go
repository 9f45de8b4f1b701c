// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// lingerTime is how long a closed stream keeps its name while the guest has not
// confirmed the end. Linux waits 8 s for the same.
const lingerTime = 10 * time.Second

// Packets that a stream has to send besides data.
const (
	pendRequest = 1 << iota
	pendResponse
	pendCredit
	pendCreditRequest
	pendShutdown
)

// conn is one stream. Its life:
//
//	Dial ──> requested ──RESPONSE──> established ──Close──> lingering ──RST/time──> gone
//	              └─RST: refused─> gone    ▲  └──RST / SHUTDOWN both──────────────────> gone
//	guest's REQUEST to a listener ─────────┘
//
// Each direction of an established stream ends on its own: shutOut after
// CloseWrite, shutIn after the guest's SHUTDOWN(send).
//
// Data is copied once where it can be: a blocked Read lends its buffer, which is
// filled straight from the guest's memory, and a blocked Write lends its own.
type conn struct {
	s             *stack
	key           key
	local, remote Addr
	dialled       bool
	readMu        sync.Mutex // one Read at a time
	writeMu       sync.Mutex // one Write at a time
	rwake, wwake  chan struct{}

	// Everything below is guarded by s.mu.
	established bool
	closed      bool  // Close was called
	gone        bool  // not in the tables any more
	err         error // why the stream was cut
	queued      bool
	nextReady   *conn
	pend        uint8
	linger      *time.Timer
	rdead       deadline
	wdead       deadline

	// Sending.
	wbuf      []byte // what a blocked Write still has to send
	shutOut   uint32 // shutRecv, shutSend that we announced or will
	txCnt     uint32 // bytes sent, modulo 2^32
	peerAlloc uint32
	peerFwd   uint32
	asked     bool // a CREDIT_REQUEST went out since credit last changed

	// Receiving.
	rbuf   []byte // lent by a blocked Read
	rgot   int    // bytes that were put into it
	in     buffer
	shutIn uint32 // what the guest announced
	grant  uint32 // our buf_alloc
	// released: grant is not reserved any more.
	released bool
	fwdCnt   uint32 // bytes that Read has returned
	lastFwd  uint32 // fwdCnt as last told
}

// newConn adds a stream to the tables.
func (s *stack) newConn(k key) *conn {
	c := &conn{
		s: s, key: k, grant: s.grant(),
		local:  Addr{CID: HostCID, Port: k.host},
		remote: Addr{CID: uint32(s.guestCID), Port: k.guest},
		rwake:  make(chan struct{}, 1), wwake: make(chan struct{}, 1),
	}
	s.conns[k] = c
	return c
}

// LocalAddr is the host's end; its Port is unique to a dialled stream.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr is the guest's end.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // a token that was not taken yet does as well
	}
}

func (c *conn) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "vsock", Source: c.local, Addr: c.remote, Err: err}
}

// Read implements net.Conn. At the end of the guest's side it returns io.EOF,
// of a reset stream ECONNRESET after what had arrived.
func (c *conn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	n, err := c.read(p)
	return n, c.opError("read", err)
}

func (c *conn) read(p []byte) (int, error) {
	s := c.s
	s.mu.Lock()
	for {
		if n, ready, err := c.tryRead(p); ready {
			s.flush()
			return n, err
		}
		c.rbuf = p
		s.mu.Unlock()
		<-c.rwake
		s.mu.Lock()
		c.rbuf = nil
		if n := c.rgot; n > 0 {
			c.rgot = 0
			s.mu.Unlock()
			return n, nil
		}
	}
}

// tryRead is Read as far as it goes without waiting.
func (c *conn) tryRead(p []byte) (n int, ready bool, err error) {
	switch {
	case c.closed:
		return 0, true, net.ErrClosed
	case c.rdead.expired:
		return 0, true, os.ErrDeadlineExceeded
	case len(p) == 0:
		return 0, true, nil
	case c.in.n > 0:
		n = c.in.take(p)
		c.consumed(n)
		c.s.release(c)
		return n, true, nil
	case c.shutIn&shutSend != 0:
		return 0, true, io.EOF
	case c.err != nil:
		return 0, true, c.err
	}
	return 0, false, nil
}

// consumed accounts for bytes that the application took, and tells the guest
// when half of its credit has come free.
func (c *conn) consumed(n int) {
	c.fwdCnt += uint32(n)
	if c.fwdCnt-c.lastFwd >= c.grant/2 && !c.gone && c.shutIn&shutSend == 0 {
		c.pend |= pendCredit
		c.s.enqueue(c)
	}
}

// Write implements net.Conn. It returns when the guest's buffers have taken all
// of p; bytes count as written when they have been copied there.
func (c *conn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	n, err := c.write(p)
	return n, c.opError("write", err)
}

func (c *conn) write(p []byte) (int, error) {
	s := c.s
	s.mu.Lock()
	if err := c.writeErr(); err != nil || len(p) == 0 {
		s.mu.Unlock()
		return 0, err
	}
	c.wbuf = p
	s.enqueue(c)
	for {
		s.flush()
		<-c.wwake
		s.mu.Lock()
		err := c.writeErr()
		if left := len(c.wbuf); left == 0 || err != nil {
			c.wbuf = nil
			if left == 0 {
				err = nil
			}
			if c.pend != 0 { // a shutdown that waited for this data
				s.enqueue(c)
			}
			s.flush()
			return len(p) - left, err
		}
	}
}

// writeErr says why nothing more can be written.
func (c *conn) writeErr() error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.wdead.expired:
		return os.ErrDeadlineExceeded
	case c.err != nil:
		return c.err
	case c.shutOut&shutSend != 0 || c.shutIn&shutRecv != 0:
		return unix.EPIPE
	}
	return nil
}

// CloseWrite ends our direction after what was written; the guest reads EOF.
func (c *conn) CloseWrite() error {
	s := c.s
	s.mu.Lock()
	defer s.flush()
	if c.closed {
		return c.opError("close", net.ErrClosed)
	}
	if c.err != nil {
		return c.opError("close", c.err)
	}
	if c.shutOut&shutSend == 0 && !c.gone {
		c.shutOut |= shutSend
		c.pend |= pendShutdown
		s.enqueue(c)
	}
	return nil
}

// Close ends the stream without waiting: what was written stays written, what
// was not read is dropped. The name stays taken until the guest confirms.
func (c *conn) Close() error {
	s := c.s
	s.mu.Lock()
	defer s.flush()
	if c.closed {
		return c.opError("close", net.ErrClosed)
	}
	c.closed, c.wbuf = true, nil
	c.in.drop()
	s.release(c) // what comes now is dropped
	c.rdead.stop()
	c.wdead.stop()
	wake(c.rwake)
	wake(c.wwake)
	if c.gone {
		return nil
	}
	c.shutOut = shutBoth
	c.pend |= pendShutdown
	s.enqueue(c)
	c.linger = time.AfterFunc(lingerTime, func() {
		s.mu.Lock()
		defer s.flush()
		if !c.gone {
			s.reset(c.key)
			s.forget(c)
		}
	})
	return nil
}

// fail cuts the stream; readers get what had arrived, then err.
func (c *conn) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	c.s.forget(c)
	wake(c.rwake)
	wake(c.wwake)
}
