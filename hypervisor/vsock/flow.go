// SPDX-License-Identifier: Apache-2.0

package vsock

import "golang.org/x/sys/unix"

// The packet side of a stream: what the guest's packets do to it, and which
// packet it sends next. All of it runs under stack.mu.

// space is how many bytes the guest has room for (virtio 1.3 §5.10.6.3). A guest
// that reports nonsense only hurts its own stream.
func (c *conn) space() uint32 {
	if out := c.txCnt - c.peerFwd; out < c.peerAlloc {
		return c.peerAlloc - out
	}
	return 0
}

// credit takes what every packet of the guest reports.
func (c *conn) credit(h header) {
	if h.bufAlloc == c.peerAlloc && h.fwdCnt == c.peerFwd {
		return
	}
	c.peerAlloc, c.peerFwd, c.asked = h.bufAlloc, h.fwdCnt, false
	if len(c.wbuf) > 0 {
		c.s.enqueue(c)
	}
}

// hasPacket reports whether the stream could send now.
func (c *conn) hasPacket() bool {
	if c.gone {
		return false
	}
	if c.pend&^pendShutdown != 0 {
		return true
	}
	if c.established && len(c.wbuf) > 0 {
		if c.space() > 0 {
			return true
		}
		if !c.asked {
			c.pend |= pendCreditRequest
			return true
		}
		return false // and a shutdown waits for the data before it
	}
	return c.pend != 0
}

// packet fills in the next packet, whose payload is at most room bytes;
// hasPacket was true. The payload is still the caller's of Write.
func (c *conn) packet(h *header, room int) []byte {
	h.srcPort, h.dstPort = c.key.host, c.key.guest
	h.bufAlloc, h.fwdCnt = c.grant, c.fwdCnt
	c.lastFwd = c.fwdCnt
	switch {
	case c.pend&pendRequest != 0:
		h.op = opRequest
		c.pend &^= pendRequest
	case c.pend&pendResponse != 0:
		h.op = opResponse
		c.pend &^= pendResponse | pendCredit
	case len(c.wbuf) > 0 && c.space() > 0:
		h.op = opRW
		c.pend &^= pendCredit | pendCreditRequest
		p := c.wbuf[:min(len(c.wbuf), room, int(c.space()))]
		h.length = uint32(len(p))
		return p
	case c.pend&pendCreditRequest != 0:
		h.op = opCreditRequest
		c.asked = true
		c.pend &^= pendCreditRequest | pendCredit
	case c.pend&pendCredit != 0:
		h.op = opCreditUpdate
		c.pend &^= pendCredit
	default:
		h.op, h.flags = opShutdown, c.shutOut
		c.pend &^= pendShutdown
	}
	return nil
}

// sent accounts for n bytes of payload that were copied to the guest.
func (c *conn) sent(n int) {
	if n == 0 {
		return
	}
	c.txCnt += uint32(n)
	if c.wbuf = c.wbuf[n:]; len(c.wbuf) == 0 {
		c.wbuf = nil
		wake(c.wwake)
	}
}

// receive handles a packet for this stream.
func (c *conn) receive(h header, payload segments) {
	s := c.s
	if h.op == opRST {
		if !c.established {
			c.fail(unix.ECONNREFUSED)
			return
		}
		c.fail(unix.ECONNRESET)
		return
	}
	if !c.established {
		if h.op != opResponse || c.pend&pendRequest != 0 || c.closed {
			s.reset(c.key)
			c.fail(unix.ECONNRESET)
			return
		}
		c.established = true
		c.credit(h)
		wake(c.wwake)
		return
	}
	c.credit(h)
	switch h.op {
	case opRW:
		c.data(payload, int64(h.length))
	case opCreditUpdate:
	case opCreditRequest:
		c.pend |= pendCredit
		s.enqueue(c)
	case opShutdown:
		c.peerShutdown(h.flags & shutBoth)
	default:
		s.reset(c.key)
		c.fail(unix.ECONNRESET)
	}
}

// data takes n bytes of payload.
func (c *conn) data(payload segments, n int64) {
	if c.closed || n == 0 {
		return // nobody reads; our SHUTDOWN is on its way
	}
	// More than we granted, or after its own SHUTDOWN: the guest's stack is broken.
	if n > int64(c.grant)-int64(c.in.n) || c.shutIn&shutSend != 0 {
		c.s.reset(c.key)
		c.fail(unix.ECONNRESET)
		return
	}
	off := uint64(headerLen)
	if c.rbuf != nil { // lent only while nothing is kept
		p := c.rbuf[:min(int64(len(c.rbuf)), n)]
		payload.copyOut(p, off)
		c.rbuf, c.rgot = nil, len(p)
		c.consumed(len(p))
		wake(c.rwake)
		off += uint64(len(p))
		n -= int64(len(p))
	}
	if n > 0 {
		c.in.fill(payload, off, int(n))
	}
}

// peerShutdown notes what the guest has closed. When that is both directions it
// waits for an RST to forget the stream.
func (c *conn) peerShutdown(flags uint32) {
	c.shutIn |= flags
	if c.shutIn == shutBoth {
		c.s.reset(c.key)
		c.s.forget(c)
	}
	wake(c.rwake)
	wake(c.wwake)
}
