// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// frameHead is the size of a frame's header in yamux: version, type, two bytes of
// flags, stream and length, 32 bits each, big endian (yamux spec.md). Frames of
// type 0 have as many bytes behind it as length says, the others none.
const frameHead = 12

// endMark takes the place of a frame's header after a session's last frame. No
// frame begins with its first byte, which is where yamux has its version, 0.
var endMark = []byte("KATAEND1\r\n\r\n")

// Line is a byte stream that carries one session after another, each opened by a
// hello and ended by a mark of both ends.
type Line struct {
	net.Conn
	rest []byte // read already, and not of the session that has ended; its reader's
}

// NewLine makes a line of a connection, which it owns.
func NewLine(c net.Conn) *Line { return &Line{Conn: c} }

// Read reads what is between sessions.
func (l *Line) Read(b []byte) (int, error) {
	if len(l.rest) > 0 {
		n := copy(b, l.rest)
		l.rest = l.rest[n:]
		return n, nil
	}
	return l.Conn.Read(b)
}

// session is one of the line's: a connection that ends without the line, if
// either end says so.
type session struct {
	*Line
	host bool
	over chan struct{} // closed when the other end's mark was read

	// The reader's.
	head [frameHead]byte
	have int    // bytes of head
	body uint64 // bytes until the next head
	eof  bool

	mu      sync.Mutex // held while a frame is written
	leaving bool       // guarded by mu; this end ends it and the line stays
	closed  bool       // guarded by mu
}

func newSession(l *Line, host bool) *session {
	return &session{Line: l, host: host, over: make(chan struct{})}
}

// Read reads the session's bytes, io.EOF after them.
func (s *session) Read(b []byte) (int, error) {
	for !s.eof {
		n, err := s.Line.Read(b)
		own := s.scan(b[:n])
		if own > 0 {
			return own, nil
		}
		if err != nil {
			return 0, err
		}
	}
	return 0, io.EOF
}

// scan returns how many bytes of b are the session's, and notes its end.
func (s *session) scan(b []byte) (own int) {
	for i := 0; i < len(b); {
		if s.body > 0 {
			n := min(s.body, uint64(len(b)-i))
			s.body -= n
			i += int(n)
			own = i
			continue
		}
		n := copy(s.head[s.have:], b[i:])
		s.have += n
		i += n
		marked := s.head[0] == endMark[0]
		if !marked {
			own = i
		}
		if s.have < frameHead {
			continue
		}
		s.have = 0
		switch {
		case marked && bytes.Equal(s.head[:], endMark):
			s.eof = true
			s.rest = append(bytes.Clone(b[i:]), s.rest...)
			close(s.over)
			return own
		case marked: // let yamux refuse it
			s.eof = true
			return own
		case s.head[1] == 0:
			s.body = uint64(binary.BigEndian.Uint32(s.head[8:]))
		}
	}
	return own
}

// Write writes one frame.
func (s *session) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	return s.Conn.Write(b)
}

// orderly tells whether the line is to stay: the host has said so, whom a guest
// obeys and who does not obey a guest.
func (s *session) orderly() bool {
	if !s.host {
		return s.ended()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leaving
}

// ended tells whether the other end's mark was read.
func (s *session) ended() bool {
	select {
	case <-s.over:
		return true
	default:
		return false
	}
}

// leave says that the session's Close keeps the line.
func (s *session) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving = true
}

// Close ends the session, and the line with it unless that is orderly.
func (s *session) Close() error {
	if !s.orderly() {
		return s.Conn.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	_, err := s.Conn.Write(endMark)
	if s.ended() {
		return err
	}
	return errors.Join(err, s.Conn.SetReadDeadline(time.Unix(1, 0))) // wakes the reader
}

// finish reads what is left of a session that this end has closed.
func (s *session) finish(ctx context.Context) error {
	if err := s.Conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Conn.SetReadDeadline(time.Unix(1, 0)) })
	var b [4096]byte
	var err error
	for err == nil {
		_, err = s.Read(b[:])
	}
	if !stop() {
		return ctx.Err()
	}
	if s.ended() {
		return nil
	}
	return err
}
