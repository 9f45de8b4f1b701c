// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// The device's queues (virtio 1.3 §5.10.2). QEMU keeps the event queue for itself.
const (
	rxQueue    = 0 // to the guest
	txQueue    = 1 // from the guest
	eventQueue = 2
	numQueues  = 3
)

const (
	pumpBatch  = 64 // packets to the guest per lock and interrupt
	pumpRounds = 4  // batches that a caller sends before it leaves the rest to flushLoop
	txBatch    = 32 // packets from the guest per lock
)

// queue is one virtqueue as QEMU sets it up.
type queue struct {
	index             int
	num, base         uint16
	desc, avail, used uint64 // addresses in QEMU
	addressed         bool
	enabled           bool
	kick              *os.File
	done              chan struct{} // closed when the goroutine that serves it has ended; nil: none

	ring *vring   // nil while stopped
	call *os.File // nil: the guest wants no interrupts
}

// parts finds the ring's memory in m.
func (q *queue) parts(m memory) (desc, avail, used []byte, err error) {
	nd, na, nu := ringSizes(q.num)
	if desc, err = m.user(q.desc, nd); err != nil {
		return
	}
	if avail, err = m.user(q.avail, na); err != nil {
		return
	}
	used, err = m.user(q.used, nu)
	return
}

// startQueue starts q as soon as everything that it needs is known: a ring
// starts with its kick, and is enabled on its own if protocol features are on.
func (d *User) startQueue(q *queue) error {
	enabled := q.enabled || d.features&featProtoFeatures == 0
	if q.ring != nil || !enabled || !q.addressed || q.num == 0 || q.kick == nil {
		return nil
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	err := guard(func() error {
		desc, avail, used, err := q.parts(d.mem)
		if err != nil {
			return err
		}
		r, err := newVring(q.num, q.base, desc, avail, used, d.features&featEventIdx != 0)
		if err != nil {
			return err
		}
		if _, err := r.arm(); err != nil {
			return err
		}
		q.ring = r
		return nil
	})
	if err != nil {
		return fmt.Errorf("start queue %d: %w", q.index, err)
	}
	if q.index != eventQueue { // nothing is ever sent there
		q.done = make(chan struct{})
		go d.runQueue(q, q.ring, q.kick, q.done)
	}
	return nil
}

// stopQueue takes the ring out of use and remembers where it was.
func (d *User) stopQueue(q *queue) {
	d.s.mu.Lock()
	if q.ring != nil {
		q.base = q.ring.next
	}
	q.ring = nil
	d.s.mu.Unlock()
	if q.done != nil {
		_ = q.kick.SetReadDeadline(time.Unix(1, 0))
		<-q.done
		q.done = nil
		_ = q.kick.SetReadDeadline(time.Time{})
	}
}

// releaseQueue stops q for good.
func (d *User) releaseQueue(q *queue) {
	d.stopQueue(q)
	q.setKick(nil)
	d.setCall(q, nil)
}

func (q *queue) setKick(f *os.File) {
	if q.kick != nil {
		_ = q.kick.Close()
	}
	q.kick = f
}

// setCall replaces the eventfd that interrupts the guest. QEMU does so while the
// ring runs, whenever the guest masks or unmasks the vector, and looks at the old
// one only once. An interrupt on its way there would be lost, and a guest that
// waits for one gets no second: so the new one always starts with one.
func (d *User) setCall(q *queue, f *os.File) {
	d.s.mu.Lock()
	old := q.call
	q.call = f
	d.s.mu.Unlock()
	signal(f)
	if old != nil {
		_ = old.Close()
	}
}

// runQueue serves a running ring until it is stopped.
func (d *User) runQueue(q *queue, r *vring, kick *os.File, done chan struct{}) {
	defer close(done)
	var count [8]byte
	for {
		for d.service(q, r) {
			// Whom the packets were for runs now; what the guest adds
			// meanwhile needs no kick, since the ring is not armed yet.
			runtime.Gosched()
		}
		if _, err := kick.Read(count[:]); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, os.ErrClosed) {
				d.s.mu.Lock()
				d.failLocked(fmt.Errorf("kick of queue %d: %w", q.index, err))
				d.s.mu.Unlock()
			}
			return
		}
	}
}

// service does what a kick asks for and reports whether more is to be done.
func (d *User) service(q *queue, r *vring) (more bool) {
	d.s.mu.Lock()
	defer d.flush()
	if q.ring != r || d.s.err != nil {
		return false
	}
	if q.index == rxQueue {
		r.disarm() // flush arms it if it still finds too few buffers
		return false
	}
	err := guard(func() (err error) {
		more, err = d.drain(r)
		return err
	})
	if err != nil {
		d.failLocked(err)
		return false
	}
	return more
}

// drain takes a batch of packets from the guest.
func (d *User) drain(r *vring) (more bool, err error) {
	for i := range txBatch {
		c, ok, err := r.pop(d.mem, false)
		if err != nil {
			return false, err
		}
		if !ok && i > 0 {
			break // armed when the next look finds nothing either
		}
		if !ok {
			return r.arm()
		}
		r.disarm()
		var b [headerLen]byte
		if c.segs.copyOut(b[:], 0) != headerLen {
			return false, fmt.Errorf("%w: packet of %d bytes has no header", errRing, c.total)
		}
		h := parseHeader(&b)
		if uint64(h.length) > c.total-headerLen {
			return false, fmt.Errorf("%w: packet of %d bytes claims a payload of %d", errRing, c.total, h.length)
		}
		d.s.receive(h, c.segs)
		r.push(c.head, 0)
	}
	return true, nil
}

// flush sends what waits for the guest as far as its buffers reach, unlocks
// s.mu and interrupts the guest.
func (d *User) flush() {
	for round := 1; ; round++ {
		more := false
		var calls [2]*os.File
		if d.s.err == nil {
			err := guard(func() (err error) {
				if more, err = d.pump(); err != nil {
					return err
				}
				for i := range calls {
					if q := &d.queues[i]; q.ring != nil && q.ring.publish() {
						calls[i] = q.call
					}
				}
				return nil
			})
			if err != nil {
				d.failLocked(err)
				more = false
			}
		}
		d.s.mu.Unlock()
		for _, f := range calls {
			signal(f)
		}
		if !more {
			return
		}
		if round == pumpRounds {
			wake(d.flusher)
			return
		}
		d.s.mu.Lock()
	}
}

// pump sends a batch of packets and reports whether the guest has buffers for more.
func (d *User) pump() (more bool, err error) {
	r := d.queues[rxQueue].ring
	if r == nil {
		return false, nil
	}
	for range pumpBatch {
		if !d.s.wanting() {
			return false, nil
		}
		c, ok, err := r.pop(d.mem, true)
		if err != nil {
			return false, err
		}
		if !ok {
			if more, err := r.arm(); !more || err != nil {
				return false, err
			}
			continue
		}
		r.disarm()
		if c.total <= headerLen {
			return false, fmt.Errorf("%w: receive buffer of %d bytes; want more than a header of %d", errRing, c.total, headerLen)
		}
		r.push(c.head, d.s.next(c.segs, c.total))
	}
	return d.s.wanting(), nil
}

// flushLoop sends what those who queued it have left over.
func (d *User) flushLoop() {
	for {
		select {
		case <-d.flusher:
			d.s.mu.Lock()
			d.flush()
		case <-d.stopped:
			return
		}
	}
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// signal interrupts the guest. A full counter means that it has been
// interrupted already; a closed file, that the ring was stopped meanwhile.
func signal(f *os.File) {
	if f != nil {
		_, _ = f.Write(one)
	}
}

// eventFile wraps an eventfd, which it owns from then on, for the netpoller.
func eventFile(fd int, name string) (*os.File, error) {
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil || link != "anon_inode:[eventfd]" {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s descriptor is %q (%v); want an eventfd", name, link, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s eventfd: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
