// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"net"
	"sync"
)

// trackingListener knows when all connections that it accepted have been closed.
type trackingListener struct {
	net.Listener

	mu   sync.Mutex
	open int           // guarded by mu
	none chan struct{} // guarded by mu; closed when open falls to 0, nil when nobody waits
}

// Accept implements net.Listener.
func (l *trackingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.open++
	l.mu.Unlock()
	return &trackedConn{Conn: c, closed: sync.OnceFunc(l.closed)}, nil
}

func (l *trackingListener) closed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	if l.open == 0 && l.none != nil {
		close(l.none)
		l.none = nil
	}
}

// wait returns when no connection is open or ctx has ended.
func (l *trackingListener) wait(ctx context.Context) {
	l.mu.Lock()
	if l.open == 0 {
		l.mu.Unlock()
		return
	}
	if l.none == nil {
		l.none = make(chan struct{})
	}
	none := l.none
	l.mu.Unlock()
	select {
	case <-none:
	case <-ctx.Done():
	}
}

type trackedConn struct {
	net.Conn
	closed func()
}

// Close implements net.Conn.
func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	c.closed()
	return err
}
