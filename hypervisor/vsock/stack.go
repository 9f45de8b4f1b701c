// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"sync"

	"golang.org/x/sys/unix"
)

// Limits that bound what one guest can make this process hold; doc.go has the sum.
const (
	// maxConns bounds streams, those that linger after Close included: four times
	// the 1,000 that a machine full of containers uses.
	maxConns = 4096
	// maxResets bounds RST packets that wait for a buffer of the guest. One that
	// sends without taking them goes without the rest: it knows what it sent.
	maxResets = 4096
	// maxBacklog bounds streams that a listener holds for its owner to accept,
	// whether the guest has reset them meanwhile or not. Linux's SOMAXCONN was as much.
	maxBacklog = 128
	// budget is what streams share as receive buffers, bytes: 56 streams get
	// maxBuffer each before the others get less, down to minGrant.
	budget = 16 << 20
	// minGrant is the receive buffer of a stream when the budget is used up,
	// bytes. Two of Linux's packets, so that one is read while the next comes.
	minGrant = 8 << 10
	// maxGranted is the most that streams may hold together, those included that
	// the guest has reset and nobody has read or closed.
	maxGranted = budget + maxConns*minGrant
)

// firstPort is where host ports picked by us begin: far above those that
// services choose, and below 2^31 for peers that keep ports signed.
const firstPort = 1 << 30

// key names a stream within one device.
type key struct{ host, guest uint32 }

// stack is the device's stream layer: it knows packets, not rings.
//
// mu is the device's only lock. It is held for table look-ups and for the copy
// of one packet at a time, never across a system call that can wait. Whoever
// may have queued something for the guest leaves by calling flush, which sends
// what can be sent and unlocks.
type stack struct {
	guestCID uint64
	flush    func() // called with mu held; returns with mu released

	mu        sync.Mutex
	conns     map[key]*conn
	listeners map[uint32]*listener
	dialPorts map[uint32]struct{} // host ports of live dialled streams
	lastPort  uint32
	granted   int
	err       error // set once, when the device has ended

	// What waits for a buffer of the guest, in order: resets first, then
	// streams, each of which sends one packet and goes to the back.
	resets      []key
	first, last *conn
}

func newStack(guestCID uint64) *stack {
	s := &stack{
		guestCID:  guestCID,
		conns:     map[key]*conn{},
		listeners: map[uint32]*listener{},
		dialPorts: map[uint32]struct{}{},
		lastPort:  firstPort - 1,
	}
	s.flush = s.mu.Unlock
	return s
}

// grant reserves a receive buffer: plenty for the usual few streams, less and
// less when there are many, so that the sum stays bounded.
func (s *stack) grant() uint32 {
	g := min(max((budget-s.granted)/8, minGrant), maxBuffer)
	// Power of two, so that it is what buffer allocates.
	for g&(g-1) != 0 {
		g &= g - 1
	}
	s.granted += g
	return uint32(g)
}

// full reports whether there may be no more streams.
func (s *stack) full() bool { return len(s.conns) >= maxConns || s.granted > maxGranted-minGrant }

// release takes back what was granted to c once c can hold no bytes any more: a
// stream that the guest has reset keeps what had arrived until it is read.
func (s *stack) release(c *conn) {
	if !c.released && (c.gone || c.closed) && c.in.n == 0 {
		c.released = true
		s.granted -= int(c.grant)
	}
}

// pickPort returns a host port that nothing uses.
func (s *stack) pickPort() uint32 {
	for {
		s.lastPort++
		if s.lastPort < firstPort || s.lastPort > 1<<31-1 {
			s.lastPort = firstPort
		}
		_, dialled := s.dialPorts[s.lastPort]
		if _, listening := s.listeners[s.lastPort]; !dialled && !listening {
			return s.lastPort
		}
	}
}

// enqueue puts c in line for the guest's buffers, once.
func (s *stack) enqueue(c *conn) {
	if c.queued || s.err != nil {
		return
	}
	c.queued, c.nextReady = true, nil
	if s.last == nil {
		s.first = c
	} else {
		s.last.nextReady = c
	}
	s.last = c
}

// reset queues an RST for k. Beyond maxResets the guest has stopped taking
// packets while it sends; it goes without an answer then.
func (s *stack) reset(k key) {
	if len(s.resets) < maxResets && s.err == nil {
		s.resets = append(s.resets, k)
	}
}

// forget takes c out of the tables; packets for it are unknown from now on.
func (s *stack) forget(c *conn) {
	if c.gone {
		return
	}
	c.gone, c.pend = true, 0
	if s.conns[c.key] == c {
		delete(s.conns, c.key)
	}
	if c.dialled {
		delete(s.dialPorts, c.key.host)
	}
	s.release(c)
	if c.linger != nil {
		c.linger.Stop()
	}
}

// wanting reports whether something waits for a buffer of the guest. It drops
// streams from the line whose packet has become moot.
func (s *stack) wanting() bool {
	if len(s.resets) > 0 {
		return true
	}
	for s.first != nil && !s.first.hasPacket() {
		s.unqueueFirst()
	}
	return s.first != nil
}

func (s *stack) unqueueFirst() *conn {
	c := s.first
	s.first = c.nextReady
	if s.first == nil {
		s.last = nil
	}
	c.queued, c.nextReady = false, nil
	return c
}

// next writes the next packet into the guest's buffer, which holds total bytes,
// and returns its length. wanting has just returned true, and total is more
// than headerLen.
func (s *stack) next(segs segments, total uint64) uint32 {
	h := header{srcCID: HostCID, dstCID: s.guestCID, typ: typeStream}
	var payload []byte
	if len(s.resets) > 0 {
		h.srcPort, h.dstPort, h.op = s.resets[0].host, s.resets[0].guest, opRST
		if s.resets = s.resets[1:]; len(s.resets) == 0 {
			s.resets = nil
		}
	} else {
		c := s.unqueueFirst()
		payload = c.packet(&h, int(min(total-headerLen, maxPayload)))
		segs.copyIn(payload, headerLen)
		c.sent(len(payload))
		if c.hasPacket() {
			s.enqueue(c)
		}
	}
	var b [headerLen]byte
	h.put(&b)
	segs.copyIn(b[:], 0)
	return headerLen + uint32(len(payload))
}

// receive handles one packet of the guest. payload holds at least h.length
// bytes from offset headerLen on. Nothing a packet says can fail the device.
func (s *stack) receive(h header, payload segments) {
	if h.srcCID != s.guestCID || h.dstCID != HostCID {
		return // not from this guest, or for somebody else: as vhost-vsock does
	}
	k := key{host: h.dstPort, guest: h.srcPort}
	c := s.conns[k]
	switch {
	case h.typ != typeStream:
		if h.op != opRST {
			s.reset(k)
		}
	case h.op == opRequest:
		s.request(k, c, h)
	case c == nil:
		if h.op != opRST {
			s.reset(k)
		}
	default:
		c.receive(h, payload)
	}
}

// request handles an attempt of the guest to open a stream.
func (s *stack) request(k key, c *conn, h header) {
	if c != nil {
		// The guest uses the name of a living stream again. If we have closed
		// that one, the guest has forgotten it; otherwise both are in error.
		lingering := c.closed
		c.fail(unix.ECONNRESET)
		if !lingering {
			s.reset(k)
			return
		}
	}
	l := s.listeners[k.host]
	if l == nil || s.full() || len(l.queue) == cap(l.queue) {
		s.reset(k)
		return
	}
	c = s.newConn(k)
	c.established = true
	c.credit(h)
	c.pend = pendResponse
	s.enqueue(c)
	l.queue <- c // has room: only this line adds, under mu
}

// restart forgets what an earlier driver in the guest knew: its streams are
// reset, except those whose opening it never saw or answered.
func (s *stack) restart() {
	s.resets = nil
	for _, c := range s.conns {
		if !c.established && !c.closed {
			c.pend = pendRequest
			s.enqueue(c)
			continue
		}
		c.fail(unix.ECONNRESET)
	}
}

// end fails everything with err; later calls do nothing.
func (s *stack) end(err error) {
	if s.err != nil {
		return
	}
	s.err = err
	for _, c := range s.conns {
		c.fail(err)
	}
	for _, l := range s.listeners {
		l.shut()
	}
	s.resets, s.first, s.last = nil, nil, nil
}
