// SPDX-License-Identifier: Apache-2.0

package vsocktest

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/kata-v2/kata/hypervisor/vsock"
)

const (
	hdrLen  = 44
	rxBuf   = 4096     // as Linux
	txChunk = 64 << 10 // as Linux
	rcvBuf  = 256 << 10
	rxArea  = lowGPA
	txArea  = lowGPA + 1<<20
	maxSegs = 4
)

const (
	opRequest = 1 + iota
	opResponse
	opRST
	opShutdown
	opRW
	opCredit
	opCreditReq
)

// Guest is a minimal vsock stack of a guest on top of a Driver: written for
// plainness, and apart from the device's own stack, so that both do not share mistakes.
type Guest struct {
	d     *Driver
	cid   uint64
	split int // descriptors over which a sent packet is spread
	wg    sync.WaitGroup

	txMu   sync.Mutex // owns the tx ring
	txFree []uint16   // slots
	txCond *sync.Cond

	mu        sync.Mutex
	conns     map[[2]uint32]*guestConn // guest port, host port
	listeners map[uint32]*guestListener
	lastPort  uint32
	down      bool
}

// NewGuest makes a guest that has not booted yet: it can Listen already. split,
// from 1 to 4, is over how many descriptors a sent packet is spread.
func NewGuest(d *Driver, cid uint32, split int) *Guest {
	g := &Guest{d: d, cid: uint64(cid), split: split, conns: map[[2]uint32]*guestConn{}, listeners: map[uint32]*guestListener{}, lastPort: 1 << 20}
	g.txCond = sync.NewCond(&g.txMu)
	for i := range d.Rings[1].Num / maxSegs {
		g.txFree = append(g.txFree, i)
	}
	return g
}

// Boot starts the driver's rings and serves them.
func (g *Guest) Boot() error {
	if err := g.d.Start(); err != nil {
		return err
	}
	rx := g.d.Rings[0]
	for i := range rx.Num / 2 {
		g.postRX(i)
	}
	rx.KickIfWanted()
	g.wg.Go(g.rxLoop)
	g.wg.Go(g.txLoop)
	return nil
}

// Close powers the machine off.
func (g *Guest) Close() {
	_ = g.d.Close()
	g.stop()
}

// stop waits for the guest's interrupts to end and fails its streams.
func (g *Guest) stop() {
	// First of all: a reply that waits for a place in the ring ends by it.
	g.txMu.Lock()
	g.mu.Lock()
	g.down = true
	g.mu.Unlock()
	g.txCond.Broadcast()
	g.txMu.Unlock()
	g.wg.Wait()
	g.mu.Lock()
	for _, c := range g.conns {
		c.cut(syscall.ENETDOWN)
	}
	for _, l := range g.listeners {
		l.shut()
	}
	g.mu.Unlock()
}

// Halt stops the guest without a word to the device, as a crash does. The
// driver remains: stop and reset its rings, and boot another guest on it.
func (g *Guest) Halt() {
	for _, r := range g.d.Rings {
		_ = r.call.SetReadDeadline(time.Unix(1, 0))
	}
	g.stop()
	for _, r := range g.d.Rings {
		_ = r.call.SetReadDeadline(time.Time{})
	}
}

// postRX offers slot i: a header and a buffer in two descriptors.
func (g *Guest) postRX(i uint16) {
	rx, at := g.d.Rings[0], uint64(rxArea)+uint64(i)*(rxBuf+64)
	rx.SetDesc(2*i, at, hdrLen, 2|1, 2*i+1)
	rx.SetDesc(2*i+1, at+64, rxBuf, 2, 0)
	rx.Offer(2 * i)
}

func (g *Guest) rxLoop() {
	rx := g.d.Rings[0]
	for {
		for {
			head, n, ok := rx.Used()
			if !ok {
				break
			}
			at := uint64(rxArea) + uint64(head/2)*(rxBuf+64)
			hdr := [hdrLen]byte(g.d.Mem(at, hdrLen))
			if n < hdrLen || n-hdrLen != binary.LittleEndian.Uint32(hdr[24:]) {
				panic(fmt.Sprintf("device wrote %d bytes with header %x", n, hdr))
			}
			g.receive(hdr, g.d.Mem(at+64, uint64(n-hdrLen)))
			g.postRX(uint16(head / 2))
			rx.KickIfWanted()
		}
		if rx.WantInterrupt() {
			continue
		}
		if rx.Wait() != nil {
			return
		}
	}
}

func (g *Guest) txLoop() {
	tx := g.d.Rings[1]
	for {
		g.txMu.Lock()
		for {
			head, _, ok := tx.Used()
			if !ok {
				break
			}
			g.txFree = append(g.txFree, uint16(head)/maxSegs)
		}
		more := tx.WantInterrupt()
		g.txCond.Broadcast()
		g.txMu.Unlock()
		if !more && tx.Wait() != nil {
			return
		}
	}
}

// send puts one packet on the tx ring, spread over g.split descriptors. c, which
// may be nil, is asked for its credit when the packet's place in the ring is
// certain: packets must not report credit in another order.
func (g *Guest) send(op uint16, guestPort, hostPort, flags uint32, c *guestConn, payload []byte) {
	g.txMu.Lock()
	defer g.txMu.Unlock()
	for len(g.txFree) == 0 {
		if g.isDown() {
			return
		}
		g.txCond.Wait()
	}
	if g.isDown() {
		return
	}
	slot := g.txFree[len(g.txFree)-1]
	g.txFree = g.txFree[:len(g.txFree)-1]
	at := txArea + uint64(slot)*(txChunk+64)
	n := uint64(hdrLen + len(payload))
	m := g.d.Mem(at, n)
	le := binary.LittleEndian
	le.PutUint64(m, g.cid)
	le.PutUint64(m[8:], vsock.HostCID)
	le.PutUint32(m[16:], guestPort)
	le.PutUint32(m[20:], hostPort)
	le.PutUint32(m[24:], uint32(len(payload)))
	le.PutUint16(m[28:], 1)
	le.PutUint16(m[30:], op)
	le.PutUint32(m[32:], flags)
	le.PutUint32(m[36:], rcvBuf)
	le.PutUint32(m[40:], c.tell())
	copy(m[hdrLen:], payload)
	g.describe(slot, at, n)
	tx := g.d.Rings[1]
	tx.Offer(slot * maxSegs)
	tx.KickIfWanted()
}

// describe writes the descriptors of n bytes at at: the first piece ends within
// the header, so that nothing depends on the header being whole.
func (g *Guest) describe(slot uint16, at, n uint64) {
	tx := g.d.Rings[1]
	first := slot * maxSegs
	if g.split == 1 {
		tx.SetDesc(first, at, uint32(n), 0, 0)
		return
	}
	off := uint64(20)
	tx.SetDesc(first, at, 20, 1, first+1)
	for i := 1; i < g.split; i++ {
		size := (n - off) / uint64(g.split-i)
		flags := uint16(1)
		if i == g.split-1 {
			flags = 0
		}
		tx.SetDesc(first+uint16(i), at+off, uint32(size), flags, first+uint16(i+1))
		off += size
	}
}

func (g *Guest) isDown() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.down
}

// receive handles one packet of the host.
func (g *Guest) receive(h [hdrLen]byte, payload []byte) {
	le := binary.LittleEndian
	hostPort, guestPort := le.Uint32(h[16:]), le.Uint32(h[20:])
	op, flags := le.Uint16(h[30:]), le.Uint32(h[32:])
	g.mu.Lock()
	c := g.conns[[2]uint32{guestPort, hostPort}]
	if c == nil && op == opRequest {
		if l := g.listeners[guestPort]; l != nil {
			c = g.newConn(guestPort, hostPort)
			c.open = true
			c.peerAlloc, c.peerFwd = le.Uint32(h[36:]), le.Uint32(h[40:])
			g.mu.Unlock()
			c.say(opResponse, 0, nil)
			l.queue <- c
			return
		}
	}
	if c == nil {
		g.mu.Unlock()
		if op != opRST {
			g.send(opRST, guestPort, hostPort, 0, nil, nil)
		}
		return
	}
	c.peerAlloc, c.peerFwd = le.Uint32(h[36:]), le.Uint32(h[40:])
	reply := c.receive(op, flags, payload)
	c.cond.Broadcast()
	g.mu.Unlock()
	if reply != 0 {
		c.say(reply, 0, nil)
	}
}

// Dial opens a stream to a host port.
func (g *Guest) Dial(hostPort uint32) (net.Conn, error) {
	g.mu.Lock()
	if g.down {
		g.mu.Unlock()
		return nil, os.NewSyscallError("connect", syscall.ENETDOWN)
	}
	g.lastPort++
	c := g.newConn(g.lastPort, hostPort)
	g.mu.Unlock()
	c.say(opRequest, 0, nil)
	g.mu.Lock()
	defer g.mu.Unlock()
	for !c.open && c.err == nil {
		c.cond.Wait()
	}
	if !c.open { // else it was accepted, whatever has become of it since
		return nil, os.NewSyscallError("connect", c.err)
	}
	return c, nil
}

// Listen accepts streams to a guest port.
func (g *Guest) Listen(port uint32) (net.Listener, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.down {
		return nil, os.NewSyscallError("listen", syscall.ENETDOWN)
	}
	if g.listeners[port] != nil {
		return nil, syscall.EADDRINUSE
	}
	l := &guestListener{g: g, port: port, queue: make(chan *guestConn, 4096), closed: make(chan struct{})}
	g.listeners[port] = l
	return l, nil
}

type guestListener struct {
	g      *Guest
	port   uint32
	queue  chan *guestConn
	closed chan struct{}
}

func (l *guestListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *guestListener) Addr() net.Addr { return vsock.Addr{CID: uint32(l.g.cid), Port: l.port} }

func (l *guestListener) Close() error {
	l.g.mu.Lock()
	defer l.g.mu.Unlock()
	l.shut()
	return nil
}

func (l *guestListener) shut() {
	if l.g.listeners[l.port] == l {
		delete(l.g.listeners, l.port)
		close(l.closed)
	}
}
