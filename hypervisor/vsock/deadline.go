// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"net"
	"time"
)

// deadline is one direction's deadline; stack.mu guards it.
type deadline struct {
	expired bool
	timer   *time.Timer
	set     uint // counts settings, so that a timer that lost a race is void
}

func (d *deadline) stop() {
	d.set++
	d.expired = false
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

// setDeadline moves d to t and wakes who waits on ch when it is reached.
func (c *conn) setDeadline(d *deadline, ch chan struct{}, t time.Time) {
	d.stop()
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		d.expired = true
		wake(ch)
		return
	}
	set := d.set
	d.timer = time.AfterFunc(left, func() {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		if d.set == set {
			d.expired = true
			wake(ch)
		}
	})
}

func (c *conn) setDeadlines(t time.Time, read, write bool) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	if read {
		c.setDeadline(&c.rdead, c.rwake, t)
	}
	if write {
		c.setDeadline(&c.wdead, c.wwake, t)
	}
	return nil
}

// SetDeadline implements net.Conn; a missed one is os.ErrDeadlineExceeded.
func (c *conn) SetDeadline(t time.Time) error { return c.setDeadlines(t, true, true) }

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadlines(t, true, false) }

// SetWriteDeadline implements net.Conn. A Write that misses it has sent a part,
// whose length it returns.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(t, false, true) }
