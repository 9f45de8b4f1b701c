// SPDX-License-Identifier: Apache-2.0

package vsocktest

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
)

// guestConn is one stream in the emulated guest; g.mu guards all of it.
type guestConn struct {
	g             *Guest
	guest, host   uint32
	cond          *sync.Cond
	open          bool
	err           error
	in            []byte
	fwd, told     uint32
	eof, peerDeaf bool
	shut          uint32
	tx            uint32
	peerAlloc     uint32
	peerFwd       uint32
	writeMu       sync.Mutex
	closed        bool
}

func (g *Guest) newConn(guest, host uint32) *guestConn {
	c := &guestConn{g: g, guest: guest, host: host, cond: sync.NewCond(&g.mu)}
	g.conns[[2]uint32{guest, host}] = c
	return c
}

// say sends a packet; g.mu is not held.
func (c *guestConn) say(op uint16, flags uint32, payload []byte) {
	c.g.send(op, c.guest, c.host, flags, c, payload)
}

// tell returns the stream's credit and notes that the host knows it.
func (c *guestConn) tell() uint32 {
	if c == nil {
		return 0
	}
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	c.told = c.fwd
	return c.fwd
}

func (c *guestConn) cut(err error) {
	if c.err == nil {
		c.err = err
	}
	if c.g.conns[[2]uint32{c.guest, c.host}] == c {
		delete(c.g.conns, [2]uint32{c.guest, c.host})
	}
	c.cond.Broadcast()
}

// receive returns the operation to answer with, or 0.
func (c *guestConn) receive(op uint16, flags uint32, payload []byte) uint16 {
	switch op {
	case opResponse:
		if c.open {
			c.cut(syscall.EPROTO)
			return opRST
		}
		c.open = true
	case opRST:
		c.cut(syscall.ECONNRESET)
	case opShutdown:
		c.eof = c.eof || flags&2 != 0
		c.peerDeaf = c.peerDeaf || flags&1 != 0
		return c.finished()
	case opRW:
		if len(c.in)+len(payload) > rcvBuf || c.eof {
			c.cut(errors.New("host sent more than it was granted"))
			return opRST
		}
		if !c.closed {
			c.in = append(c.in, payload...)
		}
	case opCredit:
	case opCreditReq:
		return opCredit
	default:
		c.cut(syscall.EPROTO)
		return opRST
	}
	return 0
}

// finished answers the host's end of both directions once all was read, as Linux does.
func (c *guestConn) finished() uint16 {
	if c.eof && c.peerDeaf && len(c.in) == 0 && c.err == nil {
		c.cut(io.EOF)
		return opRST
	}
	return 0
}

func (c *guestConn) Read(p []byte) (int, error) {
	c.g.mu.Lock()
	for len(c.in) == 0 && !c.eof && c.err == nil && !c.closed {
		c.cond.Wait()
	}
	var n int
	var err error
	reply := uint16(0)
	switch {
	case c.closed:
		err = net.ErrClosed
	case len(c.in) > 0:
		n = copy(p, c.in)
		if c.in = c.in[n:]; len(c.in) == 0 {
			c.in = nil
		}
		c.fwd += uint32(n)
		// As Linux: tell when less than one packet of credit is left.
		if rcvBuf-(c.fwd-c.told) < txChunk {
			reply = opCredit
		}
		if r := c.finished(); r != 0 {
			reply = r
		}
	case c.eof:
		err = io.EOF
	default:
		err = c.err
	}
	c.g.mu.Unlock()
	if reply != 0 {
		c.say(reply, 0, nil)
	}
	return n, err
}

func (c *guestConn) Write(p []byte) (n int, err error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	for len(p) > 0 {
		c.g.mu.Lock()
		for c.peerAlloc-(c.tx-c.peerFwd) == 0 && c.err == nil && !c.peerDeaf && !c.closed {
			c.cond.Wait()
		}
		switch {
		case c.closed:
			err = net.ErrClosed
		case c.peerDeaf || c.shut&2 != 0:
			err = syscall.EPIPE
		case c.err != nil:
			err = c.err
		}
		k := min(uint32(len(p)), txChunk, c.peerAlloc-(c.tx-c.peerFwd))
		c.tx += k
		c.g.mu.Unlock()
		if err != nil {
			return n, err
		}
		c.say(opRW, 0, p[:k])
		n += int(k)
		p = p[k:]
	}
	return n, nil
}

func (c *guestConn) CloseWrite() error {
	c.g.mu.Lock()
	c.shut |= 2
	err := c.err
	c.g.mu.Unlock()
	if err == nil {
		c.say(opShutdown, 2, nil)
	}
	return nil
}

func (c *guestConn) Close() error {
	c.g.mu.Lock()
	again, err := c.closed, c.err
	c.closed = true
	c.in = nil
	reply := uint16(opShutdown)
	if c.eof && c.peerDeaf {
		reply = opRST
		c.cut(net.ErrClosed)
	}
	c.cond.Broadcast()
	c.g.mu.Unlock()
	if !again && err == nil {
		c.say(reply, 3, nil)
	}
	return nil
}

func (c *guestConn) LocalAddr() net.Addr  { return vsock.Addr{CID: uint32(c.g.cid), Port: c.guest} }
func (c *guestConn) RemoteAddr() net.Addr { return vsock.Addr{CID: vsock.HostCID, Port: c.host} }

var errNoDeadline = errors.New("the emulated guest has no deadlines")

func (c *guestConn) SetDeadline(time.Time) error      { return errNoDeadline }
func (c *guestConn) SetReadDeadline(time.Time) error  { return errNoDeadline }
func (c *guestConn) SetWriteDeadline(time.Time) error { return errNoDeadline }
