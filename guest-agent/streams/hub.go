// SPDX-License-Identifier: Apache-2.0

// Package streams carries the stdio of processes: one connection of its own for
// each stream, or, for a host that does not use connections, reads and writes on
// request. A process always sees real pipes or a terminal.
package streams

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/vsocket"
	"github.com/kata-v2/kata/protocols"
)

const (
	// unclaimedFor bounds how long a connection waits for the request that names it.
	unclaimedFor = 60 * time.Second
	// maxUnclaimed bounds how many do.
	maxUnclaimed = 1024
)

// Identify finds the identity by which a request will name a connection.
type Identify func(net.Conn) (uint32, error)

// ByPeerPort is the source port of a vsock connection.
func ByPeerPort(c net.Conn) (uint32, error) {
	a, ok := c.RemoteAddr().(vsocket.Addr)
	if !ok {
		return 0, fmt.Errorf("stdio connection from %v: not a vsock address", c.RemoteAddr())
	}
	return a.Port, nil
}

// ByPreamble reads protocols.StreamIDMagic and a 32-bit little-endian number,
// for transports without source ports.
func ByPreamble(c net.Conn) (uint32, error) {
	var b [8]byte
	if err := c.SetReadDeadline(time.Now().Add(unclaimedFor)); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return 0, fmt.Errorf("stdio connection: stream identity: %w", err)
	}
	if string(b[:4]) != protocols.StreamIDMagic {
		return 0, fmt.Errorf("stdio connection opens with %q, want %q", b[:4], protocols.StreamIDMagic)
	}
	return binary.LittleEndian.Uint32(b[4:]), c.SetReadDeadline(time.Time{})
}

// Hub accepts stdio connections and keeps each until it is claimed.
type Hub struct {
	mu      sync.Mutex
	arrived map[uint32]arrival       // guarded by mu
	waiting map[uint32]chan net.Conn // guarded by mu; room for one
}

type arrival struct {
	conn   net.Conn
	expire *time.Timer
}

// NewHub makes a Hub; Serve feeds it.
func NewHub() *Hub {
	return &Hub{arrived: map[uint32]arrival{}, waiting: map[uint32]chan net.Conn{}}
}

// Serve accepts on l until ctx is done, and returns when its goroutines have ended.
func (h *Hub) Serve(ctx context.Context, l net.Listener, identify Identify) {
	defer h.closeAll()
	vsocket.Serve(ctx, l, func(c net.Conn) {
		stop := context.AfterFunc(ctx, func() { c.Close() })
		id, err := identify(c)
		if !stop() || err != nil || !h.arrive(id, c) {
			c.Close()
		}
	})
}

// arrive files a connection, or hands it to who waits for it. False: there are too many.
func (h *Hub) arrive(id uint32, c net.Conn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w, ok := h.waiting[id]; ok {
		delete(h.waiting, id)
		w <- c
		return true
	}
	if old, ok := h.arrived[id]; ok {
		// The port was used again before anybody claimed the first connection.
		old.expire.Stop()
		old.conn.Close()
		delete(h.arrived, id)
	}
	if len(h.arrived) >= maxUnclaimed {
		return false
	}
	h.arrived[id] = arrival{conn: c, expire: time.AfterFunc(unclaimedFor, func() { h.expire(id, c) })}
	return true
}

func (h *Hub) expire(id uint32, c net.Conn) {
	h.mu.Lock()
	if h.arrived[id].conn == c {
		delete(h.arrived, id)
	}
	h.mu.Unlock()
	c.Close()
}

func (h *Hub) closeAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, a := range h.arrived {
		a.expire.Stop()
		a.conn.Close()
		delete(h.arrived, id)
	}
}

// Take claims the connection with identity id; it may arrive after the request
// that names it, since the two travel on different connections.
func (h *Hub) Take(ctx context.Context, id uint32) (net.Conn, error) {
	h.mu.Lock()
	if a, ok := h.arrived[id]; ok && a.expire.Stop() {
		delete(h.arrived, id)
		h.mu.Unlock()
		return a.conn, nil
	}
	if _, ok := h.waiting[id]; ok {
		h.mu.Unlock()
		return nil, fault.New(fault.InvalidArgument, "stdio port %d is named twice", id)
	}
	w := make(chan net.Conn, 1)
	h.waiting[id] = w
	h.mu.Unlock()
	select {
	case c := <-w:
		return c, nil
	case <-ctx.Done():
	}
	h.mu.Lock()
	delete(h.waiting, id)
	h.mu.Unlock()
	select {
	case c := <-w: // it came at the last moment
		c.Close()
	default:
	}
	return nil, fault.New(fault.InvalidArgument, "no connection from stdio port %d: dial guest port %d before naming it: %w",
		id, protocols.StdioPort, context.Cause(ctx))
}
