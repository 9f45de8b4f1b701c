// SPDX-License-Identifier: Apache-2.0

package streams

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/kata-v2/kata/guest-agent/fault"
)

// maxPending bounds what the host has sent for a process that does not read it,
// and that a parked Set keeps: the window of a stream and what a host writes at a time.
const maxPending = 2 << 20

// parking is a Set's state between two hosts.
//
//	flowing ──Park──▶ parked ──Attach──▶ flowing
type parking struct {
	mu     sync.Mutex
	active int           // guarded by mu; pumps that have not ended
	parked int           // guarded by mu; those of them that wait for Attach
	resume chan struct{} // guarded by mu; closed by Attach; nil while flowing
	change chan struct{} // guarded by mu; closed when the numbers change
	gone   chan struct{} // closed by Close
}

func newParking() parking { return parking{change: make(chan struct{}), gone: make(chan struct{})} }

// count changes the numbers of pumps; mu is held.
func (p *parking) count(active, parked int) {
	p.active += active
	p.parked += parked
	close(p.change)
	p.change = make(chan struct{})
}

// begin and end are of a pump.
func (p *parking) begin() { p.mu.Lock(); defer p.mu.Unlock(); p.count(1, 0) }
func (p *parking) end()   { p.mu.Lock(); defer p.mu.Unlock(); p.count(-1, 0) }

// wanted tells whether pumps are to park.
func (p *parking) wanted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resume != nil
}

// wait is the stay of a pump that has parked; false: the Set is closed.
func (p *parking) wait() bool {
	p.mu.Lock()
	resume := p.resume
	if resume == nil {
		p.mu.Unlock()
		return true
	}
	p.count(0, 1)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.count(0, -1)
		p.mu.Unlock()
	}()
	select {
	case <-resume:
		return true
	case <-p.gone:
		return false
	}
}

// conn is the connection of stdin, stdout or stderr.
func (s *Set) conn(i int) net.Conn {
	s.park.mu.Lock()
	defer s.park.mu.Unlock()
	return s.conns[i]
}

// Park hands what was read of the process to the host, ends the connections and
// keeps the pipes: a process that writes waits when they are full. What the host
// has sent and the process has not read is kept. It returns when that is done, for
// which the host reads its output connections to their ends and ends stdin's, the
// latter after BeginPark.
func (s *Set) Park(ctx context.Context) error {
	if s.cfg.Poll {
		return nil // the pipes are all there is
	}
	s.BeginPark()
	s.wake(time.Unix(1, 0))
	p := &s.park
	for {
		p.mu.Lock()
		all, change := p.parked == p.active, p.change
		p.mu.Unlock()
		if all {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "streams of a process do not come to rest: %w", context.Cause(ctx))
		}
	}
}

// BeginPark says that Park follows: the end of the host's stdin connection is not
// that of the process's input any more.
func (s *Set) BeginPark() {
	p := &s.park
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.resume == nil && !s.cfg.Poll {
		p.resume = make(chan struct{})
	}
}

// wake interrupts the pumps' work with the process, or lets them work.
func (s *Set) wake(deadline time.Time) {
	for _, f := range s.out {
		if f != nil {
			_ = f.SetReadDeadline(deadline) // a closed file needs none
		}
	}
	if s.in != nil {
		_ = s.in.SetWriteDeadline(deadline)
	}
}

// Attach lets data flow again, to and from new connections, which the Set owns; nil
// is none. For a process that has ended they are closed.
func (s *Set) Attach(stdin, stdout, stderr net.Conn) error {
	fresh := [3]net.Conn{stdin, stdout, stderr}
	p := &s.park
	p.mu.Lock()
	resume, closed := p.resume, false
	select {
	case <-p.gone:
		closed = true
	default:
	}
	if resume == nil || closed || s.cfg.Poll {
		p.mu.Unlock()
		closeConns(fresh)
		if resume == nil && !closed {
			return fault.New(fault.FailedPrecondition, "attach: the process's streams are not parked")
		}
		return nil
	}
	for i, c := range fresh {
		if !s.flows[i] && c != nil { // it has ended, or there never was one
			c.Close()
			c = nil
		}
		s.conns[i] = c
	}
	s.wake(time.Time{})
	p.resume = nil
	p.mu.Unlock()
	close(resume)
	return nil
}

func closeConns(conns [3]net.Conn) {
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

// ends notes that stream i has nothing more to carry. A connection that it was
// given at that moment is closed.
func (s *Set) ends(i int) {
	s.park.mu.Lock()
	s.flows[i] = false
	c := s.conns[i]
	s.park.mu.Unlock()
	if c != nil {
		c.Close()
	}
}

// pumpOut ends when every holder of the process's end has closed it; then the
// connection is closed, which tells the host that it has everything.
func (s *Set) pumpOut(i int, src *os.File) {
	defer s.ends(i)
	for {
		c := s.conn(i)
		var dst io.Writer
		if c != nil { // a terminal nobody reads must not block its process
			dst = c
		}
		err := copyStream(dst, src, &s.taken[i-1]) // an error of dst means that the host went away: nobody to tell
		if !errors.Is(err, os.ErrDeadlineExceeded) || !s.park.wanted() {
			return
		}
		if c != nil {
			c.Close()
		}
		if !s.park.wait() {
			return
		}
	}
}

// pumpIn moves what the host sends to the process until either ends.
func (s *Set) pumpIn() {
	defer s.ends(0)
	var pending []byte
	for {
		c := s.conn(0)
		if len(pending) > 0 {
			n, err := s.in.Write(pending)
			pending = pending[n:]
			if err != nil && !s.parking(err) {
				return
			}
		}
		if c == nil && len(pending) == 0 && !s.park.wanted() {
			return // the new host has nothing to send
		}
		var err error
		if c != nil {
			pending, err = s.carry(c, pending)
			c.Close()
		}
		if err != nil || !s.park.wanted() || !s.park.wait() {
			return
		}
	}
}

// parking tells whether a write to the process was interrupted by Park.
func (s *Set) parking(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) && s.park.wanted()
}

// errTooMuch is the end of a host that does not keep to the window.
var errTooMuch = errors.New("more input for a process than a host may have under way")

// carry moves a connection to the process until it ends. What a Park kept back is
// pending; an error is the process's.
func (s *Set) carry(c net.Conn, pending []byte) ([]byte, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := c.Read(*buf)
		data := (*buf)[:n]
		if len(pending) == 0 && n > 0 {
			wrote, werr := s.in.Write(data)
			if werr != nil && !s.parking(werr) {
				return nil, werr
			}
			data = data[wrote:]
		}
		if pending = append(pending, data...); len(pending) > maxPending {
			return nil, errTooMuch
		}
		if err != nil {
			return pending, nil
		}
	}
}
