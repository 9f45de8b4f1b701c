// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// dial opens a stream to a port of the guest.
func (s *stack) dial(ctx context.Context, port uint32) (net.Conn, error) {
	remote := Addr{CID: uint32(s.guestCID), Port: port}
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "vsock", Addr: remote, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	s.mu.Lock()
	if err := s.err; err != nil || s.full() {
		s.mu.Unlock()
		if err == nil {
			err = os.NewSyscallError("connect", unix.ENOBUFS)
		}
		return fail(err)
	}
	k := key{host: s.pickPort(), guest: port}
	c := s.newConn(k)
	c.dialled, c.pend = true, pendRequest
	s.dialPorts[k.host] = struct{}{}
	s.enqueue(c)
	s.flush()
	for {
		select {
		case <-c.wwake:
		case <-ctx.Done():
		}
		s.mu.Lock()
		switch {
		case c.established:
			s.mu.Unlock()
			return c, nil
		case c.err != nil:
			s.mu.Unlock()
			return fail(os.NewSyscallError("connect", c.err))
		case ctx.Err() != nil:
			if c.pend&pendRequest == 0 { // the guest knows of it
				s.reset(k)
			}
			s.forget(c)
			s.flush()
			return fail(ctx.Err())
		}
		s.mu.Unlock()
	}
}

// listener is one host port that the guest can dial.
type listener struct {
	s      *stack
	addr   Addr
	queue  chan *conn    // filled under s.mu, which is what keeps it from blocking
	closed chan struct{} // closed under s.mu, once
}

// listen opens a host port; 0 picks one.
func (s *stack) listen(port uint32) (net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.err
	if port == 0 {
		port = s.pickPort()
	}
	addr := Addr{CID: HostCID, Port: port}
	if err == nil {
		_, dialled := s.dialPorts[port]
		if s.listeners[port] != nil || dialled {
			err = os.NewSyscallError("bind", unix.EADDRINUSE)
		} else if len(s.listeners) >= maxConns {
			err = os.NewSyscallError("bind", unix.ENOBUFS)
		}
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: "vsock", Addr: addr, Err: err}
	}
	l := &listener{s: s, addr: addr, queue: make(chan *conn, maxBacklog), closed: make(chan struct{})}
	s.listeners[port] = l
	return l, nil
}

// Accept returns the next stream that the guest has opened.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
	default:
		select {
		case c := <-l.queue:
			return c, nil
		case <-l.closed:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: "vsock", Addr: l.addr, Err: net.ErrClosed}
}

// Addr is the host port.
func (l *listener) Addr() net.Addr { return l.addr }

// Close refuses the guest from now on and resets what nobody has accepted.
func (l *listener) Close() error {
	l.s.mu.Lock()
	defer l.s.flush()
	if !l.shut() {
		return &net.OpError{Op: "close", Net: "vsock", Addr: l.addr, Err: net.ErrClosed}
	}
	return nil
}

// shut closes the listener under s.mu; false if it was closed before.
func (l *listener) shut() bool {
	select {
	case <-l.closed:
		return false
	default:
	}
	close(l.closed)
	delete(l.s.listeners, l.addr.Port)
	for {
		select {
		case c := <-l.queue:
			if !c.gone {
				l.s.reset(c.key)
			}
			c.fail(unix.ECONNRESET)
			c.in.drop() // nobody will read it
			l.s.release(c)
		default:
			return true
		}
	}
}
